"""Promises of `fit`: the smallest size that fits and none smaller does, the plans' figures, a reason for what does not fit."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto import DspError, Fit, InfeasibleError, MeshError, NoShardableFactorError, StrategyError
from dsp_auto.cost_models.hardware import PROFILES, Hardware
from dsp_auto.cost_models.state import TrainingState
from dsp_auto.passes.solve import out_of_time
from dsp_auto.predict import predict
from dsp_auto.units import show_bytes
from examples.transformer_2d import build as transformer_2d

module = importlib.import_module("dsp_auto.fit")
SIZES = {"layers": 1, "frames": 16, "tokens": 32, "hidden": 32, "heads": 8}
GPUS, CAPACITY, STRATEGIES = 8, 800_000, ("dsp", "ulysses", "megatron-sp")
CANNOT = (InfeasibleError, MeshError, NoShardableFactorError)


def fitted(capacity=CAPACITY, gpus=GPUS, sizes=None, **options):
    return dsp_auto.fit(transformer_2d, gpus, capacity, arguments={**SIZES, **(sizes or {})}, **options)


def planned(ranks, capacity=CAPACITY, sizes=None, **options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**{**SIZES, **(sizes or {})})
    return dsp_auto.plan(model, str(ranks), args, kwargs, capacity=capacity, hardware="h100", **options)


def state(ranks, zero=0, gpus=GPUS):
    replicas = gpus // ranks
    return TrainingState(zero=zero if replicas > 1 else 0, data_parallel=replicas)


@pytest.fixture(scope="module")
def zero_2():
    return fitted(strategies=STRATEGIES, zero=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recompute", [None, False])
def test_the_smallest_size_fits_and_no_smaller_one_does(zero_2, strategy, recompute):
    split = zero_2[strategy].smallest if recompute is None else zero_2[strategy].without_recompute
    options = {"strategy": strategy, "recompute": recompute}
    plan = planned(split.sequence_parallel, optimizer=state(split.sequence_parallel, 2), **options)
    assert split.peak_bytes <= CAPACITY and plan.memory["peak_bytes"] <= CAPACITY
    for ranks in (n for n in (1, 2, 4, 8) if n < split.sequence_parallel):
        with pytest.raises(CANNOT):
            planned(ranks, optimizer=state(ranks, 2), **options)


def test_recomputing_makes_a_smaller_size_fit(zero_2):
    found = zero_2["dsp"]
    assert 1 <= found.smallest.sequence_parallel < found.without_recompute.sequence_parallel
    assert found.smallest.recomputed > 0 == found.without_recompute.recomputed


def test_figures_are_those_of_the_plan_and_of_the_prediction(zero_2):
    split = zero_2["dsp"].without_recompute
    options = {"strategy": "dsp", "recompute": False, "optimizer": state(split.sequence_parallel, 2)}
    plan = planned(split.sequence_parallel, **options)
    assert (split.peak_bytes, split.peak_at) == (plan.memory["peak_bytes"], plan.memory["peak_at"])
    assert split.wire_bytes == plan.communication["forward_bytes"] + plan.communication["backward_bytes"]
    assert split.gap == plan.solver["gap"]
    model, args, kwargs = transformer_2d(**SIZES)
    step = predict(model, str(split.sequence_parallel), args, kwargs, capacity=CAPACITY, **options)
    assert split.step_seconds == pytest.approx(step.seconds)
    _, row = (line for line in str(zero_2).splitlines() if line.startswith("dsp "))
    assert show_bytes(split.peak_bytes) in row and show_bytes(split.wire_bytes) in row


def test_a_plan_that_keeps_all_is_preferred_on_the_same_size():
    found = fitted(10**9, strategies=["dsp"])["dsp"]
    assert found.smallest == found.without_recompute and found.smallest.sequence_parallel == 1
    assert found.smallest.recomputed == 0 and found.smallest.data_parallel == GPUS


def test_recomputing_is_not_tried_where_it_is_not_wanted(zero_2):
    found = fitted(strategies=["dsp"], zero=2, recompute=False)["dsp"]
    assert found.smallest == found.without_recompute == zero_2["dsp"].without_recompute


def test_zero_shares_the_state_out_over_the_replicas_of_each_size():
    whole, shared = (fitted(10**9, strategies=["dsp"], zero=zero)["dsp"].smallest for zero in (0, 3))
    assert shared.peak_bytes < whole.peak_bytes
    for split, zero in ((whole, 0), (shared, 3)):
        options = {"strategy": "dsp", "recompute": False, "optimizer": state(1, zero)}
        assert split.peak_bytes == planned(1, 10**9, **options).memory["peak_bytes"]


def test_a_state_that_has_a_stage_of_zero_keeps_it():
    named = fitted(10**9, strategies=["dsp"], optimizer=TrainingState("sgd", zero=1, data_parallel=64))
    assert named == fitted(10**9, strategies=["dsp"], optimizer="sgd", zero=1)
    assert named.state == "sgd, ZeRO-1 over the replicas"


@pytest.mark.parametrize(
    ("zero", "sent"),
    [
        (0, [("all_reduce", 2)]),
        (1, [("reduce_scatter", 1), ("all_gather", 1)]),
        (2, [("reduce_scatter", 1), ("all_gather", 1)]),
        (3, [("reduce_scatter", 1), ("all_gather", 1), ("all_gather", 1)]),
    ],
)
def test_gradients_go_over_the_replicas_once_a_step(zero, sent):
    split = fitted(10**9, strategies=["dsp"], zero=zero)["dsp"].smallest
    nbytes = sum(p.numel() * p.itemsize for p in transformer_2d(**SIZES)[0].parameters())
    share = (split.data_parallel - 1) / split.data_parallel
    links = PROFILES["h100"].on({"dp": split.data_parallel, "sp": 1})
    dims = [("dp", split.data_parallel)]
    wanted = sum(links.collective_seconds(kind, times * nbytes * share, dims) for kind, times in sent)
    assert split.sync_seconds == pytest.approx(wanted) and split.seconds == split.step_seconds + split.sync_seconds


def test_one_replica_has_no_gradients_to_sum():
    split = fitted(10**9, gpus=1, strategies=["dsp"], zero=2)["dsp"].smallest
    assert (split.data_parallel, split.sync_seconds) == (1, 0.0)


def test_throughput_counts_the_samples_of_all_replicas():
    found = fitted(10**9, strategies=["dsp"], sizes={"batch": 3})
    split = found["dsp"].smallest
    assert found.batch == 3 and found.samples_per_second(split) == pytest.approx(GPUS * 3 / split.seconds)
    assert "batch is 3 samples" in str(found)


class Unbatched(nn.Module):
    def forward(self, rows):  # [T, S]
        return rows.softmax(0).softmax(1)


def test_a_first_dim_that_is_computed_over_is_no_batch():
    with torch.no_grad():
        assert dsp_auto.fit(Unbatched(), 2, 10**9, (torch.ones(6, 8),), strategies=["dsp"]).batch == 1


def test_inference_keeps_no_state_and_sums_no_gradients():
    with torch.no_grad():
        found = fitted(10**9, strategies=["dsp"])
    split = found["dsp"].smallest
    assert not found.training and split.sync_seconds == 0 and "inference" in str(found) and "gradients" not in str(found)
    assert split.peak_bytes < fitted(10**9, strategies=["dsp"])["dsp"].smallest.peak_bytes


def test_what_fits_nowhere_says_what_came_nearest():
    found = fitted(1000, strategies=["dsp", "ring"])
    assert not found.fits and [one.error for one in found.strategies] == ["InfeasibleError"] * 2
    for one in found.strategies:
        assert one.smallest is None and f"{one.strategy} does not fit: on 8 GPUs" in str(found)
    with pytest.raises(InfeasibleError) as refused:
        planned(8, 1000, strategy="dsp")
    assert str(refused.value) in found["dsp"].reason


def test_a_strategy_that_no_size_admits_says_so():
    with torch.no_grad():
        found = dsp_auto.fit(Unbatched(), 2, 500, (torch.ones(6, 8),), strategies=["dsp", "megatron-lm"])
    assert found["dsp"].smallest.sequence_parallel == 2
    assert found["megatron-lm"].smallest is None and "on 1 GPU, " in found["megatron-lm"].reason


def test_a_size_that_the_solver_could_not_decide_is_not_said_to_fail(monkeypatch):
    def decide(prepared):
        if prepared.mesh.ranks == 1:
            raise out_of_time(1.0)
        return original(prepared)

    original = module.decide
    monkeypatch.setattr(module, "decide", decide)
    found = fitted(10**9, gpus=2, strategies=["dsp"])
    assert found["dsp"].undecided == (1,) and found["dsp"].smallest.sequence_parallel == 2
    assert "does not fit" not in str(found) and "dsp on 1: the solver found no plan in its time" in str(found)
    found = fitted(10**9, gpus=1, strategies=["dsp"])
    assert not found.fits and "does not fit" not in str(found) and "is not shown" in str(found)


@pytest.mark.parametrize(("gpus", "sizes"), [(1, (1,)), (8, (1, 2, 4, 8)), (12, (1, 2, 3, 4, 6, 12)), (7, (1, 7))])
def test_sizes_divide_the_gpus(gpus, sizes):
    assert module._sizes(gpus) == sizes


def test_the_model_is_captured_once(monkeypatch):
    calls = []
    capture = module.capture
    monkeypatch.setattr(module, "capture", lambda *args: calls.append(args) or capture(*args))
    fitted(strategies=["dsp", "ring"])
    assert len(calls) == 1


def test_a_module_and_its_factory_give_the_same():
    model, args, kwargs = transformer_2d(**SIZES)
    assert dsp_auto.fit(model, 2, 10**9, args, kwargs, strategies=["dsp"]) == fitted(10**9, gpus=2, strategies=["dsp"])


def test_strategies_come_in_the_order_of_presets():
    found = fitted(10**9, gpus=1, strategies=["ring", "dsp"])
    assert [one.strategy for one in found.strategies] == ["dsp", "ring"]
    with pytest.raises(KeyError):
        found["auto"]


def test_a_capacity_in_words_keeps_its_reserve():
    found = fitted("10MB", gpus=1, strategies=["dsp"], reserve=0.25)
    assert (found.capacity_bytes, found.reserve_bytes) == (7_500_000, 2_500_000)


def test_json_round_trips():
    found = fitted(strategies=STRATEGIES, gpus=2, sequence="frames", step=8)
    for kept in (found.to_json(), found.to_dict(), found.to_json(indent=2)):
        again = Fit.from_json(kept)
        assert again == found and str(again) == str(found)
    wrong = json.dumps({**found.to_dict(), "format": 0})
    for text in ("{}", "[]", "no json", wrong, json.dumps({"format": 1})):
        with pytest.raises(DspError, match="no fit"):
            Fit.from_json(text)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"gpus": 0}, MeshError, "gpus 0"),
        ({"gpus": True}, MeshError, "gpus True"),
        ({"gpus": 10**18}, MeshError, "gpus 1.000e[+]18: .* at most 1048576"),
        ({"gpus": 10**400}, MeshError, "at most 1048576"),
        ({"step": 0}, MeshError, "step 0"),
        ({"capacity": None}, StrategyError, "no capacity"),
        ({"capacity": "lots"}, StrategyError, "lots"),
        ({"strategies": []}, StrategyError, "no strategies"),
        ({"strategies": ["magic"]}, StrategyError, "magic"),
        ({"zero": 4}, StrategyError, "zero=4"),
        ({"optimizer": "magic"}, StrategyError, "magic"),
        ({"hardware": "abacus"}, StrategyError, "abacus"),
        ({"sizes": {"depth": 3}}, DspError, "depth"),
        ({"sequence": "length"}, DspError, "the factory takes layers, hidden"),
        ({"sequence": "dtype"}, DspError, "its value is 'float32'"),
    ],
)
def test_what_is_wrong_for_every_strategy_is_raised(options, error, says):
    with pytest.raises(error, match=says):
        fitted(**options)


def test_a_hardware_that_was_measured_on_one_mesh_is_refused():
    h100 = PROFILES["h100"]
    measured = Hardware("mine", h100.intra, kernels=h100.kernels, measured={"mesh": {"sp": 2}})
    with pytest.raises(StrategyError, match="measured on one mesh"):
        fitted(hardware=measured)


def test_a_module_has_one_length():
    with pytest.raises(DspError, match="a module has one length"):
        dsp_auto.fit(Unbatched(), 2, 10**9, (torch.ones(6, 8),), sequence="rows")
