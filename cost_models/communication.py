"""What a primitive moves: wire bytes per device, the paper's volume, and seconds by the alpha-beta model.

For N ranks (of one mesh dim, or of several together) and a tensor of M bytes (M already divided by what other mesh dims shard):

    primitive        forward             backward                      paper's Table 8 (forward)
    switch           M/N (N-1)/N         the same                      M/N
      hierarchical   M/N (over each dim) the same                      M/N
    split            0                   M (N-1)/N (all-gather)        0
    gather           M (N-1)/N           0                             M
      partial grad   M (N-1)/N           M (N-1)/N (reduce-scatter)    M
    reduce           2M (N-1)/N          0                             2M
      partial grad   2M (N-1)/N          2M (N-1)/N                    2M
    reduce_scatter   M (N-1)/N           M (N-1)/N (all-gather)        M
    replicate        0                   2M (N-1)/N (all-reduce)       0
    halo             what ranks lack     the same                      the same
    ring             2M (N-1)/N          4M (N-1)/N                    2M (keys and values of M bytes each)

Wire bytes are what a device sends in a bandwidth-optimal collective, the mean over devices where shards are uneven. Seconds are
those of the collective (see `hardware`) and of the copies that pack what is sent and unpack what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .hardware import Hardware

Dims = Sequence[tuple[str, int]]  # names and sizes of the mesh dims that something goes over, outermost first


@dataclass(frozen=True)
class Cost:
    """Of one primitive, per device: bytes on the wire, collectives issued, the paper's volume, and seconds."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    collectives: int = 0
    paper_volume: float = 0.0
    seconds: float = 0.0

    @property
    def wire_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_bytes + other.forward_bytes,
            self.backward_bytes + other.backward_bytes,
            self.collectives + other.collectives,
            self.paper_volume + other.paper_volume,
            self.seconds + other.seconds,
        )


FREE = Cost()


@dataclass(frozen=True)
class _Way:
    """One direction of a primitive: its collective, and in units of the whole tensor what a device sends, what it copies, and
    what the paper counts."""

    collective: str = ""
    sent: float = 0.0
    copied: float = 0.0
    paper: float = 0.0


def _ways(primitive: str, ranks: int, leaves: float, partial_grad: bool) -> tuple[_Way, _Way]:
    most, part = (ranks - 1) / ranks, 1 / ranks
    switch = _Way("all_to_all", part * leaves, 2 * part, part)
    gather, scatter = _Way("all_gather", most, 1, 1), _Way("reduce_scatter", most, 1, 1)
    cut, reduce = _Way(copied=part), _Way("all_reduce", 2 * most, 0, 2)
    nothing = _Way()
    return {
        "switch": (switch, switch),
        "split": (cut, cut if partial_grad else gather),
        "gather": (gather, scatter if partial_grad else cut),
        "reduce": (reduce, reduce if partial_grad else nothing),
        "reduce_scatter": (scatter, gather),
        "replicate": (nothing, _Way("all_reduce", 2 * most, 2, 2)),  # in buckets, which are packed and unpacked
    }[primitive]


def collective_of(primitive: str) -> str:
    """The collective, one of `hardware.KINDS`, in which a primitive sends something forward; empty where there is none."""
    return _ways(primitive, 2, 0.5, False)[0].collective


def hierarchical_cost(
    nbytes: float, ranks: int, leaves: tuple[float, float], *, grad: bool, hardware: Hardware | None = None, dims: Dims = ()
) -> Cost:
    """Of a `switch` over several mesh dims that goes over the inner ones first and then over the outermost.

    leaves: of its part, the shares that a device sends over the outer dim, and over the inner ones.
    """
    held, ways = nbytes / ranks, 2 if grad else 1
    outer, inner = (held * share for share in leaves)
    seconds = 0.0
    if hardware is not None:
        # Packed, put in order between the two, and unpacked.
        over = ((outer, dims[:1], 2 * held), (inner, dims[1:], 2 * held))
        seconds = ways * sum(_seconds(hardware, "all_to_all", sent, own, copied) for sent, own, copied in over)
    sent = outer + inner
    return Cost(sent, sent if grad else 0.0, 2 * ways, held, seconds)


def primitive_cost(
    primitive: str,
    nbytes: int | float,
    ranks: int,
    *,
    leaves: float | None = None,
    grad: bool,
    partial_grad: bool = False,
    hardware: Hardware | None = None,
    dims: Dims = (),
) -> Cost:
    """The cost of one primitive on a tensor of `nbytes` over `ranks`.

    leaves: for `switch`, the share of its part that a device sends away, (N-1)/N if all parts are even.
    grad: whether a gradient comes back. partial_grad: the replicated side's gradient is Partial. dims: where it goes, for
    seconds.
    """
    forward, backward = _ways(primitive, ranks, (ranks - 1) / ranks if leaves is None else leaves, partial_grad)
    ways = (forward, backward) if grad else (forward,)
    seconds = 0.0
    if hardware is not None:
        seconds = sum(_seconds(hardware, way.collective, way.sent * nbytes, dims, way.copied * nbytes) for way in ways)
    return Cost(
        forward.sent * nbytes,
        backward.sent * nbytes if grad else 0.0,
        sum(way.sent > 0 for way in ways),
        forward.paper * nbytes,
        seconds,
    )


def halo_cost(sent: float, *, grad: bool, hardware: Hardware | None = None, dims: Dims = ()) -> Cost:
    """Of a `halo` in which a device sends `sent` bytes, in the mean; they come back as gradients."""
    if not sent:
        return FREE
    ways = 2 if grad else 1
    seconds = 0.0 if hardware is None else ways * _seconds(hardware, "send", sent, dims, 2 * sent)
    return Cost(sent, sent if grad else 0.0, ways, sent, seconds)


def ring_cost(
    forward_bytes: float,
    backward_bytes: float,
    forward_collectives: int,
    backward_collectives: int,
    *,
    hardware: Hardware | None = None,
    dims: Dims = (),
) -> Cost:
    """Of keys and values that go round; bytes are what a device sends in the mean."""
    seconds = 0.0
    ways = ((forward_bytes, forward_collectives), (backward_bytes, backward_collectives))
    if hardware is not None:
        seconds = sum(n * _seconds(hardware, "send", sent / n, dims, 2 * sent / n) for sent, n in ways if n)
    ranks = 1
    for _, size in dims:
        ranks *= size
    paper = forward_bytes * ranks / (ranks - 1) if ranks > 1 else 0.0
    return Cost(forward_bytes, backward_bytes, forward_collectives + backward_collectives, paper, seconds)


def _seconds(hardware: Hardware, collective: str, sent: float, dims: Dims, copied: float) -> float:
    moved = hardware.copy_seconds(copied) if copied else 0.0
    return moved + (hardware.collective_seconds(collective, sent, dims) if sent else 0.0)
