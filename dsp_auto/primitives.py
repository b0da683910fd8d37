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

`switch`, `gather`, `reduce` and `reduce_scatter` also come in two halves, between which other work goes on while the collective
is under way (on a GPU on a stream of its own), and in backward the other way round:

    coming, flight = start_switch(x, ...)        packs and issues           backward: waits and unpacks
    y = wait_switch(coming, flight, ...)         waits and unpacks          backward: packs and issues

Both take the same arguments after their tensors. `coming` and `flight` hold nothing to read, and are for one `wait_...` only;
`coming` is `[terms, *x.shape]` on one element of memory, and what autograd goes by. Where gradients of gradients are wanted or
`torch.autograd.detect_anomaly` looks at gradients, backward does all at once.

Each op is registered as CompositeImplicitAutograd: autograd, fake tensors and torch.compile look through it
and see functional collectives and their waits, while a graph captured above it keeps one readable node.

Raises `LayoutError` where dims, sizes, ranks or dtypes do not fit, `CommunicationError` where another rank does not answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dsp_auto.collectives import At, Both, c10d, issue, site, wait
from dsp_auto.errors import LayoutError
from dsp_auto.moves import (
    AmongZeros,
    Cut,
    Gather,
    Halo,
    HaloBack,
    InHalves,
    Move,
    Reduce,
    ReduceScatter,
    Same,
    Sizes,
    Switch,
    Ways,
)
from dsp_auto.shards import shard_sizes

_library = torch.library.Library("dsp", "DEF")  # unregisters its ops when collected, so it must live

# The moves of the primitives, checked; None where there is but one rank.


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
) -> Switch | None:
    return _switch_at(site("switch", ranks, rank, group, where), x, gather_dim, gather_size, scatter_dim, scatter_size)


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
) -> Switch | None:
    inner = site("hierarchical_switch", ranks, rank, group, where)
    outer = site("hierarchical_switch", outer_ranks, outer_rank, outer_group, where)
    both = Both("hierarchical_switch", outer, inner)
    return _switch_at(both, x, gather_dim, gather_size, scatter_dim, scatter_size)


def _switch_at(
    at: At | Both,
    x: Tensor,
    gather_dim: int,
    gather_size: list[int],
    scatter_dim: int,
    scatter_size: list[int] | None,
) -> Switch | None:
    gather_dim, scatter_dim = _dim(x, gather_dim, at), _dim(x, scatter_dim, at)
    if gather_dim == scatter_dim:
        raise LayoutError(f"{at.primitive}: gather_dim and scatter_dim are both {gather_dim}; nothing to switch")
    gathered = _check_shard(x, gather_dim, gather_size, at)
    scattered = _check_whole(x, scatter_dim, scatter_size, at)
    return None if at.ranks == 1 else Switch(gather_dim, gathered, scatter_dim, scattered, at)


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
) -> Cut | None:
    at = site("split", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_whole(x, dim, size, at)
    return None if ranks == 1 else Cut(dim, sizes, partial_grad, at)


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
) -> Gather | None:
    at = site("gather", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_shard(x, dim, size, at)
    return None if ranks == 1 else Gather(dim, sizes, partial_grad, at)


def _reduce(
    x: Tensor, ranks: int, rank: int, group: str, partial_grad: bool = False, *, where: str = ""
) -> Reduce | None:
    at = site("reduce", ranks, rank, group, where)
    _check_summable(x, at)
    return None if ranks == 1 else Reduce(partial_grad, at)


def _reduce_scatter(
    x: Tensor, dim: int, ranks: int, rank: int, group: str, size: list[int] | None = None, *, where: str = ""
) -> ReduceScatter | None:
    at = site("reduce_scatter", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    sizes = _check_whole(x, dim, size, at)
    _check_summable(x, at)
    return None if ranks == 1 else ReduceScatter(dim, sizes, at)


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
) -> Halo:
    at = site("halo", ranks, rank, group, where)
    dim = _dim(x, dim, at)
    if not len(held) == len(starts) == len(stops) == ranks:
        raise LayoutError(f"halo: {len(held)} lengths and {len(starts)}, {len(stops)} ends for {ranks} ranks")
    if x.shape[dim] != held[rank]:
        raise LayoutError(
            f"halo: dim {dim} of shape {list(x.shape)} holds {x.shape[dim]} elements where rank {rank} should hold "
            f"{held[rank]}"
        )
    return Halo(dim, Ways(tuple(held), tuple(starts), tuple(stops)), at)


# The ops.


def _whole(move_of: Callable[..., Move | None]) -> Callable[..., Tensor]:
    def op(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        move = move_of(x, *arguments, **named)
        return x if move is None else _apply(move, x)

    return op


def _start(move_of: Callable[..., InHalves | None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def op(x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        move = move_of(x, *arguments, **named)
        if move is None:
            return x.unsqueeze(0), x.new_empty(0)
        return _Started.apply(x, move) if wants_grad(x) else _begin(x, move)

    return op


def _wait(move_of: Callable[..., InHalves | None]) -> Callable[..., Tensor]:
    def op(coming: Tensor, flight: Tensor, *arguments: Any, **named: Any) -> Tensor:
        x = coming[0]
        move = move_of(x, *arguments, **named)
        if move is None:
            return x
        return _Awaited.apply(coming, flight, move) if wants_grad(coming) else move.end(flight, x.shape, x.dtype)

    return op


def _replicate(
    xs: list[Tensor], ranks: int, rank: int, group: str, materialize: bool = False, *, where: str = ""
) -> list[Tensor]:
    at = site("replicate", ranks, rank, group, where)
    out = list(xs)
    wanted = [i for i, x in enumerate(xs) if wants_grad(x)]
    if ranks > 1 and wanted:
        for i, y in zip(wanted, _Replicate.apply(at, materialize, *(xs[i] for i in wanted))):
            out[i] = y
    return out


# Of each primitive, the arguments after its tensors, and its move.
_ARGUMENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "switch": (
        "int gather_dim, int[1] gather_size, int scatter_dim, int ranks, int rank, str group, int[]? scatter_size=None",
        _switch,
    ),
    "hierarchical_switch": (
        "int gather_dim, int[1] gather_size, int scatter_dim, int outer_ranks, int outer_rank, str outer_group, int ranks,"
        " int rank, str group, int[]? scatter_size=None",
        _hierarchical_switch,
    ),
    "split": ("int dim, int ranks, int rank, str group, bool partial_grad=False, int[]? size=None", _split),
    "gather": ("int dim, int[1] size, int ranks, int rank, str group, bool partial_grad=False", _gather),
    "reduce": ("int ranks, int rank, str group, bool partial_grad=False", _reduce),
    "reduce_scatter": ("int dim, int ranks, int rank, str group, int[]? size=None", _reduce_scatter),
    "halo": ("int dim, int[] held, int[] starts, int[] stops, int ranks, int rank, str group", _halo),
}
PRIMITIVES = (*_ARGUMENTS, "replicate")
IN_HALVES = ("switch", "gather", "reduce", "reduce_scatter")  # those that come as `start_...` and `wait_...` too


def _define(schema: str, op: Callable[..., Any]) -> None:
    _library.impl(_library.define(schema), op, "CompositeImplicitAutograd")


for _name, (_arguments, _move_of) in _ARGUMENTS.items():
    _define(f"{_name}(Tensor x, {_arguments}, *, str where='') -> Tensor", _whole(_move_of))
    if _name in IN_HALVES:
        _define(f"start_{_name}(Tensor x, {_arguments}, *, str where='') -> (Tensor, Tensor)", _start(_move_of))
        _define(f"wait_{_name}(Tensor coming, Tensor flight, {_arguments}, *, str where='') -> Tensor", _wait(_move_of))
_define(
    "replicate(Tensor[] xs, int ranks, int rank, str group, bool materialize=False, *, str where='') -> Tensor[]", _replicate
)


# Autograd. A move is recorded only where somebody wants a gradient, in a forward or in a backward, and its gradient is a move
# again, so gradients of gradients are exact too.


def _apply(move: Move, x: Tensor) -> Tensor:
    return _FUNCTIONS[type(move)].apply(x, move) if wants_grad(x) else move.run(x)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move) -> Tensor:
        ctx.move = move
        return move.run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _apply(ctx.move.adjoint(), grad), None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: At, materialize: bool, *xs: Tensor) -> tuple[Tensor, ...]:
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
        summed, total = list(grads), Reduce(False, ctx.at.backward())
        for members in alike.values():
            if len(members) == 1:
                ((i, grad),) = members
                summed[i] = _apply(total, grad)
                continue
            flat = torch.cat([grad.reshape(-1) for _, grad in members])
            flat = _apply(total, flat) if wants_grad(flat) else _reduced_in_place(flat, total.at)
            pieces = flat.split([grad.numel() for _, grad in members])
            for (i, grad), piece in zip(members, pieces):
                summed[i] = piece.view(grad.shape)
        return None, None, *summed


def _reduced_in_place(flat: Tensor, at: At) -> Tensor:
    """The sum over the ranks, in memory that nobody else holds. A compiler decides for itself what it overwrites."""
    op = c10d.all_reduce_ if type(flat) in (Tensor, FakeTensor) else c10d.all_reduce
    return wait(issue(op, at, flat, "sum", at.group), at)


def _begin(x: Tensor, move: InHalves) -> tuple[Tensor, Tensor]:
    """What is on its way, after what autograd goes by: like what the adjoint will have on its way, on one element of memory."""
    back = move.adjoint()
    terms = back.terms if isinstance(back, InHalves) else 1
    return x.new_empty(()).expand(terms, *x.shape), move.begin(x)


def _at_once(grad: Tensor) -> bool:
    """Whether a gradient must be there when a backward returns it: others look at it, or go on from it."""
    return wants_grad(grad) or torch.is_anomaly_enabled()


class _Started(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: InHalves) -> tuple[Tensor, Tensor]:
        coming, flight = _begin(x, move)
        ctx.move, ctx.shape, ctx.dtype = move, move.shape_after(x.shape), x.dtype
        ctx.mark_non_differentiable(flight)
        ctx.set_materialize_grads(False)  # which would be zeros for what is under way
        return coming, flight

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple:
        if grad is None:
            return None, None
        back = ctx.move.adjoint()
        if _at_once(grad) or not isinstance(back, InHalves):
            return grad.sum(0) if grad.shape[0] > 1 else grad.squeeze(0), None
        return back.end(grad, ctx.shape, ctx.dtype), None


class _Awaited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, flight: Tensor, move: InHalves) -> Tensor:
        ctx.move, ctx.shape = move, coming.shape
        # A checkpoint runs its forward again as far as the last tensor that was saved, and what is issued there is to be waited
        # for there. It is one element of memory.
        ctx.save_for_backward(coming)
        return move.end(flight, coming.shape[1:], coming.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        back = ctx.move.adjoint()
        if isinstance(back, InHalves) and not _at_once(grad):
            flight = back.begin(grad)
            return flight.view(grad.dtype).view(ctx.shape), None, None
        found = _apply(back, grad).unsqueeze(0)
        rest = ctx.shape[0] - 1
        if rest:  # the other terms
            found = torch.cat([found, found.new_zeros(rest, *found.shape[1:])])
        return found, None, None


_FUNCTIONS: dict[type[Move], Any] = {
    move: type(f"_{move.__name__}", (_Moved,), {})
    for move in (Switch, Cut, AmongZeros, Gather, ReduceScatter, Reduce, Same, Halo, HaloBack)
}


# Checks. Cheap: they run at every call.


def wants_grad(x: Tensor) -> bool:
    """Whether autograd records what is done with x."""
    return x.requires_grad and torch.is_grad_enabled()


def _dim(x: Tensor, dim: int, at: At | Both) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise LayoutError(f"{at.primitive}: no dim {dim} in a tensor of shape {list(x.shape)}")
    return dim % x.ndim


def _check_shard(x: Tensor, dim: int, size: list[int], at: At | Both) -> Sizes:
    """The sizes of all ranks' shards along a dim of which x is this rank's."""
    sizes = _sizes(sum(size), size, dim, at)
    if x.shape[dim] != sizes[at.rank]:
        raise LayoutError(
            f"{at.primitive}: dim {dim} of shape {list(x.shape)} holds {x.shape[dim]} elements, but "
            f"rank {at.rank} of {at.ranks} holds {sizes[at.rank]} of {sum(size)}"
        )
    return sizes


def _check_whole(x: Tensor, dim: int, size: list[int] | None, at: At | Both) -> Sizes:
    """The sizes of all ranks' shards along a dim of which x has all."""
    sizes = _sizes(x.shape[dim], size, dim, at)
    if sum(sizes) != x.shape[dim]:
        raise LayoutError(f"{at.primitive}: shards of {sum(sizes)} elements along dim {dim} of shape {list(x.shape)}")
    return sizes


def _sizes(whole: int, size: list[int] | None, dim: int, at: At | Both) -> Sizes:
    given = [whole] if size is None else size
    if any(n < 0 for n in given):
        raise LayoutError(f"{at.primitive}: dim {dim} cannot have {min(given)} elements")
    if len(given) == at.ranks > 1:
        return tuple(int(n) for n in given)
    if len(given) != 1:
        raise LayoutError(f"{at.primitive}: {len(given)} sizes for {at.ranks} ranks")
    return tuple(shard_sizes(given[0], at.ranks))


def _check_summable(x: Tensor, at: At) -> None:
    if x.dtype == torch.bool:
        raise LayoutError(f"{at.primitive}: a bool tensor of shape {list(x.shape)} cannot be a partial sum")
