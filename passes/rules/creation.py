"""Tensors made of nothing but numbers: windows, indices, frequencies. Every rank makes all of them.

(Constants and ranges: see `views`.)
"""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import numbered, rule

aten = torch.ops.aten


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
