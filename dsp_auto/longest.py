"""Longest: how long a sequence may be that fits, for each number of ranks and strategy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import DspError, InfeasibleError, MeshError, NoShardableFactorError
from .mesh import as_mesh
from .passes.capture import Program
from .planner import Options, decide, prepare
from .suggest import least_bytes

# Lengths that are probed for one rank count and strategy, and those of them that may be too short for so many ranks.
PROBES, FEW = 24, 4
# Where the least that any plan needs is so near to the capacity, a plan is asked for to be sure that there is none.
NEAR = 1.05
FURTHEST = 64  # times what was tried: how far one guess may go


@dataclass(frozen=True)
class Longest:
    """The longest sequence that fits with a strategy on `sequence_parallel` ranks.

    value: the largest that was found to fit, None where none was. fails: the least that was found not to; one step above
    `value`, unless the search ended before, and None where none was. refused: what stands in the way where it is not memory.
    """

    strategy: str
    sequence_parallel: int
    value: int | None
    fails: int | None
    refused: str = ""


@dataclass(frozen=True)
class _Probe:
    """Whether one length fits. least: bytes that any plan needs; refused: why there is none in any memory; is_short: a longer
    one may have a plan."""

    fits: bool
    least: int | None = None
    refused: str = ""
    is_short: bool = False

    @property
    def fails(self) -> bool:
        return not self.fits and not self.is_short


def find_longest(
    made: Callable[[int], Program],
    now: int,
    step: int,
    sizes: Sequence[int],
    strategies: Iterable[str],
    options: Callable[[str, int], Options],
    usable: int,
) -> tuple[Longest, ...]:
    """The longest sequences, for every size and strategy.

    made: the program of a length. now: the length to begin with. step: what lengths are multiples of. sizes: numbers of ranks.
    options: what a strategy is planned with on so many. usable: bytes of a device that a plan may use.
    """
    found: list[Longest] = []
    last: dict[str, tuple[int, int]] = {}
    for ranks, name in itertools.product(sizes, strategies):
        own = options(name, ranks)
        before, value = last.get(name, (ranks, now))
        known: dict[int, _Probe] = {}
        for length in _lengths(known, value * ranks // before, usable, step):
            known[length] = _probe(made, length, ranks, own, usable)
        value = max((length for length, probe in known.items() if probe.fits), default=None)
        fails = min((length for length, probe in known.items() if probe.fails and length > (value or 0)), default=None)
        short = [probe.refused for probe in known.values() if probe.is_short]
        refused = short[-1] if short and value is None else known[fails].refused if fails is not None else ""
        found.append(Longest(name, ranks, value, fails, refused))
        if value is not None:
            last[name] = (ranks, value)
    return tuple(found)


def _probe(made: Callable[[int], Program], length: int, ranks: int, options: Options, usable: int) -> _Probe:
    try:
        prepared = prepare(made(length), as_mesh(ranks), options)
        least = least_bytes(prepared)
        if usable < least <= NEAR * usable:
            decide(prepared)
            return _Probe(True, least)
        return _Probe(least <= usable, least)
    except InfeasibleError as error:
        return _Probe(False, error.least_bytes)
    except DspError as error:
        is_short = isinstance(error, (MeshError, NoShardableFactorError))
        return _Probe(False, None, " ".join(str(error).split()), is_short)


def _lengths(known: Mapping[int, _Probe], first: int, usable: int, step: int) -> Iterator[int]:
    """What to probe for the longest that fits, multiples of `step`; `known` is what came of those before. Memory is about
    linear in a length, so a guess is where the line through the two nearest probes comes to the capacity."""
    value, strides = max(first // step, 1) * step, 0
    for count in range(PROBES):
        yield value
        low = max((n for n, probe in known.items() if not probe.fails), default=0)
        high = min((n for n, probe in known.items() if probe.fails and n > low), default=math.inf)
        if high - low <= step or (len(known) > FEW and all(probe.is_short for probe in known.values())):
            return
        value = int(min(_reaches(known, usable), FURTHEST * max(known)) // step) * step
        if not low < value < high:
            # The line ends at what is known already: on from there, faster and faster.
            value = low + (step << strides) if value <= low else int(high) - (step << strides)
            strides += 1
        if high < math.inf and (count % 2 and count > FEW or not low < value < high):  # a staircase more than a line
            value = (low + int(high)) // 2 // step * step


def _reaches(known: Mapping[int, _Probe], usable: int) -> float:
    """The length at which the least that a plan needs comes to the capacity."""
    measured = sorted((abs(probe.least - usable), n, probe.least) for n, probe in known.items() if probe.least)
    if not measured:  # too short for so many ranks, or too long for the model
        return 2 * max(known) if all(probe.is_short for probe in known.values()) else min(known) / 2
    (_, n, least), *others = measured
    for _, other, bytes_ in others:
        if (least - bytes_) * (n - other) > 0:
            return n + (usable - least) * (n - other) / (least - bytes_)
    return n * usable / least
