"""Pooling: a convolution's windows without its weights."""

from __future__ import annotations

import math

import torch

from ..notation import Local, OpCall, OpRule, Window, from_notation
from . import rule
from .convolution import Sliding, per_dim, same_or_not

aten = torch.ops.aten


@rule(
    "aten::max_pool1d",
    "aten::max_pool2d",
    "aten::max_pool3d",
    "aten::avg_pool1d",
    "aten::avg_pool2d",
    "aten::avg_pool3d",
)
def pool(call: OpCall) -> OpRule | None:
    """The largest or the mean element of each window."""
    name = call.target._schema.name
    space, is_max = int(name[-2]), "max" in name
    size, out = call.operands[0].shape[-space:], call.outputs[0][-space:]
    kernel = per_dim(call, "kernel_size", space)
    stride, padding = per_dim(call, "stride", space, kernel), per_dim(call, "padding", space)
    dilation = per_dim(call, "dilation", space) if is_max else [1] * space
    lead = len(call.operands[0].shape) - space
    before, after, sizes, moved, ranges = [], [], {}, [], []
    windows: dict[int, Window] = {}
    for n in range(space):
        slide = Sliding(kernel[n], stride[n], dilation[n], padding[n], padding[n])
        if slide.is_patches(size[n]):
            before.append(f"(s{n} k{n})")
            after.append(f"s{n}")
            sizes |= {f"s{n}": size[n] // kernel[n], f"k{n}": kernel[n]}
            moved.append(f"k{n}")
            continue
        here, there = same_or_not(n, size[n], out[n])
        before.append(here)
        after.append(there)
        # A mean over what padding leaves of a window counts elements by place, which a shard has lost.
        past_the_end = slide.needs(0, out[n])[1] > size[n] + padding[n]
        if not is_max and (past_the_end or (padding[n] and not call["count_include_pad"])):
            moved += [here, there]
            continue
        ranges.append((here, there))
        fill = -math.inf if is_max else 0.0
        windows[n] = Window(0, lead + n, here, there, slide.needs, fill=fill, computes=True)

    def local(emit, target, args, kwargs, here: Local):
        x, margins = args[0], list(padding)
        for n, window in windows.items():
            if window.target in here.sites:
                x, margins[n] = here.window(emit, x, window), 0
        if is_max:
            return emit(target, x, kernel, stride, margins, dilation, call["ceil_mode"])
        more = [call["divisor_override"]] if "divisor_override" in call.bound else []
        return emit(target, x, kernel, stride, margins, call["ceil_mode"], call["count_include_pad"], *more)

    text = f"... {' '.join(before)} -> ... {' '.join(after)}"
    return from_notation(
        text, call, moved=moved, ranges=ranges, sizes=sizes, windows=tuple(windows.values()), local=local
    )


@rule("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def adaptive_pool(call: OpCall) -> OpRule:
    """Windows of equal size where the sizes divide: a mean over each, which ranks may share."""
    space = int(call.target._schema.name[-2])
    size, out = call.operands[0].shape[-space:], call.outputs[0][-space:]
    before, after, sizes, moved, reduces = [], [], {}, [], []
    for n in range(space):
        if size[n] % out[n] == 0:
            before.append(f"(s{n} k{n})")
            after.append(f"s{n}")
            sizes |= {f"s{n}": out[n], f"k{n}": size[n] // out[n]}
            reduces.append(f"k{n}")
        else:
            before.append(f"i{n}")
            after.append(f"o{n}")
            moved += [f"i{n}", f"o{n}"]

    def local(emit, target, args, kwargs, here: Local):
        goal = [here.sizes.get(f"s{n}", 1) if size[n] % out[n] == 0 else out[n] for n in range(space)]
        mean = emit(target, args[0], goal)
        share = math.prod(here.sizes[axis] / here.whole_sizes[axis] for axis in rule_.reduces)
        return mean if share == 1 else emit(aten.mul.Tensor, mean, share)

    text = f"... {' '.join(before)} -> ... {' '.join(after)}"
    rule_ = from_notation(text, call, moved=moved, reduces=reduces, sizes=sizes, local=local)
    return rule_
