"""Simulate: the programs of all ranks in one process, without a process group.

Each rank is a thread, and only one of them runs at a time: it runs until a collective needs a rank that has not come
yet, then the next one runs. So the order is always the same, ranks do not compete for the cores, and torch's default
generator, which the threads share, can be put away and brought back with each of them: a rank draws the numbers that a
process of its own would. Collectives meet in memory, by the name of their group, and sums are made in rank order.
What real ranks would answer with a hang or with wrong numbers is an error here: collectives that differ, a rank that
ends while others wait for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_auto import measure
from dsp_auto.errors import AgreementError, DspError
from dsp_auto.units import show_tensor

_here = threading.local()  # .world and .rank: of the simulated rank that runs in this thread


def run(ranks: int, program: Callable[[int], Any]) -> list[Any]:
    """What `program(rank)` returns for each of `ranks` ranks, in rank order. By itself it takes about 0.1 ms a rank.

    Inside, the primitives of `torch.ops.dsp` communicate in memory, forward and backward. Groups need no registration: a
    primitive's `group`, `ranks` and `rank` say who meets whom, so every line of a mesh wants a name of its own. Every rank
    starts in the caller's grad mode and with the state of the caller's default CPU generator, which is left as it was.
    For CPU tensors: on other devices, autograd runs in threads that belong to no rank.

    The first exception of a rank stops the others, and is raised here with a note that names the rank. Raises
    AgreementError where ranks that meet issue different collectives (primitive, direction, op, dtype, sizes), or wait for
    ranks that do not come.
    """
    return _World(ranks, program).run()


def current(tensor: Any) -> _World | None:
    """The simulation in which a collective of `tensor` in this thread meets the other ranks; None outside of one, and for
    tensors without data (fake ones, a compiler's), which nobody moves."""
    return getattr(_here, "world", None) if type(tensor) in (Tensor, torch.nn.Parameter) else None


class _Stopped(BaseException):
    """Ends a rank because another one failed; no `except Exception` of its program holds it up."""


@dataclass(frozen=True)
class _Call:
    """A collective that a rank has issued. `gives` and `wants`: rows of `tensor` for, and from, each rank of the group."""

    world_rank: int
    at: Any  # for which primitive, in which group: an At of dsp_auto.collectives
    kind: str
    tensor: Tensor
    gives: Sequence[int]
    wants: Sequence[int]
    in_place: bool = False

    @classmethod
    def of(cls, world_rank: int, op: Any, at: Any, args: tuple) -> _Call:
        tensor, *rest = args
        kind = op.__name__.removesuffix("_")
        rows = tensor.shape[0] if tensor.ndim else 1
        if kind == "all_to_all_single":
            wants, gives = rest[:2]
        else:
            share = rows // at.ranks if kind == "reduce_scatter_tensor" else rows
            gives = wants = [share] * at.ranks
        made = cls(world_rank, at, kind, tensor, gives, wants, in_place=op.__name__.endswith("_"))
        known = kind in _MEET and (rest[0] == "sum" or kind not in ("all_reduce", "reduce_scatter_tensor"))
        split = kind not in ("all_to_all_single", "reduce_scatter_tensor") or sum(gives) == rows
        if not known or not split or len(gives) != at.ranks or tensor.device.type != "cpu":
            raise DspError(
                asked=f"cannot simulate {made}",
                found=f"the arguments {rest} on {tensor.device.type}",
                remedy="simulated are all-to-all, all-gather, and sums by all-reduce and reduce-scatter, of CPU tensors",
            )
        return made

    def __str__(self) -> str:
        shown = show_tensor(self.tensor.dtype, self.tensor.shape)
        if self.kind == "all_to_all_single":
            shown += f" that sends {list(self.gives)} and receives {list(self.wants)}"
        return (
            f"rank {self.world_rank} ({self.at.rank} of {self.at.ranks} in group {self.at.group!r}) is in "
            f"{self.at.primitive} {self.at.direction}, {self.kind} of {shown}"
        )


class _World:
    def __init__(self, ranks: int, program: Callable[[int], Any]) -> None:
        self.ranks, self.program = ranks, program
        self.gates = [threading.Lock() for _ in range(ranks)]  # shut: whoever stops running opens that of the next rank
        self.ended = threading.Lock()
        for gate in (*self.gates, self.ended):
            gate.acquire()
        self.generators = [torch.get_rng_state()] * ranks
        self.modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.ready = deque(range(ranks))
        self.waiting: dict[int, _Call] = {}
        self.meetings: dict[str, list[_Call]] = {}
        self.received: dict[int, Tensor] = {}
        self.results: list[Any] = [None] * ranks
        self.failure: BaseException | None = None

    def run(self) -> list[Any]:
        threads = [threading.Thread(target=self._rank, args=(rank,), daemon=True) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        found = torch.get_rng_state()
        self._next()
        try:
            self.ended.acquire()
        except BaseException as interrupt:  # the caller is told to stop: so are the ranks, at their next collective
            self._fail(interrupt)
            self.ended.acquire()
        for thread in threads:
            thread.join()
        torch.set_rng_state(found)
        if self.failure is not None:
            raise self.failure
        return self.results

    def communicate(self, op: Any, at: Any, *args: Any) -> Tensor:
        """What the functional collective `op(*args)` of a primitive at `at` gives this rank."""
        rank = _here.rank
        try:
            call = self._arrive(_Call.of(rank, op, at, args))
        except DspError as error:
            self._fail(error)
            raise
        with measure.label(at.primitive, at.direction, at.ranks, at.rank):
            measure.count(op.default, args)
        if call.world_rank in self.waiting:
            self.generators[rank] = torch.get_rng_state()
            self._next()
            self._wait(rank)
        return self.received.pop(rank)

    def _rank(self, rank: int) -> None:
        """The thread of one rank."""
        _here.world, _here.rank = self, rank
        inference, grad = self.modes
        try:
            self._wait(rank)
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self.results[rank] = self.program(rank)
        except _Stopped:
            pass
        except BaseException as error:
            error.add_note(f"on rank {rank} of {self.ranks} simulated ranks")
            self._fail(error)
        if self.failure is None and self.waiting and not self.ready:
            self._fail(self._stuck(f"rank {rank} has ended"))
        if self.failure is not None:  # whoever waits is let run, and stops
            self.ready.extend(sorted(self.waiting))
            self.waiting.clear()
        self._next()

    def _next(self) -> None:
        """Lets the next rank run, or the caller where none is left."""
        (self.gates[self.ready.popleft()] if self.ready else self.ended).release()

    def _wait(self, rank: int) -> None:
        """Until another rank lets this one run."""
        self.gates[rank].acquire()
        if self.failure is not None:
            raise _Stopped
        torch.set_rng_state(self.generators[rank])

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def _stuck(self, why: str) -> AgreementError:
        return AgreementError(
            asked="the ranks wait for each other for ever",
            found=f"{why}; {'; '.join(str(self.waiting[rank]) for rank in sorted(self.waiting))}",
            remedy="every rank of a group must issue the same collectives in the same order",
        )

    def _arrive(self, call: _Call) -> _Call:
        """`call` meets those of its group's other ranks. It then waits, or all of them have what they receive."""
        if self.failure is not None:
            raise _Stopped
        meeting = self.meetings.setdefault(call.at.group, [])
        for other in meeting:
            _check_alike(other, call)
        meeting.append(call)
        if len(meeting) < call.at.ranks:
            self.waiting[call.world_rank] = call
            if not self.ready:
                error = self._stuck("no rank can go on")
                del self.waiting[call.world_rank]
                raise error
            return call
        del self.meetings[call.at.group]
        meeting.sort(key=lambda one: one.at.rank)
        with torch.no_grad():
            for one, tensor in zip(meeting, _MEET[call.kind](meeting), strict=True):
                self.received[one.world_rank] = one.tensor.copy_(tensor) if one.in_place else tensor
        for one in meeting:
            if one is not call:
                del self.waiting[one.world_rank]
                self.ready.append(one.world_rank)
        return call


def _check_alike(first: _Call, second: _Call) -> None:
    """Raises AgreementError where the two cannot be one collective."""
    a, b = first.at, second.at
    if a.rank == b.rank:
        found = f"both are rank {a.rank} of the group"
    elif (a.primitive, a.direction, first.kind) != (b.primitive, b.direction, second.kind):
        found = "the collectives differ"
    elif a.ranks != b.ranks:
        found = "the numbers of ranks differ"
    elif first.tensor.dtype != second.tensor.dtype or first.tensor.shape[1:] != second.tensor.shape[1:]:
        found = "dtypes or shapes differ"
    elif first.gives[b.rank] != second.wants[a.rank] or second.gives[a.rank] != first.wants[b.rank]:
        found = "what one sends is not what the other receives"
    else:
        return
    raise AgreementError(
        asked=f"two ranks do not issue the same collective: {first}, and {second}",
        found=found,
        remedy="every rank of a group must issue the same collectives in the same order",
    )


# What each rank receives. The calls are those of all ranks of a group, in its order.


def _all_to_all(calls: Sequence[_Call]) -> list[Tensor]:
    sent = [call.tensor.split(list(call.gives)) for call in calls]
    return [torch.cat([blocks[rank] for blocks in sent]) for rank in range(len(calls))]


def _all_gather(calls: Sequence[_Call]) -> list[Tensor]:
    return [torch.cat([call.tensor for call in calls]) for _ in calls]


def _all_reduce(calls: Sequence[_Call]) -> list[Tensor]:
    total = calls[0].tensor.clone()
    for call in calls[1:]:
        total += call.tensor
    return [total.clone() for _ in calls]


def _reduce_scatter(calls: Sequence[_Call]) -> list[Tensor]:
    return [part.clone() for part in _all_reduce(calls)[0].chunk(len(calls))]


_MEET = {
    "all_to_all_single": _all_to_all,
    "all_gather_into_tensor": _all_gather,
    "all_reduce": _all_reduce,
    "reduce_scatter_tensor": _reduce_scatter,
}
