"""Digests and sketches by which ranks tell whether they hold the same values."""

from __future__ import annotations

import pytest
import torch

from dsp_auto import values
from dsp_auto.values import deviation, digest, sketch

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_is_of_the_values_and_not_of_how_they_lie_in_memory(dtype):
    torch.manual_seed(0)
    x = torch.randint(0, 2, (3, 4, 5)).to(dtype)
    same = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert same.stride() != x.stride() and digest(same) == digest(x) == digest(x.clone().requires_grad_(x.is_floating_point()))
    for place in (0, 33, 59):
        other = x.clone()
        other.view(-1)[place] = 1 - other.view(-1)[place].to(torch.float32).item()
        assert digest(other) != digest(x)


def test_a_digest_tells_values_in_another_order_and_sums_that_are_equal():
    x = torch.arange(24).view(4, 6)
    found = [x, x.flip(0), x.flip(1), x.t().reshape(4, 6), x.index_fill(0, torch.tensor(0), 0)]
    found += [torch.tensor([1, 2, 3]), torch.tensor([2, 0, 4]), torch.tensor([0, 4, 2]), torch.zeros(3), torch.zeros(4)]
    assert len({digest(one) for one in found}) == len(found)


def test_a_digest_is_the_same_in_parts_of_any_length(monkeypatch):
    x = torch.randn(7, 9)
    whole, sketched = digest(x), sketch(x)
    monkeypatch.setattr(values, "PART", 10)
    assert digest(x) == whole and sketch(x) == pytest.approx(sketched)


def test_empty_tensors_scalars_nan_and_lazy_signs_and_conjugates_have_digests():
    nan = torch.tensor([1.0, torch.nan])
    assert digest(torch.empty(0, 3)) == digest(torch.empty(0)) == 0
    assert digest(nan) == digest(nan.clone()) != digest(torch.ones(2))
    z = torch.randn(4, dtype=torch.complex64)
    assert digest(z.conj()) == digest(z.conj().resolve_conj()) != digest(z)
    assert digest(z.conj().imag) == digest(-z.imag) and z.conj().imag.is_neg()
    assert digest(torch.tensor(2.0)) != digest(torch.tensor(3.0))


def test_tensors_without_values_here_have_no_digest():
    with torch._subclasses.FakeTensorMode():
        assert digest(torch.ones(3)) is None
    assert digest(torch.ones(3, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1, 3, 5000])
@pytest.mark.parametrize("relative", [1.0, 0.3, 0.1])
def test_the_deviation_is_that_of_the_difference_to_the_whole(dtype, size, relative):
    """The norm of the difference over that of the tensor, within a factor of four."""
    draw = torch.Generator().manual_seed(size)
    x, step = (torch.randn(size, dtype=torch.float64, generator=draw) for _ in range(2))
    other = (x + step * relative * x.norm() / step.norm()).to(dtype)
    found = deviation([sketch(x.to(dtype)), sketch(other)])
    assert relative / 4 <= found <= relative * 4


def test_the_deviation_of_what_is_not_finite_is_not_rounding():
    assert not deviation([sketch(torch.ones(3)), sketch(torch.tensor([1.0, torch.nan, 1.0]))]) <= 1e30
    assert deviation([sketch(torch.zeros(3)), sketch(-torch.zeros(3))]) == 0
