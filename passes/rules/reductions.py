"""Dims summed or compared away."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import rule

aten = torch.ops.aten


def _reduction(call: OpCall, kind: str, **flags) -> OpRule:
    rank = len(call.operands[0].shape)
    dims = call.bound.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {call.dim(dim) for dim in dims if rank}
    names = [f"d{position}" for position in range(rank)]
    kept = call.bound.get("keepdim", False)
    out = [name if position not in gone else "1" for position, name in enumerate(names) if position not in gone or kept]
    text = f"{' '.join(names)} -> {', '.join([' '.join(out)] * len(call.outputs))}"
    return from_notation(text, call, **{kind: [names[position] for position in gone]}, **flags)


@rule("aten::sum")
def sum_(call: OpCall) -> OpRule:
    return _reduction(call, "reduces")


@rule("aten::mean")
def mean(call: OpCall) -> OpRule:
    """A shard's mean weighs as much as the shard is of the whole, so that uneven shards weigh right."""

    def local(emit, target, args, kwargs, here: Local):
        count = whole_count = 1
        for axis in rule_.reduces:
            count *= here.sizes[axis]
            whole_count *= here.whole_sizes[axis]
        mean = emit(target, *args, **kwargs)
        return mean if count == whole_count else emit(aten.mul.Tensor, mean, count / whole_count)

    rule_ = _reduction(call, "reduces", local=local)
    return rule_


@rule(
    "aten::amax",
    "aten::amin",
    "aten::argmax",
    "aten::argmin",
    "aten::max.dim",
    "aten::min.dim",
    "aten::var.dim",
    "aten::std.dim",
    "aten::var.correction",
    "aten::std.correction",
    "aten::prod.dim_int",
    "aten::any.dim",
    "aten::all.dim",
    "aten::logsumexp",
    "aten::linalg_vector_norm",
)
def whole_reduction(call: OpCall) -> OpRule:
    return _reduction(call, "whole")


@rule("aten::cumsum", "aten::cumprod", "aten::sort", "aten::topk")
def scan(call: OpCall) -> OpRule | None:
    """Each result needs all that stands before it."""
    shape = call.operands[0].shape
    if not shape:
        return None
    names = [f"d{position}" for position in range(len(shape))]
    dim = call.dim(call["dim"])
    out = list(names)
    whole = [names[dim]]
    if call.outputs[0] != shape:
        out[dim] = "kept"
        whole.append("kept")
    text = f"{' '.join(names)} -> {', '.join([' '.join(out)] * len(call.outputs))}"
    return from_notation(text, call, whole=whole)
