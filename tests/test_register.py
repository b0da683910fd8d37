"""Promises of `register_rule`: one line is enough, what is wrong with it is said at once, and plans use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dsp_auto
from dsp_auto import ProofError, RuleError, register_rule
from dsp_auto.passes.prove import Example
from dsp_auto.passes.rules import registered_by_user

aten = torch.ops.aten


def _attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)]
    return ((split[0] @ split[1].mT).softmax(-1) @ split[1]).transpose(1, 2).flatten(2)


def _both(x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (x * 2 if w is None else x * w), x.sum(-1)


def _mixed(tensors: list[Tensor]) -> Tensor:
    return sum(tensors)


attention, both, mixed = (
    torch.library.custom_op(f"registering::{name.__name__[1:]}", name, mutates_args=())
    for name in (_attention, _both, _mixed)
)
for _op, _function in ((attention, _attention), (both, _both), (mixed, _mixed)):
    _op.register_fake(_function)
RULE = "b s d, b t d -> b s d"


@pytest.fixture(autouse=True)
def no_rules_left(monkeypatch):
    monkeypatch.setenv("DSP_AUTO_CACHE", "off")
    before = dict(registered_by_user())
    yield
    registered_by_user().clear()
    registered_by_user().update(before)


def rule_of(target, *args):
    with torch.no_grad():
        return str(Example.of(target, args).find_rule())


def qk():
    return torch.randn(2, 5, 6), torch.randn(2, 7, 6)


@pytest.mark.parametrize(
    "op",
    ["registering::attention", "registering::attention.default", attention, torch.ops.registering.attention]
    + [torch.ops.registering.attention.default],
    ids=str,
)
def test_one_line_declares_a_rule_however_the_op_is_named(op):
    register_rule(op, RULE, whole="t d")
    assert rule_of(torch.ops.registering.attention.default, *qk(), 2) == RULE + "; whole: d t"


def test_kinds_may_stand_in_the_text_as_rules_print_them():
    register_rule(both, "... k, ... k -> ... k, ...; reduces: k")
    shown = rule_of(torch.ops.registering.both.default, torch.randn(2, 5, 6))
    assert shown == ".1 .0 k -> .1 .0 k, .1 .0; reduces: k"


def test_an_axis_of_operands_only_is_whole_where_nothing_is_said():
    register_rule(attention, RULE, whole=["d"])
    assert rule_of(torch.ops.registering.attention.default, *qk(), 2).endswith("; whole: d t")


def test_an_argument_that_is_the_size_of_an_axis_becomes_the_ranks_own():
    """The heads of a merged dim are shared out, and each rank's call gets as many as it has."""
    text = "b s (h d), b t (h d) -> b s (h d)"
    with torch.no_grad():
        register_rule(attention, text, whole="t d", sizes={"h": "heads"}, example=((*qk(), 3), {}))
        register_rule(attention, text, whole="t d", sizes={"h": "heads"}, example=(qk(), {"heads": 2}))
        with pytest.raises(ProofError, match="shard h"):
            register_rule(attention, text, whole="t d", sizes={"h": 3}, example=(*qk(), 3), replace=True)


def test_an_example_proves_the_rule_or_it_is_not_registered():
    with torch.no_grad():
        with pytest.raises(ProofError, match="shard t "):
            register_rule(attention, "b s d, b t d -> b s d; whole: d; reduces: t", example=(*qk(), 2))
        assert not registered_by_user()
        register_rule(attention, RULE, whole="t d", example=(*qk(), 2))
    with pytest.raises(ProofError, match=r"register_autograd.*torch.no_grad"):
        register_rule(attention, RULE, whole="t d", example=(*qk(), 2), replace=True)


@pytest.mark.parametrize(
    ("op", "text", "kinds", "says"),
    [
        ("registering::nothing", RULE, {}, "no such op"),
        ("nowhere::attention", RULE, {}, "import the module"),
        ("registering::attention.other", RULE, {}, "no overload 'other'"),
        ("attention", RULE, {}, "namespace::op"),
        (len, RULE, {}, "no op"),
        (attention, "b s d, b t d", {}, "'->'"),
        (attention, "b s (d, b t d -> b s d", {}, r"'\(' without"),
        (attention, "b s d -> b s d", {}, "1 operand, and .* takes 2 tensors"),
        (attention, "b s d, b t d, b s -> b s d", {}, "3 operands, and .* takes 2 tensors"),
        (attention, "b s d, b t d -> b s d, b s", {}, "2 results, and .* returns 1"),
        (attention, RULE, {"whole": "x"}, "whole names x"),
        (attention, RULE, {"reduces": ["t"], "whole": ["t"]}, "axis t is whole and reduces"),
        (attention, RULE + "; half: t", {}, "after ';'"),
        (attention, "b s d, b t d -> ... d", {}, r"'\.\.\.' stands only in a result"),
        (attention, RULE, {"sizes": {"d": "size"}}, "no int argument 'size'"),
        (attention, RULE, {"sizes": {"h": 2}}, "sizes names h"),
        ("aten::relu_", "a -> a", {}, "changes its arguments"),
        ("aten::bernoulli", "a -> a", {}, "draws random numbers|changes its arguments"),
        ("aten::softmax.int", "a b -> a b", {}, r"has a rule already, written at .*attention.py:\d+.* replace=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_rule_is_said_when_it_is_registered(op, text, kinds, says):
    with pytest.raises(RuleError, match=f"(?s)(?i){says}"):
        register_rule(op, text, **kinds)
    assert not registered_by_user()


def test_operands_that_may_be_left_out_and_lists_may_have_any_number():
    register_rule(both, "a b -> a b, a; reduces: b")
    register_rule(both, "a b, b -> a b, a; reduces: b", replace=True)
    register_rule(mixed, "a b, a b, a b -> a b")
    x = torch.randn(3, 4)
    assert rule_of(torch.ops.registering.mixed.default, [x, x]) == "a b, a b -> a b"


def test_a_second_rule_needs_replace_and_the_same_one_again_does_not():
    register_rule(attention, RULE, whole="t d")
    register_rule(attention, RULE + "; whole: t d")  # a cell of a notebook that runs again
    with pytest.raises(RuleError, match=r"has a rule already, written at .*test_register.py:\d+"):
        register_rule(attention, RULE, whole="s t d")
    register_rule(attention, RULE, whole="s t d", replace=True)
    assert rule_of(torch.ops.registering.attention.default, *qk(), 2).endswith("whole: d s t")


def test_a_written_rule_can_be_replaced():
    register_rule("aten::softmax.int", "a b -> a b; whole: a b", replace=True)
    assert rule_of(aten.softmax.int, torch.randn(3, 4), 1) == "a b -> a b; whole: a b"


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.inner(x).flatten(0, 1)
        return torch.ops.registering.attention(x, x, 2).unflatten(0, (2, 6)).softmax(1)


def plan():
    with torch.no_grad():
        return dsp_auto.plan(Attends(), "2", (torch.randn(2, 6, 5, 8),))


def test_a_plan_uses_a_registered_rule_and_says_so():
    register_rule(attention, RULE, whole="s t d")
    made = plan()
    (entry,) = made.rules
    assert entry["origin"] == "registered" and entry["rule"] == RULE + "; whole: d s t"
    assert "rule registered: registering.attention.default" in str(made) and not made.without_rule
    registered_by_user().clear()
    assert plan().rules[0]["origin"] == "found"


def test_a_call_that_a_registered_rule_does_not_fit_is_an_error_that_names_the_place():
    register_rule(attention, "s d, t d -> s d; whole: t d")
    with pytest.raises(RuleError, match=r"(?s)registering::attention.*test_register.py:\d+.*\[12, 5, 8\]"):
        plan()
