"""Matrices of a batch, and vectors compared: the batch is parallel, each matrix or vector stays whole."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation, parse
from . import numbered, rule

aten = torch.ops.aten

# All named axes stay whole, `p` (columns that are solved for one by one) aside. k: as many as there are singular values.
_MATRIX_RULES = {
    "... m n -> ... n m": ("inverse", "linalg_inv", "linalg_pinv", "pinverse"),
    "... m n -> ... n m, ...": ("linalg_inv_ex",),
    "... m n -> ... m n": (
        "matrix_exp",
        "linalg_matrix_exp",
        "matrix_power",
        "linalg_matrix_power",
        "cholesky",
        "linalg_cholesky",
        "cholesky_inverse",
    ),
    "... m n -> ... m n, ...": ("linalg_cholesky_ex",),
    "... m n -> ...": ("det", "linalg_det", "logdet", "linalg_matrix_rank", "linalg_cond"),
    "... m n -> ..., ...": ("slogdet", "linalg_slogdet"),
    "... m n -> ... k": ("linalg_eigvals", "linalg_eigvalsh", "linalg_svdvals"),
    "... m n -> ... k, ... m n": ("linalg_eigh",),
    "... m n -> ... m u, ... k, ... v n": ("linalg_svd",),
    "... m n -> ... m u, ... k, ... n v": ("svd",),
    "... m n -> ... m u, ... v n": ("linalg_qr", "qr"),
    "... m n -> ... m u, ... u k, ... k n": ("linalg_lu",),
    "... m n -> ... m n, ... k": ("linalg_lu_factor",),
    "... m n -> ... m n, ... k, ...": ("linalg_lu_factor_ex",),
    "... m n, ... k -> ... m n": ("linalg_householder_product",),
    "... m p, ... m n -> ... n p, ... m n": ("triangular_solve",),
    "... m p, ... m n -> ... n p": ("cholesky_solve",),
    "... m p, ... m n, ... k -> ... n p": ("lu_solve",),
}
_TEXTS = {f"aten::{name}": text for text, names in _MATRIX_RULES.items() for name in names}


@rule(*_TEXTS)
def matrices(call: OpCall) -> OpRule | None:
    text = _TEXTS[call.target._schema.name]
    if len(call.operands) > len(parse(text)[0]) or any(0 in shape for shape in call.outputs):
        return None  # tolerances as tensors; a factor that was not asked for
    return from_notation(text, call, whole="mnkuv")


@rule("aten::linalg_solve", "aten::linalg_solve_ex", "aten::linalg_solve_triangular", "aten::linalg_lu_solve")
def solve(call: OpCall) -> OpRule:
    """`A X = B`, or `X A = B`: each column (or row) of B is solved for by itself."""
    name = call.target._schema.name
    matrix, known = call.operands[0].shape, call.operands[-1].shape
    given, solved = ("p m", "p n") if not call["left"] else ("m p", "n p")
    vector = name.startswith("aten::linalg_solve") and "triangular" not in name
    if vector and (len(known) == 1 or known == matrix[:-1]):
        given, solved = "m", "n"
    operands = f"... m n, ... k, ... {given}" if name == "aten::linalg_lu_solve" else f"... m n, ... {given}"
    information = ", ..." * (len(call.outputs) - 1)
    return from_notation(f"{operands} -> ... {solved}{information}", call, whole="mnk")


@rule("aten::cross", "aten::linalg_cross")
def cross(call: OpCall) -> OpRule:
    """Broadcast vectors of three numbers; without a dim, `cross` takes the first of size three, which may be another one
    of a shard."""
    ranks = [len(operand.shape) for operand in call.operands]
    names = numbered(max(ranks))
    dim = call.outputs[0].index(3) if call["dim"] is None else call.dim(call["dim"], len(names))
    groups = ", ".join(" ".join(names[len(names) - rank :]) for rank in ranks)

    def local(emit, target, args, kwargs, here: Local):
        return emit(aten.linalg_cross.default, *args[:2], dim=dim - len(names))

    return from_notation(f"{groups} -> {' '.join(names)}", call, moved=[names[dim]], local=local)


@rule("aten::cosine_similarity", "aten::pairwise_distance")
def compare_vectors(call: OpCall) -> OpRule:
    """Broadcast vectors along one dim (the last for a distance), which is gone in the result or of size one."""
    ranks = [len(operand.shape) for operand in call.operands]
    names = numbered(max(ranks))
    gone = call.dim(call.bound.get("dim", -1), len(names))
    kept = ["1"] if call.bound.get("keepdim", False) else []
    groups = ", ".join(" ".join(names[len(names) - rank :]) for rank in ranks)
    out = " ".join([*names[:gone], *kept, *names[gone + 1 :]])
    return from_notation(f"{groups} -> {out}", call, whole=[names[gone]])


@rule("aten::cdist")
def distances(call: OpCall) -> OpRule:
    return from_notation("... m k, ... n k -> ... m n", call, whole="k")
