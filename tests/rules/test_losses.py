"""Losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    F32,
    F64,
    SIZE,
    Call,
    aten,
    broadcastable,
    call,
    cases,
    generated,
    index,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)

_ELEMENTWISE = [
    f"aten::{name}"
    for name in (
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "soft_margin_loss",
        "kl_div",
        "poisson_nll_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "hinge_embedding_loss",
        "margin_ranking_loss",
    )
]
_NO_BROADCAST = ("aten::binary_cross_entropy", "aten::binary_cross_entropy_with_logits", "aten::soft_margin_loss")
# Their derivatives divide by how many elements the operand has, where it should be by those of the result.
_COUNTS_ITS_OWN = ("aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss")
_NONE, _MEAN, _SUM = range(3)


def _elementwise(name: str, x: torch.Tensor, y: torch.Tensor, reduction: int) -> Call:
    """Targets that have no derivative are integers."""
    op = overload(name)
    if name in ("aten::binary_cross_entropy", "aten::binary_cross_entropy_with_logits"):
        y = y.sigmoid()
    if name == "aten::binary_cross_entropy":
        return call(op, x.sigmoid(), y, None, reduction)
    if name == "aten::binary_cross_entropy_with_logits":
        return call(op, x, y, None, None, reduction)
    if name == "aten::poisson_nll_loss":
        return call(op, x, y, True, False, 1e-8, reduction)
    if name == "aten::soft_margin_loss":
        return call(op, x, (4 * y).long().sign(), reduction)
    if name == "aten::margin_ranking_loss":
        return call(op, x, y, y.detach().sign(), 0.1, reduction)
    if name == "aten::hinge_embedding_loss":
        return call(op, x, y.sign(), 1.0, reduction)
    return call(op, x, y, reduction)


@cases(*_ELEMENTWISE)
def _(name):
    for reduction in (_NONE, _MEAN, _SUM):
        for shape in ((5, 7), (2, 3, 5), (7,), ()):
            yield _elementwise(name, t(*shape), t(*shape), reduction)
        if name not in _NO_BROADCAST and not (reduction == _MEAN and name in _COUNTS_ITS_OWN):
            yield _elementwise(name, t(5, 7), t(7), reduction)
            yield _elementwise(name, t(5, 1), t(1, 7), reduction)
        yield _elementwise(name, t(5, 7, dtype=F32), t(5, 7, dtype=F32), reduction)


@generated(*_ELEMENTWISE)
def _(draw, name):
    shape, reduction, dtype = shape_of(draw), one_of(draw, _NONE, _MEAN, _SUM), one_of(draw, F64, F64, F32)
    other = shape if name in _NO_BROADCAST else broadcastable(draw, shape)
    return _elementwise(name, t(*shape, dtype=dtype), t(*other, dtype=dtype), reduction)


@cases("aten::cosine_embedding_loss", "aten::triplet_margin_loss")
def _(name):
    for reduction in (_NONE, _MEAN, _SUM):
        for shape in ((5, 7), (7,)):
            yield _vectors(name, shape, reduction)


def _vectors(name, shape, reduction) -> Call:
    if name == "aten::cosine_embedding_loss":
        return call(overload(name), t(*shape), t(*shape), t(*shape[:-1], dtype=torch.int64).sign(), 0.1, reduction)
    return call(overload(name), t(*shape), t(*shape), t(*shape), 1.0, 2.0, 1e-6, False, reduction)


@generated("aten::cosine_embedding_loss", "aten::triplet_margin_loss")
def _(draw, name):
    shape = one_of(draw, shape_of(draw, 1, 2), shape_of(draw, 2, 2))
    return _vectors(name, shape, one_of(draw, _NONE, _MEAN, _SUM))


def _margin(name, lead, classes, reduction, weighted=False) -> Call:
    if name == "aten::multi_margin_loss":
        weight = torch.ones(classes, dtype=F64) if weighted else None
        return call(overload(name), t(*lead, classes), index(classes, *lead), 1, 1.0, weight, reduction)
    return call(overload(name), t(*lead, classes), index(classes, *lead, classes), reduction)


@cases("aten::multi_margin_loss", "aten::multilabel_margin_loss")
def _(name):
    for reduction in (_NONE, _MEAN, _SUM):
        for lead in ((5,), ()):
            yield _margin(name, lead, 4, reduction)


@generated("aten::multi_margin_loss", "aten::multilabel_margin_loss")
def _(draw, name):
    return _margin(name, one_of(draw, [draw(SIZE)], [draw(SIZE)], []), draw(SIZE), one_of(draw, _NONE, _MEAN, _SUM))


_CLASSES = ["aten::nll_loss", "aten::nll_loss2d", "aten::nll_loss_nd", "aten::cross_entropy_loss"]


def _targets(classes: int, shape: tuple[int, ...], ignored: int | None = None) -> torch.Tensor:
    found = index(classes, *shape)
    return found if ignored is None else torch.where(index(3, *shape) == 0, ignored, found)


@cases(*_CLASSES)
def _(name):
    shapes = {
        "aten::nll_loss": [((5,), ())],
        "aten::nll_loss2d": [((5,), (3, 7))],
        "aten::nll_loss_nd": [((5,), ()), ((5,), (3,)), ((5,), (3, 7)), ((), ())],
        "aten::cross_entropy_loss": [((5,), ()), ((5,), (3,)), ((2,), (5, 3, 4)), ((), ())],
    }[name]
    for (lead, space), reduction, ignored in [
        (s, r, i) for s in shapes for r in (_NONE, _MEAN, _SUM) for i in (None, -100)
    ]:
        yield call(overload(name), t(*lead, 4, *space), _targets(4, (*lead, *space), ignored), None, reduction)
    for reduction in (_NONE, _MEAN, _SUM):
        space = (3, 7) if name == "aten::nll_loss2d" else ()
        yield call(overload(name), t(5, 4, *space, dtype=F32), _targets(4, (5, *space), 2), None, reduction, 2)
        if name == "aten::cross_entropy_loss":
            yield call(overload(name), t(5, 4), t(5, 4).softmax(1), None, reduction)
            yield call(overload(name), t(5, 4, 3), t(5, 4, 3).softmax(1), None, reduction, -100, 0.1)
            yield call(overload(name), t(5, 4, 3), _targets(4, (5, 3), -100), None, reduction, -100, 0.1)
            yield call(overload(name), t(4), t(4).softmax(0), None, reduction)


@generated(*_CLASSES)
def _(draw, name):
    classes, lead = draw(st.integers(1, 5)), [draw(SIZE)]
    space = {"aten::nll_loss": [], "aten::nll_loss2d": shape_of(draw, 2, 2)}.get(name, shape_of(draw, 0, 3))
    reduction, dtype = one_of(draw, _NONE, _MEAN, _SUM), one_of(draw, F64, F64, F32, BF16)
    scores = t(*lead, classes, *space, dtype=dtype)
    ignored = one_of(draw, -100, 0, -1)
    targets = _targets(classes, (*lead, *space), ignored)
    if name != "aten::cross_entropy_loss":
        return call(overload(name), scores, targets, None, reduction, ignored)
    if draw(st.booleans()):
        return call(overload(name), scores, t(*scores.shape, dtype=dtype).softmax(1), None, reduction)
    return call(overload(name), scores, targets, None, reduction, ignored, one_of(draw, 0.0, 0.1))


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.mse_loss.default, t(5, 7), t(7), _SUM), "d0 d1, d1 -> (); reduces: d0 d1"),
        (
            call(aten.cross_entropy_loss.default, t(5, 4), index(4, 5), None, _SUM),
            "s0 c, s0 -> (); whole: c; reduces: s0",
        ),
        (
            call(aten.cross_entropy_loss.default, t(5, 4), index(4, 5)),
            "s0 c, s0 -> (); whole: c; reduces: s0; combines: s0",
        ),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


def test_an_average_that_class_weights_divide_needs_all_targets():
    with torch.no_grad():
        rule = rule_of(call(aten.cross_entropy_loss.default, t(5, 4), index(4, 5), t(4, positive=True)))
    assert not rule.cuts()


@pytest.mark.parametrize("name", _COUNTS_ITS_OWN)
def test_an_average_with_broadcast_operands_whose_derivative_is_not_its_own_has_no_rule(name):
    assert rule_of(_elementwise(name, t(5, 7), t(7), _MEAN)) is None
    assert rule_of(_elementwise(name, t(5, 7), t(7), _SUM)) is not None
