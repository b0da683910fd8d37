"""Factors: every tensor knows what its dims consist of, through reshapes, merged dims and fused projections."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsp_auto.errors import LayoutError
from dsp_auto.passes.capture import capture
from dsp_auto.passes.factorize import factorize
from dsp_auto.passes.factors import Factors, Op
from examples.transformer_2d import build


class Model(nn.Module):
    """A forward function over a few linears: `Model(lambda self, x: self.a(x), a=(4, 8))`."""

    def __init__(self, function, **linears: tuple[int, int]) -> None:
        super().__init__()
        self.function = function
        for name, sizes in linears.items():
            setattr(self, name, nn.Linear(*sizes))

    def forward(self, *args):
        return self.function(self, *args)


def factors_of(function, *shapes, names=None, **linears) -> Factors:
    program = capture(Model(function, **linears), tuple(torch.randn(shape) for shape in shapes))
    return factorize(program, names)


def op(factors: Factors, name: str) -> Op:
    """The op of that name in the graph."""
    return next(op for op in factors.ops if op.name == name)


def show(factors: Factors, name: str) -> str:
    return factors.show((name, 0))


def sizes(factors: Factors, name: str) -> list[list[int]]:
    return [[factors.sizes[factor] for factor in dim] for dim in factors.values[name, 0].dims]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- reshapes


def test_a_split_is_carried_back_to_what_came_before():
    found = factors_of(lambda self, x: self.up(x).exp().view(5, 4, 6), (5, 3), up=(3, 24))
    assert sizes(found, "view") == [[5], [4], [6]]
    for before in ("exp", "linear"):
        assert found.values[before, 0].factors == found.values["view", 0].factors
    assert sizes(found, "p_up_weight") == [[4, 6], [3]] and sizes(found, "p_up_bias") == [[4, 6]]


def test_a_merge_is_carried_on_to_what_comes_after():
    found = factors_of(lambda self, x: self.down(x.flatten(1).exp()), (5, 4, 6), down=(24, 3))
    assert sizes(found, "exp") == [[5], [4, 6]]
    assert found.values["exp", 0].factors == found.values["args_0", 0].factors
    assert sizes(found, "p_down_weight") == [[3], [4, 6]]


def test_splits_of_one_dim_meet_at_their_common_refinement():
    found = factors_of(lambda self, x: (x.view(4, 6).exp(), x.view(2, 12).exp()), (24,))
    assert sizes(found, "args_0") == [[2, 2, 6]]
    assert sizes(found, "view") == [[2, 2], [6]] and sizes(found, "view_1") == [[2], [2, 6]]
    assert all(own.is_view for own in found.ops if "view" in own.name)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("habit", ["4d", "flat"])
def test_merged_batch_and_time_are_two_factors_whatever_the_batch(habit, batch):
    model, args, _ = build(layers=1, hidden=8, heads=2, frames=3, tokens=5, batch=batch, habit=habit)
    found = factorize(capture(model, args), {"video": "B T S channels"})
    shown = [found.show(value).split(" embed")[0] for value in found.values]
    merged = {1: ["T S", "S T"], 2: ["(B T) S", "(B S) T"]}[batch]
    assert all(text in shown for text in merged)
    if habit == "flat":
        assert {1: "1 (T S)", 2: "B (T S)"}[batch] in shown
    assert sorted(found.names[f] for f in found.of_kind("sequence")) == ["S", "T"]


def test_sizes_that_do_not_nest_stay_apart():
    found = factors_of(lambda self, x: x.view(8, 3, 5).exp(), (6, 4, 5))
    view = op(found, "view")
    before, after = found.values["args_0", 0], found.values["view", 0]
    assert sizes(found, "args_0") == [[6], [4], [5]] and sizes(found, "view") == [[8], [3], [5]]
    assert set(before.factors) & set(after.factors) == {before.factors[2]}
    assert not view.is_view
    assert {view.rule.sizes[axis] for cut in view.cuts for axis, _ in cut} == {5}


def test_a_dim_seen_in_two_ways_that_do_not_nest_is_shared_with_one_of_them():
    found = factors_of(lambda self, x: (x.view(6, 4).exp(), x.view(8, 3).exp()), (24,))
    first, second = op(found, "view"), op(found, "view_1")
    assert first.is_view and not first.opaque
    assert second.opaque and not second.is_view and not second.cuts
    assert sizes(found, "exp") == [[6], [4]] and sizes(found, "exp_1") == [[8], [3]]
    assert set(found.values["exp", 0].factors) == set(found.values["args_0", 0].factors)
    assert not set(found.values["exp_1", 0].factors) & set(found.values["args_0", 0].factors)


def test_dims_of_size_one_have_no_factors():
    found = factors_of(lambda self, x: x.unsqueeze(1) * x.view(5, 7, 1), (5, 7))
    assert sizes(found, "unsqueeze") == [[5], [], [7]]
    assert sizes(found, "mul") == [[5], [7], [7]]


def test_broadcast_operands_share_the_factors_they_have():
    found = factors_of(lambda self, x, scale: x * scale, (5, 7), (7,))
    assert found.values["args_1", 0].factors == found.values["mul", 0].factors[1:]


# --- fused projections, attention


def attention(self, x, heads=2):
    pieces = (piece.unflatten(-1, (heads, -1)).transpose(1, 2) for piece in self.qkv(x).chunk(3, dim=-1))
    return F.scaled_dot_product_attention(*pieces).transpose(1, 2).flatten(2)


def test_a_fused_qkv_shards_by_heads():
    found = factors_of(attention, (3, 5, 8), qkv=(8, 24))
    assert sizes(found, "p_qkv_weight") == [[3, 2, 4], [8]]
    attend = op(found, "scaled_dot_product_attention")
    heads = found.values[attend.results[0]].dims[1][0]
    assert found.values["p_qkv_weight", 0].dims[0][1] == heads
    makers = [own for own in found.ops if heads in {f for axis in own.axes.values() for f in axis}]
    for own in makers:
        (axis,) = [axis for axis, its in own.axes.items() if heads in its]
        assert ((axis, 0),) in own.cuts, own.name
    assert {"linear", "chunk", attend.name, "flatten"} <= {own.name for own in makers}


def test_a_factor_may_stand_twice_in_one_tensor():
    found = factors_of(lambda self, x: (x @ x.mT).softmax(-1) @ x, (5, 7))
    scores = found.values["softmax", 0]
    assert sizes(found, "softmax") == [[5], [5]]
    assert scores.dims[0] == scores.dims[1]
    soft = op(found, "softmax")
    places = soft.places(soft.rule.outputs[0], scores)
    assert sorted(places.values()) == [0, 1]
    assert [(key,) in soft.cuts for key, place in sorted(places.items(), key=lambda p: p[1])] == [True, False]


def test_ops_that_share_no_tensor_share_no_factor():
    found = factors_of(lambda self, x, y: (x.exp(), y.exp()), (5, 7), (5, 7))
    assert not set(found.values["exp", 0].factors) & set(found.values["exp_1", 0].factors)


def test_an_op_without_a_rule_makes_new_factors():
    found = factors_of(lambda self, x: (x.histc(5).exp(), x.exp()), (5,))
    (own,) = [own for own in found.ops if own.rule is None]
    assert not set(found.values[own.results[0]].factors) & set(found.values["args_0", 0].factors)


# --- kinds and names


def video(**options):
    model, args, _ = build(layers=1, hidden=8, heads=2, frames=3, tokens=5, batch=2, **options)
    return capture(model, args)


def test_kinds_of_a_video_block():
    found = factorize(video(), {"video": "B T S channels"})
    kinds = {found.names[factor]: kind for factor, kind in found.kinds.items()}
    assert {name: kinds.pop(name) for name in ("B", "T", "S")} == {"B": "batch", "T": "sequence", "S": "sequence"}
    assert set(kinds.values()) == {"feature"}
    assert set(found.of_kind("sequence")) | set(found.of_kind("batch")) | set(found.of_kind("feature")) == set(
        found.sizes
    )


def test_channels_that_a_convolution_with_bias_makes_are_features():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 2, stride=2)

        def forward(self, image):
            return self.embed(image).flatten(2).softmax(-1)

    found = factorize(capture(Patches(), (torch.randn(2, 3, 4, 6),)), {"image": "B C H W"})
    kinds = {found.names[f]: kind for f, kind in found.kinds.items()}
    assert show(found, "image") == "B C (H0 H1) (W0 W1)"
    assert {kinds[n] for n in ("C", "H1", "W1")} == {"feature"} and kinds["H0"] == kinds["W0"] == "sequence"
    assert show(found, "conv2d").endswith("H0 W0") and kinds["B"] == "batch"
    assert {found.kinds[f] for f in found.values["p_embed_bias", 0].factors} == {"feature"}


def test_names_come_from_the_user_then_from_the_input_then_from_the_module():
    found = factors_of(lambda self, x: self.up(x.exp()), (5, 7, 3), names={"args_0": "rows columns C"}, up=(3, 4))
    assert show(found, "exp") == "rows columns C"
    found = factors_of(lambda self, x: self.up(x.exp()), (5, 7, 3), up=(3, 4))
    assert show(found, "exp").startswith("args_0.0 args_0.1 ") and show(found, "linear").endswith(" up.2")


def test_commas_may_stand_between_names():
    assert show(factors_of(lambda self, x: x.exp(), (5, 7), names={"args_0": "T, S"}), "exp") == "T S"


def test_no_two_factors_have_one_name():
    found = factors_of(lambda self, x, y: x.exp() @ y, (5, 7), (7, 4), names={"args_0": "T S", "args_1": "S T"})
    assert len(set(found.names.values())) == len(found.sizes) == 3
    assert show(found, "exp") == "T S" and show(found, "args_1") == "S T'2"


def test_every_value_prints_with_its_factors():
    found = factors_of(lambda self, x: x.view(2, 3, 5).exp(), (6, 5), names={"args_0": "R C"})
    assert str(found).splitlines() == ["args_0.0: (R0 R1) C", "view.0: R0 R1 C", "exp.0: R0 R1 C"]


def test_a_name_for_an_input_that_does_not_exist_lists_those_that_do():
    with pytest.raises(LayoutError, match=r"'clip'.*tensor inputs are video") as refused:
        factorize(video(), {"clip": "B T S C"})
    assert "use one of these names" in str(refused.value).lower()


def test_too_few_names_say_the_shape():
    with pytest.raises(LayoutError, match=r"3 names to video \('B T C'\).*\[2, 3, 5, 4\].*one name a dim"):
        factorize(video(), {"video": "B T C"})


def merged(self, x):
    return x.unflatten(1, (4, 6)).softmax(1).softmax(2).flatten(1, 2)


@pytest.mark.parametrize("names", ["B (H W) C", "B,(H,W),C", "(B) ( H W ) C"])
def test_a_dim_that_the_model_splits_has_a_name_for_each_part(names):
    assert show(factors_of(merged, (2, 24, 8), names={"args_0": names}), "unflatten") == "B H W C"
    assert show(factors_of(merged, (2, 24, 8), names={"args_0": "B S C"}), "unflatten") == "B S0 S1 C"


@pytest.mark.parametrize(
    "names, says",
    [
        ("B (H W D) C", r"gives 3 names to dim 1 of args_0 .*: the model takes it as 4 x 6\. Give a name to each"),
        ("B (H W) (C D)", r"gives 2 names to dim 2 of args_0 .*: the model does not split its 8 places"),
        ("B (H W C", "parentheses do not match"),
        ("B H W) C", "parentheses do not match"),
        ("B ((H W) C)", "parentheses do not match"),
        ("B () C", "hold nothing"),
        ("B H W C", "4 names to args_0 .* the model splits"),
    ],
)
def test_names_in_parentheses_that_are_not_those_of_the_model_say_what_it_does(names, says):
    with pytest.raises(LayoutError, match=says):
        factors_of(merged, (2, 24, 8), names={"args_0": names})
