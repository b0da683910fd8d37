"""`halo` gives every rank the range of a dim that it needs, sends only what is lacking, and its backward is the adjoint."""

from __future__ import annotations

import pytest
import torch

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto.errors import LayoutError
from dsp_auto.measure import CountCollectives
from dsp_auto.shards import exchanged, pieces, wrapped

dsp = torch.ops.dsp


def _group() -> str:
    return torch.distributed.group.WORLD.group_name


def test_a_range_lies_in_pieces_on_the_ranks_that_hold_it():
    assert pieces([3, 2, 2], 2, 6) == [(0, 2, 3), (1, 0, 2), (2, 0, 1)]
    assert pieces([3, 0, 4], 3, 3) == [] and pieces([3, 0, 4], 2, 4) == [(0, 2, 3), (2, 0, 1)]
    assert pieces([3, 2], -1, 1) == [(1, 1, 2), (0, 0, 1)] and wrapped(-1, 1, 5) == [(4, 5), (0, 1)]
    assert exchanged([3, 2, 2], [0, 3, 5], [3, 5, 7]) == 0 and exchanged([3, 2, 2], [0, 2, 4], [4, 6, 7]) == 4


_WINDOWS = {
    "borders": ([3, 2, 2], [0, 2, 4], [4, 6, 7]),
    "shifted": ([3, 2, 2], [1, 3, 5], [3, 5, 7]),
    "around the end": ([3, 2, 2], [-2, 1, 3], [1, 3, 9]),
    "reversed": ([3, 2, 2], [4, 2, 0], [7, 4, 2]),
    "everything twice": ([3, 2, 2], [0, 0, 0], [7, 7, 14]),
    "nothing for one": ([5, 0, 2], [0, 3, 4], [6, 3, 7]),
    "nothing sent": ([3, 2, 2], [0, 3, 5], [2, 5, 6]),
}


def _halo(rank, ranks, held, starts, stops, dim, dtype):
    group = _group()
    torch.manual_seed(0)
    shape = [2, 3]
    shape.insert(dim, sum(held))
    whole = torch.randn(shape, dtype=torch.float64).to(dtype)
    begin = sum(held[:rank])
    own = whole.narrow(dim, begin, held[rank]).clone()
    if dtype.is_floating_point:
        own.requires_grad_()
    with CountCollectives() as count:
        made = dsp.halo(own, dim, held, starts, stops, ranks, rank, group)
        index = torch.arange(starts[rank], stops[rank]) % sum(held)
        equal = torch.equal(made, whole.index_select(dim, index))
        if not dtype.is_floating_point:
            return equal, True, 0.0, 0.0
        weights = [torch.randn(*_resized(whole, dim, stops[r] - starts[r]), dtype=dtype) for r in range(ranks)]
        (grad,) = torch.autograd.grad(made, own, weights[rank])
    expected = torch.zeros_like(whole)
    for r in range(ranks):
        expected.index_add_(dim, torch.arange(starts[r], stops[r]) % sum(held), weights[r])
    same = torch.allclose(grad, expected.narrow(dim, begin, held[rank]), atol=1e-12)
    sent = [count.by_primitive.get(("halo", way), (0, 0.0))[1] for way in ("forward", "backward")]
    return equal, same, *sent


def _resized(x, dim, size):
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


@pytest.mark.parametrize("name", _WINDOWS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_halo_gives_each_rank_its_range_and_adds_gradients_where_elements_are(world, name, dim):
    held, starts, stops = _WINDOWS[name]
    found = world(3).run(_halo, held, starts, stops, dim, torch.float64)
    assert all(equal and same for equal, same, _, _ in found)
    # Only what a rank lacks is sent, and as much comes back as gradients.
    moved = exchanged(held, starts, stops) * 6 * 8
    assert [sum(entry[way] for entry in found) for way in (2, 3)] == [moved, moved]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.bfloat16, torch.complex64])
def test_halo_moves_every_dtype(world, dtype):
    held, starts, stops = _WINDOWS["borders"]
    if dtype in (torch.bfloat16, torch.complex64):
        assert all(entry[0] for entry in world(3).run(_halo_of, held, starts, stops, dtype))
    else:
        assert all(entry[0] for entry in world(3).run(_halo, held, starts, stops, 1, dtype))


def _halo_of(rank, ranks, held, starts, stops, dtype):
    whole = torch.arange(42).reshape(6, 7).to(dtype)
    own = whole.narrow(1, sum(held[:rank]), held[rank])
    made = dsp.halo(own, 1, held, starts, stops, ranks, rank, _group())
    return (torch.equal(made, whole[:, starts[rank] : stops[rank]]),)


def _halo_twice(rank, ranks):
    group = _group()
    held, starts, stops = _WINDOWS["borders"]
    own = torch.randn(held[rank], dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    made = dsp.halo(own, 0, held, starts, stops, ranks, rank, group)
    (first,) = torch.autograd.grad((made**3).sum(), own, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), own)
    return own.detach(), second


def test_the_gradient_of_halos_gradient_is_exact(world):
    held, starts, stops = _WINDOWS["borders"]
    found = world(3).run(_halo_twice)
    whole = torch.cat([own for own, _ in found]).requires_grad_()
    made = torch.cat([whole[a:b] for a, b in zip(starts, stops)])
    (first,) = torch.autograd.grad((made**3).sum(), whole, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), whole)
    assert torch.allclose(torch.cat([own for _, own in found]), second)


@pytest.mark.parametrize(
    ("held", "ends", "says"),
    [([3, 2], ([0, 0], [1, 1]), "2 lengths"), ([4, 2, 1], ([0, 0, 0], [1, 1, 1]), "rank 0 should hold 4")],
)
def test_halo_refuses_what_does_not_fit(held, ends, says):
    with pytest.raises(LayoutError, match=says):
        dsp.halo(torch.zeros(3), 0, held, *ends, 3, 0, "g")
