"""Unmodified models on 2, 3 and 4 ranks: outputs and every gradient of one device, and the bytes that were predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.solve import SLACK
from dsp_auto.plan import Plan
from dsp_auto.planner import Options, decide, finish, prepare
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, compare, rehearsed
from tests.zoo.axial import axial
from tests.zoo.evoformer import esmfold, evoformer
from tests.zoo.grouped_attention import grouped_attention
from tests.zoo.language import decoder, llama
from tests.zoo.opensora import stdit
from tests.zoo.patchtst import patchtst
from tests.zoo.public import latte, timesformer
from tests.zoo.recurrent import space_time
from tests.zoo.unet3d import unet3d
from tests.zoo.video_vae import video_vae
from tests.zoo.weather import weather

EVEN = {"frames": 8, "tokens": 16}
UNEVEN = {"frames": 7, "tokens": 9}
CASES = {
    "transformer_2d 4d even": (transformer_2d, {"habit": "4d", **EVEN}),
    "transformer_2d 4d uneven": (transformer_2d, {"habit": "4d", **UNEVEN}),
    "transformer_2d flat even": (transformer_2d, {"habit": "flat", **EVEN}),
    "transformer_2d flat uneven": (transformer_2d, {"habit": "flat", **UNEVEN}),
    "latte even": (latte, {"frames": 4, "size": 8}),
    "latte uneven": (latte, {"frames": 5, "size": 10}),
    "timesformer even": (timesformer, {"frames": 4, "size": 16}),
    "timesformer uneven": (timesformer, {"frames": 5, "size": 20}),
}
ZOO = {
    "latte uneven": CASES["latte uneven"],
    "timesformer uneven": CASES["timesformer uneven"],
    "stdit": (stdit, {}),
    "evoformer": (evoformer, {}),
    "esmfold": (esmfold, {}),
    "axial": (axial, {}),
    "weather": (weather, {}),
    "patchtst": (patchtst, {}),
    "unet3d": (unet3d, {}),
    "video vae": (video_vae, {}),
    "mamba": (space_time, {"mixer": "mamba"}),
    "rwkv": (space_time, {"mixer": "rwkv"}),
    "linear recurrence": (space_time, {"mixer": "linear"}),
    "grouped queries": (grouped_attention, {"kv_heads": 2, "repeat": "kernel"}),
    "multi query": (grouped_attention, {"kv_heads": 1, "repeat": "model"}),
    "decoder": (decoder, {}),
    "llama": (llama, {}),
}


# Where plans are looked at, and nothing runs: long enough that activations outweigh timesteps, texts and masks.
LONG = {
    "latte": (latte, {"frames": 13, "size": 32, "layers": 2}, None),
    "timesformer": (timesformer, {"frames": 13, "size": 56, "layers": 1}, None),
    "stdit": (stdit, {"frames": 16, "height": 20, "width": 24, "layers": 2}, None),
    "evoformer": (evoformer, {"rows": 20, "columns": 16}, None),
    "esmfold": (esmfold, {"length": 24}, None),
    "axial": (axial, {"frames": 10, "height": 12, "width": 14, "layers": 2}, None),
    "weather": (weather, {"levels": 12, "latitudes": 28, "longitudes": 40}, None),
    "patchtst": (patchtst, {"channels": 20, "length": 128}, None),
    "unet3d": (unet3d, {"frames": 16, "size": 32}, None),
    "video vae": (video_vae, {"frames": 17, "height": 32, "width": 48}, None),
    "mamba": (space_time, {"mixer": "mamba", "frames": 8, "tokens": 64}, {"x": "B T S C"}),
    "rwkv": (space_time, {"mixer": "rwkv", "frames": 8, "tokens": 64}, {"x": "B T S C"}),
    "linear recurrence": (space_time, {"mixer": "linear", "frames": 12, "tokens": 64}, {"x": "B T S C"}),
    "grouped queries": (grouped_attention, {"frames": 16, "tokens": 32, "kv_heads": 2, "repeat": "kernel"}, None),
    "multi query": (grouped_attention, {"frames": 16, "tokens": 32, "kv_heads": 1, "repeat": "model"}, None),
    "decoder": (decoder, {"length": 16}, {"ids": "B L"}),
    "llama": (llama, {"length": 16}, {"input_ids": "B L"}),
}


@dataclass(frozen=True)
class Placed:
    """An op of a planned model.

    nbytes: what it makes on one device. factor: the one that several devices shard; None where each runs the whole op.
    """

    path: str
    target: str
    nbytes: int
    factor: str | None


@cache
def planned(case: str) -> tuple[Plan, list[Placed]]:
    """The plan of training on 3 ranks, and where it puts each op that computes with more than parameters."""
    build, arguments, dim_names = LONG[case]
    model, args, kwargs = build(**arguments)
    ready = prepare(capture(model.train(), args, kwargs), as_mesh(3), Options.of(dim_names=dim_names))
    solution = decide(ready)
    plan, _ = finish(ready, solution)
    graph = ready.problem(solution.space).graph
    factors, choice = graph.factors, solution.choice
    placeholders = [node.name for node in ready.program.graph.nodes if node.op == "placeholder"]
    weights = {name for name, entry in zip(placeholders, ready.program.inputs) if entry.kind != "input"}
    found = []
    for stage in graph.stages:
        if stage.op is None:
            continue
        if stage.uses and all(use.storage[0] in weights for use in stage.uses):
            weights.add(stage.op.name)
            continue
        factor = stage.strategies[choice[stage.index]].factors[0]
        nbytes = sum(factors.values[result].nbytes for result in stage.results)
        found.append(Placed(stage.path, str(stage.op.node.target), nbytes, factors.names.get(factor)))
    return plan, found


def collectives(plan: Plan) -> dict[str, int]:
    """How many times each primitive runs on activations."""
    return {name: entry["count"] for name, entry in plan.communication["by_primitive"].items() if name != "replicate"}


def run(world, build, arguments, ranks, batch, train):
    """Two ranks are processes; more are rehearsed in one, which captures the model once."""
    arguments = {**arguments, "batch": batch}
    if ranks == 2:
        return world(2).run(compare, build, arguments, train=train)
    return rehearsed(ranks, build, arguments, train)


def check_parity(results):
    for result in results:
        assert result["output"] <= OUTPUT_TOLERANCE
        assert result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]


def check_bytes(results):
    """Every op has a rule, and what the ranks sent is, on the mean over them, what the plan says."""
    plan = results[0]["plan"]
    assert plan["without_rule"] == []
    predicted = plan["communication"]["by_primitive"]
    for primitive in predicted.keys() | {key.split()[0] for result in results for key in result["measured"]}:
        for direction in ("forward", "backward"):
            key = f"{primitive} {direction}"
            sent = sum(result["measured"].get(key, (0, 0.0))[1] for result in results) / len(results)
            assert sent == pytest.approx(predicted[primitive][f"{direction}_bytes"]), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_gradients_and_bytes_are_those_of_one_device_and_of_the_plan(world, case, ranks, batch, train):
    results = run(world, *CASES[case], ranks, batch, train)
    check_parity(results)
    check_bytes(results)
    predicted = results[0]["plan"]["communication"]["by_primitive"]
    for primitive, entry in predicted.items():
        for direction in ("forward", "backward"):
            counts = {result["measured"].get(f"{primitive} {direction}", (0, 0.0))[0] for result in results}
            # A split or a gather has a backward only where a gradient that needs it comes back.
            always = primitive == "switch" or (primitive in ("split", "replicate")) == (direction == "backward")
            if entry[f"{direction}_bytes"] and always and primitive != "split":
                assert counts == {entry["count"]}, (primitive, direction)
            else:
                assert max(counts) <= entry["count"], (primitive, direction)
    assert any(stage["layout"]["sp"] != "R" for stage in results[0]["plan"]["stages"])


@pytest.mark.parametrize(
    "case, ranks, batch, train",
    [
        pytest.param(case, ranks, batch, train, id=f"{case}-{ranks}-{batch}-{'train' if train else 'eval'}")
        for case in ZOO
        for ranks, batch, train in [(2, 1, True), (3, 2, True), (2, 2, False), (3, 1, False)]
        if ranks == 3 or case not in CASES
    ],
)
def test_a_model_of_the_zoo_computes_what_one_device_does_and_sends_what_was_planned(world, case, ranks, batch, train):
    results = run(world, *ZOO[case], ranks, batch, train)
    check_parity(results)
    check_bytes(results)


@pytest.mark.parametrize("case", LONG)
def test_what_stays_whole_in_a_model_of_the_zoo_is_small(case):
    _, placed = planned(case)
    largest = max(op.nbytes for op in placed)
    whole = [op for op in placed if op.factor is None and op.nbytes > SLACK * largest]
    assert not whole


def test_the_activations_of_evoformer_are_sharded_but_for_one_percent():
    _, placed = planned("evoformer")
    whole = sum(op.nbytes for op in placed if op.factor is None)
    assert whole < 0.01 * sum(op.nbytes for op in placed)


@pytest.mark.parametrize(
    "case, switches",
    [("stdit", 3), ("latte", 3), ("grouped queries", 1), ("multi query", 1)],
)
def test_attention_over_space_and_time_in_turn_is_two_switches_a_layer_and_the_outputs_gather(case, switches):
    found = collectives(planned(case)[0])
    assert found.pop("split") >= 1
    assert found == {"switch": switches, "gather": 1}  # the first stage takes its part of the input


def test_axial_attention_over_three_dims_never_gathers_and_one_layout_serves_two_of_its_attentions():
    found = collectives(planned("axial")[0])
    assert found.pop("split") >= 1
    assert found == {"switch": 2, "gather": 1}  # of 6 attentions; the gather is the output's


@pytest.mark.parametrize("case", ["mamba", "rwkv", "linear recurrence"])
def test_a_recurrence_along_time_runs_sharded_along_space_and_attention_along_space_sharded_along_time(case):
    plan, placed = planned(case)
    large = [op for op in placed if op.nbytes > SLACK * max(op.nbytes for op in placed)]
    assert {op.factor for op in large if op.path.startswith("time")} == {"S"}
    assert {op.factor for op in placed if "attention" in op.target} == {"T"}
    assert collectives(plan) == {"split": 1, "switch": 1, "gather": 1}


@pytest.mark.parametrize("case", ["decoder", "llama"])
def test_the_plan_of_a_language_model_says_whether_it_runs_by_heads_or_gathers_keys_and_values(case):
    plan, placed = planned(case)
    (chosen,) = {op.factor for op in placed if "attention" in op.target}
    said = Counter(
        (entry.primitive, entry.source, entry.target)
        for stage in plan.stages
        for entry in stage.enter
        if stage.name != "output" and entry.primitive not in ("split", "replicate")
    )
    by_gathering = {("gather", "L", "R"): 2}  # keys and values; queries stay where they are
    by_heads = {("switch", "L", chosen): 3, ("switch", chosen, "L"): 1}
    assert said == (by_gathering if chosen == "L" else by_heads)
    assert any(stage.layout == {"sp": chosen} and "L" in stage.computes_over for stage in plan.stages)
