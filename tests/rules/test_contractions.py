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


@cases("aten::linalg_matmul")
def _():
    for left, right in (((5, 6), (6, 7)), ((2, 5, 6), (6,)), ((6,), (3, 6, 7)), ((3, 1, 5, 6), (2, 6, 7))):
        yield call(aten.linalg_matmul.default, t(*left), t(*right))


@cases("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::outer", "aten::ger")
def _(name):
    shapes = {
        "mm": [(5, 6), (6, 7)],
        "bmm": [(4, 5, 6), (4, 6, 7)],
        "mv": [(5, 6), (6,)],
        "dot": [(7,), (7,)],
        "vdot": [(7,), (7,)],
    }
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
        ("ii->i", (5, 5)),
        ("bii->b", (4, 5, 5)),
        ("iij,ik->jk", (5, 5, 6), (5, 7)),
        ("bij,bjj->bi", (2, 3, 4), (2, 4, 4)),
        ("...i->i", (5, 6, 7)),
        ("...i,...i->i", (5, 1, 7), (6, 7)),
        ("...ii->...", (5, 6, 6)),
    ):
        yield call(aten.einsum.default, equation, [t(*shape) for shape in shapes])


_ADDED = {
    "aten::addmv": ("mk", "k", "m"),
    "aten::addr": ("m", "n", "mn"),
    "aten::addbmm": ("bmk", "bkn", "mn"),
}


@cases(*_ADDED)
def _(name):
    sizes = {"b": 4, "m": 5, "k": 6, "n": 7}
    left, right, out = ([sizes[axis] for axis in axes] for axes in _ADDED[name])
    for shape in {(), (1,), tuple(out), tuple(out[-1:]), (*out[:-1], 1)}:
        yield call(overload(name), t(*shape), t(*left), t(*right), beta=0.5, alpha=2)
    yield call(overload(name), t(*out, dtype=BF16), t(*left, dtype=BF16), t(*right, dtype=BF16))


@cases("aten::bilinear")
def _():
    for lead in ((), (3,), (2, 3)):
        yield call(aten.bilinear.default, t(*lead, 4), t(*lead, 5), t(7, 4, 5), t(7))
        yield call(aten.bilinear.default, t(*lead, 4), t(*lead, 5), t(7, 4, 5), None)


@cases("aten::inner")
def _():
    for left, right in (((7,), (7,)), ((5, 7), (7,)), ((5, 7), (6, 7)), ((7,), (2, 6, 7)), ((), (5, 7)), ((5, 7), ())):
        yield call(aten.inner.default, t(*left), t(*right))


@cases("aten::linalg_vecdot")
def _():
    for left, right in (((7,), (7,)), ((5, 7), (7,)), ((5, 1, 7), (6, 7))):
        yield call(aten.linalg_vecdot.default, t(*left), t(*right))
    yield call(aten.linalg_vecdot.default, t(5, 6, 7), t(5, 6, 7), dim=1)


@cases("aten::tensordot")
def _():
    yield call(aten.tensordot.default, t(5, 6, 7), t(7, 6, 4), [2, 1], [0, 1])
    yield call(aten.tensordot.default, t(5, 6), t(6, 7), [-1], [0])
    yield call(aten.tensordot.default, t(5, 6), t(4, 7), [], [])
    yield call(aten.tensordot.default, t(5, 6), t(1, 7), [1], [0])
    yield call(aten.tensordot.default, t(5, 6), t(5, 6), [0, 1], [0, 1])


@cases("aten::linalg_multi_dot", "aten::chain_matmul")
def _(name):
    yield call(overload(name), [t(5, 6), t(6, 7), t(7, 4)])
    yield call(overload(name), [t(5, 6), t(6, 3), t(3, 2), t(2, 7)])
    if name == "aten::linalg_multi_dot":
        yield call(overload(name), [t(6), t(6, 7), t(7)])
        yield call(overload(name), [t(6), t(6, 7)])
        yield call(overload(name), [t(5, 6), t(6)])


@cases("aten::kron")
def _():
    for left, right in (
        ((5, 2), (3, 7)),
        ((5,), (7,)),
        ((3,), (2, 5)),
        ((2, 3, 4), (5,)),
        ((), (5,)),
        ((1, 5), (5, 1)),
    ):
        yield call(aten.kron.default, t(*left), t(*right))


@generated("aten::linear")
def _(draw):
    dtype, k = one_of(draw, *FLOATS), draw(SIZE)
    x, out = t(*shape_of(draw, 0, 3), k, dtype=dtype), shape_of(draw, 0, 1)
    bias = one_of(draw, [], [None], [t(*out, dtype=dtype)] if out else [])
    return call(aten.linear.default, x, t(*out, k, dtype=dtype), *bias)


@generated("aten::matmul", "aten::linalg_matmul")
def _(draw, name):
    batch, (m, k, n) = shape_of(draw, 0, 3), draw(st.tuples(SIZE, SIZE, SIZE))
    left = [k] if draw(st.booleans()) else [*broadcastable(draw, batch), m, k]
    right = [k] if draw(st.booleans()) else [*broadcastable(draw, batch), k, n]
    dtype = one_of(draw, *FLOATS, I64)
    return call(overload(name), t(*left, dtype=dtype), t(*right, dtype=dtype))


@generated("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::outer", "aten::ger")
def _(draw, name):
    left, right = {
        "mm": ("mk", "kn"),
        "bmm": ("bmk", "bkn"),
        "mv": ("mk", "k"),
        "dot": ("k", "k"),
        "vdot": ("k", "k"),
    }.get(name.removeprefix("aten::"), ("m", "n"))
    sizes, dtype = {axis: draw(SIZE) for axis in "bkmn"}, one_of(draw, *FLOATS, I64)
    return call(overload(name), *(t(*(sizes[axis] for axis in axes), dtype=dtype) for axes in (left, right)))


@generated("aten::addmm", "aten::baddbmm")
def _(draw, name):
    lead = [draw(SIZE)] if name == "aten::baddbmm" else []
    (m, k, n), dtype = draw(st.tuples(SIZE, SIZE, SIZE)), one_of(draw, *FLOATS, I64)
    factors = one_of(draw, {}, {"beta": 2}, {"alpha": 3}, {"beta": 0, "alpha": 2})
    added = t(*broadcastable(draw, [*lead, m, n]), dtype=dtype)
    return call(overload(name), added, t(*lead, m, k, dtype=dtype), t(*lead, k, n, dtype=dtype), **factors)


@generated(*_ADDED)
def _(draw, name):
    sizes, dtype = {axis: draw(SIZE) for axis in "bkmn"}, one_of(draw, F64, F64, BF16)
    left, right, out = ([sizes[axis] for axis in axes] for axes in _ADDED[name])
    factors = one_of(draw, {}, {"beta": 2}, {"alpha": 3}, {"beta": 0, "alpha": 2})
    added = t(*broadcastable(draw, out), dtype=dtype)
    return call(overload(name), added, t(*left, dtype=dtype), t(*right, dtype=dtype), **factors)


@generated("aten::bilinear")
def _(draw):
    lead, (i, j, o) = shape_of(draw, 0, 3), draw(st.tuples(SIZE, SIZE, SIZE))
    return call(aten.bilinear.default, t(*lead, i), t(*lead, j), t(o, i, j), one_of(draw, None, t(o)))


@generated("aten::inner")
def _(draw):
    k = draw(SIZE)
    left, right = ([*shape_of(draw, 0, 2), k] for _ in "ab")
    return call(aten.inner.default, t(*one_of(draw, left, left, [])), t(*one_of(draw, right, right, [])))


@generated("aten::linalg_vecdot")
def _(draw):
    shape = shape_of(draw, 1, 3)
    dim = one_of(draw, *range(len(shape)))
    other = [size if n == dim or draw(st.booleans()) else 1 for n, size in enumerate(shape)]
    pair = one_of(draw, (t(*shape), t(*other)), (t(*other), t(*shape)))
    return call(aten.linalg_vecdot.default, *pair, dim=one_of(draw, dim, dim - len(shape)))


@generated("aten::tensordot")
def _(draw):
    shared = shape_of(draw, 0, 2)
    groups, dims = [], []
    for _ in "ab":
        own = shape_of(draw, 0, 2)
        order = draw(st.permutations(range(len(shared) + len(own))))
        sizes = [*shared, *own]
        groups.append(t(*(sizes[n] for n in order)))
        dims.append([order.index(n) for n in range(len(shared))])
    return call(aten.tensordot.default, *groups, *dims)


@generated("aten::linalg_multi_dot", "aten::chain_matmul")
def _(draw, name):
    sizes = [draw(SIZE) for _ in range(draw(st.integers(3, 5)))]
    shapes = [list(pair) for pair in zip(sizes, sizes[1:])]
    if name == "aten::linalg_multi_dot":
        shapes[0] = one_of(draw, shapes[0], shapes[0][1:])
        shapes[-1] = one_of(draw, shapes[-1], shapes[-1][:1])
    return call(overload(name), [t(*shape) for shape in shapes])


@generated("aten::kron")
def _(draw):
    return call(aten.kron.default, t(*shape_of(draw, 0, 3)), t(*shape_of(draw, 0, 3)))


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
    if draw(st.booleans()):  # a diagonal
        at = draw(st.integers(0, len(terms) - 1))
        letter = draw(st.sampled_from([letter for letter in terms[at] if letter != "..."]))
        size = operands[at].shape[-1] if terms[at][-1] == letter else None
        if size is not None:
            terms[at] = [*terms[at], letter]
            operands[at] = t(*operands[at].shape, size)
    equation = ",".join(one_of(draw, "", " ").join(letters) for letters in terms)
    return call(aten.einsum.default, equation + one_of(draw, "", "->" + "".join(kept)), operands)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.linear.default, t(5, 6), t(7, 6), t(7)), ".0 k, o k, o -> .0 o; reduces: k"),
        (call(aten.matmul.default, t(2, 5, 6), t(6, 7)), ".0 m k, k n -> .0 m n; reduces: k"),
        (call(aten.addmm.default, t(7), t(5, 6), t(6, 7)), "n, m k, k n -> m n; reduces: k"),
        (call(aten.einsum.default, "iij->j", [t(5, 5, 7)]), "i0 i1 j -> j; moved: i0 i1"),
        (call(aten.einsum.default, "...i->i", [t(5, 7)]), ".0 i -> i; reduces: .0"),
        (call(aten.kron.default, t(5, 2), t(7)), "a0 a1, b1 -> a0 (a1 b1)"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
