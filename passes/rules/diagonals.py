"""Diagonals taken and made: the two dims of the matrix stay whole."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import numbered, rule


@rule("aten::diagonal", "aten::diagonal_copy", "aten::linalg_diagonal")
def diagonal(call: OpCall) -> OpRule:
    names, matrix = _matrix(call, len(call.operands[0].shape))
    kept = [name for name in names if name not in matrix]
    return from_notation(f"{' '.join(names)} -> {' '.join([*kept, 'diagonal'])}", call, moved=[*matrix, "diagonal"])


@rule("aten::diag_embed")
def diag_embed(call: OpCall) -> OpRule:
    names, matrix = _matrix(call, len(call.outputs[0]))
    kept = [name for name in names if name not in matrix]
    return from_notation(f"{' '.join([*kept, 'diagonal'])} -> {' '.join(names)}", call, moved=[*matrix, "diagonal"])


@rule("aten::diagonal_scatter")
def diagonal_scatter(call: OpCall) -> OpRule:
    names, matrix = _matrix(call, len(call.operands[0].shape))
    kept = [name for name in names if name not in matrix]
    text = f"{' '.join(names)}, {' '.join([*kept, 'diagonal'])} -> {' '.join(names)}"
    return from_notation(text, call, moved=[*matrix, "diagonal"])


def _matrix(call: OpCall, rank: int) -> tuple[list[str], list[str]]:
    """Axes of all dims, and of the two of the matrix."""
    names = numbered(rank)
    return names, [names[call.dim(call.bound.get(key, end), rank)] for key, end in (("dim1", -2), ("dim2", -1))]
