"""DistributedDataParallel around and inside a parallel module, and optimizers whose state is cut over its ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import dsp_auto
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, sp_mesh


class Axial(nn.Module):
    """Mixes along two dims; a buffer that changes, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.over_t, self.over_s, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.calls += 1
        x = x + self.over_t(x).softmax(1) * scale
        return self.over_s(x).softmax(2)


def _model():
    torch.manual_seed(0)
    return Axial()


def _data_parallel(rank, ranks, where, zero, steps=3):
    """Deviations of outputs, gradients and what the optimizer makes of them from one device on the global batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    group, at = mesh["dp"].get_group(), mesh["dp"].get_local_rank()
    batch = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(1))
    options = {"process_group": group, "find_unused_parameters": True}
    reference, model = _model(), _model()
    if where == "around":
        run = DistributedDataParallel(dsp_auto.parallelize(model, mesh["sp"]), **options)
    else:
        run = dsp_auto.parallelize(DistributedDataParallel(model, **options), mesh["sp"])
    if zero:
        optimizer = ZeroRedundancyOptimizer(run.parameters(), torch.optim.AdamW, process_group=group, lr=0.01, eps=1e-4)
    else:
        optimizer = torch.optim.AdamW(run.parameters(), lr=0.01, eps=1e-4)
    alone = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-4)
    seen = []
    model.over_t.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    worst = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        alone.zero_grad()
        expected, found = reference(batch, scale=2.0), run(batch[2 * at : 2 * at + 2], scale=2.0)
        expected.square().mean().backward()
        found.square().mean().backward()
        worst = max(worst, deviation(found, expected[2 * at : 2 * at + 2]))
        for own, other in zip(model.parameters(), reference.parameters()):
            assert (own.grad is None) == (other.grad is None)
            worst = max(worst, 0.0 if own.grad is None else deviation(own.grad, other.grad, 1e-3))
        optimizer.step()
        alone.step()
    assert model.calls == steps and len(seen) == steps + 1
    return max(worst, *(deviation(a, b) for a, b in zip(model.parameters(), reference.parameters())))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_data_parallel_training_is_that_of_one_device_on_the_global_batch(world, where, zero):
    assert max(world(4).run(_data_parallel, where, zero)) <= GRADIENT_TOLERANCE


def _zero_over_sp(rank, ranks):
    x = torch.randn(2, 6, 5, 8, generator=torch.Generator().manual_seed(1))
    mesh, reference, model = sp_mesh(ranks), _model(), _model()
    parallel = dsp_auto.parallelize(model, mesh)
    options = {"lr": 0.01, "eps": 1e-4}
    own = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=mesh.get_group(), **options)
    alone = torch.optim.Adam(reference.parameters(), **options)
    for _ in range(3):
        for run, optimizer in ((parallel, own), (reference, alone)):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    held = sum(len(state) > 0 for state in own.optim.state.values())
    return max(deviation(a, b) for a, b in zip(model.parameters(), reference.parameters())), held


def test_optimizer_state_may_be_cut_over_the_sequence_parallel_ranks(world):
    (first, one), (second, two) = world(2).run(_zero_over_sp)
    assert max(first, second) <= OUTPUT_TOLERANCE
    assert one + two == 4 and one and two


def _in_parts(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, args, _ = transformer_2d(layers=1, hidden=16, heads=2, frames=4, tokens=6)
    told = []
    for options in ({}, {"shard_parameters": False}):
        parallel = dsp_auto.parallelize(model, mesh["sp"], strategy="megatron-lm", **options)
        run = DistributedDataParallel(parallel, process_group=mesh["dp"].get_group())
        try:
            run(*args)
        except dsp_auto.DspError as error:
            told.append(str(error))
    return told


def test_a_plan_that_holds_parameters_in_parts_is_refused_where_ddp_has_them(world):
    for told in world(4).run(_in_parts):
        assert len(told) == 1 and "shard_parameters=False" in told[0]
