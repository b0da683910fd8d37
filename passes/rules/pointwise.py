"""Ops that compute every element by itself, operands broadcast: every axis is parallel."""

from __future__ import annotations

import torch

from ..notation import OpCall, OpRule, from_notation
from . import numbered, rule

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
    "aten::alias_copy",
    "aten::real",
    "aten::imag",
    "aten::complex",
    "aten::polar",
    "aten::_conj",
    "aten::conj",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::isreal",
    "aten::isclose",
    "aten::isin.Tensor_Scalar",
    "aten::hardswish",
    "aten::log_sigmoid",
    "aten::special_expit",
    "aten::rsub",
    "aten::fill",
    "aten::zero",
)
def pointwise(call: OpCall) -> OpRule | None:
    if call.target is aten.where.default:
        return None  # the places of the nonzero elements
    text = ", ".join("..." for _ in call.operands) + " -> " + ", ".join("..." for _ in call.outputs)
    return from_notation(text, call, is_view=_is_identity(call))


def _is_identity(call: OpCall) -> bool:
    return call.target._schema.name in ("aten::contiguous", "aten::alias", "aten::clone")


@rule("aten::prelu")
def prelu(call: OpCall) -> OpRule:
    """One slope for all, or one for each channel, which is the second dim."""
    names = numbered(len(call.operands[0].shape))
    slope = "d1" if len(names) > 1 and call.operands[1].shape else "_ " * len(call.operands[1].shape)
    return from_notation(f"{' '.join(names)}, {slope} -> {' '.join(names)}", call)


@rule("aten::glu")
def glu(call: OpCall) -> OpRule:
    """The first half of a dim times the sigmoid of the second: `(two half) -> half`."""
    names = numbered(len(call.operands[0].shape))
    dim = call.dim(call["dim"])
    before, after = list(names), list(names)
    before[dim], after[dim] = "(two half)", "half"
    return from_notation(f"{' '.join(before)} -> {' '.join(after)}", call, moved=["two"], sizes={"two": 2})


@rule("aten::to", "aten::_to_copy", "aten::type_as")
def to(call: OpCall) -> OpRule:
    """A move to the dtype that the tensor has already is no op at all. Of another tensor only the dtype is read."""
    if len(call.operands) == 1:
        return from_notation("... -> ...", call, is_view=call.same_dtype)
    own, other = (operand.shape for operand in call.operands)
    # Where the shapes fit it may be sharded as the operand is; elsewhere it has no axis.
    fits = all(a == b or 1 in (a, b) for a, b in zip(reversed(own), reversed(other)))
    return from_notation(f"..., {'...' if fits else '_ ' * len(other)} -> ...", call)
