"""Pointwise ops: casts, masks and dropout too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from dsp_auto.passes.prove import Example
from tests.rules.calls import (
    BF16,
    BOOL,
    DTYPES,
    F32,
    F64,
    I64,
    Call,
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
    trainable,
)

_BROADCASTS = [((5, 7), (5, 7)), ((5, 7), (7,)), ((5, 1), (1, 7)), ((2, 5, 7), (5, 1)), ((7,), ()), ((3, 1, 5), (2, 1))]


def _filled(op: Any, tensors: Iterator[torch.Tensor], value: Callable[[str], Any]) -> Call:
    """A call of `op`: its tensors in order, `value` of the type's name for what it needs or may have besides."""
    args, kwargs = [], {}
    for argument in op._schema.arguments:
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        given = next(tensors) if kind == "Tensor" else value(kind)
        if given is None and not isinstance(argument.type, torch.OptionalType):
            given = argument.default_value
        if argument.kwarg_only:
            kwargs[argument.name] = given
        else:
            args.append(given)
    return call(op, *args, **kwargs)


def _plain(op: Any, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> Call:
    values = {"number": 2, "int": 2, "float": 0.5, "bool": False, "str": "floor" if "div" in str(op) else "none"}
    return _filled(op, (t(*shape, dtype=dtype, positive=True) for shape in itertools.cycle(shapes)), values.get)


def _runs(made: Call) -> bool:
    try:
        Example.of(*made)
    except (RuntimeError, ArithmeticError):
        return False
    return True


@functools.cache
def _tagged() -> dict[Any, list[torch.dtype]]:
    """The ops that PyTorch tags pointwise and that give tensors, each with dtypes of which it gives results and gradients."""
    found = {}
    # In one order, whatever was registered meanwhile.
    for schema in sorted(torch._C._jit_get_all_schemas(), key=str):
        gives_tensors = any(isinstance(result.type, torch.TensorType) for result in schema.returns)
        if schema.name.startswith("aten::") and gives_tensors and not schema.is_mutable:
            op = overload(f"{schema.name}.{schema.overload_name}")
            if torch.Tag.pointwise in op.tags:
                found[op] = [dtype for dtype in DTYPES if _runs(_plain(op, dtype, [(2, 3), (3,)]))]
    return {op: dtypes for op, dtypes in found.items() if dtypes}


@cases("pointwise")
def _():
    for left, right in _BROADCASTS:
        yield call(aten.mul.Tensor, t(*left), t(*right))
    yield call(aten.addcmul.default, t(7), t(5, 1), t(5, 7), value=0.5)
    yield call(aten.lerp.Tensor, t(5, 7), t(7), t(5, 1))
    yield call(aten.mul.Tensor, t(5, 7, dtype=I64), t(7))
    for number, (op, dtypes) in enumerate(_tagged().items()):
        for dtype in dict.fromkeys([dtypes[0], dtypes[-1]]):
            yield trainable(_plain(op, dtype, _BROADCASTS[number % len(_BROADCASTS)]))


@generated("pointwise")
def _(draw):
    """Operands of several dtypes, arguments left out or drawn; what the op refuses, with the plainest of them."""
    op, dtypes = draw(st.sampled_from(list(_tagged().items())))
    shape = shape_of(draw)
    operands = [broadcastable(draw, shape) for _ in range(3)]
    values = {"number": [None, 2, 0.5, 1, -1], "int": [None, 1, 2, 3], "float": [None, 0.5, 2.0], "bool": [None, True]}
    values["str"] = [None, "floor", "trunc"] if "div" in str(op) else [None, "none", "tanh"]
    tensors = (t(*own, dtype=one_of(draw, dtypes[0], *dtypes), positive=draw(st.booleans())) for own in operands)
    made = _filled(op, tensors, lambda kind: one_of(draw, *values.get(kind, [None])))
    return made if _runs(made) else trainable(_plain(op, dtypes[0], operands))


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


@cases("aten::floor_divide", "aten::__and__", "aten::__or__", "aten::__xor__")
def _(name):
    own = overload(name, "default" if name == "aten::floor_divide" else "Tensor")
    for left, right in _BROADCASTS:
        yield call(own, t(*left, dtype=I64), t(*right, dtype=I64).abs() + 1)


@generated("aten::where")
def _(draw):
    shape, dtype = shape_of(draw), one_of(draw, *DTYPES)
    mask, a, b = (broadcastable(draw, shape) for _ in range(3))
    mask, a, b = t(*mask, dtype=BOOL), t(*a, dtype=dtype), t(*b, dtype=one_of(draw, dtype, F64))
    return one_of(
        draw,
        call(aten.where.self, mask, a, b),
        call(aten.where.ScalarOther, mask, a, 1),
        call(aten.where.ScalarSelf, mask, 1, b),
        call(aten.where.Scalar, mask, 1.0, 0.0),
    )


@generated("aten::masked_fill")
def _(draw):
    shape, dtype = shape_of(draw), one_of(draw, *DTYPES)
    x, mask = t(*broadcastable(draw, shape), dtype=dtype), t(*broadcastable(draw, shape), dtype=BOOL)
    return one_of(
        draw, call(aten.masked_fill.Scalar, x, mask, 1), call(aten.masked_fill.Tensor, x, mask, t(dtype=dtype))
    )


@generated("aten::clone", "aten::detach", "aten::alias", "aten::contiguous", "aten::lift_fresh_copy")
def _(draw, name):
    return call(overload(name), t(*shape_of(draw), dtype=one_of(draw, *DTYPES)))


@generated("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
def _(draw, name):
    value = [1] if name == "aten::full_like" else []
    options = one_of(draw, {}, {"dtype": one_of(draw, *DTYPES)})
    return call(overload(name), t(*shape_of(draw), dtype=one_of(draw, *DTYPES)), *value, **options)


@generated("aten::type_as", "aten::to", "aten::_to_copy")
def _(draw, name):
    shape, dtype = shape_of(draw), one_of(draw, *DTYPES)
    x = t(*shape, dtype=one_of(draw, *DTYPES))
    # Of the other tensor only the dtype is read: it may have any shape.
    other = t(*one_of(draw, shape, broadcastable(draw, shape), shape_of(draw)), dtype=dtype)
    if name == "aten::type_as":
        return call(aten.type_as.default, x, other)
    if name == "aten::_to_copy":
        return call(aten._to_copy.default, x, **one_of(draw, {"dtype": dtype}, {}))
    return one_of(
        draw,
        call(aten.to.dtype, x, dtype, *one_of(draw, [], [False, True])),
        call(aten.to.dtype_layout, x, dtype=dtype),
        call(aten.to.device, x, torch.device("cpu"), dtype),
        call(aten.to.other, x, other),
    )


@generated("aten::floor_divide", "aten::__and__", "aten::__or__", "aten::__xor__")
def _(draw, name):
    shape, divide = shape_of(draw), name == "aten::floor_divide"
    dtype = I64 if divide else one_of(draw, I64, BOOL)
    left, right = t(*broadcastable(draw, shape), dtype=dtype), t(*broadcastable(draw, shape), dtype=dtype)
    if one_of(draw, "tensor", "scalar") == "scalar":
        return call(overload(name, "Scalar"), left, one_of(draw, 1, 3))
    return call(overload(name, "default" if divide else "Tensor"), left, right.abs() + 1 if divide else right)


def _complex(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.complex(t(*shape, dtype=dtype), t(*shape, dtype=dtype))


_OF_COMPLEX = [f"aten::{name}" for name in ("real", "imag", "_conj", "conj", "resolve_conj", "resolve_neg")]
_OF_ONE = [f"aten::{name}" for name in ("alias_copy", "isreal", "hardswish", "log_sigmoid", "special_expit", "zero")]
_OF_TWO = ["aten::complex", "aten::polar", "aten::isclose", "aten::rsub", "aten::fill", "aten::isin.Tensor_Scalar"]


@cases(*_OF_COMPLEX)
def _(name):
    for shape in ((5, 7), (3, 1, 5), ()):
        yield call(overload(name), _complex(*shape))


@generated(*_OF_COMPLEX)
def _(draw, name):
    return call(overload(name), _complex(*shape_of(draw), dtype=one_of(draw, F64, F32)))


@cases(*_OF_ONE)
def _(name):
    for shape in ((5, 7), (3, 1, 5), ()):
        yield call(overload(name), t(*shape))
    yield call(overload(name), t(5, 7, dtype=BF16))


@generated(*_OF_ONE)
def _(draw, name):
    return call(overload(name), t(*shape_of(draw), dtype=one_of(draw, F64, F32, BF16)))


@cases(*_OF_TWO)
def _(name):
    for left, right in _BROADCASTS:
        yield from _of_two(name, left, right)


def _of_two(name: str, left: Sequence[int], right: Sequence[int]) -> Iterator[Call]:
    if name == "aten::fill":
        yield call(aten.fill.Tensor, t(*left), t())
        yield call(aten.fill.Scalar, t(*left), 2.0)
    elif name == "aten::isin.Tensor_Scalar":
        yield call(aten.isin.Tensor_Scalar, t(*left, dtype=I64), 1)
    elif name == "aten::rsub":
        yield call(aten.rsub.Tensor, t(*left), t(*right), alpha=2)
        yield call(aten.rsub.Scalar, t(*left), 2.0)
    else:
        yield call(overload(name), t(*left), t(*right))


@generated(*_OF_TWO)
def _(draw, name):
    shape = shape_of(draw)
    return one_of(draw, *_of_two(name, shape, broadcastable(draw, shape)))


@cases("aten::prelu")
def _():
    for shape, slopes in (
        ((5, 6, 7), (6,)),
        ((5, 6), (1,)),
        ((5,), (1,)),
        ((), (1,)),
        ((5, 6), ()),
        ((2, 3, 4, 5), (3,)),
    ):
        yield call(aten.prelu.default, t(*shape), t(*slopes))


@generated("aten::prelu")
def _(draw):
    shape = shape_of(draw)
    slopes = one_of(draw, [1], shape[1:2] or [1])
    return call(aten.prelu.default, t(*shape), t(*slopes))


@cases("aten::glu")
def _():
    for dim in (0, 1, -1):
        yield call(aten.glu.default, t(6, 4, 10), dim)
    yield call(aten.glu.default, t(5, 14, dtype=BF16))


@generated("aten::glu")
def _(draw):
    shape = shape_of(draw, 1)
    dim = one_of(draw, *range(-len(shape), len(shape)))
    shape[dim] *= 2
    return call(aten.glu.default, t(*shape, dtype=one_of(draw, F64, F32)), dim)


@pytest.mark.parametrize(
    "made",
    [
        call(aten.where.default, t(5, 7)),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
