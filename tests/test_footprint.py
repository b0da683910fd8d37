"""What an op takes beside its operands and results, and a primitive beside its ends, is what can be counted by hand, and what
the storages of a run show."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dsp_auto.cost_models import compute, memory
from dsp_auto.cost_models.compute import is_anywhere, op_launches
from dsp_auto.cost_models.memory import LiveStorages, op_footprint, primitive_buffers
from dsp_auto.ring_attention import short_ring
from dsp_auto.shards import nested_sizes, shard_sizes
from dsp_auto.track import BACKWARD, FORWARD, track_module
from tests.test_track import program

aten, dsp = torch.ops.aten, torch.ops.dsp
FLOAT = 4  # bytes


def footprint(target, *args, training=True, grads=True, **kwargs):
    """Of a call on float tensors of the given shapes (tuples). grads: whether a gradient comes to all of them, or to each."""
    wanted = iter([grads] * len(args) if isinstance(grads, bool) else grads)
    with FakeTensorMode():
        tensors = [
            torch.empty(x).requires_grad_(training and next(wanted)) if isinstance(x, tuple) else x for x in args
        ]
    return op_footprint(target, tuple(tensors), kwargs, training)


def test_what_makes_a_tensor_of_none_is_looked_at_without_making_it():
    terabytes = [2**20, 2**20]
    found = op_footprint(aten.full.default, (terabytes, 0.0), {"dtype": torch.float32}, False)
    assert found.extra == 0 and found.aliases == (None,)
    (launch,), _ = op_launches(aten.full.default, (terabytes, 0.0), {"dtype": torch.float32}, False)
    assert launch.nbytes == FLOAT * math.prod(terabytes)


def test_an_add_hands_its_gradient_to_both_operands_and_takes_nothing():
    found = footprint(aten.add.Tensor, (5, 6), (5, 6))
    assert found.gradients == (0, 0) and found.aliases == (None,)
    assert (found.extra, found.backward_extra, found.internal, found.saved) == (0, 0, 0, frozenset())


def test_where_an_operand_is_broadcast_its_gradient_is_a_sum_of_its_own():
    found = footprint(aten.add.Tensor, (5, 6), (6,))
    assert found.gradients == (0, "own")


def test_a_product_saves_what_each_operand_needs_of_the_other():
    both = footprint(aten.mul.Tensor, (5, 6), (5, 6))
    one = footprint(aten.mul.Tensor, (5, 6), (5, 6), grads=(True, False))
    assert (both.saved, both.gradients) == ({0, 1}, ("own", "own"))
    assert (one.saved, one.gradients) == ({1}, ("own", None))


def test_a_linear_saves_input_and_weight_and_has_a_gradient_of_its_own_for_each():
    found = footprint(aten.linear.default, (2, 5, 6), (7, 6), (7,))
    assert found.gradients == ("own", "own", "own") and found.aliases == (None,)
    assert found.saved == {0, 1} and found.internal == 0
    assert (found.extra, found.backward_extra) == (0, 0)


def test_a_linear_on_rows_that_do_not_lie_side_by_side_copies_them_and_keeps_the_copy():
    shape = (5, 2, 6)
    with FakeTensorMode():
        x = torch.empty(shape).requires_grad_().transpose(0, 1)
        weight = torch.empty(7, 6).requires_grad_()
    found = op_footprint(aten.linear.default, (x, weight), {}, True)
    assert (found.internal, found.extra, found.saved) == (FLOAT * math.prod(shape), 0, {1})


def test_results_of_unbind_lie_in_the_operand_and_their_gradients_are_stacked():
    found = footprint(aten.unbind.int, (3, 5, 6))
    assert found.aliases == (0, 0, 0)
    assert found.gradients == ("own",) and (found.extra, found.backward_extra) == (0, 0)


def test_a_slice_lies_in_the_operand_and_its_gradient_is_as_large_as_that():
    found = footprint(aten.slice.Tensor, (9, 5), 0, 2, 4)
    assert found.aliases == (0,) and found.gradients == ("own",) and found.saved == frozenset()


def test_the_gradient_of_a_sum_is_expanded_and_takes_nothing():
    found = footprint(aten.sum.dim_IntList, (50, 6), [0])
    assert found.gradients == (None,) and found.backward_extra == 0


def test_sdpa_saves_its_operands_and_a_number_for_every_query_but_no_scores():
    batch, heads, queries, keys, dim = 2, 3, 64, 80, 16
    shapes = ((batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, dim))
    found = footprint(aten.scaled_dot_product_attention.default, *shapes)
    scores = FLOAT * batch * heads * queries * keys
    assert found.saved == {0, 1, 2} and found.gradients == ("own", "own", "own") and found.aliases == (None,)
    assert FLOAT * batch * heads * queries <= found.internal < scores / 10
    assert found.extra < scores / 10


def test_attention_that_a_mask_needs_a_gradient_of_keeps_its_scores():
    """No kernel gives a bias's gradient without them."""
    shapes = ((1, 2, 64, 16), (1, 2, 80, 16), (1, 2, 80, 16))
    found = footprint(aten.scaled_dot_product_attention.default, *shapes, (1, 2, 64, 80))
    assert found.internal >= FLOAT * 2 * 64 * 80


def test_a_composite_op_takes_what_it_makes_on_the_way():
    """matmul puts the rows of both operands side by side: copies, which training keeps."""
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, 6)
        y = torch.empty(4, 5, 3, 7).transpose(1, 2).transpose(-1, -2)  # [4, 3, 7, 5]
        y = y.transpose(-1, -2)  # [4, 3, 5, 7]
        x = x.transpose(-1, -2)  # [4, 3, 6, 5]
    inference = op_footprint(aten.matmul.default, (x, y), {}, False)
    assert inference.extra == FLOAT * 4 * 3 * 5 * 7  # y's rows; x's lie so already, as seen from the other side
    assert inference.internal == 0
    x.requires_grad_(), y.requires_grad_()
    training = op_footprint(aten.matmul.default, (x, y), {}, True)
    assert (training.internal, training.extra) == (FLOAT * 4 * 3 * 5 * 7, 0)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """An op of several steps, with one result that is gone at the end."""
    return F.softmax(x * 2.0, -1).exp()


def test_a_transient_is_extra_in_inference_and_saved_in_training():
    whole = FLOAT * 50 * 60
    assert footprint(rounded, (50, 60), training=False).extra == whole
    found = footprint(rounded, (50, 60))
    # softmax keeps its result, and exp its own, which is the call's; x * 2 is gone by then.
    assert (found.internal, found.extra) == (whole, 0)
    assert found.backward_extra == whole  # the gradient of softmax, beside that of x


def test_equal_calls_are_looked_at_once_and_others_are_not():
    first = footprint(aten.add.Tensor, (5, 6), (5, 6))
    assert footprint(aten.add.Tensor, (5, 6), (5, 6)) is first
    assert footprint(aten.add.Tensor, (5, 6), (6,)) is not first


def test_live_storages_count_a_storage_once_and_until_its_last_view_is_gone():
    with FakeTensorMode(), LiveStorages() as live:
        x = torch.empty(100)
        view = x[10:].view(9, 10)
        assert (live.live, live.peak) == (400, 400)
        del x
        y = view + 1
        assert live.live == 400 + 360
        del view
        assert (live.live, live.peak) == (360, 760)
        live.mark()
        del y
        assert (live.live, live.peak) == (0, 360)


# --- primitives


SHAPES = {
    "even": ((2, 60, 30, 4), 1, 2),
    "even, one leads": ((60, 30, 4), 0, 1),
    "even, the other leads": ((60, 30, 4), 1, 0),
    "even behind a dim of one": ((1, 60, 30, 4), 1, 2),
    "uneven": ((2, 31, 17, 4), 1, 2),
    "uneven, one leads": ((31, 17, 4), 0, 1),
    "uneven, the other leads": ((31, 17, 4), 1, 0),
    "uneven behind a dim of one": ((1, 31, 17, 4), 1, 2),
}
# Each: the op, its arguments behind x, and the layouts of its ends ("whole", or which of the two dims is cut).
PRIMITIVES = {
    "switch": (dsp.switch.default, lambda s, i, j, at, partial: (i, [s[i]], j, *at), "first", "second"),
    "split": (dsp.split.default, lambda s, i, j, at, partial: (i, *at, partial), "whole", "first"),
    "gather": (dsp.gather.default, lambda s, i, j, at, partial: (i, [s[i]], *at, partial), "first", "whole"),
    "reduce": (dsp.reduce.default, lambda s, i, j, at, partial: (*at, partial), "whole", "whole"),
    "reduce_scatter": (dsp.reduce_scatter.default, lambda s, i, j, at, partial: (i, *at), "whole", "first"),
    "replicate": (dsp.replicate.default, lambda s, i, j, at, partial: at, "whole", "whole"),
}
BOTH_GRADIENTS = ("split", "gather", "reduce")


def first_part(shape, dim, sizes):
    """The shape of the first rank's part."""
    return tuple(sizes[0] if n == dim else size for n, size in enumerate(shape))


def taken(op, shape, *arguments) -> tuple[int, int]:
    """Bytes that are there while a primitive runs on a tensor of this shape that an op has made, and while its backward does,
    beside a leaf. By `dsp_auto.track`."""

    def write(call, leaf):
        x = call(aten.neg.default, leaf)
        if op is dsp.replicate.default:
            return call(operator.getitem, call(op, [x], *arguments), 0)
        return call(op, x, *arguments)

    module = program(write, shape)
    name = next(node.name for node in module.graph.nodes if node.target is op)
    found = track_module(module, [True])
    highs = (max(m.high for m in found.curve if (m.phase, m.where) == (way, name)) for way in (FORWARD, BACKWARD))
    return tuple(high - FLOAT * math.prod(shape) for high in highs)


def beside_ends(op, source, target, *arguments) -> tuple[int, int]:
    """What a primitive takes beside what comes and what it gives, and its backward beside the output and the two gradients."""
    before, after = (FLOAT * math.prod(shape) for shape in (source, target))
    forward, backward = taken(op, source, *arguments)
    if op is dsp.replicate.default:  # what it gives is what came, and its gradient has the same layout
        return forward - before, backward - before - after
    # The backward of a `reduce` may hand on what comes.
    return forward - before - after, max(backward - 2 * after - before, 0)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_buffers_of_a_primitive_are_what_a_run_takes_beside_its_ends(primitive, case, ranks):
    shape, i, j = SHAPES[case]
    op, arguments, before, after = PRIMITIVES[primitive]
    parts = {
        "whole": shape,
        "first": first_part(shape, i, shard_sizes(shape[i], ranks)),
        "second": first_part(shape, j, shard_sizes(shape[j], ranks)),
    }
    cut = {dim for end, dim in (("first", i), ("second", j)) if end in (before, after)}
    ends = [FLOAT * math.prod(parts[end]) for end in (before, after)]
    for partial in (False, True) if primitive in BOTH_GRADIENTS else (False,):
        found = beside_ends(op, parts[before], parts[after], *arguments(shape, i, j, (ranks, 0, "sp"), partial))
        predicted = primitive_buffers(
            primitive,
            max(ends),
            max(ends) if primitive == "switch" else min(ends),
            ranks=ranks,
            leads=all(math.prod(shape[:dim]) == 1 for dim in cut),
            even=all(shape[dim] % ranks == 0 for dim in cut),
            partial_grad=partial,
        )
        # Of two uneven ends a switch may hold either one twice, by which dim leads; the larger one is said.
        if primitive == "switch" and ends[0] != ends[1]:
            assert set(found) <= set(ends) and set(predicted) == {max(ends)}
        else:
            assert found == predicted, (case, ranks, partial)


@pytest.mark.parametrize("case", ["even", "uneven"])
def test_a_hierarchical_switch_never_takes_more_than_its_buffers(case):
    shape, i, j = SHAPES[case]
    for outer, inner in ((2, 2), (2, 3), (3, 2)):
        ranks = outer * inner
        gathered, scattered = nested_sizes(shape[i], (outer, inner)), nested_sizes(shape[j], (outer, inner))
        before, after = first_part(shape, i, gathered), first_part(shape, j, scattered)
        sizes = (i, list(gathered), j, outer, 0, "outer", inner, 0, "inner", list(scattered))
        found = beside_ends(dsp.hierarchical_switch.default, before, after, *sizes)
        part = FLOAT * max(map(math.prod, (before, after)))
        even = case == "even" and shape[i] % ranks == shape[j] % ranks == 0
        predicted = primitive_buffers(
            "hierarchical_switch", part, part, ranks=ranks, leads=False, even=even, partial_grad=False
        )
        assert found == predicted if even else all(own <= bound for own, bound in zip(found, predicted)), (outer, inner)


ANYWHERE = [
    (aten.linear.default, (2, 5, 6), (7, 6), (7,)),
    (aten.linear.default, (5, 6), (7, 6)),
    (aten.matmul.default, (2, 5, 6), (2, 6, 7)),
    (aten.matmul.default, (2, 3, 5, 6), (6, 7)),
    (aten.mm.default, (5, 6), (6, 7)),
    (aten.bmm.default, (2, 5, 6), (2, 6, 7)),
    (aten.addmm.default, (7,), (5, 6), (6, 7)),
    (aten.unbind.int, (3, 5, 6)),
    (aten.split.Tensor, (6, 5), 2),
    (aten.split_with_sizes.default, (6, 5), [1, 5]),
    (aten.chunk.default, (6, 5), 4),
    (aten.cat.default, [(6, 5), (6, 4)], 1),
    (aten.stack.default, [(6, 5), (6, 5)], 1),
    (aten.slice.Tensor, (9, 5), 0, 2, 4),
    (aten.select.int, (9, 5), 0, 2),
    (aten.clone.default, (9, 5)),
    (aten.contiguous.default, (9, 5)),
    (aten.softmax.int, (9, 5), 1),
    (aten.sum.dim_IntList, (50, 6), [0]),
    (aten.mean.dim, (50, 6), [0]),
    (aten.add.Tensor, (5, 6), (6,)),
    (aten.mul.Tensor, (5, 1), (5, 6)),
    (aten.gelu.default, (5, 6)),
    (aten.silu.default, (5, 6)),
    (aten.sigmoid.default, (5, 6)),
    (aten.where.self, (5, 6), (5, 6), (6,)),
    (aten.pow.Tensor_Scalar, (5, 6), 3),
    (aten.clamp.default, (5, 6), 0.0, 1.0),
    (aten.lerp.Scalar, (5, 6), (5, 6), 0.5),
    (aten.addcmul.default, (5, 6), (5, 6), (5, 6)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ANYWHERE, ids=lambda call: str(call[0]))
def test_ops_that_are_looked_at_on_meta_are_the_same_on_a_device(call, dtype, monkeypatch):
    def made(x):
        if isinstance(x, list) and isinstance(x[0], tuple):
            return [made(own) for own in x]
        return torch.empty(x, dtype=dtype).requires_grad_() if isinstance(x, tuple) else x

    target, *args = call
    assert is_anywhere(target)
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [made(x) for x in args]
        if target is aten.where.self:
            args[0] = torch.empty(5, 6, dtype=torch.bool)
    found = []
    for anywhere in (True, False):
        monkeypatch.setattr(compute, "is_anywhere", lambda target, anywhere=anywhere: anywhere)
        for function in (memory._footprint, compute._launches):
            function.cache_clear()
        for training in (True, False):
            found.append((op_footprint(target, tuple(args), {}, training), op_launches(target, tuple(args), {}, training)))
    assert found[:2] == found[2:]


def test_every_op_that_is_looked_at_on_meta_has_been_compared():
    assert compute._ANYWHERE <= {call[0] for call in ANYWHERE}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[8] * 9, [80, 80, 80, 80, 79, 79, 79], [3] * 6])
def test_a_short_ring_takes_the_memory_of_a_long_one(lengths, causal, training):
    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = [torch.empty(2, 4, lengths[0], 16).requires_grad_(training) for _ in range(3)]
        args = (*operands, None, lengths, lengths, causal, None, False, len(lengths), 0, "")
        found = [
            memory.run_footprint(lambda own=own: dsp.ring_attention.default(*own), operands, training)
            for own in (args, short_ring(*args))
        ]
    # Of uneven parts the first ones are the largest, and the short ring has only these.
    more = 1.1 if len(set(lengths)) > 1 else 1.0
    for name in ("extra", "backward_extra", "internal"):
        long, short = (getattr(own, name) for own in found)
        assert long <= short <= more * long
    assert found[0].gradients == found[1].gradients and found[0].saved == found[1].saved
