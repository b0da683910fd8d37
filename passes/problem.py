"""The problem: what any choice of strategies costs and holds in memory, told without a solver.

The solver's integer program is made from the same numbers, and tests compare the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dsp_auto.cost_models.communication import FREE, Cost, halo_cost, hierarchical_cost, primitive_cost, ring_cost
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.cost_models.memory import Footprint, primitive_buffers, run_footprint
from dsp_auto.cost_models.state import BUCKET_BYTES, StateBytes, TrainingState, of_parameter
from dsp_auto.errors import StrategyError
from dsp_auto.ring_attention import short_ring

from .capture import Program
from .enumerate_strategies import Strategy
from .factors import Cut, Op, Value
from .layout import Layout, R, Replicate, Shard, Step, cutters, place_of, ways
from .ledger import Ledger
from .lifetimes import (
    ALIAS,
    COPY,
    FORWARD,
    MADE,
    RESULT,
    STEP,
    Alive,
    Extra,
    Held,
    Holder,
    Internal,
    Kept,
    Packed,
    Point,
    Reach,
    Resharded,
    Slot,
    Term,
    footprint,
    is_state,
    lifetimes,
)
from .nodes import ValueId, is_tensor, node_values
from .notation import Local, OpRule, Ring, Site
from .regions import Region, find_regions
from .stages import Stage, StageGraph, Use, strip

OBJECTIVES = ("volume", "time")
# An op is worth keeping the result of if it takes more than this share of what recomputing its region costs.
KEEPING = 0.1
# Of ways of equal cost the one of fewest collectives is taken: each weighs this share of the tensor, or of a second.
TIE = 1e-10


# What a plan recomputes: numbers of regions, and what these keep although they are recomputed.
Recomputed = frozenset[int | Kept]


@dataclass(frozen=True)
class Resharding:
    """One storage turned from the layout it is made in into one that uses want; `grad`: a gradient comes back from one."""

    storage: ValueId
    source: Layout
    target: Layout
    grad: bool
    steps: tuple[Step, ...]
    costs: tuple[Cost, ...]

    @cached_property
    def cost(self) -> Cost:
        return sum(self.costs, FREE)


@dataclass(frozen=True)
class Inside:
    """What an op communicates by itself over some mesh dims: borders (`halo` of one operand), statistics (`reduce`), or keys
    and values (`ring`)."""

    primitive: str
    mesh_dims: tuple[int, ...]
    operand: int | None
    cost: Cost


@dataclass(frozen=True)
class _Ends:
    """The two factors of a switch, and how much of them a device has whose place along mesh dims is `own`."""

    graph: StageGraph
    source: int
    target: int
    before: tuple[int, ...]  # the mesh dims that cut the one before the switch
    after: tuple[int, ...]  # and the other one after it
    outer: tuple[int, ...]  # of these, those that take no part

    @classmethod
    def of(cls, problem: Problem, root: Value, step: Step) -> _Ends:
        first, second = place_of(step.source), place_of(step.target)
        before, after = cutters(step.before, first), cutters(step.after, second)
        source, target = root.factors[first], root.factors[second]
        return cls(problem.graph, source, target, before, after, tuple(m for m in after if m not in step.mesh_dims))

    @property
    def are_even(self) -> bool:
        """Whether one of the factors is cut into equal parts."""
        sizes = self.graph.factors.sizes
        return not sizes[self.source] % self._ranks(self.before) or not sizes[self.target] % self._ranks(self.after)

    def held(self, own: Mapping[int, int]) -> int:
        return self._length(self.source, self.before, own)

    def kept(self, own: Mapping[int, int]) -> int:
        return self._length(self.target, self.after, own)

    def there(self, own: Mapping[int, int]) -> int:
        """Before the switch."""
        return self._length(self.target, self.outer, own)

    def mean(self, sent: Callable[[dict[int, int]], float]) -> float:
        """The mean of `sent` over all devices, as a share of what one has in the mean."""
        dims = sorted({*self.before, *self.after})
        places = itertools.product(*(range(self.graph.mesh.sizes[m]) for m in dims))
        total = sum(sent(dict(zip(dims, place))) for place in places)
        sizes = self.graph.factors.sizes
        even = sizes[self.source] / self._ranks(self.before) * sizes[self.target] / self._ranks(self.outer)
        return total / self._ranks(dims) / even

    def _ranks(self, dims: Sequence[int]) -> int:
        return math.prod(self.graph.mesh.sizes[m] for m in dims)

    def _length(self, factor: int, dims: tuple[int, ...], own: Mapping[int, int]) -> int:
        coordinate = [own.get(m, 0) for m in range(len(self.graph.mesh.sizes))]
        return self.graph.lengths(factor, dims)[self.graph.line(dims, coordinate)]


class Problem:
    """Eq. 9 of one program: its costs and memory by strategy, evaluated for any choice without a solver."""

    def __init__(
        self,
        program: Program,
        graph: StageGraph,
        objective: str = "volume",
        hardware: Hardware | None = None,
        compute_seconds: Callable[[int, int, bool], float] | None = None,
        state: TrainingState | None = None,
        regions: Sequence[Region] = (),
        whole: bool = False,
    ) -> None:
        """whole: capacity is for everything on a device; else for activations alone."""
        if objective not in OBJECTIVES:
            raise StrategyError(
                asked=f"objective {objective!r}",
                found="no such objective",
                remedy=f"use one of {', '.join(OBJECTIVES)}",
            )
        self.program, self.graph, self.objective, self.hardware = program, graph, objective, hardware
        self.state = state or TrainingState("none")
        self.regions = tuple(regions) or find_regions(graph, candidates=False)
        self.whole = whole
        self.forced = frozenset(region.number for region in self.regions if region.forced)
        self.region_of = {stage: region.number for region in self.regions for stage in region.stages}
        self._compute_seconds = compute_seconds or (lambda stage, strategy, again: 0.0)
        self._reshardings: dict[tuple, Resharding | None] = {}
        self._ways: dict[tuple, dict[Layout, tuple[Step, ...]]] = {}
        self._costs: dict[tuple, Cost] = {}
        self._sized: dict[ValueId, tuple] = {}
        self._inside: dict[tuple[int, int], tuple[Inside, ...]] = {}
        self._bytes: dict[tuple, int] = {}
        self._ledgers: dict[tuple[tuple[int, ...], bool], Ledger] = {}
        self._written_out: dict[tuple, Footprint] = {}
        self._shares: dict[tuple[int, int], float] = {}
        self._totals: dict[tuple, tuple[list[int], list[int]]] = {}
        self.points = lifetimes(program, graph, self.regions, self.saves, self.keeps)

    def target(self, use: Use, source: Layout, wanted: Layout) -> Layout:
        """The layout that a use of a storage made in `source` gets. Where no gradient flows back, it does not matter which
        kind of Replicate it is: what is Replicate stays so."""
        if use.grad:
            return wanted
        return tuple(a if isinstance(b, Replicate) and isinstance(a, Replicate) else b for a, b in zip(source, wanted))

    def resharding(self, storage: ValueId, source: Layout, target: Layout, grad: bool) -> Resharding | None:
        """How `storage` gets from `source` to `target`, None where no primitives lead there. `grad`: a gradient returns."""
        key = (storage, source, target, grad)
        if key not in self._reshardings:
            way = self._way(storage, source, target)
            costs = () if way is None else tuple(self.step_cost(storage, step, grad) for step in way)
            self._reshardings[key] = None if way is None else Resharding(storage, source, target, grad, way, costs)
        return self._reshardings[key]

    def known_resharding(self, storage: ValueId, source: Layout, target: Layout, grad: bool) -> Resharding:
        """The same where primitives are known to lead there: a solved choice, or a pair that the solver has a variable for."""
        found = self.resharding(storage, source, target, grad)
        if found is None:
            raise AssertionError(f"no primitives turn {storage[0]} from {source} into {target}")
        return found

    def _way(self, storage: ValueId, source: Layout, target: Layout) -> tuple[Step, ...] | None:
        """The cheapest steps; of ways that cost the same that of fewest collectives. Two storages of like sizes go alike."""
        root = self.graph.storages[storage].root
        placements = frozenset(source) | frozenset(target) | {R}
        key = (self._sizes(root), root.requires_grad, placements, source)
        if key not in self._ways:
            least = root.nbytes * TIE if self.objective == "volume" else TIE

            def cost(step: Step) -> float:
                return self.weight(self.step_cost(storage, step, root.requires_grad)) + least

            self._ways[key] = ways(source, tuple(sorted(placements, key=repr)), cost)
        return self._ways[key].get(target)

    def _sizes(self, root: Value) -> tuple:
        if root.id not in self._sized:
            self._sized[root.id] = (root.itemsize, tuple(self.graph.factors.sizes[factor] for factor in root.factors))
        return self._sized[root.id]

    def step_cost(self, storage: ValueId, step: Step, grad: bool) -> Cost:
        """Of one step of resharding a storage. `grad`: a gradient returns."""
        root = self.graph.storages[storage].root
        is_parameter = self.graph.storages[storage].kind == "parameter"
        in_bucket = step.primitive == "replicate" and is_parameter and self.graph.in_buckets
        key = (self._sizes(root), step, grad, in_bucket)
        cost = self._costs.get(key)
        if cost is None:
            ranks = math.prod(self.graph.mesh.sizes[m] for m in step.mesh_dims)
            of = (self._shared_out(root.nbytes, step.before, step.mesh_dims), ranks)
            on = {"grad": grad, **self._on(step.mesh_dims)}
            if step.primitive == "hierarchical_switch":
                cost = hierarchical_cost(*of, self._leaves_in_turn(root, step), **on)
            elif step.primitive == "switch":
                cost = primitive_cost("switch", *of, leaves=self._leaves(root, step), **on)
            else:
                partial = any(isinstance(p, Replicate) and p.partial_grad for p in (step.source, step.target))
                cost = primitive_cost(step.primitive, *of, partial_grad=partial, **on)
                if in_bucket and of[0] < BUCKET_BYTES:  # its share of one that is full
                    full = primitive_cost(step.primitive, BUCKET_BYTES, ranks, partial_grad=partial, **on)
                    cost = replace(cost, seconds=full.seconds * of[0] / BUCKET_BYTES)
            self._costs[key] = cost
        return cost

    def _on(self, mesh_dims: Sequence[int]) -> dict[str, Any]:
        """Where something is communicated, for the cost model."""
        mesh = self.graph.mesh
        return {"hardware": self.hardware, "dims": tuple((mesh.names[m], mesh.sizes[m]) for m in mesh_dims)}

    def _leaves(self, root: Value, step: Step) -> float:
        """The share of what a device holds that leaves it in a `switch`, the mean over all devices: what it holds of the one
        factor, less what it keeps of the other."""
        ends = _Ends.of(self, root, step)
        ranks = math.prod(self.graph.mesh.sizes[m] for m in step.mesh_dims)
        if ends.are_even:
            return (ranks - 1) / ranks
        return ends.mean(lambda own: ends.held(own) * (ends.there(own) - ends.kept(own)))

    def _leaves_in_turn(self, root: Value, step: Step) -> tuple[float, float]:
        """The same for a `hierarchical_switch`: over the outermost mesh dim, and over the others."""
        sizes = self.graph.mesh.sizes
        outer, inner = step.mesh_dims[0], step.mesh_dims[1:]
        ends = _Ends.of(self, root, step)
        if ends.are_even:
            ranks = math.prod(sizes[m] for m in inner)
            return (sizes[outer] - 1) / sizes[outer], (ranks - 1) / ranks
        lines = list(itertools.product(*(range(sizes[m]) for m in inner)))

        def at(own: dict[int, int], first: int, rest: tuple[int, ...]) -> dict[int, int]:
            return {**own, outer: first, **dict(zip(inner, rest))}

        def over_inner(own: dict[int, int]) -> float:
            here = tuple(own[m] for m in inner)
            kept = sum(ends.kept(at(own, first, here)) for first in range(sizes[outer]))
            return ends.held(own) * (ends.there(own) - kept)

        def over_outer(own: dict[int, int]) -> float:
            here = tuple(own[m] for m in inner)
            others = sum(ends.kept(at(own, first, here)) for first in range(sizes[outer]) if first != own[outer])
            return sum(ends.held(at(own, own[outer], rest)) for rest in lines) * others

        return ends.mean(over_outer), ends.mean(over_inner)

    def inside(self, stage: int, strategy: int) -> tuple[Inside, ...]:
        """What a stage's op communicates while it runs one of its strategies."""
        entry = self.graph.stages[stage]
        op = entry.op
        if op is None or op.rule is None or not op.rule.communicates:
            return ()
        key = (stage, strategy)
        if key not in self._inside:
            self._inside[key] = tuple(self._inside_of(op, op.rule, entry.strategies[strategy]))
        return self._inside[key]

    def _inside_of(self, op: Op, rule: OpRule, strategy: Strategy) -> Iterator[Inside]:
        values = self.graph.factors.values
        flows = any(values[result].requires_grad for result in op.results)
        # An operand that windows have widened on one dim is wider for those on the next.
        grown: dict[tuple[int, int], float] = {}
        for window, (cut, mesh_dims) in itertools.product(rule.windows, strategy.together.items()):
            axes, size = dict(cut), rule.sizes.get(window.source, 1)
            if window.source not in axes or window.target not in axes:
                continue
            source, target = (self.site(op, (axis, 0), mesh_dims).ranges for axis in (window.source, window.target))
            value = values[op.operands[window.operand]]
            nbytes = self._shared_out(value.nbytes, strategy.operands[window.operand], mesh_dims)
            for (operand, dim), share in grown.items():
                nbytes *= share if operand == window.operand and dim != window.dim else 1.0
            sent = nbytes * window.elements(source, target, size) / size / len(source)
            grown[window.operand, window.dim] = sum(window.length(*part, size) for part in target) / size
            cost = halo_cost(sent, grad=flows and value.requires_grad, **self._on(mesh_dims))
            if cost != FREE:
                yield Inside("halo", mesh_dims, window.operand, cost)
        for cut, mesh_dims in strategy.together.items():
            for statistic in (s for axis, _ in cut for s in rule.combines.get(axis, ())):
                nbytes = math.prod(rule.sizes.get(axis, 1) for axis in statistic.axes) * statistic.dtype.itemsize
                for other, own in strategy.together.items():
                    if other != cut and any(axis in statistic.axes for axis, _ in other):
                        nbytes /= math.prod(self.graph.mesh.sizes[m] for m in own)
                grad = statistic.dtype.is_floating_point and flows and values[op.operands[0]].requires_grad
                partial = not statistic.is_result
                ranks = math.prod(self.graph.mesh.sizes[m] for m in mesh_dims)
                cost = primitive_cost("reduce", nbytes, ranks, grad=grad, partial_grad=partial, **self._on(mesh_dims))
                yield Inside("reduce", mesh_dims, None, cost)
            ring = rule.ring([axis for axis, _ in cut])
            if ring is not None:
                yield Inside("ring", mesh_dims, None, self._ring_cost(op, strategy, ring, cut, mesh_dims, flows))

    def _ring_cost(
        self, op: Op, strategy: Strategy, ring: Ring, cut: Sequence[Cut], mesh_dims: Sequence[int], flows: bool
    ) -> Cost:
        """Of keys and values that go round: `ring.traffic` on what one device has of the operands and the result."""
        values = self.graph.factors.values
        queries, keys = (self.site(op, (axis, 0), mesh_dims) for axis in (ring.queries, ring.keys))
        held = [values[v].nbytes for v in (*op.operands, *op.results)]
        layouts = (*strategy.operands, *strategy.results)
        held = [self._shared_out(nbytes, layout, mesh_dims) for nbytes, layout in zip(held, layouts, strict=True)]
        grads = tuple(flows and values[operand].requires_grad for operand in op.operands)
        traffic = ring.traffic([b - a for a, b in queries.ranges], [b - a for a, b in keys.ranges], held, grads)
        return ring_cost(*traffic, **self._on(mesh_dims))

    def site(self, op: Op, cut: Cut, mesh_dims: Sequence[int], rank: int = 0, group: str = "") -> Site:
        """Where mesh dims cut one factor of one axis of an op."""
        axis, index = cut
        factors = op.axes[axis]
        unit = math.prod(self.graph.factors.sizes[minor] for minor in factors[index + 1 :])
        return Site(self.graph.lengths(factors[index], mesh_dims), rank, group, unit)

    def here(
        self,
        op: Op,
        together: Mapping[tuple[Cut, ...], tuple[int, ...]],
        coordinate: Sequence[int],
        groups: Mapping[tuple[int, ...], str],
    ) -> Local:
        """The part of an op of the rank at `coordinate`, where mesh dims cut the given factors of axes."""
        rule = op.known_rule
        sizes = dict(rule.sizes)
        starts: dict[str, int] = {}
        placed: list[tuple[str, Site]] = []
        for cut, mesh_dims in together.items():
            rank, group = self.graph.line(mesh_dims, coordinate), groups.get(mesh_dims, "")
            for own in cut:
                site = self.site(op, own, mesh_dims, rank, group)
                axis = own[0]
                sizes[axis] = sizes[axis] // site.lead * site.length
                starts[axis] = starts.get(axis, 0) + site.start
                placed.append((axis, site))
        return rule.on_rank(sizes, starts, placed)

    def written_out(self, stage: int, strategy: int) -> Footprint | None:
        """What an op takes on the first rank where its rule communicates, and so writes it as other ops; None elsewhere."""
        op, own = self.graph.stages[stage].op, self.graph.stages[stage].strategies[strategy]
        if op is None or not self.inside(stage, strategy):
            return None
        values, first = self.graph.factors.values, (0,) * len(self.graph.mesh.sizes)
        shapes = tuple(
            self.graph.local_shape(value, use.wanted[strategy], first)
            for value, use in zip(op.operands, self.graph.stages[stage].uses, strict=True)
        )
        flags = tuple((values[v].dtype, values[v].requires_grad) for v in op.operands)
        key = (id(op.rule), str(op.node.target), shapes, flags, own.cuts)
        if key not in self._written_out:
            self._written_out[key] = self._write_out(op, own, shapes)
        return self._written_out[key]

    def _write_out(self, op: Op, strategy: Strategy, shapes: Sequence[tuple[int, ...]]) -> Footprint:
        values = self.graph.factors.values
        first = (0,) * len(self.graph.mesh.sizes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            operands = [
                torch.empty(shape, dtype=values[v].dtype, device=values[v].device).requires_grad_(
                    self.graph.training and values[v].requires_grad
                )
                for shape, v in zip(shapes, op.operands, strict=True)
            ]
            rest = iter(operands)
            args, kwargs = fx.map_arg(
                (op.node.args, dict(op.node.kwargs)), lambda n: next(rest) if is_tensor(n) else n.meta["val"]
            )
            here = self.here(op, strategy.together, first, {})
            return run_footprint(
                lambda: op.known_rule.call(_run, op.node.target, args, kwargs, here), operands, self.graph.training
            )

    def _shared_out(self, nbytes: float, layout: Layout, but: Collection[int] = ()) -> float:
        """What a device has in the mean, were it not cut over the mesh dims `but`."""
        for m, placement in enumerate(layout):
            if m not in but and isinstance(placement, Shard):
                nbytes /= self.graph.mesh.sizes[m]
        return nbytes

    def compute_seconds(self, stage: int, strategy: int) -> float:
        """Of a stage's kernels, forward and backward."""
        return self._compute_seconds(stage, strategy, False)

    def compute_again(self, stage: int, strategy: int) -> float:
        """Of a stage's kernels, forward once more."""
        return self._compute_seconds(stage, strategy, True)

    def inside_cost(self, stage: int, strategy: int) -> float:
        """The objective's share of what a stage's op communicates by itself."""
        return sum(self.weight(inside.cost) for inside in self.inside(stage, strategy))

    def weight(self, cost: Cost) -> float:
        return cost.wire_bytes if self.objective == "volume" else cost.seconds

    def nbytes(self, storage: ValueId, layout: Layout) -> int:
        """Bytes of a storage in a layout, on the rank that holds most of it."""
        key = (storage, layout)
        if key not in self._bytes:
            self._bytes[key] = self.graph.local_bytes(storage, layout)
        return self._bytes[key]

    def shared_bytes(self, term: Internal | Extra, strategy: int) -> int:
        own = self.written_out(term.stage, strategy)
        if own is None:
            return math.ceil(term.nbytes * self._largest_share(term.stage, strategy))
        return own.internal if isinstance(term, Internal) else own.backward_extra if term.back else own.extra

    def _largest_share(self, stage: int, strategy: int) -> float:
        """The share of an op's work that the rank has that has most."""
        key = (stage, strategy)
        if key not in self._shares:
            entry, share = self.graph.stages[stage], 1.0
            op = entry.op
            if op is not None:
                for cut, mesh_dims in entry.strategies[strategy].together.items():
                    lengths = self.graph.lengths(op.factors(cut)[0], mesh_dims)
                    share *= max(lengths) / sum(lengths)
            self._shares[key] = share
        return self._shares[key]

    def saves(self, use: Use) -> tuple[int, ...] | None:
        """The strategies in which an op that saves an operand really does, None: in all; a rule that communicates may save
        something else instead."""
        stage = self.graph.stages[use.stage]
        if stage.op is None or stage.op.rule is None or not stage.op.rule.communicates:
            return None
        written = [self.written_out(use.stage, k) for k in range(len(stage.strategies))]
        if not any(written):
            return None
        return tuple(k for k, own in enumerate(written) if own is None or use.operand in own.saved)

    def held_bytes(self, term: Held, layout: Layout) -> int:
        """Of a parameter, on a device that holds it in `layout`."""
        own = self.of_parameter(term.storage, layout)
        return {
            "state": own.parameters + own.optimizer,
            "gradient": own.gradients,
            "gathered": own.gathered,
            "unreduced": own.unreduced,
            "step": own.step,
        }[term.what]

    def decided(self, choice: Sequence[int]) -> Problem:
        """What is left to decide where every stage's strategy is settled: what is recomputed."""
        return self.restricted([(k,) for k in choice])

    def restricted(self, strategies: Sequence[Sequence[int]]) -> Problem:
        """Where every stage has only some of its strategies left."""
        stages = []
        for stage, own in zip(self.graph.stages, strategies, strict=True):
            uses = tuple(replace(use, wanted=tuple(use.wanted[k] for k in own)) for use in stage.uses)
            left, made = tuple(stage.strategies[k] for k in own), tuple(stage.made[k] for k in own)
            stages.append(replace(stage, strategies=left, made=made, uses=uses))

        def seconds(stage: int, k: int, again: bool) -> float:
            return self._compute_seconds(stage, strategies[stage][k], again)

        graph = replace(self.graph, stages=tuple(stages))
        return Problem(
            self.program, graph, self.objective, self.hardware, seconds, self.state, self.regions, self.whole
        )

    def state_bytes(self, choice: Sequence[int]) -> dict[str, int]:
        """What a device holds beside activations: parameters, their gradients once all are there, the optimizer, what it takes
        while it steps, and inputs (buffers and constants too)."""
        found = dict.fromkeys(("parameter_bytes", "gradient_bytes", "optimizer_bytes", "step_bytes", "input_bytes"), 0)
        for storage in self.graph.storages.values():
            if storage.id[0] in self.graph.same_as:
                continue
            if storage.root.id[0] in self.graph.parameters:
                own = self.of_parameter(storage.id, self.made(storage.id, choice))
                found["parameter_bytes"] += own.parameters
                found["gradient_bytes"] += own.gradients
                found["optimizer_bytes"] += own.optimizer
                found["step_bytes"] += own.step
            elif storage.kind != "activation":
                found["input_bytes"] += self.nbytes(storage.id, self.made(storage.id, choice))
        return found

    def of_parameter(self, storage: ValueId, layout: Layout) -> StateBytes:
        root = self.graph.storages[storage].root
        nbytes = self.nbytes(storage, layout)
        trained = root.requires_grad and self.graph.training
        return of_parameter(nbytes, root.itemsize, root.dtype.is_floating_point, trained, self.state)

    def buffers_bytes(self, storage: ValueId, source: Layout, target: Layout, back: bool) -> int:
        """What the primitives from one layout to another take beside the two, or the way back."""
        steps = self.known_resharding(storage, source, target, back).steps
        between = [source, *(step.after for step in steps)]
        found = 0
        for n, step in enumerate(steps):
            taken = self.step_buffers(storage, step)[back]
            # What is neither the first nor the last is there beside them.
            inner = [layout for layout in between[n : n + 2] if layout not in (source, target)]
            found = max(found, taken + sum(self.nbytes(storage, layout) for layout in inner))
        return found

    def step_buffers(self, storage: ValueId, step: Step) -> tuple[int, int]:
        """What a step takes beside its ends, forward and backward."""
        root, sizes = self.graph.storages[storage].root, self.graph.factors.sizes
        ends = [self.nbytes(storage, layout) for layout in (step.before, step.after)]
        cut = [placement.place for placement in (step.source, step.target) if isinstance(placement, Shard)]
        leads = all(math.prod(sizes[factor] for factor in root.factors[:place]) == 1 for place in cut)
        lengths = [self.graph.lengths(root.factors[place], step.mesh_dims) for place in cut]
        return primitive_buffers(
            step.primitive,
            max(ends),
            min(ends) if step.primitive != "switch" else max(ends),
            ranks=math.prod(self.graph.mesh.sizes[m] for m in step.mesh_dims),
            leads=leads,
            even=all(min(own) == max(own) for own in lengths),
            partial_grad=any(isinstance(p, Replicate) and p.partial_grad for p in (step.source, step.target)),
            contiguous=self._is_contiguous(root),
        )

    def _is_contiguous(self, value: Value) -> bool:
        return node_values(self.program.nodes[value.id[0]])[value.id[1]].is_contiguous()

    def made(self, storage: ValueId, choice: Sequence[int]) -> Layout:
        entry = self.graph.storages[storage]
        return self.graph.stages[entry.maker].made[choice[entry.maker]][entry.result]

    def reshardings(self, choice: Sequence[int]) -> list[Resharding] | None:
        """All reshardings that a choice needs, each once; None where one of them does not exist."""
        found: dict[tuple, Resharding] = {}
        for storage, uses in self.graph.uses.items():
            source = self.made(storage, choice)
            for use in uses:
                target = self.target(use, source, use.wanted[choice[use.stage]])
                if target == source:
                    continue
                shared = found.get((storage, target))
                resharding = self.resharding(storage, source, target, use.grad or (shared is not None and shared.grad))
                if resharding is None:
                    return None
                found[storage, target] = resharding
        return list(found.values())

    def known_reshardings(self, choice: Sequence[int]) -> list[Resharding]:
        """The same of a choice that is known to be possible: a solved one."""
        found = self.reshardings(choice)
        if found is None:
            raise AssertionError("the choice needs a resharding that no primitives make")
        return found

    def lines(self, choice: Sequence[int]) -> list[tuple[int, ...]]:
        """The sets of mesh dims that something is communicated over, in order."""
        steps = [step for resharding in self.known_reshardings(choice) for step in resharding.steps]
        in_turn = [step.mesh_dims for step in steps if step.primitive == "hierarchical_switch"]
        found = {step.mesh_dims for step in steps} | {part for dims in in_turn for part in (dims[:1], dims[1:])}
        for stage in self.graph.stages:
            found |= {inside.mesh_dims for inside in self.inside(stage.index, choice[stage.index])}
        return sorted(found)

    def cost(self, choice: Sequence[int], recomputed: Recomputed = frozenset()) -> float | None:
        """The objective of a choice where some regions are recomputed, None where it is impossible."""
        reshardings = self.reshardings(choice)
        if reshardings is None:
            return None
        compute = 0.0
        if self.objective == "time":
            compute = sum(self.compute_seconds(s.index, choice[s.index]) for s in self.graph.stages)
        inside = sum(self.inside_cost(s.index, choice[s.index]) for s in self.graph.stages)
        again = self.again(choice, recomputed | self.forced, reshardings)
        return sum(self.weight(r.cost) for r in reshardings) + inside + compute + again

    def again(
        self, choice: Sequence[int], recomputed: Recomputed, reshardings: Sequence[Resharding] | None = None
    ) -> float:
        """What backward pays once more for regions that it runs again."""
        reshardings = self.known_reshardings(choice) if reshardings is None else reshardings
        found = sum(self.weight(self.forward_only(r)) for r in reshardings if self.is_repeated(r, choice, recomputed))
        for region in self.regions:
            if region.number in recomputed:
                kept = {own.stage for own in self.keeps.get(region.number, ()) if own.what == RESULT and own in recomputed}
                found += sum(self.stage_again(stage, choice[stage]) for stage in region.stages if stage not in kept)
        return found

    def stage_again(self, stage: int, strategy: int) -> float:
        """The objective's share of running a stage's op once more."""
        seconds = self.compute_again(stage, strategy) if self.objective == "time" else 0.0
        return self.inside_again(stage, strategy) + seconds

    def is_repeated(self, resharding: Resharding, choice: Sequence[int], recomputed: Recomputed) -> bool:
        """Whether backward does a resharding once more, the way it went forward."""
        region = self.runs_again(resharding, choice)
        storage = self.graph.storages[resharding.storage]
        return region in recomputed and Kept(COPY, storage.maker, storage.id) not in recomputed

    def _may_keep(self, stage: Stage) -> bool:
        """Whether what takes long of an op is what it makes."""
        if stage.op is None:
            return False
        own = footprint(self.program, stage.op)
        made = sum(self.graph.storages[result].root.nbytes for result in stage.results)
        return 0 < own.long <= made + own.internal

    @cached_property
    def keeps(self) -> Mapping[int, tuple[Kept, ...]]:
        """What each region may keep although it is recomputed: what it receives from resharding what it made, and results of
        ops that take much of what recomputing it costs."""
        found: dict[int, tuple[Kept, ...]] = {}
        for region in self.regions:
            if region.forced:
                continue
            own: list[Kept] = []
            costs = {s: max(self.stage_again(s, k) for k in range(len(self.graph.stages[s].strategies))) for s in region.stages}
            for index in region.stages:
                stage = self.graph.stages[index]
                if costs[index] > KEEPING * sum(costs.values()) and self._may_keep(stage):
                    own.append(Kept(RESULT, index, stage.results[0]))
                for result in stage.results:
                    uses = [u for u in self.graph.uses.get(result, ()) if self.region_of.get(u.stage) == region.number]
                    layouts = {strip(layout) for use in uses for layout in use.wanted}
                    made = {strip(layouts[stage.results.index(result)]) for layouts in stage.made}
                    if uses and len(layouts | made) > 1:
                        own.append(Kept(COPY, index, result))
            found[region.number] = tuple(own)
        return found

    def forward_only(self, resharding: Resharding) -> Cost:
        return self.known_resharding(resharding.storage, resharding.source, resharding.target, False).cost

    def runs_again(self, resharding: Resharding, choice: Sequence[int]) -> int | None:
        """The region that a resharding stands in and is run again with, if that one is recomputed; None for those between
        regions: what a region takes is resharded before it, unless that makes it larger."""
        storage = resharding.storage
        source, target = resharding.source, resharding.target
        wanting = [u for u in self.graph.uses[storage] if self.target(u, source, u.wanted[choice[u.stage]]) == target]
        region = self.region_of.get(min(use.stage for use in wanting))
        return region if self.is_inside(storage, region, source, target) else None

    def is_inside(self, storage: ValueId, region: int | None, source: Layout, target: Layout) -> bool:
        """Whether a resharding for a use in a region stands in it."""
        if region is None:
            return False
        if self.region_of.get(self.graph.storages[storage].maker) == region:
            return True
        return self.taken(storage, strip(source), strip(target)) != strip(target)

    def inside_again(self, stage: int, strategy: int) -> float:
        """The objective's share of what an op communicates when it runs once more."""
        found = 0.0
        for inside in self.inside(stage, strategy):
            cost = inside.cost
            share = cost.forward_bytes / cost.wire_bytes if cost.wire_bytes else 0.0
            found += cost.forward_bytes if self.objective == "volume" else cost.seconds * share
        return found

    def resharded(self, use: Use, choice: Sequence[int]) -> bool:
        source = self.made(use.storage, choice)
        return self.target(use, source, use.wanted[choice[use.stage]]) != source

    def reached(self, reach: Reach, choice: Sequence[int]) -> Layout:
        """The layout in which a use reads a storage, with one kind of Replicate."""
        return strip(reach.use.wanted[choice[reach.use.stage]])

    def layouts(self, term: Alive, choice: Sequence[int], recomputed: Recomputed) -> set[Layout]:
        """In which layouts a buffer is alive."""
        made = strip(self.made(term.storage, choice))
        found = {made} if term.made else set()
        here = {self.reached(reach, choice) for reach in (*term.before, *term.now)}
        for reach in term.now:
            if not self._passed(reach, choice):
                found.add(self.reached(reach, choice))
        for holder in term.holders:
            if not self._holds(holder, recomputed):
                continue
            if holder.reach is None:
                found.add(made)
            elif holder.only is not None and choice[holder.reach.use.stage] not in holder.only:
                continue
            elif not self._passed(holder.reach, choice):
                wanted = self.reached(holder.reach, choice)
                found.add(wanted if holder.takes is None else self.taken(term.storage, made, wanted))
        for reach in term.after:
            # What will be resharded on the way is there until then.
            if any(self.resharded(use, choice) for use in reach.unless if use.stage < reach.stage):
                continue
            wanted = self.reached(reach, choice)
            if wanted in here and wanted != made:
                found.add(wanted)
            elif term.flavor == MADE:
                found.add(made)
            elif wanted in here and term.flavor != ALIAS:
                found.add(wanted)
        return found - {made} if term.flavor == ALIAS else found

    def _passed(self, reach: Reach, choice: Sequence[int]) -> bool:
        """Whether a reach through views ends before the buffer, because something on the way was resharded."""
        return any(self.resharded(use, choice) for use in reach.unless)

    def taken(self, storage: ValueId, made: Layout, wanted: Layout) -> Layout:
        """In which layout a region that is recomputed takes a storage: resharded before, where that makes it no larger."""
        return wanted if self.nbytes(storage, wanted) <= self.nbytes(storage, made) else made

    def _holds(self, holder: Holder, recomputed: Recomputed) -> bool:
        if holder.kept is not None:
            return holder.kept in recomputed
        if holder.takes is not None:
            return holder.takes in recomputed
        return holder.region is None or holder.region not in recomputed

    def term_bytes(self, term: Term, choice: Sequence[int], recomputed: Recomputed = frozenset()) -> int:
        """Bytes of one term under a choice, where some regions are recomputed."""
        if isinstance(term, Alive):
            return sum(self.nbytes(term.storage, layout) for layout in self.layouts(term, choice, recomputed))
        if isinstance(term, Internal):
            gone = term.region in recomputed and term.kept not in recomputed
            return 0 if gone else self.shared_bytes(term, choice[term.stage])
        if isinstance(term, Extra):
            return self.shared_bytes(term, choice[term.stage])
        if isinstance(term, Packed):
            return term.nbytes
        if isinstance(term, Held):
            return self.held_bytes(term, self.made(term.storage, choice))
        if isinstance(term, Resharded):
            if not any(self.resharded(use, choice) for use in term.uses):
                return 0
            return self.nbytes(term.storage, self.made(term.storage, choice))
        source = self.made(term.use.storage, choice)
        target = self.target(term.use, source, term.use.wanted[choice[term.use.stage]])
        return 0 if target == source else self.buffers_bytes(term.use.storage, source, target, term.back)

    def totals(
        self, choice: Sequence[int], recomputed: Recomputed = frozenset(), whole: bool | None = None
    ) -> list[int]:
        """Bytes alive at every program point of a choice; 0 where a region would run again that does not.

        whole: with inputs, parameters, their gradients and the optimizer, or activations alone; None: as the capacity is meant.
        """
        key = (tuple(choice), recomputed)
        if key not in self._totals:
            # A solver asks for those of one choice several times; and where copies choose alike, they are found faster.
            alike = (ledger for ledger in self._ledgers.values() if ledger.fits(choice, recomputed))
            ledger = next(alike, None)
            activations, everything = (
                ledger.totals(choice, recomputed) if ledger else self._add_up(choice, recomputed | self.forced)
            )
            self._totals = {key: ([int(nbytes) for nbytes in activations], [int(nbytes) for nbytes in everything])}
        return self._totals[key][self.whole if whole is None else whole]

    def _add_up(self, choice: Sequence[int], recomputed: Recomputed) -> tuple[list[int], list[int]]:
        """Of activations, and of everything."""
        known: dict[int, int] = {}

        def nbytes(term: Term) -> int:
            if id(term) not in known:
                known[id(term)] = self.term_bytes(term, choice, recomputed)
            return known[id(term)]

        held: dict[Slot, int] = {}
        now = [0, 0]
        found: tuple[list[int], list[int]] = ([], [])
        for point in self.points:
            for slot, term in point.changes:
                size = 0 if term is None else nbytes(term)
                more = size - held.get(slot, 0)
                held[slot] = size
                now[is_state(slot)] += more
            here = [0, 0]
            for term in point.momentary:
                here[is_state(None, term)] += nbytes(term)
            runs = point.again is None or point.again in recomputed
            found[0].append(now[0] + here[0] if runs else 0)
            found[1].append(sum(now) + sum(here) if runs else 0)
        return found

    def ledger(self, same: Sequence[int], groups: Callable[[], Mapping[ValueId, int]], apart: bool = False) -> Ledger:
        """The points by distinct terms where copies choose alike, made once."""
        key = (tuple(same), apart)
        if key not in self._ledgers:
            self._ledgers[key] = Ledger(self, key[0], groups(), apart)
        return self._ledgers[key]

    def peak(
        self, choice: Sequence[int], recomputed: Recomputed = frozenset(), whole: bool | None = None
    ) -> tuple[int, Point]:
        """Bytes at the worst program point of a choice, and that point (there is one for the output at least); see `totals`."""
        totals = self.totals(choice, recomputed, whole)
        worst = max(range(len(totals)), key=totals.__getitem__)
        return totals[worst], self.points[worst]

    @cached_property
    def ends_forward(self) -> int:
        """The number of the point at which the forward ends."""
        last = self.graph.stages[-1].index
        return max(n for n, point in enumerate(self.points) if point.stage == last and point.phase == FORWARD)

    def show_point(self, point: Point) -> str:
        """A program point for people: `backward of blocks.3.attn (linear_7)`."""
        stage = self.graph.stages[point.stage]
        if point.phase == STEP:
            return "the optimizer's step"
        way = "forward once more" if point.again is not None else point.phase
        if point.operand is not None:
            way += ", resharding for" if point.phase == FORWARD else ", resharding back from"
        else:
            way += " of"
        return f"{way} {stage.label}"


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    if target is torch.ops.dsp.ring_attention.default:
        args = short_ring(*args)
    return target(*args, **kwargs)
