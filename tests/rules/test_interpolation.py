"""Resampling in space."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import BF16, F32, F64, SIZE, aten, call, cases, generated, one_of, overload, rule_of, t

_NEAREST = [f"aten::{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)]
_SMOOTH = {
    "aten::upsample_linear1d": 1,
    "aten::upsample_bilinear2d": 2,
    "aten::upsample_bicubic2d": 2,
    "aten::upsample_trilinear3d": 3,
    "aten::_upsample_bilinear2d_aa": 2,
    "aten::_upsample_bicubic2d_aa": 2,
}


def _interpolate(name, shape, sizes=None, scales=None, dtype=F64, corners=False):
    more = [corners] if name in _SMOOTH else []
    return call(overload(name, "vec"), t(*shape, dtype=dtype), sizes, *more, scales)


@cases(*_NEAREST, *_SMOOTH)
def _(name):
    space = _SMOOTH.get(name) or int(name[-2])
    old = [4, 6, 3][:space]
    for factor in (2, 3, 0.5):
        yield _interpolate(name, [3, 2, *old], scales=[factor] * space)
    for new in ([8, 6, 9], [4, 3, 3], [5, 7, 4], [12, 2, 1], [1, 1, 1]):
        yield _interpolate(name, [3, 2, *old], sizes=new[:space])
    yield _interpolate(name, [1, 2, *old], scales=[2.0] * space, dtype=F32)
    yield _interpolate(name, [3, 1, *[1] * space], scales=[2.0] * space)
    yield call(overload(name), t(3, 2, *old), [2 * size for size in old], *([False] if name in _SMOOTH else []))
    if name in _SMOOTH:
        yield _interpolate(name, [3, 2, *old], sizes=[8, 6, 9][:space], corners=True)
    else:
        yield _interpolate(name, [3, 2, *old], scales=[2.0] * space, dtype=BF16)


@generated(*_NEAREST, *_SMOOTH)
def _(draw, name):
    space = _SMOOTH.get(name) or int(name[-2])
    old = [draw(SIZE) for _ in range(space)]
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), *old]
    corners, dtype = name in _SMOOTH and draw(st.booleans()), one_of(draw, F64, F64, F32)
    if draw(st.booleans()):
        factors = [one_of(draw, 2.0, 1.0, 3.0, 4.0, 1.5) for _ in old]
        return _interpolate(name, shape, scales=factors, dtype=dtype, corners=corners)
    new = [one_of(draw, size, 2 * size, 3 * size, max(size // 2, 1), max(size // 3, 1), size + 1) for size in old]
    return _interpolate(name, shape, sizes=new, dtype=dtype, corners=corners)


@cases("aten::grid_sampler")
def _():
    for mode in (0, 1):
        yield call(aten.grid_sampler.default, t(3, 2, 5, 6), t(3, 4, 7, 2), mode, 0, False)
        yield call(aten.grid_sampler.default, t(3, 2, 5, 6, 4), t(3, 4, 7, 2, 3), mode, 1, True)
    yield call(aten.grid_sampler.default, t(1, 2, 5, 6), t(1, 4, 7, 2), 2, 0, False)


@generated("aten::grid_sampler")
def _(draw):
    space = one_of(draw, 2, 2, 3)
    batch, channels = draw(SIZE), draw(st.integers(1, 3))
    image, grid = ([draw(st.integers(2, 5)) for _ in range(space)] for _ in "ab")
    mode, padding, corners = one_of(draw, 0, 1), one_of(draw, 0, 1, 2), draw(st.booleans())
    return call(aten.grid_sampler.default, t(batch, channels, *image), t(batch, *grid, space), mode, padding, corners)


@cases("aten::affine_grid_generator")
def _():
    for corners in (True, False):
        yield call(aten.affine_grid_generator.default, t(5, 2, 3), [5, 2, 4, 6], corners)
        yield call(aten.affine_grid_generator.default, t(5, 3, 4), [5, 2, 4, 6, 3], corners)


@generated("aten::affine_grid_generator")
def _(draw):
    batch, space = draw(SIZE), [draw(SIZE) for _ in range(one_of(draw, 2, 3))]
    matrices = t(batch, len(space), len(space) + 1)
    return call(aten.affine_grid_generator.default, matrices, [batch, 2, *space], draw(st.booleans()))


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (
            call(aten.upsample_nearest2d.vec, t(2, 3, 5, 6), None, [2.0, 2.0]),
            "b c s0 s1 -> b c (s0 k0) (s1 k1); moved: k0 k1",
        ),
        (
            call(aten.upsample_bilinear2d.vec, t(2, 3, 5, 6), None, False, [2.0, 2.0]),
            "b c old0 old1 -> b c new0 new1; ranges: old0 new0, old1 new1",
        ),
        (
            call(aten.upsample_trilinear3d.vec, t(2, 3, 4, 5, 6), [4, 7, 3], False, None),
            "b c s0 old1 (s2 k2) -> b c s0 new1 s2; moved: k2 new1 old1",
        ),
        (
            call(aten.upsample_bilinear2d.vec, t(2, 3, 5, 6), [10, 6], True, None),
            "b c old0 s1 -> b c new0 s1; moved: new0 old0",
        ),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


def test_a_factor_that_single_precision_does_not_hold_stays_whole():
    """`floor(41 * float32(1 / 41))` is 0: the op repeats one element too often."""
    rule = rule_of(call(aten.upsample_nearest1d.vec, t(1, 1, 5), [205], None))
    assert str(rule) == "1 1 old0 -> 1 1 new0; moved: new0 old0"
