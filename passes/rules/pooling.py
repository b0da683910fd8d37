"""Pooling: a convolution's windows without its weights."""

from __future__ import annotations

import math

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import rule
from .sliding import Sliding, per_dim, slide_along, with_windows

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
    slides = [Sliding(k, s, d, p, p) for k, s, d, p in zip(kernel, stride, dilation, padding)]
    patches = [n for n, slide in enumerate(slides) if slide.is_patches(size[n])]

    def counts_by_place(n: int) -> bool:
        """A mean over what padding leaves of a window counts elements by place, which a shard has lost."""
        past_the_end = slides[n].needs(0, out[n])[1] > size[n] + padding[n]
        return not is_max and bool(past_the_end or (padding[n] and not call["count_include_pad"]))

    whole = [n for n in range(space) if n not in patches and counts_by_place(n)]
    dims = slide_along(call, slides, patches, fill=-math.inf if is_max else 0.0, whole=whole)

    def local(emit, target, args, kwargs, here: Local):
        x, margins = args[0], list(padding)
        for n, window in dims.windows.items():
            if window.target in here.sites:
                x, margins[n] = here.window(emit, x, window), 0
        if is_max:
            return emit(target, x, kernel, stride, margins, dilation, call["ceil_mode"])
        more = [call["divisor_override"]] if "divisor_override" in call.bound else []
        return emit(target, x, kernel, stride, margins, call["ceil_mode"], call["count_include_pad"], *more)

    moved = [f"k{n}" for n in patches] + [name for n in whole for name in (dims.before[n], dims.after[n])]
    text = f"... {' '.join(dims.before)} -> ... {' '.join(dims.after)}"
    return with_windows(text, call, dims.windows, moved=moved, sizes=dims.sizes, local=local)


@rule("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def adaptive_pool(call: OpCall) -> OpRule:
    """Windows of equal size where the sizes divide: a mean over each, which ranks may share."""
    space = int(call.target._schema.name[-2])
    size, out = call.operands[0].shape[-space:], call.outputs[0][-space:]
    before, after, moved, reduces = [], [], [], []
    sizes: dict[str, int] = {}
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
