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
    broadcastable,
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
    shards_nothing,
    t,
    trainable,
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


shards_nothing(
    *("aten::max.default", "aten::min.default", "aten::prod.default", "aten::dist"),
    because="one number of all elements, which nobody adds up",
)


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


_OF_ALL = ["aten::max.default", "aten::min.default", "aten::prod.default"]
_OF_DIMS = ["aten::std_mean", "aten::var_mean", "aten::nansum", "aten::nanmean"]
_OF_ONE_DIM = [
    "aten::median",
    "aten::nanmedian",
    "aten::mode",
    "aten::kthvalue",
    "aten::aminmax",
    "aten::count_nonzero",
]


@cases(*_OF_ALL)
def _(name):
    for dtype in (F64, I64):
        yield call(overload(name), distinct(5, 7, dtype=dtype))
    yield call(overload(name), t())


@cases(*_OF_DIMS)
def _(name):
    moments = name in ("aten::std_mean", "aten::var_mean")
    yield call(overload(name), t(5, 7))
    for keep, dims in itertools.product((False, True), _dims(3)):
        if moments:
            yield call(overload(name, "correction"), t(5, 6, 7), dims, correction=1, keepdim=keep)
            yield call(overload(name, "dim"), t(5, 6, 7), dims, False, keep)
        else:
            yield call(overload(name), _holes(5, 6, 7), dims, keep)


def _holes(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return t(*shape, dtype=dtype).masked_fill(t(*shape, dtype=BOOL), math.nan)


def _of_one_dim(name, shape, dim, keep):
    """What it gives for one dim; `dim` None: of all of them, which not every op has."""
    x = distinct(*shape)
    if name == "aten::aminmax":
        return trainable(call(aten.aminmax.default, x, dim=dim, keepdim=keep))
    if name == "aten::count_nonzero":
        return call(aten.count_nonzero.default, t(*shape, dtype=I64), dim)
    if name == "aten::kthvalue":
        return call(aten.kthvalue.default, x, 1, -1 if dim is None else dim, keep)
    if name == "aten::mode":
        return call(aten.mode.default, x, -1 if dim is None else dim, keep)
    return call(overload(name), x) if dim is None else call(overload(name, "dim"), x, dim, keep)


@cases(*_OF_ONE_DIM)
def _(name):
    for keep, dim in itertools.product((False, True), (0, 1, -1, None)):
        yield _of_one_dim(name, (5, 6, 7), dim, keep)
    if name == "aten::count_nonzero":
        yield call(aten.count_nonzero.dim_IntList, t(5, 6, 7, dtype=I64), [0, -1])


@cases("aten::norm", "aten::linalg_norm", "aten::linalg_matrix_norm")
def _(name):
    for keep in (False, True):
        if name == "aten::linalg_matrix_norm":
            yield call(aten.linalg_matrix_norm.default, t(5, 6, 7), 1, [-2, -1], keep)
            yield call(aten.linalg_matrix_norm.str_ord, t(5, 6, 7), "fro", [0, 2], keep)
            yield call(aten.linalg_matrix_norm.str_ord, t(5, 6, 7), "nuc", [0, 1], keep)
        elif name == "aten::linalg_norm":
            yield call(aten.linalg_norm.default, t(5, 6, 7), None, [0, 1], keep)
            yield call(aten.linalg_norm.default, t(5, 6, 7), 3, [1], keep)
            yield call(aten.linalg_norm.ord_str, t(5, 6, 7), "nuc", [0, 1], keep)
        else:
            yield call(aten.norm.ScalarOpt_dim, t(5, 6, 7), 2, [0, 1], keep)
            yield call(aten.norm.ScalarOpt_dim_dtype, t(5, 6, 7, dtype=F32), 1, [1], keep, dtype=F64)
    forms = {"aten::norm": aten.norm.Scalar, "aten::linalg_norm": aten.linalg_norm.default}
    yield call(forms.get(name, aten.linalg_matrix_norm.str_ord), t(5, 7))


@cases("aten::sum_to_size")
def _():
    for size in ([5, 1, 7], [6, 7], [1, 7], [], [1, 1, 1], [5, 6, 7]):
        yield call(aten.sum_to_size.default, t(5, 6, 7), size)


@cases("aten::dist")
def _():
    for left, right in (((5, 7), (5, 7)), ((5, 7), (7,)), ((), ())):
        for p in (2, 1, 3):
            yield call(aten.dist.default, t(*left), t(*right), p)


@cases("aten::quantile", "aten::nanquantile")
def _(name):
    x = distinct(5, 6, 7)
    for keep, dim in itertools.product((False, True), (0, -1, None)):
        yield call(overload(name, "scalar"), x, 0.3, dim, keep)
        yield call(overload(name), x, torch.tensor([0.2, 0.5, 0.9], dtype=F64), dim, keep)
        yield call(overload(name), x, torch.tensor(0.5, dtype=F64), dim, keep)


@cases("aten::cummax", "aten::cummin", "aten::logcumsumexp", "aten::argsort", "aten::msort")
def _(name):
    if name == "aten::msort":
        yield call(aten.msort.default, distinct(5, 7))
        yield call(aten.msort.default, distinct(5, 7, dtype=I64))
        return
    for dim in (0, 1, -1):
        yield call(overload(name), distinct(5, 6, 7), dim)
    if name == "aten::argsort":
        yield call(aten.argsort.stable, distinct(5, 7), stable=True, dim=0, descending=True)


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
        "dims": [one_of(draw, dims_of(draw, len(shape), least=min(len(shape), 1)), None), keep],
        "default": [],
    }
    return call(overload(name, form), x, *more[form])


@cases("aten::var", "aten::std")
def _(name):
    yield call(overload(name), t(5, 7))
    yield call(overload(name), t(7, dtype=BF16), False)


@generated("aten::var", "aten::std")
def _(draw, name):
    return call(overload(name), t(*shape_of(draw, 1), dtype=one_of(draw, *FLOATS)), draw(st.booleans()))


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


@generated(*_OF_ALL)
def _(draw, name):
    return call(overload(name), distinct(*shape_of(draw), dtype=one_of(draw, F64, F32, I64)))


@generated(*_OF_DIMS)
def _(draw, name):
    shape, keep = shape_of(draw, 1), draw(st.booleans())
    dims = one_of(draw, dims_of(draw, len(shape), least=1), None)
    if name in ("aten::std_mean", "aten::var_mean"):
        x = t(*shape, dtype=one_of(draw, F64, F64, F32))
        if draw(st.booleans()):
            return call(overload(name, "dim"), x, dims, draw(st.booleans()), keep)
        return call(overload(name, "correction"), x, dims, correction=one_of(draw, 0, 1, None), keepdim=keep)
    return call(overload(name), _holes(*shape, dtype=one_of(draw, F64, F64, F32)), dims, keep)


@generated(*_OF_ONE_DIM)
def _(draw, name):
    shape = shape_of(draw, 1)
    return _of_one_dim(name, shape, one_of(draw, None, *range(-len(shape), len(shape))), draw(st.booleans()))


@generated("aten::norm", "aten::linalg_norm", "aten::linalg_matrix_norm")
def _(draw, name):
    shape, keep = shape_of(draw, 2), draw(st.booleans())
    pair = draw(st.permutations(range(len(shape))))[:2]
    if name == "aten::linalg_matrix_norm":
        return call(aten.linalg_matrix_norm.default, t(*shape), one_of(draw, 1, -1, math.inf), pair, keep)
    if name == "aten::linalg_norm":
        return call(aten.linalg_norm.default, t(*shape), None, one_of(draw, pair, pair[:1], None), keep)
    return call(aten.norm.ScalarOpt_dim, t(*shape), one_of(draw, 1, 2, 3), one_of(draw, pair, pair[:1]), keep)


@generated("aten::sum_to_size")
def _(draw):
    shape = shape_of(draw)
    return call(aten.sum_to_size.default, t(*shape, dtype=one_of(draw, F64, I64)), broadcastable(draw, shape))


@generated("aten::dist")
def _(draw):
    shape = shape_of(draw)
    return call(aten.dist.default, t(*shape), t(*broadcastable(draw, shape)), one_of(draw, 1, 2, 3))


@generated("aten::quantile", "aten::nanquantile")
def _(draw, name):
    shape, keep = shape_of(draw, 1), draw(st.booleans())
    dim = one_of(draw, None, *range(-len(shape), len(shape)))
    if draw(st.booleans()):
        return call(overload(name, "scalar"), distinct(*shape), one_of(draw, 0.0, 0.4, 1.0), dim, keep)
    several = torch.linspace(0, 1, draw(st.integers(1, 4)), dtype=F64)
    return call(overload(name), distinct(*shape), one_of(draw, several, several[0]), dim, keep)


@generated("aten::cummax", "aten::cummin", "aten::logcumsumexp", "aten::argsort", "aten::msort")
def _(draw, name):
    shape = shape_of(draw)
    x = distinct(*shape, dtype=one_of(draw, F64, F32, *([] if name == "aten::logcumsumexp" else [I64])))
    if name == "aten::msort":
        return call(aten.msort.default, x)
    return call(overload(name), x, dim_of(draw, len(shape)))


@pytest.mark.parametrize(
    "made",
    [
        call(aten.cumsum.default, t(), 0),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
