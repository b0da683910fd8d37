"""Look-ups by index."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    DTYPES,
    F32,
    F64,
    FLOATS,
    I64,
    SIZE,
    aten,
    call,
    cases,
    dim_of,
    generated,
    index,
    one_of,
    rule_of,
    shape_of,
    t,
)


@cases("aten::embedding")
def _():
    for shape in ((5,), (2, 7), (), (3, 1)):
        yield call(aten.embedding.default, t(9, 4), index(9, *shape))
    yield call(aten.embedding.default, t(9, 4, dtype=F32), index(9, 7), 3)
    yield call(aten.embedding.default, t(1, 4), index(1, 7))
    yield call(aten.embedding.default, t(9, 1), index(9, 7))


@cases("aten::index_select")
def _():
    for dtype, dim in itertools.product((F64, I64), (0, 1, -1)):
        yield call(aten.index_select.default, t(5, 6, 7, dtype=dtype), dim, index(5, 4))
    yield call(aten.index_select.default, t(5, 1), 1, index(1, 7))
    yield call(aten.index_select.default, t(5, 7), 1, index(7))


@generated("aten::embedding")
def _(draw):
    rows, width, dtype = draw(SIZE), draw(SIZE), one_of(draw, *FLOATS)
    more = one_of(draw, [], [-1], [draw(st.integers(0, rows - 1))], [], [-1, True])
    return call(aten.embedding.default, t(rows, width, dtype=dtype), index(rows, *shape_of(draw, 0, 3)), *more)


@generated("aten::index_select")
def _(draw):
    shape, dtype = shape_of(draw), one_of(draw, *DTYPES)
    dim = dim_of(draw, len(shape))
    places = index(shape[dim] if shape else 1, *([draw(SIZE)] if shape else [1]))
    return call(aten.index_select.default, t(*shape, dtype=dtype), dim, places)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.embedding.default, t(9, 4), index(9, 2, 7)), "v c, .1 .0 -> .1 .0 c; moved: v"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.embedding.default, t(9, 4), index(9, 7), -1, True),
        call(aten.index_select.default, t(), 0, index(1, 1)),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
