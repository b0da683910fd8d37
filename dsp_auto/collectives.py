"""Collectives: how the primitives communicate, whatever they move.

A collective is issued, and what it gives is waited for, as two calls of functional collectives (`_c10d_functional.*`), between
which other work may go on. Both say where they belong, in errors and in counts. In a simulation (see `simulate`) ranks meet in
memory instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsp_auto import measure, simulate
from dsp_auto.errors import DspError, LayoutError
from dsp_auto.failures import failed
from dsp_auto.units import show_tensor

_library = torch.library.Library("dsp", "FRAGMENT")  # unregisters its op when collected, so it must live
c10d = torch.ops._c10d_functional

# What every backend moves as it is. The rest (bool, complex, float8, int16, ...) travels as bytes.
_MOVED_AS_IS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
}


class At(NamedTuple):
    """Where and for whom a primitive communicates; `where` is for people."""

    ranks: int
    rank: int
    group: str
    primitive: str
    where: str
    direction: str = "forward"

    def backward(self) -> At:
        return self._replace(direction="backward")


class Both(NamedTuple):
    """Two mesh dims over which something goes one after the other; ranks count row-major, `outer` first."""

    primitive: str
    outer: At
    inner: At

    @property
    def ranks(self) -> int:
        return self.outer.ranks * self.inner.ranks

    @property
    def rank(self) -> int:
        return self.outer.rank * self.inner.ranks + self.inner.rank

    def backward(self) -> Both:
        return self._replace(outer=self.outer.backward(), inner=self.inner.backward())


def site(primitive: str, ranks: int, rank: int, group: str, where: str) -> At:
    """Raises LayoutError where there is no such rank."""
    if not 0 <= rank < ranks:
        raise LayoutError(f"{primitive}: rank {rank} is not one of {ranks} ranks")
    return At(ranks, rank, group, primitive, where)


# Issue and wait.

_before_first: list[Callable[[], None]] = []


def before_first_collective(check: Callable[[], None]) -> Callable[[], None]:
    """Runs `check` once, before the next collective of a primitive; call the result to run it by then at the latest."""

    def run() -> None:
        if run in _before_first:
            _before_first.remove(run)
            check()

    _before_first.append(run)
    return run


def issue(op: Any, at: At, *args: Any) -> Tensor:
    """Starts a collective: work may go on meanwhile, and what it gives is to be read after `wait` only.

    Raises CommunicationError where other ranks are gone or too slow."""
    while _before_first:
        _before_first[0]()
    with told(at, args[0]):
        return _issue_now(op, at, *args)


def wait(issued: Tensor, at: At) -> Tensor:
    """What a collective gives, or a view of it. Raises CommunicationError where other ranks are gone or too slow."""
    with told(at, issued):
        return c10d.wait_tensor(issued)


class told:
    """Inside, what a backend raises says which primitive that was, in which stage."""

    def __init__(self, at: At, tensor: Tensor) -> None:
        self.at, self.tensor = at, tensor

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Out of memory, what is an error of dsp_auto already, and what a compiler says are no failure of another rank.
        if not isinstance(error, RuntimeError) or isinstance(error, (DspError, torch.OutOfMemoryError)):
            return
        if type(self.tensor) is Tensor:
            at, shown = self.at, show_tensor(self.tensor.dtype, self.tensor.shape)
            asked = f"{at.primitive} in the {at.direction}, rank {at.rank} of {at.ranks}, {shown}"
            raise failed(at.group, asked, at.where, error) from error


class _Simulated(threading.local):
    """The simulated collectives of this thread that are being issued."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Tensor]] = []


_simulated = _Simulated()
# A simulated collective is an op too, so that modes which keep results (selective checkpoints) see it as they see a real one.
_library.define("simulated(Tensor x) -> Tensor")
_library.impl("simulated", lambda x: _simulated.calls[-1](), "CompositeExplicitAutograd")


def _issue_now(op: Any, at: At, *args: Any) -> Tensor:
    if (world := simulate.current(args[0])) is not None:
        _simulated.calls.append(lambda: world.communicate(op, at, *args))
        try:
            return torch.ops.dsp.simulated(args[0])
        finally:
            _simulated.calls.pop()
    if not measure.counting():
        return op(*args)
    with measure.label(at.primitive, at.direction, at.ranks, at.rank):
        return op(*args)


# What goes over the wire.


def issue_all_to_all(flat: Tensor, receives: Sequence[int], sends: Sequence[int], at: At) -> Tensor:
    """Starts an exchange of the blocks of a flat tensor; counts are elements. `arrived` gives what comes."""
    wire = as_moved(flat)
    scale = 1 if wire.dtype == flat.dtype else flat.element_size()
    return issue(c10d.all_to_all_single, at, wire, [n * scale for n in receives], [n * scale for n in sends], at.group)


def all_to_all(flat: Tensor, receives: Sequence[int], sends: Sequence[int], at: At) -> Tensor:
    """Exchanges the blocks of a flat tensor; counts are elements."""
    return arrived(issue_all_to_all(flat, receives, sends, at), flat.dtype, at)


def arrived(flight: Tensor, dtype: torch.dtype, at: At) -> Tensor:
    """What comes of a collective of elements of `dtype`."""
    received = wait(flight, at)
    return received if received.dtype == dtype else received.view(dtype)


def as_moved(flat: Tensor) -> Tensor:
    """A flat tensor as every backend moves it."""
    flat = flat.contiguous()
    return flat if flat.dtype in _MOVED_AS_IS else flat.resolve_conj().resolve_neg().view(torch.uint8)


def exchange(
    like: Tensor, sends: list[tuple[int, Tensor]], receives: list[tuple[int, list[int]]], at: At, anything: bool
) -> list[Tensor]:
    """Sends tensors to ranks, and receives tensors of the given shapes from ranks, each list ordered within a rank.

    anything: whether any rank sends something; if not, nothing is issued."""
    if not anything:
        return []
    ordered = sorted(sends, key=lambda entry: entry[0])
    flat = [part.reshape(-1) for _, part in ordered] or [like.new_empty(0)]
    out, back = [0] * at.ranks, [0] * at.ranks
    for to, part in sends:
        out[to] += part.numel()
    for source, shape in receives:
        back[source] += math.prod(shape)
    buffer = all_to_all(torch.cat(flat) if len(flat) > 1 else flat[0].contiguous(), back, out, at)
    order = sorted(range(len(receives)), key=lambda n: receives[n][0])
    blocks = buffer.split([math.prod(receives[n][1]) for n in order]) if order else ()
    found = {n: block.view(receives[n][1]) for n, block in zip(order, blocks)}
    return [found[n] for n in range(len(receives))]
