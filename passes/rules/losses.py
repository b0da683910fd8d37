"""Losses: one number of every sample, which `reduction` leaves alone (0), averages (1) or sums (2).

Ranks sum their parts of a sum. A shard's average weighs as much as the shard is of the whole; where the op divides by how
many targets are not ignored, ranks count them together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..notation import Local, OpCall, OpRule, Statistic, from_notation
from . import numbered, rule
from .reductions import part_of_mean

aten = torch.ops.aten
_NONE, _MEAN, _SUM = range(3)
# The derivative of their average divides by how many elements the operand has, and is wrong where it is broadcast.
_COUNTS_ITS_OWN = ("aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss")


def _loss(call: OpCall, operands: list[str], each: list[str], whole: Iterable[str] = ()) -> OpRule:
    """operands: the notation of each operand; each: the axes of the losses before they are reduced."""
    reduction = call["reduction"]

    def local(emit, target, args, kwargs, here: Local):
        return part_of_mean(emit, emit(target, *args, **kwargs), here, rule_.reduces)

    rule_ = from_notation(
        f"{', '.join(operands)} -> {' '.join(each) if reduction == _NONE else ''}",
        call,
        reduces=[] if reduction == _NONE else each,
        local=local if reduction == _MEAN else None,
        whole=whole,
    )
    return rule_


@rule(
    "aten::mse_loss",
    "aten::l1_loss",
    "aten::smooth_l1_loss",
    "aten::huber_loss",
    "aten::soft_margin_loss",
    "aten::kl_div",
    "aten::poisson_nll_loss",
    "aten::binary_cross_entropy",
    "aten::binary_cross_entropy_with_logits",
    "aten::hinge_embedding_loss",
    "aten::margin_ranking_loss",
)
def elementwise_loss(call: OpCall) -> OpRule | None:
    """A loss of every element; operands broadcast."""
    if call["reduction"] == _MEAN and call.target._schema.name in _COUNTS_ITS_OWN:
        if len({operand.shape for operand in call.operands}) > 1:
            return None
    ranks = [len(operand.shape) for operand in call.operands]
    names = numbered(max(ranks))
    return _loss(call, [" ".join(names[len(names) - rank :]) for rank in ranks], names)


@rule("aten::cosine_embedding_loss", "aten::triplet_margin_loss")
def vector_loss(call: OpCall) -> OpRule | None:
    """A loss of every pair or triple of vectors, which stand in the last dim."""
    if any(operand.shape != call.operands[0].shape for operand in call.operands[:2]):
        return None  # a sample against many
    names = numbered(len(call.operands[0].shape))
    groups = [" ".join(names if len(operand.shape) == len(names) else names[:-1]) for operand in call.operands]
    return _loss(call, groups, names[:-1], whole=names[-1:])


@rule("aten::multi_margin_loss", "aten::multilabel_margin_loss")
def margin_loss(call: OpCall) -> OpRule | None:
    """`b c` and what is known of each sample: its class, or a list of classes."""
    if len(call.operands[0].shape) < 2 and call.outputs[0]:
        return None  # of one sample without a batch the loss is a list of one
    b = "b" if len(call.operands[0].shape) == 2 else ""
    target = f"{b} c" if call.target._schema.name == "aten::multilabel_margin_loss" else b
    return _loss(call, [f"{b} c", target, "c"], [b] if b else [], whole="c")


@rule("aten::nll_loss", "aten::nll_loss2d", "aten::nll_loss_nd", "aten::cross_entropy_loss")
def classification_loss(call: OpCall) -> OpRule:
    """`b c ...` against a class of each sample and place, `b ...`, or probabilities, `b c ...`.

    Of classes, the average divides by how many are not ignored; or by the sum of their weights, which stays whole.
    """
    shape, target = call.operands[0].shape, call.operands[1].shape
    names = numbered(len(shape), "s")
    names[0 if len(shape) == 1 else 1] = "c"
    samples = [name for name in names if name != "c"]
    probabilities = target == shape and call.target._schema.name == "aten::cross_entropy_loss"
    groups = [" ".join(names), " ".join(names if probabilities else samples), "c"]
    if call["reduction"] != _MEAN or probabilities:
        return _loss(call, groups, samples, whole="c")
    text = f"{', '.join(groups)} ->"
    if call["weight"] is not None:
        return from_notation(text, call, whole="c", moved=samples)

    def local(emit, target, args, kwargs, here: Local):
        if not here.shares(samples):
            return emit(target, *args, **kwargs)
        scores, classes = args[:2]
        counted = emit(aten.sum.default, emit(aten.ne.Scalar, classes, call["ignore_index"]))
        total = emit(target, scores, classes, None, _SUM, *args[4:])
        return emit(aten.div.Tensor, total, here.combined(emit, counted, samples))

    combines = dict.fromkeys(samples, (Statistic((), torch.int64),))
    return from_notation(text, call, whole="c", reduces=samples, combines=combines, local=local)
