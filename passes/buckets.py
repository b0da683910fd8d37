"""Buckets: parameters whose gradients are all-reduced together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsp_auto.cost_models.state import packed

from .layout import Step
from .nodes import ValueId
from .problem import Resharding
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
    """Parameters whose only resharding is `replicate`, in the order of their first use; one dtype a bucket, or one
    parameter (see `StageGraph.in_buckets`)."""
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
    ready.sort(key=lambda item: item[0])
    found = []
    gradients = [((tuple(s.mesh_dims for s in own.steps), dtype), nbytes) for _, own, dtype, nbytes in ready]
    for bucket in packed(gradients, graph.in_buckets):
        own = [ready[n] for n in bucket]
        found.append(Bucket(tuple(item[1] for item in own), sum(item[3] for item in own)))
    return tuple(found)
