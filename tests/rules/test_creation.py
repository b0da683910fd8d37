"""Tensors made of nothing but numbers."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    BOOL,
    DTYPES,
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
    *("aten::arange", "aten::linspace", "aten::eye"),
    *("aten::triu_indices", "aten::tril_indices", "aten::logspace", "aten::range", "aten::scalar_tensor"),
    because="made from positions: every rank makes all of it",
)


_CONSTANTS = [f"aten::{name}" for name in ("zeros", "ones", "full", "empty")]
_CONSTANTS += [f"aten::new_{name}" for name in ("zeros", "ones", "full", "empty")]


@cases(*_CONSTANTS)
def _(name):
    before = [t(3, 4, dtype=F32)] if "new_" in name else []
    after = [2.5] if "full" in name else []
    default = "memory_format" if name == "aten::empty" else "default"
    for size in ([5, 7], [5, 1, 3], []):
        yield call(overload(name, default), *before, size, *after)
        yield call(overload(name, default), *before, size, *after, dtype=BF16)


@generated(*_CONSTANTS)
def _(draw, name):
    before = [t(*shape_of(draw, 0, 2), dtype=one_of(draw, *DTYPES))] if "new_" in name else []
    after = [draw(st.integers(0, 1))] if "full" in name else []
    options = one_of(draw, {}, {"dtype": F64}, {"dtype": I64}, {"dtype": BOOL})
    return call(
        overload(name, "memory_format" if name == "aten::empty" else "default"),
        *before,
        shape_of(draw),
        *after,
        **options,
    )


@cases("aten::arange", "aten::linspace", "aten::eye")
def _(name):
    if name == "aten::arange":
        yield call(aten.arange.default, 7)
        yield call(aten.arange.start_step, 1, 9, 2)
    elif name == "aten::linspace":
        yield call(aten.linspace.default, 0, 1, 7)
    else:
        yield call(aten.eye.default, 5)


@generated("aten::arange", "aten::linspace", "aten::eye")
def _(draw, name):
    start, length, step = draw(st.tuples(st.integers(-3, 3), SIZE, st.sampled_from([1, 2, -1, 0.5])))
    options = one_of(draw, {}, {"dtype": F64}, {"dtype": F32})
    if name == "aten::arange":
        forms = {
            "default": [length],
            "start": [start, start + length],
            "start_step": [start, start + length * step, step],
        }
        form = one_of(draw, *forms)
        return call(getattr(aten.arange, form), *forms[form], **options)
    if name == "aten::linspace":
        return call(aten.linspace.default, start, start + length * step, draw(SIZE), **options)
    return call(*one_of(draw, (aten.eye.default, length), (aten.eye.m, length, draw(SIZE))), **options)


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
        call(aten.linspace.Tensor_Scalar, t(dtype=I64), 1, 7),
        call(aten.logspace.Tensor_Scalar, t(dtype=I64), 1, 7),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
