"""Convolutions. Where kernel = stride (patch embedding) each output sees its own patch and space is parallel; where
patches overlap, the border belongs to two shards and space stays whole."""

from __future__ import annotations

from ..notation import Local, OpCall, OpRule, from_notation
from . import rule
from .contractions import bias_once


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(call: OpCall) -> OpRule | None:
    space = len(call.operands[1].shape) - 2
    if isinstance(call["padding"], str) or len(call.operands[0].shape) != space + 2 or call["groups"] != 1:
        return None

    def per_dim(name: str) -> list[int]:
        values = [call[name]] if isinstance(call[name], int) else list(call[name])
        return values * space if len(values) == 1 else values

    kernel, size = call.operands[1].shape[2:], call.operands[0].shape[2:]
    stride, padding, dilation = per_dim("stride"), per_dim("padding"), per_dim("dilation")
    before, weight, after, sizes, whole, moved = [], [], [], {}, [], []
    for n in range(space):
        weight.append(f"k{n}")
        sizes[f"k{n}"] = kernel[n]
        if kernel[n] == stride[n] and padding[n] == 0 and dilation[n] == 1 and size[n] % kernel[n] == 0:
            before.append(f"(s{n} k{n})")
            after.append(f"s{n}")
            sizes[f"s{n}"] = size[n] // kernel[n]
        else:
            before.append(f"i{n}")
            after.append(f"o{n}")
            whole += [f"i{n}", f"o{n}"]
            moved.append(f"k{n}")
    text = f"b c {' '.join(before)}, o c {' '.join(weight)}, o -> b o {' '.join(after)}"
    contracted = ["c", *(f"k{n}" for n in range(space) if f"k{n}" not in moved)]

    def local(emit, target, args, kwargs, here: Local):
        # A rank with a part of a patch steps from one patch to the next in what it has of them.
        steps = [step if f"k{n}" in moved else here.sizes.get(f"k{n}", 1) for n, step in enumerate(stride)]
        data, weight, bias, _, *rest = bias_once(emit, (*args, None, None)[: max(len(args), 4)], here, rule_.reduces)
        return emit(target, data, weight, bias, steps, *rest, **kwargs)

    rule_ = from_notation(text, call, whole=whole, moved=moved, reduces=contracted, sizes=sizes, local=local)
    return rule_
