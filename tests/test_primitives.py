"""Each primitive does to shards what its name says, and its backward is the exact adjoint, on any number of ranks.

The reference is one process: a whole tensor and its gradient, cut by `torch.tensor_split`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from dsp_auto.errors import LayoutError
from dsp_auto.measure import CountCollectives
from dsp_auto.primitives import IN_HALVES
from dsp_auto.shards import shard_range, shard_sizes
from tests.run_order import RunOrder

dsp = torch.ops.dsp
GROUP = "default_pg"  # of fake tensors; real ones take their world's group


def _group() -> str:
    return torch.distributed.group.WORLD.group_name


def _whole(shape, dtype=torch.float32, seed=0):
    """Small integers: sums of them are exact in every dtype, whatever the order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _shard(x, dim, ranks, rank):
    return torch.tensor_split(x, ranks, dim)[rank]


def _strided(x):
    """The same values with reversed strides and a gap: nothing a collective could take as it is."""
    gap = torch.zeros([*x.shape, 2], dtype=x.dtype)
    gap[..., 0] = x
    return gap[..., 0].mT.contiguous().mT if x.ndim > 1 else gap[..., 0]


class _InHalves:
    """The primitives, those that come in halves as one half after the other, with other work between them."""

    def __getattr__(self, name):
        if name not in IN_HALVES:
            return getattr(dsp, name)
        start, wait = getattr(dsp, f"start_{name}"), getattr(dsp, f"wait_{name}")

        def op(x, *args):
            coming, flight = start(x, *args)
            torch.ones(3).sum()
            return wait(coming, flight, *args)

        return op


WAYS = {"whole": dsp, "in halves": _InHalves()}
in_both_ways = pytest.mark.parametrize("way", WAYS)


def _vjp(op, x, grad, *args):
    x = x.detach().requires_grad_()
    y = op(x, *args)
    y.backward(grad)
    return y.detach(), x.grad


# shards


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 51])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_shards_are_those_of_tensor_split(size, ranks):
    pieces = torch.arange(size).tensor_split(ranks)
    assert shard_sizes(size, ranks) == [len(p) for p in pieces]
    for rank, piece in enumerate(pieces):
        start, length = shard_range(size, ranks, rank)
        assert torch.arange(size)[start : start + length].tolist() == piece.tolist()


def test_shards_reject_what_is_no_shard():
    for bad in [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)]:
        with pytest.raises(ValueError):
            shard_range(*bad)


# forward and backward, against one process

CASES = [  # ranks, shape, gather_dim, scatter_dim
    (2, (1, 8, 6, 5), 1, 2),
    (2, (2, 8, 6, 5), 2, 1),
    (2, (7, 3), 0, 1),
    (3, (2, 7, 5, 4), 1, 2),
    (3, (2, 7, 2, 7), 3, 1),
    (3, (6, 2, 7), 0, 2),
    (4, (1, 51, 8, 3), 1, 2),
    (4, (1, 51, 8, 3), 2, 1),
    (4, (2, 3, 5, 2), 1, 2),  # three elements on four ranks: an empty shard on either side
    (4, (3, 2, 1), 1, 0),
    (4, (8, 2, 12), 2, 0),
]


def _check_switch(rank, ranks, shape, i, j, way="whole"):
    ops = WAYS[way]
    at = (ranks, rank, _group())
    for dtype in (torch.float32, torch.bfloat16):
        x, g = _whole(shape, dtype), _whole(shape, dtype, seed=1)
        for prepare in (torch.Tensor.contiguous, _strided):
            mine, its_grad = prepare(_shard(x, i, ranks, rank)), prepare(_shard(g, j, ranks, rank))
            y, grad = _vjp(ops.switch, mine, its_grad, i, shape[i], j, *at)
            assert y.is_contiguous() and y.dtype == dtype
            assert torch.equal(y, _shard(x, j, ranks, rank))
            assert torch.equal(grad, _shard(g, i, ranks, rank))


@in_both_ways
@pytest.mark.parametrize("ranks, shape, i, j", CASES)
def test_switch_moves_the_shard_and_switch_backward_is_switch_back(world, ranks, shape, i, j, way):
    world(ranks).run(_check_switch, shape, i, j, way)


def _check_one_dim(rank, ranks, shape, dim, way="whole"):
    ops = WAYS[way]
    at = (ranks, rank, _group())
    start, length = shard_range(shape[dim], ranks, rank)
    for dtype in (torch.float32, torch.bfloat16):
        x, g = _whole(shape, dtype), _whole(shape, dtype, seed=1)
        terms, grads = ([_whole(shape, dtype, seed=s + r) for r in range(ranks)] for s in (10, 20))
        mine, its_grad = _shard(x, dim, ranks, rank), _shard(g, dim, ranks, rank)
        only_mine = torch.zeros_like(x)
        only_mine.narrow(dim, start, length).copy_(its_grad)
        for prepare in (torch.Tensor.contiguous, _strided):
            for partial in (False, True):
                # The gradient of a Replicate is the same on all ranks, or with `partial` a term on each.
                given, grad_total = (grads[rank], sum(grads)) if partial else (g, g)

                y, grad = _vjp(ops.split, prepare(x), prepare(its_grad), dim, *at, partial)
                assert y.is_contiguous() and torch.equal(y, mine)
                assert torch.equal(grad, only_mine if partial else g)

                y, grad = _vjp(ops.gather, prepare(mine), prepare(given), dim, shape[dim], *at, partial)
                assert y.is_contiguous() and torch.equal(y, x)
                assert torch.equal(grad, _shard(grad_total, dim, ranks, rank))

                y, grad = _vjp(ops.reduce, prepare(terms[rank]), prepare(given), *at, partial)
                assert y.is_contiguous() and torch.equal(y, sum(terms))
                assert torch.equal(grad, grad_total)

            y, grad = _vjp(ops.reduce_scatter, prepare(terms[rank]), prepare(its_grad), dim, *at)
            assert y.is_contiguous() and y.dtype == dtype
            assert torch.equal(y, _shard(sum(terms), dim, ranks, rank))
            assert torch.equal(grad, g)


@in_both_ways
@pytest.mark.parametrize("ranks, shape, dim, _", CASES)
def test_split_gather_reduce_and_reduce_scatter_equal_one_process(world, ranks, shape, dim, _, way):
    world(ranks).run(_check_one_dim, shape, dim, way)


def _check_other_dtypes(rank, ranks, way="whole"):
    ops = WAYS[way]
    for shape in [(2, 8, 6), (2, 7, 5), (1, 3, 2)]:
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64):
            x = _whole(shape, dtype)
            mine = _shard(x, 1, ranks, rank)
            assert torch.equal(ops.switch(mine, 1, shape[1], 2, ranks, rank, _group()), _shard(x, 2, ranks, rank))
            assert torch.equal(ops.gather(mine, 1, shape[1], ranks, rank, _group()), x)
            assert torch.equal(ops.split(x, 1, ranks, rank, _group()), mine)
        x = _whole(shape, torch.int64)
        assert torch.equal(ops.reduce(x, ranks, rank, _group()), ranks * x)
        scattered = ops.reduce_scatter(x, 1, ranks, rank, _group())
        assert torch.equal(scattered, _shard(ranks * x, 1, ranks, rank)) and scattered.dtype == x.dtype


@in_both_ways
def test_bool_integer_and_complex_shards_move(world, way):
    world(2).run(_check_other_dtypes, way)
    world(3).run(_check_other_dtypes, way)


def _check_empty(rank, ranks, way="whole"):
    ops = WAYS[way]
    x = torch.zeros(2, 0, 4, requires_grad=True)
    assert ops.gather(x, 1, 0, ranks, rank, _group()).shape == (2, 0, 4)
    y = ops.switch(x, 1, 0, 2, ranks, rank, _group())
    assert y.shape == (2, 0, len(_shard(torch.arange(4), 0, ranks, rank)))
    y.sum().backward()
    assert x.grad.shape == x.shape


@in_both_ways
def test_a_tensor_without_elements_passes(world, way):
    world(2).run(_check_empty, way)


def _check_negative_dims(rank, ranks):
    x = _whole((4, 5, 6))
    switched = dsp.switch(_shard(x, 1, ranks, rank), -2, 5, -1, ranks, rank, _group())
    assert torch.equal(switched, _shard(x, 2, ranks, rank))
    assert torch.equal(dsp.gather(_shard(x, 2, ranks, rank), -1, 6, ranks, rank, _group()), x)


def test_negative_dims_count_from_the_end(world):
    world(2).run(_check_negative_dims)


def _check_subgroup(rank, ranks):
    members = [2, 1]
    group = torch.distributed.new_group(members)
    if rank not in members:
        return
    at = (2, torch.distributed.get_rank(group), group.group_name)
    x = _whole((2, 5, 7))
    with CountCollectives() as c:
        y = dsp.switch(_shard(x, 1, *at[:2]), 1, 5, 2, *at)
        torch.distributed.all_reduce(torch.zeros(4), group=group)
    assert torch.equal(y, _shard(x, 2, *at[:2]))
    assert c.bytes["all_reduce"] == 16
    torch.distributed.destroy_process_group(group)


def test_ranks_are_those_of_the_group_not_of_the_world(world):
    world(3).run(_check_subgroup)


# replicate


def _check_replicate(rank, ranks, dtypes):
    xs = [_whole((3, r + 2), d, seed=r).requires_grad_() for r, d in enumerate(dtypes)]
    xs.append(torch.ones(2))  # wants no gradient
    with CountCollectives() as c:
        ys = dsp.replicate(xs, ranks, rank, _group())
        assert all(torch.equal(x, y) for x, y in zip(xs, ys)) and ys[-1] is not None
        assert not ys[-1].requires_grad and not c.counts
        # The ranks do different work with all members but the last.
        used = ys[: max(len(dtypes) - 1, 1)]
        sum((y * (rank + i + 1)).float().sum() for i, y in enumerate(used)).backward()
    assert c.counts == {"all_reduce": len(set(dtypes[: len(used)]))}
    for i, x in enumerate(xs[: len(used)]):
        want = sum(r + i + 1 for r in range(ranks))
        assert torch.equal(x.grad, torch.full_like(x, want)), (i, x.grad)
    assert all(x.grad is None for x in xs[len(used) :])  # as on one device


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicate_sums_all_gradients_in_one_all_reduce_per_dtype(world, ranks):
    world(ranks).run(_check_replicate, [torch.float32] * 5)
    world(ranks).run(_check_replicate, [torch.float32, torch.bfloat16, torch.float32])
    world(ranks).run(_check_replicate, [torch.float32])


def _check_replicate_of_parameter(rank, ranks):
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
    x = _whole((7, 4))
    weight, bias = dsp.replicate([layer.weight, layer.bias], ranks, rank, _group())
    torch.nn.functional.linear(_shard(x, 0, ranks, rank), weight, bias).sum().backward()
    assert torch.equal(layer.weight.grad, x.sum(0).expand(3, 4))
    assert torch.equal(layer.bias.grad, torch.full((3,), 7.0))


def test_replicate_on_parameters_gives_the_gradients_of_one_device(world):
    world(3).run(_check_replicate_of_parameter)


def _check_replicate_of_different_losses(rank, ranks):
    xs = [torch.full((2, r + 1), 2.0, requires_grad=True) for r in range(ranks + 1)]
    ys = dsp.replicate(xs, ranks, rank, _group(), True)
    with CountCollectives() as c:
        (ys[rank].sum() * (rank + 1)).backward()  # every rank uses another member, and nobody the last
    assert c.counts == {"all_reduce": 1}
    for r, x in enumerate(xs):
        assert torch.equal(x.grad, torch.full_like(x, r + 1 if r < ranks else 0))


def test_replicate_with_materialize_sums_losses_that_differ_among_ranks(world):
    world(3).run(_check_replicate_of_different_losses)


# gradients of gradients


def _second_order(x, weight, compute):
    """Gradient of sum(weight * g * g), where g is the gradient of the sum of all cubes."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sum(y.pow(3).sum() for y in compute(x)), x, create_graph=True)
    (weight * grad * grad).sum().backward()
    return x.grad


def _check_double_backward(rank, ranks, size, way="whole"):
    ops = WAYS[way]
    at = (ranks, rank, _group())
    x, v = _whole((2, size, 3)).double(), _whole((2, size, 3), seed=1).double()
    scales = [_whole((2, size, 3), seed=5 + r).double() for r in range(ranks)]

    def mine(t):
        return _shard(t, 1, *at[:2])

    plain, scaled = _second_order(x, v, lambda x: [x]), _second_order(x, v, lambda x: [x * s for s in scales])
    for name, result, want in [
        ("switch", _second_order(mine(x), mine(v), lambda x: [ops.switch(x, 1, size, 2, *at)]), mine(plain)),
        ("split", _second_order(x, v, lambda x: [ops.gather(ops.split(x, 1, *at), 1, size, *at)]), plain),
        ("gather", _second_order(mine(x), mine(v), lambda x: [ops.gather(x, 1, size, *at)]), mine(plain)),
        (
            "gather, partial",
            _second_order(mine(x), mine(v), lambda x: [ops.gather(x, 1, size, *at, True) * scales[rank]]),
            mine(scaled),
        ),
        ("replicate", _second_order(x, v, lambda x: [ops.replicate([x, x], *at)[0] * scales[rank]]), scaled),
        ("replicate of one", _second_order(x, v, lambda x: [ops.replicate([x], *at)[0] * scales[rank]]), scaled),
        (
            "split, partial",  # each rank's slice is used by that rank alone
            _second_order(x, v, lambda x: [ops.split(ops.replicate([x], *at)[0], 1, *at, True)]),
            plain,
        ),
        (
            "reduce",
            _second_order(x, v, lambda x: [ops.reduce(ops.replicate([x], *at)[0] * scales[rank], *at)]),
            _second_order(x, v, lambda x: [sum(x * s for s in scales)]),
        ),
        (
            "reduce, partial",
            _second_order(
                x,
                v,
                lambda x: [ops.reduce(ops.replicate([x], *at)[0] * scales[rank], *at, True) * scales[rank]],
            ),
            _second_order(x, v, lambda x: [sum(x * s for s in scales) * t for t in scales]),
        ),
        (
            "reduce_scatter",
            _second_order(x, v, lambda x: [ops.reduce_scatter(ops.replicate([x], *at)[0] * scales[rank], 1, *at)]),
            _second_order(x, v, lambda x: [sum(x * s for s in scales)]),
        ),
    ]:
        assert torch.equal(result, want), (name, (result - want).abs().max())


@in_both_ways
@pytest.mark.parametrize("ranks, size", [(2, 4), (2, 5), (3, 4)])
def test_gradients_of_gradients_are_those_of_one_process(world, ranks, size, way):
    world(ranks).run(_check_double_backward, size, way)


# in two halves


def _check_order(rank, ranks):
    arguments = (1, 5, 2, ranks, rank, _group())
    x, other = _shard(_whole((2, 5, 4)), 1, ranks, rank).requires_grad_(), _whole((3, 3)).requires_grad_()
    with RunOrder() as forward:
        coming, flight = dsp.start_switch(x, *arguments)
        between = other.sin()
        y = dsp.wait_switch(coming, flight, *arguments)
    with RunOrder() as backward:
        torch.autograd.backward([y, between], [torch.ones_like(y), torch.ones_like(between)])
    for ran, work in ((forward.ran, "sin"), (backward.ran, "cos")):
        assert ran.index("all_to_all_single") < ran.index(work) < ran.index("wait_tensor")
    assert coming.untyped_storage().nbytes() == x.element_size()


def test_work_between_the_halves_runs_while_the_collective_is_under_way_in_backward_too(world):
    world(2).run(_check_order)


def _check_anomaly(rank, ranks):
    with torch.autograd.detect_anomaly(check_nan=True):
        _check_one_dim(rank, ranks, (2, 7, 5), 1, "in halves")


def test_anomaly_detection_never_looks_at_what_is_on_its_way(world):
    world(2).run(_check_anomaly)


def _change_results(rank, ranks, batch, dtype, way):
    """The names of what may not be changed in place, or is not changed right."""
    ops, failed = WAYS[way], []
    x = torch.ones(batch, 8, 12, dtype=dtype, requires_grad=True)
    mine = torch.ones(batch, 8 // ranks, 12, dtype=dtype, requires_grad=True)
    for name, fn in {
        "switch": lambda: ops.switch(mine, 1, 8, 2, ranks, rank, _group()),
        "split": lambda: ops.split(x, 1, ranks, rank, _group()),
        "gather": lambda: ops.gather(mine, 1, 8, ranks, rank, _group()),
        "gather, uneven": lambda: ops.gather(_shard(x, 2, ranks, rank), 2, 12, ranks, rank, _group()),
        "reduce": lambda: ops.reduce(x, ranks, rank, _group()),
        "reduce_scatter": lambda: ops.reduce_scatter(x, 1, ranks, rank, _group()),
        "halo": lambda: ops.halo(mine, 1, [8 // ranks] * ranks, [0] * ranks, [8] * ranks, ranks, rank, _group()),
    }.items():
        for wanted in (True, False):
            with torch.set_grad_enabled(wanted):
                made = fn()
                if made._is_view() or not torch.equal(made.mul_(2), 2 * fn()):
                    failed.append(f"{name}, gradient {wanted}")
    return failed


@in_both_ways
@pytest.mark.parametrize("batch, dtype", [(1, torch.float32), (2, torch.float32), (1, torch.complex64)])
def test_results_are_no_views_so_that_they_can_be_changed_and_detached_in_place(world, batch, dtype, way):
    assert world(2).run(_change_results, batch, dtype, way) == [[], []]


# wire bytes


def _count_bytes(rank, ranks):
    counted = {}
    x = torch.zeros(4, 8, 12, requires_grad=True)  # M = 1536 bytes
    mine = torch.zeros(4, 8 // ranks, 12, requires_grad=True)
    for name, fn in {
        "switch": lambda: dsp.switch(mine, 1, 8, 2, ranks, rank, _group()),
        "split": lambda: dsp.split(x, 1, ranks, rank, _group()),
        "split, partial": lambda: dsp.split(x, 1, ranks, rank, _group(), True),
        "gather": lambda: dsp.gather(mine, 1, 8, ranks, rank, _group()),
        "gather, partial": lambda: dsp.gather(mine, 1, 8, ranks, rank, _group(), True),
        "reduce": lambda: dsp.reduce(x, ranks, rank, _group()),
        "reduce, partial": lambda: dsp.reduce(x, ranks, rank, _group(), True),
        "reduce_scatter": lambda: dsp.reduce_scatter(x, 1, ranks, rank, _group()),
        "replicate": lambda: dsp.replicate([x], ranks, rank, _group())[0],
    }.items():
        with CountCollectives() as c:
            fn().sum().backward()
        primitive = name.split(",")[0]
        assert c.total_bytes == sum(b for _, b in c.by_primitive.values())
        counted[name] = [c.by_primitive.get((primitive, way), (0, 0.0))[1] for way in ("forward", "backward")]
    return counted


@pytest.mark.parametrize("ranks", [2, 4])
def test_measured_wire_bytes_are_those_of_the_design(world, ranks):
    M, share = 4 * 8 * 12 * 4, (ranks - 1) / ranks
    for counted in world(ranks).run(_count_bytes):
        assert counted == {
            "switch": [M / ranks * share, M / ranks * share],
            "split": [0, M * share],
            "split, partial": [0, 0],
            "gather": [M * share, 0],
            "gather, partial": [M * share, M * share],
            "reduce": [2 * M * share, 0],
            "reduce, partial": [2 * M * share, 2 * M * share],
            "reduce_scatter": [M * share, M * share],
            "replicate": [0, 2 * M * share],
        }


def _count_uneven_bytes(rank, ranks):
    sent = []
    with CountCollectives() as c:
        mine = _shard(torch.zeros(2, 51, 7), 1, ranks, rank)
        dsp.switch(mine, 1, 51, 2, ranks, rank, _group())
        sent.append(c.total_bytes)
        dsp.gather(mine, 1, 51, ranks, rank, _group())
        sent.append(c.total_bytes - sum(sent))
        dsp.reduce_scatter(torch.zeros(2, 51, 7), 1, ranks, rank, _group())
        sent.append(c.total_bytes - sum(sent))
    return sent


def test_uneven_shards_send_no_padding(world):
    switched, gathered, scattered = (sum(b) for b in zip(*world(4).run(_count_uneven_bytes)))
    T, S = shard_sizes(51, 4), shard_sizes(7, 4)
    stays = sum(t * s for t, s in zip(T, S))
    assert switched == (51 * 7 - stays) * 2 * 4
    assert gathered == scattered == 51 * 7 * 2 * 4 * 3  # (N-1)/N of N tensors


def _count_plain(rank, ranks):
    x = torch.zeros(8)
    with CountCollectives() as c:
        torch.distributed.all_reduce(x)
        torch.distributed.all_gather_into_tensor(torch.zeros(8 * ranks), x)
        torch.distributed.all_to_all_single(torch.empty(8), x)
        torch.distributed.broadcast(x, 0)
        torch.distributed.barrier()
    torch.distributed.all_reduce(x)  # outside: not counted
    return c.counts, c.bytes, c.by_primitive


def test_plain_collectives_are_counted_but_belong_to_no_primitive(world):
    for counts, sent, by_primitive in world(2).run(_count_plain):
        assert counts == {
            "all_reduce": 1,
            "all_gather_into_tensor": 1,
            "all_to_all_single": 1,
            "broadcast": 1,
        }
        assert sent == {
            "all_reduce": 32,
            "all_gather_into_tensor": 32,
            "all_to_all_single": 16,
            "broadcast": 16,
        }
        assert by_primitive == {}


# fake tensors, graphs, compilers


def test_fake_tensors_need_no_process_group():
    assert not torch.distributed.is_initialized()
    with FakeTensorMode():
        for rank in range(4):
            mine = torch.empty(2, shard_range(51, 4, rank)[1], 6, 5, requires_grad=True)
            y = dsp.switch(mine, 1, 51, 2, 4, rank, GROUP)
            assert y.shape == (2, 51, shard_range(6, 4, rank)[1], 5) and y.is_contiguous()
            y.sum().backward()
            assert mine.grad.shape == mine.shape
            shard = shard_range(51, 4, rank)[1]
            for partial in (False, True):
                x = torch.empty(2, 51, 6, requires_grad=True)
                mine = torch.empty(2, shard, 6, requires_grad=True)
                for given, y, shape in [
                    (x, dsp.split(x, 1, 4, rank, GROUP, partial), (2, shard, 6)),
                    (mine, dsp.gather(mine, 1, 51, 4, rank, GROUP, partial), (2, 51, 6)),
                    (x, dsp.reduce(x, 4, rank, GROUP, partial), (2, 51, 6)),
                    (x, dsp.reduce_scatter(x, 2, 4, rank, GROUP), (2, 51, shard_range(6, 4, rank)[1])),
                    (x, dsp.replicate([mine, x], 4, rank, GROUP)[1], (2, 51, 6)),
                ]:
                    assert y.shape == shape
                    y.sum().backward()
                    assert given.grad.shape == given.shape


class _Switcher(torch.nn.Module):
    def forward(self, x):
        return dsp.switch(x * 2, 1, 51, 2, 4, 0, GROUP).relu()


def test_a_captured_graph_keeps_and_prints_the_primitive():
    exported = torch.export.export(_Switcher(), (torch.randn(1, 13, 6),), strict=False)
    for graph in (exported.graph, exported.run_decompositions({}).graph):
        assert "torch.ops.dsp.switch.default](args = (%mul, 1, [51], 2, 4, 0, default_pg)" in str(graph)


def _all_primitives(x, scale, ranks, rank, group, way="whole"):
    """x [B, T/N, S] -> [B, T, S/N]; passes through every primitive, uneven or not."""
    ops = WAYS[way]
    (scale,) = dsp.replicate([scale], ranks, rank, group, True)
    y = ops.switch(x * scale, 1, 7, 2, ranks, rank, group).sin()
    y = ops.gather(y, 2, 6, ranks, rank, group, True)
    y = ops.reduce(y.cos(), ranks, rank, group, True)
    y = ops.reduce_scatter(y * (rank + 1), 1, ranks, rank, group)
    y = ops.gather(y.sin(), 1, 7, ranks, rank, group)
    return dsp.split(y * y, 2, ranks, rank, group)


def _check_compiled(rank, ranks, backend, way="whole"):
    torch.compiler.reset()
    graphs = []

    def keep(module, _):
        graphs.append([str(n.target) for n in module.graph.nodes if n.op == "call_function"])
        return make_boxed_func(module.forward)

    if backend == "kept":  # aot_eager, but showing its graphs
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(_all_primitives, backend=backend, fullgraph=True)
    whole = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for fn in (_all_primitives, compiled):
        x = _shard(whole, 1, ranks, rank).clone().requires_grad_()
        scale = torch.ones(6, requires_grad=True)
        y = fn(x, scale, ranks, rank, _group(), way)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, scale.grad))
    for eager, got in zip(*results):
        torch.testing.assert_close(got, eager)
    return graphs


@in_both_ways
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "kept"])
def test_compiled_graphs_are_whole_and_equal_eager(world, backend, way):
    world(2).run(_check_compiled, backend, way)


@in_both_ways
def test_compiled_graphs_show_functional_collectives_and_their_waits(world, way):
    expected = [
        {"all_to_all_single": 3, "all_gather_into_tensor": 1, "all_reduce": 1},
        {"all_to_all_single": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2},
    ]
    for graphs in world(2).run(_check_compiled, "kept", way):
        for targets, collectives in zip(graphs, expected, strict=True):
            seen = Counter(t.removeprefix("_c10d_functional.") for t in targets if "c10d" in t)
            waits = sum(collectives.values())
            assert seen == {f"{c}.default": n for c, n in collectives.items()} | {"wait_tensor.default": waits}
            assert not any(t.startswith("dsp.") for t in targets)


def _check_dynamic(rank, ranks):
    torch.compiler.reset()
    at = (ranks, rank, _group())

    def fn(x):
        y = dsp.gather(dsp.switch(x.sin(), 1, 5, 2, *at).cos(), 2, 7, *at, True)
        return dsp.reduce_scatter(y * y, 1, *at)

    compiled = torch.compile(fn, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in (4, 6, 9):  # sizes that stand for nothing else: the compiler takes equal ones for the same
        mine = _shard(_whole((batch, 5, 7)), 1, ranks, rank)
        eager, dynamic = mine.clone().requires_grad_(), mine.clone().requires_grad_()
        fn(eager).sum().backward()
        with torch.compiler.set_stance("fail_on_recompile" if batch > 4 else "default"):
            compiled(dynamic).sum().backward()
        torch.testing.assert_close(dynamic.grad, eager.grad)


def test_a_dynamic_batch_is_compiled_once(world):
    world(2).run(_check_dynamic)


def _check_modes(rank, ranks, way="whole"):
    ops = WAYS[way]
    mine = _shard(_whole((2, 5, 4)), 1, ranks, rank)
    switch = (1, 5, 2, ranks, rank, _group())
    with torch.inference_mode():
        assert torch.equal(ops.switch(mine, *switch), _shard(_whole((2, 5, 4)), 2, ranks, rank))
    with torch.no_grad():
        assert not ops.switch(mine.clone().requires_grad_(), *switch).requires_grad
    x = mine.clone().requires_grad_()
    with CountCollectives() as c:
        y = torch.utils.checkpoint.checkpoint(lambda x: ops.switch(x.sin(), *switch).cos(), x, use_reentrant=False)
        y.sum().backward()
    # under a checkpoint the forward runs twice, its collectives included
    assert {k: n for k, (n, _) in c.by_primitive.items()} == {
        ("switch", "forward"): 2,
        ("switch", "backward"): 1,
    }


@in_both_ways
def test_inference_mode_no_grad_and_checkpoints_work(world, way):
    world(2).run(_check_modes, way)


# what is refused


def test_one_rank_returns_its_input():
    x = torch.ones(2, 3)
    assert dsp.switch(x, 0, 2, 1, 1, 0, GROUP) is x
    assert dsp.gather(x, 0, 2, 1, 0, GROUP) is x
    assert dsp.split(x, 0, 1, 0, GROUP) is x
    assert dsp.reduce(x, 1, 0, GROUP) is x
    assert dsp.reduce_scatter(x, 0, 1, 0, GROUP) is x
    assert dsp.replicate([x], 1, 0, GROUP)[0] is x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: dsp.switch(x, 0, 4, 0, 2, 0, GROUP), "both 0"),
        (lambda x: dsp.switch(x, 0, 5, 1, 2, 0, GROUP), "rank 0 of 2 holds 3 of 5"),
        (lambda x: dsp.switch(x, 0, 4, 2, 2, 0, GROUP), "no dim 2"),
        (lambda x: dsp.gather(x, -3, 4, 2, 0, GROUP), "no dim -3"),
        (lambda x: dsp.gather(x, 0, -4, 2, 0, GROUP), "cannot have -4"),
        (lambda x: dsp.split(x, 0, 2, 2, GROUP), "rank 2 is not one of 2"),
        (lambda x: dsp.replicate([x], 0, 0, GROUP), "rank 0 is not one of 0"),
        (lambda x: dsp.reduce(x.bool(), 2, 0, GROUP), "cannot be a partial sum"),
        (lambda x: dsp.reduce_scatter(x.bool(), 0, 2, 0, GROUP), "cannot be a partial sum"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_collective(call, message):
    with pytest.raises(LayoutError, match=message):
        call(torch.ones(2, 3))
