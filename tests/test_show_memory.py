"""Promises of the memory that is shown: the plan's numbers, few lines, the peak marked, from a plan in JSON as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto import Plan
from dsp_auto.show_memory import show_memory
from dsp_auto.units import show_bytes
from examples.transformer_2d import build as transformer_2d

STATE = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "its step adds": "step_bytes",
    "inputs": "input_bytes",
    "activations": "activation_bytes",
    "all, at the peak": "peak_bytes",
    "capacity": "capacity_bytes",
}


def planned(layers=2, frames=16, training=True, **options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(layers=layers, hidden=16, heads=2, frames=frames, tokens=32)
    with torch.set_grad_enabled(training):
        return dsp_auto.plan(model, "4", args, kwargs, **options)


@pytest.fixture(scope="module")
def plan():
    return planned()


@pytest.fixture(scope="module")
def tight(plan):
    """A plan that has to recompute some blocks."""
    least = planned(capacity=10**9).memory
    found = planned(capacity=least["peak_bytes"] * 3 // 4)
    assert 0 < len(found.recomputed) < 4
    return found


def with_curve(plan, curve):
    peak = max(nbytes for *_, nbytes in curve)
    return replace(plan, memory={**plan.memory, "curve": curve, "peak_bytes": peak, "capacity_bytes": None})


def timeline(text):
    """The cells of the second table."""
    return text.split("\n\n")[1].splitlines()


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_every_number_of_the_breakdown_is_the_plans(plan, tight):
    for found in (plan, tight):
        text = show_memory(found)
        for name, key in STATE.items():
            if found.memory[key] is None:
                assert name not in text
            else:
                assert show_bytes(found.memory[key]) in row(text, name)
        assert found.memory["peak_at"] in text


def test_what_is_kept_back_is_said():
    found = planned(capacity="10MB")
    assert show_bytes(500_000) in row(show_memory(found), "capacity") and "kept back" in row(show_memory(found), "capacity")


def test_a_plan_that_was_read_back_shows_the_same(tight):
    assert show_memory(Plan.from_json(tight.to_json())) == show_memory(tight)


def test_a_block_shows_the_most_of_each_phase(tight):
    text = show_memory(tight)
    for block in ("embed", "blocks.0", "blocks.3", "head"):
        for phase in ("forward", "again", "backward"):
            own = [n for way, path, n in tight.memory["curve"] if way == phase and (path + ".").startswith(block + ".")]
            if own:
                assert show_bytes(max(own)) in row(text, block)
    assert "again" in text and "again" not in show_memory(planned())


def test_the_peak_is_marked_once_where_the_curve_has_it(plan, tight):
    for found in (plan, tight):
        phase, path, _ = max(found.memory["curve"], key=lambda entry: entry[2])
        marked = [line for line in timeline(show_memory(found))[2:] if line.endswith(" peak")]
        block = "the optimizer's step" if phase == "step" else ".".join(path.split(".")[:2])
        assert len(marked) == 1 and marked[0].startswith(block) and show_bytes(found.memory["peak_bytes"]) in marked[0]


def test_bars_are_shares_of_the_capacity_or_of_the_peak(plan, tight):
    full = max(line.count("#") for line in timeline(show_memory(plan)))
    share = tight.memory["peak_bytes"] / tight.memory["capacity_bytes"]
    assert max(line.count("#") for line in timeline(show_memory(tight))) == round(full * share)
    assert "of the capacity" in show_memory(tight) and "of the peak" in show_memory(plan)


def test_28_layers_take_less_than_25_lines():
    found = planned(layers=28, frames=32)
    tight = planned(layers=28, frames=32, capacity=int(found.memory["peak_bytes"] * 0.6))
    assert tight.recomputed
    for lines in map(timeline, map(show_memory, (found, tight))):
        assert len(lines) < 25 and any("…" in line for line in lines)
        assert any(line.startswith("blocks.0 ") for line in lines) and any(line.startswith("blocks.55 ") for line in lines)


def test_a_row_of_many_blocks_has_the_most_of_them(plan):
    curve = [["forward", f"blocks.{n}.mlp", 100 + n % 7] for n in range(30)] + [["forward", "head", 500]]
    lines = timeline(show_memory(with_curve(plan, curve)))
    assert [line.split()[0] for line in lines[2:]] == ["blocks.0", "blocks.1", "blocks.29", "head"]
    assert lines[3].startswith("blocks.1 … blocks.28 ") and "106 B" in lines[3]


def test_two_lists_of_blocks_in_turn_stay_apart(plan):
    curve = [["forward", f"{name}.{n}", 9 * n + 1] for n in range(9) for name in ("space", "time")] + [["forward", "end", 99]]
    shown = [line.split("  ")[0] for line in timeline(show_memory(with_curve(plan, curve)))[2:]]
    assert shown == ["space.0", "time.0", "space.1 … space.7", "time.1 … time.7", "space.8", "time.8", "end"]


def test_blocks_that_are_recomputed_stay_apart_from_those_that_are_not(plan):
    curve = [["forward", f"blocks.{n}", n + 1] for n in range(20)]
    curve += [["again", f"blocks.{n}", 50] for n in range(18, -1, -2)] + [["forward", "end", 99]]
    shown = [line.split("  ")[0] for line in timeline(show_memory(with_curve(plan, curve)))[2:]]
    several = ["8 of blocks.2 … blocks.16", "8 of blocks.3 … blocks.17"]
    assert shown == ["blocks.0", "blocks.1", *several, "blocks.18", "blocks.19", "end"]


def test_the_peak_stands_by_itself_amid_its_blocks(plan):
    curve = [["forward", f"blocks.{n}", 99 if n == 10 else 5] for n in range(20)]
    lines = timeline(show_memory(with_curve(plan, curve)))[2:]
    assert [line.split("  ")[0] for line in lines] == ["blocks.0", "17 of blocks.1 … blocks.18", "blocks.10", "blocks.19"]
    assert lines[2].endswith("peak")


def test_many_ops_of_no_block_are_folded_where_no_block_is_between(plan):
    curve = [["forward", f"add_{n}", 1] for n in range(8)] + [["forward", "blocks.0.mlp", 9]]
    curve += [["forward", f"mul_{n}", 2] for n in range(8)]
    shown = [line.split("  ")[0] for line in timeline(show_memory(with_curve(plan, curve)))[2:]]
    assert shown == ["add_0", "add_1 … add_6", "add_7", "blocks.0", "mul_0", "mul_1 … mul_6", "mul_7"]


def test_inference_has_no_backward_and_no_optimizer():
    text = show_memory(planned(training=False))
    assert "backward" not in text and "optimizer" not in text and "gradients" not in text
