"""Ops that draw random numbers. Shards draw numbers of their own; with `rng="serial"` each rank draws what one device
would and keeps its part, and what cannot be drawn so stays whole."""

from __future__ import annotations

from typing import Any

import torch

from ..notation import Local, OpCall, Operand, OpRule, from_notation, value_of
from . import numbered, rule
from .creation import local_size

aten = torch.ops.aten


def _order(operand: Operand) -> list[int]:
    """The dims of an operand in the order in which its elements lie in memory, which is the order of what is drawn."""
    if operand.stride is None:
        return list(range(len(operand.shape)))
    like = torch.empty_like(torch.empty_strided(operand.shape, operand.stride, device="meta"))
    strides = like.stride()  # those of what is drawn, where the operand's own are broadcast or have gaps
    return sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))


def _ordered(emit, operand: Operand, make):
    """What `make` gives with its dims in the order of the operand's elements, the dims put back in their places."""
    order = _order(operand)
    made = make(order)
    return made if order == sorted(order) else emit(aten.permute.default, made, sorted(order, key=order.__getitem__))


def _new(emit, target, x, operand: Operand):
    """A new tensor by `target` (new_ones, new_empty): the operand's shape and order of elements, the device of `x`."""
    return _ordered(emit, operand, lambda order: emit(target, x, [operand.shape[dim] for dim in order]))


def _laid_out(emit, x, operand: Operand):
    """A copy of `x` that lies in memory as the operand does on one device."""

    def make(order: list[int]):
        there = x if order == sorted(order) else emit(aten.permute.default, x, order)
        return emit(aten.clone.default, there, memory_format=torch.contiguous_format)

    return _ordered(emit, operand, make)


def _drawn_whole(text: str, call: OpCall, is_random: bool = True, **axes: Any) -> OpRule:
    """A rule whose serial form is the whole call, on operands that lie in memory as one device's do."""

    def serial(emit, target, args, kwargs, here: Local):
        operands = iter(call.operands)
        own = [
            _laid_out(emit, x, next(operands)) if isinstance(given, Operand) else x for x, given in zip(args, call.args)
        ]
        return emit(target, *own, **kwargs)

    return from_notation(text, call, is_random=is_random, serial=serial, serial_is_whole=True, **axes)


@rule("aten::dropout", "aten::alpha_dropout")
def dropout(call: OpCall) -> OpRule:
    """The identity in eval and at p = 0."""
    if not call["train"] or call["p"] == 0:
        return from_notation("... -> ...", call, is_view=True)
    if call.target._schema.name == "aten::alpha_dropout":
        return _drawn_whole("... -> ...", call)

    def serial(emit, target, args, kwargs, here: Local):
        """A dropout of ones is what dropout multiplies with."""
        ones = _new(emit, aten.new_ones.default, args[0], call.operands[0])
        return emit(
            aten.mul.Tensor, args[0], here.part(emit, emit(target, ones, *args[1:], **kwargs), rule_.outputs[0])
        )

    rule_ = from_notation("... -> ...", call, is_random=True, serial=serial)
    return rule_


@rule("aten::feature_dropout", "aten::feature_alpha_dropout")
def feature_dropout(call: OpCall) -> OpRule:
    """Drops whole channels: one number for each, whatever the space."""
    if not call["train"] or call["p"] == 0:
        return from_notation("... -> ...", call, is_view=True)
    names = numbered(len(call.operands[0].shape))
    text = f"{' '.join(names)} -> {' '.join(names)}"
    return _drawn_whole(text, call, moved=names[2:])


@rule(
    "aten::rand_like",
    "aten::randn_like",
    "aten::randint_like",
    "aten::bernoulli.p",
    "aten::uniform",
    "aten::exponential",
    "aten::normal_functional",
    "aten::log_normal",
    "aten::geometric",
    "aten::cauchy",
    "aten::random",
)
def drawn_like(call: OpCall) -> OpRule:
    """Numbers for every element of a tensor whose values are not read."""

    def serial(emit, target, args, kwargs, here: Local):
        like = _new(emit, aten.new_empty.default, args[0], call.operands[0])
        drawn = here.part(emit, emit(target, like, *args[1:], **kwargs), rule_.outputs[0])
        if not has_gradient:
            return drawn
        always = emit(aten.full.default, [], True, dtype=torch.bool, device=value_of(args[0]).device)
        return emit(aten.where.self, always, drawn, args[0])

    # Written in place (`x.uniform_()`), they give their operand a gradient of zeros.
    has_gradient = not call.target._schema.name.endswith("_like") and call.operands[0].dtype.is_floating_point
    has_gradient = has_gradient and call.target is not aten.bernoulli.p
    rule_ = from_notation("... -> ...", call, is_random=True, serial=serial)
    return rule_


@rule("aten::bernoulli", "aten::bernoulli.Tensor", "aten::poisson", "aten::rrelu")
def drawn_from(call: OpCall) -> OpRule:
    """Numbers that depend on the operands, element by element."""
    draws = call.target._schema.name != "aten::rrelu" or call["training"]
    text = f"{', '.join(['...'] * len(call.operands))} -> ..."
    return _drawn_whole(text, call, is_random=draws)


@rule("aten::rand", "aten::randn", "aten::randint", "aten::normal.float_float")
def drawn(call: OpCall) -> OpRule:
    """Numbers of a given size."""
    size = next(n for n, argument in enumerate(call.target._schema.arguments) if argument.name == "size")

    def serial(emit, target, args, kwargs, here: Local):
        return here.part(emit, emit(target, *args, **kwargs), rule_.outputs[0])

    def local(emit, target, args, kwargs, here: Local):
        return local_size(emit, target, args, kwargs, here, size)

    text = f"-> {' '.join(numbered(len(call.outputs[0])))}"
    rule_ = from_notation(text, call, is_random=True, local=local, serial=serial)
    return rule_


@rule("aten::normal.Tensor_float", "aten::normal.float_Tensor", "aten::normal.Tensor_Tensor")
def drawn_around(call: OpCall) -> OpRule:
    text = f"{', '.join(['...'] * len(call.operands))} -> ..."
    return _drawn_whole(text, call)


@rule("aten::multinomial")
def multinomial(call: OpCall) -> OpRule:
    """Rows are drawn from by themselves."""
    rows = "b " if len(call.operands[0].shape) > 1 else ""
    text = f"{rows}c -> {rows}n"
    return _drawn_whole(text, call, whole="cn")


@rule("aten::randperm")
def permutation(call: OpCall) -> OpRule:
    return from_notation("-> n", call, moved="n", is_random=True)
