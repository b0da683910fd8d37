"""Sums of products: linear, matmul, einsum. The contracted axis reduces, all others are parallel."""

from __future__ import annotations

import re

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
    """Any equation whose operands repeat no letter; `...` as in the notation."""
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = [re.findall(r"[.]{3}|[A-Za-z]", term) for term in left.split(",")]
    letters = [letter for term in terms for letter in term]
    results = re.findall(r"[.]{3}|[A-Za-z]", out)
    if not arrow:
        results = ["..."] if "..." in letters else []
        results += sorted(letter for letter in set(letters) - {"..."} if letters.count(letter) == 1)
    if any(len(set(term)) != len(term) for term in terms) or ("..." in letters and "..." not in results):
        return None
    text = f"{', '.join(map(' '.join, terms))} -> {' '.join(results)}"
    view = len(terms) == 1 and set(results) == set(terms[0])
    return from_notation(text, call, reduces=set(letters) - set(results), is_view=view)
