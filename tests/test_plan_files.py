"""A plan that was saved runs as it was made: the same programs without solving, or a refusal that says what differs."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import dsp_auto
from dsp_auto import planner
from dsp_auto.decision import check_same
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, finish, prepare, prepare_given
from examples.transformer_2d import build as transformer_2d
from tests.parity import OUTPUT_TOLERANCE, deviation

SMALL = {"layers": 1, "hidden": 16, "heads": 4, "frames": 8, "tokens": 12}
CASES = {
    "dsp": ("4", {"strategy": "dsp", "dim_names": {"video": "B T S C"}}),
    "parameters in parts": ("2", {"strategy": "auto", "sizes": {"frames": 2, "tokens": 2}}),
    "two mesh dims": ("2x4", {"strategy": "dsp"}),
    "a split mesh dim": ("16", {"strategy": "dsp"}),
    "recompute": ("2", {"strategy": "dsp", "capacity": 0.8}),
    "time": ("2", {"objective": "time", "hardware": "a100"}),
    "layouts and rng": (
        "2",
        {"rng": "serial", "in_layouts": {"video": {"sp": 1}}, "out_layouts": [{"sp": 2}], "strategy": "dsp"},
    ),
}


def small(**arguments):
    torch.manual_seed(0)
    return transformer_2d(**{**SMALL, **arguments})


def programs(prepared, solution):
    mesh = prepared.problem(solution.space).graph.mesh
    made = [finish(prepared, solution, rank) for rank in range(mesh.ranks)]
    return made[0][0], [str(graph) for _, graph in made]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_from_a_file_is_the_same_plan_and_the_same_programs_and_nothing_is_solved(case, tmp_path, monkeypatch):
    mesh, options = CASES[case]
    mesh, options = as_mesh(mesh), dict(options)
    sizes = {"batch": 2, **options.pop("sizes", {})}
    model, args, kwargs = small(**sizes)
    program = capture(model, args, kwargs)
    if "capacity" in options:  # a share of what it takes without one
        needed = dsp_auto.plan(model, mesh, args, kwargs, strategy="dsp").memory["peak_bytes"]
        options["capacity"] = int(needed * options["capacity"])
    prepared = prepare(program, mesh, Options.of(options.pop("capacity", None), options.pop("hardware", None), **options))
    plan, texts = programs(prepared, decide(prepared))
    assert bool(plan.recomputed) == (case == "recompute") and bool(plan.split) == (case == "a split mesh dim")
    assert bool(plan.parameters["in_parts"]) == (case == "parameters in parts")

    plan.save(tmp_path / "plan.json")
    loaded = dsp_auto.Plan.load(tmp_path / "plan.json")
    assert loaded.digest == plan.digest and str(loaded) == str(plan)
    monkeypatch.setattr(planner, "solve", None)
    again, same = programs(*prepare_given(capture(*small(**sizes)), mesh, loaded))
    assert again.digest == plan.digest and same == texts
    check_same(loaded, again)


# --- what it is not for


class Changed(nn.Module):
    """Two blocks; `act` is what stands in the second."""

    def __init__(self, act: str = "gelu", hidden: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.acts = nn.ModuleList([nn.GELU(), {"gelu": nn.GELU(), "relu": nn.ReLU(), "tanh": nn.GELU("tanh")}[act]])

    def forward(self, x):
        return self.acts[1](self.second(self.acts[0](self.first(x)).softmax(1))).softmax(2)


def made_for(mesh="2", training=True, shape=(2, 4, 6, 8), dtype=torch.float32, **arguments):
    x = torch.randn(shape, dtype=dtype)
    with nullcontext() if training else torch.no_grad():
        return capture(Changed(**arguments).to(dtype), (x,)), as_mesh(mesh)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"mesh": "4"}, "for the mesh sp=2, and this one is sp=4"),
        ({"mesh": "1x2"}, "this one is dp=1 x sp=2"),
        ({"training": False}, "for a training step, and this is a forward without gradients"),
        ({"shape": (2, 4, 7, 8)}, "takes input x float32[2, 4, 6, 8] where the model takes input x float32[2, 4, 7, 8]"),
        ({"dtype": torch.float64}, "float32[8, 8] with gradient where the model takes parameter first.weight float64[8, 8]"),
        ({"hidden": 16, "shape": (2, 4, 6, 16)}, "parameter first.weight float32[8, 8] with gradient where"),
        ({"act": "relu"}, "acts.1: this plan is of another model or call: it has aten.gelu.default in acts.1 where the model "
                          "has aten.relu.default in acts.1"),
        ({"act": "tanh"}, "acts.1: this plan is of another model or call: aten.gelu.default (gelu_1) has other arguments"),
    ],
)  # fmt: skip
def test_a_plan_of_something_else_is_refused_with_the_first_difference(other, says):
    program, mesh = made_for()
    prepared = prepare(program, mesh, Options.of())
    plan = finish(prepared, decide(prepared))[0]
    with pytest.raises(dsp_auto.PlanError) as error:
        prepare_given(*made_for(**other), plan)
    assert says in str(error.value) and "Make the plan again" in str(error.value)


def _edited(plan, edit):
    data = plan.to_dict()
    edit(data)
    return dsp_auto.Plan.from_json(json.dumps(data))


def _other_layout(data):
    way = next(way for way in data["decision"]["ways"] if way["operands"] and ["S1"] in way["operands"])
    way["operands"] = [["S9"] for _ in way["operands"]]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["versions"].update(torch="1.0"), "made with torch 1.0"),
        (lambda d: d.update(decision={}), "does not say what was decided"),
        (lambda d: d["decision"].update(space=7), "ways to see this model"),
        (lambda d: d["decision"]["stages"].pop(), "decides over"),
        (lambda d: d["decision"]["stages"][-2].__setitem__(0, "gelu"), "the stage 'gelu' in place of"),
        (_other_layout, "has no strategy"),
        (lambda d: d["decision"]["solution"].update(objective=1.0), "its cost is"),
        (lambda d: d["decision"].update(recomputed=[{"region": 0, "ops": ["a", "b"], "keeps": []}]), "recomputes a to b"),
        (lambda d: d["decision"]["options"].update(strategy="magic"), "no such strategy"),
        (lambda d: d["decision"]["options"].update(capacity={"bytes": 10, "reserve": 0.0}), "over the capacity of 10"),
    ],
)
def test_a_plan_that_was_changed_is_refused_and_not_run(edit, says):
    program, mesh = made_for()
    prepared = prepare(program, mesh, Options.of())
    plan = _edited(finish(prepared, decide(prepared))[0], edit)
    with pytest.raises(dsp_auto.PlanError) as error:
        prepare_given(program, mesh, plan)
    assert says in str(error.value)


def test_a_plan_made_on_meta_tensors_with_a_build_for_another_device_is_one_of_the_real_model():
    with torch.device("meta"):
        model, args, kwargs = transformer_2d(**SMALL)
    plan = dsp_auto.plan(model, "2", args, kwargs, strategy="dsp")
    public = torch.__version__.partition("+")[0]
    plan = _edited(plan, lambda data: data["versions"].update(torch=f"{public}+cu999"))
    prepared, solution = prepare_given(capture(*small()), as_mesh("2"), plan)
    check_same(plan, finish(prepared, solution)[0])


def test_figures_that_a_plan_does_not_have_here_are_found():
    program, mesh = made_for()
    prepared = prepare(program, mesh, Options.of())
    plan = finish(prepared, decide(prepared))[0]
    with pytest.raises(dsp_auto.PlanError, match="say forward_bytes 7"):
        check_same(_edited(plan, lambda data: data["communication"].update(forward_bytes=7)), plan)


def test_a_file_that_cannot_be_read_or_written_is_a_clear_error(tmp_path):
    program, mesh = made_for()
    prepared = prepare(program, mesh, Options.of())
    plan = finish(prepared, decide(prepared))[0]
    with pytest.raises(dsp_auto.PlanError, match="cannot read the plan"):
        dsp_auto.Plan.load(tmp_path / "none.json")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(dsp_auto.PlanError, match="cannot read the plan"):
        dsp_auto.Plan.load(tmp_path / "image")
    with pytest.raises(dsp_auto.PlanError, match="cannot write the plan"):
        plan.save(tmp_path / "none" / "plan.json")


# --- run on ranks


def _runs(rank, ranks, path):
    model, args, kwargs = small()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    expected = model(*args, **kwargs)
    parallel = dsp_auto.parallelize(model, mesh, plan=path)
    assert deviation(parallel(*args, **kwargs), expected) <= OUTPUT_TOLERANCE
    in_parts = {name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape}
    assert in_parts == set(parallel.plan.parameters["in_parts"])
    parallel.replan()
    assert deviation(parallel(*args, **kwargs), expected) <= OUTPUT_TOLERANCE
    with pytest.raises(dsp_auto.DspError, match="forward without gradients"), torch.no_grad():
        parallel(*args, **kwargs)
    with pytest.raises(dsp_auto.StrategyError, match="a plan is given, and strategy, rng"):
        dsp_auto.parallelize(model, mesh, plan=path, strategy="auto", rng="serial")
    return parallel.plan.digest


@pytest.mark.parametrize("strategy", ["dsp", "megatron-lm"])
def test_ranks_run_a_plan_from_a_file(world, tmp_path, strategy):
    model, args, kwargs = small()
    plan = dsp_auto.plan(model, "2", args, kwargs, strategy=strategy)
    plan.save(tmp_path / "plan.json")
    assert set(world(2).run(_runs, str(tmp_path / "plan.json"))) == {plan.digest}


def _trains_and_evaluates(rank, ranks, paths):
    model, args, kwargs = small()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    parallel = dsp_auto.parallelize(model, mesh, plan=paths)
    parallel(*args, **kwargs)
    with torch.no_grad():
        assert deviation(parallel(*args, **kwargs), model(*args, **kwargs)) <= OUTPUT_TOLERANCE
    with pytest.raises(dsp_auto.PlanError, match=r"takes input video float32\[1, 8, 12, 4\] where"):
        parallel(torch.randn(1, 8, 13, 4))
    with pytest.raises(dsp_auto.PlanError, match="an empty list"):
        dsp_auto.parallelize(model, mesh, plan=[])
    return [plan.digest for plan in parallel.plans]


def test_ranks_take_of_several_plans_the_one_for_each_call(world, tmp_path):
    model, args, kwargs = small()
    plans = [dsp_auto.plan(model, "2", args, kwargs, strategy="dsp")]
    with torch.no_grad():
        plans.append(dsp_auto.plan(model, "2", args, kwargs, strategy="dsp"))
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    for plan, path in zip(plans, paths):
        plan.save(path)
    assert world(2).run(_trains_and_evaluates, paths) == [[plan.digest for plan in plans]] * 2


def _refuses(rank, ranks, *paths):
    model, args, kwargs = small()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    with pytest.raises(dsp_auto.AgreementError, match="different plans") as error:
        dsp_auto.parallelize(model, mesh, plan=paths[rank])(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("second", ["megatron-lm", None])
def test_ranks_with_different_plans_are_refused(world, tmp_path, second):
    model, args, kwargs = small()
    paths = []
    for strategy in ("dsp", second):
        paths.append(strategy and str(tmp_path / f"{strategy}.json"))
        if strategy:
            dsp_auto.plan(model, "2", args, kwargs, strategy=strategy).save(paths[-1])
    assert "rank 1: " + ("plan" if second else "no plan") in world(2).run(_refuses, *paths)[0]
