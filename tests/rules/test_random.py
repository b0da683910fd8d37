"""Ops that draw random numbers, each rank the part of what one device would draw."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from dsp_auto.passes.notation import OpCall
from dsp_auto.passes.rules import find_rule
from tests.rules.calls import FLOATS, call, cases, generated, one_of, overload, shape_of, shards_nothing, t

aten = torch.ops.aten
# Operands are buffers: what is drawn has no gradient, or one of zeros.
_LIKE = {
    "aten::rand_like": (),
    "aten::randn_like": (),
    "aten::randint_like": (9,),
    "aten::bernoulli.p": (0.3,),
    "aten::uniform": (-1.0, 2.0),
    "aten::exponential": (0.5,),
    "aten::normal_functional": (1.0, 2.0),
    "aten::log_normal": (0.0, 0.5),
    "aten::geometric": (0.4,),
    "aten::cauchy": (0.0, 1.0),
    "aten::random": (),
}
_SIZED = {
    "aten::rand": (),
    "aten::randn": (),
    "aten::randint": (7,),
    "aten::normal.float_float": (1.0, 2.0),
}
_FROM = ("aten::bernoulli", "aten::bernoulli.Tensor", "aten::poisson")
_AROUND = ("aten::normal.Tensor_float", "aten::normal.float_Tensor", "aten::normal.Tensor_Tensor")

shards_nothing(
    *(*_FROM, *_AROUND, "aten::multinomial", "aten::randperm"),
    because="what one device draws depends on the whole operand, so with one device's numbers every rank draws all of it",
)


@cases("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout")
def _(name):
    for p, train in ((0.5, False), (0.0, True), (0.0, False), (0.5, True)):
        yield call(overload(name), t(5, 7, 3), p, train)


@generated("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout")
def _(draw, name):
    x = t(*shape_of(draw, 2), dtype=one_of(draw, *FLOATS))
    return call(overload(name), x, *one_of(draw, (0.5, False), (0.0, True), (0.3, True)))


@cases(*_LIKE)
def _(name):
    for shape in ((5, 7, 3), (), (1, 6)):
        yield call(overload(name), nn.Buffer(t(*shape)), *_LIKE[name])


@generated(*_LIKE)
def _(draw, name):
    return call(overload(name), nn.Buffer(t(*shape_of(draw), dtype=one_of(draw, *FLOATS))), *_LIKE[name])


@cases(*_SIZED)
def _(name):
    for shape in ([5, 7, 3], [], [1, 6]):
        yield call(overload(name), *_SIZED[name], shape)


@generated(*_SIZED)
def _(draw, name):
    dtype = {"dtype": one_of(draw, *FLOATS)} if draw(st.booleans()) else {}
    return call(overload(name), *_SIZED[name], shape_of(draw), **dtype)


def _from(name, x):
    chances = nn.Buffer(x.sigmoid())
    return call(overload(name), chances, *([chances] if name.endswith(".Tensor") else []))


@cases(*_FROM)
def _(name):
    yield _from(name, t(5, 7))


@generated(*_FROM)
def _(draw, name):
    return _from(name, t(*shape_of(draw)))


def _around(name, x):
    return {
        "Tensor_float": call(overload(name), nn.Buffer(x), 2.0),
        "float_Tensor": call(overload(name), 1.0, nn.Buffer(x.abs())),
        "Tensor_Tensor": call(overload(name), nn.Buffer(x), nn.Buffer(x.abs())),
    }[name.partition(".")[2]]


@cases(*_AROUND)
def _(name):
    yield _around(name, t(5, 7))


@generated(*_AROUND)
def _(draw, name):
    return _around(name, t(*shape_of(draw)))


@cases("aten::rrelu")
def _():
    yield call(aten.rrelu.default, t(5, 7), 0.1, 0.3, False)
    yield call(aten.rrelu.default, t(5, 7), 0.1, 0.3, True)


@generated("aten::rrelu")
def _(draw):
    return call(aten.rrelu.default, t(*shape_of(draw)), 0.1, 0.3, draw(st.booleans()))


@cases("aten::multinomial", "aten::randperm")
def _(name):
    if name == "aten::randperm":
        yield call(aten.randperm.default, 7)
    else:
        yield call(aten.multinomial.default, nn.Buffer(t(5, 7).abs()), 3)


@generated("aten::multinomial", "aten::randperm")
def _(draw, name):
    size = draw(st.integers(1, 7))
    if name == "aten::randperm":
        return call(aten.randperm.default, size)
    return call(aten.multinomial.default, nn.Buffer(t(draw(st.integers(1, 5)), size).abs() + 0.1), draw(st.integers(1, size)))


def test_channels_are_dropped_whole_so_space_is_not_shared_out():
    x = t(2, 3, 4, 5)
    rule = find_rule(OpCall.of(aten.feature_dropout.default, (x, 0.5, True), {}, [x]))
    assert rule.cuts() == [("d0",), ("d1",)] and rule.is_random
