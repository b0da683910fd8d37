"""Convolutions. Where kernel = stride (patch embedding) each output sees its own patch and space is parallel; where
patches overlap, a range of outputs needs a range of inputs that reaches into the neighbours'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..notation import Local, OpCall, OpRule, Window, from_notation
from . import rule
from .contractions import bias_once

aten = torch.ops.aten


@dataclass(frozen=True)
class Sliding:
    """A kernel that slides along one dim: `kernel` taps `dilation` apart, `stride` from one output to the next."""

    kernel: int
    stride: int
    dilation: int
    before: int  # padding
    after: int

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def is_patches(self, size: int) -> bool:
        """No two outputs see one input, and every input is seen."""
        no_padding = self.before == self.after == 0 and self.dilation == 1
        return no_padding and self.kernel == self.stride and size % self.kernel == 0

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that the outputs `[start, stop)` see."""
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.span

    def spread_needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that a transposed kernel spreads to the outputs `[start, stop)`; enough of them that what they
        spread to covers these outputs."""
        first = (start + self.before - self.span) // self.stride + 1
        last = max((stop - 1 + self.before) // self.stride, -(-(stop - 1 + self.before - self.span + 1) // self.stride))
        return min(first, (start + self.before) // self.stride), last + 1


def per_dim(call: OpCall, name: str, space: int, default: Sequence[int] = ()) -> list[int]:
    """An argument that stands for all dims, or one for each."""
    value = call[name]
    values = [value] if isinstance(value, int) else list(value) or list(default)
    return values * space if len(values) == 1 else values


def _padding(call: OpCall, space: int, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    if call["padding"] == "valid":
        return [(0, 0)] * space
    if call["padding"] == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in per_dim(call, "padding", space)]


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(call: OpCall) -> OpRule | None:
    data, weights = call.operands[0].shape, call.operands[1].shape
    space = len(weights) - 2
    lead = len(data) - space  # batch and channels, or channels alone
    kernel, size, groups = weights[2:], data[lead:], call["groups"]
    stride, dilation = per_dim(call, "stride", space), per_dim(call, "dilation", space)
    padding = _padding(call, space, kernel, dilation)
    slides = [Sliding(k, s, d, *p) for k, s, d, p in zip(kernel, stride, dilation, padding)]
    before, taps, after, sizes, moved, ranges = [], [], [], {}, [], []
    windows: dict[int, Window] = {}
    for n, slide in enumerate(slides):
        taps.append(f"k{n}")
        sizes[f"k{n}"] = slide.kernel
        if slide.is_patches(size[n]):
            before.append(f"(s{n} k{n})")
            after.append(f"s{n}")
            sizes[f"s{n}"] = size[n] // slide.kernel
            continue
        here, there = same_or_not(n, size[n], call.outputs[0][lead + n])
        before.append(here)
        after.append(there)
        moved.append(f"k{n}")
        ranges.append((here, there))
        windows[n] = Window(0, lead + n, here, there, slide.needs, fill=0.0, computes=True)
    batch = "b " if lead == 2 else ""
    group = groups > 1
    sizes |= {"g": groups, "c": weights[1], "f": weights[0] // groups} if group else {}
    text = (
        f"{batch}{'(g c)' if group else 'c'} {' '.join(before)}, {'(g f)' if group else 'f'} c {' '.join(taps)}, "
        f"{'(g f)' if group else 'f'} -> {batch}{'(g f)' if group else 'f'} {' '.join(after)}"
    )
    contracted = ["c", *(f"k{n}" for n in range(space) if n not in windows)]

    def local(emit, target, args, kwargs, here: Local):
        rest = (*args, *[None] * 3)[:3]
        x, weight, bias = bias_once(emit, rest, here, rule_.reduces)
        steps, margins = list(stride), [list(p) for p in padding]
        for n, slide in enumerate(slides):
            if n not in windows:
                # A rank with a part of a patch steps from one patch to the next in what it has of them.
                steps[n] = here.sizes.get(f"k{n}", 1) if slide.is_patches(size[n]) else steps[n]
            elif windows[n].target in here.sites:
                x, margins[n] = here.window(emit, x, windows[n]), [0, 0]
        if any(a != b for a, b in margins):
            x = emit(aten.constant_pad_nd.default, x, [end for pair in reversed(margins) for end in pair], 0.0)
            margins = [[0, 0]] * space
        there = [a for a, _ in margins]
        plain = getattr(aten, target._schema.name.removeprefix("aten::")).default
        return emit(plain, x, weight, bias, steps, there, list(dilation), here.sizes.get("g", 1) if group else 1)

    rule_ = from_notation(
        text,
        call,
        moved=moved,
        reduces=contracted,
        ranges=ranges,
        sizes=sizes,
        windows=tuple(windows.values()),
        local=local,
    )
    return rule_


def same_or_not(n: int, before: int, after: int) -> tuple[str, str]:
    """Axes of a dim before and after: one where the sizes are equal, so that what is added to it shares the factor."""
    return (f"s{n}", f"s{n}") if before == after else (f"i{n}", f"o{n}")


@rule("aten::conv_transpose1d", "aten::conv_transpose2d.input", "aten::conv_transpose3d.input")
def conv_transpose(call: OpCall) -> OpRule | None:
    data, weights = call.operands[0].shape, call.operands[1].shape
    space = len(weights) - 2
    lead = len(data) - space
    kernel, size, groups = weights[2:], data[lead:], call["groups"]
    stride, dilation = per_dim(call, "stride", space), per_dim(call, "dilation", space)
    padding, extra = per_dim(call, "padding", space), per_dim(call, "output_padding", space)
    slides = [Sliding(k, s, d, p, p) for k, s, d, p in zip(kernel, stride, dilation, padding)]
    before, taps, after, sizes, moved, ranges = [], [], [], {}, [], []
    windows: dict[int, Window] = {}
    for n, slide in enumerate(slides):
        taps.append(f"k{n}")
        sizes[f"k{n}"] = slide.kernel
        if slide.is_patches(0) and extra[n] == 0:
            before.append(f"s{n}")
            after.append(f"(s{n} k{n})")
            sizes[f"s{n}"] = size[n]
            continue
        here, there = same_or_not(n, size[n], call.outputs[0][lead + n])
        before.append(here)
        after.append(there)
        moved.append(f"k{n}")
        ranges.append((here, there))
        windows[n] = Window(0, lead + n, here, there, slide.spread_needs, fill=0.0, computes=True)
    batch = "b " if lead == 2 else ""
    group = groups > 1
    sizes |= {"g": groups, "c": weights[0] // groups, "f": weights[1]} if group else {}
    text = (
        f"{batch}{'(g c)' if group else 'c'} {' '.join(before)}, {'(g c)' if group else 'c'} f {' '.join(taps)}, "
        f"{'(g f)' if group else 'f'} -> {batch}{'(g f)' if group else 'f'} {' '.join(after)}"
    )

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
        groups_here = here.sizes.get("g", 1) if group else 1
        out = emit(target, x, weight, bias, steps, margins, rests, groups_here, list(dilation))
        for n, (start, stop) in cuts.items():
            out = emit(aten.slice.Tensor, out, lead + n, start, stop)
        return out

    rule_ = from_notation(
        text, call, moved=moved, reduces="c", ranges=ranges, sizes=sizes, windows=tuple(windows.values()), local=local
    )
    return rule_


