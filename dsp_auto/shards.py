"""How a dim is cut over ranks: the one place that knows.

Shards follow `torch.tensor_split`: rank r of n holds s // n elements of a dim of size s, and one more where
r < s % n. So there are at most two distinct sizes, the larger ones first, and a shard may be empty. Where several mesh
dims cut one dim, the inner ones cut each part of the outer ones so.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from functools import lru_cache


def shard_sizes(size: int, ranks: int) -> list[int]:
    """Length of every rank's shard of a dim of `size` elements, in rank order.

    Raises `ValueError` where `size` is negative or `ranks` is not positive.
    """
    small, larger = _divide(size, ranks)
    return [small + 1] * larger + [small] * (ranks - larger)


def shard_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """`(start, length)` of one rank's shard of a dim of `size` elements.

    Raises `ValueError` where `size` is negative, `ranks` is not positive or `rank` is not in [0, ranks).
    """
    small, larger = _divide(size, ranks)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not in [0, {ranks})")
    return rank * small + min(rank, larger), small + (rank < larger)


@lru_cache(maxsize=4096)
def nested_sizes(size: int, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Length of every rank's shard where mesh dims of `ranks`, outermost first, cut a dim of `size` elements one after the
    other; ranks count row-major."""
    sizes = [size]
    for count in ranks:
        sizes = [part for outer in sizes for part in shard_sizes(outer, count)]
    return tuple(sizes)


def _divide(size: int, ranks: int) -> tuple[int, int]:
    size = int(size)  # under a compiler with dynamic shapes a sharded size becomes a constant here
    if size < 0:
        raise ValueError(f"a dim cannot have {size} elements")
    if ranks < 1:
        raise ValueError(f"cannot shard over {ranks} ranks")
    return divmod(size, ranks)


Piece = tuple[int, int, int]  # rank that holds it, start and stop within what that rank holds


def wrapped(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The range `[start, stop)` of a ring of `size` elements, as ranges of `[0, size)` in order."""
    found = []
    while start < stop:
        base = start // size * size
        end = min(stop, base + size)
        found.append((start - base, end - base))
        start = end
    return found or [(0, 0)]


def pieces(held: Sequence[int], start: int, stop: int) -> list[Piece]:
    """Where the range `[start, stop)` of a dim lies of which rank r holds the next `held[r]` elements, in order.

    A range that reaches over an end goes on at the other.
    """
    bounds = [0, *itertools.accumulate(held)]
    found: list[Piece] = []
    for a, b in wrapped(start, stop, bounds[-1]) if stop > start else []:
        rank = bisect.bisect_right(bounds, a) - 1
        while a < b:
            end = min(b, bounds[rank + 1])
            if end > a:
                found.append((rank, a - bounds[rank], end - bounds[rank]))
            a, rank = end, rank + 1
    return found


def exchanged(held: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> int:
    """How many elements travel between ranks, in sum, where rank r holds `held[r]` and needs `[starts[r], stops[r])`."""
    return sum(
        b - a
        for rank, (start, stop) in enumerate(zip(starts, stops, strict=True))
        for holder, a, b in pieces(held, start, stop)
        if holder != rank
    )
