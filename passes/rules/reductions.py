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
    gone = {call.dim(dim) for dim in dims}
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
    """Shards sum their part and divide by the whole count, so that uneven shards weigh right."""

    def local(emit, target, args, kwargs, here: Local):
        count = whole_count = 1
        for axis in rule_.reduces:
            count *= here.sizes[axis]
            whole_count *= here.whole_sizes[axis]
        if count == whole_count:
            return emit(target, *args, **kwargs)
        total = emit(aten.sum.dim_IntList if target is aten.mean.dim else aten.sum.default, *args, **kwargs)
        return emit(aten.div.Tensor, total, whole_count)

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
def scan(call: OpCall) -> OpRule:
    """Each result needs all that stands before it."""
    shape = call.operands[0].shape
    names = [f"d{position}" for position in range(len(shape))]
    dim = call.dim(call["dim"])
    out = list(names)
    whole = [names[dim]]
    if call.outputs[0] != shape:
        out[dim] = "kept"
        whole.append("kept")
    text = f"{' '.join(names)} -> {', '.join([' '.join(out)] * len(call.outputs))}"
    return from_notation(text, call, whole=whole)
