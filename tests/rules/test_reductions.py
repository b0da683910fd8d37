"""Dims summed or compared away."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    BOOL,
    F32,
    F64,
    FLOATS,
    I64,
    aten,
    call,
    cases,
    dim_of,
    dims_of,
    distinct,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)


def _dims(rank: int) -> list[list[int]]:
    return [[0], [-1], [0, -1], [1], [*range(rank)]]


@cases("aten::sum", "aten::mean")
def _(name):
    for keep, dims in itertools.product((False, True), [*_dims(3), [], None]):
        yield call(overload(name, "dim_IntList" if name == "aten::sum" else "dim"), t(5, 6, 7), dims, keep)
    yield call(overload(name), t(5, 7))
    yield call(overload(name), t())
    yield call(overload(name), t(5, 7, dtype=BF16), dtype=F32)
    for dtype in (F32, BF16) if name == "aten::mean" else (F32, BF16, I64, torch.bool):
        yield call(overload(name, "dim_IntList" if name == "aten::sum" else "dim"), t(5, 1, 7, dtype=dtype), [-1])


@cases("aten::amax", "aten::amin", "aten::logsumexp", "aten::linalg_vector_norm")
def _(name):
    order = [2] if name == "aten::linalg_vector_norm" else []
    for keep, dims in itertools.product((False, True), _dims(3)):
        yield call(overload(name), t(5, 6, 7), *order, dims, keep)


@cases("aten::argmax", "aten::argmin", "aten::max.dim", "aten::min.dim", "aten::prod.dim_int")
def _(name):
    for keep, dim in itertools.product((False, True), (0, 1, -1)):
        yield call(overload(name), t(5, 6, 7), dim, keep)
    if name.startswith("aten::arg"):
        yield call(overload(name), t(5, 7))


@cases("aten::any", "aten::all")
def _(name):
    x = t(5, 6, 7, dtype=BOOL)
    for keep, dim in itertools.product((False, True), (0, 1, -1)):
        yield call(overload(name, "dim"), x, dim, keep)
        yield call(overload(name, "dims"), x, [0, dim] if dim else None, keep)
    yield call(overload(name), x)


@cases("aten::var.dim", "aten::std.dim", "aten::var.correction", "aten::std.correction")
def _(name):
    for keep, dims in itertools.product((False, True), _dims(3)):
        if name.endswith("dim"):
            yield call(overload(name), t(5, 6, 7), dims, False, keep)
        else:
            yield call(overload(name), t(5, 6, 7), dims, correction=1, keepdim=keep)


@cases("aten::cumsum", "aten::cumprod", "aten::sort", "aten::topk")
def _(name):
    for dim, dtype in itertools.product((0, 1, -1), (F64, I64)):
        x = distinct(5, 6, 7, dtype=dtype)
        if name == "aten::topk":
            yield call(aten.topk.default, x, 3, dim)
            yield call(aten.topk.default, x, x.shape[dim], dim)
        else:
            yield call(overload(name), x, dim)
    if name == "aten::sort":
        yield call(aten.sort.stable, t(5, 7), stable=True, dim=0)


@generated("aten::sum", "aten::mean")
def _(draw, name):
    shape = shape_of(draw)
    dtype = one_of(draw, *FLOATS) if name == "aten::mean" else one_of(draw, *FLOATS, I64, BOOL)
    options = one_of(draw, {}, {"dtype": F64}, {"dtype": F32})
    if one_of(draw, "all", "dims", "dims", "dims") == "all":
        return call(overload(name), t(*shape, dtype=dtype), **options)
    dims = one_of(draw, dims_of(draw, len(shape)), dims_of(draw, len(shape)), None)
    target = overload(name, "dim_IntList" if name == "aten::sum" else "dim")
    return call(target, t(*shape, dtype=dtype), dims, draw(st.booleans()), **options)


@generated("aten::amax", "aten::amin", "aten::logsumexp")
def _(draw, name):
    shape = shape_of(draw)
    dims = dims_of(draw, len(shape), least=1 if shape and name == "aten::logsumexp" else 0)
    x = t(*shape, dtype=one_of(draw, *FLOATS, *([] if name == "aten::logsumexp" else [I64])))
    return call(overload(name), x, dims, draw(st.booleans()))


@generated("aten::linalg_vector_norm")
def _(draw):
    shape, order = shape_of(draw), one_of(draw, 2, 2, 1, 3, 0.5, 0, math.inf, -math.inf)
    dims = one_of(draw, dims_of(draw, len(shape)), dims_of(draw, len(shape)), None)
    x = t(*shape, dtype=one_of(draw, *FLOATS))
    return call(aten.linalg_vector_norm.default, x, order, dims, draw(st.booleans()))


@generated("aten::argmax", "aten::argmin", "aten::max.dim", "aten::min.dim", "aten::prod.dim_int")
def _(draw, name):
    shape = shape_of(draw)
    dim, dtype = dim_of(draw, len(shape)), one_of(draw, *FLOATS, I64)
    x = t(*shape, dtype=dtype) if "prod" in name else distinct(*shape, dtype=F64 if dtype == BF16 else dtype)
    if name.startswith("aten::arg"):
        dim = one_of(draw, dim, dim, dim, None)
    return call(overload(name), x, dim, draw(st.booleans()))


@generated("aten::any", "aten::all")
def _(draw, name):
    shape, keep = shape_of(draw), draw(st.booleans())
    x, form = t(*shape, dtype=one_of(draw, BOOL, I64, F32)), one_of(draw, "dim", "dims", "default")
    more = {
        "dim": [dim_of(draw, len(shape)), keep],
        "dims": [one_of(draw, dims_of(draw, len(shape)), None), keep],
        "default": [],
    }
    return call(overload(name, form), x, *more[form])


@generated("aten::var.dim", "aten::std.dim", "aten::var.correction", "aten::std.correction")
def _(draw, name):
    shape, keep = shape_of(draw, 1), draw(st.booleans())
    x = t(*shape, dtype=one_of(draw, *FLOATS))
    # Of no dims at all, which are all of them, PyTorch's own gradient is wrong.
    dims = one_of(draw, dims_of(draw, len(shape), least=1), dims_of(draw, len(shape), least=1), None)
    if name.endswith("dim"):
        return call(overload(name), x, dims, draw(st.booleans()), keep)
    return call(overload(name), x, dims, correction=one_of(draw, None, 0, 1, 2), keepdim=keep)


@generated("aten::cumsum", "aten::cumprod")
def _(draw, name):
    shape = shape_of(draw)
    x = t(*shape, dtype=one_of(draw, *FLOATS, I64))
    return call(overload(name), x, dim_of(draw, len(shape)), **one_of(draw, {}, {"dtype": F64}))


@generated("aten::sort", "aten::topk")
def _(draw, name):
    shape, (up, extra) = shape_of(draw, 0, 3), draw(st.tuples(st.booleans(), st.booleans()))
    x, dim = distinct(*shape, dtype=one_of(draw, F64, F32, I64)), dim_of(draw, len(shape))
    if name == "aten::topk":
        return call(aten.topk.default, x, draw(st.integers(1, shape[dim] if shape else 1)), dim, up)
    return (
        call(aten.sort.stable, x, stable=extra, dim=dim, descending=up)
        if extra
        else call(aten.sort.default, x, dim, up)
    )


@pytest.mark.parametrize(
    "made",
    [
        call(aten.cumsum.default, t(), 0),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
