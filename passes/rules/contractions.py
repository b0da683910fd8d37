"""Sums of products: linear, matmul, einsum. The contracted axis reduces, all others are parallel."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import rule

aten = torch.ops.aten


@rule("aten::linear")
def linear(call: OpCall) -> OpRule:
    def local(emit, target, args, kwargs, here: Local):
        # The ranks' results are summed, so only the first shard of k adds the bias.
        return emit(target, *(args if here.starts.get("k", 0) == 0 else args[:2]))

    return from_notation("... k, o k, o -> ... o", call, reduces="k", local=local)


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot")
def matmul(call: OpCall) -> OpRule:
    a, b = (operand.shape for operand in call.operands)
    left = "... m k" if len(a) > 1 else "k"
    right = "... k n" if len(b) > 1 else "k"
    out = "..." + (" m" if len(a) > 1 else "") + (" n" if len(b) > 1 else "")
    return from_notation(f"{left}, {right} -> {out}", call, reduces="k")


@rule("aten::addmm", "aten::baddbmm")
def addmm(call: OpCall) -> OpRule:
    """The added term would be summed once a rank, so k stays whole."""
    return from_notation("..., ... m k, ... k n -> ... m n".replace("...,", _added(call), 1), call, moved="k")


def _added(call: OpCall) -> str:
    return {1: "n,", 2: "m n,", 3: "... m n,"}[len(call.operands[0].shape)]


@rule("aten::outer", "aten::ger")
def outer(call: OpCall) -> OpRule:
    return from_notation("a, b -> a b", call)


@rule("aten::einsum")
def einsum(call: OpCall) -> OpRule | None:
    """Any equation that names every dim and repeats no letter in one operand."""
    equation = call["equation"].replace(" ", "")
    if "." in equation:
        return None
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return None
    if not arrow:
        out = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    text = f"{', '.join(' '.join(term) for term in terms)} -> {' '.join(out)}"
    view = len(terms) == 1 and set(out) == set(terms[0])
    return from_notation(text, call, reduces=set(left) - set(out) - {","}, is_view=view)
