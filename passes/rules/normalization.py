"""Norms over the last dims: statistics need those dims whole, all others are parallel."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def layer_norm(call: OpCall) -> OpRule:
    names = [f"n{position}" for position in range(len(call["normalized_shape"]))]
    normalized = " ".join(names)
    statistics = f", ... {' '.join('1' for _ in names)}" * (len(call.outputs) - 1)  # of native_layer_norm
    text = f"... {normalized}, {normalized}, {normalized} -> ... {normalized}{statistics}"
    return from_notation(text, call, whole=names)


@rule("aten::group_norm")
def group_norm(call: OpCall) -> OpRule:
    """Statistics over channels and space of one sample: only the batch is parallel."""
    rest = " ".join(f"s{position}" for position in range(len(call.operands[0].shape) - 2))
    return from_notation(f"b c {rest}, c, c -> b c {rest}", call, whole=["c", *rest.split()])
