"""Ops that draw random numbers. Shards draw numbers of their own; with `rng="serial"` each rank draws what one device
would and keeps its part, and what cannot be drawn so stays whole."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, from_notation
from . import numbered, rule
from .views import local_size

aten = torch.ops.aten


@rule("aten::dropout", "aten::alpha_dropout")
def dropout(call: OpCall) -> OpRule:
    """The identity in eval and at p = 0."""
    if not call["train"] or call["p"] == 0:
        return from_notation("... -> ...", call, is_view=True)

    def serial(emit, target, args, kwargs, here: Local):
        """A dropout of ones is what dropout multiplies with."""
        value = call.operands[0]
        ones = emit(aten.new_ones.default, args[0], list(value.shape))
        return emit(aten.mul.Tensor, args[0], here.part(emit, emit(target, ones, *args[1:], **kwargs), rule_.outputs[0]))

    multiplies = call.target._schema.name == "aten::dropout"
    rule_ = from_notation("... -> ...", call, is_random=True, serial=serial if multiplies else None)
    return rule_


@rule("aten::feature_dropout", "aten::feature_alpha_dropout")
def feature_dropout(call: OpCall) -> OpRule:
    """Drops whole channels: one number for each, whatever the space."""
    if not call["train"] or call["p"] == 0:
        return from_notation("... -> ...", call, is_view=True)
    names = numbered(len(call.operands[0].shape))
    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, moved=names[2:], is_random=True)


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
        like = emit(aten.new_empty.default, args[0], list(call.operands[0].shape))
        return here.part(emit, emit(target, like, *args[1:], **kwargs), rule_.outputs[0])

    rule_ = from_notation("... -> ...", call, is_random=True, serial=serial)
    return rule_


@rule("aten::bernoulli", "aten::bernoulli.Tensor", "aten::poisson", "aten::rrelu")
def drawn_from(call: OpCall) -> OpRule:
    """Numbers that depend on the operands, element by element."""
    draws = call.target._schema.name != "aten::rrelu" or call["training"]
    return from_notation(f"{', '.join(['...'] * len(call.operands))} -> ...", call, is_random=draws)


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
    return from_notation(f"{', '.join(['...'] * len(call.operands))} -> ...", call, is_random=True)


@rule("aten::multinomial")
def multinomial(call: OpCall) -> OpRule:
    """Rows are drawn from by themselves."""
    rows = "b " if len(call.operands[0].shape) > 1 else ""
    return from_notation(f"{rows}c -> {rows}n", call, whole="cn", is_random=True)


@rule("aten::randperm")
def permutation(call: OpCall) -> OpRule:
    return from_notation("-> n", call, moved="n", is_random=True)
