"""Every registered rule keeps its promise: run in shards, its op gives what one device computes, gradients included.

Each rule has calls of its op here, in odd shapes and every form of the arguments that the rule looks at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_auto.errors import ProofError
from dsp_auto.passes.notation import OpCall, from_notation
from dsp_auto.passes.prove import Example, difference, prove
from dsp_auto.passes.rules import registered

aten = torch.ops.aten
Call = tuple[Any, tuple, dict[str, Any]]
F64, F32, BF16, I64 = torch.float64, torch.float32, torch.bfloat16, torch.int64
_generator = torch.Generator()


def t(*shape: int, dtype: torch.dtype = F64, positive: bool = False) -> torch.Tensor:
    """Random numbers, other ones in every element."""
    values = torch.randn(shape, generator=_generator, dtype=F64)
    if dtype is torch.bool:
        return values > 0
    if not dtype.is_floating_point:
        values = values * 4
    return ((values.abs() + 0.5) if positive else values).to(dtype)


def index(limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, limit, shape, generator=_generator)


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    return target, args, kwargs


CASES: dict[str, Callable[[], Iterator[Call]]] = {}


def cases(*names: str):
    """Registers calls for ops' rules, by the names under which the rules are registered."""

    def register(function):
        for name in names:
            assert name not in CASES
            CASES[name] = lambda name=name: function(name) if function.__code__.co_argcount else function()
        return function

    return register


def overload(name: str, default: str = "default") -> Any:
    """`aten::mean.dim` -> torch.ops.aten.mean.dim"""
    op, _, own = name.removeprefix("aten::").partition(".")
    return getattr(getattr(aten, op), own or default)


# --- attention


@cases("aten::scaled_dot_product_attention")
def _():
    sdpa = aten.scaled_dot_product_attention.default
    for heads in ((2, 3), (3,), (), (2, 1, 3)):
        yield call(sdpa, t(*heads, 5, 4), t(*heads, 7, 4), t(*heads, 7, 6))
    q, k, v = t(2, 6, 5, 4), t(2, 6, 7, 4), t(2, 6, 7, 3)
    yield call(sdpa, q, k, v, scale=0.3)
    yield call(sdpa, q, k, v, None, 0.0, True)
    for shape in ((2, 6, 5, 7), (2, 1, 5, 7), (1, 6, 5, 7), (5, 7), (6, 5, 7), (2, 6, 1, 7), (1, 1, 1, 7), (1, 7)):
        yield call(sdpa, q, k, v, t(*shape))
    yield call(sdpa, q, k, v, torch.ones(5, 7, dtype=torch.bool).tril(3))
    for groups in (1, 2, 3, 6):
        k, v = t(2, groups, 7, 4), t(2, groups, 7, 3)
        yield call(sdpa, q, k, v, enable_gqa=True)
        for shape in ((5, 7), (2, 1, 5, 7), (2, 6, 5, 7), (6, 5, 7), (1, 5, 7)):
            yield call(sdpa, q, k, v, t(*shape), enable_gqa=True, scale=0.2)
    yield call(sdpa, q, t(2, 6, 1, 4), t(2, 6, 1, 3))
    yield call(sdpa, t(2, 1, 5, 4), t(2, 1, 7, 4), t(2, 1, 7, 3))
    for dtype in (F32, BF16):
        yield call(sdpa, t(2, 3, 5, 8, dtype=dtype), t(2, 3, 7, 8, dtype=dtype), t(2, 3, 7, 8, dtype=dtype))


@cases("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax")
def _(name):
    internal = name.startswith("aten::_")
    for dtype, dim in itertools.product((F64, F32, BF16), (0, 1, -1)):
        x = t(5, 7, 4, dtype=dtype)
        yield call(overload(name), x, dim, False) if internal else call(overload(name, "int"), x, dim)
    if not internal:
        yield call(overload(name, "int"), t(5, 7, dtype=BF16), -1, F32)
        yield call(overload(name, "int"), t(), 0)


# --- contractions


@cases("aten::linear")
def _():
    for bias, lead in itertools.product((True, False), ((), (5,), (2, 5), (1, 3, 1, 2))):
        yield call(aten.linear.default, t(*lead, 6), t(7, 6), *([t(7)] if bias else []))
    yield call(aten.linear.default, t(2, 5, 1), t(7, 1), t(7))
    yield call(aten.linear.default, t(2, 5, 6), t(1, 6), t(1))
    yield call(aten.linear.default, t(2, 5, 6), t(6))
    yield call(aten.linear.default, t(2, 5, 6), t(7, 6), None)
    for dtype in (F32, BF16):
        yield call(aten.linear.default, t(5, 6, dtype=dtype), t(7, 6, dtype=dtype), t(7, dtype=dtype))


@cases("aten::matmul")
def _():
    for left, right in itertools.product(((), (2,), (3, 2), (3, 1)), repeat=2):
        yield call(aten.matmul.default, t(*left, 5, 6), t(*right, 6, 7))
    for lead in ((), (3,), (2, 3)):
        yield call(aten.matmul.default, t(*lead, 5, 6), t(6))
        yield call(aten.matmul.default, t(6), t(*lead, 6, 5))
    yield call(aten.matmul.default, t(6), t(6))
    yield call(aten.matmul.default, t(5, 1), t(1, 7))
    yield call(aten.matmul.default, t(1, 5), t(5, 1))
    for dtype in (F32, BF16, I64):
        yield call(aten.matmul.default, t(2, 5, 6, dtype=dtype), t(6, 7, dtype=dtype))


@cases("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::outer", "aten::ger")
def _(name):
    shapes = {"mm": [(5, 6), (6, 7)], "bmm": [(4, 5, 6), (4, 6, 7)], "mv": [(5, 6), (6,)], "dot": [(7,), (7,)]}
    a, b = shapes.get(name.removeprefix("aten::"), [(5,), (7,)])
    for dtype in (F64, F32, BF16, I64):
        yield call(overload(name), t(*a, dtype=dtype), t(*b, dtype=dtype))


@cases("aten::addmm", "aten::baddbmm")
def _(name):
    lead = (4,) if name == "aten::baddbmm" else ()
    for shape in ((), (7,), (1,), (5, 7), (1, 7), (5, 1), (4, 5, 7), (4, 1, 7))[: 8 if lead else 6]:
        yield call(overload(name), t(*shape), t(*lead, 5, 6), t(*lead, 6, 7), beta=0.5, alpha=2)


@cases("aten::einsum")
def _():
    for equation, *shapes in (
        ("bshd,bthd->bhst", (2, 5, 3, 4), (2, 7, 3, 4)),
        ("bhst,bthd->bshd", (2, 3, 5, 7), (2, 7, 3, 4)),
        ("b s c, c o -> b s o", (2, 5, 6), (6, 7)),
        ("ab,bc", (5, 6), (6, 7)),
        ("ba,ca", (5, 6), (7, 6)),
        ("abc->cab", (5, 6, 7)),
        ("abc->b", (5, 6, 7)),
        ("ab->", (5, 7)),
        ("i,j->ij", (5,), (7,)),
        ("i,i->", (7,), (7,)),
        ("Bij,Bjk,Bkl->Bil", (2, 3, 4), (2, 4, 5), (2, 5, 7)),
        ("abd,cd->abc", (5, 1, 4), (7, 4)),
        ("...hqd,...hkd->...hqk", (2, 5, 3, 7, 4), (1, 5, 3, 6, 4)),
        ("...i,ij", (5, 7), (7, 6)),
        ("i...->...i", (5, 6, 7)),
        ("abd,bcd->abc", (5, 1, 4), (3, 7, 4)),
    ):
        yield call(aten.einsum.default, equation, [t(*shape) for shape in shapes])


# --- convolution


@cases("aten::conv1d", "aten::conv2d", "aten::conv3d")
def _(name):
    n = int(name[-2])
    conv, space = overload(name), (8, 12, 4)[:n]
    for bias in (None, t(5)):
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [2] * n)  # patches
        yield call(conv, t(4, 1, *space), t(5, 1, *[4] * n), bias, [4] * n)
        yield call(conv, t(4, 6, *space), t(5, 6, *[1] * n), bias)
        yield call(conv, t(4, 6, *space), t(5, 6, *[3] * n), bias, [1] * n, [1] * n)  # overlap
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [1] * n)
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [2] * n, [0] * n, [2] * n)
    yield call(conv, t(4, 6, *[7] * n), t(5, 6, *[3] * n), None, [3] * n)  # a remainder that no patch covers
    yield call(conv, t(4, 6, *space, dtype=BF16), t(5, 6, *[2] * n, dtype=BF16), t(5, dtype=BF16), [2] * n)
    yield call(conv, t(2, 3, *space), t(5, 3, *[4] + [2] * (n - 1)), t(5), [4] + [2] * (n - 1))


# --- look-ups


@cases("aten::embedding")
def _():
    for shape in ((5,), (2, 7), (), (3, 1)):
        yield call(aten.embedding.default, t(9, 4), index(9, *shape))
    yield call(aten.embedding.default, t(9, 4, dtype=F32), index(9, 7), 3)
    yield call(aten.embedding.default, t(1, 4), index(1, 7))
    yield call(aten.embedding.default, t(9, 1), index(9, 7))


@cases("aten::index_select")
def _():
    for dtype, dim in itertools.product((F64, I64), (0, 1, -1)):
        yield call(aten.index_select.default, t(5, 6, 7, dtype=dtype), dim, index(5, 4))
    yield call(aten.index_select.default, t(5, 1), 1, index(1, 7))
    yield call(aten.index_select.default, t(5, 7), 1, index(7))


# --- norms


@cases("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def _(name):
    norm, bias = overload(name), name != "aten::rms_norm"
    rest = [1e-5] if name == "aten::native_layer_norm" else []
    for shape in ((7,), (5, 7)):
        for dtype in (F64, F32, BF16):
            weights = [t(*shape, dtype=dtype), t(*shape, dtype=dtype)][: 2 if bias else 1]
            yield call(norm, t(3, 2, *shape, dtype=dtype), list(shape), *weights, *rest)
        yield call(norm, t(3, 2, *shape), list(shape), *[None] * (2 if bias else 1), *rest)
        yield call(norm, t(*shape), list(shape), *[None] * (2 if bias else 1), *rest)
    if bias:
        yield call(norm, t(3, 2, 7), [7], None, t(7), *rest)
        yield call(norm, t(3, 2, 7), [7], t(7), None, *rest)


@cases("aten::group_norm")
def _():
    for space in ((), (5,), (3, 5)):
        yield call(aten.group_norm.default, t(5, 6, *space), 3, t(6), t(6))
        yield call(aten.group_norm.default, t(5, 6, *space), 2)


# --- pointwise

_UNARY = "silu gelu sigmoid neg rsqrt sin cos exp tanh relu reciprocal sqrt abs softplus erf log1p log hardtanh clone"
_BINARY = "mul.Tensor add.Tensor sub.Tensor div.Tensor minimum maximum pow.Tensor_Tensor atan2 lerp.Scalar"
_COMPARE = "ge.Tensor le.Tensor gt.Tensor lt.Tensor eq.Tensor ne.Tensor logical_and logical_or"
_INTEGER = "bitwise_and.Tensor bitwise_or.Tensor remainder.Tensor mul.Tensor add.Tensor"
_SCALAR = "pow.Tensor_Scalar rsub.Scalar ge.Scalar lt.Scalar gt.Scalar eq.Scalar clamp_min clamp mul.Scalar pow.Scalar"
_BROADCASTS = [((5, 7), (5, 7)), ((5, 7), (7,)), ((5, 1), (1, 7)), ((2, 5, 7), (5, 1)), ((7,), ()), ((3, 1, 5), (2, 1))]


@cases("pointwise")
def _():
    for name in _UNARY.split():
        yield call(overload(name), t(5, 7, positive=True))
        yield call(overload(name), t(2, 1, 7, dtype=BF16, positive=True))
    for name in _BINARY.split():
        for left, right in _BROADCASTS:
            more = [0.3] if name == "lerp.Scalar" else []
            yield call(overload(name), t(*left, positive=True), t(*right, positive=True), *more)
    for name, (left, right) in zip(itertools.cycle(_COMPARE.split()), _BROADCASTS * 2):
        yield call(overload(name), t(*left), t(*right))
    for name in _INTEGER.split():
        yield call(overload(name), t(5, 7, dtype=I64), t(7, dtype=I64).abs() + 1)
    for name in _SCALAR.split():
        yield call(overload(name), *((2.0, t(5, 7)) if name == "pow.Scalar" else (t(5, 7, positive=True), 2.0)))
    yield call(aten.bitwise_not.default, t(5, 7, dtype=torch.bool))
    yield call(aten.addcmul.default, t(7), t(5, 1), t(5, 7), value=0.5)
    yield call(aten.lerp.Tensor, t(5, 7), t(7), t(5, 1))
    yield call(aten.where.self, t(5, 7, dtype=torch.bool), t(7), t(5, 1))
    yield call(aten.mul.Tensor, t(5, 7, dtype=I64), t(7))
    yield call(aten.frexp.Tensor, t(5, 7).detach())


@cases("aten::where")
def _():
    mask = t(5, 7, dtype=torch.bool)
    yield call(aten.where.ScalarOther, mask, t(5, 7), 0.0)
    yield call(aten.where.ScalarSelf, mask, 0.0, t(7))
    yield call(aten.where.Scalar, mask, 1.0, 0.0)
    yield call(aten.where.self, t(5, 1, dtype=torch.bool), t(1, 7), t())


@cases("aten::masked_fill")
def _():
    for mask in ((5, 7), (7,), (5, 1), ()):
        yield call(aten.masked_fill.Scalar, t(5, 7), t(*mask, dtype=torch.bool), -1.0)
        yield call(aten.masked_fill.Tensor, t(5, 7), t(*mask, dtype=torch.bool), t())


@cases("aten::clone", "aten::detach", "aten::alias", "aten::contiguous", "aten::lift_fresh_copy")
def _(name):
    for dtype in (F64, BF16, I64, torch.bool):
        yield call(overload(name), t(5, 1, 7, dtype=dtype))
    yield call(overload(name), t(5, 7).mT)


@cases("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
def _(name):
    value = [3.0] if name == "aten::full_like" else []
    for dtype in (F64, I64):
        yield call(overload(name), t(5, 1, 7, dtype=dtype), *value)
    yield call(overload(name), t(5, 7), *value, dtype=BF16)


@cases("aten::type_as")
def _():
    for shape in ((5, 7), (7,), (3,), (), (2, 5, 7), (4, 5, 7, 1)):
        yield call(aten.type_as.default, t(5, 7), t(*shape, dtype=F32))


@cases("aten::to", "aten::_to_copy")
def _(name):
    if name == "aten::_to_copy":
        yield call(aten._to_copy.default, t(5, 7), dtype=F32)
        return
    for dtype in (F64, F32, BF16, I64):
        yield call(aten.to.dtype, t(5, 7), dtype)
        yield call(aten.to.dtype, t(5, 7, dtype=I64), dtype, False, True)
    yield call(aten.to.dtype_layout, t(5, 7), dtype=F32)
    yield call(aten.to.device, t(5, 7), torch.device("cpu"), F32)
    for shape in ((5, 7), (7,), (3,), ()):
        yield call(aten.to.other, t(5, 7), t(*shape, dtype=F32))


@cases("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
def _(name):
    for p, train in ((0.5, False), (0.0, True), (0.0, False)):
        yield call(overload(name), t(5, 7, 3), p, train)


@cases("aten::floor_divide", "aten::__and__", "aten::__or__", "aten::__xor__")
def _(name):
    own = overload(name, "default" if name == "aten::floor_divide" else "Tensor")
    for left, right in _BROADCASTS:
        yield call(own, t(*left, dtype=I64), t(*right, dtype=I64).abs() + 1)


# --- reductions


def _dims(rank: int) -> list[list[int]]:
    return [[0], [-1], [0, -1], [1], [*range(rank)]]


@cases("aten::sum", "aten::mean")
def _(name):
    for keep, dims in itertools.product((False, True), [*_dims(3), [], None]):
        yield call(overload(name, "dim_IntList" if name == "aten::sum" else "dim"), t(5, 6, 7), dims, keep)
    yield call(overload(name), t(5, 7))
    yield call(overload(name), t())
    yield call(overload(name), t(5, 7, dtype=BF16), dtype=F32)
    for dtype in (F32, BF16) if name == "aten::mean" else (F32, BF16, I64, torch.bool):
        yield call(overload(name, "dim_IntList" if name == "aten::sum" else "dim"), t(5, 1, 7, dtype=dtype), [-1])


@cases("aten::amax", "aten::amin", "aten::logsumexp", "aten::linalg_vector_norm")
def _(name):
    order = [2] if name == "aten::linalg_vector_norm" else []
    for keep, dims in itertools.product((False, True), _dims(3)):
        yield call(overload(name), t(5, 6, 7), *order, dims, keep)


@cases("aten::argmax", "aten::argmin", "aten::max.dim", "aten::min.dim", "aten::prod.dim_int", "aten::any.dim")
def _(name):
    dtype = torch.bool if name == "aten::any.dim" else F64
    for keep, dim in itertools.product((False, True), (0, 1, -1)):
        yield call(overload(name), t(5, 6, 7, dtype=dtype), dim, keep)
    if name.startswith("aten::arg"):
        yield call(overload(name), t(5, 7))


@cases("aten::all.dim")
def _():
    yield call(aten.all.dim, t(5, 7, dtype=torch.bool), -1)
    yield call(aten.all.dim, t(5, 7, dtype=torch.bool), 0, True)


@cases("aten::var.dim", "aten::std.dim", "aten::var.correction", "aten::std.correction")
def _(name):
    for keep, dims in itertools.product((False, True), _dims(3)):
        if name.endswith("dim"):
            yield call(overload(name), t(5, 6, 7), dims, False, keep)
        else:
            yield call(overload(name), t(5, 6, 7), dims, correction=1, keepdim=keep)


@cases("aten::cumsum", "aten::cumprod", "aten::sort", "aten::topk")
def _(name):
    for dim, dtype in itertools.product((0, 1, -1), (F64, I64)):
        x = torch.randperm(210, generator=_generator).reshape(5, 6, 7).to(dtype) / (100 if dtype == F64 else 1)
        x = x.to(dtype)
        if name == "aten::topk":
            yield call(aten.topk.default, x, 3, dim)
            yield call(aten.topk.default, x, x.shape[dim], dim)
        else:
            yield call(overload(name), x, dim)
    if name == "aten::sort":
        yield call(aten.sort.stable, t(5, 7), stable=True, dim=0)


# --- views, pieces and joins


@cases("aten::view", "aten::reshape", "aten::_unsafe_view")
def _(name):
    for before, after in (
        ((4, 5, 6), (20, 6)),
        ((20, 6), (4, 5, 6)),
        ((4, 5, 6), (120,)),
        ((24, 5), (2, 3, 4, 5)),
        ((6, 4), (4, 6)),
        ((6, 4, 5), (8, 3, 5)),
        ((2, 12, 3), (8, 9)),
        ((1, 5, 1, 6), (5, 6, 1)),
        ((5,), (1, 5, 1)),
        ((1, 1), ()),
        ((7, 6), (7, 3, 2)),
    ):
        yield call(overload(name), t(*before), list(after))
    yield call(overload(name), t(4, 6, dtype=I64), [-1, 3])
    yield call(overload(name), t(4, 6, dtype=BF16), [2, -1, 2])


@cases("aten::view_as", "aten::reshape_as")
def _(name):
    yield call(overload(name), t(5, 6), t(5, 3, 2))
    yield call(overload(name), t(5, 6), t(30))


@cases("aten::flatten", "aten::unflatten", "aten::unsqueeze", "aten::squeeze")
def _(name):
    if name == "aten::flatten":
        for ends in ((0, -1), (1, 2), (-2, -1), (1, 1)):
            yield call(aten.flatten.using_ints, t(5, 6, 7), *ends)
        yield call(aten.flatten.using_ints, t())
    elif name == "aten::unflatten":
        yield call(aten.unflatten.int, t(5, 12), 1, [3, 4])
        yield call(aten.unflatten.int, t(5, 12, 3), -2, [2, -1])
    elif name == "aten::unsqueeze":
        for dim in (0, 1, -1, -2):
            yield call(aten.unsqueeze.default, t(5, 7), dim)
    else:
        yield call(aten.squeeze.default, t(5, 1, 7, 1))
        yield call(aten.squeeze.dim, t(5, 1, 7), 1)
        yield call(aten.squeeze.dim, t(5, 1, 7), -1)
        yield call(aten.squeeze.dims, t(1, 5, 1), [0, 2])


@cases("aten::permute", "aten::transpose", "aten::t", "aten::swapaxes", "aten::movedim", "aten::numpy_T", "aten::mT")
def _(name):
    x = t(2, 5, 1, 7)
    forms = {
        "permute": [(aten.permute.default, x, [3, 0, 2, 1]), (aten.permute.default, x, [-1, -2, 0, 1])],
        "transpose": [(aten.transpose.int, x, 1, -1), (aten.transpose.int, t(5, 7, dtype=I64), 0, 1)],
        "t": [(aten.t.default, t(5, 7)), (aten.t.default, t(5))],
        "swapaxes": [(aten.swapaxes.default, x, 0, 3)],
        "movedim": [(aten.movedim.int, x, 0, -1), (aten.movedim.intlist, x, [0, 1], [2, 0])],
        "numpy_T": [(aten.numpy_T.default, t(5, 7))],
        "mT": [(aten.mT.default, t(3, 5, 7))],
    }
    for form in forms[name.removeprefix("aten::")]:
        yield call(*form)


@cases("aten::expand", "aten::expand_as", "aten::broadcast_to")
def _(name):
    for before, after in (((5, 1), (5, 7)), ((7,), (5, 7)), ((1, 5, 1), (2, 5, 7)), ((5, 7), (5, 7)), ((), (5, 7))):
        size = t(*after, dtype=F32) if name == "aten::expand_as" else list(after)
        yield call(overload(name), t(*before), size)
    if name != "aten::expand_as":
        yield call(overload(name), t(5, 1), [3, -1, 7])


@cases("aten::repeat")
def _():
    for shape, times in (
        ((5,), [3]),
        ((5, 7), [1, 1]),
        ((5, 7), [2, 3]),
        ((5, 7), [4, 1, 2]),
        ((1, 7), [5, 1]),
        ((5, 1), [1, 3]),
        ((), [7]),
    ):
        yield call(aten.repeat.default, t(*shape), times)


@cases("aten::repeat_interleave.self_int")
def _():
    for dim, times in itertools.product((0, 1, -1), (1, 3)):
        yield call(aten.repeat_interleave.self_int, t(5, 1, 7), times, dim)
    yield call(aten.repeat_interleave.self_int, t(5), 3)
    yield call(aten.repeat_interleave.self_int, t(5, 7), 3, 1, output_size=21)


@cases("aten::select", "aten::slice", "aten::narrow")
def _(name):
    for dim in (0, 1, -1):
        if name == "aten::select":
            yield call(aten.select.int, t(5, 6, 7), dim, -2)
        elif name == "aten::slice":
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 1, 4)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 0, 2**63 - 1)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 0, 2**63 - 1, 2)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, -3)
        else:
            yield call(aten.narrow.default, t(5, 6, 7), dim, 1, 4)
            yield call(aten.narrow.default, t(5, 6, 7), dim, 0, t(5, 6, 7).shape[dim])
    if name == "aten::select":
        yield call(aten.select.int, t(7), 0, 3)


@cases("aten::slice_scatter", "aten::select_scatter")
def _(name):
    for dim, piece in ((0, (3, 6, 7)), (1, (5, 3, 7)), (-1, (5, 6, 3))):
        if name == "aten::slice_scatter":
            yield call(aten.slice_scatter.default, t(5, 6, 7), t(*piece), dim, 1, 4)
        else:
            index = tuple(size for position, size in enumerate((5, 6, 7)) if position != dim % 3)
            yield call(aten.select_scatter.default, t(5, 6, 7), t(*index), dim, 2)


@cases("aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unbind", "aten::tensor_split.sections")
def _(name):
    for dim in (1, -1, -2):
        x = t(2, 12, 15)
        if name == "aten::unbind":
            yield call(aten.unbind.int, t(5, 3, 7), dim)
        elif name == "aten::split_with_sizes":
            yield call(aten.split_with_sizes.default, x, [3] * (x.shape[dim] // 3), dim)
            yield call(aten.split_with_sizes.default, x, [1, x.shape[dim] - 1], dim)
        elif name == "aten::split":
            yield call(aten.split.Tensor, x, 3, dim)
            yield call(aten.split.Tensor, x, 5, dim)  # uneven where dim is 12
            yield call(aten.split.sizes, x, [x.shape[dim] - 3, 3], dim)
        else:
            for count in (1, 3, 5, 7):
                yield call(overload(name), x, count, dim)
    if name == "aten::unbind":
        yield call(aten.unbind.int, t(3, 7), 0)


@cases("aten::cat", "aten::concat", "aten::concatenate", "aten::stack")
def _(name):
    for dim in (0, 1, -1):
        other = [2, 3, 4]
        if name != "aten::stack":
            other[dim] = 5
        yield call(overload(name), [t(2, 3, 4), t(*other), t(2, 3, 4)], dim)
    yield call(overload(name), [t(5, 7, dtype=I64)] * 2)
    if name == "aten::stack":
        yield call(aten.stack.default, [t(5, 7), t(5, 7)], -2)


@cases("aten::flip", "aten::roll", "aten::tril", "aten::triu")
def _(name):
    for lead in ((), (5,), (2, 3)):
        x = t(*lead, 6, 7)
        if name == "aten::flip":
            yield call(aten.flip.default, x, [0, -1])
            yield call(aten.flip.default, x, [-2])
        elif name == "aten::roll":
            yield call(aten.roll.default, x, [2], [-1])
            yield call(aten.roll.default, x, [2, -1], [0, 1])
            yield call(aten.roll.default, x, [3])
        else:
            yield call(overload(name), x)
            yield call(overload(name), x, 2)


@cases("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones", "aten::new_full")
def _(name):
    before = [t(3, 4, dtype=F32)] if "new_" in name else []
    after = [2.5] if "full" in name else []
    default = "memory_format" if name == "aten::empty" else "default"
    for size in ([5, 7], [5, 1, 3], []):
        yield call(overload(name, default), *before, size, *after)
        yield call(overload(name, default), *before, size, *after, dtype=BF16)


@cases("aten::arange", "aten::linspace", "aten::eye")
def _(name):
    if name == "aten::arange":
        yield call(aten.arange.default, 7)
        yield call(aten.arange.start_step, 1, 9, 2)
    elif name == "aten::linspace":
        yield call(aten.linspace.default, 0, 1, 7)
    else:
        yield call(aten.eye.default, 5)


# --- generated calls

_SIZE = st.integers(1, 7)


def _grouped(draw, factors: list[int]) -> list[int]:
    """The factors merged into dims at random."""
    dims = [1]
    for factor in factors:
        if draw(st.booleans()):
            dims.append(factor)
        else:
            dims[-1] *= factor
    return dims


def _broadcastable(draw, shape: list[int]) -> list[int]:
    """An operand's shape that broadcasts to `shape`."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    return [size if draw(st.booleans()) else 1 for size in kept]


@st.composite
def reshapes(draw) -> Call:
    factors = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return call(aten.reshape.default, t(*_grouped(draw, factors)), _grouped(draw, draw(st.permutations(factors))))


@st.composite
def pointwise_calls(draw) -> Call:
    shape = draw(st.lists(_SIZE, max_size=4))
    return call(aten.addcmul.default, *(t(*_broadcastable(draw, shape)) for _ in range(3)))


@st.composite
def matmuls(draw) -> Call:
    batch, (m, k, n) = draw(st.lists(_SIZE, max_size=3)), draw(st.tuples(_SIZE, _SIZE, _SIZE))
    left = [k] if draw(st.booleans()) else [*_broadcastable(draw, batch), m, k]
    right = [k] if draw(st.booleans()) else [*_broadcastable(draw, batch), k, n]
    return call(aten.matmul.default, t(*left), t(*right))


@st.composite
def einsums(draw) -> Call:
    sizes = dict(zip("abcde", draw(st.tuples(*[_SIZE] * 5))))
    term = st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True).map("".join)
    terms = draw(st.lists(term, min_size=1, max_size=3))
    out = "".join(draw(st.lists(st.sampled_from(sorted(set("".join(terms)))), unique=True)))
    equation = f"{','.join(terms)}->{out}"
    return call(aten.einsum.default, equation, [t(*(sizes[letter] for letter in own)) for own in terms])


@st.composite
def splits(draw) -> Call:
    pieces = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4) | st.integers(1, 5).map(lambda n: [n] * 3))
    shape, dim = draw(st.lists(_SIZE, min_size=1, max_size=3)), draw(st.integers(0, 2))
    dim = dim % len(shape)
    shape[dim] = sum(pieces)
    return call(aten.split_with_sizes.default, t(*shape), pieces, dim - draw(st.sampled_from([0, len(shape)])))


@st.composite
def repeats(draw) -> Call:
    shape = draw(st.lists(_SIZE, max_size=3))
    times = draw(st.lists(st.integers(1, 4), min_size=len(shape), max_size=len(shape) + 2))
    return call(aten.repeat.default, t(*shape), times)


@st.composite
def means(draw) -> Call:
    shape = draw(st.lists(_SIZE, min_size=1, max_size=4))
    dims = draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    return call(aten.mean.dim, t(*shape), dims, draw(st.booleans()))


@st.composite
def patch_convolutions(draw) -> Call:
    kernel, space = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2)), draw(st.tuples(_SIZE, _SIZE))
    shape = [step * size for step, size in zip(kernel, space)]
    b, c, o = draw(st.tuples(_SIZE, _SIZE, _SIZE))
    bias = t(o) if draw(st.booleans()) else None
    return call(aten.conv2d.default, t(b, c, *shape), t(o, c, *kernel), bias, kernel)


_GENERATED = (reshapes, pointwise_calls, matmuls, einsums, splits, repeats, means, patch_convolutions)

# --- the tests


@pytest.fixture(autouse=True, scope="module")
def same_numbers():
    """The same examples in every run, on one thread; `empty` is filled, so that its shards can be compared."""
    _generator.manual_seed(0)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


# Made from positions, so every rank makes all of them.
_NOTHING_TO_SHARD = {"aten::arange", "aten::linspace", "aten::eye"}


def test_every_registered_rule_has_cases():
    assert set(registered()) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_one_device_computes(name):
    proven = [prove(target, args, kwargs).axes for target, args, kwargs in CASES[name]()]
    assert any(proven) == (name not in _NOTHING_TO_SHARD)


@pytest.mark.parametrize("strategy", _GENERATED, ids=lambda strategy: strategy.__name__)
def test_shards_of_generated_calls_give_what_one_device_computes(strategy):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(strategy())
    def run(generated):
        target, args, kwargs = generated
        prove(target, args, kwargs)

    run()


def _rule(target, *args, **kwargs):
    return Example.of(target, args, kwargs).find_rule()


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.linear.default, t(5, 6), t(7, 6), t(7)), ".0 k, o k, o -> .0 o; reduces: k"),
        (call(aten.softmax.int, t(5, 7), -1), "d0 d1 -> d0 d1; whole: d1"),
        (call(aten.view.default, t(2, 5, 12), [10, 3, 4]), "a0 a1 (a2 a3) -> (a0 a1) a2 a3"),
        (call(aten.view.default, t(6, 4, 5), [8, 3, 5]), "a0 a1 a4 -> a2 a3 a4; moved: a0 a1 a2 a3"),
        (call(aten.matmul.default, t(2, 5, 6), t(6, 7)), ".0 m k, k n -> .0 m n; reduces: k"),
        (call(aten.chunk.default, t(5, 12), 3, -1), "d0 (piece rest) -> d0 rest, d0 rest, d0 rest; moved: piece"),
        (call(aten.repeat.default, t(5, 7), [1, 3]), "d0 d1 -> d0 (r1 d1)"),
        (call(aten.expand.default, t(5, 1), [3, 5, 7]), ".1 1 -> .2 .1 .0"),
        (call(aten.embedding.default, t(9, 4), index(9, 2, 7)), "v c, .1 .0 -> .1 .0 c; moved: v"),
        (
            call(aten.conv1d.default, t(2, 3, 12), t(5, 3, 4), None, [4]),
            "b c (s0 k0), o c k0 -> b o s0; reduces: c k0",
        ),
        (
            call(
                aten.scaled_dot_product_attention.default, t(2, 6, 5, 4), t(2, 3, 7, 4), t(2, 3, 7, 4), enable_gqa=True
            ),
            ".0 (g r) s d, .0 g t d, .0 g t e -> .0 (g r) s e; whole: d e t",
        ),
        (
            call(aten.scaled_dot_product_attention.default, t(5, 4), t(5, 4), t(5, 4), None, 0.0, True),
            "s d, t d, t e -> s e; whole: d e s t",
        ),
    ],
)
def test_rules_read(made, notation):
    target, args, kwargs = made
    assert str(_rule(target, *args, **kwargs)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.where.default, t(5, 7)),
        call(aten.view.dtype, t(5, 7), I64),
        call(aten.embedding.default, t(9, 4), index(9, 7), -1, True),
        call(aten.conv1d.default, t(3, 12), t(5, 3, 4)),
        call(aten.conv1d.default, t(2, 6, 12), t(6, 1, 4), None, [1], [0], [1], 6),
        call(aten.einsum.default, "ii->i", [t(5, 5)]),
        call(aten.einsum.default, "...i->i", [t(5, 5)]),
        call(aten.repeat_interleave.self_int, t(5, 7), 2),
        call(aten.linspace.Tensor_Scalar, t(dtype=I64), 1, 7),
        call(aten.cumsum.default, t(), 0),
        call(aten.index_select.default, t(), 0, index(1, 1)),
        call(aten.narrow.Tensor, t(5, 7), 0, index(2), 3),
        call(
            aten.scaled_dot_product_attention.default, t(6, 5, 4), t(3, 7, 4), t(2, 7, 4), enable_gqa=True
        ),
    ],
    ids=lambda made: str(made[0]),
)  # fmt: skip
def test_a_call_that_no_rule_describes_has_none(made):
    target, args, kwargs = made
    assert _rule(target, *args, **kwargs) is None
    with pytest.raises(ProofError, match="has no rule"):
        prove(target, args, kwargs)


@pytest.mark.parametrize("target", [aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default])
def test_ranks_do_not_split_random_draws(target):
    assert prove(target, (t(5, 7, 3), 0.5, True)).axes == ()
    attention = call(aten.scaled_dot_product_attention.default, t(6, 5, 4), t(6, 7, 4), t(6, 7, 4), None, 0.1)
    assert not any(_rule(*attention[:1], *attention[1]).can_shard(axis) for axis in (".0", "s"))


@pytest.mark.parametrize(
    "target",
    [aten.reshape.default, aten.permute.default, aten.contiguous.default, aten.slice.Tensor, aten.unsqueeze.default],
)
def test_ops_that_only_rename_elements_are_views(target):
    more = {"reshape": [[35]], "permute": [[1, 0]], "slice": [0, 0, 5], "unsqueeze": [0]}
    assert _rule(target, t(5, 7), *more.get(target._schema.name.removeprefix("aten::"), [])).is_view


# --- the harness refuses rules that are wrong


def _written(text: str, made: Call, **more) -> tuple[Call, Any]:
    target, args, kwargs = made
    example = Example.of(target, args, kwargs)
    return made, from_notation(text, OpCall.of(target, args, kwargs, example.results), **more)


def _sdpa(*more) -> Call:
    return call(aten.scaled_dot_product_attention.default, t(2, 5, 4), t(2, 7, 4), t(2, 7, 4), *more)


_LINEAR = call(aten.linear.default, t(5, 6), t(7, 6), t(7))


def _bias_on_first_rank_only(emit, target, args, kwargs, here):
    return emit(target, *(args if here.starts.get("k", 0) == 0 else args[:2]))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (
            _written("a b -> a b", call(aten.softmax.int, t(5, 7), -1)),
            r"shard b \(size 7\) over 2 ranks.*result 0 differs",
        ),
        (_written("a b -> a", call(aten.mean.dim, t(5, 7), [1]), reduces="b"), "shard b .*result 0 differs"),
        (_written("... k, o k, o -> ... o", _LINEAR, reduces="k"), "shard k .*result 0 differs"),
        (
            _written("... k, o k, o -> ... o", _LINEAR, reduces="k", local=_bias_on_first_rank_only),
            "shard k .*operand 2 has a gradient, and none on rank 1",
        ),
        (_written("b s d, b t d, b t e -> b s e", _sdpa(None, 0.0, True), whole="tde"), "shard s .*result 0 differs"),
        (_written("b s d, b t d, b t e -> b s e", _sdpa(), whole="de", reduces="t"), "shard t .*result 0 differs"),
        (_written("a b -> a b", call(aten.cumsum.default, t(5, 7), 0)), "shard a .*result 0 differs"),
        (_written("a b -> a b", call(aten.flip.default, t(5, 7), [1])), "shard b .*result 0 differs"),
        (_written("(a b) -> (a b)", call(aten.flip.default, t(15), [0]), sizes={"a": 3}), "shard a .*differs"),
        (_written("a -> (a r)", call(aten.repeat.default, t(5), [3])), "shard a .*differs"),
        (_written("a b -> a b", call(aten.argsort.default, t(5, 7), 0)), r"result 0 differs in \d+ of 35 elements"),
        (_written("a b -> a b", call(aten.view.default, t(5, 7), [5, 7])), "the call on rank 0 fails"),
        (_written("a b -> a b", call(aten.zeros_like.default, t(5, 7)), is_view=True), "has others"),
        (_written("a -> a", call(aten.exp.default, t(7)), is_view=True), "has others"),
    ],
    ids=lambda value: str(value[0][0]) if isinstance(value, tuple) else "",
)
def test_a_wrong_rule_is_refused(wrong, problem):
    (target, args, kwargs), rule = wrong
    with pytest.raises(ProofError, match=problem) as refused:
        prove(target, args, kwargs, rule=rule)
    assert str(target) in str(refused.value) and str(rule) in str(refused.value)


class _Scaled(torch.autograd.Function):
    """The identity whose backward knows how many rows there are: only shards' gradients are wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.shape[0]


def test_a_rule_whose_gradients_are_wrong_is_refused():
    example = Example.of(_Scaled.apply, (t(5, 7),))
    rule = from_notation("a b -> a b", OpCall.of(_Scaled.apply, (t(5, 7),), {}, example.results))
    assert "gradient of operand 0" in difference(example, rule, "a", 2)
    assert difference(example, rule, "b", 2) is None
    with torch.no_grad():
        assert difference(Example.of(_Scaled.apply, (t(5, 7),)), rule, "a", 2) is None


def test_an_axis_must_be_parallel_in_its_minor_part_too():
    """A softmax in windows of 4 keeps whole windows on a rank where the axis is cut once, and none where it is
    `(outer minor)` and the minor part is cut."""

    def windows(x):
        return x.reshape(-1, 4, 7).softmax(1).reshape(x.shape)

    x = t(8, 7)
    rule = from_notation("a b -> a b", OpCall.of(windows, (x,), {}, [x]))
    assert difference(Example.of(windows, (x,)), rule, "a", 2) is None
    with pytest.raises(ProofError, match="cannot shard the minor part of a "):
        prove(windows, (x,), rule=rule, ranks=[2])


def test_a_proof_lists_axes_and_ranks():
    proof = prove(*_LINEAR[:2])
    assert proof.axes == ((".0", (2, 3)), ("k", (2, 3)), ("o", (2, 3)))
    assert str(proof).startswith("aten.linear.default  .0 k, o k, o -> .0 o; reduces: k  proven: .0 over 2, 3 ranks; k")
    assert prove(aten.neg.default, (t(2, 1),)).axes == ((".1", (2,)),)
