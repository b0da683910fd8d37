"""Convolutions. Where kernel = stride (patch embedding) each output sees its own patch and space is parallel; where
patches overlap, a range of outputs needs a range of inputs that reaches into the neighbours'."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..notation import Local, OpCall, OpRule
from . import rule
from .contractions import bias_once
from .sliding import Sliding, SlidingDims, per_dim, slide_along, with_windows

aten = torch.ops.aten


def _padding(call: OpCall, space: int, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    if call["padding"] == "valid":
        return [(0, 0)] * space
    if call["padding"] == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in per_dim(call, "padding", space)]


def _written(
    call: OpCall, slides: Sequence[Sliding], patches: Sequence[int], transposed: bool = False
) -> tuple[str, SlidingDims]:
    """A convolution in notation, `g` the groups of its channels `c` and features `f`, and the dims of its space."""
    dims = slide_along(call, slides, patches, transposed=transposed)
    weights, groups = call.operands[1].shape, call["groups"]
    dims.sizes |= {f"k{n}": slide.kernel for n, slide in enumerate(slides)}
    c, f = "c", "f"
    if groups > 1:
        c, f = "(g c)", "(g f)"
        own, other = weights[0] // groups, weights[1]
        dims.sizes |= {"g": groups, "c": own, "f": other} if transposed else {"g": groups, "c": other, "f": own}
    batch = "b " if len(call.outputs[0]) == len(weights) else ""  # batch and channels, or channels alone
    taps = " ".join(f"k{n}" for n in range(len(slides)))
    kernel = f"{c} f {taps}" if transposed else f"{f} c {taps}"
    return f"{batch}{c} {' '.join(dims.before)}, {kernel}, {f} -> {batch}{f} {' '.join(dims.after)}", dims


def _groups(call: OpCall, here: Local) -> int:
    return here.sizes.get("g", 1) if call["groups"] > 1 else 1


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(call: OpCall) -> OpRule | None:
    data, weights = call.operands[0].shape, call.operands[1].shape
    space = len(weights) - 2
    stride, dilation = per_dim(call, "stride", space), per_dim(call, "dilation", space)
    padding = _padding(call, space, weights[2:], dilation)
    slides = [Sliding(k, s, d, *p) for k, s, d, p in zip(weights[2:], stride, dilation, padding)]
    patches = [n for n, slide in enumerate(slides) if slide.is_patches(data[n - space])]
    text, dims = _written(call, slides, patches)
    windows = dims.windows

    def local(emit, target, args, kwargs, here: Local):
        rest = (*args, *[None] * 3)[:3]
        x, weight, bias = bias_once(emit, rest, here, rule_.reduces)
        steps, margins = list(stride), [list(p) for p in padding]
        for n in range(space):
            if n not in windows:
                # A rank with a part of a patch steps from one patch to the next in what it has of them.
                steps[n] = here.sizes.get(f"k{n}", 1)
            elif windows[n].target in here.sites:
                x, margins[n] = here.window(emit, x, windows[n]), [0, 0]
        if any(a != b for a, b in margins):
            x = emit(aten.constant_pad_nd.default, x, [end for pair in reversed(margins) for end in pair], 0.0)
            margins = [[0, 0]] * space
        there = [a for a, _ in margins]
        plain = getattr(aten, target._schema.name.removeprefix("aten::")).default
        return emit(plain, x, weight, bias, steps, there, list(dilation), _groups(call, here))

    contracted = ["c", *(f"k{n}" for n in patches)]
    moved = [f"k{n}" for n in windows]
    rule_ = with_windows(text, call, windows, moved=moved, reduces=contracted, sizes=dims.sizes, local=local)
    return rule_


@rule("aten::conv_transpose1d", "aten::conv_transpose2d.input", "aten::conv_transpose3d.input")
def conv_transpose(call: OpCall) -> OpRule | None:
    data, weights = call.operands[0].shape, call.operands[1].shape
    space = len(weights) - 2
    stride, dilation = per_dim(call, "stride", space), per_dim(call, "dilation", space)
    padding, extra = per_dim(call, "padding", space), per_dim(call, "output_padding", space)
    slides = [Sliding(k, s, d, p, p) for k, s, d, p in zip(weights[2:], stride, dilation, padding)]
    patches = [n for n, slide in enumerate(slides) if slide.is_patches(0) and extra[n] == 0]
    text, dims = _written(call, slides, patches, transposed=True)
    windows, lead = dims.windows, len(data) - space

    def local(emit, target, args, kwargs, here: Local):
        rest = (*args, *[None] * 3)[:3]
        x, weight, bias = bias_once(emit, rest, here, rule_.reduces)
        steps, margins, rests, cuts = list(stride), list(padding), list(extra), {}
        for n, slide in enumerate(slides):
            if n not in windows:
                steps[n] = here.sizes.get(f"k{n}", 1)
            elif windows[n].target in here.sites:
                x = here.window(emit, x, windows[n])
                start, stop = here.range(windows[n].target)
                first = slide.spread_needs(start, stop)[0] * slide.stride - slide.before
                margins[n], rests[n], cuts[n] = 0, 0, (start - first, stop - first)
        out = emit(target, x, weight, bias, steps, margins, rests, _groups(call, here), list(dilation))
        for n, (start, stop) in cuts.items():
            out = emit(aten.slice.Tensor, out, lead + n, start, stop)
        return out

    moved = [f"k{n}" for n in windows]
    rule_ = with_windows(text, call, windows, moved=moved, reduces="c", sizes=dims.sizes, local=local)
    return rule_
