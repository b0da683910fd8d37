"""Promises of what would fit: every number is one that a plan has, and what is said to fit does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsp_auto import suggest
from dsp_auto.capacity import Capacity
from dsp_auto.errors import InfeasibleError
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, prepare
from dsp_auto.suggest import least_bytes, what_would_fit
from dsp_auto.units import show_bytes
from examples.transformer_2d import build as transformer_2d

SIZES = {"layers": 1, "frames": 16, "tokens": 16, "hidden": 32, "heads": 4}


def captured(training=True, **sizes):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**{**SIZES, **sizes})
    with torch.set_grad_enabled(training):
        return capture(model, args, kwargs)


@pytest.fixture(scope="module")
def program():
    return captured()


def options(capacity, **rest):
    return Options.of(capacity, strategy="dsp", **rest)


def least(program, ranks, **rest):
    return least_bytes(prepare(program, as_mesh(ranks), options(1, **rest)))


def line(found, start):
    return next(entry for entry in found if entry.startswith(start))


@pytest.mark.parametrize("recompute", [None, False])
def test_the_least_is_the_capacity_at_which_the_first_plan_fits(program, recompute):
    needed = least(program, 2, recompute=recompute)
    prepared = prepare(program, as_mesh(2), options(needed, recompute=recompute))
    assert decide(prepared).peak_bytes <= needed
    with pytest.raises(InfeasibleError):
        decide(replace(prepared, options=replace(prepared.options, capacity=Capacity(0, needed - 1, 0.0))))


def test_more_ranks_are_suggested_until_they_fit(program):
    needed = {ranks: least(program, ranks) for ranks in (2, 4, 8, 16)}
    assert sorted(needed.values(), reverse=True) == list(needed.values())
    for enough in (4, 8):
        found = what_would_fit(program, as_mesh(2), options(needed[enough]))
        assert line(found, "on ") == f"on {enough} ranks the least is {show_bytes(needed[enough])}: fits"
    found = what_would_fit(program, as_mesh(2), options(1000))
    assert line(found, "on ") == f"on 16 ranks the least is {show_bytes(needed[16])}: still too much"


def test_ranks_are_added_to_the_last_mesh_dim(program, monkeypatch):
    meshes = []
    monkeypatch.setattr(suggest, "prepare", lambda program, mesh, given: meshes.append(mesh) or prepare(program, mesh, given))
    needed = least(program, 4)
    assert f"on 4 ranks the least is {show_bytes(needed)}: fits" in what_would_fit(program, as_mesh("1x2"), options(needed))
    assert {mesh.sizes for mesh in meshes} == {(1, 2), (1, 4)}


def test_more_ranks_than_the_sequences_have_places_are_not_suggested(program):
    found = what_would_fit(program, as_mesh("16"), replace(options(1000), strategy="ring"))
    assert not any(entry.startswith("on ") for entry in found)


def test_recomputing_is_suggested_where_it_was_forbidden(program):
    kept, again = least(program, 2, recompute=False), least(program, 2)
    assert again < kept
    found = what_would_fit(program, as_mesh(2), options((kept + again) // 2, recompute=False))
    assert found[0] == f"recomputing blocks, the least is {show_bytes(again)}: fits"
    assert not any("recomputing" in entry for entry in what_would_fit(program, as_mesh(2), options(1000)))


def test_zero_is_suggested_with_the_replicas_that_there_are(program):
    for sharing in (8, 4):
        given = replace(options(1000), optimizer=replace(options(1000).optimizer, data_parallel=sharing if sharing < 8 else 1))
        shared = replace(given, optimizer=replace(given.optimizer, zero=3, data_parallel=sharing))
        needed = show_bytes(least_bytes(prepare(program, as_mesh(2), shared)))
        wanted = f"with ZeRO-3 over {sharing} data-parallel replicas the least is {needed}: still too much"
        assert line(what_would_fit(program, as_mesh(2), given), "with ZeRO-3") == wanted


def _bytes(text):
    number, unit = re.search(r"about ([0-9.e+]+) (\w+)", text).groups()
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]


def test_half_the_batch_and_16_bit_elements_are_about_what_they_come_to():
    program = captured(batch=4, frames=64)
    found = what_would_fit(program, as_mesh(2), options(1000))
    half = line(found, "with a batch of 2 in place of 4")
    assert _bytes(half) == pytest.approx(least(captured(batch=2, frames=64), 2), rel=0.1)
    narrow = line(found, "in bfloat16")
    assert _bytes(narrow) == pytest.approx(least(captured(batch=4, frames=64, dtype="bfloat16"), 2), rel=0.1)


def test_where_the_optimizer_is_what_does_not_fit_half_the_batch_does_not_help():
    program = captured(batch=2, frames=2, tokens=2)
    half = line(what_would_fit(program, as_mesh(1), options(1000)), "with a batch of 1")
    assert _bytes(half) == pytest.approx(least(program, 1), rel=0.02)


def test_one_sample_and_16_bit_elements_cannot_be_made_less():
    found = what_would_fit(captured(dtype="bfloat16"), as_mesh(2), options(1000))
    assert not any("batch" in entry or "bfloat16" in entry for entry in found)


def test_inference_has_no_blocks_to_recompute_and_no_optimizer():
    found = what_would_fit(captured(training=False), as_mesh(2), options(1000, recompute=False))
    assert found and not any("recomputing" in entry or "ZeRO" in entry for entry in found)


def test_without_time_nothing_is_tried(program):
    assert what_would_fit(program, as_mesh(2), options(1000), seconds=0) == []
