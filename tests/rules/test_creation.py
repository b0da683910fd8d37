"""Tensors made of nothing but numbers."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    F32,
    F64,
    I64,
    SIZE,
    aten,
    call,
    cases,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    shards_nothing,
    t,
)

_WINDOWS = [f"aten::{kind}_window" for kind in ("hann", "hamming", "blackman", "bartlett", "kaiser")]
_FREQUENCIES = ["aten::fft_fftfreq", "aten::fft_rfftfreq"]


shards_nothing(
    *_WINDOWS,
    *_FREQUENCIES,
    *("aten::triu_indices", "aten::tril_indices", "aten::logspace", "aten::range", "aten::scalar_tensor"),
    because="made from positions: every rank makes all of it",
)


@cases(*_WINDOWS, *_FREQUENCIES)
def _(name):
    yield call(overload(name), 7)
    yield call(overload(name), 8, dtype=F64)
    if name in _WINDOWS:
        yield call(overload(name).overloadpacket.periodic, 8, False)


@generated(*_WINDOWS, *_FREQUENCIES)
def _(draw, name):
    return call(overload(name), draw(SIZE), dtype=one_of(draw, F32, F64))


@cases("aten::triu_indices", "aten::tril_indices")
def _(name):
    yield call(overload(name), 5, 7)
    yield call(overload(name), 5, 5, 1)


@generated("aten::triu_indices", "aten::tril_indices")
def _(draw, name):
    return call(overload(name), draw(st.integers(2, 7)), draw(st.integers(2, 7)), one_of(draw, -1, 0, 1))


@cases("aten::logspace", "aten::range", "aten::scalar_tensor")
def _(name):
    forms = {"aten::logspace": [(0, 1, 7), (0, 1, 1)], "aten::range": [(0, 6)], "aten::scalar_tensor": [(3.0,)]}
    for form in forms[name]:
        yield call(overload(name), *form)


@generated("aten::logspace", "aten::range", "aten::scalar_tensor")
def _(draw, name):
    size = draw(SIZE)
    forms = {"aten::logspace": (0, 1, size), "aten::range": (0, size), "aten::scalar_tensor": (size,)}
    return call(overload(name), *forms[name], dtype=one_of(draw, F32, F64))


@cases("aten::empty_strided", "aten::empty_permuted")
def _(name):
    yield call(overload(name), [5, 7], [1, 5] if name == "aten::empty_strided" else [1, 0], dtype=F64)
    yield call(overload(name), [5, 7], [7, 1] if name == "aten::empty_strided" else [0, 1])


@generated("aten::empty_strided", "aten::empty_permuted")
def _(draw, name):
    shape = shape_of(draw)
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return call(overload(name), shape, strides if name == "aten::empty_strided" else list(order), dtype=F64)


@pytest.mark.parametrize(
    "made",
    [
        call(aten.logspace.Tensor_Scalar, t(dtype=I64), 1, 7),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
