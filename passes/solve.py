"""Solve: the cheapest plan that fits, by the integer program of `model`.

Without a capacity, replicating everything would send nothing. So then Capacity is the peak of the plan that makes the fewest
bytes, and a slack. Repeated blocks share their variables (`fold`), and the mean over the copies gives a lower bound, which the
plan carries. A plan that is further from its bound than `GAP` is solved for again without sharing. Over several mesh dims the
problem may be large: then one dim is decided after another first, and the solver begins there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsp_auto.errors import InfeasibleError, StrategyError

from .enumerate_strategies import Strategy
from .fold import fold, split
from .layout import Placement, R
from .model import Answer, Model
from .problem import Problem, Recomputed

SLACK = 0.10
# The solver's tolerance and the tie-breakers are no difference in cost.
TOLERANCE = 1e-6
# A folded plan this close to its bound is not worth solving the whole problem for.
GAP = 0.02
# So is one with recomputed blocks for letting these choose otherwise than the others.
RECOMPUTE_GAP = 0.001
# Folding that leaves more than this share of the stages is not worth solving twice for.
FOLDED = 0.7
# Seconds that the unfolded problem gets at least.
APART_SECONDS = 5.0
# With more pairs of layouts than these, between which tensors may be resharded over several mesh dims, the whole problem takes
# long to solve, so that a plan is looked for beforehand; or so long that it is not solved.
MANY_PAIRS, TOO_MANY_PAIRS = 20_000, 60_000
# With more program points than this, those that bind are found by looking at what a solution exceeds.
FEW_POINTS, NEW_POINTS = 400, 24


class OutOfTimeError(StrategyError):
    """The solver found no plan in the time that it had."""


@dataclass(frozen=True)
class Solution:
    """`choice[s]` is the strategy of stage s. Objective and bound are wire bytes ("volume") or seconds ("time")."""

    choice: tuple[int, ...]
    recomputed: Recomputed
    objective: float
    bound: float
    status: str
    solver: str
    variables: int
    constraints: int
    peak_bytes: int
    capacity_bytes: int
    folded: bool
    unbounded: float | None = None  # where it was asked for: no plan costs less, whatever memory it takes
    space: int = 0  # which of the spaces that were solved for it is a plan of
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the plan may be from the optimum, as a share of its cost."""
        return 0.0 if self.objective <= self.bound else (self.objective - self.bound) / self.objective


def solve(
    problem: Problem,
    capacity: int | None = None,
    *,
    use_folding: bool = True,
    by_dims: bool = True,
    gap: float = GAP,
    time_limit: float = 60.0,
    unbounded: bool = False,
) -> Solution:
    """The cheapest choice whose peak stays within `capacity` bytes.

    capacity: bytes per device, of what `Problem.whole` says; None: the peak of the plan that makes the fewest bytes, and 10%.
    by_dims: whether a large problem is solved for one mesh dim after another first.
    gap: a folded plan further than this from its bound is solved for again without folding. time_limit: seconds, for all of it.
    unbounded: whether to say too what the least cost were with no bound on memory.
    Raises InfeasibleError where no choice fits, OutOfTimeError where none was found.
    """
    started = time.perf_counter()

    def left() -> float:
        return max(started + time_limit - time.perf_counter(), time_limit / 10)

    apart = tuple(range(len(problem.graph.stages)))
    same = fold(problem.graph) if use_folding else apart
    if len(set(same)) > FOLDED * len(same):
        same = apart  # it would save little, and might have to be solved again
    by_dims = by_dims and len(problem.graph.mesh.sizes) > 1
    pairs = _pairs(problem, same) if by_dims else 0
    if by_dims and pairs > TOO_MANY_PAIRS and (found := _one_dim_after_another(problem, capacity, left())) is not None:
        return found
    model = Model(problem, same)
    first: Answer | None = None  # that fits
    if capacity is None:
        first = _frugal(model, left())
        capacity = _with_slack(problem, first)
    is_open = any(len(stage.strategies) > 1 for stage in problem.graph.stages)
    may_recompute = is_open and any(not region.forced for region in problem.regions)
    # Where blocks do not share their variables, all of it at once may take long: first one after the other.
    known = _shard_then_recompute(problem, model, None, capacity, left) if may_recompute and same == apart else None
    if by_dims and pairs > MANY_PAIRS and (found := _one_dim_after_another(problem, capacity, left() / 4)) is not None:
        known = _better(problem, _answer(found), known)
        first = known if first is None else _better(problem, first, known)
    limit = left() / 4 if may_recompute and same != apart else left()
    # (From the frugal plan, which is seldom near the best one, the solver took longer than from none.)
    answer, points = _solve(problem, model, capacity, limit, start=known)
    if answer.choice is None and answer.status != "Infeasible" and first is not None:
        answer = replace(first, status="Feasible", optimal=False)
    if same == apart:
        bound = _cost(problem, answer) if answer.optimal else _relaxed(model, points, capacity, left())
        answer = _better(problem, answer, known)
    else:
        means = Model(problem, same, average=True)
        if answer.status == "Infeasible" and _never_fits(means, points, capacity, left()):
            raise _infeasible(problem, model, capacity, left())
        bound = _lower_bound(problem, means, answer, points, capacity, left())
        if may_recompute and answer.status != "Infeasible":
            answer = _improve(problem, model, answer, bound, capacity, left)
        if answer.choice is None or _distance(_cost(problem, answer), bound) > gap:
            # What takes the folded problem long takes the whole one too long.
            limit = min(left(), max(APART_SECONDS, 3 * (time.perf_counter() - started)))
            answer, bound = _solve_apart(problem, apart, answer, bound, points, capacity, limit)
    choice = answer.choice
    if choice is None:
        if answer.status != "Infeasible":
            raise out_of_time(time_limit)
        raise _infeasible(problem, model, capacity, left())
    if answer.recomputed:  # which costs nothing where only bytes count, and nothing is sent again
        answer = _recompute_fewer(problem, model, answer, capacity)
    objective = _cost(problem, answer)
    return Solution(
        choice=choice,
        recomputed=answer.recomputed,
        objective=objective,
        bound=objective if bound is not None and _distance(objective, bound) < TOLERANCE else bound or 0.0,
        status=answer.status,
        solver=answer.solver,
        variables=answer.variables,
        constraints=answer.constraints,
        peak_bytes=problem.peak(choice, answer.recomputed)[0],
        capacity_bytes=capacity,
        folded=same != apart,
        unbounded=model.solve({}, capacity, integer=False, time_limit=left()).value if unbounded else None,
        seconds={"solve": time.perf_counter() - started},
    )


def _cost(problem: Problem, answer: Answer) -> float:
    """Infinite where the solver found none."""
    cost = None if answer.choice is None else problem.cost(answer.choice, answer.recomputed)
    return math.inf if cost is None else cost


def _distance(objective: float, bound: float | None) -> float:
    if math.isinf(objective) or bound is None:
        return math.inf
    return max(objective - bound, 0.0) / objective if objective > 0 else 0.0


def _solve(
    problem: Problem,
    model: Model,
    capacity: int | None,
    time_limit: float,
    points: set[int] | None = None,
    start: Answer | None = None,
) -> tuple[Answer, set[int]]:
    """The cheapest choice within `capacity`, or without one the choice of the least peak; and the program points that it
    took to find it. A point is looked at once a choice exceeds it. start: a choice to look for better ones than."""
    few = len(problem.points) <= FEW_POINTS
    if few:
        rows = model.points()
        points = set(rows)
    else:
        points = set(points or ()) | _high_points(problem)
    deadline = time.perf_counter() + time_limit
    too_much = 0
    while True:
        left = max(deadline - time.perf_counter(), min(time_limit, 0.1))
        held = None if capacity is None else capacity - too_much
        answer = model.solve(rows if few else model.points(points), held, time_limit=left, start=start)
        if answer.choice is None:
            return answer, points
        totals = problem.totals(answer.choice, answer.recomputed)
        limit = capacity if capacity is not None else max((totals[n] for n in points), default=0)
        exceeded = sorted((n for n, total in enumerate(totals) if total > limit), key=lambda n: -totals[n])
        if not exceeded:
            return answer, points
        if time.perf_counter() > deadline:
            # What was found last does not fit: then there is none.
            none = replace(answer, status="Not Solved", choice=None, recomputed=frozenset())
            return (answer if capacity is None else none), points
        new = [n for n in exceeded if n not in points]
        if new and not few:
            points |= set(new[:NEW_POINTS])
        elif capacity is None:
            return answer, points
        else:  # by less than the solver's tolerance
            too_much += int(totals[exceeded[0]]) - capacity + 1


def _high_points(problem: Problem) -> set[int]:
    """Points at which most may be alive: where the forward ends and everything is kept, and at ops with the largest tensors."""
    values, stages, points = problem.graph.factors.values, problem.graph.stages, problem.points
    sizes = {
        stage.index: sum(values[value].nbytes for value in (*stage.op.operands, *stage.op.results))
        for stage in stages
        if stage.op is not None
    }
    largest = sorted(range(len(points)), key=lambda n: -sizes.get(points[n].stage, 0))[:NEW_POINTS]
    ends = [n for n, point in enumerate(points) if point.stage == stages[-1].index]
    return {*ends, *largest}


def _frugal(model: Model, time_limit: float) -> Answer:
    """The plan that makes the fewest bytes: its peak is about the least that any plan reaches, and it is found at once."""
    answer = model.solve({}, None, instead=model.made_bytes(), time_limit=time_limit)
    if answer.choice is None:
        raise out_of_time(time_limit)
    return answer


def _with_slack(problem: Problem, frugal: Answer) -> int:
    """The capacity that a plan gives where none was given."""
    if frugal.choice is None:
        raise AssertionError("a plan without a choice")
    return int(problem.peak(frugal.choice, frugal.recomputed)[0] * (1 + SLACK))


def out_of_time(time_limit: float) -> OutOfTimeError:
    """To be raised where no plan was found in so many seconds."""
    return OutOfTimeError(
        asked=f"time_limit={time_limit:g}", found="the solver found no plan in so many seconds", remedy="give it more"
    )


def _relaxed(model: Model, points: set[int], capacity: int, time_limit: float) -> float | None:
    """A lower bound where the solver ran out of time: the problem without integrality."""
    return model.solve(model.points(points), capacity, integer=False, time_limit=time_limit).value


def _lower_bound(
    problem: Problem, means: Model, answer: Answer, points: set[int], capacity: int, time_limit: float
) -> float | None:
    """No plan costs less: the relaxation over the means of repeated blocks, at the points nearest to the capacity."""
    if answer.choice is not None:
        totals = problem.totals(answer.choice, answer.recomputed)
        # Where the forward ends everything is kept, by all copies of every block.
        points = {max(range(len(totals)), key=totals.__getitem__), problem.ends_forward}
    return means.solve(means.points(points), capacity, integer=False, time_limit=time_limit).value


def _never_fits(means: Model, points: set[int], capacity: int, time_limit: float) -> bool:
    """Whether not even the means of repeated blocks fit, at points that no plan in which copies choose alike keeps to."""
    return means.solve(means.points(points), capacity, integer=False, time_limit=time_limit).status == "Infeasible"


def _better(problem: Problem, answer: Answer, other: Answer | None) -> Answer:
    """The cheaper one of two, with the first one's status."""
    if other is None or other.choice is None:
        return answer
    if answer.choice is not None and _cost(problem, answer) <= _cost(problem, other):
        return answer
    return replace(answer, choice=other.choice, recomputed=other.recomputed)


def _solve_apart(
    problem: Problem,
    apart: Sequence[int],
    folded: Answer,
    bound: float | None,
    points: set[int],
    capacity: int,
    time_limit: float,
) -> tuple[Answer, float | None]:
    """The problem without folding, as far as the time goes."""
    known = folded if folded.choice is not None else None
    answer, _ = _solve(problem, Model(problem, apart), capacity, time_limit, points, known)
    if answer.choice is None:
        return folded, bound
    least = _cost(problem, answer) if answer.optimal else bound
    return _better(problem, answer, known), least


def _improve(
    problem: Problem, model: Model, answer: Answer, bound: float | None, capacity: int, left: Callable[[], float]
) -> Answer:
    """A plan in which copies decide alike, as long as it is away from the bound: with fewer copies recomputed, each deciding
    for itself what it recomputes, or those that are recomputed sharded otherwise than the others."""

    def is_close() -> bool:
        return _distance(_cost(problem, answer), bound) <= RECOMPUTE_GAP

    if answer.recomputed and not is_close():
        answer = _recompute_fewer(problem, model, answer, capacity)
    if not is_close():
        answer = _shard_then_recompute(problem, model, answer, capacity, left) or answer
    if answer.recomputed and not is_close():
        answer = _solve_split(problem, model.same, answer, capacity, left() / 2)
    return answer


def _recompute_fewer(problem: Problem, model: Model, answer: Answer, capacity: int) -> Answer:
    """The same choice with no more of a block's copies recomputed than have to be: the first ones, whose activations would be
    kept longest."""
    apart, choice = problem.ledger(model.same, model.group_numbers, apart=True), answer.choice
    if choice is None or not apart.fits(choice, answer.recomputed):
        return answer

    def without(regions: Iterable[int]) -> Recomputed:
        gone = set(regions)
        return answer.recomputed - gone - {kept for region in gone for kept in problem.keeps[region]}

    def fits(recomputed: Recomputed) -> bool:
        return max(apart.totals(choice, recomputed)[problem.whole]) <= capacity

    def made(region: int) -> int:
        """Bytes that a region's ops make: where only bytes that are sent count, what says how much work it is."""
        ops = (problem.graph.stages[number].op for number in numbered[region].stages)
        return sum(problem.graph.factors.values[result].nbytes for op in ops if op is not None for result in op.results)

    numbered = {region.number: region for region in problem.regions}
    copies: dict[int, list[int]] = {}
    for region, first in model.ledger.regions.items():
        if region in answer.recomputed:
            copies.setdefault(first, []).append(region)
    gone: list[int] = []
    all_of = problem.again(choice, answer.recomputed)
    dearest = sorted(copies.values(), key=lambda own: (problem.again(choice, without(own)) - all_of, -made(own[0])))
    for own in dearest:
        few, many = -1, len(own)
        while many - few > 1:
            count = (few + many) // 2
            few, many = (few, count) if fits(without((*gone, *own[count:]))) else (count, many)
        gone += own[many:]
    return replace(answer, recomputed=without(gone))


def _solve_split(problem: Problem, same: Sequence[int], known: Answer, capacity: int, time_limit: float) -> Answer:
    """Copies that are recomputed may choose otherwise than those that are not."""
    last = max(item for item in known.recomputed if isinstance(item, int))
    following = [region for region in problem.regions if region.number > last]
    if not following:
        return known
    model = Model(problem, split(problem.graph, same, following[0].stages[0]))
    answer, _ = _solve(problem, model, capacity, time_limit)
    if answer.choice is None:
        return known
    if answer.recomputed:
        answer = _recompute_fewer(problem, model, answer, capacity)
    return answer if _cost(problem, answer) < _cost(problem, known) else known


def _shard_then_recompute(
    problem: Problem, model: Model, known: Answer | None, capacity: int, left: Callable[[], float]
) -> Answer | None:
    """Each copy of a block decides for itself what it recomputes and keeps, where the sharding is settled: as it would be if
    memory were no matter, as without recomputing, or as it is known. None where nothing fits."""
    frugal = _with_slack(problem, _frugal(model, left() / 4))
    cheap = [model.solve({}, capacity, time_limit=left() / 4), _solve(problem, model, frugal, left() / 4)[0]]
    best = known
    answers = [answer for answer in (*cheap, known) if answer is not None]
    for choice, own in {answer.choice: answer for answer in answers if answer.choice is not None}.items():
        try:
            found = solve(problem.decided(choice), capacity, use_folding=False, time_limit=left() / 2)
        except (InfeasibleError, OutOfTimeError):
            continue
        answer = replace(own, choice=choice, recomputed=found.recomputed)
        best = answer if best is None else _better(problem, best, answer)
    return best


def _pairs(problem: Problem, same: Sequence[int]) -> int:
    """Between how many pairs of layouts tensors may be resharded, where copies share a decision."""
    graph = problem.graph
    found = 0
    for storage, uses in graph.uses.items():
        entry = graph.storages[storage]
        made = len({own[entry.result] for own in graph.stages[entry.maker].made})
        found += sum(made * len(set(use.wanted)) for use in uses if same[use.stage] == use.stage)
    return found


def _one_dim_after_another(problem: Problem, capacity: int | None, time_limit: float) -> Solution | None:
    """A plan that fits: what the first mesh dim shards is decided as if there were no others, and as much more memory; then
    what the next one does. No bound is known of it. None where that leads nowhere."""
    started, sizes = time.perf_counter(), problem.graph.mesh.sizes
    on_each = [[_on_each_dim(strategy) for strategy in stage.strategies] for stage in problem.graph.stages]
    choice: tuple[int, ...] | None = None
    solution: Solution | None = None
    for dim in range(len(sizes)):
        strategies = []
        for stage, own in enumerate(on_each):
            known = () if choice is None else own[choice[stage]][:dim]
            strategies.append(_first_of_alike(own, known, dim))
        limit = max((started + time_limit - time.perf_counter()) / (len(sizes) - dim), time_limit / 10)
        more = None if capacity is None else capacity * math.prod(sizes[dim + 1 :])
        try:
            solution = solve(problem.restricted(strategies), more, by_dims=False, time_limit=limit)
        except (InfeasibleError, OutOfTimeError):
            return None
        choice = tuple(own[k] for own, k in zip(strategies, solution.choice, strict=True))
    if choice is None or solution is None:
        return None
    return replace(solution, choice=choice, bound=0.0, status="Feasible", seconds={"solve": time.perf_counter() - started})


def _first_of_alike(strategies: Sequence[tuple], known: tuple, dim: int) -> list[int]:
    """Of the strategies that do as is known on earlier mesh dims, those that differ on this one; of several that differ only on
    later ones, one that is whole there, or else cut as on this one."""
    found: dict[tuple, tuple[tuple[bool, bool], int]] = {}
    for k, own in enumerate(strategies):
        if own[:dim] == known:
            later = own[dim + 1 :]
            otherwise = any(set(placed) - {R} for _, placed in later), any(cut != own[dim][0] for cut, _ in later)
            found[own[: dim + 1]] = min(found.get(own[: dim + 1], ((True, True), k)), (otherwise, k))
    return sorted(k for _, k in found.values())


def _on_each_dim(strategy: Strategy) -> tuple[tuple[Any, tuple[Placement, ...]], ...]:
    """What each mesh dim cuts, and how it places operands and results."""
    layouts = (*strategy.operands, *strategy.results)
    return tuple((cut, tuple(layout[m] for layout in layouts)) for m, cut in enumerate(strategy.cuts))


def _answer(own: Solution) -> Answer:
    return Answer("Feasible", False, None, own.choice, own.recomputed, own.solver, own.variables, own.constraints)


def _infeasible(problem: Problem, model: Model, capacity: int, time_limit: float) -> InfeasibleError:
    answer, _ = _solve(problem, model, None, time_limit)
    if answer.choice is None:
        raise out_of_time(time_limit)
    least, where = problem.peak(answer.choice, answer.recomputed)
    recomputes = bool(problem.regions)  # as much as helps, in the plan that needs least
    return InfeasibleError(
        where=problem.graph.stages[where.stage].name,
        remedy="use more ranks or a smaller batch"
        + (", or recompute activations" if problem.graph.training and not recomputes else ""),
        point=problem.show_point(where),
        needed_bytes=least,
        capacity_bytes=capacity,
        least_bytes=least,
    )
