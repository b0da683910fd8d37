"""Matrices of a batch, and vectors compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    F32,
    F64,
    SIZE,
    aten,
    broadcastable,
    call,
    cases,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)


def _square(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    """Matrices far from singular, whose eigenvalues lie apart."""
    return t(*shape, dtype=dtype) * 0.2 + torch.diag(torch.arange(1, shape[-1] + 1).to(dtype))


def _definite(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    root = _square(*shape, dtype=dtype)
    return root @ root.mT


_SQUARE = (
    "inverse linalg_inv linalg_inv_ex pinverse linalg_pinv matrix_exp linalg_matrix_exp det linalg_det logdet slogdet "
    "linalg_slogdet linalg_eigvals linalg_cond linalg_matrix_rank linalg_lu linalg_lu_factor linalg_lu_factor_ex"
)
_DEFINITE = "cholesky linalg_cholesky linalg_cholesky_ex cholesky_inverse linalg_eigh linalg_eigvalsh"


def _names(text: str) -> list[str]:
    return [f"aten::{name}" for name in text.split()]


def _of_matrices(name: str, matrices: torch.Tensor) -> tuple:
    """The call of a decomposition on `matrices`."""
    op = name.removeprefix("aten::")
    if op == "linalg_pinv":
        return call(aten.linalg_pinv.atol_rtol_float, matrices, rtol=1e-9)
    if op == "linalg_matrix_rank":
        return call(aten.linalg_matrix_rank.atol_rtol_float, matrices, rtol=1e-9)
    return call(overload(name), matrices, *{"linalg_svd": [False], "linalg_cond": [2]}.get(op, []))


@cases(*_names(_SQUARE))
def _(name):
    for lead in ((), (5,), (2, 3), (3, 1)):
        yield _of_matrices(name, _square(*lead, 4, 4))
    yield _of_matrices(name, _square(5, 3, 3, dtype=F32))


@cases(*_names(_DEFINITE))
def _(name):
    for lead in ((), (5,), (2, 3)):
        yield _of_matrices(name, _definite(*lead, 4, 4))
    yield _of_matrices(name, _definite(5, 3, 3, dtype=F32))


@cases(*_names("linalg_svdvals linalg_svd svd linalg_qr qr"))
def _(name):
    for shape in ((4, 4), (5, 6, 3), (2, 3, 4, 4)):
        yield _of_matrices(name, t(*shape))
    if name != "aten::linalg_qr":
        yield _of_matrices(name, t(5, 3, 6))


@generated(*_names(f"{_SQUARE} {_DEFINITE}"))
def _(draw, name):
    size = draw(st.integers(1, 5))
    make = _square if name in _names(_SQUARE) else _definite
    return _of_matrices(name, make(*shape_of(draw, 0, 3), size, size, dtype=one_of(draw, F64, F64, F32)))


@generated(*_names("linalg_svdvals linalg_svd svd linalg_qr qr"))
def _(draw, name):
    n = draw(st.integers(1, 5))
    m = n + draw(st.integers(0, 3))
    shape = (n, m) if "qr" not in name and draw(st.booleans()) else (m, n)
    return _of_matrices(name, t(*shape_of(draw, 0, 3), *shape))


@cases("aten::matrix_power", "aten::linalg_matrix_power")
def _(name):
    for power in (0, 1, 3, -2):
        yield call(overload(name), _square(5, 3, 3), power)


@generated("aten::matrix_power", "aten::linalg_matrix_power")
def _(draw, name):
    size = draw(st.integers(1, 4))
    return call(overload(name), _square(*shape_of(draw, 0, 3), size, size), one_of(draw, 0, 1, 2, 3, -1, -2))


@cases("aten::linalg_householder_product")
def _():
    yield call(aten.linalg_householder_product.default, t(5, 4, 3), t(5, 3))
    yield call(aten.linalg_householder_product.default, t(4, 4), t(2))


@generated("aten::linalg_householder_product")
def _(draw):
    lead, n = shape_of(draw, 0, 3), draw(SIZE)
    m, k = n + draw(st.integers(0, 3)), draw(st.integers(1, n))
    return call(aten.linalg_householder_product.default, t(*lead, m, n), t(*lead, k))


_SOLVES = ["aten::linalg_solve", "aten::linalg_solve_ex", "aten::linalg_solve_triangular"]


@cases(*_SOLVES)
def _(name):
    solve, more = overload(name), {"upper": False} if "triangular" in name else {}
    for lead in ((), (5,), (2, 3)):
        yield call(solve, _square(*lead, 4, 4), t(*lead, 4, 6), **more)
        yield call(solve, _square(*lead, 4, 4), t(*lead, 6, 4), left=False, **more)
    yield call(solve, _square(5, 1, 4, 4), t(3, 4, 6), **more)
    if "triangular" not in name:
        yield call(solve, _square(5, 4, 4), t(5, 4))
        yield call(solve, _square(4, 4), t(4))


@generated(*_SOLVES)
def _(draw, name):
    lead, n, columns, left = shape_of(draw, 0, 2), draw(SIZE), draw(SIZE), draw(st.booleans())
    more = {"upper": draw(st.booleans())} if "triangular" in name else {}
    matrices = _square(*broadcastable(draw, lead), n, n, dtype=one_of(draw, F64, F64, F32))
    if "triangular" not in name and draw(st.booleans()):
        return call(overload(name), matrices, t(*matrices.shape[:-1], dtype=matrices.dtype))
    known = t(*lead, *((n, columns) if left else (columns, n)), dtype=matrices.dtype)
    return call(overload(name), matrices, known, left=left, **more)


@cases("aten::triangular_solve", "aten::cholesky_solve")
def _(name):
    make = _square if name == "aten::triangular_solve" else _definite
    for lead in ((), (5,), (2, 3)):
        yield call(overload(name), t(*lead, 4, 6), make(*lead, 4, 4))
    yield call(overload(name), t(3, 4, 6), make(5, 1, 4, 4))


@generated("aten::triangular_solve", "aten::cholesky_solve")
def _(draw, name):
    lead, n, upper = shape_of(draw, 0, 2), draw(SIZE), draw(st.booleans())
    make = _square if name == "aten::triangular_solve" else _definite
    known = t(*broadcastable(draw, lead), n, draw(SIZE))
    return call(overload(name), known, make(*lead, n, n), upper)


@cases("aten::lu_solve", "aten::linalg_lu_solve")
def _(name):
    for lead in ((), (5,), (2, 3)):
        matrices, pivots = torch.linalg.lu_factor(_square(*lead, 4, 4))
        if name == "aten::lu_solve":
            yield call(aten.lu_solve.default, t(*lead, 4, 6), matrices, pivots)
        else:
            yield call(aten.linalg_lu_solve.default, matrices, pivots, t(*lead, 4, 6))
            yield call(aten.linalg_lu_solve.default, matrices, pivots, t(*lead, 6, 4), left=False)
            yield call(aten.linalg_lu_solve.default, matrices, pivots, t(*lead, 4, 6), adjoint=True)


@generated("aten::lu_solve", "aten::linalg_lu_solve")
def _(draw, name):
    lead, n, columns, left = shape_of(draw, 0, 2), draw(SIZE), draw(SIZE), draw(st.booleans())
    matrices, pivots = torch.linalg.lu_factor(_square(*lead, n, n))
    if name == "aten::lu_solve":
        return call(aten.lu_solve.default, t(*lead, n, columns), matrices, pivots)
    known = t(*lead, *((n, columns) if left else (columns, n)))
    return call(aten.linalg_lu_solve.default, matrices, pivots, known, left=left, adjoint=draw(st.booleans()))


@cases("aten::cross", "aten::linalg_cross")
def _(name):
    cross = overload(name)
    yield call(cross, t(5, 3), t(5, 3))
    yield call(cross, t(5, 3, 7), t(5, 3, 7), dim=1)
    yield call(cross, t(5, 1, 3), t(1, 7, 3), dim=-1)
    if name == "aten::cross":
        yield call(cross, t(5, 3, 3), t(5, 3, 3))


@generated("aten::cross", "aten::linalg_cross")
def _(draw, name):
    shape = shape_of(draw, 1, 4)
    dim = one_of(draw, *range(len(shape)))
    shape[dim] = 3
    other = [size if n == dim or draw(st.booleans()) else 1 for n, size in enumerate(shape)]
    where = {} if name == "aten::cross" and other == shape and draw(st.booleans()) else {"dim": dim - len(shape)}
    x, y = t(*shape), t(*other)
    return call(overload(name), *((x, y) if draw(st.booleans()) else (y, x)), **where)


@cases("aten::cosine_similarity", "aten::pairwise_distance")
def _(name):
    for shapes in (((5, 7), (5, 7)), ((5, 3, 7), (7,)), ((7,), (5, 7)), ((5, 1, 7), (3, 7))):
        x, y = (t(*shape) for shape in shapes)
        more = [-1] if name == "aten::cosine_similarity" else [2.0, 1e-6, True]
        yield call(overload(name), x, y, *more)
    yield call(overload(name), t(5, 6, 7), t(5, 6, 7))


@generated("aten::cosine_similarity", "aten::pairwise_distance")
def _(draw, name):
    shape = shape_of(draw, 1, 4)
    x, y = t(*shape), t(*broadcastable(draw, shape))
    pair = (x, y) if draw(st.booleans()) else (y, x)
    if name == "aten::cosine_similarity":
        return call(aten.cosine_similarity.default, *pair, one_of(draw, *range(-len(shape), len(shape))))
    return call(aten.pairwise_distance.default, *pair, one_of(draw, 1.0, 2.0, 3.0), 1e-6, draw(st.booleans()))


@cases("aten::cdist")
def _():
    for p in (2.0, 1.0, 3.0):
        yield call(aten.cdist.default, t(5, 4), t(6, 4), p)
        yield call(aten.cdist.default, t(2, 1, 5, 4), t(3, 6, 4), p)


@generated("aten::cdist")
def _(draw):
    lead, k = shape_of(draw, 0, 2), draw(SIZE)
    left, right = (t(*broadcastable(draw, lead), draw(SIZE), k) for _ in "ab")
    return call(aten.cdist.default, left, right, one_of(draw, 2.0, 1.0, 4.0), one_of(draw, None, 1, 2))


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.linalg_solve.default, t(5, 4, 4), t(5, 4, 6)), ".0 m n, .0 m p -> .0 n p; whole: m n"),
        (call(aten.cdist.default, t(2, 5, 4), t(6, 4)), ".0 m k, n k -> .0 m n; whole: k"),
        (call(aten.cosine_similarity.default, t(5, 7), t(7), -1), "d0 d1, d1 -> d0; whole: d1"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.linalg_pinv.atol_rtol_tensor, t(5, 4, 3), rtol=t(positive=True) * 0.01),
        call(aten.linalg_qr.default, t(4, 4).requires_grad_(False), "r"),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    with torch.no_grad():
        assert rule_of(made) is None
