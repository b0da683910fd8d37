"""Agreement: before the first collective of a program, every rank knows that the others run the same one.

The checks go over a gloo group of their own, so that on GPUs they neither wait for the device nor mix with its collectives.
"""

from __future__ import annotations

import atexit
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .c10d import timeout_of_mesh, world_store
from .errors import AgreementError, MeshError
from .failures import failed

# Of each set of ranks and patience, the group and the world that it was made in.
_groups: dict[tuple[tuple[int, ...], timedelta], tuple[Any, Any]] = {}
atexit.register(_groups.clear)  # `destroy_process_group` does not know them, and their threads end before the interpreter


def _gloo_group(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> Any:
    """A ProcessGroupGloo (whose stub leaves collectives out) of `ranks`, made by these ranks alone.

    Not `dist.new_group`: it either waits for all ranks of the world, or names the group after how many groups this process
    has made, and where some rank has made one more the ranks wait for each other for ever.
    """
    world, key = dist.group.WORLD, (ranks, timeout)
    if key not in _groups or _groups[key][0] is not world:
        store = dist.PrefixStore(f"dsp_auto/{key}", world_store())
        _groups[key] = (world, dist.ProcessGroupGloo(store, rank, len(ranks), timeout))
    return _groups[key][1]


def begin_gather(ranks: tuple[int, ...], rank: int, timeout: timedelta, own: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Begins to gather the tensors of some ranks, of which this is `ranks[rank]`; the result waits for them.

    Raises CommunicationError, at once or in waiting, where one of them does not come.
    """
    found = [torch.empty_like(own) for _ in ranks]
    with _told(ranks):
        work = _gloo_group(ranks, rank, timeout).allgather([found], [own])

    def wait() -> list[torch.Tensor]:
        with _told(ranks):
            work.wait()
        return found

    return wait


@contextmanager
def _told(ranks: Sequence[int]) -> Iterator[None]:
    """Inside, what gloo raises names the ranks that did not come."""
    try:
        yield
    except RuntimeError as error:
        raise failed(ranks, "to agree on what all ranks run next", "", error) from error


class Agreement:
    """The ranks of one mesh, talking about what they are about to do."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ranks: tuple[int, ...] = tuple(mesh.mesh.flatten().tolist())
        self.size = len(self.ranks)
        own = dist.get_rank() if dist.is_initialized() else self.ranks[0]
        if own not in self.ranks:
            raise MeshError(
                asked=f"parallelize over the ranks {', '.join(map(str, self.ranks))}",
                found=f"this is rank {own}",
                remedy="call it on the ranks of the mesh only",
            )
        self.rank = self.ranks.index(own)
        self._mesh = mesh

    def check(self, key: str, describe: Callable[[], Any], asked: str, remedy: str) -> None:
        """Raises AgreementError on every rank where the ranks' keys differ; costs one all-gather of 8 bytes.

        describe: what a person can compare, asked for only then.
        """
        self.begin_check(key, describe, asked, remedy)()

    def begin_check(self, key: str, describe: Callable[[], Any], asked: str, remedy: str) -> Callable[[], None]:
        """`check`, begun now and done by calling the result: in between the ranks need not wait for each other."""
        if self.size == 1:
            return lambda: None
        own = torch.tensor([int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")])
        gathered = self._gather_tensors(own)

        def finish() -> None:
            if all(torch.equal(other, own) for other in gathered()):
                return
            # Whoever compares like this sees a difference on every rank, so all of them come here.
            told = self.gather(describe())
            raise AgreementError(asked=asked, found=_differences(told), remedy=remedy)

        return finish

    @cached_property
    def _timeout(self) -> timedelta:
        return timeout_of_mesh(self._mesh)

    def _gather_tensors(self, own: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        return begin_gather(self.ranks, self.rank, self._timeout, own)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gather_tensors(torch.tensor([own.numel()]))()
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: own.numel()] = own
        found = self._gather_tensors(padded)()
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(found, sizes)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, on every rank; if it raises there, all ranks raise that."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (True, make())
            except Exception as error:
                outcome = (False, error)
        done, value = self.gather(outcome)[0]
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
        errors = {rank: text for rank, text in enumerate(told) if text is not None}
        if errors:
            rank, text = next(iter(errors.items()))
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
