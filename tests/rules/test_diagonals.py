"""Diagonals taken and made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import F64, I64, aten, call, cases, generated, one_of, overload, rule_of, shape_of, t


@cases("aten::diagonal", "aten::diagonal_copy", "aten::linalg_diagonal")
def _(name):
    for places in ({"dim1": 0, "dim2": 1}, {"dim1": -1, "dim2": 0}, {"offset": 1, "dim1": 1, "dim2": 3}):
        yield call(overload(name), t(4, 5, 6, 7), **places)
    yield call(overload(name), t(5, 6, 6, dtype=I64))
    yield call(overload(name), t(5, 5))


@cases("aten::diag_embed")
def _():
    for places in ([0], [1, 0, 2], [-2, -1, 0]):
        yield call(aten.diag_embed.default, t(5, 6, 7), *places)
    yield call(aten.diag_embed.default, t(5))


@cases("aten::diagonal_scatter")
def _():
    yield call(aten.diagonal_scatter.default, t(5, 6, 6), t(5, 6), 0, 1, 2)
    yield call(aten.diagonal_scatter.default, t(4, 5, 6), t(6, 4), 0, 0, 1)


def _matrix_dims(draw, rank: int) -> list[int]:
    dims = draw(st.permutations(range(rank)))[:2]
    return [dim - rank if draw(st.booleans()) else dim for dim in dims]


@generated("aten::diagonal", "aten::diagonal_copy", "aten::linalg_diagonal")
def _(draw, name):
    shape = [size + 1 for size in shape_of(draw, 2, 4)]
    dims = _matrix_dims(draw, len(shape))
    x, offset = t(*shape, dtype=one_of(draw, F64, I64)), one_of(draw, 0, 1, -1)
    return call(overload(name), x, **{"offset": offset, "dim1": dims[0], "dim2": dims[1]})


@generated("aten::diag_embed")
def _(draw):
    shape = shape_of(draw, 1, 3)
    return call(aten.diag_embed.default, t(*shape), one_of(draw, 0, 1, -2), *_matrix_dims(draw, len(shape) + 1))


@generated("aten::diagonal_scatter")
def _(draw):
    shape = [size + 1 for size in shape_of(draw, 2, 4)]
    places = (one_of(draw, 0, 1, -1), *_matrix_dims(draw, len(shape)))
    source = t(*torch.empty(shape).diagonal(*places).shape)
    return call(aten.diagonal_scatter.default, t(*shape), source, *places)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.diagonal.default, t(5, 6, 7), 0, 1, 2), "d0 d1 d2 -> d0 diagonal; moved: d1 d2 diagonal"),
        (call(aten.diag_embed.default, t(5, 7)), "d0 diagonal -> d0 d1 d2; moved: d1 d2 diagonal"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
