"""Fourier transforms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    F32,
    F64,
    SIZE,
    aten,
    call,
    cases,
    dim_of,
    dims_of,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)

_ONE = [f"aten::fft_{kind}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")]
_TWO = [f"{name}2" for name in _ONE]
_MANY = [f"{name}n" for name in _ONE]
_NORMS = (None, "ortho", "forward")


def _operand(name: str, shape: list[int], dtype: torch.dtype = F64) -> torch.Tensor:
    """Complex numbers, where the transform is not one of real numbers only."""
    if name.removeprefix("aten::fft_")[:2] in ("rf", "ih"):
        return t(*shape, dtype=dtype)
    return torch.complex(t(*shape, dtype=dtype), t(*shape, dtype=dtype))


@cases(*_ONE)
def _(name):
    for dim in (0, 1, -1):
        yield call(overload(name), _operand(name, [5, 6, 7]), None, dim)
        yield call(overload(name), _operand(name, [5, 6, 7]), 4, dim, "ortho")
    yield call(overload(name), _operand(name, [5, 7], F32))


@cases(*_TWO, *_MANY)
def _(name):
    transform = overload(name)
    yield call(transform, _operand(name, [5, 6, 7]))
    for dims in ([0, 1], [-1, 1], [2]):
        yield call(transform, _operand(name, [5, 6, 7]), None, dims)
        yield call(transform, _operand(name, [5, 6, 7]), [4] * len(dims), dims, "forward")
    if name in _MANY:
        yield call(transform, _operand(name, [2, 5, 6]), [4, 5])


@cases("aten::fft_fftshift", "aten::fft_ifftshift")
def _(name):
    yield call(overload(name), t(5, 6, 7))
    for dims in ([0], [1, -1]):
        yield call(overload(name), t(5, 6, 7), dims)


@generated(*_ONE)
def _(draw, name):
    shape = [size + 1 for size in shape_of(draw, 1, 4)]
    count = one_of(draw, None, *range(2, 9))
    x = _operand(name, shape, one_of(draw, F64, F64, F32))
    return call(overload(name), x, count, dim_of(draw, len(shape)), one_of(draw, *_NORMS))


@generated(*_TWO, *_MANY)
def _(draw, name):
    shape = [size + 1 for size in shape_of(draw, 2, 4)]
    dims = dims_of(draw, len(shape), least=1)
    sizes = one_of(draw, None, [draw(st.integers(2, 8)) for _ in dims])
    if name in _MANY and draw(st.booleans()):
        dims = None
    return call(overload(name), _operand(name, shape), sizes, dims, one_of(draw, *_NORMS))


@generated("aten::fft_fftshift", "aten::fft_ifftshift")
def _(draw, name):
    shape = shape_of(draw, 1)
    return call(overload(name), t(*shape), one_of(draw, None, dims_of(draw, len(shape), least=1)))


@cases("aten::stft")
def _():
    for shape in ((3, 20), (20,)):
        yield call(aten.stft.default, t(*shape), 8, 4, 8, t(8), return_complex=True)
        yield call(aten.stft.default, t(*shape), 8, 4, return_complex=False)
        yield call(aten.stft.center, t(*shape), 8, 4, 8, t(8), True, "reflect", return_complex=True)


@generated("aten::stft")
def _(draw):
    lead, size = one_of(draw, [], [draw(SIZE)], [draw(SIZE)]), draw(st.integers(2, 6))
    window = one_of(draw, None, t(size))
    options = {"return_complex": draw(st.booleans()), "onesided": one_of(draw, None, True, False)}
    return call(aten.stft.default, t(*lead, draw(st.integers(8, 20))), size, size // 2, size, window, **options)


@cases("aten::istft")
def _():
    for lead in ((3,), ()):
        spectrum = torch.complex(t(*lead, 5, 6), t(*lead, 5, 6))
        yield call(aten.istft.default, spectrum, 8, 4, 8, t(8, positive=True))
        yield call(aten.istft.default, spectrum, 8, 4)


@generated("aten::istft")
def _(draw):
    lead, half, frames = one_of(draw, [], [draw(SIZE)], [draw(SIZE)]), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    spectrum = torch.complex(t(*lead, half + 1, frames), t(*lead, half + 1, frames))
    window = one_of(draw, None, t(2 * half, positive=True))
    return call(aten.istft.default, spectrum, 2 * half, half, 2 * half, window)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.fft_rfft.default, t(5, 6, 7), None, 1), "d0 d1 d2 -> d0 o1 d2; whole: d1 o1"),
        (call(aten.fft_fftn.default, t(5, 6, 7), None, [0, -1]), "d0 d1 d2 -> d0 d1 d2; whole: d0 d2"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
