"""Sums of products: linear, matmul, einsum. The contracted axis reduces, all others are parallel."""

from __future__ import annotations

import re

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import numbered, rule

aten = torch.ops.aten


def bias_once(emit, args: tuple, here: Local, reduces: frozenset[str], at: int = 2) -> tuple:
    """`args` whose `at`-th is a term added once, for a call that the ranks sum: one rank adds it, the others 0 of it.

    They still use it: every rank must ask for the term's gradient, or collectives in backward wait for ever.
    """
    if len(args) <= at or args[at] is None or not any(here.starts.get(axis, 0) for axis in reduces):
        return args
    return (*args[:at], emit(aten.mul.Tensor, args[at], 0), *args[at + 1 :])


@rule("aten::linear")
def linear(call: OpCall) -> OpRule:
    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces), **kwargs)

    vector = len(call.operands[1].shape) == 1  # one output feature, and no dim for it
    rule_ = from_notation(
        "... k, k, ... -> ..." if vector else "... k, o k, o -> ... o", call, reduces="k", local=local
    )
    return rule_


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::linalg_matmul")
def matmul(call: OpCall) -> OpRule:
    a, b = (operand.shape for operand in call.operands)
    left = "... m k" if len(a) > 1 else "k"
    right = "... k n" if len(b) > 1 else "k"
    out = "..." + (" m" if len(a) > 1 else "") + (" n" if len(b) > 1 else "")
    return from_notation(f"{left}, {right} -> {out}", call, reduces="k")


_ADDED = {
    "aten::addmm": ("m k", "k n", "m n"),
    "aten::addmv": ("m k", "k", "m"),
    "aten::addr": ("m", "n", "m n"),
    "aten::baddbmm": ("b m k", "b k n", "b m n"),
    "aten::addbmm": ("b m k", "b k n", "m n"),
}


@rule(*_ADDED)
def add_product(call: OpCall) -> OpRule:
    """A product and a term that broadcasts to it, which one of the ranks that sum the product adds."""
    left, right, out = _ADDED[call.target._schema.name]
    names = out.split()
    term = names[len(names) - len(call.operands[0].shape) :]

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces, 0), **kwargs)

    summed = {*left.split(), *right.split()} - {*names}
    rule_ = from_notation(f"{' '.join(term)}, {left}, {right} -> {out}", call, reduces=summed, local=local)
    return rule_


@rule("aten::bilinear")
def bilinear(call: OpCall) -> OpRule:
    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces, 3), **kwargs)

    rule_ = from_notation("... i, ... j, o i j, o -> ... o", call, reduces="ij", local=local)
    return rule_


@rule("aten::outer", "aten::ger")
def outer(call: OpCall) -> OpRule:
    return from_notation("a, b -> a b", call)


@rule("aten::inner")
def inner(call: OpCall) -> OpRule:
    a, b = (len(operand.shape) for operand in call.operands)
    if not a or not b:
        return from_notation("..., ... -> ...", call)
    left, right = numbered(a - 1, "a"), numbered(b - 1, "b")
    text = f"{' '.join([*left, 'k'])}, {' '.join([*right, 'k'])} -> {' '.join(left + right)}"
    return from_notation(text, call, reduces="k")


@rule("aten::linalg_vecdot")
def vecdot(call: OpCall) -> OpRule:
    ranks = [len(operand.shape) for operand in call.operands]
    names = numbered(max(ranks))
    gone = names[call.dim(call["dim"], len(names))]
    groups = ", ".join(" ".join(names[len(names) - rank :]) for rank in ranks)
    return from_notation(f"{groups} -> {' '.join(name for name in names if name != gone)}", call, reduces=[gone])


@rule("aten::tensordot")
def tensordot(call: OpCall) -> OpRule:
    left, right = (numbered(len(operand.shape), letter) for operand, letter in zip(call.operands, "ab", strict=True))
    ours = [call.dim(dim, len(left)) for dim in call["dims_self"]]
    theirs = [call.dim(dim, len(right)) for dim in call["dims_other"]]
    for i, j in zip(ours, theirs, strict=True):
        right[j] = left[i]
    summed = {left[i] for i in ours}
    out = [name for name in left + right if name not in summed]
    return from_notation(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}", call, reduces=summed)


@rule("aten::linalg_multi_dot", "aten::chain_matmul")
def chain(call: OpCall) -> OpRule:
    """`m k0, k0 k1, k1 n -> m n`; the first may be a row without m, the last a column without n."""
    count = len(call.operands)
    names = numbered(count + 1, "k")
    groups = [names[n : n + 2] for n in range(count)]
    if len(call.operands[-1].shape) == 1:
        groups[-1].pop()
    if len(call.operands[0].shape) == 1:
        groups[0].pop(0)
    ends = [names[0]] * (len(call.operands[0].shape) == 2) + [names[-1]] * (len(call.operands[-1].shape) == 2)
    text = f"{', '.join(map(' '.join, groups))} -> {' '.join(ends)}"
    return from_notation(text, call, reduces=names[1:-1])


@rule("aten::kron")
def kron(call: OpCall) -> OpRule:
    """Each dim of the result merges one of each operand: `a b, c d -> (a c) (b d)`."""
    ranks = [len(operand.shape) for operand in call.operands]
    left, right = (numbered(max(ranks), letter) for letter in "ab")
    sizes: dict[str, int] = {}
    for names, operand in zip((left, right), call.operands, strict=True):
        sizes |= dict.fromkeys(names, 1) | dict(
            zip(names[len(names) - len(operand.shape) :], operand.shape, strict=True)
        )
    groups = (" ".join(names[len(names) - rank :]) for names, rank in zip((left, right), ranks, strict=True))
    out = " ".join(f"({a} {b})" for a, b in zip(left, right, strict=True))
    return from_notation(f"{', '.join(groups)} -> {out}", call, sizes=sizes)


@rule("aten::einsum")
def einsum(call: OpCall) -> OpRule:
    """Any equation; `...` as in the notation. A letter twice in one operand is a diagonal, which stays whole."""
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = [re.findall(r"[.]{3}|[A-Za-z]", term) for term in left.split(",")]
    letters = [letter for term in terms for letter in term]
    results = re.findall(r"[.]{3}|[A-Za-z]", out)
    if not arrow:
        results = ["..."] if "..." in letters else []
        results += sorted(letter for letter in set(letters) - {"..."} if letters.count(letter) == 1)
    view = len(terms) == 1 and sorted(results) == sorted(letters)
    summed = set(letters) - set(results)
    if "..." in summed:
        summed |= {f".{position}" for position in range(max(len(operand.shape) for operand in call.operands))}
    repeated = {letter for term in terms for letter in term if term.count(letter) > 1}
    places: list[str] = []

    def apart(term: list[str]) -> str:
        """Each place of a repeated letter is an axis of its own."""
        names = [f"{letter}{len(places) + n}" if letter in repeated else letter for n, letter in enumerate(term)]
        places.extend(names)
        return " ".join(names)

    text = f"{', '.join(map(apart, terms))} -> {apart(results)}"
    moved = [place for place in places if place not in letters]
    return from_notation(text, call, reduces=summed - repeated, moved=moved, is_view=view)
