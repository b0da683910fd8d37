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

from dsp_auto.cost_models.communication import FREE, Cost, halo_cost, hierarchical_cost, primitive_cost, ring_cost
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.errors import StrategyError

from .capture import Program
from .checkpointing import region
from .enumerate_strategies import Strategy
from .factors import Cut, Op, Value
from .layout import Layout, R, Replicate, Shard, Step, cutters, ways
from .lifetimes import Internal, Made, Point, Term, Used, lifetimes
from .nodes import ValueId
from .notation import Ring, Site
from .stages import Stage, StageGraph, Use, strip

OBJECTIVES = ("volume", "time")
# Parameters' gradients are all-reduced in buckets of this size (see `buckets`), as DDP does: large enough for bandwidth, small
# enough that the all-reduce starts while backward still runs.
BUCKET_BYTES = 25 * 2**20
# Of ways of equal cost the one of fewest collectives is taken: each weighs this share of the tensor, or of a second.
TIE = 1e-10


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
        before, after = cutters(step.before, step.source.place), cutters(step.after, step.target.place)
        source, target = (root.factors[p.place] for p in (step.source, step.target))
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
        compute_seconds: Callable[[int, int], float] | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise StrategyError(
                asked=f"objective {objective!r}",
                found="no such objective",
                remedy=f"use one of {', '.join(OBJECTIVES)}",
            )
        self.graph, self.objective, self.hardware = graph, objective, hardware
        self.points = lifetimes(program, graph)
        # Checkpoints through which a gradient flows, and which backward therefore runs again.
        self.recomputed = {
            region(op.node)
            for op in graph.factors.ops
            if any(graph.factors.values[result].requires_grad for result in op.results)
        } - {None}
        self.compute_seconds = compute_seconds or (lambda stage, strategy: 0.0)
        self._reshardings: dict[tuple, Resharding | None] = {}
        self._ways: dict[tuple, dict[Layout, tuple[Step, ...]]] = {}
        self._costs: dict[tuple, Cost] = {}
        self._inside: dict[tuple[int, int], tuple[Inside, ...]] = {}
        self._bytes: dict[tuple, int] = {}
        self._totals: dict[tuple[int, ...], list[int]] = {}

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
            costs = () if way is None else tuple(self._step_cost(storage, step, grad) for step in way)
            self._reshardings[key] = None if way is None else Resharding(storage, source, target, grad, way, costs)
        return self._reshardings[key]

    def _way(self, storage: ValueId, source: Layout, target: Layout) -> tuple[Step, ...] | None:
        """The cheapest steps; of ways that cost the same that of fewest collectives. Two storages of like sizes go alike."""
        root = self.graph.storages[storage].root
        placements = frozenset(source) | frozenset(target) | {R}
        key = (self._sizes(root), root.requires_grad, placements, source)
        if key not in self._ways:
            least = root.nbytes * TIE if self.objective == "volume" else TIE

            def cost(step: Step) -> float:
                return self.weight(self._step_cost(storage, step, root.requires_grad)) + least

            self._ways[key] = ways(source, sorted(placements, key=repr), cost)
        return self._ways[key].get(target)

    def _sizes(self, root: Value) -> tuple:
        return root.itemsize, tuple(self.graph.factors.sizes[factor] for factor in root.factors)

    def _step_cost(self, storage: ValueId, step: Step, grad: bool) -> Cost:
        root = self.graph.storages[storage].root
        in_bucket = step.primitive == "replicate" and self.graph.storages[storage].kind == "parameter"
        key = (self._sizes(root), step, grad, in_bucket)
        if key not in self._costs:
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
        return self._costs[key]

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
        rule = entry.op.rule if entry.op is not None else None
        if rule is None or not rule.communicates:
            return ()
        key = (stage, strategy)
        if key not in self._inside:
            self._inside[key] = tuple(self._inside_of(entry, entry.strategies[strategy]))
        return self._inside[key]

    def _inside_of(self, entry: Stage, strategy: Strategy) -> Iterator[Inside]:
        values = self.graph.factors.values
        op, rule = entry.op, entry.op.rule
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

    def _shared_out(self, nbytes: float, layout: Layout, but: Collection[int] = ()) -> float:
        """What a device has in the mean, were it not cut over the mesh dims `but`."""
        for m, placement in enumerate(layout):
            if m not in but and isinstance(placement, Shard):
                nbytes /= self.graph.mesh.sizes[m]
        return nbytes

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

    def internal_bytes(self, term: Internal, strategy: int) -> int:
        return -(-term.nbytes // self.graph.shards(term.stage, strategy))

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

    def lines(self, choice: Sequence[int]) -> list[tuple[int, ...]]:
        """The sets of mesh dims that something is communicated over, in order."""
        steps = [step for resharding in self.reshardings(choice) for step in resharding.steps]
        in_turn = [step.mesh_dims for step in steps if step.primitive == "hierarchical_switch"]
        found = {step.mesh_dims for step in steps} | {part for dims in in_turn for part in (dims[:1], dims[1:])}
        for stage in self.graph.stages:
            found |= {inside.mesh_dims for inside in self.inside(stage.index, choice[stage.index])}
        return sorted(found)

    def cost(self, choice: Sequence[int]) -> float | None:
        """The objective of a choice, None where it is impossible."""
        reshardings = self.reshardings(choice)
        if reshardings is None:
            return None
        compute = 0.0
        if self.objective == "time":
            compute = sum(self.compute_seconds(s.index, choice[s.index]) for s in self.graph.stages)
        inside = sum(self.inside_cost(s.index, choice[s.index]) for s in self.graph.stages)
        return sum(self.weight(r.cost) for r in reshardings) + inside + compute

    def term_bytes(self, term: Term, choice: Sequence[int]) -> int:
        if isinstance(term, Internal):
            return self.internal_bytes(term, choice[term.stage])
        if isinstance(term, Made):
            return self.nbytes(term.storage, self.made(term.storage, choice))
        if isinstance(term, Used):
            wanted = term.use.wanted[choice[term.use.stage]]
            source = self.made(term.use.storage, choice)
            if term.only_resharded and self.target(term.use, source, wanted) == source:
                return 0
            return self.nbytes(term.use.storage, wanted)
        layouts = {strip(use.wanted[choice[use.stage]]) for use in term.by_uses}
        if term.by_maker:
            layouts.add(strip(self.made(term.storage, choice)))
        return sum(self.nbytes(term.storage, layout) for layout in layouts)

    def totals(self, choice: Sequence[int]) -> list[int]:
        """Bytes alive at every program point of a choice."""
        if tuple(choice) not in self._totals:
            kept, found = 0, []
            for point in self.points:
                kept += sum(self.term_bytes(term, choice) for term in point.kept)
                found.append(kept + sum(self.term_bytes(term, choice) for term in point.alive))
            self._totals = {tuple(choice): found}  # a solver asks for those of one choice several times
        return self._totals[tuple(choice)]

    def peak(self, choice: Sequence[int]) -> tuple[int, Point | None]:
        """Bytes at the worst program point of a choice, and that point."""
        totals = self.totals(choice)
        if not totals:
            return 0, None
        worst = max(range(len(totals)), key=totals.__getitem__)
        return totals[worst], self.points[worst]
