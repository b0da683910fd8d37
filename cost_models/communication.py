"""What a primitive moves: wire bytes per device, the paper's volume, and seconds by the alpha-beta model.

For each mesh dim of N ranks and a tensor of M bytes (M already divided by what other mesh dims shard):

    primitive        forward             backward                      paper's Table 8 (forward)
    switch           M/N (N-1)/N         the same                      M/N
    split            0                   M (N-1)/N (all-gather)        0
    gather           M (N-1)/N           0                             M
      partial grad   M (N-1)/N           M (N-1)/N (reduce-scatter)    M
    reduce           2M (N-1)/N          0                             2M
      partial grad   2M (N-1)/N          2M (N-1)/N                    2M
    reduce_scatter   M (N-1)/N           M (N-1)/N (all-gather)        M
    replicate        0                   2M (N-1)/N (all-reduce)       0
    halo             what ranks lack     the same                      the same

Wire bytes are what a device sends in a bandwidth-optimal collective, the mean over devices where shards are uneven.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsp_auto.shards import shard_sizes

from .hardware import Hardware, Link


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


def switch_bytes(nbytes: int, source_size: int, target_size: int, ranks: int) -> float:
    """Mean wire bytes of an all-to-all that leaves a factor of `source_size` for one of `target_size`: what rank r holds
    of the one, less what it keeps of the other."""
    if source_size % ranks == 0 or target_size % ranks == 0:
        return nbytes * (ranks - 1) / ranks / ranks
    kept = sum(a * b for a, b in zip(shard_sizes(source_size, ranks), shard_sizes(target_size, ranks), strict=True))
    return nbytes * (1 - kept / (source_size * target_size)) / ranks


def primitive_cost(
    primitive: str,
    nbytes: int | float,
    ranks: int,
    *,
    sizes: tuple[int, int] = (0, 0),
    grad: bool,
    partial_grad: bool = False,
    hardware: Hardware | None = None,
    mesh_dim: str = "",
) -> Cost:
    """The cost of one primitive on a tensor of `nbytes` over `ranks`.

    sizes: of the factor that is sharded before and the one after, for `switch`.
    grad: whether a gradient comes back. partial_grad: the replicated side's gradient is Partial.
    """
    whole = nbytes * (ranks - 1) / ranks
    if primitive == "switch":
        forward = backward = switch_bytes(nbytes, *sizes, ranks)
        paper = nbytes / ranks
    else:
        forward, backward, paper = {
            "split": (0.0, 0.0 if partial_grad else whole, 0.0),
            "gather": (whole, whole if partial_grad else 0.0, nbytes),
            "reduce": (2 * whole, 2 * whole if partial_grad else 0.0, 2 * nbytes),
            "reduce_scatter": (whole, whole, nbytes),
            "replicate": (0.0, 2 * whole, 0.0),
        }[primitive]
    backward = backward if grad else 0.0
    collectives = (forward > 0) + (backward > 0)
    seconds = 0.0
    if hardware is not None:
        link = hardware.link(mesh_dim)
        ring = 2 if primitive in ("reduce", "replicate") else 1
        seconds = sum(_seconds(link, amount, ranks, ring) for amount in (forward, backward) if amount)
    return Cost(forward, backward, collectives, paper, seconds)


def halo_cost(sent: float, ranks: int, *, grad: bool, hardware: Hardware | None = None, mesh_dim: str = "") -> Cost:
    """Of a `halo` in which a device sends `sent` bytes, in the mean; they come back as gradients."""
    if not sent:
        return FREE
    ways = 2 if grad else 1
    # To the neighbours: no ring goes round.
    seconds = 0.0 if hardware is None else ways * _seconds(hardware.link(mesh_dim), sent, 2, 1)
    return Cost(sent, sent if grad else 0.0, ways, sent, seconds)


def _seconds(link: Link, wire_bytes: float, ranks: int, rings: int) -> float:
    """alpha-beta: a latency for each of the N-1 steps of a ring, and the bytes over the bandwidth."""
    return rings * (ranks - 1) * link.latency + wire_bytes / link.bandwidth
