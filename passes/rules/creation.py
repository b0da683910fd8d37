"""Tensors made of nothing but numbers. Of constants each rank makes its part, of all that is counted (positions, windows,
indices, frequencies) the whole."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import numbered, rule

aten = torch.ops.aten


def local_size(emit, target, args, kwargs, here: Local, position: int):
    """The call with this rank's size as its `position`-th argument."""
    return emit(target, *args[:position], list(here.outputs[0]), *args[position + 1 :], **kwargs)


@rule(
    "aten::zeros",
    "aten::ones",
    "aten::full",
    "aten::empty",
    "aten::new_zeros",
    "aten::new_ones",
    "aten::new_full",
    "aten::new_empty",
)
def constant(call: OpCall) -> OpRule:
    """The same value everywhere: each rank makes its part."""
    names = " ".join(f"d{position}" for position in range(len(call.outputs[0])))
    unread = "_ " * len(call.operands[0].shape) if call.operands else ""

    def local(emit, target, args, kwargs, here: Local):
        return local_size(emit, target, args, kwargs, here, len(call.operands))

    return from_notation(f"{unread} -> {names}", call, local=local)


@rule("aten::arange", "aten::linspace", "aten::eye")
def positions(call: OpCall) -> OpRule | None:
    """Made from positions: whole on every rank, and split after, so that positions stay global."""
    if call.operands:
        return None
    names = [f"d{position}" for position in range(len(call.outputs[0]))]
    sizes = {name: size for name, size in zip(names, call.outputs[0], strict=True) if size != 1}
    dims = tuple((name,) if name in sizes else () for name in names)
    return OpRule((), (dims,), sizes, moved=frozenset(sizes))


@rule(
    "aten::triu_indices",
    "aten::tril_indices",
    "aten::logspace",
    "aten::range",
    "aten::hann_window",
    "aten::hamming_window",
    "aten::blackman_window",
    "aten::bartlett_window",
    "aten::kaiser_window",
    "aten::fft_fftfreq",
    "aten::fft_rfftfreq",
    "aten::scalar_tensor",
)
def made_of_positions(call: OpCall) -> OpRule | None:
    if call.operands:
        return None  # a value says what is made
    names = numbered(len(call.outputs[0]))
    return from_notation(f"-> {' '.join(names)}", call, moved=names)


@rule("aten::empty_strided", "aten::empty_permuted")
def empty(call: OpCall) -> OpRule:
    """Strides are no promise of what a rank's part has."""

    def local(emit, target, args, kwargs, here: Local):
        return emit(aten.empty.memory_format, list(here.outputs[0]), **kwargs)

    return from_notation(f"-> {' '.join(numbered(len(call.outputs[0])))}", call, local=local)
