"""For people: bytes and seconds in the unit that keeps them short, how many there are, and what a tensor looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def show_bytes(amount: float) -> str:
    """`show_bytes(3 * 2**20)` is "3 MiB"; four digits, and nothing above GiB."""
    if not amount:
        return "0"
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def show_seconds(amount: float) -> str:
    """`show_seconds(0.0123)` is "12.3 ms"; three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(amount) >= scale:
            return f"{amount / scale:.3g} {unit}"
    return f"{amount / 1e-6:.3g} us"


def counted(amount: int, what: str) -> str:
    """`counted(2, "rank")` is "2 ranks", of one it is "1 rank"."""
    return f"{amount} {what}{'' if amount == 1 else 'es' if what.endswith('s') else 's'}"


def show_tensor(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """`float32[2, 6]`."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
