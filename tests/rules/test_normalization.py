"""Norms."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from tests.rules.calls import BF16, F32, F64, FLOATS, SIZE, aten, call, cases, generated, one_of, overload, shape_of, t


@cases("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def _(name):
    norm, bias = overload(name), name != "aten::rms_norm"
    rest = [1e-5] if name == "aten::native_layer_norm" else []
    for shape in ((7,), (5, 7)):
        for dtype in (F64, F32, BF16):
            weights = [t(*shape, dtype=dtype), t(*shape, dtype=dtype)][: 2 if bias else 1]
            yield call(norm, t(3, 2, *shape, dtype=dtype), list(shape), *weights, *rest)
        yield call(norm, t(3, 2, *shape), list(shape), *[None] * (2 if bias else 1), *rest)
        yield call(norm, t(*shape), list(shape), *[None] * (2 if bias else 1), *rest)
    if bias:
        yield call(norm, t(3, 2, 7), [7], None, t(7), *rest)
        yield call(norm, t(3, 2, 7), [7], t(7), None, *rest)


@cases("aten::group_norm")
def _():
    for space in ((), (5,), (3, 5)):
        yield call(aten.group_norm.default, t(5, 6, *space), 3, t(6), t(6))
        yield call(aten.group_norm.default, t(5, 6, *space), 2)


@generated("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def _(draw, name):
    normalized, dtype = shape_of(draw, 1, 2), one_of(draw, *FLOATS)
    x = t(*shape_of(draw, 0, 3), *normalized, dtype=dtype)
    weights = [one_of(draw, None, t(*normalized, dtype=dtype)) for _ in range(1 if name == "aten::rms_norm" else 2)]
    eps = [1e-5] if name == "aten::native_layer_norm" else one_of(draw, [], [1e-3])
    return call(overload(name), x, normalized, *weights, *eps)


@generated("aten::group_norm")
def _(draw):
    groups, dtype = draw(st.integers(1, 3)), one_of(draw, *FLOATS)
    channels = groups * draw(st.integers(1, 3))
    # Several elements a group: of one or two, the gradient is noise.
    x = t(draw(SIZE), channels, *shape_of(draw, 0, 2), draw(st.integers(4, 7)), dtype=dtype)
    weights = one_of(draw, [], [t(channels, dtype=dtype)], [t(channels, dtype=dtype), t(channels, dtype=dtype)])
    return call(aten.group_norm.default, x, groups, *weights)


@cases("aten::instance_norm")
def _():
    for space in ((5,), (3, 5)):
        x, weight, bias = t(5, 6, *space), t(6), t(6)
        yield call(aten.instance_norm.default, x, weight, bias, None, None, True, 0.1, 1e-5, False)
        yield call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False)
        given = nn.Buffer(t(x.shape[1])), nn.Buffer(t(x.shape[1], positive=True))
        yield call(aten.instance_norm.default, x, weight, bias, *given, False, 0.1, 1e-5, False)


def _running(channels: int) -> list[torch.Tensor]:
    """Mean and variance that a module keeps: buffers, which get no gradient."""
    return [torch.nn.Buffer(t(channels)), torch.nn.Buffer(t(channels, positive=True))]


@cases("aten::batch_norm", "aten::_native_batch_norm_legit_functional")
def _(name):
    functional = name != "aten::batch_norm"
    for space in ((), (5,), (3, 5)):
        x, weight, bias = t(5, 6, *space), t(6), t(6)
        if functional:
            yield call(overload(name), x, weight, bias, *_running(6), True, 0.1, 1e-5)
            continue
        for training, kept in ((True, [None, None]), (False, _running(6))):
            yield call(overload(name), x, weight, bias, *kept, training, 0.1, 1e-5, False)
            yield call(overload(name), x, None, None, *kept, training, 0.1, 1e-5, False)


@generated("aten::instance_norm", "aten::batch_norm", "aten::_native_batch_norm_legit_functional")
def _(draw, name):
    channels, dtype = draw(SIZE), one_of(draw, F64, F32)
    # Several elements to each statistic: of one or two, the gradient is noise.
    space = [*shape_of(draw, 0, 2), draw(st.integers(4, 7))]
    x = t(draw(SIZE), channels, *one_of(draw, space, space[::-1]), dtype=dtype)
    weights = [one_of(draw, None, t(channels, dtype=dtype)) for _ in range(2)]
    if name == "aten::instance_norm":
        return call(overload(name), x, *weights, None, None, True, 0.1, 1e-5, False)
    kept = [torch.nn.Buffer(value.to(dtype)) for value in _running(channels)]
    if name == "aten::batch_norm":
        training = draw(st.booleans())
        return call(overload(name), x, *weights, *([None, None] if training else kept), training, 0.1, 1e-5, False)
    return call(overload(name), x, *weights, *kept, True, 0.1, 1e-5)


@cases("aten::_weight_norm")
def _():
    for shape in ((5, 7), (5, 6, 3), (2, 3, 4, 5)):
        yield call(aten._weight_norm.default, t(*shape), t(shape[0], *[1] * (len(shape) - 1)), 0)
        yield call(aten._weight_norm.default, t(*shape), t(*[1] * (len(shape) - 1), shape[-1]), len(shape) - 1)


@generated("aten::_weight_norm")
def _(draw):
    shape = shape_of(draw, 2, 4)
    dim = one_of(draw, 0, len(shape) - 1)
    sizes = [size if n == dim else 1 for n, size in enumerate(shape)]
    return call(aten._weight_norm.default, t(*shape), t(*sizes), dim)
