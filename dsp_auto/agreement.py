"""Agreement: before the first collective of a program, every rank knows that the others run the same one.

The checks go over a gloo group of their own, so that on GPUs they neither wait for the device nor mix with its collectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import AgreementError


class Agreement:
    """The ranks of one mesh, talking about what they are about to do."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank()) if dist.is_initialized() else 0
        self._group: Any = None

    @property
    def group(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return self._group

    def check(self, key: str, describe: Callable[[], Any], asked: str, remedy: str) -> None:
        """Raises AgreementError on every rank where the ranks' keys differ; costs one all-gather of 8 bytes.

        describe: what a person can compare, asked for only then.
        """
        if self.size == 1:
            return
        own = torch.tensor([int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")])
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        if all(torch.equal(other, own) for other in found):
            return
        # Whoever compares like this sees a difference on every rank, so all of them come here.
        told = self.gather(describe())
        raise AgreementError(asked=asked, found=_differences(told), remedy=remedy)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, on every rank; if it raises there, all ranks raise that."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(True, make())]
            except Exception as error:
                outcome = [(False, error)]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=self.ranks[0], group=self.group)
        done, value = outcome[0]
        if not done:
            raise value
        return value

    def together(self, make: Callable[[], Any]) -> Any:
        """What `make` returns here, once it has returned on every rank; if it raises anywhere, every rank raises."""
        error: Exception | None = None
        value = None
        try:
            value = make()
        except Exception as raised:
            error = raised
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = {rank: text for rank, text in enumerate(told) if text is not None}
        if failed:
            rank, text = next(iter(failed.items()))
            raise AgreementError(
                asked="cannot run the model on every rank", found=f"rank {rank} of the mesh failed: {text}"
            )
        return value


def _differences(told: list[Any]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(told):
        groups.setdefault(str(text), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in groups.items()
    )
