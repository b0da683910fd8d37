"""The proof of a rule refuses what is wrong, and says which axis it cut and what then differed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsp_auto.errors import ProofError
from dsp_auto.passes.notation import OpCall, from_notation
from dsp_auto.passes.prove import Cut, Example, difference, prove
from tests.rules.calls import Call, aten, call, t


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
    assert "gradient of operand 0" in difference(example, rule, Cut(2, {"a": (1, 5, 1)}))
    assert difference(example, rule, Cut(2, {"b": (1, 7, 1)})) is None
    with torch.no_grad():
        assert difference(Example.of(_Scaled.apply, (t(5, 7),)), rule, Cut(2, {"a": (1, 5, 1)})) is None


def test_an_axis_must_be_parallel_in_its_minor_part_too():
    """A softmax in windows of 4 keeps whole windows on a rank where the axis is cut once, and none where it is
    `(outer minor)` and the minor part is cut."""

    def windows(x):
        return x.reshape(-1, 4, 7).softmax(1).reshape(x.shape)

    x = t(8, 7)
    rule = from_notation("a b -> a b", OpCall.of(windows, (x,), {}, [x]))
    assert difference(Example.of(windows, (x,)), rule, Cut(2, {"a": (1, 8, 1)})) is None
    with pytest.raises(ProofError, match="cannot shard the minor part of a "):
        prove(windows, (x,), rule=rule, ranks=[2])


def test_a_proof_lists_axes_and_ranks():
    proof = prove(*_LINEAR[:2])
    assert proof.axes == ((".0", (2, 3)), ("k", (2, 3)), ("o", (2, 3)))
    assert str(proof).startswith("aten.linear.default  .0 k, o k, o -> .0 o; reduces: k  proven: .0 over 2, 3 ranks; k")
    assert prove(aten.neg.default, (t(2, 1),)).axes == ((".1", (2,)),)


def test_a_call_without_a_rule_is_refused():
    with pytest.raises(ProofError, match=r"aten.nonzero.default has no rule for \[\(5, 7\)\]"):
        prove(aten.nonzero.default, (t(5, 7),))
