"""Values: whether tensors of several ranks are equal, told from a few numbers of each.

A digest is of the bits of a tensor, and equal where all of them are. Where digests differ, sketches tell by how much: equal
inputs that each rank has computed for itself, with kernels that sum in another order, differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PART = 2**22  # elements that are looked at together: what it takes beside the tensor is some hundred MB at most
SAMPLE = 2**14  # elements of a parameter that are looked at
SIGNS = 16  # random sums in a sketch
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd numbers of 64 bits, as int64: those of the generator splitmix64.
_STEP, _MIX, _MIX_AGAIN = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def digest(tensor: torch.Tensor) -> int | None:
    """64 bits of the tensor's values, in the order of its elements and whatever its strides; None where it has no values here.

    Computed on the tensor's device, of which it waits for one number. Deterministic, and the same on every kind of device.
    """
    if not _has_values(tensor):
        return None
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, part in _parts(tensor):
        bits = part.view(_BITS[part.element_size()]).to(torch.int64)
        total += _mixed(bits + _numbered(start, part)).sum()
    return int(total)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE` elements of a tensor, at equal distances; what has no values here, as it is."""
    if not _has_values(tensor) or tensor.numel() <= SAMPLE:
        return tensor
    return tensor.detach().flatten()[:: -(-tensor.numel() // SAMPLE)]


def sketch(tensor: torch.Tensor) -> list[float]:
    """The norm of a tensor of floating point numbers, and sums of its elements with signs that are random but equal on every
    rank: the root mean square of such sums of a difference is near its norm."""
    found = torch.zeros(1 + SIGNS, dtype=torch.float64, device=tensor.device)
    for start, part in _parts(tensor):
        part, drawn = part.to(torch.float64), _mixed(_numbered(start, part))
        found[0] += part.square().sum()
        for n in range(SIGNS):
            found[1 + n] += torch.where(drawn & (1 << n) == 0, part, -part).sum()
    norm, *sums = found.tolist()
    return [math.sqrt(norm), *sums]


def deviation(sketches: Sequence[Sequence[float]]) -> float:
    """By how much the tensors of some sketches differ from the first, at most: the norm of the difference over its own."""
    (norm, *sums), *others = sketches
    worst = 0.0
    for _, *other in others:
        difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(sums, other, strict=True)) / len(sums))
        relative = difference / norm if norm else math.inf if difference else 0.0
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def _has_values(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
        return False
    return tensor.layout is torch.strided


def _parts(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensor's elements, as real numbers, in parts of one dim: the number of the first one, and the part."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
    start = 0
    for part in flat.split(PART):
        yield start, part
        start += part.numel()


def _numbered(start: int, part: torch.Tensor) -> torch.Tensor:
    return torch.arange(1 + start, 1 + start + part.numel(), device=part.device) * _STEP


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int64 numbers, each made into one of which every bit depends on all of its bits."""
    for multiplier, shift in ((_MIX, 30), (_MIX_AGAIN, 27)):
        numbers = (numbers ^ (numbers >> shift)) * multiplier
    return numbers ^ (numbers >> 31)
