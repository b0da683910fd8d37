"""The integer linear program of a `Problem`: Eq. 9 of the paper over the stage graph.

    minimize     sum over storages t, layouts a != b   cost(t: a -> b) y[t,a,b]
                 + sum over s,k  inside(s,k) x[s,k]   [+ sum over s,k  compute(s,k) x[s,k]]
    subject to   sum_k x[s,k] = 1                                     every stage runs one strategy      (_choose)
                 sum_b e[u,a,b] = sum of x[maker of u, k : made = a]  flow out of the maker              (_flow)
                 sum_a e[u,a,b] = sum of x[stage of u, k : wanted = b]  flow into the user               (_flow)
                 y[t,a,b] >= e[u,a,b]         for every use u of t    one resharding serves all who want (_reshard)
                 z[t,b] >= kept by a holder   for every holder of t   memory that is saved once          (_kept)
                 bytes alive at p <= Capacity  for every point p      Memory(X) < Capacity               (points)

x[s,k] is binary: stage s runs its k-th strategy (its partition p in the paper's letters). e[u,a,b] couples the storage
that use u reads, made in layout a, with the layout b that the user wants (the linearization of Alpa, tight enough that
the relaxation is mostly integral). A pair that no primitive connects has no variable. y and z are continuous.
inside(s,k) is what the op communicates by itself: borders of a convolution, statistics of a norm.

Stages of repeated blocks may share their variables (`same`, see `fold`), in one of two ways:

    restrict   all copies choose alike: what it finds is a plan, perhaps not the cheapest one
    average    a variable is the mean over the copies: a relaxation, so what it finds is a lower bound. Where a row speaks of
               c of m copies only, their mean v of a mean x of all obeys  (m x - (m - c)) / c <= v <= m x / c   (_part)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import pulp

from .layout import Layout
from .lifetimes import (
    ALIAS,
    COPY,
    MADE,
    RESULT,
    VIEW,
    Alive,
    Buffers,
    Extra,
    Held,
    Internal,
    Kept,
    Packed,
    Reach,
    Resharded,
)
from .nodes import ValueId
from .problem import TIE, Problem, Recomputed, Resharding
from .stages import Stage, Use, strip

# The objective's largest coefficient, and HiGHS's tolerances. With larger ones HiGHS 1.15 has called a plan optimal that was
# not.
_SCALE = 1e4
_PRECISE = {"mip_feasibility_tolerance": 1e-9, "mip_abs_gap": 0.0}
# A few nodes prove the optimum of these programs, and to choose each by trying many branches took longer than the rest.
_BRANCHING = {"mip_pscost_minreliable": 1}

Expression = dict[str, float]
ByLayout = dict[Layout, Expression]
_Bound = tuple[Expression, float]  # an expression and a constant
_Term = tuple[int, dict[Any, Expression], dict[Any, float]]  # copies, expressions by label, bytes by label
CONSTANT = ""  # in a row, the variable that is 1


@dataclass(frozen=True)
class Answer:
    """What the solver said. `value` is the objective (or the peak), `choice` the strategy of every stage; both None where it
    found none. recomputed: see `Recomputed`. optimal: there is no better one."""

    status: str
    optimal: bool
    value: float | None
    choice: tuple[int, ...] | None
    recomputed: Recomputed
    solver: str
    variables: int
    constraints: int


@dataclass
class _Group:
    """Storages that look alike: made by copies of one stage and used by copies of the same stages."""

    number: int
    storages: list[ValueId]
    uses: dict[tuple, list[Use]]  # use key -> the uses of all storages in the group


class Model:
    """`same[s]` is the stage whose variables stage s shares; `average` says in which way."""

    def __init__(self, problem: Problem, same: Sequence[int], average: bool = False) -> None:
        self.problem, self.graph, self.same, self.average = problem, problem.graph, same, average
        self.copies = Counter(same)
        self.x: dict[int, list[str]] = {}
        self.binaries: list[str] = []
        self.continuous: dict[str, None] = {}
        self.rows: dict[tuple, tuple[Expression, str, float]] = {}
        self.objective: Expression = {}
        made = [s.root.nbytes for s in self.graph.storages.values() if s.kind == "activation"]
        self._made_bytes = sum(made) or 1
        # Between plans of equal bytes, the one with fewer reshardings, and those between modules rather than inside them; then
        # the one that does less work twice. A resharding weighs `TIE` of the largest tensor, or of a second.
        self._tie = TIE * (max(made, default=1) if problem.objective == "volume" else 1.0)
        self._layouts: dict[tuple, ByLayout] = {}
        self._edges: dict[tuple, dict[tuple[Layout, Layout], Expression]] = {}
        self._terms: dict[int, _Term] = {}
        self._largest: dict[tuple, str] = {}
        self._parts = itertools.count()
        self._pulp: dict[tuple, tuple[dict[str, pulp.LpVariable], list[pulp.LpConstraint]]] = {}
        self.groups = self._group()
        self.ledger = problem.ledger(same, self.group_numbers)
        self.rho = self._recompute()
        self._choose()
        self._reshard()
        self._charge_again()

    def group_numbers(self) -> dict[ValueId, int]:
        return {storage: group.number for group in self.groups for storage in group.storages}

    # --- expressions

    @staticmethod
    def _add(expression: Expression, other: Mapping[str, float], factor: float = 1.0) -> None:
        for name, value in other.items():
            expression[name] = expression.get(name, 0.0) + factor * value

    def _row(self, expression: Expression, sense: str, bound: float) -> None:
        self.rows.setdefault((sense, bound, *sorted(expression.items())), (expression, sense, bound))

    def _variable(self, name: str) -> str:
        self.continuous.setdefault(name)
        return name

    def _storage_key(self, storage: ValueId) -> tuple[int, int]:
        entry = self.graph.storages[storage]
        return self.same[entry.maker], entry.result

    def _use_key(self, use: Use) -> tuple[int, int]:
        return self.same[use.stage], use.operand

    def made(self, storage: ValueId) -> ByLayout:
        """For each layout that a storage may be made in, the expression that is 1 if it is."""
        entry = self.graph.storages[storage]
        stage = self.graph.stages[entry.maker]
        return self._by_layout(
            ("made", *self._storage_key(storage)), stage, [made[entry.result] for made in stage.made]
        )

    def wanted(self, use: Use) -> ByLayout:
        """For each layout that a use may want, the expression that is 1 if it does."""
        return self._by_layout(("wanted", *self._use_key(use)), self.graph.stages[use.stage], use.wanted)

    def _by_layout(self, key: tuple, stage: Stage, layouts: Sequence[Layout]) -> ByLayout:
        if key not in self._layouts:
            found: ByLayout = {}
            for name, layout in zip(self.x[self.same[stage.index]], layouts, strict=True):
                found.setdefault(layout, {})[name] = 1.0
            self._layouts[key] = found
        return self._layouts[key]

    def _part(self, whole: ByLayout, copies: int, some: Iterable[int], exclusive: bool = True) -> ByLayout:
        """`whole` is a mean over `copies` copies; this is the mean over `some` (copies may count more than once)."""
        counts = Counter(some)
        count, most = sum(counts.values()), max(counts.values())
        everywhere = most * copies
        if not self.average or count == everywhere:
            return whole
        number = next(self._parts)
        found: ByLayout = {}
        for position, (layout, expression) in enumerate(whole.items()):
            name = self._variable(f"v{number}_{position}")
            found[layout] = {name: 1.0}
            for sense, slack in ((">=", everywhere - count), ("<=", 0)):
                if sense == ">=" or exclusive:
                    row: Expression = {name: float(count)}
                    self._add(row, expression, -float(everywhere))
                    self._row(row, sense, -float(slack))
        if exclusive:
            self._row({name: 1.0 for expression in found.values() for name in expression}, "=", 1.0)
        return found

    # --- stages, flows and reshardings

    def _choose(self) -> None:
        for stage in self.graph.stages:
            shared = self.same[stage.index]
            if shared not in self.x:
                names = [f"x{shared}_{k}" for k in range(len(stage.strategies))]
                self.x[shared] = names
                if len(names) > 1:
                    self.binaries += names
                self._row(dict.fromkeys(names, 1.0), "=", 1.0)
            for k, name in enumerate(self.x[shared]):
                own = self.problem.inside_cost(stage.index, k) + len(self.problem.inside(stage.index, k)) * self._tie
                self._add(self.objective, {name: own + self._repeated_work(stage, k) * self._tie})
                if self.problem.objective == "time":
                    self._add(self.objective, {name: self.problem.compute_seconds(stage.index, k)})

    def _recompute(self) -> dict[int, str]:
        """A variable for each region that may be recomputed; copies of one share it, as their stages do."""
        found = {region: f"r{first}" for region, first in self.ledger.regions.items()}
        numbers: dict[tuple, int] = {}
        self.kappa: dict[Kept, str] = {}
        for region, name in found.items():
            for kept in self.problem.keeps[region]:
                own = self.kappa[kept] = f"k{numbers.setdefault(self.ledger.of_kept(kept), len(numbers))}"
                self._row({name: 1.0, self._variable(own): -1.0}, ">=", 0.0)
        self.binaries += dict.fromkeys((*found.values(), *self.kappa.values()))
        for name in found.values():
            self._variable(name)
        return found

    def _charge_again(self) -> None:
        """What regions that are recomputed pay once more."""
        for region in self.problem.regions:
            work = sum(self.graph.storages[r].root.nbytes for s in region.stages for r in self.graph.stages[s].results)
            if not region.forced:
                # Of plans that cost the same, the one that recomputes least.
                self._add(self.objective, {self.rho[region.number]: self._tie * (1 + work / self._made_bytes)})
            results = {own.stage: own for own in self.problem.keeps.get(region.number, ()) if own.what == RESULT}
            # Of what is kept too, the least.
            for kept in self.problem.keeps.get(region.number, ()):
                self._add(self.objective, {self.kappa[kept]: self._tie})
            for index in region.stages:
                costs: dict[float, Expression] = {}
                for k, name in enumerate(self.x[self.same[index]]):
                    self._add(costs.setdefault(self.problem.stage_again(index, k), {}), {name: 1.0})
                for cost, expression in costs.items():
                    if cost:
                        self._charge_if(expression, region.number, cost, len(costs) == 1, results.get(index))

    def _charge_if(
        self, expression: Expression, region: int, weight: float, whole: bool, kept: Kept | None = None
    ) -> None:
        """`weight`, if `expression` is 1 and the region is recomputed and does not keep this. whole: the expression is 1."""
        if region in self.problem.forced:
            self._add(self.objective, expression, weight)
        elif whole:
            self._add(self.objective, {self.rho[region]: weight})
            if kept is not None:
                self._add(self.objective, {self.kappa[kept]: -weight})
        else:
            both = {**expression}
            self._add(both, {self.rho[region]: 1.0})
            if kept is not None:
                self._add(both, {self.kappa[kept]: -1.0})
            self._add(self.objective, self._at_least([(both, -1.0)]), weight)

    def _repeated_work(self, stage: Stage, strategy: int) -> float:
        """The share of the program's result bytes that this stage makes on every rank of a mesh dim."""
        whole = sum(1 for cut in stage.strategies[strategy].cuts if not cut)
        return whole * sum(self.graph.storages[result].root.nbytes for result in stage.results) / self._made_bytes

    def _group(self) -> list[_Group]:
        found: dict[tuple, _Group] = {}
        for storage in self.graph.storages:
            uses = self.graph.uses.get(storage, ())
            key = (self._storage_key(storage), tuple(sorted({self._use_key(use) for use in uses})))
            group = found.setdefault(key, _Group(len(found), [], {}))
            group.storages.append(storage)
            for use in uses:
                group.uses.setdefault(self._use_key(use), []).append(use)
        return list(found.values())

    def _flow(self, group: _Group, key: tuple) -> dict[tuple[Layout, Layout], Expression]:
        """e[u,a,b] for every pair that is satisfied or that primitives connect."""
        edge = (group.number, *key)
        if edge in self._edges:
            return self._edges[edge]
        uses = group.uses[key]
        use = uses[0]
        storages = self.graph.storages
        made = self._part(
            self.made(use.storage),
            self.copies[self._storage_key(use.storage)[0]],
            (storages[u.storage].maker for u in uses),
        )
        wanted = self._part(self.wanted(use), self.copies[self.same[use.stage]], (u.stage for u in uses))
        label = "_".join(map(str, edge))
        pairs: dict[tuple[Layout, Layout], Expression] = {}
        for i, a in enumerate(made):
            for j, b in enumerate(wanted):
                target = self.problem.target(use, a, b)
                if target != a and self.problem.resharding(use.storage, a, target, use.grad) is None:
                    continue
                if len(made) == 1:
                    pairs[a, b] = wanted[b]
                elif len(wanted) == 1:
                    pairs[a, b] = made[a]
                else:
                    pairs[a, b] = {self._variable(f"e{label}_{i}_{j}"): 1.0}
        for side, expressions, other in ((0, made, wanted), (1, wanted, made)):
            for layout, expression in expressions.items():
                row: Expression = {}
                for pair, variable in pairs.items():
                    if pair[side] == layout:
                        self._add(row, variable)
                # With one layout on either side the pairs are the expressions: only what is impossible is a row.
                if min(len(expressions), len(other)) > 1 or not row:
                    self._add(row, expression, -1.0)
                    self._row({n: v for n, v in row.items() if v}, "=", 0.0)
        self._edges[edge] = pairs
        return pairs

    def _reshard(self) -> None:
        """Costs of reshardings: on the pair itself where one use wants it, on y where several share it. The way back is
        paid where one of them has a gradient."""
        for group in self.groups:
            storage, count = group.storages[0], len(group.storages)
            # For every resharding, the distinct expressions of all uses that want it, and of those with a gradient.
            wants: dict[tuple[Layout, Layout], tuple[dict[tuple, Expression], dict[tuple, Expression]]] = {}
            # The same by the use that wants it, the earliest first; a resharding for several wishes of it, all of them.
            by_use: dict[tuple[Layout, Layout], dict[tuple, Expression]] = {}
            for key, uses in sorted(group.uses.items(), key=lambda item: item[1][0].stage):
                for (a, b), expression in self._flow(group, key).items():
                    target = self.problem.target(uses[0], a, b)
                    if target != a:
                        self._add(by_use.setdefault((a, target), {}).setdefault(key, {}), expression)
                        everyone, with_grad = wants.setdefault((a, target), ({}, {}))
                        name = tuple(sorted(expression.items()))
                        everyone[name] = expression
                        if uses[0].grad:
                            with_grad[name] = expression
            depth = min((self._shared_depth(use) for uses in group.uses.values() for use in uses), default=0)
            for position, ((a, b), (everyone, with_grad)) in enumerate(wants.items()):
                resharding = self.problem.known_resharding(storage, a, b, False)
                there = self.problem.weight(resharding.cost) + len(resharding.steps) * self._tie * (1 + depth / 100)
                both = self.problem.weight(self.problem.known_resharding(storage, a, b, True).cost)
                back = both - self.problem.weight(resharding.cost) if with_grad else 0.0
                if everyone.keys() == with_grad.keys():
                    self._charge(f"y{group.number}_{position}", everyone, (there + back) * count)
                else:
                    self._charge(f"y{group.number}_{position}", everyone, there * count)
                    self._charge(f"w{group.number}_{position}", with_grad, back * count)
                self._reshard_again(group, a, b, resharding, by_use[a, b])

    def _reshard_again(
        self, group: _Group, source: Layout, target: Layout, resharding: Resharding, by_use: Mapping[tuple, Expression]
    ) -> None:
        """What a resharding costs once more, where it stands in a region that is recomputed: that of the first who wants it."""
        storage, weight = group.storages[0], self.problem.weight(resharding.cost)
        earlier: Expression = {}
        by_region: dict[int | None, list[Expression]] = {}
        for key, expression in by_use.items():
            by_region.setdefault(self.problem.region_of.get(group.uses[key][0].stage), []).append(expression)
        for region, own in by_region.items() if weight else ():
            if region is not None and self.problem.is_inside(storage, region, source, target):
                bounds = []
                for expression in own:
                    first = {**expression}
                    self._add(first, earlier, -1.0)
                    if region in self.problem.forced:
                        bounds.append((first, 0.0))
                    else:
                        self._add(first, {self.rho[region]: 1.0})
                        entry = self.graph.storages[storage]
                        kept = Kept(COPY, entry.maker, entry.id)
                        if kept in self.kappa:
                            self._add(first, {self.kappa[kept]: -1.0})
                        bounds.append((first, -1.0))
                self._add(self.objective, self._at_least(bounds), weight * len(group.storages))
            for expression in own:
                self._add(earlier, expression)

    def _charge(self, name: str, distinct: Mapping[tuple, Expression], weight: float) -> None:
        """`weight` once, if any of the expressions is 1."""
        if len(distinct) == 1:
            self._add(self.objective, next(iter(distinct.values())), weight)
        elif distinct and weight:
            self._add(self.objective, {self._variable(name): weight})
            for expression in distinct.values():
                row = {name: 1.0}
                self._add(row, expression, -1.0)
                self._row(row, ">=", 0.0)

    def _shared_depth(self, use: Use) -> int:
        """How deep in the module tree the maker and the user still stand in one module."""
        paths = [self.graph.stages[n].path.split(".") for n in (self.graph.storages[use.storage].maker, use.stage)]
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1] != "", zip(*paths)))

    # --- memory

    @cached_property
    def _group_of(self) -> Mapping[ValueId, _Group]:
        return {storage: group for group in self.groups for storage in group.storages}

    def _internal(self, term: Internal | Extra) -> _Term:
        found: dict[int, Expression] = {}
        sizes: dict[int, float] = {}
        for k, name in enumerate(self.x[self.same[term.stage]]):
            nbytes = self.problem.shared_bytes(term, k)
            self._add(found.setdefault(nbytes, {}), {name: 1.0})
            sizes[nbytes] = float(nbytes)
        if isinstance(term, Internal) and term.region is not None:
            kept = {self.kappa[term.kept]: 1.0} if term.kept is not None else {}
            found = {n: self._at_least([self._unless({**own, **kept}, term.region)]) for n, own in found.items()}
        return self.copies[self.same[term.stage]], found, sizes

    _extra = _internal

    def _held(self, term: Held) -> _Term:
        expressions = self.made(term.storage)
        sizes = {layout: float(self.problem.held_bytes(term, layout)) for layout in expressions}
        return self.copies[self._storage_key(term.storage)[0]], expressions, sizes

    def _packed(self, term: Packed) -> _Term:
        return 1, {None: {CONSTANT: 1.0}}, {None: float(term.nbytes)}

    def _buffers(self, term: Buffers) -> _Term:
        use = term.use
        found: dict[int, Expression] = {}
        sizes: dict[int, float] = {}
        for (a, b), expression in self._flow(self._group_of[use.storage], self._use_key(use)).items():
            target = self.problem.target(use, a, b)
            nbytes = self.problem.buffers_bytes(use.storage, a, target, term.back) if target != a else 0
            if nbytes:
                self._add(found.setdefault(nbytes, {}), expression)
                sizes[nbytes] = float(nbytes)
        return len(self._group_of[use.storage].uses[self._use_key(use)]), found, sizes

    def _resharded(self, term: Resharded) -> _Term:
        group = self._group_of[term.storage]
        found = {}
        for layout, made in self.made(term.storage).items():
            bounds = []
            for use in term.uses:
                both = self._when_resharded(use)
                if both:
                    self._add(both, made)
                    bounds.append((both, -1.0))
            found[layout] = self._at_least(bounds)
        sizes = {layout: float(self.problem.nbytes(term.storage, layout)) for layout in found}
        return len(group.storages), found, sizes

    def _when_resharded(self, use: Use) -> Expression:
        found: Expression = {}
        for (a, b), expression in self._flow(self._group_of[use.storage], self._use_key(use)).items():
            if self.problem.target(use, a, b) != a:
                self._add(found, expression)
        return found

    def _alive(self, term: Alive) -> _Term:
        """A variable for each layout, above everything that says that the buffer is alive in it (see `Problem.layouts`)."""
        group = self._group_of[term.storage]
        bounds: dict[Layout, list[_Bound]] = {}

        def alive(layout: Layout, expression: Expression, constant: float = 0.0) -> None:
            bounds.setdefault(strip(layout), []).append((expression, constant))

        storages = self.graph.storages
        makers = (storages[storage].maker for storage in group.storages)
        made: ByLayout = {}
        for layout, expression in self._part(
            self.made(term.storage), self.copies[self._storage_key(term.storage)[0]], makers
        ).items():
            self._add(made.setdefault(strip(layout), {}), expression)
        if term.made:
            for layout, expression in made.items():
                alive(layout, expression)
        for reach in term.now:
            for layout, (expression, constant) in self._reached(group, reach, term.flavor).items():
                alive(layout, expression, constant)
        # By layout and region, what holds the buffer where the region is not recomputed, where it is, and where it keeps some.
        if_not: dict[tuple[Layout, int], list[_Bound]] = {}
        if_so: dict[tuple[Layout, int], list[_Bound]] = {}
        if_kept: dict[tuple[Layout, int], list[tuple[_Bound, str]]] = {}
        for holder in term.holders:
            if holder.region is not None and holder.region in self.problem.forced:
                continue
            own = {layout: (e, 0.0) for layout, e in made.items()}
            if holder.reach is not None and holder.only is not None:
                own = self._held_by(group, holder.reach.use, holder.only)
            elif holder.reach is not None:
                own = self._reached(group, holder.reach, term.flavor, holder.takes is not None)
            for layout, bound in own.items():
                if holder.kept is not None:
                    region = self.problem.region_of[holder.kept.stage]
                    if_kept.setdefault((layout, region), []).append((bound, self.kappa[holder.kept]))
                elif holder.region is not None:
                    if_not.setdefault((layout, holder.region), []).append(bound)
                elif holder.takes is not None and holder.takes not in self.problem.forced:
                    if_so.setdefault((layout, holder.takes), []).append(bound)
                else:
                    alive(layout, *bound)
        for (layout, region), bounds_here in if_not.items():
            for expression, constant in bounds_here:
                alive(layout, *_plus(expression, {self.rho[region]: -1.0}, constant))
        for (layout, region), bounds_here in if_so.items():
            for expression, constant in bounds_here:
                alive(layout, *_plus(expression, {self.rho[region]: 1.0}, constant - 1.0))
                # Held in both cases: which the two rows say of whole numbers only.
                for other, less in if_not.get((layout, region), ()):
                    alive(layout, *_both(expression, constant, other, less))
        for (layout, region), kept_here in if_kept.items():
            for (expression, constant), kappa in kept_here:
                alive(layout, *_plus(expression, {kappa: 1.0}, constant - 1.0))
                for other, less in if_not.get((layout, region), ()):
                    both, least = _both(expression, constant, other, less)
                    alive(layout, *_plus(both, {kappa: 1.0, self.rho[region]: -1.0}, least))
        here: list[ByLayout] = [self._wanted_by(group, reach) for reach in (*term.before, *term.now)]
        for reach in term.after:
            self._await(group, reach, term.flavor, here, alive)
        found = {layout: self._at_least(own) for layout, own in bounds.items()}
        found = {layout: expression for layout, expression in found.items() if expression}
        sizes = {layout: float(self.problem.nbytes(term.storage, layout)) for layout in found}
        return len(group.storages), found, sizes

    def _await(
        self, group: _Group, reach: Reach, flavor: str, here: Sequence[ByLayout], alive: Callable[..., None]
    ) -> None:
        """What waits for a use to come."""
        passed = [self._when_resharded(use) for use in reach.unless if use.stage < reach.stage]

        def bound(layout: Layout, expression: Expression, less: Sequence[Expression], constant: float = 0.0) -> None:
            total = {**expression}
            for other in (*passed, *less):
                self._add(total, other, -1.0)
            alive(layout, total, constant)

        wanted = self._wanted_by(group, reach)
        moved: ByLayout = {layout: {} for layout in wanted}
        for (a, b), expression in self._flow(group, self._use_key(reach.use)).items():
            if strip(a) == strip(b):
                if flavor == MADE:
                    bound(a, expression, ())
                continue
            self._add(moved[strip(b)], expression)
            if flavor == MADE:
                bound(a, expression, [own[strip(b)] for own in here if strip(b) in own])
        for layout in wanted:
            first = wanted[layout] if flavor == VIEW else moved[layout]
            for own in here if first else ():
                if layout in own:
                    both = {**first}
                    self._add(both, own[layout])
                    bound(layout, both, (), -1.0)

    def _wanted_by(self, group: _Group, reach: Reach) -> ByLayout:
        """For each layout, with one kind of Replicate, the expression that is 1 if a use reads it so."""
        key = self._use_key(reach.use)
        uses = group.uses[key]
        whole = self._part(self.wanted(uses[0]), self.copies[key[0]], (use.stage for use in uses))
        found: ByLayout = {}
        for layout, expression in whole.items():
            self._add(found.setdefault(strip(layout), {}), expression)
        return found

    def _reached(self, group: _Group, reach: Reach, flavor: str, takes: bool = False) -> dict[Layout, _Bound]:
        """The layouts in which a reach keeps its buffer alive now."""
        found: ByLayout = {}
        if flavor == ALIAS or takes:
            for (a, b), expression in self._flow(group, self._use_key(reach.use)).items():
                layout = self.problem.taken(reach.use.storage, strip(a), strip(b)) if takes else strip(b)
                if flavor != ALIAS or layout != strip(a):
                    self._add(found.setdefault(layout, {}), expression)
        else:
            found = {layout: {**expression} for layout, expression in self._wanted_by(group, reach).items()}
        for expression in found.values():
            for use in reach.unless:
                self._add(expression, self._when_resharded(use), -1.0)
        return {layout: (expression, 0.0) for layout, expression in found.items()}

    def _held_by(self, group: _Group, use: Use, only: Iterable[int]) -> dict[Layout, _Bound]:
        """The layouts in which an op saves an operand that it saves in some of its strategies only."""
        use = group.uses[self._use_key(use)][0]
        names = self.x[self.same[use.stage]]
        found: ByLayout = {}
        for k in only:
            self._add(found.setdefault(strip(use.wanted[k]), {}), {names[k]: 1.0})
        return {layout: (expression, 0.0) for layout, expression in found.items()}

    def _unless(self, expression: Expression, region: int, constant: float = 0.0) -> _Bound:
        """`expression`, if a region is not recomputed."""
        if region in self.problem.forced:
            return {}, 0.0
        found = {**expression}
        self._add(found, {self.rho[region]: -1.0})
        return found, constant

    def _at_least(self, bounds: Iterable[_Bound]) -> Expression:
        """The largest of several expressions, none of which is above 1 or counts where it is below 0."""
        distinct = {(tuple(sorted(e.items())), constant): (e, constant) for e, constant in bounds if e}
        if len(distinct) == 1:
            ((expression, constant),) = distinct.values()
            if not constant and all(value > 0 for value in expression.values()):
                return expression
        if not distinct:
            return {}
        name = tuple(sorted(distinct, key=repr))
        if name not in self._largest:
            z = self._largest[name] = self._variable(f"z{len(self._largest)}")
            for expression, constant in distinct.values():
                row = {z: 1.0}
                self._add(row, expression, -1.0)
                self._row(row, ">=", constant)
        return {self._largest[name]: 1.0}

    def points(self, chosen: Iterable[int] | None = None) -> dict[int, Expression]:
        """Bytes alive at the chosen program points, or at all that no other point contains."""
        counts, rows = self.ledger.counts, {}
        if not self.problem.whole:
            counts = numpy.where(self.ledger.state, 0.0, counts)
        numbers = _undominated(counts) if chosen is None else sorted(chosen)
        for number in numbers:
            region = self.problem.points[number].again
            if region is not None and self.average:
                continue
            row: Expression = {}
            for term in counts[number].nonzero()[0]:
                self._add_term(row, int(term), int(counts[number, term]))
            if region is not None and region not in self.problem.forced:
                # Only where the region runs again.
                most = sum(value for value in row.values() if value > 0)
                row[CONSTANT] = row.get(CONSTANT, 0.0) - most
                self._add(row, {self.rho[region]: most})
            rows[number] = row
        return rows

    def _add_term(self, total: Expression, number: int, count: int) -> None:
        if number not in self._terms:
            term = self.ledger.terms[number]
            self._terms[number] = getattr(self, f"_{type(term).__name__.lower()}")(term)
        copies, expressions, sizes = self._terms[number]
        if self.average and count < copies:
            expressions = self._part(expressions, copies, range(count), exclusive=False)
        for label, expression in expressions.items():
            self._add(total, expression, sizes[label] * count)

    # --- the solver

    def _constraints(self, integer: bool) -> tuple[dict[str, pulp.LpVariable], list[pulp.LpConstraint]]:
        """Variables and rows for PuLP, made once for all solves of this model."""
        names = [name for own in self.x.values() for name in own] + list(self.continuous)
        key = (integer, len(names), len(self.rows))
        if key not in self._pulp:
            binary = set(self.binaries) if integer else set()
            category = {True: pulp.LpBinary, False: pulp.LpContinuous}
            variables = {name: pulp.LpVariable(name, 0, 1, category[name in binary]) for name in names}
            senses = {"=": pulp.LpConstraintEQ, ">=": pulp.LpConstraintGE, "<=": pulp.LpConstraintLE}
            constraints = [
                pulp.LpConstraint(
                    pulp.LpAffineExpression([(variables[n], v) for n, v in expression.items()]),
                    senses[sense],
                    rhs=bound,
                )
                for expression, sense, bound in self.rows.values()
            ]
            self._pulp[key] = (variables, constraints)
        return self._pulp[key]

    def _known(self, choice: Sequence[int], recomputed: Recomputed) -> dict[str, float]:
        """The integer variables of a plan. Where copies decide apart in it and alike here, all do as the first one does, and
        all recompute where one does."""
        found = {name: 0.0 for name in self.binaries}
        for shared, names in self.x.items():
            if len(names) > 1:
                found[names[choice[shared]]] = 1.0
        for item, name in (*self.rho.items(), *self.kappa.items()):
            if item in recomputed and name in found:
                found[name] = 1.0
        return found

    def made_bytes(self) -> Expression:
        """Bytes of all results, and of the copies that uses need in other layouts; two small ones count less than one large."""
        total: Expression = {}
        largest = max((storage.root.nbytes for storage in self.graph.storages.values()), default=0) or 1

        def weight(storage: ValueId, layout: Layout) -> float:
            nbytes = self.problem.nbytes(storage, layout)
            return nbytes * (1 + nbytes / largest / 100)

        for storage in self.graph.storages.values():
            if storage.kind == "activation":
                for layout, expression in self.made(storage.id).items():
                    self._add(total, expression, weight(storage.id, layout))
        for group in self.groups:
            for key, uses in group.uses.items():
                for (a, b), expression in self._flow(group, key).items():
                    if strip(self.problem.target(uses[0], a, b)) != strip(a):
                        self._add(total, expression, len(uses) * weight(uses[0].storage, b))
        return total

    def solve(
        self,
        rows: Mapping[int, Expression],
        capacity: float | None,
        *,
        instead: Expression | None = None,
        integer: bool = True,
        time_limit: float | None = None,
        start: Answer | None = None,
    ) -> Answer:
        """Minimize the objective under `capacity` at every point of `rows`; without one, the largest of `rows`. instead:
        minimize this, whatever is alive. start: a plan to look for better ones than."""
        variables, constraints = self._constraints(integer)
        program = pulp.LpProblem("eq9", pulp.LpMinimize)
        if instead is not None:
            unit = max(instead.values(), default=0.0) / _SCALE or 1.0
            program.setObjective(
                pulp.LpAffineExpression([(variables[n], v / unit) for n, v in instead.items() if v and n != CONSTANT])
            )
        elif capacity is None:
            unit = max((sum(row.values()) for row in rows.values()), default=1.0) or 1.0
            peak = pulp.LpVariable("peak", 0)
            program.setObjective(pulp.LpAffineExpression([(peak, 1.0)]))
        else:
            unit = max(self.objective.values(), default=0.0) / _SCALE or 1.0
            program.setObjective(
                pulp.LpAffineExpression([(variables[n], v / unit) for n, v in self.objective.items() if v])
            )
        for constraint in constraints:
            program.addConstraint(constraint)
        for expression in rows.values() if instead is None else ():
            scale = unit if capacity is None else max(capacity, 1.0)
            terms = [(variables[n], v / scale) for n, v in expression.items() if v and n != CONSTANT]
            if capacity is None:
                terms.append((peak, -1.0))
            rhs = (0.0 if capacity is None else capacity / scale) - expression.get(CONSTANT, 0.0) / scale
            program.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=rhs))
        known: dict[str, float] = {}
        if integer and start is not None and start.choice is not None:
            known = self._known(start.choice, start.recomputed)
        solver, label = make_solver(time_limit, integer, {variables[name]: value for name, value in known.items()})
        program.solve(solver)
        found = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
        choice: tuple[int, ...] | None = None
        recomputed: Recomputed = frozenset()
        if found:
            picked: dict[int, int] = {}
            for shared, own in self.x.items():
                shares = [variables[name].value() or 0.0 for name in own]
                picked[shared] = shares.index(max(shares))
            choice = tuple(picked[self.same[stage.index]] for stage in self.graph.stages)
            items: list[tuple[int | Kept, str]] = [*self.rho.items(), *self.kappa.items()]
            recomputed = frozenset(item for item, name in items if (variables[name].value() or 0.0) > 0.5)
        feasible = program.sol_status == pulp.LpSolutionIntegerFeasible  # which PuLP calls optimal too
        return Answer(
            "Feasible" if feasible else pulp.LpStatus[program.status],
            program.sol_status == pulp.LpSolutionOptimal,
            pulp.value(program.objective) * unit if found else None,
            choice,
            recomputed,
            label,
            len(variables),
            len(program.constraints),
        )


class _HiGHS(pulp.HiGHS):
    """HiGHS that begins at a known solution, which PuLP hands only to solvers that run as commands."""

    start: Mapping[pulp.LpVariable, float] = {}

    def callSolver(self, lp: pulp.LpProblem) -> None:
        if self.start:
            indices = numpy.array([variable.index for variable in self.start], dtype=numpy.int32)
            lp.solverModel.setSolution(len(indices), indices, numpy.array(list(self.start.values()), dtype=float))
        super().callSolver(lp)


def _plus(expression: Expression, more: Expression, constant: float) -> _Bound:
    found = {**expression}
    Model._add(found, more)
    return found, constant


def _both(one: Expression, constant: float, other: Expression, less: float) -> _Bound:
    """What is 1 where both are, for expressions that are never above 1."""
    if one == other and constant == less:
        return one, constant
    return _plus(one, other, constant + less - 1.0)


def make_solver(
    time_limit: float | None, integer: bool = True, start: Mapping[pulp.LpVariable, float] | None = None
) -> tuple[pulp.LpSolver, str]:
    """HiGHS where its wheel is there, PuLP's bundled CBC elsewhere. start: values of integer variables to begin at (HiGHS)."""
    if pulp.HiGHS().available():
        highs = _HiGHS(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1, **_PRECISE, **_BRANCHING)
        highs.start = start or {}
        return highs, "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1), "CBC"


def _undominated(counts: numpy.ndarray) -> list[int]:
    """Drops points at which nothing is alive that is not also alive at another."""
    kept: list[int] = []
    for i in numpy.argsort(-counts.sum(axis=1), kind="stable"):
        if not kept or not (counts[kept] >= counts[i]).all(axis=1).any():
            kept.append(int(i))
    return sorted(kept)
