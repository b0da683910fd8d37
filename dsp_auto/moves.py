"""Moves: what the primitives do to this rank's tensor, forward or backward, each with its adjoint.

A move that communicates has two halves: `begin` packs and issues a collective, `end` waits for it and unpacks. A primitive runs
one after the other; where other work may go on between them the halves are ops of their own (see `primitives`).

    move            adjoint
    Switch          Switch back
    Cut             Gather, or AmongZeros where the gradient is Partial
    Gather          Cut, or ReduceScatter where the gradient is Partial
    ReduceScatter   Gather, whose gradient is Partial
    Reduce          Same, or itself where the gradient is Partial
    Same            Reduce
    Halo            HaloBack

None of them keeps a tensor: sizes are all they need. The gradient of a Partial is a Replicate that every rank uses in work of
its own, so that Replicate's own gradient is Partial.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collectives import At, Both, all_to_all, arrived, as_moved, c10d, exchange, issue, issue_all_to_all
from .shards import Piece, exchanged, pieces

Sizes = tuple[int, ...]  # of every rank's shard along a dim


class Move:
    """What a primitive does in one direction."""

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def adjoint(self) -> Move:
        """What it does in the other."""
        raise NotImplementedError


class InHalves(Move):
    """A move that is begun, and ended when what it gives is wanted."""

    def begin(self, x: Tensor) -> Tensor:
        """What is on its way, not to be read: `terms` times as many elements as `end` gives."""
        raise NotImplementedError

    def end(self, flight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What is made of an x of `shape` and `dtype`; flight: what `begin` gave, or a view of it."""
        raise NotImplementedError

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        """Of what is made of an x of `shape`."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """How many tensors like what `end` gives are on their way, to be summed."""
        return 1

    def run(self, x: Tensor) -> Tensor:
        return self.end(self.begin(x), x.shape, x.dtype)


@dataclass(frozen=True)
class Switch(InHalves):
    """S(gather_dim) -> S(scatter_dim), of which `gathered` and `scattered` are the sizes of all ranks' shards."""

    gather_dim: int
    gathered: Sizes
    scatter_dim: int
    scattered: Sizes
    at: At | Both

    def begin(self, x: Tensor) -> Tensor:
        rest = math.prod(n for dim, n in enumerate(x.shape) if dim not in (self.gather_dim, self.scatter_dim))
        packed = pack(x, self.scatter_dim, self.scattered)
        if isinstance(self.at, Both):
            return _issue_in_turn(packed, self.gathered, self.scattered, rest, self.at)
        sends = [self.gathered[self.at.rank] * n * rest for n in self.scattered]
        receives = [n * self.scattered[self.at.rank] * rest for n in self.gathered]
        return issue_all_to_all(packed, receives, sends, self.at)

    def end(self, flight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        received = arrived(flight, dtype, self.at.outer if isinstance(self.at, Both) else self.at)
        return unpack(received.view(-1), self.shape_after(shape), self.gather_dim, self.gathered)

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        scattered = resized(shape, self.scatter_dim, self.scattered[self.at.rank])
        return resized(scattered, self.gather_dim, sum(self.gathered))

    def adjoint(self) -> Switch:
        return Switch(self.scatter_dim, self.scattered, self.gather_dim, self.gathered, self.at.backward())


@dataclass(frozen=True)
class Gather(InHalves):
    """S(dim) -> R."""

    dim: int
    sizes: Sizes
    partial_grad: bool
    at: At

    def begin(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if _is_even(self.sizes):
            return issue(c10d.all_gather_into_tensor, self.at, as_moved(flat), self.at.ranks, self.at.group)
        # all-gather wants equal shards; sending mine to every rank puts the same bytes on the wire
        rest = _numel_without(x, self.dim)
        receives = [n * rest for n in self.sizes]
        return issue_all_to_all(flat.repeat(self.at.ranks), receives, [flat.numel()] * self.at.ranks, self.at)

    def end(self, flight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        received = arrived(flight, dtype, self.at)
        return unpack(received.view(-1), self.shape_after(shape), self.dim, self.sizes)

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        return resized(shape, self.dim, sum(self.sizes))

    def adjoint(self) -> Move:
        if self.partial_grad:
            return ReduceScatter(self.dim, self.sizes, self.at.backward())
        return Cut(self.dim, self.sizes, False, self.at.backward())


@dataclass(frozen=True)
class ReduceScatter(InHalves):
    """P -> S(dim)."""

    dim: int
    sizes: Sizes
    at: At

    def begin(self, x: Tensor) -> Tensor:
        packed = pack(x, self.dim, self.sizes)
        if _is_even(self.sizes):
            flat = packed.contiguous()  # which the gradient of a sum is not
            return issue(c10d.reduce_scatter_tensor, self.at, flat, "sum", self.at.ranks, self.at.group)
        rest = _numel_without(x, self.dim)  # reduce-scatter wants equal shards: exchange the terms and sum them at the end
        mine = self.sizes[self.at.rank] * rest
        return issue_all_to_all(packed, [mine] * self.at.ranks, [n * rest for n in self.sizes], self.at)

    def end(self, flight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        received = arrived(flight, dtype, self.at)
        if self.terms == 1:
            return _shaped(received, self.shape_after(shape))
        return received.view(self.terms, *self.shape_after(shape)).sum(0, dtype=dtype)

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        return resized(shape, self.dim, self.sizes[self.at.rank])

    @property
    def terms(self) -> int:
        return 1 if _is_even(self.sizes) else self.at.ranks

    def adjoint(self) -> Gather:
        return Gather(self.dim, self.sizes, True, self.at.backward())


@dataclass(frozen=True)
class Reduce(InHalves):
    """P -> R."""

    partial_grad: bool
    at: At

    def begin(self, x: Tensor) -> Tensor:
        return issue(c10d.all_reduce, self.at, x.contiguous(), "sum", self.at.group)

    def end(self, flight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _shaped(arrived(flight, dtype, self.at), shape)

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        return list(shape)

    def adjoint(self) -> Move:
        return Reduce(True, self.at.backward()) if self.partial_grad else Same(self.at.backward())


@dataclass(frozen=True)
class Cut(Move):
    """R -> S(dim), which sends nothing."""

    dim: int
    sizes: Sizes
    partial_grad: bool
    at: At

    def run(self, x: Tensor) -> Tensor:
        # clone, not contiguous(): a leading slice is contiguous already, and as a view would keep all of x alive
        return x.narrow(self.dim, *_range(self.sizes, self.at)).clone(memory_format=torch.contiguous_format)

    def adjoint(self) -> Move:
        if self.partial_grad:
            return AmongZeros(self.dim, self.sizes, self.at.backward())
        return Gather(self.dim, self.sizes, False, self.at.backward())


@dataclass(frozen=True)
class AmongZeros(Move):
    """S(dim) -> P: this rank's slice, with zeros for the others', which are their terms of the sum."""

    dim: int
    sizes: Sizes
    at: At

    def run(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(resized(x.shape, self.dim, sum(self.sizes)))
        whole.narrow(self.dim, *_range(self.sizes, self.at)).copy_(x)
        return whole

    def adjoint(self) -> Cut:
        return Cut(self.dim, self.sizes, True, self.at.backward())


@dataclass(frozen=True)
class Same(Move):
    """R -> R, each rank's gradient of which is its term of a sum."""

    at: At

    def run(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def adjoint(self) -> Reduce:
        return Reduce(False, self.at.backward())


class Ways(NamedTuple):
    """Who holds how much of a dim, and which range of it every rank needs."""

    held: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def of(self, rank: int) -> list[Piece]:
        return pieces(self.held, self.starts[rank], self.stops[rank])

    def from_rank(self, rank: int) -> list[tuple[int, int, int]]:
        """What a rank sends: to whom, and from where to where of what it holds; in the receivers' order."""
        return [(to, a, b) for to in range(len(self.held)) for holder, a, b in self.of(to) if holder == rank]

    @property
    def anything(self) -> bool:
        return exchanged(self.held, self.starts, self.stops) > 0


@dataclass(frozen=True)
class Halo(Move):
    """S(dim) -> the ranges of it that `ways` says."""

    dim: int
    ways: Ways
    at: At

    def run(self, x: Tensor) -> Tensor:
        dim, at = self.dim, self.at
        sends = [(to, x.narrow(dim, a, b - a)) for to, a, b in self.ways.from_rank(at.rank) if to != at.rank]
        own = self.ways.of(at.rank)
        shapes = [(holder, resized(x.shape, dim, b - a)) for holder, a, b in own]
        others = [entry for entry in shapes if entry[0] != at.rank]
        received = iter(exchange(x, sends, others, at, self.ways.anything))
        parts = [x.narrow(dim, a, b - a) if holder == at.rank else next(received) for holder, a, b in own]
        if not parts:
            return x.new_empty(resized(x.shape, dim, 0))
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)

    def adjoint(self) -> HaloBack:
        return HaloBack(self.dim, self.ways, self.at.backward())


@dataclass(frozen=True)
class HaloBack(Move):
    """What every rank's range gives its elements, added up where the elements are."""

    dim: int
    ways: Ways
    at: At

    def run(self, x: Tensor) -> Tensor:
        dim, at = self.dim, self.at
        own = self.ways.of(at.rank)
        parts = x.split([b - a for _, a, b in own], dim) if own else ()
        sends = [(holder, part) for (holder, _, _), part in zip(own, parts) if holder != at.rank]
        back = [(to, a, b) for to, a, b in self.ways.from_rank(at.rank) if to != at.rank]
        # From one rank pieces come in the order of its range, which is the order in which it was sent them.
        shapes = [(to, resized(x.shape, dim, b - a)) for to, a, b in back]
        received = exchange(x, sends, shapes, at, self.ways.anything)
        total = x.new_zeros(resized(x.shape, dim, self.ways.held[at.rank]))
        for (holder, a, b), part in zip(own, parts):
            if holder == at.rank:
                total.narrow(dim, a, b - a).add_(part)
        for (_, a, b), part in zip(back, received):
            total.narrow(dim, a, b - a).add_(part)
        return total

    def adjoint(self) -> Halo:
        return Halo(self.dim, self.ways, self.at.backward())


def _issue_in_turn(flat: Tensor, gathered: Sizes, scattered: Sizes, rest: int, at: Both) -> Tensor:
    """An all-to-all of blocks for all ranks of two mesh dims: over the inner one to the rank that stands where the receiver
    does, then over the outer one, whose messages are as much fewer and larger as there are inner ranks."""
    outer, inner, (p, q) = at.outer.ranks, at.inner.ranks, (at.outer.rank, at.inner.rank)
    sizes = [gathered[at.rank] * n * rest for n in scattered]
    sends = [sum(sizes[to::inner]) for to in range(inner)]
    # What comes from the inner rank n for the outer rank m, and goes on to it.
    passed = [[gathered[p * inner + n] * scattered[m * inner + q] * rest for m in range(outer)] for n in range(inner)]
    flat = all_to_all(_turned(flat, sizes, outer), [sum(row) for row in passed], sends, at.inner)
    sends = [sum(row[m] for row in passed) for m in range(outer)]
    receives = [sum(gathered[m * inner : (m + 1) * inner]) * scattered[at.rank] * rest for m in range(outer)]
    return issue_all_to_all(_turned(flat, [n for row in passed for n in row], inner), receives, sends, at.outer)


def _turned(flat: Tensor, sizes: list[int], rows: int) -> Tensor:
    """The blocks of a flat tensor that lie in `rows` rows, column by column."""
    columns = len(sizes) // rows
    if _is_even(tuple(sizes)):
        return flat.view(rows, columns, sizes[0]).transpose(0, 1).reshape(-1)
    blocks = flat.split(sizes)
    return torch.cat([blocks[row * columns + column] for column in range(columns) for row in range(rows)])


# Blocks. A flat buffer holds one contiguous block per rank, in rank order; block r is shard r along a dim.


def pack(x: Tensor, dim: int, sizes: Sizes) -> Tensor:
    """All shards of x along dim, one after the other, flat. No copy where they already lie so."""
    if _leads(x.shape, dim):
        return x.reshape(-1)
    if _is_even(sizes):
        return _blocks(x, dim, len(sizes)).reshape(-1)
    # One strided copy for each run of equal shards: two, unless several mesh dims cut one after the other.
    flat = x.new_empty(x.numel())
    counts = [(n, sum(1 for _ in run)) for n, run in itertools.groupby(sizes)]
    lengths = [n * count for n, count in counts]
    for part, buffer, (n, count) in zip(x.split(lengths, dim), _split_flat(flat, lengths), counts):
        if n:
            blocks = _blocks(part, dim, count)
            buffer.view(blocks.shape).copy_(blocks)
    return flat


def unpack(flat: Tensor, shape: list[int], dim: int, sizes: Sizes) -> Tensor:
    """The tensor of `shape` whose shards along dim lie in `flat`: the inverse of `pack`."""
    if _leads(shape, dim):
        return _shaped(flat, shape)
    if _is_even(sizes):
        return flat.view(len(sizes), *shape[:dim], sizes[0], *shape[dim + 1 :]).movedim(0, dim).reshape(shape)
    blocks = _split_flat(flat, sizes)
    return torch.cat([b.view(*shape[:dim], n, *shape[dim + 1 :]) for b, n in zip(blocks, sizes)], dim)


def _shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of what nobody else has, which is none to autograd: a view that a function of its own gives it lets nobody change
    or detach in place."""
    return torch.ops.aten._unsafe_view.default(fresh, shape)


def resized(shape: Sequence[int], dim: int, size: int) -> list[int]:
    found = list(shape)
    found[dim] = size
    return found


def _split_flat(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Cuts a flat tensor in proportion to `sizes`."""
    rest = flat.numel() // sum(sizes)
    return flat.split([n * rest for n in sizes])


def _is_even(sizes: Sizes) -> bool:
    return min(sizes) == max(sizes)


def _range(sizes: Sizes, at: At) -> tuple[int, int]:
    """Where this rank's shard begins, and its length."""
    return sum(sizes[: at.rank]), sizes[at.rank]


def _leads(shape: Any, dim: int) -> bool:
    return all(n == 1 for n in shape[:dim])


def _blocks(x: Tensor, dim: int, count: int) -> Tensor:
    """View of x cut into `count` equal pieces along dim, the pieces as dim 0."""
    return x.unflatten(dim, (count, x.shape[dim] // count)).movedim(dim, 0)


def _numel_without(x: Tensor, dim: int) -> int:
    return math.prod(n for d, n in enumerate(x.shape) if d != dim)
