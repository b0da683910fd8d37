"""How a dim is cut over ranks: the one place that knows.

Shards follow `torch.tensor_split`: rank r of n holds s // n elements of a dim of size s, and one more where
r < s % n. So there are at most two distinct sizes, the larger ones first, and a shard may be empty.
"""

from __future__ import annotations


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


def _divide(size: int, ranks: int) -> tuple[int, int]:
    size = int(size)  # under a compiler with dynamic shapes a sharded size becomes a constant here
    if size < 0:
        raise ValueError(f"a dim cannot have {size} elements")
    if ranks < 1:
        raise ValueError(f"cannot shard over {ranks} ranks")
    return divmod(size, ranks)
