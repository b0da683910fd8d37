"""Ops that compute every element by itself, operands broadcast: every axis is parallel."""

from __future__ import annotations

import torch

from ..notation import OpCall, OpRule, from_notation
from . import rule

aten = torch.ops.aten


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
    "aten::masked_fill",
    "aten::where",
    "aten::floor_divide",
    "aten::__and__",
    "aten::__or__",
    "aten::__xor__",
    "aten::lift_fresh_copy",
)
def pointwise(call: OpCall) -> OpRule | None:
    if call.target is aten.where.default:
        return None  # the places of the nonzero elements
    text = ", ".join("..." for _ in call.operands) + " -> " + ", ".join("..." for _ in call.outputs)
    return from_notation(text, call, is_view=_is_identity(call))


def _is_identity(call: OpCall) -> bool:
    return call.target._schema.name in ("aten::contiguous", "aten::alias", "aten::clone")


@rule("aten::to", "aten::_to_copy", "aten::type_as")
def to(call: OpCall) -> OpRule:
    """A move to the dtype that the tensor has already is no op at all. Of another tensor only the dtype is read."""
    if len(call.operands) == 1:
        return from_notation("... -> ...", call, is_view=call.same_dtype)
    own, other = (operand.shape for operand in call.operands)
    # Where the shapes fit it may be sharded as the operand is; elsewhere it has no axis.
    fits = all(a == b or 1 in (a, b) for a, b in zip(reversed(own), reversed(other)))
    return from_notation(f"..., {'...' if fits else '_ ' * len(other)} -> ...", call)


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
def dropout(call: OpCall) -> OpRule:
    """The identity in eval and at p = 0; elsewhere one random draw for the whole tensor, which ranks may not split."""
    draws = call["train"] and call["p"] > 0
    return from_notation("... -> ...", call, is_random=draws, is_view=not draws)
