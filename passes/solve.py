"""Solve: the cheapest plan that fits, by the integer program of `model`.

Without a capacity, replicating everything would send nothing. So then Capacity is the least peak that any plan reaches,
and a slack. Repeated blocks share their variables (`fold`), and the mean over the copies gives a lower bound, which the
plan carries. A plan that is further from its bound than `GAP` is solved for again without sharing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsp_auto.errors import InfeasibleError, StrategyError

from .fold import fold
from .model import Answer, Model
from .problem import Problem

SLACK = 0.10
# The solver's tolerance and the tie-breakers are no difference in cost.
TOLERANCE = 1e-6
# A folded plan this close to its bound is not worth solving the whole problem for.
GAP = 0.02
# Folding that leaves more than this share of the stages is not worth solving twice for.
FOLDED = 0.7
# Seconds that the unfolded problem gets at least.
APART_SECONDS = 5.0
# With more program points than this, those that bind are found by looking at what a solution exceeds.
FEW_POINTS, NEW_POINTS = 400, 24


class OutOfTimeError(StrategyError):
    """The solver found no plan in the time that it had."""


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
    gap: float = GAP,
    time_limit: float = 60.0,
    unbounded: bool = False,
) -> Solution:
    """The cheapest choice whose peak stays within `capacity` bytes.

    capacity: bytes of activations per device; None: the least peak that a plan (with repeated blocks alike) reaches, and 10%.
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
    model = Model(problem, same)
    if capacity is None:
        capacity = int(_least_peak(problem, model, left())[0] * (1 + SLACK))
    answer, points = _solve(problem, model, capacity, left())
    bound = _cost(problem, answer) if answer.optimal else _relaxed(model, points, capacity, left())
    if same != apart:
        bound = _lower_bound(problem, same, answer, capacity, left())
        if answer.choice is None or _distance(_cost(problem, answer), bound) > gap:
            # What takes the folded problem long takes the whole one too long.
            limit = min(left(), max(APART_SECONDS, 3 * (time.perf_counter() - started)))
            answer, bound = _solve_apart(problem, apart, answer, bound, points, capacity, limit)
    if answer.choice is None:
        if answer.status != "Infeasible":
            raise out_of_time(time_limit)
        raise _infeasible(problem, model, capacity, left())
    objective = problem.cost(answer.choice)
    return Solution(
        choice=answer.choice,
        objective=objective,
        bound=objective if bound is not None and _distance(objective, bound) < TOLERANCE else bound or 0.0,
        status=answer.status,
        solver=answer.solver,
        variables=answer.variables,
        constraints=answer.constraints,
        peak_bytes=problem.peak(answer.choice)[0],
        capacity_bytes=capacity,
        folded=same != apart,
        unbounded=model.solve({}, capacity, integer=False, time_limit=left()).value if unbounded else None,
        seconds={"solve": time.perf_counter() - started},
    )


def _cost(problem: Problem, answer: Answer) -> float | None:
    return None if answer.choice is None else problem.cost(answer.choice)


def _distance(objective: float | None, bound: float | None) -> float:
    if objective is None or bound is None:
        return float("inf")
    return max(objective - bound, 0.0) / objective if objective > 0 else 0.0


def _solve(
    problem: Problem, model: Model, capacity: int | None, time_limit: float, points: set[int] | None = None
) -> tuple[Answer, set[int]]:
    """The cheapest choice within `capacity`, or without one the choice of the least peak; and the program points that it
    took to find it. A point is looked at once a choice exceeds it."""
    few = len(problem.points) <= FEW_POINTS
    if few:
        rows = model.points()
        points = set(rows)
    else:
        points = set(points or ()) | _high_points(problem)
    deadline = time.perf_counter() + time_limit
    held = capacity
    while True:
        left = max(deadline - time.perf_counter(), min(time_limit, 0.1))
        answer = model.solve(rows if few else model.points(points), held, time_limit=left)
        if answer.choice is None:
            return answer, points
        totals = problem.totals(answer.choice)
        limit = capacity if capacity is not None else max((totals[n] for n in points), default=0)
        exceeded = sorted((n for n, total in enumerate(totals) if total > limit), key=lambda n: -totals[n])
        if not exceeded:
            return answer, points
        if time.perf_counter() > deadline:
            # What was found last does not fit: then there is none.
            return (answer if capacity is None else replace(answer, status="Not Solved", choice=None)), points
        new = [n for n in exceeded if n not in points]
        if new and not few:
            points |= set(new[:NEW_POINTS])
        elif capacity is None:
            return answer, points
        else:  # by less than the solver's tolerance
            held -= totals[exceeded[0]] - capacity + 1


def _high_points(problem: Problem) -> set[int]:
    """Points at which most may be alive: the last one, where everything is kept, and those with the largest results."""
    values = problem.graph.factors.values
    stages = problem.graph.stages
    sizes = [sum(values[v].nbytes for v in (*stages[p.stage].op.operands, *stages[p.stage].op.results)) for p in problem.points]
    largest = sorted(range(len(sizes)), key=lambda n: -sizes[n])[:NEW_POINTS]
    return {len(sizes) - 1, *largest}


def _least_peak(problem: Problem, model: Model, time_limit: float) -> tuple[int, tuple[int, ...]]:
    answer, _ = _solve(problem, model, None, time_limit)
    if answer.choice is None:
        raise out_of_time(time_limit)
    return problem.peak(answer.choice)[0], answer.choice


def out_of_time(time_limit: float) -> OutOfTimeError:
    """To be raised where no plan was found in so many seconds."""
    return OutOfTimeError(
        asked=f"time_limit={time_limit:g}", found="the solver found no plan in so many seconds", remedy="give it more"
    )


def _relaxed(model: Model, points: set[int], capacity: int, time_limit: float) -> float | None:
    """A lower bound where the solver ran out of time: the problem without integrality."""
    return model.solve(model.points(points), capacity, integer=False, time_limit=time_limit).value


def _lower_bound(
    problem: Problem, same: Sequence[int], answer: Answer, capacity: int, time_limit: float
) -> float | None:
    """No plan costs less: the relaxation over the means of repeated blocks, at the points nearest to the capacity."""
    if answer.choice is None:
        return None
    totals = problem.totals(answer.choice)
    highest = max(range(len(totals)), key=totals.__getitem__)
    # At the last point everything is kept, by all copies of every block.
    means = Model(problem, same, average=True)
    relaxed = means.solve(means.points({highest, len(totals) - 1}), capacity, integer=False, time_limit=time_limit)
    return relaxed.value


def _solve_apart(
    problem: Problem, apart: Sequence[int], folded: Answer, bound, points: set[int], capacity: int, time_limit: float
) -> tuple[Answer, float | None]:
    """The problem without folding, as far as the time goes."""
    answer, _ = _solve(problem, Model(problem, apart), capacity, time_limit, points)
    if answer.choice is None:
        return folded, bound
    known = problem.cost(answer.choice) if answer.optimal else bound
    if folded.choice is not None and problem.cost(folded.choice) <= problem.cost(answer.choice):
        answer = replace(folded, variables=answer.variables, constraints=answer.constraints)
    return answer, known


def _infeasible(problem: Problem, model: Model, capacity: int, time_limit: float) -> InfeasibleError:
    least, choice = _least_peak(problem, model, time_limit)
    _, where = problem.peak(choice)
    stage = problem.graph.stages[where.stage]
    return InfeasibleError(
        where=stage.name,
        point=f"{where.phase} of {stage.name} ({stage.op.name})",
        needed_bytes=least,
        capacity_bytes=capacity,
        least_bytes=least,
    )
