"""The primitives between layouts (design section 3): ops of the `dsp` namespace, forward and exact adjoint.

    S(i) -> S(j)   switch            all-to-all          backward: switch j -> i
    R    -> S(i)   split             local slice         backward: gather
    S(i) -> R      gather            all-gather          backward: split, or reduce-scatter
    P    -> R      reduce            all-reduce          backward: identity, or all-reduce
    P    -> S(i)   reduce_scatter    reduce-scatter      backward: gather
    R    -> R      replicate         identity            backward: one all-reduce of all gradients
    S(i) -> S(j)   hierarchical_switch  two all-to-alls over two mesh dims, backward: the same j -> i
    S(i) -> ranges halo              all-to-all          backward: the borders' gradients go home and are added

They are called as `torch.ops.dsp.switch(x, ...)`. `ranks`, `rank` and the group's name are arguments, so a
graph is made, printed and propagated on fake tensors without a process group; only running it needs one.
`partial_grad=True` names the Replicate whose gradient is Partial (ranks do different work with the value),
the default the one whose gradient is replicated too. `replicate` leaves a member without a gradient out of its sum,
on every rank alike; `materialize=True` counts it as zeros, for ranks that do not all use the same members (each has
to use one, or its backward does not run and the others wait). `halo` gives rank r the range `[starts[r], stops[r])` of
a dim of which rank r holds the next `held[r]` elements; ranges may overlap, and go on at the other end. Only what a rank
lacks is sent. Partial means a sum. Shards follow `torch.tensor_split`
(see dsp_auto.shards): uneven and empty ones are normal, nothing is padded. Where the ranks are those of several mesh dims,
each of which cuts what the one before leaves, shards may follow another pattern: then a size is a list, one entry a rank.
Outputs are contiguous where anything was communicated or cut. `ranks == 1` returns x. `where` is for errors: the stage and
the tensor that the primitive is for.

Each op is registered as CompositeImplicitAutograd: autograd, fake tensors and torch.compile look through it
and see functional collectives and their waits, while a graph captured above it keeps one readable node.

Raises `LayoutError` where dims, sizes, ranks or dtypes do not fit, `CommunicationError` where another rank does not answer.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dsp_auto import measure, simulate
from dsp_auto.errors import DspError, LayoutError
from dsp_auto.failures import failed
from dsp_auto.shards import Piece, exchanged, pieces, shard_sizes
from dsp_auto.units import show_tensor

_library = torch.library.Library("dsp", "DEF")  # unregisters its ops when collected, so it must live
_c10d = torch.ops._c10d_functional

# What every backend moves as it is. The rest (bool, complex, float8, int16, ...) travels as bytes.
_MOVED_AS_IS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
}


Sizes = tuple[int, ...]  # of every rank's shard along a dim


class _At(NamedTuple):
    """Where and for whom a primitive communicates; `where` is for people."""

    ranks: int
    rank: int
    group: str
    primitive: str
    where: str
    direction: str = "forward"

    def backward(self) -> _At:
        return self._replace(direction="backward")


class _Both(NamedTuple):
    """Two mesh dims over which something goes one after the other; ranks count row-major, `outer` first."""

    primitive: str
    outer: _At
    inner: _At

    @property
    def ranks(self) -> int:
        return self.outer.ranks * self.inner.ranks

    @property
    def rank(self) -> int:
        return self.outer.rank * self.inner.ranks + self.inner.rank

    def backward(self) -> _Both:
        return self._replace(outer=self.outer.backward(), inner=self.inner.backward())


# The ops. Each checks, then runs.


def _switch(
    x: Tensor,
    gather_dim: int,
    gather_size: list[int],
    scatter_dim: int,
    ranks: int,
    rank: int,
    group: str,
    scatter_size: list[int] | None = None,
    *,
    where: str = "",
) -> Tensor:
    return _switch_at(_site("switch", ranks, rank, group, where), x, gather_dim, gather_size, scatter_dim, scatter_size)


def _hierarchical_switch(
    x: Tensor,
    gather_dim: int,
    gather_size: list[int],
    scatter_dim: int,
    outer_ranks: int,
    outer_rank: int,
    outer_group: str,
    ranks: int,
    rank: int,
    group: str,
    scatter_size: list[int] | None = None,
    *,
    where: str = "",
) -> Tensor:
    inner = _site("hierarchical_switch", ranks, rank, group, where)
    outer = _site("hierarchical_switch", outer_ranks, outer_rank, outer_group, where)
    both = _Both("hierarchical_switch", outer, inner)
    return _switch_at(both, x, gather_dim, gather_size, scatter_dim, scatter_size)


def _switch_at(
    at: _At | _Both,
    x: Tensor,
    gather_dim: int,
    gather_size: list[int],
    scatter_dim: int,
    scatter_size: list[int] | None,
) -> Tensor:
    gather_dim, scatter_dim = _dim(x, gather_dim, at), _dim(x, scatter_dim, at)
    if gather_dim == scatter_dim:
        raise LayoutError(f"{at.primitive}: gather_dim and scatter_dim are both {gather_dim}; nothing to switch")
    gathered = _check_shard(x, gather_dim, gather_size, at)
    scattered = _check_whole(x, scatter_dim, scatter_size, at)
    if at.ranks == 1:
        return x
    return _apply_switch(x, gather_dim, gathered, scatter_dim, scattered, at)


def _split(
    x: Tensor,
    dim: int,
    ranks: int,
    rank: int,
    group: str,
    partial_grad: bool = False,
    size: list[int] | None = None,
    *,
    where: str = "",
) -> Tensor:
    at = _site("split", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_whole(x, dim, size, at)
    if ranks == 1:
        return x
    return _apply_split(x, dim, sizes, partial_grad, at)


def _gather(
    x: Tensor,
    dim: int,
    size: list[int],
    ranks: int,
    rank: int,
    group: str,
    partial_grad: bool = False,
    *,
    where: str = "",
) -> Tensor:
    at = _site("gather", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_shard(x, dim, size, at)
    if ranks == 1:
        return x
    return _apply_gather(x, dim, sizes, partial_grad, at)


def _reduce(
    x: Tensor, ranks: int, rank: int, group: str, partial_grad: bool = False, *, where: str = ""
) -> Tensor:
    at = _site("reduce", ranks, rank, group, where)
    _check_summable(x, at)
    if ranks == 1:
        return x
    return _apply_reduce(x, partial_grad, at)


def _reduce_scatter(
    x: Tensor, dim: int, ranks: int, rank: int, group: str, size: list[int] | None = None, *, where: str = ""
) -> Tensor:
    at = _site("reduce_scatter", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_whole(x, dim, size, at)
    _check_summable(x, at)
    if ranks == 1:
        return x
    return _apply_reduce_scatter(x, dim, sizes, at)


def _replicate(
    xs: list[Tensor], ranks: int, rank: int, group: str, materialize: bool = False, *, where: str = ""
) -> list[Tensor]:
    at = _site("replicate", ranks, rank, group, where)
    out = list(xs)
    wanted = [i for i, x in enumerate(xs) if _wants_grad(x)]
    if ranks > 1 and wanted:
        for i, y in zip(wanted, _Replicate.apply(at, materialize, *(xs[i] for i in wanted))):
            out[i] = y
    return out


def _halo(
    x: Tensor,
    dim: int,
    held: list[int],
    starts: list[int],
    stops: list[int],
    ranks: int,
    rank: int,
    group: str,
    *,
    where: str = "",
) -> Tensor:
    at = _site("halo", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    if not len(held) == len(starts) == len(stops) == ranks:
        raise LayoutError(f"halo: {len(held)} lengths and {len(starts)}, {len(stops)} ends for {ranks} ranks")
    if x.shape[dim] != held[rank]:
        raise LayoutError(
            f"halo: dim {dim} of shape {list(x.shape)} holds {x.shape[dim]} elements where rank {rank} should hold "
            f"{held[rank]}"
        )
    ways = _Ways(tuple(held), tuple(starts), tuple(stops))
    return _Halo.apply(x, dim, ways, at) if _wants_grad(x) else _run_halo(x, dim, ways, at)


for _schema, _op in {
    "switch(Tensor x, int gather_dim, int[1] gather_size, int scatter_dim, int ranks, int rank, str group,"
    " int[]? scatter_size=None, *, str where='') -> Tensor": _switch,
    "hierarchical_switch(Tensor x, int gather_dim, int[1] gather_size, int scatter_dim, int outer_ranks, int outer_rank,"
    " str outer_group, int ranks, int rank, str group, int[]? scatter_size=None, *, str where='')"
    " -> Tensor": _hierarchical_switch,
    "split(Tensor x, int dim, int ranks, int rank, str group, bool partial_grad=False, int[]? size=None, *,"
    " str where='') -> Tensor": _split,
    "gather(Tensor x, int dim, int[1] size, int ranks, int rank, str group, bool partial_grad=False, *,"
    " str where='') -> Tensor": _gather,
    "reduce(Tensor x, int ranks, int rank, str group, bool partial_grad=False, *, str where='') -> Tensor": _reduce,
    "reduce_scatter(Tensor x, int dim, int ranks, int rank, str group, int[]? size=None, *, str where='')"
    " -> Tensor": _reduce_scatter,
    "halo(Tensor x, int dim, int[] held, int[] starts, int[] stops, int ranks, int rank, str group, *, str where='')"
    " -> Tensor": _halo,
    "replicate(Tensor[] xs, int ranks, int rank, str group, bool materialize=False, *, str where='')"
    " -> Tensor[]": _replicate,
}.items():
    _library.impl(_library.define(_schema), _op, "CompositeImplicitAutograd")


# Recorded by autograd only where somebody wants a gradient, in a forward or in a backward.


def _apply_switch(
    x: Tensor, gather_dim: int, gathered: Sizes, scatter_dim: int, scattered: Sizes, at: _At | _Both
) -> Tensor:
    return (
        _Switch.apply(x, gather_dim, gathered, scatter_dim, scattered, at)
        if _wants_grad(x)
        else _run_switch(x, gather_dim, gathered, scatter_dim, scattered, at)
    )


def _apply_split(x: Tensor, dim: int, sizes: Sizes, partial_grad: bool, at: _At) -> Tensor:
    return _Split.apply(x, dim, sizes, partial_grad, at) if _wants_grad(x) else _run_split(x, dim, sizes, at)


def _apply_gather(x: Tensor, dim: int, sizes: Sizes, partial_grad: bool, at: _At) -> Tensor:
    return _Gather.apply(x, dim, sizes, partial_grad, at) if _wants_grad(x) else _run_gather(x, dim, sizes, at)


def _apply_reduce(x: Tensor, partial_grad: bool, at: _At) -> Tensor:
    return _Reduce.apply(x, partial_grad, at) if _wants_grad(x) else _run_all_reduce(x, at)


def _apply_reduce_scatter(x: Tensor, dim: int, sizes: Sizes, at: _At) -> Tensor:
    return _ReduceScatter.apply(x, dim, sizes, at) if _wants_grad(x) else _run_reduce_scatter(x, dim, sizes, at)


# Adjoints. None of them saves a tensor: sizes are all they need. Each runs by a primitive again, so gradients of
# gradients are exact too. The gradient of a Partial is a Replicate that every rank uses in work of its own, so that
# Replicate's own gradient is Partial: switch <-> switch back, split <-> gather, gather(partial) <-> reduce_scatter,
# reduce <-> replicate, reduce(partial) <-> itself, split(partial) <-> a slice among zeros.


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gather_dim: int, gathered: Sizes, scatter_dim: int, scattered: Sizes, at: _At | _Both
    ) -> Tensor:
        ctx.back = (scatter_dim, scattered, gather_dim, gathered)
        ctx.at = at
        return _run_switch(x, gather_dim, gathered, scatter_dim, scattered, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        gather_dim, gathered, scatter_dim, scattered = ctx.back
        back = _apply_switch(grad, gather_dim, gathered, scatter_dim, scattered, ctx.at.backward())
        return back, None, None, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sizes, partial_grad: bool, at: _At) -> Tensor:
        ctx.dim, ctx.sizes, ctx.partial_grad, ctx.at = dim, sizes, partial_grad, at
        return _run_split(x, dim, sizes, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if ctx.partial_grad:  # the other ranks' slices are their terms of the sum
            whole = grad.new_zeros(_resized(grad, ctx.dim, sum(ctx.sizes)))
            whole.narrow(ctx.dim, *_range(ctx.sizes, ctx.at)).copy_(grad)
        else:
            whole = _apply_gather(grad, ctx.dim, ctx.sizes, False, ctx.at.backward())
        return whole, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sizes, partial_grad: bool, at: _At) -> Tensor:
        ctx.dim, ctx.sizes, ctx.partial_grad, ctx.at = dim, sizes, partial_grad, at
        return _run_gather(x, dim, sizes, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        at = ctx.at.backward()
        if ctx.partial_grad:
            mine = _apply_reduce_scatter(grad, ctx.dim, ctx.sizes, at)
        else:
            mine = _apply_split(grad, ctx.dim, ctx.sizes, False, at)
        return mine, None, None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, partial_grad: bool, at: _At) -> Tensor:
        ctx.partial_grad, ctx.at = partial_grad, at
        return _run_all_reduce(x, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        at = ctx.at.backward()
        if ctx.partial_grad:
            grad = _apply_reduce(grad, True, at)
        elif _wants_grad(grad):
            (grad,) = _Replicate.apply(at, False, grad)
        return grad, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sizes, at: _At) -> Tensor:
        ctx.dim, ctx.sizes, ctx.at = dim, sizes, at
        return _run_reduce_scatter(x, dim, sizes, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _apply_gather(grad, ctx.dim, ctx.sizes, True, ctx.at.backward()), None, None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: _At, materialize: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.at = at
        ctx.set_materialize_grads(materialize)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        # A member that nobody used gets no gradient, as on one device: zeros would make optimizers decay it. That holds
        # where all ranks use the same members. Where their losses may differ, `materialize` makes zeros of what is
        # missing, so that every rank brings the same elements.
        alike: dict[tuple, list[tuple[int, Tensor]]] = defaultdict(list)
        for i, grad in enumerate(grads):
            if grad is not None:
                alike[grad.dtype, grad.device].append((i, grad))
        at, summed = ctx.at.backward(), list(grads)
        for members in alike.values():
            if len(members) == 1:
                ((i, grad),) = members
                summed[i] = _apply_reduce(grad, False, at)
                continue
            flat = torch.cat([grad.reshape(-1) for _, grad in members])
            flat = _apply_reduce(flat, False, at) if _wants_grad(flat) else _run_all_reduce(flat, at, owned=True)
            pieces = flat.split([grad.numel() for _, grad in members])
            for (i, grad), piece in zip(members, pieces):
                summed[i] = piece.view(grad.shape)
        return None, None, *summed


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ways: _Ways, at: _At) -> Tensor:
        ctx.dim, ctx.ways, ctx.at = dim, ways, at
        return _run_halo(x, dim, ways, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        at = ctx.at.backward()
        back = _HaloBack.apply if _wants_grad(grad) else _run_halo_back
        return back(grad, ctx.dim, ctx.ways, at), None, None, None


class _HaloBack(torch.autograd.Function):
    """What every rank's range gives its elements, added up where the elements are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ways: _Ways, at: _At) -> Tensor:
        ctx.dim, ctx.ways, ctx.at = dim, ways, at
        return _run_halo_back(x, dim, ways, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        forth = _Halo.apply if _wants_grad(grad) else _run_halo
        return forth(grad, ctx.dim, ctx.ways, ctx.at), None, None, None


# What runs.


def _run_switch(
    x: Tensor, gather_dim: int, gathered: Sizes, scatter_dim: int, scattered: Sizes, at: _At | _Both
) -> Tensor:
    rest = _numel_without(x, gather_dim, scatter_dim)
    packed = _pack(x, scatter_dim, scattered)
    if isinstance(at, _Both):
        received = _all_to_all_in_turn(packed, gathered, scattered, rest, at)
    else:
        sends = [gathered[at.rank] * n * rest for n in scattered]
        receives = [n * scattered[at.rank] * rest for n in gathered]
        received = _all_to_all(packed, receives, sends, at)
    del packed  # before there is one more
    shape = _resized(x, gather_dim, sum(gathered))
    shape[scatter_dim] = scattered[at.rank]
    return _unpack(received, shape, gather_dim, gathered)


def _run_split(x: Tensor, dim: int, sizes: Sizes, at: _At) -> Tensor:
    # clone, not contiguous(): a leading slice is contiguous already, and as a view would keep all of x alive
    return x.narrow(dim, *_range(sizes, at)).clone(memory_format=torch.contiguous_format)


def _run_gather(x: Tensor, dim: int, sizes: Sizes, at: _At) -> Tensor:
    flat = x.reshape(-1)
    if _is_even(sizes):
        received = _communicate(_c10d.all_gather_into_tensor, at, _as_moved(flat), at.ranks, at.group)
        received = _as_was(received, x.dtype)
    else:  # all-gather wants equal shards; sending mine to every rank puts the same bytes on the wire
        rest = _numel_without(x, dim)
        receives = [n * rest for n in sizes]
        received = _all_to_all(flat.repeat(at.ranks), receives, [flat.numel()] * at.ranks, at)
    return _unpack(received, _resized(x, dim, sum(sizes)), dim, sizes)


def _run_reduce_scatter(x: Tensor, dim: int, sizes: Sizes, at: _At) -> Tensor:
    shape = _resized(x, dim, sizes[at.rank])
    packed = _pack(x, dim, sizes)
    if _is_even(sizes):
        flat = packed.contiguous()  # which the gradient of a sum is not
        return _shaped(_communicate(_c10d.reduce_scatter_tensor, at, flat, "sum", at.ranks, at.group), shape)
    rest = _numel_without(x, dim)  # reduce-scatter wants equal shards: exchange the terms and sum them here
    terms = _all_to_all(packed, [sizes[at.rank] * rest] * at.ranks, [n * rest for n in sizes], at)
    return terms.view(at.ranks, *shape).sum(0, dtype=x.dtype)


def _run_all_reduce(x: Tensor, at: _At, owned: bool = False) -> Tensor:
    """`owned`: nobody else holds x, so it may be overwritten. A compiler decides that for itself."""
    op = _c10d.all_reduce_ if owned and type(x) in (Tensor, FakeTensor) else _c10d.all_reduce
    total = _communicate(op, at, x.contiguous(), "sum", at.group)
    return _shaped(total, list(x.shape)) if x.is_complex() else total  # of complex numbers torch gives a view


class _Ways(NamedTuple):
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


def _run_halo(x: Tensor, dim: int, ways: _Ways, at: _At) -> Tensor:
    sends = [(to, x.narrow(dim, a, b - a)) for to, a, b in ways.from_rank(at.rank) if to != at.rank]
    own = ways.of(at.rank)
    shapes = [(holder, _resized(x, dim, b - a)) for holder, a, b in own]
    received = iter(_exchange(x, sends, [entry for entry in shapes if entry[0] != at.rank], at, ways.anything))
    parts = [x.narrow(dim, a, b - a) if holder == at.rank else next(received) for holder, a, b in own]
    if not parts:
        return x.new_empty(_resized(x, dim, 0))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def _run_halo_back(grad: Tensor, dim: int, ways: _Ways, at: _At) -> Tensor:
    own = ways.of(at.rank)
    parts = grad.split([b - a for _, a, b in own], dim) if own else ()
    sends = [(holder, part) for (holder, _, _), part in zip(own, parts) if holder != at.rank]
    back = [(to, a, b) for to, a, b in ways.from_rank(at.rank) if to != at.rank]
    # From one rank pieces come in the order of its range, which is the order in which it was sent them.
    received = _exchange(grad, sends, [(to, _resized(grad, dim, b - a)) for to, a, b in back], at, ways.anything)
    total = grad.new_zeros(_resized(grad, dim, ways.held[at.rank]))
    for (holder, a, b), part in zip(own, parts):
        if holder == at.rank:
            total.narrow(dim, a, b - a).add_(part)
    for (_, a, b), part in zip(back, received):
        total.narrow(dim, a, b - a).add_(part)
    return total


def _exchange(
    like: Tensor, sends: list[tuple[int, Tensor]], receives: list[tuple[int, list[int]]], at: _At, anything: bool
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
    buffer = _all_to_all(torch.cat(flat) if len(flat) > 1 else flat[0].contiguous(), back, out, at)
    order = sorted(range(len(receives)), key=lambda n: receives[n][0])
    blocks = buffer.split([math.prod(receives[n][1]) for n in order]) if order else ()
    found = {n: block.view(receives[n][1]) for n, block in zip(order, blocks)}
    return [found[n] for n in range(len(receives))]


def _all_to_all(flat: Tensor, receives: list[int], sends: list[int], at: _At) -> Tensor:
    """Exchanges the blocks of a flat tensor; counts are elements."""
    wire = _as_moved(flat)
    if wire.dtype != flat.dtype:
        scale = flat.element_size()
        receives, sends = [n * scale for n in receives], [n * scale for n in sends]
    received = _communicate(_c10d.all_to_all_single, at, wire, receives, sends, at.group)
    return _as_was(received, flat.dtype)


def _all_to_all_in_turn(flat: Tensor, gathered: Sizes, scattered: Sizes, rest: int, at: _Both) -> Tensor:
    """An all-to-all of blocks for all ranks of two mesh dims: over the inner one to the rank that stands where the receiver
    does, then over the outer one, whose messages are as much fewer and larger as there are inner ranks."""
    outer, inner, (p, q) = at.outer.ranks, at.inner.ranks, (at.outer.rank, at.inner.rank)
    sizes = [gathered[at.rank] * n * rest for n in scattered]
    sends = [sum(sizes[to::inner]) for to in range(inner)]
    # What comes from the inner rank n for the outer rank m, and goes on to it.
    passed = [[gathered[p * inner + n] * scattered[m * inner + q] * rest for m in range(outer)] for n in range(inner)]
    flat = _all_to_all(_turned(flat, sizes, outer), [sum(row) for row in passed], sends, at.inner)
    sends = [sum(row[m] for row in passed) for m in range(outer)]
    receives = [sum(gathered[m * inner : (m + 1) * inner]) * scattered[at.rank] * rest for m in range(outer)]
    return _all_to_all(_turned(flat, [n for row in passed for n in row], inner), receives, sends, at.outer)


def _turned(flat: Tensor, sizes: list[int], rows: int) -> Tensor:
    """The blocks of a flat tensor that lie in `rows` rows, column by column."""
    columns = len(sizes) // rows
    if _is_even(tuple(sizes)):
        return flat.view(rows, columns, sizes[0]).transpose(0, 1).reshape(-1)
    blocks = flat.split(sizes)
    return torch.cat([blocks[row * columns + column] for column in range(columns) for row in range(rows)])


class _Simulated(threading.local):
    """The simulated collectives of this thread that are being issued."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Tensor]] = []


_simulated = _Simulated()
# A simulated collective is an op too, so that modes which keep results (selective checkpoints) see it as they see a real one.
_library.define("simulated(Tensor x) -> Tensor")
_library.impl("simulated", lambda x: _simulated.calls[-1](), "CompositeExplicitAutograd")


_before_first: list[Callable[[], None]] = []


def before_first_collective(check: Callable[[], None]) -> Callable[[], None]:
    """Runs `check` once, before the next collective of a primitive; call the result to run it by then at the latest."""

    def run() -> None:
        if run in _before_first:
            _before_first.remove(run)
            check()

    _before_first.append(run)
    return run


def _communicate(op: Any, at: _At, *args: Any) -> Tensor:
    return _wait(_issue(op, at, *args), at)


def _wait(issued: Tensor, at: _At) -> Tensor:
    """What a collective gives. Raises CommunicationError where other ranks are gone or too slow."""
    with _told(at, issued):
        return _c10d.wait_tensor(issued)


def _issue(op: Any, at: _At, *args: Any) -> Tensor:
    """Starts a collective: work may go on meanwhile, and what it gives is to be read after `_wait` only."""
    while _before_first:
        _before_first[0]()
    with _told(at, args[0]):
        return _issue_now(op, at, *args)


class _told:
    """Inside, what a backend raises says which primitive that was, in which stage."""

    def __init__(self, at: _At, tensor: Tensor) -> None:
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


def _issue_now(op: Any, at: _At, *args: Any) -> Tensor:
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


# Blocks. A flat buffer holds one contiguous block per rank, in rank order; block r is shard r along a dim.


def _pack(x: Tensor, dim: int, sizes: Sizes) -> Tensor:
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


def _unpack(flat: Tensor, shape: list[int], dim: int, sizes: Sizes) -> Tensor:
    """The tensor of `shape` whose shards along dim lie in `flat`: the inverse of `_pack`."""
    if _leads(shape, dim):
        return _shaped(flat, shape)
    if _is_even(sizes):
        return flat.view(len(sizes), *shape[:dim], sizes[0], *shape[dim + 1 :]).movedim(0, dim).reshape(shape)
    blocks = _split_flat(flat, sizes)
    return torch.cat([b.view(*shape[:dim], n, *shape[dim + 1 :]) for b, n in zip(blocks, sizes)], dim)


def _shaped(fresh: Tensor, shape: list[int]) -> Tensor:
    """A view of what nobody else has, which is none to autograd: a view that a function of its own gives it lets nobody change
    or detach in place."""
    return torch.ops.aten._unsafe_view.default(fresh, shape)


def _split_flat(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Cuts a flat tensor in proportion to `sizes`."""
    rest = flat.numel() // sum(sizes)
    return flat.split([n * rest for n in sizes])


def _is_even(sizes: Sizes) -> bool:
    return min(sizes) == max(sizes)


def _range(sizes: Sizes, at: _At) -> tuple[int, int]:
    """Where this rank's shard begins, and its length."""
    return sum(sizes[: at.rank]), sizes[at.rank]


def _leads(shape: Any, dim: int) -> bool:
    return all(n == 1 for n in shape[:dim])


def _blocks(x: Tensor, dim: int, count: int) -> Tensor:
    """View of x cut into `count` equal pieces along dim, the pieces as dim 0."""
    return x.unflatten(dim, (count, x.shape[dim] // count)).movedim(dim, 0)


def _numel_without(x: Tensor, *dims: int) -> int:
    return math.prod(n for d, n in enumerate(x.shape) if d not in dims)


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = size
    return shape


def _as_moved(flat: Tensor) -> Tensor:
    flat = flat.contiguous()
    return flat if flat.dtype in _MOVED_AS_IS else flat.resolve_conj().resolve_neg().view(torch.uint8)


def _as_was(wire: Tensor, dtype: torch.dtype) -> Tensor:
    return wire if wire.dtype == dtype else wire.view(dtype)


# Checks. Cheap: they run at every call.


def _wants_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _site(primitive: str, ranks: int, rank: int, group: str, where: str) -> _At:
    if not 0 <= rank < ranks:
        raise LayoutError(f"{primitive}: rank {rank} is not one of {ranks} ranks")
    return _At(ranks, rank, group, primitive, where)


def _dim(x: Tensor, dim: int, at: _At | _Both) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise LayoutError(f"{at.primitive}: no dim {dim} in a tensor of shape {list(x.shape)}")
    return dim % x.ndim


def _check_shard(x: Tensor, dim: int, size: list[int], at: _At | _Both) -> Sizes:
    """The sizes of all ranks' shards along a dim of which x is this rank's."""
    sizes = _sizes(sum(size), size, dim, at)
    if x.shape[dim] != sizes[at.rank]:
        raise LayoutError(
            f"{at.primitive}: dim {dim} of shape {list(x.shape)} holds {x.shape[dim]} elements, but "
            f"rank {at.rank} of {at.ranks} holds {sizes[at.rank]} of {sum(size)}"
        )
    return sizes


def _check_whole(x: Tensor, dim: int, size: list[int] | None, at: _At | _Both) -> Sizes:
    """The sizes of all ranks' shards along a dim of which x has all."""
    sizes = _sizes(x.shape[dim], size, dim, at)
    if sum(sizes) != x.shape[dim]:
        raise LayoutError(f"{at.primitive}: shards of {sum(sizes)} elements along dim {dim} of shape {list(x.shape)}")
    return sizes


def _sizes(whole: int, size: list[int] | None, dim: int, at: _At | _Both) -> Sizes:
    given = [whole] if size is None else size
    if any(n < 0 for n in given):
        raise LayoutError(f"{at.primitive}: dim {dim} cannot have {min(given)} elements")
    if len(given) == at.ranks > 1:
        return tuple(int(n) for n in given)
    if len(given) != 1:
        raise LayoutError(f"{at.primitive}: {len(given)} sizes for {at.ranks} ranks")
    return tuple(shard_sizes(given[0], at.ranks))


def _check_summable(x: Tensor, at: _At) -> None:
    if x.dtype == torch.bool:
        raise LayoutError(f"{at.primitive}: a bool tensor of shape {list(x.shape)} cannot be a partial sum")
