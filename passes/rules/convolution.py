"""Convolutions. Where kernel = stride (patch embedding) each output sees its own patch and space is parallel; where
patches overlap, the border belongs to two shards and space stays whole."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


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
    before, weight, after, sizes, whole = [], [], [], {}, []
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
            whole += [f"i{n}", f"o{n}", f"k{n}"]
    text = f"b c {' '.join(before)}, o c {' '.join(weight)}, o -> b o {' '.join(after)}"
    # The bias would be added once a rank if the contracted axes were shared out.
    contracted = ["c", *(f"k{n}" for n in range(space) if f"k{n}" not in whole)]
    kind = {"reduces": contracted} if len(call.operands) == 2 else {"moved": contracted}
    return from_notation(text, call, whole=whole, sizes=sizes, **kind)
