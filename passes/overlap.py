"""Overlap: which collectives are issued before what they give is wanted, so that ops in between run while they are under way.

A resharding stands before the op that wants it. Where other ops stand between the one that makes its tensor and that one, its
collective may be issued earlier: as late as it can be to be done in time, by what kernels and links take on a hardware.
Backward mirrors it by itself, as autograd runs ops in the reverse order of their forward.

What decides is known of the plan as a whole, never of one rank, so all ranks issue their collectives in one order. It never
raises the peak of memory: what is under way is charged to every program point that it passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dsp_auto.cost_models.communication import collective_of
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.primitives import IN_HALVES

from .layout import Layout, Step
from .nodes import ValueId
from .problem import Problem, Resharding
from .solve import Solution
from .stages import OP, Use

# A collective is issued early if that hides at least this share of it: the halves cost the host a little.
WORTH = 0.1
# And no earlier than what takes so many times as long, most of which then hides other collectives.
FARTHEST = 8


@dataclass(frozen=True)
class Early:
    """One collective that is issued early: the last of `steps`, the first ones from `source` to `target`.

    before: the stage before whose op it is issued. wanted: the stage before whose op it is waited for. hidden: seconds of it
    that pass while the stages between run, forward.
    """

    storage: ValueId
    source: Layout
    target: Layout
    steps: tuple[Step, ...]
    before: int
    wanted: int
    hidden: float


def find_early(
    problem: Problem, solution: Solution, hardware: Hardware, seconds: Callable[[int, int], float]
) -> tuple[Early, ...]:
    """In the order in which they are waited for.

    hardware: with the links of the problem's mesh. seconds: of the forward kernels of a stage under one of its strategies.
    """
    return tuple(_Finder(problem, solution, hardware, seconds).find())


class _Finder:
    def __init__(
        self, problem: Problem, solution: Solution, hardware: Hardware, seconds: Callable[[int, int], float]
    ) -> None:
        self.problem, self.graph, self.solution, self.choice = problem, problem.graph, solution, solution.choice
        self.recomputed = solution.recomputed | problem.forced
        self.hardware, self.seconds = hardware, seconds
        self.busy: dict[int, float] = defaultdict(float)  # of a stage: seconds that hide something already

    def find(self) -> Iterator[Early]:
        for storage, wanted, resharding, steps in self._collectives():
            crossed = self._crossed(storage, wanted, resharding)
            if not crossed:
                continue
            step = steps[-1]
            left = whole = self._seconds(storage, step)
            passed: list[tuple[int, float]] = []
            beside = 0.0
            for stage in crossed:
                enough = left <= 0 or beside > FARTHEST * whole
                if enough or not self._has_room(stage, self._taken(storage, stage, resharding, step)):
                    break
                takes = self.seconds(stage, self.choice[stage])
                own = min(left, max(0.0, takes - self.busy[stage]))
                passed.append((stage, own))
                left, beside = left - own, beside + takes
            while passed and not passed[-1][1]:  # nothing that takes any time
                passed.pop()
            if not passed or whole - left < WORTH * whole:
                continue
            first = passed[-1][0]
            for stage, own in passed:
                self.busy[stage] += own
                for point in self.points[stage]:
                    self.totals[point] += self._taken(storage, first, resharding, step)
            yield Early(storage, resharding.source, resharding.target, steps, first, wanted, whole - left)

    def _collectives(self) -> list[tuple[ValueId, int, Resharding, tuple[Step, ...]]]:
        """Of every resharding that begins with something to wait for, in the order in which they are wanted: the tensor, the
        first stage that wants it, and the steps up to the first collective. Those that begin alike go that far together."""
        found: dict[tuple, tuple[ValueId, int, Resharding, tuple[Step, ...]]] = {}
        for resharding in self.problem.known_reshardings(self.choice):
            storage = resharding.storage
            wanted = min(use.stage for use in self.graph.uses[storage] if self._target(use, resharding) == resharding.target)
            sends = [cost.forward_bytes > 0 for cost in resharding.costs]
            if True not in sends:
                continue
            steps = resharding.steps[: sends.index(True) + 1]
            if steps[-1].primitive not in IN_HALVES:
                continue
            key = (storage, steps[-1].after)
            if key not in found or wanted < found[key][1]:
                found[key] = (storage, wanted, resharding, steps)
        return sorted(found.values(), key=lambda entry: entry[1])

    def _target(self, use: Use, resharding: Resharding) -> Layout:
        return self.problem.target(use, resharding.source, use.wanted[self.choice[use.stage]])

    def _crossed(self, storage: ValueId, wanted: int, resharding: Resharding) -> list[int]:
        """The stages that a collective may be issued before, the last first: they run between what makes its tensor and what
        wants it, and stand with it in one checkpoint or in none."""
        region = self._again(self.problem.runs_again(resharding, self.choice))
        found = []
        for stage in range(wanted - 1, self.graph.storages[storage].maker, -1):
            if self._again(self.problem.region_of.get(stage)) != region:
                break
            if self.graph.stages[stage].kind == OP:
                found.append(stage)
        return found

    def _again(self, region: int | None) -> int | None:
        """A region that is recomputed."""
        return region if region in self.recomputed else None

    def _seconds(self, storage: ValueId, step: Step) -> float:
        mesh = self.graph.mesh
        dims = [(mesh.names[m], mesh.sizes[m]) for m in step.mesh_dims]
        sent = self.problem.step_cost(storage, step, grad=False).forward_bytes
        return self.hardware.collective_seconds(collective_of(step.primitive), sent, dims)

    # --- memory

    @cached_property
    def totals(self) -> list[int]:
        """Bytes at every program point, with what is under way."""
        return list(self.problem.totals(self.choice, self.solution.recomputed, whole=True))

    @cached_property
    def peak(self) -> int:
        """Of the plan, whatever is under way."""
        return self.problem.peak(self.choice, self.solution.recomputed, whole=True)[0]

    @cached_property
    def points(self) -> Mapping[int, list[int]]:
        """Of each stage, the program points of its op that are come to."""
        found: dict[int, list[int]] = defaultdict(list)
        for number, (point, nbytes) in enumerate(zip(self.problem.points, self.totals, strict=True)):
            if nbytes:
                found[point.stage].append(number)
        return found

    def _has_room(self, stage: int, nbytes: int) -> bool:
        return all(self.totals[point] + nbytes <= self.peak for point in self.points[stage])

    def _taken(self, storage: ValueId, since: int, resharding: Resharding, step: Step) -> int:
        """Bytes more than without while a collective is under way, from a stage on."""
        ends = [self.problem.nbytes(storage, layout) for layout in (step.before, step.after)]
        taken = max(ends) + max(self.problem.step_buffers(storage, step))
        # What a switch has packed is given back where nobody else reads it; others may send it as it lies.
        later = [use for use in self.graph.uses[storage] if use.stage >= since]
        is_last = all(self._target(use, resharding) == resharding.target for use in later)
        if step.primitive == "switch" and is_last and not self.graph.training:
            if self.graph.storages[storage].kind == "activation":
                taken -= self.problem.nbytes(storage, resharding.source)
        return taken
