"""`plan`: decided on a laptop, printed, kept as JSON; and every bad input answered with the place and the remedy."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto.cost_models.communication import primitive_cost
from dsp_auto.predict import predict
from dsp_auto.shards import shard_sizes
from examples.transformer_2d import build as transformer_2d
from tests.zoo.public import latte

NAMES = {"video": "B T S C"}


def fake_transformer(**arguments):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return transformer_2d(**arguments)


def paper(plan: dsp_auto.Plan, primitive: str) -> dict:
    return plan.communication["by_primitive"][primitive]


@pytest.mark.parametrize("habit", ["4d", "flat"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_of_transformer_2d_sends_two_switches_and_nothing_else(habit, batch, training):
    ranks, hidden, frames, tokens = 8, 64, 16, 24
    plans = {}
    for layers in (2, 3):
        model, args, kwargs = fake_transformer(
            layers=layers, hidden=hidden, frames=frames, tokens=tokens, batch=batch, habit=habit
        )
        with torch.set_grad_enabled(training):
            plans[layers] = dsp_auto.plan(model, str(ranks), args, kwargs)
    whole = batch * frames * tokens * hidden * 4
    switch = whole / ranks * (ranks - 1) / ranks
    for layers, plan in plans.items():
        counts = {name: entry["count"] for name, entry in plan.communication["by_primitive"].items()}
        counts.pop("replicate", None)
        assert counts == {"split": 1, "switch": 2 * layers - 1, "gather": 1}
        assert paper(plan, "switch")["forward_bytes"] == (2 * layers - 1) * switch
        assert plan.solver["gap"] == 0
    per_layer = [
        plans[3].communication[key] - plans[2].communication[key] for key in ("forward_bytes", "paper_forward_volume")
    ]
    assert per_layer == [2 * switch, 2 * whole / ranks]


def test_51_frames_on_4_ranks_and_3604_tokens_on_8_are_cut_without_padding():
    model, args, kwargs = fake_transformer(layers=2, frames=51, tokens=3604)
    for ranks in (4, 8):
        plan = dsp_auto.plan(model, str(ranks), args, kwargs, dim_names=NAMES)
        kept = sum(a * b for a, b in zip(shard_sizes(51, ranks), shard_sizes(3604, ranks)))
        whole = 51 * 3604 * 64 * 4
        assert paper(plan, "switch")["forward_bytes"] == pytest.approx(3 * whole * (1 - kept / 51 / 3604) / ranks)
        assert {stage.layout["sp"] for stage in plan.stages} == {"T", "S", "R"}


def test_a_plan_needs_no_process_group_no_weights_and_takes_a_device_mesh_or_text():
    assert not torch.distributed.is_initialized()
    with torch.device("meta"):
        model, args, kwargs = transformer_2d(layers=1)
    assert all(parameter.is_meta for parameter in model.parameters())
    for mesh in ("4", 4, "2x2"):
        plan = dsp_auto.plan(model, mesh, args, kwargs)
        assert plan.communication["forward_bytes"] > 0
    assert all(parameter.is_meta for parameter in model.parameters())
    assert dict(plan.mesh) == {"dp": 2, "sp": 2}


def test_a_model_on_meta_plans_like_a_real_one():
    with torch.device("meta"):
        model, args, kwargs = transformer_2d(layers=2)
    real, real_args, real_kwargs = transformer_2d(layers=2)
    assert dsp_auto.plan(model, "4", args, kwargs).digest == dsp_auto.plan(real, "4", real_args, real_kwargs).digest


def _planned(model, args, kwargs):
    """What comes of all kinds of planning."""
    plan = dsp_auto.plan(model, "2", args, kwargs, objective="time")
    found = [plan, *(entry.plan for entry in plan.explain("blocks.0.attn").entries)]
    found.append(dsp_auto.compare(model, "2", args, kwargs, strategies=["dsp"])["dsp"].plan)
    found.append(dsp_auto.report(model, "2", args, kwargs, strategies=["dsp"], seconds=0).plan)
    fit = dsp_auto.fit(model, 2, "10GB", args, kwargs, strategies=["dsp"])["dsp"]
    return [None if own is None else own.digest for own in found], predict(model, "2", args, kwargs), fit


@pytest.mark.parametrize("made", ["inside", "outside", "on meta"])
def test_planning_inside_of_a_fake_mode_is_planning_outside_of_it(made):
    """And leaves it on. Sizes are of this test alone, since what calls cost is kept."""
    sizes = dict(layers=1, hidden=24, heads=3, frames=7, tokens={"inside": 11, "outside": 13, "on meta": 17}[made])
    with torch.device("meta" if made == "on meta" else "cpu"):
        call = transformer_2d(**sizes)
    with FakeTensorMode() as mode:
        if made == "inside":
            call = transformer_2d(**sizes)
        found = _planned(*call) if made == "inside" else dsp_auto.plan(call[0], "2", *call[1:]).digest
        assert torch.ones(1).fake_mode is mode
    call = transformer_2d(**sizes)
    assert found == (_planned(*call) if made == "inside" else dsp_auto.plan(call[0], "2", *call[1:]).digest)


def test_both_mesh_dims_of_2x4_are_used():
    model, args, kwargs = fake_transformer(layers=2, frames=16, tokens=32, batch=2)
    plan = dsp_auto.plan(model, "2x4", args, kwargs, dim_names=NAMES)
    assert all("R" not in stage.layout.values() for stage in plan.stages if stage.ops)


def test_json_round_trips_and_prints_the_same():
    model, args, kwargs = fake_transformer(layers=1)
    plan = dsp_auto.plan(model, "4", args, kwargs, dim_names=NAMES)
    again = dsp_auto.Plan.from_json(plan.to_json())
    assert str(again) == str(plan) and again.digest == plan.digest
    data = json.loads(plan.to_json())
    assert {"mesh", "objective", "strategy", "stages", "communication", "seconds", "solver"} <= set(data)
    first = data["stages"][1]
    assert first["computes_over"] == ["T"] and first["layout"] == {"sp": "S"}
    switch = next(entry for entry in first["enter"] if entry["primitive"] == "switch")
    assert (switch["from"], switch["to"], switch["mesh_dim"]) == ("T", "S", "sp")
    assert set(data["seconds"]) >= {"capture", "plan", "rewrite"}
    assert set(data["solver"]) >= {"name", "status", "objective", "bound", "gap", "variables", "constraints"}


def test_the_stages_enter_with_all_bytes_of_the_plan():
    model, args, kwargs = latte(frames=5, size=10)
    plan = dsp_auto.plan(model, "3", args, kwargs)
    for key in ("forward_bytes", "backward_bytes"):
        entered = sum(getattr(entry, key) for stage in plan.stages for entry in stage.enter)
        assert entered == pytest.approx(plan.communication[key])


@pytest.mark.parametrize("data", ["{}", "[]", "no", '{"format": 1}', '{"format": 99, "stages": []}'])
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(dsp_auto.DspError, match="no plan"):
        dsp_auto.Plan.from_json(data)


def test_a_capacity_is_kept_and_less_of_it_never_sends_less():
    model, args, kwargs = fake_transformer(layers=2)
    least = dsp_auto.plan(model, "4", args, kwargs)
    sent = []
    for share in (1.0, 1.5, 2.5, 10):
        capacity = int(least.memory["peak_bytes"] * share)
        plan = dsp_auto.plan(model, "4", args, kwargs, capacity=capacity, may_stay_whole=1)
        assert plan.memory["peak_bytes"] <= plan.memory["capacity_bytes"] == capacity
        sent.append(plan.solver["objective"])
    assert sent == sorted(sent, reverse=True) and sent[-1] == 0


def test_the_objective_time_counts_collectives_and_compute():
    model, args, kwargs = fake_transformer(layers=2, hidden=256, frames=32, tokens=256)
    plan = dsp_auto.plan(model, "8", args, kwargs, objective="time", hardware="a100")
    assert 0 < plan.solver["objective"] < 1 and plan.objective == "time"
    assert paper(plan, "switch")["count"] == 3


def test_wire_bytes_are_those_of_the_designs_table():
    megabyte, ranks = 2**20, 8
    share = megabyte * 7 / 8
    wanted = {
        "switch": (share / 8, share / 8),
        "split": (0, share),
        "gather": (share, 0),
        "reduce": (2 * share, 0),
        "reduce_scatter": (share, share),
        "replicate": (0, 2 * share),
    }
    for primitive, (forward, backward) in wanted.items():
        cost = primitive_cost(primitive, megabyte, ranks, grad=True)
        assert (cost.forward_bytes, cost.backward_bytes) == (forward, backward)
        assert primitive_cost(primitive, megabyte, ranks, grad=False).backward_bytes == 0
    assert primitive_cost("gather", megabyte, ranks, grad=True, partial_grad=True).backward_bytes == share
    assert primitive_cost("split", megabyte, ranks, grad=True, partial_grad=True).backward_bytes == 0


@torch.library.custom_op("dsp_auto_tests::scrambled", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def scrambled(x: torch.Tensor) -> torch.Tensor:
    """Random, so no rule is found for it."""
    return x[torch.randperm(x.shape[0])]


scrambled.register_fake(torch.empty_like)


def test_an_op_without_a_rule_runs_replicated_and_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return scrambled(x.softmax(1).softmax(2)).softmax(1)

    plan = dsp_auto.plan(Odd(), "2", (torch.randn(1, 6, 5, 4),))
    assert [entry["target"] for entry in plan.without_rule] == ["dsp_auto_tests.scrambled.default"]
    assert "scrambled" in str(plan)


# --- bad input: an error of ours, the place, the remedy, and nothing changed


def small():
    return transformer_2d(layers=1, hidden=16, heads=2, frames=4, tokens=6)


class DataDependent(nn.Module):
    def forward(self, x):
        return x.softmax(1) if x.sum() > 0 else x


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), inner

    def forward(self, x):
        return self.inner(self.first(x))


def test_a_model_that_does_not_export_is_refused_with_exports_reason_and_the_submodule():
    with pytest.raises(dsp_auto.CaptureError) as error:
        dsp_auto.plan(Wrapped(DataDependent()), "2", (torch.randn(2, 4, 4),))
    assert str(error.value).startswith("inner: ") and "value of a tensor decides" in str(error.value)
    assert "test_plan.py:" in str(error.value)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Reversing(nn.Module):
    def forward(self, x):
        return Reversal.apply(x).softmax(1)


class Recomputed(torch.autograd.Function):
    """As reversible networks do: the forward runs without a graph, and the backward makes one."""

    @staticmethod
    def forward(ctx, x, weight):
        with torch.no_grad():
            return x @ weight

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class Losing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return Recomputed.apply(x, self.weight).softmax(1)


@pytest.mark.parametrize("inner, function", [(Reversing(), "Reversal"), (Losing(), "Recomputed")])
def test_gradients_that_capture_would_lose_or_change_are_refused(inner, function):
    model, x = Wrapped(inner), torch.randn(2, 4, 4)
    with pytest.raises(dsp_auto.CaptureError) as error:
        dsp_auto.plan(model, "2", (x,))
    assert function in str(error.value) and str(error.value).startswith("inner: ")
    with torch.no_grad():
        dsp_auto.plan(model, "2", (x,))  # no gradient, nothing to lose


def test_planning_leaves_a_module_that_stands_at_two_paths_as_it_was():
    block = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1))
    model, x = nn.Sequential(block, block), torch.randn(2, 4, 4, requires_grad=True)
    before = [id(parameter) for parameter in model.parameters()]
    dsp_auto.plan(model, "2", (x,))
    assert [id(parameter) for parameter in model.parameters()] == before
    assert model(x).isfinite().all()


def test_an_op_whose_size_depends_on_values_is_refused_with_its_place():
    class Picks(nn.Module):
        def forward(self, x):
            return x.softmax(1)[x.sum((1, 2)) > 0].sum(0)

    with pytest.raises(dsp_auto.CaptureError, match="inner: .*depends on the values"):
        dsp_auto.plan(Wrapped(Picks()), "2", (torch.randn(2, 4, 4),))


def test_random_ops_are_sharded_and_where_they_cannot_be_they_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.AlphaDropout(0.5), nn.Softmax(1))
    x = torch.randn(2, 4, 4)
    assert not dsp_auto.plan(model, "2", (x,)).random
    plan = dsp_auto.plan(model, "2", (x,), rng="serial")  # which numbers one device would draw for a part nobody can tell
    assert [entry["path"] for entry in plan.random] == ["2"] and "random, run replicated" in str(plan)
    assert not dsp_auto.plan(model.eval(), "2", (x,), rng="serial").random


def test_a_detached_branch_is_no_loss():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.b(x)
            return self.a(x).softmax(1) + y.detach()

    assert dsp_auto.plan(Detached(), "2", (torch.randn(2, 4, 4),))


def test_a_mesh_larger_than_every_factor_is_refused_with_the_largest_that_fits():
    model, args, kwargs = small()
    with pytest.raises(dsp_auto.MeshError, match="at most 6 ranks") as error:
        dsp_auto.plan(model, "7", args, kwargs, dim_names=NAMES, strategy="dsp")
    assert "T=4" in str(error.value) and "S=6" in str(error.value)


@pytest.mark.parametrize("mesh", ["64", "2x64"])
def test_a_mesh_dim_that_is_too_long_in_parts_too_is_refused_as_the_users(mesh):
    model, args, kwargs = transformer_2d(layers=1, hidden=8, heads=2, frames=3, tokens=4)
    with pytest.raises(dsp_auto.MeshError, match="dim sp of 64 ranks: .* shorter than 16, a part of 4 x 16: .*at most 4 ranks"):
        dsp_auto.plan(model, mesh, args, kwargs, strategy="dsp")


def test_a_mesh_larger_than_every_sequence_takes_heads_and_hidden_dims_too():
    model, args, kwargs = small()
    plan = dsp_auto.plan(model, "8", args, kwargs, dim_names=NAMES)
    sharded = {factor for stage in plan.stages for factor in stage.layout.values()} - {"R"}
    assert sharded and plan.strategy == "auto"


def test_a_model_without_a_sequence_is_data_parallel_by_auto_and_refused_by_dsp():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(16, 4)
    with pytest.raises(dsp_auto.NoShardableFactorError, match="data parallelism"):
        dsp_auto.plan(model, "2", (x,), strategy="dsp")
    plan = dsp_auto.plan(model, "2", (x,), dim_names={"input": "B C"})
    assert {factor for stage in plan.stages for factor in stage.layout.values()} == {"B", "R"}


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"strategy": "best"}, dsp_auto.StrategyError, "'best'"),
        ({"objective": "speed"}, dsp_auto.StrategyError, "'speed'"),
        ({"capacity": "lots"}, dsp_auto.StrategyError, "'lots'"),
        ({"capacity": -1}, dsp_auto.StrategyError, "-1"),
        ({"hardware": "abacus"}, dsp_auto.StrategyError, "'abacus'"),
        ({"capacity": 1000}, dsp_auto.InfeasibleError, "1000"),
        ({"in_layouts": {"film": {"sp": 1}}}, dsp_auto.LayoutError, "video"),
        ({"in_layouts": {"video": {"dp": 1}}}, dsp_auto.LayoutError, "sp"),
        ({"in_layouts": {"video": {"sp": 9}}}, dsp_auto.LayoutError, "no dim 9"),
        ({"in_layouts": {"video": {"sp": 0}}}, dsp_auto.LayoutError, "2 ranks"),
        ({"in_layouts": {"video": 1}}, dsp_auto.LayoutError, "video"),
        ({"out_layouts": 3}, dsp_auto.LayoutError, "3"),
        ({"time_limit": 1e-6}, dsp_auto.StrategyError, "time_limit"),
        ({"out_layouts": {"sp": "Q"}}, dsp_auto.LayoutError, "'Q'"),
        ({"out_layouts": [{"sp": 1}, None]}, dsp_auto.LayoutError, "returns 1 tensor. "),
        ({"dim_names": {"video": "B T"}}, dsp_auto.LayoutError, "shape is"),
        ({"dim_names": {"film": "B T S C"}}, dsp_auto.LayoutError, "video"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options, error, text):
    model, args, kwargs = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        dsp_auto.plan(model, "2", args, kwargs, **options)
    assert isinstance(raised.value, dsp_auto.DspError) and text in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and dsp_auto.plan(model, "2", args, kwargs)


@pytest.mark.parametrize("mesh", ["0", "two", "2x", "", None, 2.5])
def test_what_is_no_mesh_is_refused(mesh):
    model, args, kwargs = small()
    with pytest.raises(dsp_auto.MeshError):
        dsp_auto.plan(model, mesh, args, kwargs)


def test_parallelize_refuses_a_mesh_that_has_no_processes():
    model, _, _ = small()
    with pytest.raises(dsp_auto.MeshError, match="DeviceMesh"):
        dsp_auto.parallelize(model, "2")
