"""Decision: what a plan was made for, and what was decided, as plain data: enough to run the plan without solving again.

A plan that comes back from a file is held against the captured model op by op; then every stage looks for its strategy among
those that it has here, by what is cut and by the layouts of operands and results. Layouts are written as one word for each mesh
dim: `S2` (Shard at place 2), `R`, `V` (Replicate with a Partial gradient), `P`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .errors import PlanError
from .mesh import Mesh
from .passes.capture import Program
from .passes.enumerate_strategies import Strategy
from .passes.layout import Layout, P, Placement, R, Shard, V, show_placement
from .passes.lifetimes import Kept
from .passes.nodes import module_path, node_values
from .passes.problem import Problem, Recomputed
from .passes.solve import Solution
from .passes.stages import Stage
from .plain_data import shorten
from .plan import Plan
from .units import counted, show_tensor

if TYPE_CHECKING:
    from .planner import Prepared

# Two costs that are sums of the same numbers in another order.
EQUAL = 1e-9
_WORDS: dict[Placement, str] = {R: "R", V: "V", P: "P"}
_AGAIN = "make the plan again for this model and call"


def record(prepared: Prepared, solution: Solution) -> dict[str, Any]:
    """What `restore` needs, and `check_fits` compares."""
    problem = prepared.problem(solution.space)
    ways: dict[tuple, int] = {}
    stages = []
    for stage in problem.graph.stages:
        way = _way(stage.strategies[solution.choice[stage.index]])
        stages.append([_stage_name(stage), ways.setdefault(way, len(ways)), _shards(problem, stage, solution)])
    return {
        "training": prepared.program.training,
        "inputs": prepared.shown_inputs,
        "ops": prepared.shown_ops,
        "options": prepared.options.to_dict(),
        "space": solution.space,
        "ways": [
            {"cuts": [[list(own) for own in cut] for cut in cuts], "operands": _lists(operands), "results": _lists(results)}
            for cuts, operands, results in ways
        ],
        "stages": stages,
        "recomputed": _show_recomputed(problem, solution.recomputed),
        "solution": {
            "objective": float(solution.objective),
            "bound": float(solution.bound),
            "peak_bytes": int(solution.peak_bytes),
            "capacity_bytes": int(solution.capacity_bytes),
        },
    }


def show_inputs(program: Program) -> list[str]:
    """A line for each input: `parameter blocks.0.attn.qkv.weight float32[192, 64] with gradient`."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [
        f"{entry.kind} {entry.name} {_show_value(node.meta.get('val'))}"
        for node, entry in zip(nodes, program.inputs, strict=True)
    ]


def show_ops(program: Program) -> list[list[str]]:
    """Of each node: its name, its op, its module, and eight digits that are equal for equal arguments and results.

    Devices are left out: a plan that was made on fake CPU tensors runs on GPUs.
    """
    found = []
    for node in program.graph.nodes:
        results = [_show_value(value) for value in node_values(node)]
        text = _show_argument((node.args, dict(node.kwargs), results))
        digits = hashlib.sha256(text.encode()).hexdigest()[:8]
        found.append([node.name, str(node.target), module_path(node), digits])
    return found


def _show_value(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return _show_argument(value)
    shown = show_tensor(value.dtype, value.shape)
    return f"{shown} with gradient" if value.requires_grad else shown


def _show_argument(argument: Any) -> str:
    """Equal for equal arguments in every process."""
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, torch.device):
        return "device"
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(map(_show_argument, argument))}]"
    if isinstance(argument, dict):
        return f"{{{', '.join(f'{name}: {_show_argument(own)}' for name, own in sorted(argument.items()))}}}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(argument))


def check_mesh(plan: Plan, mesh: Mesh) -> None:
    """Raises PlanError where a plan is not one for `mesh`, or cannot be run by this version."""
    if not plan.decision:
        raise PlanError(
            asked="cannot run this plan", found="it does not say what was decided", remedy="make it again with dsp_auto.plan"
        )
    made, here = (str(version).partition("+")[0] for version in (plan.versions.get("torch"), torch.__version__))
    if made != here:  # whether one is built for CPU or GPU makes no difference
        raise _cannot(f"it was made with torch {made}, this is {here}")
    if list(plan.mesh.items()) != list(mesh.whole.items()):
        own = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
        raise _cannot(f"it is for the mesh {own}, and this one is {mesh}")


def check_fits(plan: Plan, program: Program, mesh: Mesh) -> None:
    """Raises PlanError where a plan was made for something else than `program` on `mesh`: the first difference, and where."""
    check_mesh(plan, mesh)
    made = plan.decision
    if made["training"] != program.training:
        modes = {True: "a training step", False: "a forward without gradients"}
        raise _differs(f"it is for {modes[made['training']]}, and this is {modes[program.training]}")
    for here, there in zip_longest(show_inputs(program), made["inputs"]):
        if here != there:
            raise _differs(f"it takes {there or 'nothing more'} where the model takes {here or 'nothing more'}")
    for here, there in zip_longest(show_ops(program), made["ops"]):
        if there is not None and here == list(there):
            continue
        if here is None or there is None or here[1:3] != there[1:3]:
            shown = [f"{own[1]} in {own[2] or 'the model itself'}" if own else "nothing more" for own in (there, here)]
            raise _differs(f"it has {shown[0]} where the model has {shown[1]}", (here or there)[2])
        raise _differs(f"{here[1]} ({here[0]}) has other arguments or results there", here[2])


def find_fitting(plans: Sequence[Plan], program: Program, mesh: Mesh) -> Plan:
    """The first of some plans that was made for `program`. Raises PlanError where none was: what is wrong with the one that
    comes nearest, which is of the same mode if any is."""
    failed: dict[bool, PlanError] = {}
    for plan in plans:
        try:
            check_fits(plan, program, mesh)
            return plan
        except PlanError as error:
            failed.setdefault(plan.decision.get("training") == program.training, error)
    raise failed.get(True) or failed[False]


def restore(prepared: Prepared, plan: Plan) -> Solution:
    """What was decided, in a model that the plan fits (see `check_fits`). Raises PlanError where it cannot be run, or would
    cost something else than it says."""
    made = plan.decision
    if made["space"] >= len(prepared.spaces):
        raise _cannot(f"strategy {plan.strategy!r} has {len(prepared.spaces)} ways to see this model, not {made['space'] + 1}")
    problem = prepared.problem(made["space"])
    choice = _choice(problem, made)
    recomputed = _recomputed(problem, made["recomputed"])
    objective, stated = problem.cost(choice, recomputed), made["solution"]
    if objective is None:
        raise _cannot("no primitives lead from some stage's layout to what the next one wants")
    if not math.isclose(objective, stated["objective"], rel_tol=EQUAL, abs_tol=EQUAL):
        raise _cannot(f"its cost is {objective:.10g} here, and {stated['objective']:.10g} in the plan")
    peak, where = problem.peak(choice, recomputed)
    usable = prepared.options.usable
    if usable is not None and peak > usable:
        raise _cannot(f"it takes {peak} bytes at {problem.show_point(where)} here, over the capacity of {usable}")
    solver = plan.solver
    return Solution(
        choice=choice,
        recomputed=recomputed,
        objective=stated["objective"],
        bound=stated["bound"],
        status=solver["status"],
        solver=solver["name"],
        variables=solver["variables"],
        constraints=solver["constraints"],
        peak_bytes=peak,
        capacity_bytes=stated["capacity_bytes"],
        folded=solver["folded"],
        space=made["space"],
    )


def transfer(prepared: Prepared, solution: Solution, other: Prepared) -> Solution:
    """The same strategies in another problem of the same program. Raises PlanError where it has not all of them."""
    made, problem = record(prepared, solution), other.problem(solution.space)
    choice, recomputed = _choice(problem, made), _recomputed(problem, made["recomputed"])
    objective = problem.cost(choice, recomputed)
    if objective is None:
        raise _cannot("no primitives lead from some stage's layout to what the next one wants")
    peak = problem.peak(choice, recomputed)[0]
    return replace(solution, choice=choice, recomputed=recomputed, objective=objective, peak_bytes=peak)


def _choice(problem: Problem, made: Mapping[str, Any]) -> tuple[int, ...]:
    stages, found = problem.graph.stages, []
    ways = [_read_way(way) for way in made["ways"]]
    if len(stages) != len(made["stages"]):
        raise _cannot(f"it decides over {counted(len(made['stages']), 'stage')}, and the model has {len(stages)}")
    for stage, (name, number, _) in zip(stages, made["stages"]):
        if name != _stage_name(stage) or number >= len(ways):
            raise _cannot(f"it has the stage {name!r} in place of {_stage_name(stage)!r}", stage.name)
        own = [_way(strategy) for strategy in stage.strategies]
        if ways[number] not in own:
            _, operands, results = ways[number]
            shown = " -> ".join(", ".join(map(" ".join, own)) or "nothing" for own in (operands, results))
            raise _cannot(f"{_stage_name(stage)} has no strategy {shown} here", stage.name)
        found.append(own.index(ways[number]))
    return tuple(found)


def _stage_name(stage: Stage) -> str:
    """The node of a stage, equal for equal models."""
    return stage.op.name if stage.op is not None else stage.results[0][0] if stage.results else stage.kind


def _shards(problem: Problem, stage: Stage, solution: Solution) -> list[str]:
    """For people: per mesh dim the factor that an op shards, or that an input or an output is cut along."""
    graph, strategy = problem.graph, stage.strategies[solution.choice[stage.index]]
    if stage.op is not None:
        return ["R" if factor is None else graph.factors.names[factor] for factor in strategy.factors]
    if not stage.results:
        return []
    names = graph.factors.factor_names(stage.results[0])
    return [show_placement(placement, names) for placement in strategy.results[0]]


def _way(strategy: Strategy) -> tuple:
    return strategy.cuts, tuple(map(_words, strategy.operands)), tuple(map(_words, strategy.results))


def _lists(layouts: Sequence[tuple[str, ...]]) -> list[list[str]]:
    return [list(layout) for layout in layouts]


def _read_way(way: dict[str, Any]) -> tuple:
    cuts = tuple(tuple((axis, index) for axis, index in cut) for cut in way["cuts"])
    return cuts, tuple(map(tuple, way["operands"])), tuple(map(tuple, way["results"]))


def _words(layout: Layout) -> tuple[str, ...]:
    return tuple(f"S{placement.place}" if isinstance(placement, Shard) else _WORDS[placement] for placement in layout)


def _show_recomputed(problem: Problem, recomputed: Recomputed) -> list[dict[str, Any]]:
    stages = problem.graph.stages
    return [
        {
            "region": region.number,
            "ops": [_stage_name(stages[region.stages[0]]), _stage_name(stages[region.stages[-1]])],
            "keeps": [
                [own.what, _stage_name(stages[own.stage]), *own.storage]
                for own in problem.keeps.get(region.number, ())
                if own in recomputed
            ],
        }
        for region in problem.regions
        if region.number in recomputed
    ]


def _recomputed(problem: Problem, made: Sequence[dict[str, Any]]) -> Recomputed:
    regions, stages = {region.number: region for region in problem.regions}, problem.graph.stages
    found: set[int | Kept] = set()
    for entry in made:
        region = regions.get(entry["region"])
        if region is None or [_stage_name(stages[region.stages[n]]) for n in (0, -1)] != list(entry["ops"]):
            raise _cannot(f"it recomputes {' to '.join(entry['ops'])}, which is no block that may be recomputed here")
        found.add(region.number)
        may = {(own.what, _stage_name(stages[own.stage]), *own.storage): own for own in problem.keeps.get(region.number, ())}
        for kept in map(tuple, entry["keeps"]):
            if kept not in may:
                raise _cannot(f"it keeps the {kept[0]} of {kept[1]}, which may not be kept here")
            found.add(may[kept])
    return frozenset(found)


def check_same(plan: Plan, found: Plan) -> None:
    """Raises PlanError where a plan says that it sends something else than it does here."""
    for name in ("communication", "parameters"):
        stated, own = (_without_buckets(one.to_dict()[name]) for one in (plan, found))
        for key in own.keys() - {"early"}:  # which cost models decide, on all ranks alike, and not the plan
            if stated.get(key) != own[key]:
                raise _cannot(f"its {name} say {key} {stated.get(key)!r}, and here that is {own[key]!r}")


def _without_buckets(sent: dict[str, Any]) -> dict[str, Any]:
    """Without how many buckets gradients are summed in, of which a stage of a pipeline has more."""
    by_primitive = sent.get("by_primitive", {})
    if "replicate" in by_primitive:
        return {**sent, "by_primitive": {**by_primitive, "replicate": {**by_primitive["replicate"], "count": 0}}}
    return sent


def _differs(found: str, where: str = "") -> PlanError:
    return PlanError(asked="this plan is of another model or call", found=shorten(found), where=where or None, remedy=_AGAIN)


def _cannot(found: str, where: str = "") -> PlanError:
    return PlanError(asked="cannot run this plan", found=shorten(found), where=where or None, remedy=_AGAIN)
