"""Promises of `compare`: the paper's Table 3 exactly, a reason for what cannot run, one capture, the figures of the plans."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto import Comparison, DspError, LayoutError, MeshError, StrategyError
from dsp_auto.cost_models.hardware import PROFILES, Hardware
from dsp_auto.passes.capture import capture
from dsp_auto.passes.presets import PRESETS
from dsp_auto.predict import predict
from examples.transformer_2d import build as transformer_2d
from tests.zoo.language import decoder

RANKS, SIZES = 4, {"frames": 8, "tokens": 16, "hidden": 64}
WHOLE = 8 * 16 * 64 * 4  # M, bytes of the activation between blocks
PAPER = ("dsp", "ulysses", "megatron-lm", "megatron-sp", "ring")


def compared(depth, **options):
    """The paper's Transformer-2D of so many layers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(layers=depth, **SIZES)
    return dsp_auto.compare(model, str(RANKS), args, kwargs, **options)


@pytest.fixture(scope="module")
def two():
    """All strategies, two layers: four blocks."""
    return compared(2)


@pytest.fixture(scope="module")
def three():
    return compared(3, strategies=PAPER)


class Attention(nn.Module):
    """Attention written out: no op is all of it."""

    def __init__(self, hidden=8):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)

    def forward(self, x):  # [B, L, C]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


def written_out(mesh, *strategies):
    return dsp_auto.compare(Attention(), mesh, (torch.ones(1, 8, 8),), strategies=strategies)


# A layer in the middle: what three layers send and two do not. At the ends a preset brings tensors in, once a model.
@pytest.mark.parametrize(
    ("strategy", "volume"),
    [
        ("dsp", 2 * WHOLE / RANKS),
        ("ulysses", 4 * WHOLE / RANKS),
        ("megatron-lm", 8 * WHOLE),
        ("megatron-sp", 8 * WHOLE),
        ("ring", 2 * WHOLE),
    ],
)
def test_an_inner_layer_sends_what_the_papers_table_3_says(two, three, strategy, volume):
    sent = [found[strategy].plan.communication["paper_forward_volume"] for found in (two, three)]
    assert sent[1] - sent[0] == volume


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [
        ("dsp", {"all_to_all": 2}, {"all_to_all": 2}),
        ("ulysses", {"all_to_all": 2}, {"all_to_all": 2}),  # q, k and v are one tensor: one there, one back
        ("megatron-lm", {"all_reduce": 4}, {"all_reduce": 4}),
        ("megatron-sp", {"all_gather": 4, "reduce_scatter": 4}, {"all_gather": 4, "reduce_scatter": 4}),
        ("ring", {"send": RANKS - 1}, {"send": 2 * (RANKS - 1)}),
    ],
)
def test_an_inner_layer_issues_the_collectives_of_its_system(two, three, strategy, forward, backward):
    for way, wanted in (("forward", forward), ("backward", backward)):
        before, after = (found[strategy].collectives[way] for found in (two, three))
        assert {kind: after[kind].count - before[kind].count for kind in wanted} == wanted
        assert all(after[kind] == before[kind] for kind in after if kind not in wanted)


def test_what_is_issued_is_what_plans_say_and_gradients_of_parameters_stand_apart(two):
    parameters = sum(p.numel() for p in transformer_2d(layers=2, **SIZES)[0].parameters()) * 4
    for candidate in two.candidates:
        sent = candidate.plan.communication
        assert candidate.wire_bytes() == sent["forward_bytes"] + sent["backward_bytes"], candidate.strategy
        assert candidate.wire_bytes("forward") == sent["forward_bytes"], candidate.strategy
    whole = two["dsp"].collectives["parameters"]
    assert list(whole) == ["all_reduce"] and whole["all_reduce"].count == 1
    # All parameters but the last bias, which is added where the output is whole again.
    assert 0.99 * parameters < whole["all_reduce"].wire_bytes * RANKS / (RANKS - 1) / 2 <= parameters
    assert two["megatron-lm"].wire_bytes("parameters") < 0.01 * two["dsp"].wire_bytes("parameters")


def test_candidates_come_in_the_order_of_presets_and_are_the_plans_and_predictions_of_these(two):
    assert [candidate.strategy for candidate in two.candidates] == list(PRESETS)
    found = compared(1, strategies=["ring", "dsp"], hardware="a100")
    assert [candidate.strategy for candidate in found.candidates] == ["dsp", "ring"] and found.hardware == "a100"
    model, args, kwargs = transformer_2d(layers=1, **SIZES)
    for candidate in found.candidates:
        options = {"strategy": candidate.strategy, "hardware": "a100"}
        assert candidate.plan.digest == dsp_auto.plan(model, str(RANKS), args, kwargs, **options).digest
        assert candidate.prediction == predict(model, str(RANKS), args, kwargs, **options)


def test_the_model_is_captured_once(monkeypatch):
    calls = []
    module = importlib.import_module("dsp_auto.compare")
    monkeypatch.setattr(module, "capture", lambda *args: calls.append(args) or capture(*args))
    assert len(compared(1).runnable) == len(PRESETS) and len(calls) == 1


def test_json_round_trips_with_plans_and_reasons():
    model, args, kwargs = decoder(heads=3, length=8)
    found = dsp_auto.compare(model, "4", args, kwargs, strategies=["ulysses", "dsp"], layers=2)
    assert {one.plan is None for one in found.candidates} == {True, False}
    for kept in (found.to_json(), found.to_dict()):
        again = Comparison.from_json(kept)
        assert again == Comparison.from_json(json.loads(found.to_json(indent=2)))
        assert str(again) == str(found) and again.to_dict() == found.to_dict()
    for wrong in ("{}", "[]", "no json", json.dumps({**found.to_dict(), "format": 0}), json.dumps({"format": 1})):
        with pytest.raises(DspError, match="no comparison"):
            Comparison.from_json(wrong)


def test_too_few_heads_for_ulysses_are_a_reason():
    model, args, kwargs = decoder(heads=3, length=8)
    found = dsp_auto.compare(model, "4", args, kwargs)
    assert found["ulysses"].plan is None and found["ulysses"].error == "NoShardableFactorError"
    assert "heads of attention" in found["ulysses"].reason and "=3" in found["ulysses"].reason
    assert {"ring", "auto"} <= {candidate.strategy for candidate in found.runnable}
    assert f"ulysses cannot run: {found['ulysses'].reason}" in str(found)
    with pytest.raises(dsp_auto.StrategyError, match="it has no plan: .*heads of attention"):
        found["ulysses"].wire_bytes()


def test_attention_that_is_no_one_op_is_a_reason_for_ring():
    found = written_out("4", "dsp", "ring")
    assert found["dsp"].plan is not None and found["ring"].plan is None
    assert "go round" in found["ring"].reason and "scaled_dot_product_attention" in found["ring"].reason


def test_a_sequence_shorter_than_the_mesh_is_a_reason():
    found = written_out("17", "dsp")  # a prime, so no dim of the mesh is split
    assert found["dsp"].error == "MeshError" and "=8" in found["dsp"].reason and found.runnable == ()


def test_a_capacity_holds_for_all_and_what_does_not_fit_says_so():
    strategies = ["dsp", "megatron-lm"]
    least = {one.strategy: one.plan.memory["peak_bytes"] for one in compared(1, strategies=strategies).candidates}
    frugal, greedy = sorted(strategies, key=least.__getitem__)
    between = sum(least.values()) // 2
    found = compared(1, strategies=strategies, capacity=between, recompute=False)
    assert found[frugal].plan.memory["capacity_bytes"] == between
    assert found[greedy].error == "InfeasibleError" and "no plan fits" in found[greedy].reason


def test_the_best_are_marked_in_words_and_equals_share_it(two):
    measures = {
        "least wire bytes": lambda one: one.wire_bytes(),
        "least time": lambda one: one.prediction.seconds,
    }
    for what, of in measures.items():
        least = min(map(of, two.candidates))
        assert [what in two.best(one) for one in two.candidates] == [of(one) == least for one in two.candidates]
        assert sum(what in line for line in str(two).splitlines()) >= 1
    unable = written_out("4", "ring")
    assert unable.best(unable["ring"]) == () and "ring cannot run" in str(unable)


def test_inference_has_no_backward():
    with torch.no_grad():
        found = compared(1, strategies=["dsp", "megatron-lm"])
    for candidate in found.runnable:
        assert candidate.wire_bytes("backward", "parameters") == 0 < candidate.wire_bytes("forward")
        assert candidate.prediction.backward == 0
    assert "backward" not in str(found)


def test_per_block_and_per_layer_are_shares_of_the_step(two):
    assert two.blocks == 4 and two.layers is None and "mean over the model's 4" in str(two)
    text = str(compared(2, strategies=["megatron-lm"], layers=2))
    row = next(line for line in text.split("per layer, the mean over 2")[1].splitlines() if "megatron-lm" in line)
    assert "4 all-reduce" in row and row.endswith("256 KiB")  # 8M


class Numbered(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Sequential(nn.Linear(8, 8)), blocks, nn.Linear(8, 8)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("blocks", "count"),
    [
        (lambda: nn.ModuleList(Attention() for _ in range(3)), 3),  # and not the embedding, which is numbered too
        (lambda: nn.ModuleList(nn.Sequential(Attention(), Attention()) for _ in range(2)), 4),
        (lambda: (), 0),
    ],
)
def test_blocks_are_counted_from_the_numbers_in_module_paths(blocks, count):
    module = importlib.import_module("dsp_auto.compare")
    model = Numbered(blocks())
    assert module.count_blocks(capture(model, (torch.ones(1, 8, 8),))) == count


def test_a_measured_profile_of_other_ranks_is_refused_for_all():
    h100 = PROFILES["h100"]
    measured = Hardware("mine", h100.intra, kernels=h100.kernels, measured={"mesh": {"sp": 2}})
    with pytest.raises(StrategyError, match="measured on sp=2"):
        compared(1, hardware=measured)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"strategies": ["magic"]}, StrategyError, "magic"),
        ({"strategies": []}, StrategyError, "no strategies"),
        ({"hardware": "abacus"}, StrategyError, "abacus"),
        ({"layers": 0}, StrategyError, "layers 0"),
        ({"capacity": "lots"}, StrategyError, "lots"),
        ({"in_layouts": {"audio": {"sp": 1}}}, LayoutError, "audio"),
    ],
)
def test_what_is_wrong_for_every_strategy_is_raised(options, error, says):
    with pytest.raises(error, match=says):
        compared(1, **options)


def test_what_is_no_mesh_is_raised():
    with pytest.raises(MeshError, match="4y"):
        written_out("4y", "dsp")
