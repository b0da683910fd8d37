"""Agreement: before the first collective of a program, every rank knows that the others run the same one.

The checks go over a gloo group of their own, so that on GPUs they neither wait for the device nor mix with its collectives.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
from .progress import warn
from .units import show_tensor
from .values import deviation, digest, sketch

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
        own = torch.tensor([int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")], device="cpu")
        gathered = self._gather_tensors(own)

        def finish() -> None:
            if all(torch.equal(other, own) for other in gathered()):
                return
            # Whoever compares like this sees a difference on every rank, so all of them come here.
            told = self.gather(describe())
            raise AgreementError(asked=asked, found=_differences(dict(enumerate(told))), remedy=remedy)

        return finish

    def check_values(
        self,
        tensors: Sequence[torch.Tensor],
        parts: Sequence[Sequence[Hashable]],
        names: Callable[[], Sequence[str]],
        *,
        asked: str,
        remedy: str,
    ) -> None:
        """Raises AgreementError on every rank where ranks that hold the same part of a tensor hold different values of it.

        parts: of each tensor, which part every rank holds. names: of the tensors, for people; asked for only then. Costs one
        all-gather of 8 bytes a tensor. Floating point values that differ no more than by rounding are a warning.
        """
        if self.size == 1 or not tensors:
            return
        own = [digest(tensor) or 0 for tensor in tensors]
        told = torch.stack(self._gather_tensors(torch.tensor(own, device="cpu"))()).t().tolist()
        holders = [_same(held) for held in parts]
        differ = [
            n for n, digests in enumerate(told) if any(len({digests[r] for r in ranks}) > 1 for ranks in holders[n])
        ]
        if not differ:
            return
        # Every rank sees the same numbers, so all of them come here, and to the same end.
        numbers = self.gather({n: sketch(tensors[n]) for n in differ if _eps(tensors[n])})
        called, wrong = names(), []
        for n in differ:
            rounding = math.sqrt(_eps(tensors[n]))
            by = max(deviation([numbers[r][n] for r in ranks]) for ranks in holders[n]) if rounding else math.inf
            if by > rounding:
                wrong.append(n)
                continue
            warn(
                f"the ranks' values of {called[n]} differ by {by:.1e} of their norm. That is taken for rounding; to be rid of "
                "it, compute them on one rank and broadcast them."
            )
        if not wrong:
            return
        shown = self.gather({n: f"{_begin(tensors[n])} (digest {own[n] % 2**64:016x})" for n in wrong})
        # Ranks that hold different parts are not to be compared.
        ranks = next(ranks for ranks in holders[wrong[0]] if len({told[wrong[0]][r] for r in ranks}) > 1)
        first = _differences({r: shown[r][wrong[0]] for r in ranks})
        others = f"; so do those of {', '.join(called[n] for n in wrong[1:])}" if wrong[1:] else ""
        raise AgreementError(
            asked=asked,
            found=f"those of {called[wrong[0]]} ({show_tensor(tensors[wrong[0]].dtype, tensors[wrong[0]].shape)}) differ: "
            f"{first}{others}",
            remedy=remedy,
        )

    @cached_property
    def _timeout(self) -> timedelta:
        return timeout_of_mesh(self._mesh)

    def _gather_tensors(self, own: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        return begin_gather(self.ranks, self.rank, self._timeout, own)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.size == 1:
            return [value]
        with torch.device("cpu"):  # `frombuffer` goes by the default device, and takes none
            own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gather_tensors(torch.tensor([own.numel()], device="cpu"))()
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device="cpu")
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


def _same(held: Sequence[Hashable]) -> list[list[int]]:
    """The ranks that hold one part, for each of the parts that the ranks hold."""
    found: dict[Hashable, list[int]] = {}
    for rank, part in enumerate(held):
        found.setdefault(part, []).append(rank)
    return list(found.values())


def _eps(tensor: torch.Tensor) -> float:
    """The relative rounding of its numbers; 0 where they are exact."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 0.0


def _begin(tensor: torch.Tensor) -> str:
    """The first values of a tensor, for people."""
    first = tensor.detach().flatten()[:3].tolist()
    shown = [f"{value:.4g}" if _eps(tensor) else str(value) for value in first]
    return ", ".join(shown + ["…"] * (tensor.numel() > len(first)))


def _differences(told: Mapping[int, Any]) -> str:
    """What is told, and by which ranks."""
    groups: dict[str, list[int]] = {}
    for rank, text in told.items():
        groups.setdefault(str(text), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in groups.items()
    )
