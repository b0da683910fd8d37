"""Fourier transforms: the transformed dims stay whole, all others are parallel."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import along, rule


@rule("aten::fft_fft", "aten::fft_ifft", "aten::fft_rfft", "aten::fft_irfft", "aten::fft_hfft", "aten::fft_ihfft")
def transform(call: OpCall) -> OpRule:
    return along(call, [call.dim(call["dim"])])


@rule(
    "aten::fft_fft2",
    "aten::fft_ifft2",
    "aten::fft_rfft2",
    "aten::fft_irfft2",
    "aten::fft_hfft2",
    "aten::fft_ihfft2",
    "aten::fft_fftn",
    "aten::fft_ifftn",
    "aten::fft_rfftn",
    "aten::fft_irfftn",
    "aten::fft_hfftn",
    "aten::fft_ihfftn",
)
def transform_dims(call: OpCall) -> OpRule:
    """Without dims the last ones for which sizes are given, or all."""
    dims = call["dim"]
    if dims is None:
        rank = len(call.operands[0].shape)
        dims = range(rank - len(call["s"]) if call["s"] is not None else 0, rank)
    return along(call, [call.dim(dim) for dim in dims])


@rule("aten::fft_fftshift", "aten::fft_ifftshift")
def shift(call: OpCall) -> OpRule:
    dims = call["dim"]
    if isinstance(dims, int):
        dims = [dims]
    return along(call, range(len(call.operands[0].shape)) if dims is None else map(call.dim, dims), "moved")


@rule("aten::stft")
def short_time_transform(call: OpCall) -> OpRule:
    """A signal, its window: frequencies and frames, and a dim for the two parts where they are real numbers."""
    batch = "b " * (len(call.operands[0].shape) - 1)
    parts = " r" * (len(call.outputs[0]) - len(batch.split()) - 2)
    return from_notation(f"{batch}s, w -> {batch}f t{parts}", call, whole="sft", moved="wr")


@rule("aten::istft")
def inverse_short_time_transform(call: OpCall) -> OpRule:
    batch = "b " * (len(call.operands[0].shape) - 2)
    return from_notation(f"{batch}f t, w -> {batch}s", call, whole="sft", moved="w")
