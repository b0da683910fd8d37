"""The problem: what any choice of strategies costs and holds in memory, told without a solver.

The solver's integer program is made from the same numbers, and tests compare the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsp_auto.cost_models.communication import FREE, Cost, halo_cost, primitive_cost
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.errors import StrategyError

from .capture import Program
from .checkpointing import region
from .enumerate_strategies import Strategy
from .factorize import ValueId
from .layout import Layout, Replicate, Shard, Step, steps
from .lifetimes import Internal, Made, Point, Term, Used, lifetimes
from .notation import Site
from .stages import Stage, StageGraph, Use, strip

OBJECTIVES = ("volume", "time")


@dataclass(frozen=True)
class Resharding:
    """One storage turned from the layout it is made in into one that uses want; `grad`: a gradient comes back from one."""

    storage: ValueId
    source: Layout
    target: Layout
    grad: bool
    steps: tuple[Step, ...]
    costs: tuple[Cost, ...]

    @property
    def cost(self) -> Cost:
        return sum(self.costs, FREE)


@dataclass(frozen=True)
class Inside:
    """What an op communicates by itself on one mesh dim: borders (`halo` of one operand) or statistics (`reduce`)."""

    primitive: str
    mesh_dim: int
    operand: int | None
    cost: Cost


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
        self._inside: dict[tuple[int, int], tuple[Inside, ...]] = {}
        self._bytes: dict[tuple, int] = {}

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
            way = steps(source, target)
            costs = () if way is None else tuple(self._step_cost(storage, step, grad) for step in way)
            self._reshardings[key] = None if way is None else Resharding(storage, source, target, grad, way, costs)
        return self._reshardings[key]

    def _step_cost(self, storage: ValueId, step: Step, grad: bool) -> Cost:
        graph = self.graph
        root = graph.storages[storage].root
        nbytes = self._shared_out(root.nbytes, step.before, step.mesh_dim)
        ends = [step.source, step.target]
        sizes = tuple(graph.factors.sizes[root.factors[p.place]] if isinstance(p, Shard) else 0 for p in ends)
        partial_grad = any(isinstance(p, Replicate) and p.partial_grad for p in ends)
        return primitive_cost(
            step.primitive,
            nbytes,
            graph.mesh.sizes[step.mesh_dim],
            sizes=sizes,
            grad=grad,
            partial_grad=partial_grad,
            hardware=self.hardware,
            mesh_dim=graph.mesh.names[step.mesh_dim],
        )

    def inside(self, stage: int, strategy: int) -> tuple[Inside, ...]:
        """What a stage's op communicates while it runs one of its strategies."""
        entry = self.graph.stages[stage]
        rule = entry.op.rule if entry.op is not None else None
        if rule is None or not (rule.windows or rule.combines):
            return ()
        key = (stage, strategy)
        if key not in self._inside:
            self._inside[key] = tuple(self._inside_of(entry, entry.strategies[strategy]))
        return self._inside[key]

    def _inside_of(self, entry: Stage, strategy: Strategy) -> Iterator[Inside]:
        mesh, values, sizes = self.graph.mesh, self.graph.factors.values, self.graph.factors.sizes
        op, rule = entry.op, entry.op.rule
        flows = any(values[result].requires_grad for result in op.results)
        on = [{"hardware": self.hardware, "mesh_dim": name} for name in mesh.names]
        # An operand that windows have widened on one dim is wider for those on the next.
        grown: dict[tuple[int, int], float] = {}
        for window, (m, cut) in itertools.product(rule.windows, enumerate(strategy.cuts)):
            ranks, axes, size = mesh.sizes[m], dict(cut), rule.sizes.get(window.source, 1)
            if window.source not in axes or window.target not in axes:
                continue
            source, target = (
                Site(ranks, 0, "", sizes[op.axes[axis][0]], rule.sizes[axis] // sizes[op.axes[axis][0]]).ranges
                for axis in (window.source, window.target)
            )
            value = values[op.operands[window.operand]]
            nbytes = self._shared_out(value.nbytes, strategy.operands[window.operand], m)
            for (operand, dim), share in grown.items():
                nbytes *= share if operand == window.operand and dim != window.dim else 1.0
            sent = nbytes * window.elements(source, target, size) / size / ranks
            grown[window.operand, window.dim] = sum(window.length(*part, size) for part in target) / size
            cost = halo_cost(sent, ranks, grad=flows and value.requires_grad, **on[m])
            if cost != FREE:
                yield Inside("halo", m, window.operand, cost)
        for m, cut in enumerate(strategy.cuts):
            for statistic in (s for axis, _ in cut for s in rule.combines.get(axis, ())):
                nbytes = math.prod(rule.sizes.get(axis, 1) for axis in statistic.axes) * statistic.dtype.itemsize
                for other, cut_too in enumerate(strategy.cuts):
                    if other != m and any(axis in statistic.axes for axis, _ in cut_too):
                        nbytes /= mesh.sizes[other]
                grad = statistic.dtype.is_floating_point and flows and values[op.operands[0]].requires_grad
                partial = not statistic.is_result
                cost = primitive_cost("reduce", nbytes, mesh.sizes[m], grad=grad, partial_grad=partial, **on[m])
                yield Inside("reduce", m, None, cost)

    def _shared_out(self, nbytes: float, layout: Layout, but: int) -> float:
        for m, placement in enumerate(layout):
            if m != but and isinstance(placement, Shard):
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
        shards = 1
        for factor, ranks in zip(self.graph.stages[term.stage].strategies[strategy].factors, self.graph.mesh.sizes):
            shards *= ranks if factor is not None else 1
        return -(-term.nbytes // shards)

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
        kept, found = 0, []
        for point in self.points:
            kept += sum(self.term_bytes(term, choice) for term in point.kept)
            found.append(kept + sum(self.term_bytes(term, choice) for term in point.alive))
        return found

    def peak(self, choice: Sequence[int]) -> tuple[int, Point | None]:
        """Bytes at the worst program point of a choice, and that point."""
        totals = self.totals(choice)
        if not totals:
            return 0, None
        worst = max(range(len(totals)), key=totals.__getitem__)
        return totals[worst], self.points[worst]
