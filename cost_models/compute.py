"""Seconds of one op on one device by the roofline: the larger of its arithmetic and its memory traffic."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from .hardware import Hardware


def op_flops(target: Any, args: tuple, kwargs: dict) -> int:
    """FLOPs of one call on fake tensors, by `torch.utils.flop_counter`'s formulas."""
    with FlopCounterMode(display=False) as counter:
        target(*args, **kwargs)
    return counter.get_total_flops()


def op_seconds(flops: float, bytes_moved: float, hardware: Hardware, training: bool) -> float:
    """Forward, and in training the backward: twice the arithmetic and twice the traffic of the forward."""
    once = max(flops / hardware.flops, bytes_moved / hardware.memory_bandwidth)
    return once * (3 if training else 1)
