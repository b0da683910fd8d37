"""The kernels of an op, forward and backward, are those that it launches, with their FLOPs and bytes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dsp_auto.cost_models.compute import RecordLaunches, call_seconds, op_launches
from dsp_auto.cost_models.hardware import Hardware, Kernel, Link, Rate

aten = torch.ops.aten
LINK = Link(1.0, 0.0)
MODE = FakeTensorMode()


def fakes(*shapes, dtype=torch.float32, requires_grad=True):
    with MODE:
        return [torch.empty(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def flops(launches):
    return sum(one.flops for one in launches)


def kinds(launches):
    return [one.kind for one in launches if one.kind != "view"]


def test_a_linear_is_one_product_forward_and_two_and_a_sum_backward():
    forward, backward = op_launches(aten.linear.default, fakes((2, 16, 8), (24, 8), (24,)), {}, True)
    product = 2 * 32 * 8 * 24
    assert kinds(forward) == ["matmul"] and flops(forward) == product
    assert sorted(kinds(backward)) == ["matmul", "matmul", "reduction"] and flops(backward) == 2 * product
    assert forward[-2].nbytes == 4 * (32 * 8 + 8 * 24 + 24 + 32 * 24)  # the bias is read once, not expanded


def test_gradients_come_for_the_operands_that_require_them_only():
    (x,), (w, b) = fakes((2, 16, 8), requires_grad=False), fakes((24, 8), (24,))
    forward, backward = op_launches(aten.linear.default, (x, w, b), {}, True)
    assert flops(backward) == flops(forward)


def test_without_training_nothing_runs_backward():
    forward, backward = op_launches(aten.linear.default, fakes((2, 16, 8), (24, 8), (24,)), {}, False)
    assert flops(forward) and backward == ()


def test_attention_on_a_cpu_is_counted_and_its_backward_is_two_and_a_half_times_the_forward():
    b, h, s, t, d = 2, 4, 16, 32, 8
    forward, backward = op_launches(
        aten.scaled_dot_product_attention.default, fakes((b, h, s, d), (b, h, t, d), (b, h, t, d)), {}, True
    )
    assert kinds(forward) == ["attention"] and flops(forward) == 4 * b * h * s * t * d
    assert kinds(backward) == ["attention_backward"] and flops(backward) == 10 * b * h * s * t * d


def test_attention_written_as_two_products_counts_as_much_forward():
    q, k, v = fakes((2, 4, 16, 8), (2, 4, 32, 8), (2, 4, 32, 8))

    def written_out(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    both = [op_launches(op, (q, k, v), {}, False)[0] for op in (aten.scaled_dot_product_attention.default, written_out)]
    assert flops(both[0]) == flops(both[1])


@pytest.mark.parametrize(
    ("op", "shapes", "kwargs"),
    [
        (aten.linear.default, [(4, 6, 8), (12, 8)], {}),
        (aten.matmul.default, [(3, 4, 5), (3, 5, 6)], {}),
        (aten.einsum.default, None, {}),
        (aten.conv2d.default, [(2, 3, 8, 8), (5, 3, 3, 3)], {"padding": [1, 1]}),
    ],
)
def test_flops_are_those_of_the_flop_counter(op, shapes, kwargs):
    args = ("bij,bjk->bik", fakes((2, 3, 4), (2, 4, 5))) if shapes is None else tuple(fakes(*shapes))
    with FlopCounterMode(display=False) as counter:
        result = op(*args, **kwargs)
        result.backward(torch.empty_like(result))
    assert sum(map(flops, op_launches(op, args, kwargs, True))) == counter.get_total_flops()


def test_what_describes_a_tensor_anew_moves_nothing_and_a_copy_moves_it_twice():
    (x,) = fakes((4, 6, 8))
    (forward, backward) = op_launches(aten.transpose.int, (x, 0, 1), {}, True)
    assert {one.kind for one in forward + backward} == {"view"} and not any(one.nbytes for one in forward + backward)
    (forward, _) = op_launches(aten.reshape.default, (x.transpose(0, 1), [24, 8]), {}, True)
    assert [one.nbytes for one in forward if one.kind == "copy"] == [2 * 4 * 6 * 8 * 4]


def test_an_embedding_reads_the_rows_it_takes_and_not_the_table():
    (table,), (rows,) = fakes((1000, 8)), fakes((5,), dtype=torch.int64, requires_grad=False)
    forward, _ = op_launches(aten.embedding.default, (table, rows), {}, False)
    assert sum(one.nbytes for one in forward) == 2 * 5 * 8 * 4 + 5 * 8


def test_what_is_only_written_is_not_read():
    with RecordLaunches() as record:
        x = torch.zeros(10)
        x.copy_(torch.ones(10))
        torch.zeros_like(x)
    assert [(one.op, one.nbytes) for one in record.launches] == [("zeros", 40), ("ones", 40), ("copy_", 80), ("zeros_like", 40)]


def test_seconds_follow_the_dtype_and_shards_share_the_work_but_not_the_overhead():
    rates = {"float32": Rate(1e3), "bfloat16": Rate(4e3)}
    hardware = Hardware("toy", LINK, kernels={"matmul": Kernel(1.0, None, rates), "view": Kernel()})
    product = 2 * 4 * 5 * 6
    args = fakes((4, 5), (5, 6))
    assert call_seconds(aten.mm.default, args, {}, hardware, training=True) == (1 + product / 1e3, 2 * (1 + product / 1e3))
    assert call_seconds(aten.mm.default, args, {}, hardware, training=False, shards=4) == (1 + product / 4e3, 0)
    halves = fakes((4, 5), (5, 6), dtype=torch.bfloat16)
    assert call_seconds(aten.mm.default, halves, {}, hardware, training=False) == (1 + product / 4e3, 0)


def test_an_op_with_an_entry_of_its_own_takes_that():
    kernels = {"gelu": Kernel(7.0), "pointwise": Kernel(3.0), "memory": Kernel(2.0), "view": Kernel()}
    hardware = Hardware("toy", LINK, kernels=kernels, host=0.5)
    x, y = fakes((8,), (8,), requires_grad=False)
    seconds = [
        call_seconds(op, args, {}, hardware, training=False)[0]
        for op, args in ((aten.gelu.default, (x,)), (aten.add.Tensor, (x, y)), (aten.sort.default, (x,)))
    ]
    assert seconds == [7.5, 3.5, 2.5]
