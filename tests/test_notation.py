"""The notation of rules: what is written is what is meant, and what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch

from dsp_auto.errors import DspError, RuleError
from dsp_auto.passes.notation import Local, OpCall, Operand, OpRule, from_notation, parse

aten = torch.ops.aten


def call(inputs, outputs, target=aten.add.Tensor) -> OpCall:
    """A call with operands and results of the given shapes."""
    return OpCall(target, tuple(Operand(n, tuple(s)) for n, s in enumerate(inputs)), {}, tuple(map(tuple, outputs)))


# --- parsing


@pytest.mark.parametrize(
    ("text", "operands", "results"),
    [
        ("a b -> b a", [[("a",), ("b",)]], [[("b",), ("a",)]]),
        ("b (h d), o d -> b o", [[("b",), ("h", "d")], [("o",), ("d",)]], [[("b",), ("o",)]]),
        ("... k, o k -> ... o", [["...", ("k",)], [("o",), ("k",)]], [["...", ("o",)]]),
        ("a 1 -> a", [[("a",), ()]], [[("a",)]]),
        ("a0, b_1 -> ", [[("a0",)], [("b_1",)]], [[]]),
        (" -> a, a", [[]], [[("a",)], [("a",)]]),
        ("(a b c)->(a b)c", [[("a", "b", "c")]], [[("a", "b"), ("c",)]]),
    ],
)
def test_text_becomes_dims_of_operands_and_results(text, operands, results):
    assert parse(text) == (operands, results)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b", "expected one '->'"),
        ("a -> b -> c", "expected one '->'"),
        ("(a b -> a", r"'\(' without '\)' in '\(a b'"),
        ("a b) -> a", r"'\)' does not belong in 'a b\)'"),
        ("((a b) c) -> a", r"'\(' does not belong"),
        ("a + b -> a", r"'\+' does not belong in 'a \+ b'"),
        ("... a ... -> a", r"'\.\.\.' does not belong"),
        ("(... a) -> a", r"'\.\.\.' does not belong"),
        ("2 a -> a", "'2' does not belong"),
    ],
)
def test_malformed_text_is_refused_with_the_text_and_the_place(text, found):
    with pytest.raises(RuleError, match=found) as refused:
        parse(text)
    assert repr(text) in str(refused.value) and isinstance(refused.value, DspError)


# --- the rule of a call


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "more"),
    [
        ("a b -> b a", [(2, 3)], [(3, 2)], {}),
        ("b k, o k, o -> b o; reduces: k", [(2, 3), (5, 3), (5,)], [(2, 5)], {}),
        ("(a b) c -> a b c", [(6, 4)], [(2, 3, 4)], {}),
        ("a b -> a b; whole: b", [(2, 3)], [(2, 3)], {}),
        ("a (p r) -> a r, a r; moved: p", [(2, 6)], [(2, 3), (2, 3)], {"sizes": {"p": 2}}),
        ("a 1 -> a b", [(2, 1)], [(2, 3)], {}),
        ("a -> (); reduces: a", [(3,)], [()], {}),
        ("() -> a", [()], [(3,)], {}),
    ],
)
def test_a_rule_prints_as_it_is_written(text, inputs, outputs, more):
    notation, *notes = text.replace("()", "").split("; ")
    kinds = {kind: axes.split() for kind, axes in (note.split(": ") for note in notes)}
    rule = from_notation(notation, call(inputs, outputs), **kinds, **more)
    assert str(rule) == text


def test_dots_are_named_from_the_right_so_operands_broadcast_as_tensors_do():
    rule = from_notation("..., ... -> ...", call([(2, 5, 7), (5, 1)], [(2, 5, 7)]))
    assert str(rule) == ".2 .1 .0, .1 1 -> .2 .1 .0"
    assert rule.sizes == {".2": 2, ".1": 5, ".0": 7}
    assert (
        str(from_notation("... k, k -> ...", call([(4, 7), (7,)], [(4,)]), reduces="k")) == ".0 k, k -> .0; reduces: k"
    )
    assert str(from_notation("... k, k -> ...", call([(7,), (7,)], [()]), reduces="k")) == "k, k -> (); reduces: k"


def test_an_operand_of_size_one_does_not_have_the_axis():
    rule = from_notation("a b, a b -> a b", call([(3, 4), (3, 1)], [(3, 4)]))
    assert rule.inputs == ((("a",), ("b",)), (("a",), ()))


def test_an_axis_of_size_one_everywhere_is_none():
    rule = from_notation("a b -> a b", call([(3, 1)], [(3, 1)]), whole="b")
    assert (rule.sizes, rule.whole, str(rule)) == ({"a": 3}, frozenset(), "a 1 -> a 1")


def test_sizes_of_merged_axes_come_from_other_dims_or_from_the_rest():
    rule = from_notation("(a b) c, b -> (a c)", call([(6, 4), (3,)], [(8,)]))
    assert rule.sizes == {"a": 2, "b": 3, "c": 4}
    given = from_notation("(a b) -> a b", call([(6,)], [(2, 3)]), sizes={"a": 2})
    assert given.sizes == {"a": 2, "b": 3}


def test_a_merged_axis_of_size_one_is_left_out():
    rule = from_notation("(g r) s, g s -> (g r) s", call([(6, 5), (6, 5)], [(6, 5)]), sizes={"g": 6, "r": 1})
    assert str(rule) == "g s, g s -> g s"


def test_a_dim_that_the_op_does_not_read_has_no_axis_whatever_its_size():
    rule = from_notation("a b, _ _ -> a b", call([(3, 4), (7, 9)], [(3, 4)]))
    assert rule.inputs[1] == ((), ()) and rule.sizes == {"a": 3, "b": 4}


def test_operands_that_the_call_leaves_out_stand_last():
    rule = from_notation("b k, o k, o -> b o", call([(2, 3), (5, 3)], [(2, 5)]), reduces="k")
    assert str(rule) == "b k, o k -> b o; reduces: k"


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "found"),
    [
        ("a, a -> a", [(3,), (4,)], [(3,)], r"axis a is 3 and 4 \(shape \(4,\)\)"),
        ("a b -> a", [(3,)], [(3,)], r"2 dims written, shape \(3,\) has 1"),
        ("... a b -> a", [(3,)], [(3,)], r"at least 2 dims written, shape \(3,\) has 1"),
        ("a -> a", [(3,), (3,)], [(3,)], "aten.add.Tensor has 2 tensor operands and 1 result"),
        ("a -> a, a", [(3,)], [(3,)], "aten.add.Tensor has 1 tensor operand and 1 result"),
        ("a (a b) -> b", [(2, 7)], [(3,)], r"dim \(a b\) should be 6, is 7 \(shape \(2, 7\)\)"),
        ("a (a b) -> 1", [(2, 7)], [(1,)], r"dim of size 7 is not a multiple of 2 \(shape \(2, 7\)\)"),
        ("a 1 -> a", [(2, 7)], [(2,)], r"dim 1 should be 1, is 7 \(shape \(2, 7\)\)"),
    ],
)
def test_text_that_does_not_fit_names_text_shape_and_axis(text, inputs, outputs, found):
    with pytest.raises(RuleError, match=found) as refused:
        from_notation(text, call(inputs, outputs))
    assert repr(text) in str(refused.value)


def test_a_rule_about_an_axis_that_does_not_exist_cannot_be_made():
    with pytest.raises(RuleError, match=r"no axis \['z'\]"):
        OpRule(inputs=((("a",),),), outputs=((("a",),),), sizes={"a": 3}, whole=frozenset("z"))


# --- what a rule says


def test_an_axis_is_shardable_where_results_have_it_or_sum_it_away():
    rule = from_notation(
        "b t k, k o, m -> b t o, b 1 o", call([(2, 3, 4), (4, 5), (6,)], [(2, 3, 5), (2, 1, 5)]), whole="o", reduces="k"
    )
    # t is missing from the second result and m from both; nobody says that they are summed.
    assert {axis: rule.can_shard(axis) for axis in rule.sizes} == {
        "b": True,
        "t": False,
        "k": True,
        "o": False,
        "m": False,
    }
    assert rule.contracts


def test_random_numbers_of_one_device_cannot_be_shared_out_where_no_way_is_written():
    rule = from_notation("a -> a", call([(3,)], [(3,)]), is_random=True)
    assert rule.can_shard("a") and not rule.drawn_serially().cuts()
    written = from_notation("a -> a", call([(3,)], [(3,)]), is_random=True, serial=print)
    assert written.drawn_serially().can_shard("a") and written.drawn_serially().local is print


def test_axes_that_are_cut_into_ranges_are_cut_together_and_no_other_way():
    rule = from_notation("b i -> b o", call([(2, 5)], [(2, 4)]), ranges=[("i", "o")])
    assert rule.cuts() == [("b",), ("i", "o")] and not rule.can_shard("i")
    assert str(rule) == "b i -> b o; ranges: i o"
    # An axis of size one is none: then neither can be cut.
    assert from_notation("b i -> b o", call([(2, 5)], [(2, 1)]), ranges=[("i", "o")]).cuts() == [("b",)]


def test_a_rank_has_its_sizes_of_the_axes():
    rule = from_notation("(b t) c -> b t c, c", call([(6, 4)], [(2, 3, 4), (4,)]), reduces="t")
    here = rule.on_rank({"t": 2}, {"t": 1})
    assert here == Local(((2, 2, 4), (4,)), {"b": 2, "t": 2, "c": 4}, {"b": 2, "t": 3, "c": 4}, {"t": 1})


# --- a call as rules see it


def test_a_call_knows_its_operands_wherever_they_stand():
    x, y = torch.empty(2, 3), torch.empty(3, dtype=torch.int64)
    made = OpCall.of(aten.cat.default, ([x, y, x], 1), {}, [torch.empty(5)])
    assert [operand.shape for operand in made.operands] == [(2, 3), (3,), (2, 3)]
    assert made.args == ([Operand(0, (2, 3)), Operand(1, (3,), torch.int64), Operand(2, (2, 3))], 1)
    assert made.outputs == ((5,),)


def test_a_call_gives_arguments_by_name_with_their_defaults():
    x = torch.empty(2, 3)
    made = OpCall.of(aten.sum.dim_IntList, (x, [-1]), {"dtype": torch.float64}, [torch.empty(2, dtype=torch.float64)])
    assert made["dim"] == [-1] and made["keepdim"] is False and made["dtype"] is torch.float64
    assert made.dim(-1) == 1 and made.dim(0) == 0
    assert not made.same_dtype
