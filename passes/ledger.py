"""Ledger: the program points of a problem as counts of distinct terms, where copies of repeated blocks share theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from .lifetimes import Alive, Extra, Held, Holder, Internal, Kept, Packed, Reach, Resharded, Slot, Term, is_state
from .nodes import ValueId
from .stages import Use

if TYPE_CHECKING:
    from .problem import Problem, Recomputed


class Ledger:
    """`terms[k]` stands for all terms that have its bytes under every choice in which copies choose alike; `counts[p, k]` says
    how many of them there are at point p; `state[k]` whether they are no activations (see `is_state`).

    same: see `fold`. groups: the number of each storage among those that look alike. apart: copies of a region may be
    recomputed or not, each for itself.
    """

    def __init__(
        self, problem: Problem, same: Sequence[int], groups: Mapping[ValueId, int], apart: bool = False
    ) -> None:
        self.problem, self.same, self.groups, self.apart = problem, same, groups, apart
        self._known: dict[tuple, int] = {}
        self._reaches: dict[int, tuple] = {}
        self._holders: dict[int, tuple] = {}
        self.terms: list[Term] = []
        self.counts, self.state = self._count()

    def fits(self, choice: Sequence[int], recomputed: Recomputed) -> bool:
        """Whether copies choose alike."""
        alike = all((own in recomputed) == (first in recomputed) for own, first in self.regions.items())
        if not self.apart:
            together: dict[tuple, set[bool]] = {}
            for kept in (kept for region in self.regions for kept in self.problem.keeps.get(region, ())):
                together.setdefault(self.of_kept(kept), set()).add(kept in recomputed)
            alike = alike and all(len(own) == 1 for own in together.values())
        return alike and all(choice[own] == choice[first] for own, first in enumerate(self.same))

    def totals(self, choice: Sequence[int], recomputed: Recomputed) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Bytes at every point, of activations and of everything; 0 where a region would run again that does not."""
        recomputed |= self.problem.forced
        nbytes = numpy.array([self.problem.term_bytes(term, choice, recomputed) for term in self.terms], dtype=float)
        whole = self.counts @ nbytes
        activations = whole - self.counts[:, self.state] @ nbytes[self.state]
        for number, point in enumerate(self.problem.points):
            if point.again is not None and point.again not in recomputed:
                whole[number] = activations[number] = 0
        return activations, whole

    def _count(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        state: dict[int, bool] = {}
        changes: list[tuple[int, int, int]] = []  # point, term, how many more
        momentary: list[tuple[int, int, int]] = []
        held: dict[Slot, int] = {}
        for row, point in enumerate(self.problem.points):
            for slot, term in point.changes:
                if slot in held:
                    changes.append((row, held.pop(slot), -1))
                if term is not None:
                    number = held[slot] = self._number(term)
                    changes.append((row, number, 1))
                    state[number] = is_state(slot)
            for term in point.momentary:
                number = self._number(term)
                momentary.append((row, number, 1))
                state[number] = is_state(None, term)
        counts = numpy.zeros((len(self.problem.points), len(self.terms)))
        _add_at(counts, changes)
        numpy.cumsum(counts, axis=0, out=counts)
        _add_at(counts, momentary)
        return counts, numpy.array([state[n] for n in range(len(self.terms))], dtype=bool)

    def _number(self, term: Term) -> int:
        key = self._key(term)
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self.terms)
            self.terms.append(term)
        return number

    def _key(self, term: Term) -> tuple:
        if isinstance(term, Alive):
            reaches = [tuple([self._reach(reach) for reach in own]) for own in (term.now, term.before, term.after)]
            holders = frozenset([self._holder(holder) for holder in term.holders])
            return (self.groups[term.storage], term.flavor, term.made, *reaches, holders)
        if isinstance(term, (Internal, Extra)):
            region = self.of_region(term.region) if isinstance(term, Internal) else None
            back = isinstance(term, Extra) and term.back
            kept = self.of_kept(term.kept) if isinstance(term, Internal) and term.kept is not None else None
            return (type(term), self.same[term.stage], term.nbytes, region, back, kept)
        if isinstance(term, Held):
            return (Held, self.groups[term.storage], term.what)
        if isinstance(term, Packed):
            return (Packed, term.nbytes)
        if isinstance(term, Resharded):
            return (Resharded, self.groups[term.storage], tuple(map(self._use, term.uses)))
        return (type(term), self.groups[term.use.storage], self._use(term.use), term.back)

    def _use(self, use: Use) -> tuple[int, int, int]:
        return self.groups[use.storage], self.same[use.stage], use.operand

    def _reach(self, reach: Reach) -> tuple:
        key = self._reaches.get(id(reach))
        if key is None:
            key = self._reaches[id(reach)] = (self._use(reach.use), tuple(map(self._use, reach.unless)))
        return key

    def _holder(self, holder: Holder) -> tuple:
        key = self._holders.get(id(holder))
        if key is None:
            reach = None if holder.reach is None else self._reach(holder.reach)
            key = self._holders[id(holder)] = (
                reach,
                self.of_region(holder.region),
                self.of_region(holder.takes),
                holder.only,
                None if holder.kept is None else self.of_kept(holder.kept),
            )
        return key

    def of_kept(self, kept: Kept) -> tuple:
        """The same for all that is kept together."""
        return kept if self.apart else (kept.what, self.same[kept.stage], self.groups[kept.storage])

    def of_region(self, region: int | None) -> int | None:
        """The first of the regions that are recomputed together; -1 for those that are in any case."""
        if region is None:
            return None
        return -1 if region in self.problem.forced else self.regions[region]

    @cached_property
    def regions(self) -> Mapping[int, int]:
        """For each region that may be recomputed the first one whose stages its own share."""
        if self.apart:
            return {region.number: region.number for region in self.problem.regions if not region.forced}
        first: dict[int, int] = {}
        found: dict[int, int] = {}
        for region in self.problem.regions:
            if not region.forced:
                own = min((first[self.same[s]] for s in region.stages if self.same[s] in first), default=region.number)
                found[region.number] = own
                for stage in region.stages:
                    first.setdefault(self.same[stage], own)
        return found


def _add_at(counts: numpy.ndarray, entries: Sequence[tuple[int, int, int]]) -> None:
    """Adds to `counts` what (row, column, number) say."""
    if entries:
        rows, columns, numbers = numpy.array(entries).T
        numpy.add.at(counts, (rows, columns), numbers)
