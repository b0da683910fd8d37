"""Random numbers: shards draw their own, copies the same, and with `rng="serial"` all is as on one device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsp_auto
from dsp_auto.randomness import on_shard
from dsp_auto.rehearse import rehearse
from tests import parity

aten = torch.ops.aten


class Draws(nn.Module):
    """`draw` between two ops that make both dims sequences."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(6, 6), draw

    def forward(self, x):
        return self.draw(self.linear(x).softmax(1)).softmax(2) * x


def drop_path(x):
    kept = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.7)
    return x * kept / 0.7


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in pieces": lambda x: F.dropout(x.flatten(1, 2), 0.4).view(x.shape),
    "channels": lambda x: F.dropout2d(x, 0.4),
    "alpha": lambda x: F.alpha_dropout(x, 0.4, True),
    "drop path": drop_path,
    "uniform": lambda x: x + torch.rand_like(x),
    "normal": lambda x: x + torch.randn(x.shape[1], 1, 1) + torch.randn_like(x),
    "integers": lambda x: x * torch.randint(0, 3, (x.shape[2], 1)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("mesh", ["3", "2x2"])
def test_serial_numbers_are_those_of_one_device(name, mesh):
    torch.manual_seed(3)
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    found = rehearse(Draws(DRAWS[name]), mesh, (x,), rng="serial")
    assert found.output[0] <= parity.OUTPUT_TOLERANCE and found.gradient[0] <= parity.GRADIENT_TOLERANCE


def test_serial_dropout_keeps_the_very_elements_of_one_device():
    x = torch.randn(2, 5, 7, 6)
    found = rehearse(Draws(lambda x: F.dropout(torch.ones_like(x) + 0 * x, 0.5)), "3", (x,), rng="serial")
    for own, expected in zip(found.ranks, found.expected):
        assert torch.equal(own.outputs["output 0"], expected.outputs["output 0"])


def test_dropout_is_sharded_and_shards_drop_other_elements():
    x = torch.ones(1, 6, 8, 64, requires_grad=True)
    model = nn.Sequential(nn.Softmax(1), nn.Dropout(0.5), nn.Softmax(2))
    plan = dsp_auto.plan(model, "2", (x,))
    assert not plan.random and plan.activations["replicated_bytes"] == 0
    torch.manual_seed(5)
    drawn = [on_shard(aten.dropout.default, shard, torch.ones(1000), 0.5, True) for shard in (0, 1)]
    shares = [(one == 0).float().mean() for one in drawn]
    same = (drawn[0] == drawn[1]).float().mean()
    assert all(0.4 < share < 0.6 for share in (*shares, same))


def test_copies_of_a_shard_draw_alike_and_leave_the_generators_in_step():
    states, drawn = [], []
    for shard in (0, 1, 1):
        torch.manual_seed(9)
        drawn.append(on_shard(aten.rand.default, shard, [50]))
        states.append(torch.get_rng_state())
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def _means(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh

    class Sum(nn.Module):
        def forward(self, x):
            # Replicated noise and a dropout whose mask the sums tell.
            return (F.dropout(x.softmax(1), 0.5) != 0).sum((0, 2, 3)), torch.rand(3)

    torch.manual_seed(0)
    parallel = dsp_auto.parallelize(Sum(), init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)))
    counts, noise = parallel(torch.ones(1, 4, 9, 50))
    return counts, noise, torch.get_rng_state()


def test_ranks_agree_on_what_they_share_after_drawing_their_own(world):
    (counts, noise, state), *others = world(3).run(_means)
    assert len(set(counts.tolist())) > 1
    for own in others:
        assert torch.equal(own[0], counts) and torch.equal(own[1], noise) and torch.equal(own[2], state)


def test_a_way_to_draw_that_does_not_exist_is_refused():
    with pytest.raises(dsp_auto.StrategyError, match="'seeded'.*parallel, serial"):
        dsp_auto.plan(nn.Softmax(1), "2", (torch.randn(2, 4),), rng="seeded")
