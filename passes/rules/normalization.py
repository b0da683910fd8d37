"""Norms over the last dims: statistics need those dims whole, all others are parallel."""

from __future__ import annotations

import math

import torch

from ..notation import Local, OpCall, OpRule, Statistic, from_notation, value_of
from . import rule

aten = torch.ops.aten


@rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def layer_norm(call: OpCall) -> OpRule:
    names = [f"n{position}" for position in range(len(call["normalized_shape"]))]
    normalized = " ".join(names)
    statistics = f", ... {' '.join('1' for _ in names)}" * (len(call.outputs) - 1)  # of native_layer_norm
    text = f"... {normalized}, {normalized}, {normalized} -> ... {normalized}{statistics}"
    return from_notation(text, call, whole=names)


@rule("aten::_weight_norm")
def weight_norm(call: OpCall) -> OpRule:
    """`v` over its norm, times `g`: a norm for each index of one dim, or one of all (-1)."""
    rank, dim = len(call.operands[0].shape), call["dim"]
    names = [f"d{position}" for position in range(rank)]
    each = names[dim] if dim >= 0 else ""
    sizes = " ".join("1" if n != dim else each for n in range(len(call.operands[1].shape)))
    return from_notation(f"{' '.join(names)}, {sizes} -> {' '.join(names)}", call, whole={*names} - {each})


@rule("aten::group_norm")
def group_norm(call: OpCall) -> OpRule:
    """Statistics over the channels of a group and over space: ranks that share space combine them."""
    data, groups = call.operands[0].shape, call["num_groups"]
    space = [f"s{position}" for position in range(len(data) - 2)]

    def local(emit, target, args, kwargs, here: Local):
        if not here.shares(space):
            return emit(target, args[0], here.sizes.get("g", 1), *args[2:], **kwargs)
        x, weight, bias = args[0], *(*args[2:4], None, None)[:2]
        shape = [here.sizes.get(axis, 1) for axis in ("b", "g", "c", *space)]
        return _normalize(emit, x, weight, bias, call["eps"], shape, ["b", "g"], ["c", *space], here)[0]

    text = f"b (g c) {' '.join(space)}, (g c), (g c) -> b (g c) {' '.join(space)}"
    sizes = {"g": groups, "c": data[1] // groups}
    combines = dict.fromkeys(space, (_statistic(call, "b", "g"),) * 2)
    return from_notation(text, call, whole="c", sizes=sizes, combines=combines, local=local)


@rule("aten::instance_norm")
def instance_norm(call: OpCall) -> OpRule | None:
    """A group norm of single channels; with given statistics each element by itself."""
    space = [f"s{position}" for position in range(len(call.operands[0].shape) - 2)]
    if not call["use_input_stats"]:
        text = f"b c {' '.join(space)}{', c' * (len(call.operands) - 1)} -> b c {' '.join(space)}"
        return from_notation(text, call)
    if call["running_mean"] is not None:
        return None  # running statistics that it changes behind the schema's back

    def local(emit, target, args, kwargs, here: Local):
        if not here.shares(space):
            return emit(target, *args, **kwargs)
        shape = [here.sizes.get(axis, 1) for axis in ("b", "c", *space)]
        x, weight, bias = args[:3]
        return _normalize(emit, x, weight, bias, call["eps"], shape, ["b", "c"], space, here)[0]

    text = f"b c {' '.join(space)}, c, c -> b c {' '.join(space)}"
    combines = dict.fromkeys(space, (_statistic(call, "b", "c"),) * 2)
    return from_notation(text, call, combines=combines, local=local)


@rule("aten::batch_norm", "aten::_native_batch_norm_legit_functional")
def batch_norm(call: OpCall) -> OpRule | None:
    """In training, statistics of each channel over batch and space, which ranks combine; the statistics that the functional
    form returns are the same on all. In eval each element by itself."""
    space = [f"s{position}" for position in range(len(call.operands[0].shape) - 2)]
    functional = len(call.outputs) > 1
    text = f"b c {' '.join(space)}{', c' * (len(call.operands) - 1)} -> b c {' '.join(space)}"
    if not call["training"]:
        return None if functional else from_notation(text, call)
    over = ["b", *space]

    def local(emit, target, args, kwargs, here: Local):
        if not here.shares(over):
            return emit(target, *args, **kwargs)
        x, weight, bias, *running = args[:5]
        shape = [here.sizes.get(axis, 1) for axis in ("b", "c", *space)]
        out, *statistics = _normalize(emit, x, weight, bias, call["eps"], shape, ["c"], over, here)
        if not functional:
            return out
        mean, var = (
            emit(aten.detach.default, emit(aten.reshape.default, value, [shape[1]])) for value in statistics
        )
        inverse = emit(aten.rsqrt.default, emit(aten.add.Tensor, var, call["eps"]))
        count = math.prod(here.whole_sizes.get(axis, 1) for axis in over)
        news = (mean, emit(aten.mul.Tensor, var, count / max(count - 1, 1)))
        kept = [
            emit(aten.lerp.Scalar, old, emit(aten.to.dtype, new, value_of(old).dtype), call["momentum"])
            for old, new in zip(running, news)
        ]
        return out, mean, inverse, *kept

    combines = dict.fromkeys(over, (_statistic(call, "c"),) * 2)
    return from_notation(text + ", c" * (len(call.outputs) - 1), call, combines=combines, local=local)


def _statistic(call: OpCall, *axes: str) -> Statistic:
    return Statistic(axes, at_least_single(call.operands[0].dtype))


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """What statistics are computed in."""
    return dtype if dtype == torch.float64 else torch.float32


def _normalize(
    emit, x, weight, bias, eps: float, shape: list[int], kept: list[str], over: list[str], here: Local
) -> tuple:
    """`x`, seen as `shape` (batch, channels, space), less its mean over the axes `over`, over its deviation, times weight
    plus bias of each channel; and mean and variance, of sizes `kept`. Ranks that share axes combine what they sum."""
    given = value_of(x)
    # Dims that are summed: those whose axes are not kept. Batch and channels (or groups) come first.
    lead = ["b", *(["g", "c"] if "g" in kept else ["c"])]
    dims = [n for n in range(len(shape)) if n >= len(lead) or lead[n] not in kept]
    count = math.prod(here.whole_sizes.get(axis, 1) for axis in over)

    def mean_of(values):
        total = here.combined(emit, emit(aten.sum.dim_IntList, values, dims, True), over)
        return emit(aten.div.Tensor, total, count)

    exact = emit(aten.to.dtype, emit(aten.reshape.default, x, shape), at_least_single(given.dtype))
    mean = mean_of(exact)
    centred = emit(aten.sub.Tensor, exact, mean)
    var = mean_of(emit(aten.mul.Tensor, centred, centred))
    out = emit(aten.mul.Tensor, centred, emit(aten.rsqrt.default, emit(aten.add.Tensor, var, eps)))
    per_channel = [1, *shape[1 : len(lead)], *[1] * (len(shape) - len(lead))]
    for op, own in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if own is not None:
            out = emit(op, out, emit(aten.reshape.default, own, per_channel))
    out = emit(aten.reshape.default, emit(aten.to.dtype, out, given.dtype), list(given.shape))
    return out, mean, var
