"""Dims summed or compared away."""

from __future__ import annotations

import math

import torch

from ..notation import Local, OpCall, OpRule, Statistic, from_notation
from . import along, numbered, rule
from .normalization import at_least_single

aten = torch.ops.aten


def _dims(call: OpCall) -> tuple[list[int], bool]:
    """The dims that a reduction takes away, counted from the front, and whether it keeps them with size one."""
    rank = len(call.operands[0].shape)
    dims = call.bound.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted({call.dim(dim) for dim in dims if rank}), call.bound.get("keepdim", False)


def _reduction(call: OpCall, kind: str | None, **flags) -> OpRule:
    rank = len(call.operands[0].shape)
    gone, kept = _dims(call)
    names = [f"d{position}" for position in range(rank)]
    out = [name if position not in gone else "1" for position, name in enumerate(names) if position not in gone or kept]
    text = f"{' '.join(names)} -> {', '.join([' '.join(out)] * len(call.outputs))}"
    if kind is not None:
        flags[kind] = [names[position] for position in gone]
    return from_notation(text, call, **flags)


@rule("aten::sum", "aten::nansum", "aten::count_nonzero")
def sum_(call: OpCall) -> OpRule:
    return _reduction(call, "reduces")


@rule("aten::sum_to_size")
def sum_to_size(call: OpCall) -> OpRule:
    """Summed down to what would broadcast to the operand."""

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, args[0], list(here.outputs[0]))

    shape, result = call.operands[0].shape, call.outputs[0]
    names = numbered(len(shape))
    last = len(names) - len(result)
    gone = [name for n, name in enumerate(names) if n < last or result[n - last] != shape[n]]
    out = ["1" if name in gone else name for name in names[last:]]
    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, reduces=gone, local=local)


def part_of_mean(emit, mean, here: Local, reduces: frozenset[str]):
    """A shard's mean weighs as much as the shard is of the whole, so that uneven shards weigh right."""
    count = whole_count = 1
    for axis in reduces:
        count *= here.sizes[axis]
        whole_count *= here.whole_sizes[axis]
    return mean if count == whole_count else emit(aten.mul.Tensor, mean, count / whole_count)


@rule("aten::mean")
def mean(call: OpCall) -> OpRule:
    def local(emit, target, args, kwargs, here: Local):
        return part_of_mean(emit, emit(target, *args, **kwargs), here, rule_.reduces)

    rule_ = _reduction(call, "reduces", local=local)
    return rule_


@rule(
    "aten::amax",
    "aten::amin",
    "aten::argmax",
    "aten::argmin",
    "aten::max.dim",
    "aten::min.dim",
    "aten::prod.dim_int",
    "aten::logsumexp",
    "aten::std_mean",
    "aten::var_mean",
    "aten::aminmax",
    "aten::max.default",
    "aten::min.default",
    "aten::prod.default",
    "aten::nanmean",
    "aten::median",
    "aten::nanmedian",
    "aten::mode",
    "aten::kthvalue",
    "aten::norm",
    "aten::linalg_norm",
    "aten::linalg_matrix_norm",
)
def whole_reduction(call: OpCall) -> OpRule:
    return _reduction(call, "whole")


@rule("aten::var", "aten::std", "aten::var.dim", "aten::std.dim", "aten::var.correction", "aten::std.correction")
def variance(call: OpCall) -> OpRule:
    """Squares around the mean of all: ranks that share the dims combine the mean, and for a deviation the squares too."""
    is_std = call.target._schema.name == "aten::std"

    def local(emit, target, args, kwargs, here: Local):
        gone = rule_.combines
        if not here.shares(gone):
            return emit(target, *args, **kwargs)
        dims, keep = _dims(call)
        count = math.prod(call.operands[0].shape[dim] for dim in dims)
        less = int(call["unbiased"]) if "unbiased" in call.bound else call["correction"]
        less = 1 if less is None else less
        total = here.combined(emit, emit(aten.sum.dim_IntList, args[0], dims, True), gone)
        centred = emit(aten.sub.Tensor, args[0], emit(aten.div.Tensor, total, count))
        squares = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, centred, centred), dims, keep)
        share = emit(aten.div.Tensor, squares, max(count - less, 0))
        return _root(emit, here.combined(emit, share, gone, is_result=True)) if is_std else share

    dtype = call.operands[0].dtype
    statistics = [_statistic(call, dtype), *([_statistic(call, dtype, is_result=True)] if is_std else [])]
    rule_ = _reduction(call, None if is_std else "reduces", combines=_for_each(call, *statistics), local=local)
    return rule_


def _statistic(call: OpCall, dtype: torch.dtype, is_result: bool = False) -> Statistic:
    """One number for each element of the result."""
    rank, (gone, _) = len(call.operands[0].shape), _dims(call)
    return Statistic(tuple(f"d{n}" for n in range(rank) if n not in gone), dtype, is_result)


def _for_each(call: OpCall, *statistics: Statistic) -> dict[str, tuple[Statistic, ...]]:
    return {f"d{dim}": statistics for dim in _dims(call)[0]}


def _root(emit, squares):
    """The square root, whose gradient at 0 is 0."""
    nothing = emit(aten.eq.Scalar, squares, 0)
    root = emit(aten.sqrt.default, emit(aten.masked_fill.Scalar, squares, nothing, 1.0))
    return emit(aten.masked_fill.Scalar, root, nothing, 0.0)


@rule("aten::linalg_vector_norm")
def vector_norm(call: OpCall) -> OpRule:
    """The Euclidean norm: the root of squares that ranks sum. Of the others, dims stay whole."""
    if call["ord"] != 2 or call["dtype"] is not None:
        return _reduction(call, "whole")

    def local(emit, target, args, kwargs, here: Local):
        if not here.shares(rule_.combines):
            return emit(target, *args, **kwargs)
        dims, keep = _dims(call)
        own = emit(aten.to.dtype, emit(target, args[0], 2, dims, keep), exact)
        squares = here.combined(emit, emit(aten.mul.Tensor, own, own), rule_.combines, is_result=True)
        return emit(aten.to.dtype, _root(emit, squares), dtype)

    dtype = call.operands[0].dtype
    exact = at_least_single(dtype)
    statistic = _statistic(call, exact, is_result=True)
    rule_ = _reduction(call, None, combines=_for_each(call, statistic), local=local)
    return rule_


@rule("aten::any", "aten::all")
def any_all(call: OpCall) -> OpRule:
    """Ranks count the elements that decide."""
    is_all = call.target._schema.name == "aten::all"

    def local(emit, target, args, kwargs, here: Local):
        own = emit(target, *args, **kwargs)
        if not here.shares(rule_.combines):
            return own
        decides = emit(aten.logical_not.default, own) if is_all else own
        count = here.combined(emit, emit(aten.to.dtype, decides, torch.int32), rule_.combines, is_result=True)
        return emit(aten.eq.Scalar if is_all else aten.ne.Scalar, count, 0)

    statistic = _statistic(call, torch.int32, is_result=True)
    rule_ = _reduction(call, None, combines=_for_each(call, statistic), local=local)
    return rule_


@rule("aten::dist")
def dist(call: OpCall) -> OpRule:
    """The norm of a difference, whose operands broadcast."""
    ranks = [len(operand.shape) for operand in call.operands]
    names = numbered(max(ranks))
    groups = ", ".join(" ".join(names[len(names) - rank :]) for rank in ranks)
    return from_notation(f"{groups} ->", call, whole=names)


@rule("aten::quantile", "aten::nanquantile")
def quantile(call: OpCall) -> OpRule:
    """Several quantiles `q` are a first dim of the result."""
    rank = len(call.operands[0].shape)
    names = numbered(rank)
    gone = names if call["dim"] is None else [names[call.dim(call["dim"])]] if rank else []
    out = [name if name not in gone else "1" for name in names if name not in gone or call["keepdim"]]
    several = len(call.operands) > 1 and len(call.operands[1].shape) == 1
    text = f"{' '.join(names)}, {'q' * several} -> {' '.join(['q'] * several + out)}"
    return from_notation(text, call, whole=gone)


@rule(
    "aten::cumsum",
    "aten::cumprod",
    "aten::cummax",
    "aten::cummin",
    "aten::logcumsumexp",
    "aten::sort",
    "aten::argsort",
    "aten::topk",
)
def scan(call: OpCall) -> OpRule | None:
    """Each result needs all that stands before it, or all there is."""
    return along(call, [call.dim(call["dim"])]) if call.operands[0].shape else None


@rule("aten::msort")
def sort_rows(call: OpCall) -> OpRule | None:
    return along(call, [0]) if call.operands[0].shape else None
