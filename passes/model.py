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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import pulp

from .layout import Layout
from .lifetimes import Internal, Kept, Made, Term, Used
from .nodes import ValueId
from .problem import TIE, Problem
from .stages import Stage, Use, strip

# The objective's largest coefficient, and HiGHS's tolerances. With larger ones HiGHS 1.15 has called a plan optimal that was
# not.
_SCALE = 1e4
_PRECISE = {"mip_feasibility_tolerance": 1e-9, "mip_abs_gap": 0.0}

Expression = dict[str, float]
ByLayout = dict[Layout, Expression]


@dataclass(frozen=True)
class Answer:
    """What the solver said. `value` is the objective (or the peak), `choice` the strategy of every stage; both None where it
    found none. `optimal`: there is no better one."""

    status: str
    optimal: bool
    value: float | None
    choice: tuple[int, ...] | None
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
        self._terms: dict[tuple, tuple[int, ByLayout, dict[Layout, float]]] = {}
        self._parts = itertools.count()
        self._pulp: dict[tuple, tuple[dict[str, pulp.LpVariable], list[pulp.LpConstraint]]] = {}
        self.groups = self._group()
        self._choose()
        self._reshard()

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
        names = [name for expression in found.values() for name in expression]
        self._row(dict.fromkeys(names, 1.0), "=" if exclusive else ">=", 1.0)
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
            for key, uses in group.uses.items():
                for (a, b), expression in self._flow(group, key).items():
                    target = self.problem.target(uses[0], a, b)
                    if target != a:
                        everyone, with_grad = wants.setdefault((a, target), ({}, {}))
                        name = tuple(sorted(expression.items()))
                        everyone[name] = expression
                        if uses[0].grad:
                            with_grad[name] = expression
            depth = min((self._shared_depth(use) for uses in group.uses.values() for use in uses), default=0)
            for position, ((a, b), (everyone, with_grad)) in enumerate(wants.items()):
                resharding = self.problem.resharding(storage, a, b, False)
                there = self.problem.weight(resharding.cost) + len(resharding.steps) * self._tie * (1 + depth / 100)
                both = self.problem.weight(self.problem.resharding(storage, a, b, True).cost)
                back = both - self.problem.weight(resharding.cost) if with_grad else 0.0
                if everyone.keys() == with_grad.keys():
                    self._charge(f"y{group.number}_{position}", everyone, (there + back) * count)
                else:
                    self._charge(f"y{group.number}_{position}", everyone, there * count)
                    self._charge(f"w{group.number}_{position}", with_grad, back * count)

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

    def _term(self, term: Term) -> tuple | None:
        """Key of a term among all copies; `self._terms[key]` is (copies, expressions by layout, bytes by layout)."""
        if isinstance(term, Internal):
            key = ("internal", self.same[term.stage], term.nbytes)
            if key not in self._terms:
                names = self.x[self.same[term.stage]]
                sizes = {k: float(self.problem.internal_bytes(term, k)) for k in range(len(names))}
                expressions = {k: {name: 1.0} for k, name in enumerate(names)}
                self._terms[key] = (self.copies[self.same[term.stage]], expressions, sizes)
        elif isinstance(term, Made):
            key = ("made", *self._storage_key(term.storage))
            if key not in self._terms:
                expressions = self.made(term.storage)
                sizes = {layout: float(self.problem.nbytes(term.storage, layout)) for layout in expressions}
                self._terms[key] = (self.copies[key[1]], expressions, sizes)
        elif isinstance(term, Used):
            use = term.use
            group = self._group_of[use.storage]
            key = ("used", *self._use_key(use), group.number if term.only_resharded else None)
            if key not in self._terms and term.only_resharded:
                expressions, sizes = {}, {}
                for (a, b), expression in self._flow(group, self._use_key(use)).items():
                    if self.problem.target(use, a, b) != a:
                        self._add(expressions.setdefault(b, {}), expression)
                        sizes[b] = float(self.problem.nbytes(use.storage, b))
                # A pair is no one-hot: a mean over some copies says nothing, so a part of them does not count.
                self._terms[key] = (len(group.uses[self._use_key(use)]), expressions, sizes)
            elif key not in self._terms:
                expressions = self.wanted(use)
                sizes = {layout: float(self.problem.nbytes(use.storage, layout)) for layout in expressions}
                self._terms[key] = (self.copies[self.same[use.stage]], expressions, sizes)
        else:
            key = self._kept(term)
        return key

    @property
    def _group_of(self) -> Mapping[ValueId, _Group]:
        if not hasattr(self, "_groups_by_storage"):
            self._groups_by_storage = {storage: group for group in self.groups for storage in group.storages}
        return self._groups_by_storage

    def _kept(self, term: Kept) -> tuple:
        group = self._group_of[term.storage]
        holders = tuple(sorted({self._use_key(use) for use in term.by_uses}))
        key = ("kept", group.number, term.by_maker, holders)
        if key in self._terms:
            return key
        storages = self.graph.storages
        sources = [
            self._part(
                self.wanted(group.uses[holder][0]), self.copies[holder[0]], (use.stage for use in group.uses[holder])
            )
            for holder in holders
        ]
        if term.by_maker:
            makers = (storages[storage].maker for storage in group.storages)
            sources.append(self._part(self.made(term.storage), self.copies[self._storage_key(term.storage)[0]], makers))
        held: dict[Layout, dict[tuple, Expression]] = {}
        for layouts in sources:
            merged: ByLayout = {}
            for layout, expression in layouts.items():
                self._add(merged.setdefault(strip(layout), {}), expression)
            for layout, expression in merged.items():
                held.setdefault(layout, {})[tuple(sorted(expression.items()))] = expression
        expressions, sizes = {}, {}
        for position, (layout, distinct) in enumerate(held.items()):
            sizes[layout] = float(self.problem.nbytes(term.storage, layout))
            if len(distinct) == 1:
                expressions[layout] = next(iter(distinct.values()))
                continue
            z = self._variable(f"z{len(self._terms)}_{position}")
            expressions[layout] = {z: 1.0}
            for expression in distinct.values():
                row = {z: 1.0}
                self._add(row, expression, -1.0)
                self._row(row, ">=", 0.0)
        self._terms[key] = (len(group.storages), expressions, sizes)
        return key

    def points(self, chosen: set[int] | None = None) -> dict[int, Expression]:
        """Bytes alive at every program point (or the chosen ones) that no other point contains."""
        kept: Counter[tuple] = Counter()
        total: Expression = {}
        found: dict[tuple, tuple[int, Expression, Counter]] = {}
        for number, point in enumerate(self.problem.points):
            for term in point.kept:
                key = self._term(term)
                kept[key] += 1
                if not self.average:
                    self._add_term(total, key, 1)
            if chosen is not None and number not in chosen:
                continue
            alive = Counter(self._term(term) for term in point.alive)
            if self.average:
                alive.update(kept)
            # What is kept only grows, so of points where the same else is alive the latest contains the others.
            distinct = number if chosen is not None else tuple(sorted(alive.items(), key=repr))
            found[distinct] = (number, dict(total), alive)
        rows: dict[int, Expression] = {}
        for number, row, alive in found.values():
            for key, count in alive.items():
                self._add_term(row, key, count)
            rows[number] = row
        return _undominated(rows) if chosen is None else rows

    def _add_term(self, total: Expression, key: tuple, count: int) -> None:
        copies, expressions, sizes = self._terms[key]
        if self.average and count < copies:
            if key[0] == "used" and key[-1] is not None:
                return
            expressions = self._part(expressions, copies, range(count), exclusive=key[0] != "kept")
        for layout, expression in expressions.items():
            self._add(total, expression, sizes[layout] * count)

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

    def solve(
        self,
        rows: Mapping[int, Expression],
        capacity: float | None,
        *,
        integer: bool = True,
        time_limit: float | None = None,
    ) -> Answer:
        """Minimize the objective under `capacity` at every point of `rows`; without one, the largest of `rows`."""
        variables, constraints = self._constraints(integer)
        program = pulp.LpProblem("eq9", pulp.LpMinimize)
        if capacity is None:
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
        for expression in rows.values():
            scale = unit if capacity is None else max(capacity, 1.0)
            terms = [(variables[n], v / scale) for n, v in expression.items() if v]
            if capacity is None:
                terms.append((peak, -1.0))
            rhs = 0.0 if capacity is None else capacity / scale
            program.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=rhs))
        solver, label = make_solver(time_limit, integer)
        program.solve(solver)
        found = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
        choice = None
        if found:
            picked = {
                shared: max(range(len(own)), key=lambda k, own=own: variables[own[k]].value() or 0.0)
                for shared, own in self.x.items()
            }
            choice = tuple(picked[self.same[stage.index]] for stage in self.graph.stages)
        return Answer(
            pulp.LpStatus[program.status],
            program.sol_status == pulp.LpSolutionOptimal,
            pulp.value(program.objective) * unit if found else None,
            choice,
            label,
            len(variables),
            len(program.constraints),
        )


def make_solver(time_limit: float | None, integer: bool = True) -> tuple[pulp.LpSolver, str]:
    """HiGHS where its wheel is there, PuLP's bundled CBC elsewhere."""
    highs = pulp.HiGHS(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1, **_PRECISE)
    if highs.available():
        return highs, "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1), "CBC"


def _undominated(totals: dict[int, Expression]) -> dict[int, Expression]:
    """Drops points at which nothing is alive that is not also alive at another."""
    columns = {name: n for n, name in enumerate({name: None for row in totals.values() for name in row})}
    matrix = numpy.zeros((len(totals), len(columns)))
    numbers = list(totals)
    for i, number in enumerate(numbers):
        row = totals[number]
        matrix[i, [columns[name] for name in row]] = list(row.values())
    kept: list[int] = []
    for i in numpy.argsort(-matrix.sum(axis=1), kind="stable"):
        if not kept or not (matrix[kept] >= matrix[i]).all(axis=1).any():
            kept.append(int(i))
    return {numbers[i]: totals[numbers[i]] for i in sorted(kept)}
