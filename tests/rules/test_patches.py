"""Windows of a dim as a dim of their own, and space folded into channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    F64,
    I64,
    SIZE,
    aten,
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


@cases("aten::unfold", "aten::unfold_copy")
def _(name):
    for dim in (0, 1, -1):
        for size, step in ((2, 2), (3, 3), (3, 1), (2, 1), (1, 2), (1, 1), (4, 3), (6, 6)):
            yield call(overload(name), t(6, 12, 6), dim, size, step)
    yield call(overload(name), t(6, dtype=I64), 0, 2, 2)


@generated("aten::unfold", "aten::unfold_copy")
def _(draw, name):
    shape = shape_of(draw, 1, 3)
    dim = dim_of(draw, len(shape))
    size, step = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape[dim] = one_of(draw, size * draw(SIZE), size + draw(SIZE))
    return call(overload(name), t(*shape, dtype=one_of(draw, F64, BF16)), dim, size, one_of(draw, size, step))


@cases("aten::im2col", "aten::col2im")
def _(name):
    for kernel, dilation, padding, stride in (
        ([2, 3], [1, 1], [0, 0], [2, 3]),  # patches
        ([2, 3], [1, 1], [0, 0], [2, 1]),
        ([3, 3], [1, 1], [1, 1], [1, 1]),
        ([2, 2], [2, 1], [0, 1], [1, 2]),
        ([1, 1], [1, 1], [0, 0], [1, 1]),
    ):
        for lead in ((2, 4), (4,)):
            yield _columns(name, lead, [6, 9], kernel, dilation, padding, stride)


def _columns(name, lead, space, kernel, dilation, padding, stride):
    if name == "aten::im2col":
        return call(aten.im2col.default, t(*lead, *space), kernel, dilation, padding, stride)
    counts = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in zip(space, kernel, dilation, padding, stride)]
    columns = t(*lead[:-1], lead[-1] * kernel[0] * kernel[1], counts[0] * counts[1])
    return call(aten.col2im.default, columns, space, kernel, dilation, padding, stride)


@generated("aten::im2col", "aten::col2im")
def _(draw, name):
    lead = [draw(SIZE), draw(st.integers(1, 3))][one_of(draw, 0, 0, 1) :]
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    dilation, padding = ([one_of(draw, *choices) for _ in range(2)] for choices in ((1, 1, 2), (0, 0, 1)))
    stride = [one_of(draw, k, k, 1, 2) for k in kernel]
    space = [one_of(draw, k * draw(SIZE), d * (k - 1) + draw(SIZE)) for k, d in zip(kernel, dilation)]
    space = [max(n, d * (k - 1) + 1) for n, k, d in zip(space, kernel, dilation)]
    return _columns(name, lead, space, kernel, dilation, padding, stride)


@cases("aten::pixel_shuffle", "aten::pixel_unshuffle")
def _(name):
    for factor in (1, 2, 3):
        for lead in ((5,), (2, 5), (2, 3, 1)):
            shape = (4 * factor**2, 6, 7) if name == "aten::pixel_shuffle" else (4, 6 * factor, 7 * factor)
            yield call(overload(name), t(*lead, *shape), factor)


@generated("aten::pixel_shuffle", "aten::pixel_unshuffle")
def _(draw, name):
    (c, h, w), factor = draw(st.tuples(SIZE, SIZE, SIZE)), draw(st.integers(1, 3))
    shape = (c * factor**2, h, w) if name == "aten::pixel_shuffle" else (c, h * factor, w * factor)
    return call(overload(name), t(*shape_of(draw, 0, 2), *shape), factor)


@cases("aten::channel_shuffle", "aten::native_channel_shuffle")
def _(name):
    for groups in (1, 2, 3, 6):
        yield call(overload(name), t(5, 6, 4, 3, dtype=_shuffled(name)), groups)


def _shuffled(name: str) -> torch.dtype:
    return I64 if name == "aten::native_channel_shuffle" else F64  # the native one has no derivative


@generated("aten::channel_shuffle", "aten::native_channel_shuffle")
def _(draw, name):
    batch, groups, channels = draw(st.tuples(SIZE, SIZE, SIZE))
    x = t(batch, groups * channels, *shape_of(draw, 2, 2), dtype=_shuffled(name))
    return call(overload(name), x, groups)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.unfold.default, t(5, 12), 1, 3, 3), "d0 (window place) -> d0 window place"),
        (call(aten.unfold.default, t(5, 12), 1, 3, 2), "d0 d1 -> d0 window place; moved: place; ranges: d1 window"),
        (
            call(aten.im2col.default, t(2, 3, 4, 6), [2, 3], [1, 1], [0, 0], [2, 3]),
            "b c (i p) (j q) -> b (c p q) (i j)",
        ),
        (call(aten.pixel_shuffle.default, t(12, 5, 7), 2), "(c p q) h w -> c (h p) (w q); moved: p q"),
        (call(aten.channel_shuffle.default, t(2, 6, 5), 2), "b (g c) d0 -> b (c g) d0"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
