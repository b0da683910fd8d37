"""Ops that compute every element by itself, operands broadcast: every axis is parallel."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule(
    "pointwise",
    "aten::clone",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::full_like",
    "aten::empty_like",
    "aten::detach",
    "aten::alias",
    "aten::contiguous",
    "aten::type_as",
    "aten::masked_fill",
    "aten::where",
)
def pointwise(call: OpCall) -> OpRule:
    text = ", ".join("..." for _ in call.operands) + " -> " + ", ".join("..." for _ in call.outputs)
    return from_notation(text, call, is_view=_is_identity(call))


def _is_identity(call: OpCall) -> bool:
    return call.target._schema.name in ("aten::contiguous", "aten::alias", "aten::clone")


@rule("aten::to", "aten::_to_copy")
def to(call: OpCall) -> OpRule:
    """A move to the dtype that the tensor has already is no op at all."""
    return from_notation("... -> ..." if len(call.operands) == 1 else "..., ... -> ...", call, is_view=call.same_dtype)


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
def dropout(call: OpCall) -> OpRule:
    """The identity in eval and at p = 0; elsewhere one random draw for the whole tensor, which ranks may not split."""
    draws = call["train"] and call["p"] > 0
    return from_notation("... -> ...", call, is_random=draws, is_view=not draws)
