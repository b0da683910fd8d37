"""Look-ups by index: the looked-up dim stays whole, the index's dims are parallel."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::embedding")
def embedding(call: OpCall) -> OpRule:
    return from_notation("v c, ... -> ... c", call, moved="v")


@rule("aten::index_select")
def index_select(call: OpCall) -> OpRule:
    names = [f"d{position}" for position in range(len(call.operands[0].shape))]
    dim = call.dim(call["dim"])
    out = ["i" if position == dim else name for position, name in enumerate(names)]
    return from_notation(f"{' '.join(names)}, i -> {' '.join(out)}", call, moved=[names[dim]])
