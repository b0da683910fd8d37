"""Summarize: a solved problem as a plan that a person reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx
import torch

from dsp_auto.capacity import Capacity
from dsp_auto.cost_models.communication import Cost
from dsp_auto.plan import Enter, Plan, PlanStage

from .buckets import Bucket
from .factors import Op
from .layout import R, Shard, Step, cutters, show_placement
from .lifetimes import RESULT, Kept
from .nodes import node_call
from .notation import OpRule
from .overlap import Early
from .problem import Problem, Recomputed, Resharding
from .rules import WRITTEN, origin, why_none
from .solve import Solution
from .stages import OP, OUTPUT, Stage

# An op that makes more than this share of all activation bytes on every device is worth a word.
LARGE = 0.01


def summarize(
    problem: Problem,
    solution: Solution,
    buckets: Sequence[Bucket],
    early: Sequence[Early],
    groups: Sequence[Sequence[Stage]],
    strategy: str,
    capacity: Capacity | None,
    seconds: Mapping[str, float],
) -> Plan:
    """The plan, each of whose stages is one of the `groups`."""
    recomputed = solution.recomputed | problem.forced
    graph, choice = problem.graph, solution.choice
    factors, mesh = graph.factors, graph.mesh
    group_of = {stage.index: number for number, group in enumerate(groups) for stage in group}
    reshardings = problem.known_reshardings(choice)
    entering: dict[int, list[Resharding]] = {}
    for resharding in reshardings:
        entering.setdefault(min(group_of[stage] for stage in _users(problem, choice, resharding)), []).append(
            resharding
        )
    stages = []
    for number, group in enumerate(groups):
        stages.append(
            PlanStage(
                index=number,
                name=_name(group),
                ops=sum(1 for stage in group if stage.kind == OP),
                computes_over=_computes_over(problem, group),
                layout=_layout(problem, choice, group),
                enter=(*_enter(problem, entering.get(number, [])), *_inside(problem, choice, group)),
            )
        )
    return Plan(
        mesh=mesh.whole,
        split=dict(zip(mesh.names, mesh.sizes)) if mesh.names != mesh.part_of else {},
        objective=problem.objective,
        strategy=strategy,
        stages=tuple(stages),
        communication=_communication(problem, choice, reshardings, buckets, early, recomputed),
        memory=_memory(problem, solution, capacity),
        recomputed=_recomputed(problem, solution),
        factors=tuple(
            {"name": factors.names[f], "size": factors.sizes[f], "kind": kind}
            for f, kind in factors.kinds.items()
            if kind != "feature"
        ),
        activations=_activations(problem, choice),
        parameters=_parameters(problem, choice),
        rules=_rules(problem),
        without_rule=_replicated(problem, choice, lambda rule: rule is None),
        random=_replicated(problem, choice, lambda rule: rule is not None and rule.is_random),
        seconds=dict(seconds),
        solver={
            "name": solution.solver,
            "status": solution.status,
            "objective": _number(solution.objective),
            "bound": _number(solution.bound),
            "gap": solution.gap,
            "variables": solution.variables,
            "constraints": solution.constraints,
            "folded": solution.folded,
        },
        versions={"torch": torch.__version__},
    )


def _running_replicated(problem: Problem, choice: Sequence[int]) -> Iterator[tuple[Stage, Op]]:
    """The ops that run replicated, each with its stage."""
    for stage in problem.graph.stages:
        if stage.op is not None and not any(stage.strategies[choice[stage.index]].cuts):
            yield stage, stage.op


def _replicated(
    problem: Problem, choice: Sequence[int], why: Callable[[OpRule | None], bool]
) -> tuple[dict[str, Any], ...]:
    """Ops that run replicated, of those whose rule (or lack of one) is as `why` asks, with the bytes they make on every
    device."""
    values = problem.graph.factors.values
    return tuple(
        {
            "op": op.name,
            "target": str(op.node.target),
            "path": op.path,
            "bytes": sum(values[result].nbytes for result in op.results),
            **({"why": why_none(node_call(op.node))} if op.rule is None else {}),
        }
        for _, op in _running_replicated(problem, choice)
        if why(op.rule)
    )


def _rules(problem: Problem) -> tuple[dict[str, Any], ...]:
    """The rules that were not written here: registered by the user, or found by running the op."""
    ops = [op for op in problem.graph.factors.ops if op.rule is not None]
    found = Counter((str(op.node.target), str(op.rule), origin(op.node.target)) for op in ops)
    return tuple(
        {"target": target, "rule": rule, "origin": whose, "ops": count}
        for (target, rule, whose), count in found.items()
        if whose != WRITTEN
    )


def _activations(problem: Problem, choice: Sequence[int]) -> dict[str, Any]:
    """Bytes that all ops make, whole; those of ops that run replicated; and each op that makes more than 1% so, with the
    reason: it has no rule, its rule cuts no factor that may be sharded here, the user's constraints leave no other way, or it
    was cheaper."""
    graph = problem.graph
    values, names = graph.factors.values, graph.factors.names
    sizes = {s.index: sum(values[r].nbytes for r in s.op.results) for s in graph.stages if s.op is not None}
    total = sum(sizes.values()) or 1
    found = []
    for stage, op in _running_replicated(problem, choice):
        if sizes[stage.index] <= LARGE * total:
            continue
        shape = ", ".join(f"{names[f]}={graph.factors.sizes[f]}" for r in stage.results for f in values[r].factors)
        if op.rule is None:
            why = "no rule"
        elif any(any(strategy.cuts) for strategy in stage.strategies):
            why = "cheaper so"
        elif stage.index in graph.constrained:
            why = "as constrained"
        else:
            why = f"nothing to shard in ({shape})"
        found.append(
            {
                "op": op.name,
                "target": str(op.node.target),
                "path": op.path,
                "share": sizes[stage.index] / total,
                "why": why,
            }
        )
    replicated = sum(sizes[stage.index] for stage, _ in _running_replicated(problem, choice))
    return {"bytes": total, "replicated_bytes": replicated, "large_replicated": found}


def _parameters(problem: Problem, choice: Sequence[int]) -> dict[str, Any]:
    """Bytes of all parameters, those of them on one device, and of each that ranks hold in parts what mesh dims cut."""
    graph, names = problem.graph, problem.graph.factors.names
    found: dict[str, Any] = {"bytes": 0, "device_bytes": 0, "in_parts": {}}
    for storage in graph.storages.values():
        stage = graph.stages[storage.maker]
        if storage.root.id[0] not in graph.parameters or storage.id[0] in graph.same_as:
            continue
        layout = problem.made(storage.id, choice)
        found["bytes"] += storage.root.nbytes
        found["device_bytes"] += problem.nbytes(storage.id, layout)
        cut = {place: cutters(layout, place) for place in {p.place for p in layout if isinstance(p, Shard)}}
        if cut:
            factors = storage.root.factors
            found["in_parts"][stage.name] = {graph.mesh.label(dims): names[factors[place]] for place, dims in cut.items()}
    return found


def group_stages(problem: Problem, choice: Sequence[int]) -> list[list[Stage]]:
    """What a plan shows as one stage: stages connected by uses that reshard nothing, on the same factors, with equally many
    reshardings before them. So a group never waits for what another makes of its own results."""
    graph = problem.graph
    links: networkx.Graph[int] = networkx.Graph()
    links.add_nodes_from(stage.index for stage in graph.stages if stage.kind in (OP, OUTPUT))
    reshardings_before = dict.fromkeys(links, 0)
    same_layout = []
    for user in graph.stages:
        for use in user.uses:
            maker = graph.stages[graph.storages[use.storage].maker]
            if maker.kind != OP:
                continue
            made = problem.made(use.storage, choice)
            as_made = problem.target(use, made, use.wanted[choice[user.index]]) == made
            before = reshardings_before[maker.index] + (not as_made)
            reshardings_before[user.index] = max(reshardings_before[user.index], before)
            first, second = (stage.strategies[choice[stage.index]].factors for stage in (maker, user))
            if as_made and first == second and user.kind == OP:
                same_layout.append((maker.index, user.index))
    links.add_edges_from((a, b) for a, b in same_layout if reshardings_before[a] == reshardings_before[b])
    return [
        [graph.stages[index] for index in group] for group in sorted(map(sorted, networkx.connected_components(links)))
    ]


def _users(problem: Problem, choice: Sequence[int], resharding: Resharding) -> list[int]:
    return [
        use.stage
        for use in problem.graph.uses[resharding.storage]
        if problem.target(use, resharding.source, use.wanted[choice[use.stage]]) == resharding.target
    ]


def _name(group: Sequence[Stage]) -> str:
    """The blocks that a stage spans: module paths up to their first number."""
    first = group[0].op
    if first is None:
        return "output"
    blocks: dict[str, None] = {}
    for stage in group:
        parts = stage.path.split(".") if stage.path else []
        number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        block = ".".join(parts[: number + 1] if number is not None else parts[:1])
        if block:
            blocks[block] = None
    names = list(blocks)
    if not names:
        return first.name
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"


def _computes_over(problem: Problem, group: Sequence[Stage]) -> tuple[str, ...]:
    factors = problem.graph.factors
    found: dict[str, None] = {}
    for stage in group:
        if stage.op is None or stage.op.rule is None:
            continue
        for axis in sorted(stage.op.rule.computes_over | stage.op.rule.reduces):
            for factor in stage.op.axes[axis]:
                if factors.kinds.get(factor) == "sequence":
                    found[factors.names[factor]] = None
    return tuple(found)


def _layout(problem: Problem, choice: Sequence[int], group: Sequence[Stage]) -> dict[str, str]:
    graph = problem.graph
    sharded = group[0].strategies[choice[group[0].index]].factors
    if group[0].kind == OUTPUT and group[0].uses:
        use = group[0].uses[0]
        names = graph.factors.factor_names(use.storage)
        shown = [show_placement(placement, names) for placement in use.wanted[0]]
    else:
        shown = ["R" if factor is None else graph.factors.names[factor] for factor in sharded]
    # The parts of a dim that is split, where they differ: `T x S`.
    parts = {name: dict.fromkeys(shown[m] for m in graph.mesh.dims_of(name)) for name in graph.mesh.whole}
    return {
        name: " x ".join(shown[m] for m in graph.mesh.dims_of(name)) if len(own) > 1 else next(iter(own))
        for name, own in parts.items()
    }


def _enter(problem: Problem, reshardings: Sequence[Resharding]) -> list[Enter]:
    graph = problem.graph
    found: list[Enter] = []
    gathered: dict[str, list[Enter]] = {}
    for resharding in reshardings:
        names = graph.factors.factor_names(resharding.storage)
        storage = graph.storages[resharding.storage]
        maker = graph.stages[storage.maker]
        label = maker.name if storage.kind != "activation" else storage.id[0]
        label += f".{storage.result}" if len(maker.results) > 1 else ""
        for step, cost in zip(resharding.steps, resharding.costs):
            entry = Enter(
                step.primitive,
                label,
                graph.mesh.label(step.mesh_dims),
                show_placement(step.source, names),
                show_placement(step.target, names),
                _number(cost.forward_bytes),
                _number(cost.backward_bytes),
            )
            if step.primitive == "replicate" and storage.kind == "parameter":
                gathered.setdefault(entry.mesh_dim, []).append(entry)
            else:
                found.append(entry)
    for mesh_dim, entries in gathered.items():
        backward = _number(sum(entry.backward_bytes for entry in entries))
        label = ", ".join(entry.tensor for entry in entries)
        found.append(Enter("replicate", label, mesh_dim, str(show_placement(R, ())), "R", 0, backward, len(entries)))
    return found


def _inside(problem: Problem, choice: Sequence[int], group: Sequence[Stage]) -> list[Enter]:
    """What the ops of a stage communicate by themselves."""
    graph, found = problem.graph, []
    for stage in group:
        if stage.op is None:
            continue
        for inside in problem.inside(stage.index, choice[stage.index]):
            strategy = stage.strategies[choice[stage.index]]
            name = graph.mesh.label(inside.mesh_dims)
            factor = graph.factors.names[stage.op.factors(strategy.cuts[inside.mesh_dims[0]])[-1]]
            both = (_number(inside.cost.forward_bytes), _number(inside.cost.backward_bytes))
            found.append(Enter(inside.primitive, stage.op.name, name, factor, factor, *both))
    return found


def _communication(
    problem: Problem,
    choice: Sequence[int],
    reshardings: Sequence[Resharding],
    buckets: Sequence[Bucket],
    early: Sequence[Early],
    recomputed: Recomputed,
) -> dict[str, Any]:
    in_bucket = {storage for bucket in buckets for storage in bucket.storages}
    by_primitive: dict[str, dict[str, float]] = {}
    paper = 0.0

    def add(primitive: str, cost: Cost, count: int) -> None:
        entry = by_primitive.setdefault(primitive, {"count": 0, "forward_bytes": 0.0, "backward_bytes": 0.0})
        entry["count"] += count
        entry["forward_bytes"] += cost.forward_bytes
        entry["backward_bytes"] += cost.backward_bytes

    # Two ways of one tensor that begin alike go that far together.
    shared: dict[tuple, tuple[Step, Cost, bool, bool]] = {}
    for resharding in reshardings:
        again = problem.is_repeated(resharding, choice, recomputed)
        for step, cost in zip(resharding.steps, resharding.costs):
            key = (resharding.storage, step.before, step.after)
            if key not in shared or cost.backward_bytes > shared[key][1].backward_bytes:
                shared[key] = (step, cost, again, resharding.storage in in_bucket)
    for step, cost, again, is_bucketed in shared.values():
        add(step.primitive, _again(cost, again), 0 if is_bucketed else 1)
        paper += cost.paper_volume
    for stage in problem.graph.stages:
        for inside in problem.inside(stage.index, choice[stage.index]):
            region = problem.region_of.get(stage.index)
            keeps = any(own.stage == stage.index and own.what == RESULT for own in recomputed if isinstance(own, Kept))
            again = region in recomputed and not keeps
            add(inside.primitive, _again(inside.cost, again), 1)
            paper += inside.cost.paper_volume
    if buckets:
        by_primitive["replicate"]["count"] += sum(len(bucket.steps) for bucket in buckets)
    for entry in by_primitive.values():
        entry.update({name: _number(value) for name, value in entry.items()})
    return {
        "forward_bytes": _number(sum(entry["forward_bytes"] for entry in by_primitive.values())),
        "backward_bytes": _number(sum(entry["backward_bytes"] for entry in by_primitive.values())),
        "paper_forward_volume": _number(paper),
        "by_primitive": by_primitive,
        "early": {"count": len(early), "hidden_seconds": sum(one.hidden for one in early)},
    }


def _again(cost: Cost, again: bool) -> Cost:
    """What is communicated inside a region that is recomputed goes forward once more in backward."""
    return replace(cost, forward_bytes=2 * cost.forward_bytes) if again else cost


def _memory(problem: Problem, solution: Solution, capacity: Capacity | None) -> dict[str, Any]:
    """Bytes per device (see `Plan`): of everything, of activations alone, and of what of it never changes."""
    choice, recomputed = solution.choice, solution.recomputed
    totals = problem.totals(choice, recomputed, whole=True)
    _, worst = problem.peak(choice, recomputed, whole=True)
    found: dict[str, Any] = {
        "peak_bytes": max(totals, default=0),
        "peak_at": problem.show_point(worst),
        "capacity_bytes": capacity and capacity.usable,
        "reserve_bytes": capacity and capacity.bytes - capacity.usable,
        "activation_bytes": problem.peak(choice, recomputed, whole=False)[0],
        "activation_bound_bytes": None if capacity else solution.capacity_bytes,
        "optimizer": str(problem.state),
    }
    found |= problem.state_bytes(choice)
    curve: list[list[Any]] = []
    for point, nbytes in zip(problem.points, totals):
        if point.again is not None and not nbytes:
            continue
        stage = problem.graph.stages[point.stage]
        phase = "again" if point.again is not None else point.phase
        if curve and curve[-1][:2] == [phase, stage.name]:
            curve[-1][2] = max(curve[-1][2], nbytes)
        else:
            curve.append([phase, stage.name, nbytes])
    return found | {"curve": curve}


def _recomputed(problem: Problem, solution: Solution) -> tuple[dict[str, Any], ...]:
    """The regions whose activations backward makes again, by the planner's choice or by the model's."""
    stages = problem.graph.stages
    return tuple(
        {
            "modules": _name([stages[index] for index in region.stages]),
            "ops": len(region.stages),
            "by": "model" if region.forced else "plan",
            "keeps": [
                f"{own.what} of {stages[own.stage].label}"
                for own in problem.keeps.get(region.number, ())
                if own in solution.recomputed
            ],
        }
        for region in problem.regions
        if region.forced or region.number in solution.recomputed
    )


def _number(value: float) -> float:
    """Whole numbers as int: bytes of even shards are whole."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12, abs_tol=1e-6) else value
