"""Buckets: parameters whose gradients are all-reduced together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .layout import Step
from .nodes import ValueId
from .problem import BUCKET_BYTES, Resharding
from .stages import StageGraph


@dataclass(frozen=True)
class Bucket:
    """Parameters that one `replicate` serves in each of their steps, which go over the same mesh dims."""

    reshardings: tuple[Resharding, ...]
    nbytes: int

    @property
    def storages(self) -> tuple[ValueId, ...]:
        return tuple(resharding.storage for resharding in self.reshardings)

    @property
    def steps(self) -> tuple[tuple[Step, ...], ...]:
        """Step by step, that of each parameter."""
        return tuple(zip(*(resharding.steps for resharding in self.reshardings), strict=True))


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
        nbytes = graph.local_bytes(storage, own[0].source)
        ready.append((first_use, own[0], entry.root.dtype, nbytes))
    found: dict[tuple, list[Bucket]] = {}
    for _, own, dtype, nbytes in sorted(ready, key=lambda item: item[0]):
        buckets = found.setdefault((tuple(step.mesh_dims for step in own.steps), dtype), [])
        if buckets and buckets[-1].nbytes + nbytes <= BUCKET_BYTES:
            buckets[-1] = Bucket((*buckets[-1].reshardings, own), buckets[-1].nbytes + nbytes)
        else:
            buckets.append(Bucket((own,), nbytes))
    return tuple(bucket for buckets in found.values() for bucket in buckets)
