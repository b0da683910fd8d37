"""Attention: each query by itself, keys and values whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    F32,
    F64,
    FLOATS,
    SIZE,
    aten,
    broadcastable,
    call,
    cases,
    dim_of,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)

_SDPA = aten.scaled_dot_product_attention.default


@cases("aten::scaled_dot_product_attention")
def _():
    for heads in ((2, 3), (3,), (), (2, 1, 3)):
        yield call(_SDPA, t(*heads, 5, 4), t(*heads, 7, 4), t(*heads, 7, 6))
    q, k, v = t(2, 6, 5, 4), t(2, 6, 7, 4), t(2, 6, 7, 3)
    yield call(_SDPA, q, k, v, scale=0.3)
    yield call(_SDPA, q, k, v, None, 0.0, True)
    for shape in ((2, 6, 5, 7), (2, 1, 5, 7), (1, 6, 5, 7), (5, 7), (6, 5, 7), (2, 6, 1, 7), (1, 1, 1, 7), (1, 7)):
        yield call(_SDPA, q, k, v, t(*shape))
    yield call(_SDPA, q, k, v, torch.ones(5, 7, dtype=torch.bool).tril(3))
    for groups in (1, 2, 3, 6):
        k, v = t(2, groups, 7, 4), t(2, groups, 7, 3)
        yield call(_SDPA, q, k, v, enable_gqa=True)
        for shape in ((5, 7), (2, 1, 5, 7), (2, 6, 5, 7), (6, 5, 7), (1, 5, 7)):
            yield call(_SDPA, q, k, v, t(*shape), enable_gqa=True, scale=0.2)
    yield call(_SDPA, q, t(2, 6, 1, 4), t(2, 6, 1, 3))
    yield call(_SDPA, t(2, 1, 5, 4), t(2, 1, 7, 4), t(2, 1, 7, 3))
    for dtype in (F32, BF16):
        yield call(_SDPA, t(2, 3, 5, 8, dtype=dtype), t(2, 3, 7, 8, dtype=dtype), t(2, 3, 7, 8, dtype=dtype))


@cases("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax")
def _(name):
    internal = name.startswith("aten::_")
    for dtype, dim in itertools.product((F64, F32, BF16), (0, 1, -1)):
        x = t(5, 7, 4, dtype=dtype)
        yield call(overload(name), x, dim, False) if internal else call(overload(name, "int"), x, dim)
    if not internal:
        yield call(overload(name, "int"), t(5, 7, dtype=BF16), -1, F32)
        yield call(overload(name, "int"), t(), 0)


@generated("aten::scaled_dot_product_attention")
def _(draw):
    lead, dtype = shape_of(draw, 0, 2), one_of(draw, *FLOATS)
    s, t_, d, e = draw(st.tuples(SIZE, SIZE, SIZE, SIZE))
    groups, heads, options = [], [], {}
    if draw(st.booleans()):
        heads = groups = [draw(SIZE)]
        if draw(st.booleans()):
            heads, options["enable_gqa"] = [groups[0] * draw(st.integers(1, 3))], True
    if draw(st.booleans()):
        options["scale"] = 0.3
    q, k, v = (t(*lead, *own, dtype=dtype) for own in ([*heads, s, d], [*groups, t_, d], [*groups, t_, e]))
    form = one_of(draw, "no mask", "no mask", "causal", "added", "true or false")
    if form in ("no mask", "causal"):
        return call(_SDPA, q, k, v, None, 0.0, form == "causal", **options)
    mask = t(*broadcastable(draw, [*lead, *heads]), *(one_of(draw, 1, size) for size in (s, t_)), dtype=dtype)
    return call(_SDPA, q, k, v, mask if form == "added" else mask > -0.5, **options)


@generated("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax")
def _(draw, name):
    shape, dtype = shape_of(draw), one_of(draw, *FLOATS)
    x, dim = t(*shape, dtype=dtype), dim_of(draw, len(shape))
    if name.startswith("aten::_"):
        return call(overload(name), x, dim, False)
    return call(overload(name, "int"), x, dim, *one_of(draw, [], [F32], [None]))


_HAS_GRADIENT_OF_MASK = ["aten::_scaled_dot_product_attention_math"]
_KERNELS = ["aten::_scaled_dot_product_flash_attention_for_cpu", *_HAS_GRADIENT_OF_MASK]


@cases(*_KERNELS)
def _(name):
    q, k, v = t(2, 3, 5, 4), t(2, 3, 7, 4), t(2, 3, 7, 4)
    yield call(overload(name), q, k, v)
    if name in _HAS_GRADIENT_OF_MASK:
        yield call(overload(name), q, k, v, t(2, 3, 5, 7))
        yield call(overload(name), q, k, v, t(5, 7))
    yield call(overload(name), q, k, v, scale=0.3)
    yield call(overload(name), q, q, q, *([None] if name in _HAS_GRADIENT_OF_MASK else []), 0.0, True)


@generated(*_KERNELS)
def _(draw, name):
    (b, h, s, k, d), dtype = draw(st.tuples(SIZE, SIZE, SIZE, SIZE, SIZE)), one_of(draw, F64, F64, F32)
    operands = [t(b, h, length, d, dtype=dtype) for length in (s, k, k)]
    masks = [[], [t(s, k, dtype=dtype)], [t(b, 1, s, k, dtype=dtype)]] if name in _HAS_GRADIENT_OF_MASK else [[]]
    return call(overload(name), *operands, *one_of(draw, *masks))


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.softmax.int, t(5, 7), -1), "d0 d1 -> d0 d1; whole: d1"),
        (
            call(_SDPA, t(2, 6, 5, 4), t(2, 3, 7, 4), t(2, 3, 7, 4), enable_gqa=True),
            ".0 (g r) s d, .0 g t d, .0 g t e -> .0 (g r) s e; whole: d e t; ring: s t",
        ),
        (call(_SDPA, t(5, 4), t(5, 4), t(5, 4), None, 0.0, True), "s d, t d, t e -> s e; whole: d e t; ranges: s; ring: s t"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(_SDPA, t(6, 5, 4), t(3, 7, 4), t(2, 7, 4), enable_gqa=True),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
