"""Promises of the longest sequences: the one that is said fits, and one step more does not."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto.errors import InfeasibleError
from dsp_auto.longest import PROBES, _lengths, _Probe
from examples.transformer_2d import build as transformer_2d

CAPACITY = 600_000
SIZES = {"layers": 1, "frames": 8, "tokens": 16, "hidden": 32, "heads": 4}


def plans(ranks, frames, strategy):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**{**SIZES, "frames": frames})
    return dsp_auto.plan(model, str(ranks), args, kwargs, strategy=strategy, capacity=CAPACITY)


@pytest.mark.parametrize("step", [1, 4])
def test_the_longest_fits_and_one_step_more_does_not(step):
    found = dsp_auto.fit(
        transformer_2d, 2, CAPACITY, arguments=SIZES, strategies=["dsp", "megatron-lm"], sequence="frames", step=step
    )
    assert [(one.sequence_parallel, one.strategy) for one in found.longest] == [
        (ranks, name) for ranks in (1, 2) for name in ("dsp", "megatron-lm")
    ]
    for one in found.longest:
        assert one.value % step == 0 and one.fails == one.value + step and not one.refused
        assert plans(one.sequence_parallel, one.value, one.strategy).memory["peak_bytes"] <= CAPACITY
        with pytest.raises(InfeasibleError):
            plans(one.sequence_parallel, one.fails, one.strategy)
    shown = str(found).partition("longest frames that fits")[2]
    for one in found.longest:
        assert str(one.value) in shown and "or more" not in shown


class Table(nn.Module):
    """Learned positions: no longer sequence."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.ones(rows, 8))

    def forward(self, x):  # [B, L, 8]
        return (x + self.rows[: x.shape[1]]).softmax(1)


def table(length=4, rows=13):
    return Table(rows), (torch.ones(1, length, 8),), {}


def test_what_the_model_does_not_take_ends_the_search_and_is_said():
    found = dsp_auto.fit(table, 2, 10**9, strategies=["dsp"], sequence="length")
    one = found.longest[0]
    assert (one.value, one.fails) == (13, 14) and "length 13" in one.refused and one.refused in str(found)


def test_a_length_that_is_too_short_for_the_ranks_is_passed():
    found = dsp_auto.fit(table, 7, 10**9, arguments={"rows": 64}, strategies=["dsp"], sequence="length")
    assert [(one.sequence_parallel, one.value) for one in found.longest] == [(1, 64), (7, 64)]


def test_a_strategy_that_no_length_admits_has_the_reason():
    found = dsp_auto.fit(table, 2, 10**9, strategies=["ulysses"], sequence="length")
    one = found.longest[1]
    assert one.value is None and "heads" in one.refused and "none" in str(found)


def flat(length=4):
    return nn.Linear(8, 8), (torch.ones(4, 8),), {}


def test_what_never_fails_is_said_to_be_no_end():
    found = dsp_auto.fit(flat, 1, 10**9, strategies=["dsp"], sequence="length")
    one = found.longest[0]
    assert one.value >= 4 and one.fails is None and f"{one.value} or more" in str(found)


def test_a_capacity_that_nothing_fits_in_has_no_longest():
    found = dsp_auto.fit(table, 1, 10, strategies=["dsp"], sequence="length")
    assert (found.longest[0].value, found.longest[0].fails) == (None, 1) and "none" in str(found)


def test_each_length_is_captured_a_few_times_at_most(monkeypatch):
    module = importlib.import_module("dsp_auto.fit")
    capture, calls = module.capture, []
    monkeypatch.setattr(module, "capture", lambda *args: calls.append(args[1][0].shape[1]) or capture(*args))
    dsp_auto.fit(table, 1, 3000, arguments={"rows": 64}, strategies=["dsp", "ring"], sequence="length")
    assert calls and len(calls) == len(set(calls))


@settings(deadline=None, max_examples=300)
@given(
    fixed=st.floats(0, 1e6),
    slope=st.floats(1, 1e4),
    ranks=st.sampled_from([1, 2, 7, 64]),
    first=st.integers(1, 1000),
    step=st.sampled_from([1, 3, 16]),
    usable=st.integers(1, 10**7),
)
def test_a_search_ends_at_the_last_that_fits(fixed, slope, ranks, first, step, usable):
    def least(length):
        return int(fixed + slope * math.ceil(length / ranks))

    known = {}
    for length in _lengths(known, first, usable, step):
        assert length > 0 and length % step == 0 and length not in known
        known[length] = _Probe(least(length) <= usable, least(length))
    assert len(known) <= PROBES
    fits = max((n for n, probe in known.items() if probe.fits), default=0)
    fails = min((n for n, probe in known.items() if probe.fails and n > fits), default=None)
    assert fails is not None and fails - fits == step
