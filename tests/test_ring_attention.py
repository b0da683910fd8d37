"""Ring attention computes what scaled_dot_product_attention does on one device, outputs and gradients, however the ranks
hold queries and keys, and sends what `ring_traffic` says."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto.ring_attention as ring
from dsp_auto import simulate
from dsp_auto.errors import DspError, LayoutError
from dsp_auto.measure import CountCollectives

dsp = torch.ops.dsp

# How many queries, and keys, each rank holds.
EVEN = {n: ([4] * n, [4] * n) for n in (2, 3, 4)}
UNEVEN = {2: ([5, 2], [3, 4]), 3: ([1, 6, 3], [4, 4, 2]), 4: ([3, 3, 2, 2], [3, 3, 2, 2])}
EMPTY = {2: ([0, 5], [5, 0]), 3: ([4, 0, 3], [0, 2, 5]), 4: ([2, 0, 0, 1], [0, 3, 0, 0])}
CROSS = {2: ([4, 3], [2, 9]), 3: ([2, 2, 1], [5, 5, 4]), 4: ([6, 6, 5, 5], [2, 1, 1, 1])}
HELD = [held for kind in (EVEN, UNEVEN, EMPTY, CROSS) for held in kind.values()]


def _random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _tensors(held, leading=(2, 2), heads=(), dim=4, v_dim=None, dtype=torch.float64, keys_leading=None):
    queries, keys = map(sum, held)
    keys_leading = leading if keys_leading is None else keys_leading
    return [
        _random(*leading, queries, dim, dtype=dtype),
        _random(*keys_leading, keys, dim, dtype=dtype, seed=1),
        _random(*keys_leading, keys, v_dim or dim, dtype=dtype, seed=2),
    ]


def _parts(x, lengths):
    return list(x.split(list(lengths), -2))


def _reference(q, k, v, mask, weight, is_causal=False, scale=None, enable_gqa=False, kernels=None):
    """On one device: the output and the gradients of what wants one."""
    leaves = [None if x is None else x.detach().clone() for x in (q, k, v, mask)]
    for x, given in zip(leaves, (q, k, v, mask)):
        if x is not None and x.is_floating_point() and given.requires_grad:
            x.requires_grad_()
    out = F.scaled_dot_product_attention(*leaves, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, weight)) if wanted else iter(())
    return [out.detach(), *(next(found) if x is not None and x.requires_grad else None for x in leaves)]


def _on_rank(rank, ranks, group, given, held, weight, is_causal=False, scale=None, enable_gqa=False):
    """On one of the ranks: the output and the gradients of what wants one, and what was counted."""
    queries, keys = held
    q, k, v, mask = given
    rows = None
    if mask is not None:
        rows = mask if mask.ndim < 2 or mask.shape[-2] == 1 else _parts(mask, queries)[rank]
    whole = (_parts(q, queries)[rank], _parts(k, keys)[rank], _parts(v, keys)[rank], rows)
    local = [None if x is None else x.detach().clone() for x in whole]
    for x, one in zip(local, given):
        if x is not None and one.requires_grad:
            x.requires_grad_()
    with CountCollectives() as count:
        out = dsp.ring_attention(*local, queries, keys, is_causal, scale, enable_gqa, ranks, rank, group)
        wanted = [x for x in local if x is not None and x.requires_grad]
        mine = _parts(weight, queries)[rank]
        found = iter(torch.autograd.grad(out, wanted, mine)) if wanted else iter(())
    grads = [next(found) if x is not None and x.requires_grad else None for x in local]
    return [out.detach(), *grads], dict(count.by_primitive)


def _joined(results, mask):
    """What one device would have of what the ranks have."""
    whole = []
    for n, parts in enumerate(zip(*results)):
        if parts[0] is None:
            whole.append(None)
        elif n == 4 and mask.shape[-2] == 1:  # every rank's rows give it a term
            whole.append(sum(parts))
        else:
            whole.append(torch.cat(parts, -2))
    return whole


_TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 4e-2)}


def _close(found, expected, dtype):
    for n, (a, b) in enumerate(zip(found, expected)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            size = max(b.double().abs().max().item(), 1e-3) if b.numel() else 1.0
            assert error <= _TOLERANCE[dtype][n > 0] * size, (n, error, size)


def _check(held, given, wanted=(True, True, True, True), **options):
    """Simulated ranks give what one device does. Returns what each rank counted."""
    ranks = len(held[0])
    given = [*given, None][:4]
    for x, want in zip(given, wanted):
        if x is not None and x.is_floating_point():
            x.requires_grad_(want)
    out_shape = [*torch.broadcast_shapes(*(x.shape[:-2] for x in given[:1])), sum(held[0]), given[2].shape[-1]]
    weight = _random(*out_shape, dtype=given[0].dtype, seed=9)
    expected = _reference(*given, weight, **options)
    found = simulate.run(ranks, lambda rank: _on_rank(rank, ranks, "line", given, held, weight, **options))
    _close(_joined([result for result, _ in found], given[3]), expected, given[0].dtype)
    return [count for _, count in found]


# The same as on one device


@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_ring_attention_is_attention_on_one_device(held, is_causal):
    for dtype in (torch.float64, torch.float32):
        _check(held, _tensors(held, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_is_merged_in_float32(is_causal):
    held = UNEVEN[4]
    _check(held, _tensors(held, dtype=torch.bfloat16), is_causal=is_causal)
    # Beside float64, no worse than one device.
    q, k, v = _tensors(([16] * 4,) * 2, dtype=torch.bfloat16)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal)
    held, weight = ([16] * 4,) * 2, torch.zeros_like(q)
    found = simulate.run(4, lambda rank: _on_rank(rank, 4, "line", (q, k, v, None), held, weight, is_causal)[0][0])
    one = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert (torch.cat(found, -2) - exact).abs().mean() <= 1.5 * (one - exact).abs().mean()


def _masks(held):
    queries, keys = map(sum, held)
    seen = torch.rand(2, 2, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.6
    seen[..., 0] = True
    return {
        "bool": seen,
        "bool, one for all heads": seen[:, :1],
        "bool, some rows see nothing": seen & (torch.arange(queries) % 3 != 1)[:, None],
        "bool, padded keys": seen[:1, :1, :1],
        "two dims": seen[0, 0],
        "bool, one for all keys": (torch.arange(queries) % 2 == 0)[:, None],
        "float": _random(2, 2, queries, keys, seed=6),
        "float, one for all queries": _random(2, 1, 1, keys, seed=6),
        "float, one for the batch": _random(2, queries, keys, seed=6),
        "float, one for all keys": _random(2, 2, queries, 1, seed=6),
        "float, some rows see nothing": torch.zeros(2, 2, queries, keys, dtype=torch.float64).masked_fill(
            ~seen | (torch.arange(queries) % 3 == 1)[:, None], -torch.inf
        ),
    }


@pytest.mark.parametrize("name", _masks(EVEN[2]))
def test_masks_mean_what_they_do_on_one_device(name):
    for held in (EVEN[2], UNEVEN[3], EMPTY[3], CROSS[4]):
        mask = _masks(held)[name]
        _check(held, [*_tensors(held), mask], (True, True, True, False))
        if mask.is_floating_point() and "nothing" not in name:  # its gradient
            _check(held, [*_tensors(held), mask.clone()])
            _check(held, [*_tensors(held), mask.clone()], (False, False, False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowest", ["-1e9", "-1e4", "lowest"])
def test_rows_that_a_finite_mask_hides_are_the_mean_of_the_values_or_attention_as_on_one_device(dtype, lowest):
    # Beside such numbers the sum of a row's weights is lost: merged by it alone, blocks would count for twice as much.
    held = ([3, 4, 2], [5, 1, 3])
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e9)
    mask[::4] = torch.finfo(torch.float32).min if lowest == "lowest" else float(lowest)
    q, k, v = _tensors(held, dtype=dtype)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    found = simulate.run(3, lambda rank: _on_rank(rank, 3, "line", (q, k, v, mask), held, torch.zeros_like(q))[0][0])
    rounding = (
        2e-2 if dtype == torch.bfloat16 else 1e-5 if lowest != "-1e4" else 1e-3
    )  # a score beside -1e4 has 3 digits
    assert (torch.cat(found, -2) - expected).abs().max() <= rounding


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_grouped_queries_share_heads_of_keys_that_travel_once(is_causal, with_mask):
    for held in (EVEN[2], UNEVEN[3]):
        q, k, v = _tensors(held, leading=(2, 6), keys_leading=(2, 2))
        mask = _random(2, 6, sum(held[0]), sum(held[1]), seed=7) if with_mask and not is_causal else None
        counts = _check(held, [q, k, v, mask], enable_gqa=True, is_causal=is_causal)
        traffic = _traffic(held, (q, k, v), is_causal, mask_grad=mask is not None)
        assert sum(count["ring", "forward"][1] for count in counts) == traffic.forward_bytes * len(held[0])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_values_dim_the_scale_and_the_number_of_dims_may_be_any(is_causal):
    held = UNEVEN[3]
    _check(held, _tensors(held, v_dim=7), is_causal=is_causal)
    _check(held, _tensors(held), is_causal=is_causal, scale=0.3)
    for leading in ((), (3,), (2, 1, 3), (2, 1, 2, 3)):
        _check(held, _tensors(held, leading=leading), is_causal=is_causal)
    _check(held, _tensors(held, leading=(2, 3), keys_leading=(1, 3)), is_causal=is_causal)
    _check(held, _tensors(held, leading=(2, 3), keys_leading=(3,)), is_causal=is_causal)
    if not is_causal:
        for shape in ((10, 10), (3, 1, 10), (1, 3, 10, 10), (2, 1, 3, 1, 10), (2, 2, 3, 10, 10)):
            leading = (2, 2, 3)
            _check(held, [*_tensors(held, leading=leading), _random(*shape, seed=4)])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("is_causal", [False, True])
def test_only_wanted_gradients_are_made_and_sent(wanted, is_causal):
    held = UNEVEN[3]
    tensors = _tensors(held, v_dim=5)
    counts = _check(held, tensors, (*wanted, False), is_causal=is_causal)
    traffic = _traffic(held, tensors, is_causal, grads=wanted)
    backward = [count.get(("ring", "backward"), (0, 0)) for count in counts]
    assert {count for count, _ in backward} == {traffic.backward_collectives}
    assert sum(sent for _, sent in backward) == pytest.approx(traffic.backward_bytes * 3, abs=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_inputs_and_gradients_may_have_any_strides(is_causal):
    held = UNEVEN[2]
    whole = _tensors(held, dtype=torch.float32)

    def program(rank):
        local = [_parts(x, lengths)[rank].mT.contiguous().mT for x, lengths in zip(whole, (held[0], *[held[1]] * 2))]
        local = [x.requires_grad_() for x in local]
        out = dsp.ring_attention(*local, None, *held, is_causal, None, False, 2, rank, "line")
        assert out.is_contiguous()
        return [out.detach(), *torch.autograd.grad(out.sum(), local), None]  # of a sum: one number, expanded

    expected = _reference(*(x.requires_grad_() for x in whole), None, torch.ones_like(whole[0]), is_causal)
    _close(_joined(simulate.run(2, program), None), expected, torch.float32)


def test_one_rank_runs_attention_itself():
    q, k, v = _tensors(([5], [5]))
    out = dsp.ring_attention(q, k, v, None, [5], [5], True, None, False, 1, 0, "g")
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


# What is sent and computed


def _traffic(held, tensors, is_causal, grads=(True, True, True), mask_grad=False):
    q, k, v = tensors[:3]
    q_row, k_row, v_row = (x[..., :1, :].numel() * x.element_size() for x in (q, k, v))
    o_row = q_row // q.shape[-1] * v.shape[-1]
    rows = {"q_row": q_row, "k_row": k_row, "v_row": v_row, "o_row": o_row}
    return ring.ring_traffic(*held, **rows, is_causal=is_causal, grads=grads, mask_grad=mask_grad)


@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_ring_traffic_is_what_is_sent(held, is_causal):
    ranks = len(held[0])
    tensors = _tensors(held, v_dim=6)
    counts = _check(held, tensors, is_causal=is_causal)
    traffic = _traffic(held, tensors, is_causal)
    for way, sent, collectives in (
        ("forward", traffic.forward_bytes, traffic.forward_collectives),
        ("backward", traffic.backward_bytes, traffic.backward_collectives),
    ):
        assert {count.get(("ring", way), (0, 0))[0] for count in counts} == {collectives}
        assert sum(count.get(("ring", way), (0, 0))[1] for count in counts) == pytest.approx(sent * ranks, abs=1e-6)


def test_keys_and_values_go_round_once_and_their_gradients_straight_home():
    traffic = ring.ring_traffic(
        [4] * 4, [4] * 4, q_row=8, k_row=8, v_row=8, o_row=8, is_causal=False, grads=(True,) * 3
    )
    shard = 4 * 16
    assert traffic == (3 * shard, 6 * shard, 3, 6)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_a_causal_mask_leaves_every_rank_the_same_area_but_for_a_row_of_each_of_its_chunks(ranks, extra):
    size = 12 * ranks + extra
    held = tuple(len(part) for part in torch.arange(size).tensor_split(ranks))
    schedule = ring._schedule(held, held, True)
    areas = []
    for rank in range(ranks):
        rows = [n for start, stop in schedule.queries.spans(rank) for n in range(start, stop)]
        areas.append(sum(n + 1 for n in rows))
    assert sum(areas) == size * (size + 1) // 2
    assert max(areas) - sum(areas) / ranks <= (2 * size if extra else 0)  # either chunk may be a row longer
    # Nothing is computed but what is seen, and nothing sent to whom it is hidden for ever.
    for rank, other in itertools.product(range(ranks), repeat=2):
        for i, key in enumerate(schedule.keys.spans(other)):
            seen = any(schedule.sees(query, key) for query in schedule.queries.spans(rank))
            assert seen == (i in schedule.seen(rank, other))
            assert not seen or rank == other or i in schedule.coming(rank, (rank - other) % ranks)
        for i, far in enumerate(schedule.travels[other]):
            assert far == 0 or i in schedule.seen((other + far) % ranks, other)


def test_the_next_keys_are_under_way_while_the_present_ones_are_computed(monkeypatch):
    happened: list[list[str]] = [[], [], []]

    def logged(name, run):
        return lambda *args: (happened[simulate._here.rank].append(name), run(*args))[1]

    for name in ("issue", "_attend", "_attend_backward"):
        monkeypatch.setattr(ring, name, logged(name, getattr(ring, name)))
    _check(EVEN[3], _tensors(EVEN[3]))
    forward = ["issue", "_attend", "issue", "_attend", "_attend"]
    # Then gradients go home while the next block is computed.
    backward = ["issue", "_attend_backward", "issue", "_attend_backward", "issue", "_attend_backward", "issue"]
    assert happened == [forward + backward] * 3


# Fake tensors, compilers, processes


@pytest.mark.parametrize("is_causal", [False, True])
def test_ring_attention_runs_on_fake_tensors_without_a_group(is_causal):
    held = UNEVEN[3]
    for dtype, v_dim in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 7)):
        with FakeTensorMode() as mode, CountCollectives() as count:
            q, k, v = (mode.from_tensor(x[..., :4, :]) for x in _tensors(held, dtype=dtype, v_dim=v_dim))
            q = q[..., :1, :]
            local = [x.detach().requires_grad_() for x in (q, k, v)]
            out = dsp.ring_attention(*local, None, *held, is_causal, None, False, 3, 0, "g")
            assert out.shape == (2, 2, 1, v_dim or 4) and out.dtype == dtype
            grads = torch.autograd.grad(out.sum(), local)
            assert [x.shape for x in grads] == [x.shape for x in local]
        traffic = _traffic(held, (q, k, v), is_causal)
        found = [count.by_primitive["ring", way][0] for way in ("forward", "backward")]
        assert found == [traffic.forward_collectives, traffic.backward_collectives]


def _in_a_process(rank, ranks, cases):
    group = torch.distributed.group.WORLD.group_name
    return [_on_rank(rank, ranks, group, *case) for case in cases]


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_find_what_one_device_does(world, ranks):
    cases = []
    for kind, is_causal, dtype in (
        (EVEN, False, torch.float32),
        (EVEN, True, torch.bfloat16),
        (UNEVEN, True, torch.float32),
        (EMPTY, True, torch.float32),
        (CROSS, False, torch.bfloat16),
    ):
        held = kind[ranks]
        given = [*(x.requires_grad_() for x in _tensors(held, dtype=dtype)), None]
        weight = _random(2, 2, sum(held[0]), 4, dtype=dtype, seed=9)
        cases.append((given, held, weight, is_causal))
    found = world(ranks).run(_in_a_process, cases)
    for n, (given, held, weight, is_causal) in enumerate(cases):
        expected = _reference(*given, weight, is_causal)
        _close(_joined([rank[n][0] for rank in found], None), expected, given[0].dtype)
        traffic = _traffic(held, given, is_causal)
        sent = [sum(rank[n][1].get(("ring", way), (0, 0))[1] for rank in found) for way in ("forward", "backward")]
        assert sent == pytest.approx([traffic.forward_bytes * ranks, traffic.backward_bytes * ranks], abs=1e-6)


def _compiled(rank, ranks):
    held, group = UNEVEN[2], torch.distributed.group.WORLD.group_name
    equal = []
    for is_causal in (False, True):

        def attend(q, k, v, is_causal=is_causal):
            return dsp.ring_attention(q.sin(), k, v, None, *held, is_causal, None, False, ranks, rank, group).cos()

        q, k, v = _tensors(held)
        local = [_parts(q, held[0])[rank], _parts(k, held[1])[rank], _parts(v, held[1])[rank]]
        results = []
        for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            leaves = [x.detach().clone().requires_grad_() for x in local]
            out = run(*leaves)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        equal.append(all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results)))
    return equal


def test_ring_attention_compiles_whole(world):
    assert world(2).run(_compiled) == [[True, True]] * 2


# Errors, and what of torch is private


@pytest.mark.parametrize("is_linear", [False, True])  # the gradient that arrives wants none itself
def test_gradients_of_gradients_are_an_error(is_linear):
    held = EVEN[2]

    def program(rank):
        q, k, v = (_parts(x, held[0])[rank].requires_grad_() for x in _tensors(held))
        out = dsp.ring_attention(q, k, v, None, *held, False, None, False, 2, rank, "line")
        with pytest.raises(DspError, match="without ring attention"):
            torch.autograd.grad((out if is_linear else out.pow(2)).sum(), q, create_graph=True)

    simulate.run(2, program)


_Q, _K = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "lengths", "is_causal", "gqa", "says"),
    [
        (_Q, _K, _K, None, ([3], [5, 5]), False, False, "not one length for each"),
        (_Q, _K, _K, None, ([3, -1], [5, 5]), False, False, "not one length for each"),
        (_Q, _K, _K, None, ([3] * 3, [5] * 3), False, False, "3 lengths for 2 ranks"),
        (_Q, _K, _K, None, ([4, 2], [5, 5]), False, False, "should hold 4 queries and 5 keys"),
        (_Q, _K, _K[..., :4, :], None, ([3, 2], [5, 5]), False, False, "should hold 3 queries and 5 keys"),
        (_Q, _K[..., :3], _K, None, ([3, 2], [5, 5]), False, False, r"not \[... s d\]"),
        (_Q, _K.double(), _K, None, ([3, 2], [5, 5]), False, False, "one floating point dtype"),
        (_Q.int(), _K.int(), _K.int(), None, ([3, 2], [5, 5]), False, False, "one floating point dtype"),
        (_Q, _K.expand(3, 2, 2, 5, 4)[:, 0], _K, None, ([3, 2], [5, 5]), False, False, "do not broadcast"),
        (_Q, _K.repeat(1, 2, 1, 1), _K.repeat(1, 2, 1, 1), None, ([3, 2], [5, 5]), False, True, "a multiple"),
        (_Q, _K, _K, torch.zeros(3, 5), ([3, 2], [5, 5]), False, False, "does not broadcast"),
        (_Q, _K, _K, torch.zeros(3, 10, dtype=torch.int), ([3, 2], [5, 5]), False, False, "bool or floating"),
        (_Q, _K, _K, torch.zeros(3, 10), ([3, 2], [5, 5]), True, False, "both a mask and is_causal"),
    ],
)
def test_ring_attention_refuses_what_does_not_fit(q, k, v, mask, lengths, is_causal, gqa, says):
    with pytest.raises(LayoutError, match=says):
        dsp.ring_attention(q, k, v, mask, *lengths, is_causal, None, gqa, 2, 0, "g")


def _blocks(device, dtype):
    for shape, triangle in (((6, 6), True), ((6, 9), False)):
        q, k, v = (_random(2, 3, n, 8, seed=s).to(device, dtype) for s, n in enumerate((shape[0], shape[1], shape[1])))
        yield q, k, v, None, triangle
    seen = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., 2, :] = False
    yield q, k, v, ring._hiding(seen.to(device), q), False


_KERNELS = [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]
_KERNELS += [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("device", "dtype"), _KERNELS)
def test_private_kernels_of_torch_say_what_the_formula_does(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    for q, k, v, bias, triangle in _blocks(device, dtype):
        assert ring._kernel(q, k, v, bias, triangle) is not None
        found, expected = (attend(q, k, v, bias, triangle, 0.5) for attend in (ring._attend, ring._plain))
        torch.testing.assert_close(found[0].to(expected[0].dtype), expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=tolerance)
        # As if of more keys: another output, and a larger sum of weights.
        out, lse = found[0].to(dtype) * 0.7, ring._finite(expected[1]) + 0.4
        block = (_random(*q.shape, seed=8).to(q), q, k, v, out, lse, bias, triangle, 0.5)
        for a, b in zip(ring._attend_backward(*block), ring._plain_backward(*block)[:3], strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, atol=tolerance, rtol=tolerance)


def test_private_kernels_of_torch_for_gpus_take_and_give_what_is_expected():
    q, k, v = (torch.empty(2, 3, n, 8, device="meta", dtype=torch.bfloat16) for n in (40, 24, 24))
    lse, bias = torch.empty(2, 3, 40, device="meta"), torch.empty(1, 1, 40, 24, device="meta", dtype=torch.bfloat16)
    for kernel, added in ((ring._FLASH, None), (ring._EFFICIENT, None), (ring._EFFICIENT, bias)):
        out, found = kernel.forward(q, k, v, added, False, 0.5)
        assert (out.shape, found.shape, found.dtype) == (q.shape, lse.shape, torch.float32)
        grads = kernel.backward(out, q, k, v, out, lse, added, False, 0.5)
        assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
