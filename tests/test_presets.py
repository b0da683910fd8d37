"""The five systems of the paper, as presets: each runs for real and sends what its name promises; `auto` sends no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsp_auto
from dsp_auto.cost_models.hardware import Hardware, Kernel, Link
from dsp_auto.errors import InfeasibleError, MeshError, NoShardableFactorError
from dsp_auto.mesh import Mesh, as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.presets import PRESETS
from dsp_auto.planner import Options, decide, prepare
from dsp_auto.rehearse import rehearse
from dsp_auto.verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, traffic
from examples.transformer_2d import build
from tests.parity import compare
from tests.zoo.axial import axial
from tests.zoo.evoformer import evoformer
from tests.zoo.grouped_attention import grouped_attention
from tests.zoo.language import decoder

SYSTEMS = [name for name in PRESETS if name != "auto"]
EVEN = {"frames": 8, "tokens": 16, "hidden": 64, "heads": 4}
UNEVEN = {"frames": 7, "tokens": 11, "hidden": 40, "heads": 5, "batch": 2}
M = 8 * 16 * 64 * 4  # bytes of a sequence tensor of EVEN
# For tests of what any plan must be: "auto" over two mesh dims looks for the best one as long as it may.
ANY_PLAN = {"time_limit": 6.0}


class Separate(nn.Module):
    """Attention over each of two dims, with linears for q, k and v of their own, as the paper draws it."""

    def __init__(self, hidden: int = 64, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(hidden, hidden) for _ in "qkvo") for _ in range(2 * layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, S, C]
        for number, (q, k, v, o) in enumerate(self.blocks):
            rows = x if number % 2 == 0 else x.transpose(0, 1)
            parts = [own(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for own in (q, k, v)]
            out = o(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
            x = x + (out if number % 2 == 0 else out.transpose(0, 1))
        return x


class EveryDim(nn.Module):
    """Attention along each dim of x but the last, one after the other: time, height, width, channels."""

    def __init__(self, dims: int, hidden: int = 8) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(dims))
        self.out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for dim, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x.movedim(dim, -2)).chunk(3, dim=-1)
            x = x + out(F.scaled_dot_product_attention(q, k, v)).movedim(-2, dim)
        return x


def agrees(found) -> bool:
    small = found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE
    return small and all(entry.agrees for entry in found.traffic)


@pytest.mark.parametrize("size", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("mesh", ["2", "3", "4", "2x2", "2x3"])
@pytest.mark.parametrize("strategy", PRESETS)
def test_outputs_gradients_and_bytes_are_those_of_one_device(strategy, mesh, size):
    model, args, kwargs = build(**size)
    args[0].requires_grad_()
    try:
        found = rehearse(model, mesh, args, kwargs, strategy=strategy, **ANY_PLAN)
    except (MeshError, NoShardableFactorError) as error:
        assert strategy == "ulysses" and "heads" in str(error)  # 6 ranks, 5 heads
        return
    assert agrees(found)
    assert found.plan.strategy == strategy


@pytest.mark.parametrize("mesh", ["8", "9", "2x6"])
def test_a_mesh_dim_longer_than_the_shortest_sequence_is_split(mesh):
    model, args, kwargs = build(frames=4, tokens=30, hidden=32, heads=4)
    for strategy in ("dsp", "auto"):
        found = rehearse(model, mesh, args, kwargs, strategy=strategy, shard_parameters=False, **ANY_PLAN)
        assert agrees(found)
    assert found.plan.split or mesh == "2x6"


@pytest.mark.parametrize("mesh", ["4", "2x2", "2x3"])
@pytest.mark.parametrize("shape", [(7, 4, 6, 8), (5, 4, 3, 6, 8)], ids=["3-D", "4-D"])
def test_sequences_of_three_and_four_dims_run_on_meshes_of_one_and_two(shape, mesh):
    for strategy in ("dsp", "auto"):
        given = {"strategy": strategy, "shard_parameters": False, "time_limit": 16.0}
        found = rehearse(EveryDim(len(shape) - 1), mesh, (torch.randn(shape),), **given)
        assert agrees(found)
        assert "gather" not in {entry.primitive for stage in found.plan.stages[:-1] for entry in stage.enter}


def test_what_is_switched_goes_over_the_fast_mesh_dim():
    """Two batches: the slow outer dim shards the batch, for which nothing is sent, and the inner one the sequences."""
    model, args, kwargs = build(frames=16, tokens=32, batch=2)
    links = {"node": Link(5e9, 1e-5), "sp": Link(400e9, 1e-6)}
    hardware = Hardware("cluster", intra=Link(400e9, 1e-6), links=links, kernels={"memory": Kernel()})
    mesh = Mesh(("node", "sp"), (2, 4))
    with torch.no_grad():
        plan = dsp_auto.plan(model, mesh, args, kwargs, strategy="auto", objective="time", hardware=hardware)
    sent = {"node": 0.0, "sp": 0.0}
    for stage in plan.stages:
        for entry in stage.enter:
            if entry.primitive == "switch":
                sent[entry.mesh_dim] += entry.forward_bytes
    assert sent["sp"] > 0 and sent["node"] == 0


def test_4_frames_on_8_ranks_send_at_most_16_mib_a_layer():
    """C 1152, S 4096, bfloat16: heads alone would send 15.75 MiB a layer and device forward."""
    sent = []
    for strategy in (None, "auto"):
        for layers in (1, 3):
            with torch.device("meta"):
                model, args, kwargs = build(
                    layers=layers, hidden=1152, heads=16, frames=4, tokens=4096, dtype="bfloat16", in_channels=4
                )
            plan = dsp_auto.plan(model, "8", args, kwargs, strategy=strategy)
            sent.append(plan.communication["forward_bytes"] / layers)
    assert max(sent) <= 16 * 2**20


def inner_layers(strategy: str, ranks: str, training: bool, **sizes) -> tuple[dict, float]:
    """By primitive (gradient synchronization aside), counts and bytes that one more layer adds; and the paper's volume."""
    plans = []
    for layers in (2, 3):
        model, args, kwargs = build(layers=layers, **sizes)
        with torch.set_grad_enabled(training):
            plans.append(dsp_auto.plan(model, ranks, args, kwargs, strategy=strategy).communication)
    found = {}
    for primitive, entry in plans[1]["by_primitive"].items():
        before = plans[0]["by_primitive"].get(primitive, dict.fromkeys(entry, 0))
        difference = {key: entry[key] - before[key] for key in entry}
        if difference["forward_bytes"]:
            found[primitive] = difference
    return found, plans[1]["paper_forward_volume"] - plans[0]["paper_forward_volume"]


# Table 3 of the paper, per layer of two blocks: volume in M, and primitives.
TABLE = {
    "dsp": (lambda n: 2 / n, {"switch": 2}),
    "ulysses": (lambda n: 4 / n, {"switch": 4}),
    "megatron-lm": (lambda n: 8, {"reduce": 4}),
    "megatron-sp": (lambda n: 8, {"gather": 4, "reduce_scatter": 4}),
    "ring": (lambda n: 2, {"ring": 1}),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", SYSTEMS)
def test_a_layer_sends_what_table_3_says(strategy, ranks):
    volume, counts = TABLE[strategy]
    found, paper = inner_layers(strategy, str(ranks), False, **EVEN)
    assert paper == volume(ranks) * M
    assert {name: entry["count"] for name, entry in found.items()} == counts
    assert sum(entry["forward_bytes"] for entry in found.values()) == volume(ranks) * M * (ranks - 1) / ranks


def test_ulysses_switches_queries_keys_values_and_output_apart_where_they_are_apart():
    plan = dsp_auto.plan(Separate(layers=2), "4", (torch.randn(8, 16, 64),), strategy="ulysses")
    assert plan.communication["by_primitive"]["switch"]["count"] == 2 * 4


@pytest.mark.parametrize("build_model", [grouped_attention, decoder], ids=["gqa", "text"])
def test_keys_and_values_that_are_few_go_whole_or_round(build_model):
    model, args, kwargs = build_model()
    found = rehearse(model, "2", args, kwargs, strategy="ring")
    assert agrees(found) and found.plan.communication["by_primitive"]["ring"]["count"] > 0


def bytes_of_all(program, strategies, **options) -> dict[str, float]:
    """Wire bytes of every strategy that can run a program on 4 ranks."""
    sent = {}
    for strategy in strategies:
        try:
            prepared = prepare(program, as_mesh("4"), Options.of(strategy=strategy, **options))
            sent[strategy] = decide(prepared).objective
        except (NoShardableFactorError, InfeasibleError):
            continue
    return sent


MODELS = {
    "video": lambda: build(frames=16, tokens=64),
    "evoformer": lambda: evoformer(rows=8, columns=8),
    "axial": axial,
    "text": lambda: decoder(heads=4, length=16),
    "gqa": grouped_attention,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_auto_sends_no_more_than_the_best_system(name, training):
    model, args, kwargs = MODELS[name]()
    model.train(training)
    with torch.set_grad_enabled(training):
        sent = bytes_of_all(capture(model, args, kwargs), PRESETS)
    assert sent.pop("auto") <= min(sent.values()) * (1 + 1e-9)


def test_under_one_capacity_auto_sends_no_more_than_any_system_that_fits():
    model, args, kwargs = build(**EVEN, layers=1)
    program = capture(model, args, kwargs)
    for capacity in (1_000_000, 1_300_000):
        sent = bytes_of_all(program, PRESETS, capacity=capacity, optimizer="none")
        assert sent.pop("auto") <= min(sent.values()) * (1 + 1e-9)


def test_parameters_stay_whole_where_asked_and_without_a_strategy():
    model, args, kwargs = build(**EVEN)
    for options in ({}, {"strategy": "auto", "shard_parameters": False}):
        plan = dsp_auto.plan(model, "4", args, kwargs, **options)
        assert {entry["count"] for name, entry in plan.communication["by_primitive"].items() if name == "reduce"} == set()


@pytest.mark.parametrize(
    ("strategy", "says"),
    [("ulysses", "heads of attention"), ("ring", "can go round"), ("megatron-lm", "hidden dim or heads")],
)
def test_a_model_that_a_system_is_not_for_is_refused_with_the_reason(strategy, says):
    class Softmax(nn.Module):
        def forward(self, x):
            return x.softmax(1) + x.softmax(0)

    with pytest.raises(NoShardableFactorError, match=says):
        dsp_auto.plan(Softmax(), "2", (torch.randn(4, 6, 8),), strategy=strategy)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_system_measures_on_gloo_what_it_predicts(world, ranks):
    for strategy in PRESETS:
        told = world(ranks).run(compare, build, EVEN, options={"strategy": strategy})
        assert max(own["output"] for own in told) <= OUTPUT_TOLERANCE, strategy
        assert max(own["gradient"] for own in told) <= GRADIENT_TOLERANCE, strategy
        plan = dsp_auto.Plan.from_json(told[0]["plan"])
        measured = [{tuple(key.split()): value for key, value in own["measured"].items()} for own in told]
        entries = traffic(plan, measured)
        assert all(entry.agrees for entry in entries), strategy
        planned = plan.communication["by_primitive"]
        for entry in entries:
            if entry.direction == "forward" and entry.primitive not in ("replicate", "ring"):
                assert entry.collectives == planned[entry.primitive]["count"], (strategy, entry)
