"""Look-ups by index: the looked-up dim stays whole, the index's dims are parallel."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::embedding")
def embedding(call: OpCall) -> OpRule | None:
    if call["scale_grad_by_freq"]:
        return None  # gradients that count how often an index stands in the whole input
    return from_notation("v c, ... -> ... c", call, moved="v")


@rule("aten::index_select")
def index_select(call: OpCall) -> OpRule | None:
    if not call.operands[0].shape:
        return None
    names = [f"d{position}" for position in range(len(call.operands[0].shape))]
    dim = call.dim(call["dim"])
    index = "i" if call.operands[1].shape else "1"
    out = [index if position == dim else name for position, name in enumerate(names)]
    return from_notation(f"{' '.join(names)}, {index.strip('1')} -> {' '.join(out)}", call, moved=[names[dim]])
