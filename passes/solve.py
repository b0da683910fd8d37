"""Solve: Eq. 9 of the paper over the stage graph, as an integer linear program.

    minimize     sum over storages t, layouts a != b   cost(t: a -> b) y[t,a,b]   [+ sum over s,k  compute(s,k) x[s,k]]
    subject to   sum_k x[s,k] = 1                                     every stage runs one strategy      (_choose)
                 sum_b e[u,a,b] = sum of x[maker of u, k : made = a]  flow out of the maker              (_flow)
                 sum_a e[u,a,b] = sum of x[stage of u, k : wanted = b]  flow into the user               (_flow)
                 y[t,a,b] >= e[u,a,b]         for every use u of t    one resharding serves all who want (_reshard)
                 z[t,b] >= kept by a holder   for every holder of t   memory that is saved once          (_kept)
                 bytes alive at p <= Capacity  for every point p      Memory(X) < Capacity               (_points)

x[s,k] is binary: stage s runs its k-th strategy (its partition p in the paper's letters). e[u,a,b] couples the storage
that use u reads, made in layout a, with the layout b that the user wants (the linearization of Alpa, tight enough that
the relaxation is mostly integral). A pair that no primitive connects has no variable. y, z are continuous.

Without a capacity, replicating everything would send nothing. So then Capacity is the least peak that any plan reaches,
and a slack. Repeated blocks share their variables (`fold`), which only restricts the problem; the relaxation of the
problem without sharing is a lower bound, and where the two do not meet, the problem without sharing is solved too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import pulp

from dsp_auto.cost_models.communication import FREE, Cost, primitive_cost
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.errors import InfeasibleError, StrategyError

from .capture import Program
from .factorize import ValueId
from .fold import fold
from .layout import Layout, Replicate, Shard, Step, steps
from .lifetimes import Internal, Kept, Made, Point, Term, Used, lifetimes
from .stages import Stage, StageGraph, Use, satisfied, strip

OBJECTIVES = ("volume", "time")
SLACK = 0.10
# Between plans of equal bytes, the one with fewer reshardings, and those between modules rather than inside them; then the
# one that does less work twice. A resharding weighs this share of the largest tensor, or of a second.
_TIE = 1e-10
_SCALE = 1e6


@dataclass(frozen=True)
class Resharding:
    """One storage turned from the layout it is made in into one that `grad`-carrying (or not) uses want."""

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
class Solution:
    """`choice[s]` is the strategy of stage s. Objective and bound are wire bytes ("volume") or seconds ("time")."""

    choice: tuple[int, ...]
    objective: float
    bound: float
    status: str
    solver: str
    variables: int
    constraints: int
    peak_bytes: int
    capacity_bytes: int
    peak_point: Point | None
    folded: bool
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the plan may be from the optimum, as a share of its cost."""
        return 0.0 if self.objective <= self.bound else (self.objective - self.bound) / self.objective


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
        self.compute_seconds = compute_seconds or (lambda stage, strategy: 0.0)
        self._reshardings: dict[tuple, tuple[tuple[Step, ...], tuple[Cost, ...]] | None] = {}
        self._bytes: dict[tuple, int] = {}

    def resharding(self, storage: ValueId, source: Layout, target: Layout, grad: bool) -> Resharding | None:
        """How `storage` gets from `source` to `target`, None where no primitives lead there."""
        root = self.graph.storages[storage].root
        if not grad:
            source, target = strip(source), strip(target)
        key = (root.factors, root.itemsize, source, target, grad)
        if key not in self._reshardings:
            way = steps(source, target)
            costs = None if way is None else tuple(self._step_cost(storage, step, grad) for step in way)
            self._reshardings[key] = None if way is None else (way, costs)
        found = self._reshardings[key]
        return None if found is None else Resharding(storage, source, target, grad, *found)

    def _step_cost(self, storage: ValueId, step: Step, grad: bool) -> Cost:
        graph = self.graph
        root = graph.storages[storage].root
        nbytes = root.nbytes
        for m, placement in enumerate(step.before):
            if m != step.mesh_dim and isinstance(placement, Shard):
                nbytes /= graph.mesh.sizes[m]
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

    def weight(self, cost: Cost) -> float:
        return cost.wire_bytes if self.objective == "volume" else cost.seconds

    def nbytes(self, storage: ValueId, layout: Layout) -> int:
        root = self.graph.storages[storage].root
        key = (root.factors, root.itemsize, strip(layout))
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
                target = use.wanted[choice[use.stage]]
                if satisfied(source, target, use.grad):
                    continue
                resharding = self.resharding(storage, source, target, use.grad)
                if resharding is None:
                    return None
                found[storage, resharding.target, use.grad] = resharding
        return list(found.values())

    def cost(self, choice: Sequence[int]) -> float | None:
        """The objective of a choice, None where it is impossible."""
        reshardings = self.reshardings(choice)
        if reshardings is None:
            return None
        compute = 0.0
        if self.objective == "time":
            compute = sum(self.compute_seconds(s.index, choice[s.index]) for s in self.graph.stages)
        return sum(self.weight(r.cost) for r in reshardings) + compute

    def term_bytes(self, term: Term, choice: Sequence[int]) -> int:
        if isinstance(term, Internal):
            return self.internal_bytes(term, choice[term.stage])
        if isinstance(term, Made):
            return self.nbytes(term.storage, self.made(term.storage, choice))
        if isinstance(term, Used):
            wanted = term.use.wanted[choice[term.use.stage]]
            if term.only_resharded and satisfied(self.made(term.use.storage, choice), wanted, term.use.grad):
                return 0
            return self.nbytes(term.use.storage, wanted)
        layouts = {strip(use.wanted[choice[use.stage]]) for use in term.by_uses}
        if term.by_maker:
            layouts.add(strip(self.made(term.storage, choice)))
        return sum(self.nbytes(term.storage, layout) for layout in layouts)

    def peak(self, choice: Sequence[int]) -> tuple[int, Point | None]:
        """Bytes at the worst program point of a choice, and that point."""
        kept, worst, where = 0, 0, None
        for point in self.points:
            kept += sum(self.term_bytes(term, choice) for term in point.kept)
            total = kept + sum(self.term_bytes(term, choice) for term in point.alive)
            if total > worst:
                worst, where = total, point
        return worst, where


Expression = dict[str, float]


class _Model:
    """The integer program of a `Problem`, with stages that share their variables given by `same` (see `fold`)."""

    def __init__(self, problem: Problem, same: Sequence[int]) -> None:
        self.problem, self.graph, self.same = problem, problem.graph, same
        self.x: dict[int, list[str]] = {}
        self.binaries: list[str] = []
        self.continuous: dict[str, None] = {}
        self.rows: dict[tuple, tuple[Expression, str, float]] = {}
        self.objective: Expression = {}
        made = [s.root.nbytes for s in self.graph.storages.values() if s.kind == "activation"]
        self._made_bytes = sum(made) or 1
        self._tie = _TIE * (max(made, default=1) if problem.objective == "volume" else 1.0)
        self._edges: dict[tuple, dict[tuple[Layout, Layout], Expression]] = {}
        self._kept: dict[tuple, Expression] = {}
        self._choose()
        self._reshard()

    # --- pieces of expressions

    def _add(self, expression: Expression, other: Mapping[str, float], factor: float = 1.0) -> None:
        for name, value in other.items():
            expression[name] = expression.get(name, 0.0) + factor * value

    def _row(self, expression: Expression, sense: str, bound: float) -> None:
        self.rows.setdefault((sense, bound, *sorted(expression.items())), (expression, sense, bound))

    def _variable(self, name: str) -> str:
        self.continuous.setdefault(name)
        return name

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
                self._add(self.objective, {name: self._repeated_work(stage, k) * self._tie})
                if self.problem.objective == "time":
                    self._add(self.objective, {name: self.problem.compute_seconds(stage.index, k)})

    def _by_layout(self, stage: int, layouts: Sequence[Layout]) -> dict[Layout, Expression]:
        found: dict[Layout, Expression] = {}
        for name, layout in zip(self.x[self.same[stage]], layouts, strict=True):
            found.setdefault(layout, {})[name] = 1.0
        return found

    def made(self, storage: ValueId) -> dict[Layout, Expression]:
        """For each layout that a storage may be made in, the expression that is 1 if it is."""
        entry = self.graph.storages[storage]
        return self._by_layout(entry.maker, [made[entry.result] for made in self.graph.stages[entry.maker].made])

    def _storage_key(self, storage: ValueId) -> tuple[int, int]:
        entry = self.graph.storages[storage]
        return self.same[entry.maker], entry.result

    def _use_key(self, use: Use) -> tuple:
        return (*self._storage_key(use.storage), self.same[use.stage], use.operand)

    def _flow(self, use: Use) -> dict[tuple[Layout, Layout], Expression]:
        """e[u,a,b] for every pair that is satisfied or that primitives connect."""
        key = self._use_key(use)
        if key in self._edges:
            return self._edges[key]
        made, wanted = self.made(use.storage), self._by_layout(use.stage, use.wanted)
        label = "_".join(map(str, key))
        pairs: dict[tuple[Layout, Layout], Expression] = {}
        possible = {
            (a, b)
            for a in made
            for b in wanted
            if satisfied(a, b, use.grad) or self.problem.resharding(use.storage, a, b, use.grad) is not None
        }
        for i, a in enumerate(made):
            for j, b in enumerate(wanted):
                if (a, b) not in possible:
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
                # With one layout on either side the pairs are the expressions themselves: only impossible ones are rows.
                if min(len(expressions), len(other)) > 1 or not row:
                    self._add(row, expression, -1.0)
                    self._row({n: v for n, v in row.items() if v}, "=", 0.0)
        self._edges[key] = pairs
        return pairs

    def _reshard(self) -> None:
        """Costs of reshardings: on the pair itself where one use wants it, on y where several share it."""
        groups: dict[tuple, list] = {}
        for storage, uses in self.graph.uses.items():
            key = (self._storage_key(storage), tuple(sorted({self._use_key(use) for use in uses})))
            groups.setdefault(key, [storage, uses, 0])[2] += 1
        for number, (storage, uses, count) in enumerate(groups.values()):
            wants: dict[tuple[Layout, Layout, bool], dict[tuple, Expression]] = {}
            for use in uses:
                for (a, b), expression in self._flow(use).items():
                    if not satisfied(a, b, use.grad):
                        a, b = (a, b) if use.grad else (strip(a), strip(b))
                        wants.setdefault((a, b, use.grad), {})[self._use_key(use), a, b] = expression
            for position, ((a, b, grad), expressions) in enumerate(wants.items()):
                resharding = self.problem.resharding(storage, a, b, grad)
                if not resharding.steps:
                    continue
                depth = min(self._shared_depth(storage, use) for use in uses)
                weight = self.problem.weight(resharding.cost) + len(resharding.steps) * self._tie * (1 + depth / 100)
                distinct = {tuple(sorted(e.items())): e for e in expressions.values()}
                if len(distinct) == 1:
                    self._add(self.objective, next(iter(distinct.values())), weight * count)
                else:
                    y = self._variable(f"y{number}_{position}")
                    self._add(self.objective, {y: 1.0}, weight * count)
                    for expression in distinct.values():
                        row = {y: 1.0}
                        self._add(row, expression, -1.0)
                        self._row(row, ">=", 0.0)

    def _repeated_work(self, stage: Stage, strategy: int) -> float:
        """The share of the program's result bytes that this stage makes on every rank of a mesh dim."""
        whole = sum(1 for factor in stage.strategies[strategy].factors if factor is None)
        return whole * sum(self.graph.storages[result].root.nbytes for result in stage.results) / self._made_bytes

    def _shared_depth(self, storage: ValueId, use: Use) -> int:
        """How deep in the module tree the maker and the user still stand in one module."""
        paths = [self.graph.stages[n].path.split(".") for n in (self.graph.storages[storage].maker, use.stage)]
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1] != "", zip(*paths)))

    # --- memory

    def _term(self, term: Term) -> Expression:
        problem, found = self.problem, {}
        if isinstance(term, Internal):
            for k, name in enumerate(self.x[self.same[term.stage]]):
                found[name] = problem.internal_bytes(term, k)
        elif isinstance(term, Made):
            for layout, expression in self.made(term.storage).items():
                self._add(found, expression, problem.nbytes(term.storage, layout))
        elif isinstance(term, Used) and term.only_resharded:
            for (a, b), expression in self._flow(term.use).items():
                if not satisfied(a, b, term.use.grad):
                    self._add(found, expression, problem.nbytes(term.use.storage, b))
        elif isinstance(term, Used):
            for layout, expression in self._by_layout(term.use.stage, term.use.wanted).items():
                self._add(found, expression, problem.nbytes(term.use.storage, layout))
        else:
            found = self._keep(term)
        return found

    def _keep(self, term: Kept) -> Expression:
        key = (self._storage_key(term.storage), term.by_maker, tuple(sorted({self._use_key(u) for u in term.by_uses})))
        if key not in self._kept:
            held: dict[Layout, dict[tuple, Expression]] = {}
            sources = [self._by_layout(use.stage, use.wanted) for use in term.by_uses]
            for layouts in [self.made(term.storage), *sources] if term.by_maker else sources:
                merged: dict[Layout, Expression] = {}
                for layout, expression in layouts.items():
                    self._add(merged.setdefault(strip(layout), {}), expression)
                for layout, expression in merged.items():
                    held.setdefault(layout, {})[tuple(sorted(expression.items()))] = expression
            found: Expression = {}
            for position, (layout, distinct) in enumerate(held.items()):
                size = self.problem.nbytes(term.storage, layout)
                if len(distinct) == 1:
                    self._add(found, next(iter(distinct.values())), size)
                else:
                    z = self._variable(f"z{len(self._kept)}_{position}")
                    found[z] = float(size)
                    for expression in distinct.values():
                        row = {z: 1.0}
                        self._add(row, expression, -1.0)
                        self._row(row, ">=", 0.0)
            self._kept[key] = found
        return self._kept[key]

    def points(self, chosen: set[int] | None = None) -> dict[int, Expression]:
        """Bytes alive at every program point (or the chosen ones) that no other point contains."""
        kept: Expression = {}
        totals: dict[int, Expression] = {}
        terms: dict[int, Expression] = {}
        for number, point in enumerate(self.problem.points):
            for term in point.kept:
                self._add(kept, self._term(term))
            if chosen is None or number in chosen:
                total = dict(kept)
                for term in point.alive:
                    key = id(term)
                    if key not in terms:
                        terms[key] = self._term(term)
                    self._add(total, terms[key])
                totals[number] = total
        return _undominated(totals) if chosen is None else totals

    # --- the solver

    def solve(
        self, rows: Mapping[int, Expression], capacity: float | None, *, integer: bool, time_limit: float | None
    ) -> _Answer:
        """Minimize the objective under `capacity` at every point of `rows`; without a capacity, the largest of `rows`."""
        names = [name for own in self.x.values() for name in own] + list(self.continuous)
        binary = set(self.binaries) if integer else set()
        variables = {
            name: pulp.LpVariable(name, 0, 1, pulp.LpBinary if name in binary else pulp.LpContinuous) for name in names
        }
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
        senses = {"=": pulp.LpConstraintEQ, ">=": pulp.LpConstraintGE}
        for expression, sense, bound in self.rows.values():
            affine = pulp.LpAffineExpression([(variables[n], v) for n, v in expression.items()])
            program.addConstraint(pulp.LpConstraint(affine, senses[sense], rhs=bound))
        for expression in rows.values():
            scale = unit if capacity is None else capacity or 1.0
            terms = [(variables[n], v / scale) for n, v in expression.items() if v]
            if capacity is None:
                terms.append((peak, -1.0))
            rhs = 0.0 if capacity is None else 1.0 if capacity else 0.0
            program.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=rhs))
        solver, label = make_solver(time_limit, integer)
        program.solve(solver)
        status = pulp.LpStatus[program.status]
        value = pulp.value(program.objective) if program.status == pulp.LpStatusOptimal else None
        choice = None
        if value is not None:
            picked = {
                shared: max(range(len(own)), key=lambda k, own=own: variables[own[k]].value() or 0.0)
                for shared, own in self.x.items()
            }
            choice = tuple(picked[self.same[stage.index]] for stage in self.graph.stages)
        return _Answer(
            status, None if value is None else value * unit, choice, label, len(variables), len(program.constraints)
        )


@dataclass(frozen=True)
class _Answer:
    status: str
    value: float | None
    choice: tuple[int, ...] | None
    solver: str
    variables: int
    constraints: int


def make_solver(time_limit: float | None, integer: bool = True) -> tuple[pulp.LpSolver, str]:
    """HiGHS where its wheel is there, PuLP's bundled CBC elsewhere."""
    highs = pulp.HiGHS(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1)
    if highs.available():
        return highs, "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, mip=integer, gapRel=0.0, timeLimit=time_limit, threads=1), "CBC"


def _undominated(totals: dict[int, Expression]) -> dict[int, Expression]:
    """Drops points at which nothing is alive that is not also alive at another."""
    columns = {name: n for n, name in enumerate({name: None for row in totals.values() for name in row})}
    matrix = numpy.zeros((len(totals), len(columns)))
    numbers = list(totals)
    for i, number in enumerate(numbers):
        for name, value in totals[number].items():
            matrix[i, columns[name]] = value
    kept: list[int] = []
    for i in sorted(range(len(numbers)), key=lambda i: -matrix[i].sum()):
        if not kept or not (matrix[kept] >= matrix[i]).all(axis=1).any():
            kept.append(i)
    return {numbers[i]: totals[numbers[i]] for i in sorted(kept)}


def solve(
    problem: Problem, capacity: int | None = None, *, use_folding: bool = True, time_limit: float = 60.0
) -> Solution:
    """The cheapest choice whose peak stays within `capacity` bytes.

    capacity: bytes of activations per device; None: the least peak that the (folded) plan reaches, and 10%.
    Raises InfeasibleError where no choice fits.
    """
    started = time.perf_counter()
    graph = problem.graph
    apart = tuple(range(len(graph.stages)))
    same = fold(graph) if use_folding else apart
    folded = same != apart
    model = _Model(problem, same)
    rows = model.points()
    built = time.perf_counter()
    if capacity is None:
        capacity = int(_least_peak(problem, model, rows, time_limit)[0] * (1 + SLACK))
    answer = model.solve(rows, capacity, integer=True, time_limit=time_limit)
    bound = answer.value
    if folded:
        full = _Model(problem, apart)
        points = set(rows)
        relaxed = full.solve(full.points(points), capacity, integer=False, time_limit=time_limit)
        bound = relaxed.value
        if answer.choice is None or _apart(problem.cost(answer.choice), bound):
            answer, bound = _solve_apart(problem, full, points, capacity, answer, bound, time_limit)
    if answer.choice is None:
        raise _infeasible(problem, model, rows, capacity, time_limit)
    objective = problem.cost(answer.choice)
    peak, where = problem.peak(answer.choice)
    return Solution(
        choice=answer.choice,
        objective=objective,
        bound=objective if not _apart(objective, bound) else bound,
        status=answer.status,
        solver=answer.solver,
        variables=answer.variables,
        constraints=answer.constraints,
        peak_bytes=peak,
        capacity_bytes=capacity,
        peak_point=where,
        folded=folded,
        seconds={"build": built - started, "solve": time.perf_counter() - built},
    )


def _apart(objective: float, bound: float | None) -> bool:
    """Whether a plan's cost and a lower bound differ by more than the tie-breaker and the solver's tolerance."""
    return bound is None or objective - bound > 1e-6 * max(abs(objective), 1e-12)


def _least_peak(problem: Problem, model: _Model, rows, time_limit: float) -> tuple[int, tuple[int, ...]]:
    answer = model.solve(rows, None, integer=True, time_limit=time_limit)
    return problem.peak(answer.choice)[0], answer.choice


def _solve_apart(problem, full: _Model, points: set[int], capacity, folded: _Answer, bound, time_limit: float):
    """The problem without folding; points that a solution turns out to exceed are added until it exceeds none."""
    deadline = time.perf_counter() + time_limit
    while True:
        left = max(deadline - time.perf_counter(), 1.0)
        answer = full.solve(full.points(points), capacity, integer=True, time_limit=left)
        if answer.choice is None:
            return (folded, bound) if folded.choice is not None else (answer, bound)
        exceeded = _exceeded(problem, answer.choice, capacity) - points
        if not exceeded:
            best = answer
            if folded.choice is not None and problem.cost(folded.choice) <= problem.cost(answer.choice):
                best = folded
            return best, answer.value if time.perf_counter() < deadline else bound
        points |= exceeded


def _exceeded(problem: Problem, choice: Sequence[int], capacity: int) -> set[int]:
    kept, found = 0, set()
    for number, point in enumerate(problem.points):
        kept += sum(problem.term_bytes(term, choice) for term in point.kept)
        if kept + sum(problem.term_bytes(term, choice) for term in point.alive) > capacity:
            found.add(number)
    return found


def _infeasible(problem: Problem, model: _Model, rows, capacity: int, time_limit: float) -> InfeasibleError:
    least, choice = _least_peak(problem, model, rows, time_limit)
    _, where = problem.peak(choice)
    stage = problem.graph.stages[where.stage]
    return InfeasibleError(
        where=stage.name,
        point=f"{where.phase} of {stage.name} ({stage.op.name})",
        needed_bytes=least,
        capacity_bytes=capacity,
        least_bytes=least,
    )
