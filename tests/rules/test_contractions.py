"""Sums of products."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    F32,
    F64,
    FLOATS,
    I64,
    SIZE,
    aten,
    broadcastable,
    call,
    cases,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)


@cases("aten::linear")
def _():
    for bias, lead in itertools.product((True, False), ((), (5,), (2, 5), (1, 3, 1, 2))):
        yield call(aten.linear.default, t(*lead, 6), t(7, 6), *([t(7)] if bias else []))
    yield call(aten.linear.default, t(2, 5, 1), t(7, 1), t(7))
    yield call(aten.linear.default, t(2, 5, 6), t(1, 6), t(1))
    yield call(aten.linear.default, t(2, 5, 6), t(6))
    yield call(aten.linear.default, t(2, 5, 6), t(7, 6), None)
    for dtype in (F32, BF16):
        yield call(aten.linear.default, t(5, 6, dtype=dtype), t(7, 6, dtype=dtype), t(7, dtype=dtype))


@cases("aten::matmul")
def _():
    for left, right in itertools.product(((), (2,), (3, 2), (3, 1)), repeat=2):
        yield call(aten.matmul.default, t(*left, 5, 6), t(*right, 6, 7))
    for lead in ((), (3,), (2, 3)):
        yield call(aten.matmul.default, t(*lead, 5, 6), t(6))
        yield call(aten.matmul.default, t(6), t(*lead, 6, 5))
    yield call(aten.matmul.default, t(6), t(6))
    yield call(aten.matmul.default, t(5, 1), t(1, 7))
    yield call(aten.matmul.default, t(1, 5), t(5, 1))
    for dtype in (F32, BF16, I64):
        yield call(aten.matmul.default, t(2, 5, 6, dtype=dtype), t(6, 7, dtype=dtype))


@cases("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::outer", "aten::ger")
def _(name):
    shapes = {"mm": [(5, 6), (6, 7)], "bmm": [(4, 5, 6), (4, 6, 7)], "mv": [(5, 6), (6,)], "dot": [(7,), (7,)]}
    a, b = shapes.get(name.removeprefix("aten::"), [(5,), (7,)])
    for dtype in (F64, F32, BF16, I64):
        yield call(overload(name), t(*a, dtype=dtype), t(*b, dtype=dtype))


@cases("aten::addmm", "aten::baddbmm")
def _(name):
    lead = (4,) if name == "aten::baddbmm" else ()
    for shape in ((), (7,), (1,), (5, 7), (1, 7), (5, 1), (4, 5, 7), (4, 1, 7))[: 8 if lead else 6]:
        yield call(overload(name), t(*shape), t(*lead, 5, 6), t(*lead, 6, 7), beta=0.5, alpha=2)


@cases("aten::einsum")
def _():
    for equation, *shapes in (
        ("bshd,bthd->bhst", (2, 5, 3, 4), (2, 7, 3, 4)),
        ("bhst,bthd->bshd", (2, 3, 5, 7), (2, 7, 3, 4)),
        ("b s c, c o -> b s o", (2, 5, 6), (6, 7)),
        ("ab,bc", (5, 6), (6, 7)),
        ("ba,ca", (5, 6), (7, 6)),
        ("abc->cab", (5, 6, 7)),
        ("abc->b", (5, 6, 7)),
        ("ab->", (5, 7)),
        ("i,j->ij", (5,), (7,)),
        ("i,i->", (7,), (7,)),
        ("Bij,Bjk,Bkl->Bil", (2, 3, 4), (2, 4, 5), (2, 5, 7)),
        ("abd,cd->abc", (5, 1, 4), (7, 4)),
        ("...hqd,...hkd->...hqk", (2, 5, 3, 7, 4), (1, 5, 3, 6, 4)),
        ("...i,ij", (5, 7), (7, 6)),
        ("i...->...i", (5, 6, 7)),
        ("abd,bcd->abc", (5, 1, 4), (3, 7, 4)),
    ):
        yield call(aten.einsum.default, equation, [t(*shape) for shape in shapes])


@generated("aten::linear")
def _(draw):
    dtype, k = one_of(draw, *FLOATS), draw(SIZE)
    x, out = t(*shape_of(draw, 0, 3), k, dtype=dtype), shape_of(draw, 0, 1)
    bias = one_of(draw, [], [None], [t(*out, dtype=dtype)] if out else [])
    return call(aten.linear.default, x, t(*out, k, dtype=dtype), *bias)


@generated("aten::matmul")
def _(draw):
    batch, (m, k, n) = shape_of(draw, 0, 3), draw(st.tuples(SIZE, SIZE, SIZE))
    left = [k] if draw(st.booleans()) else [*broadcastable(draw, batch), m, k]
    right = [k] if draw(st.booleans()) else [*broadcastable(draw, batch), k, n]
    dtype = one_of(draw, *FLOATS, I64)
    return call(aten.matmul.default, t(*left, dtype=dtype), t(*right, dtype=dtype))


@generated("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::outer", "aten::ger")
def _(draw, name):
    left, right = {"mm": ("mk", "kn"), "bmm": ("bmk", "bkn"), "mv": ("mk", "k"), "dot": ("k", "k")}.get(
        name.removeprefix("aten::"), ("m", "n")
    )
    sizes, dtype = {axis: draw(SIZE) for axis in "bkmn"}, one_of(draw, *FLOATS, I64)
    return call(overload(name), *(t(*(sizes[axis] for axis in axes), dtype=dtype) for axes in (left, right)))


@generated("aten::addmm", "aten::baddbmm")
def _(draw, name):
    lead = [draw(SIZE)] if name == "aten::baddbmm" else []
    (m, k, n), dtype = draw(st.tuples(SIZE, SIZE, SIZE)), one_of(draw, *FLOATS, I64)
    factors = one_of(draw, {}, {"beta": 2}, {"alpha": 3}, {"beta": 0, "alpha": 2})
    added = t(*broadcastable(draw, [*lead, m, n]), dtype=dtype)
    return call(overload(name), added, t(*lead, m, k, dtype=dtype), t(*lead, k, n, dtype=dtype), **factors)


@generated("aten::einsum")
def _(draw):
    """Up to three terms over five letters, dims of size one and `...` in any of them, with and without a result."""
    sizes, lead = dict(zip("abcdE", draw(st.tuples(*[SIZE] * 5)))), shape_of(draw, 0, 2)
    terms, operands = [], []
    for letters in draw(st.lists(st.lists(st.sampled_from("abcdE"), min_size=1, unique=True), min_size=1, max_size=3)):
        shape = [sizes[letter] for letter in letters]
        if draw(st.booleans()):
            at = draw(st.integers(0, len(letters)))
            letters.insert(at, "...")
            shape[at:at] = broadcastable(draw, lead)
        terms.append(letters)
        operands.append(t(*(one_of(draw, size, size, 1) for size in shape)))
    used = {letter for letters in terms for letter in letters}
    kept = draw(st.permutations(sorted(used)))[: draw(st.integers(0, len(used)))]
    if "..." in used and "..." not in kept:
        kept = ["...", *kept]
    equation = ",".join(one_of(draw, "", " ").join(letters) for letters in terms)
    return call(aten.einsum.default, equation + one_of(draw, "", "->" + "".join(kept)), operands)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.linear.default, t(5, 6), t(7, 6), t(7)), ".0 k, o k, o -> .0 o; reduces: k"),
        (call(aten.matmul.default, t(2, 5, 6), t(6, 7)), ".0 m k, k n -> .0 m n; reduces: k"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.einsum.default, "ii->i", [t(5, 5)]),
        call(aten.einsum.default, "...i->i", [t(5, 5)]),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
