"""Buckets: parameters whose gradients are all-reduced together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .factorize import ValueId
from .problem import Resharding
from .stages import StageGraph

# As DDP's default: large enough for bandwidth, small enough that the all-reduce starts while backward still runs.
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Parameters that one `replicate` serves on each of `mesh_dims`."""

    storages: tuple[ValueId, ...]
    mesh_dims: tuple[int, ...]
    nbytes: int


def make_buckets(graph: StageGraph, reshardings: Iterable[Resharding]) -> tuple[Bucket, ...]:
    """Parameters whose only resharding is `replicate`, in the order of their first use; one dtype a bucket."""
    by_storage: dict[ValueId, list[Resharding]] = {}
    for resharding in reshardings:
        by_storage.setdefault(resharding.storage, []).append(resharding)
    ready = []
    for storage, own in by_storage.items():
        entry = graph.storages[storage]
        if entry.kind != "parameter" or len(own) != 1 or {step.primitive for step in own[0].steps} != {"replicate"}:
            continue
        first_use = min(use.stage for use in graph.uses[storage])
        mesh_dims = tuple(step.mesh_dim for step in own[0].steps)
        ready.append((first_use, storage, mesh_dims, entry.root))
    found: dict[tuple, list[Bucket]] = {}
    for _, storage, mesh_dims, root in sorted(ready, key=lambda item: item[0]):
        buckets = found.setdefault((mesh_dims, root.dtype), [])
        if buckets and buckets[-1].nbytes + root.nbytes <= BUCKET_BYTES:
            last = buckets[-1]
            buckets[-1] = Bucket((*last.storages, storage), mesh_dims, last.nbytes + root.nbytes)
        else:
            buckets.append(Bucket((storage,), mesh_dims, root.nbytes))
    return tuple(bucket for buckets in found.values() for bucket in buckets)
