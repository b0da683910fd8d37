"""Sums of products: linear, matmul, einsum. The contracted axis reduces, all others are parallel."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import rule

aten = torch.ops.aten


def bias_once(emit, args: tuple, here: Local, reduces: frozenset[str]) -> tuple:
    """`args` whose third is a bias, for a call that the ranks sum: one rank adds the bias, the others 0 of it.

    They still use it: every rank must ask for the bias's gradient, or collectives in backward wait for ever.
    """
    if len(args) < 3 or args[2] is None or not any(here.starts.get(axis, 0) for axis in reduces):
        return args
    return (*args[:2], emit(aten.mul.Tensor, args[2], 0), *args[3:])


@rule("aten::linear")
def linear(call: OpCall) -> OpRule:
    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces), **kwargs)

    vector = len(call.operands[1].shape) == 1  # one output feature, and no dim for it
    rule_ = from_notation(
        "... k, k, ... -> ..." if vector else "... k, o k, o -> ... o", call, reduces="k", local=local
    )
    return rule_


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
    return {0: ",", 1: "n,", 2: "m n,", 3: "... m n,"}[len(call.operands[0].shape)]


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
