"""FSDP2 around a parallel module: parameters sharded over data-parallel ranks, and the gradients of one device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

import dsp_auto
from dsp_auto import fsdp
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "frames": 5, "tokens": 6}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def _batch(dp):
    return torch.randn(dp, 5, 6, 4, generator=torch.Generator().manual_seed(1))


def _one_device(steps, dp, build=lambda: transformer_2d(**SMALL)[0]):
    """Outputs and gradients of a few steps on the global batch."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(_batch(dp))
        (out - 1).square().mean().backward()
        found.append((out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        optimizer.step()
    return found


def _sharded(rank, ranks, order, over, reshard):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    data = {"dp": lambda: mesh["dp"], "dp and sp": lambda: mesh["dp", "sp"]._flatten("all"), "sp, alike on dp": lambda: mesh}
    data = data[over]()
    options = {"mesh": data, "reshard_after_forward": reshard}
    model, _, _ = transformer_2d(**SMALL)
    names = [name for name, _ in model.named_parameters()]
    if order == "parallelize first":
        parallel = dsp_auto.parallelize(model, mesh["sp"])
    for block in model.blocks:
        fully_shard(block, **options)
    if order == "all before":
        fully_shard(model, **options)
    if order != "parallelize first":
        parallel = dsp_auto.parallelize(model, mesh["sp"])
    if order != "all before":
        fully_shard(parallel, **options)
    assert [name for name, _ in parallel.named_parameters()] == names
    assert all(isinstance(p, DTensor) for p in parallel.parameters())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    at = mesh["dp"].get_local_rank()
    worst = {"output": 0.0, "gradient": 0.0}
    for expected, reference in _one_device(3, 2):
        optimizer.zero_grad()
        out = parallel(_batch(2)[at : at + 1])
        (out - 1).square().mean().backward()
        worst["output"] = max(worst["output"], deviation(out.detach(), expected[at : at + 1]))
        for name, p in parallel.named_parameters():
            assert p.grad.to_local().numel() <= p.numel()
            worst["gradient"] = max(worst["gradient"], deviation(whole(p.grad), reference[name], 1e-3))
        optimizer.step()
    assert len(parallel.plans) == 1
    return worst


@pytest.mark.parametrize(
    "order, over, reshard",
    [
        ("parallelize first", "dp", True),
        ("parallelize first", "dp and sp", False),
        ("blocks before", "sp, alike on dp", True),
        ("all before", "dp", False),
    ],
)
def test_sharded_training_has_the_gradients_of_one_device_on_the_global_batch(world, order, over, reshard):
    for worst in world(4).run(_sharded, order, over, reshard):
        assert worst["output"] <= OUTPUT_TOLERANCE and worst["gradient"] <= GRADIENT_TOLERANCE, worst


def _accumulated(rank, ranks):
    """Gradients of two backwards, of which only the second reduces over data-parallel ranks; and what `plan` says of such a
    model."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, _, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(parallel, mesh=mesh["dp"])
    at = mesh["dp"].get_local_rank()
    for last in (False, True):
        parallel.set_requires_gradient_sync(last)
        (parallel(_batch(2)[at : at + 1]) - 1).square().mean().backward()
    ((_, reference),) = _one_device(1, 2)
    with pytest.raises(dsp_auto.CaptureError, match="embed.weight is a DTensor over .* before fully_shard"):
        dsp_auto.plan(model, "2", (_batch(1),))
    return max(deviation(whole(p.grad), 2 * reference[name], 1e-3) for name, p in parallel.named_parameters())


def test_gradients_accumulate_before_they_are_reduced_and_plan_tells_why_it_cannot_plan(world):
    assert max(world(4).run(_accumulated)) <= GRADIENT_TOLERANCE


def _mixed(rank, ranks, root):
    """Deviations from one device, and from the same model sharded without being parallelized; dtypes that hooks see."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    runs = []
    for parallelized in (False, True):
        model, _, _ = transformer_2d(**SMALL)
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
        if root == "model" or not parallelized:
            fully_shard(model, mesh=mesh["dp"], mp_policy=outer)
        run = dsp_auto.parallelize(model, mesh["sp"]) if parallelized else model
        if run is not model and root == "parallel":
            fully_shard(run, mesh=mesh["dp"], mp_policy=outer)
        dtypes = []
        model.blocks[0].mlp.register_forward_hook(lambda module, args, out, dtypes=dtypes: dtypes.append(out.dtype))
        at = mesh["dp"].get_local_rank()
        for _ in range(2):
            run.zero_grad()
            out = run(_batch(2)[at : at + 1])
            (out - 1).square().mean().backward()
        assert set(dtypes) == {torch.bfloat16} and out.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        runs.append((out.detach(), {name: whole(p.grad) for name, p in model.named_parameters()}))
    (out, grads), (found, own) = runs
    assert len(run.plans) == 1
    return deviation(found, out), max(deviation(own[name], grad, 1e-2) for name, grad in grads.items())


@pytest.mark.parametrize("root", ["model", "parallel"])
def test_mixed_precision_computes_what_fsdp_alone_computes(world, root):
    for output, gradient in world(4).run(_mixed, root):
        assert output <= 0.02 and gradient <= 0.05  # rounding to bfloat16, in another order


class Nested(nn.Module):
    """A block used twice, one in a checkpoint, one that checkpoints, and tied parameters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(transformer_2d(**SMALL | {"layers": 2})[0].blocks)
        self.head = nn.Linear(16, 4)
        self.table = nn.Parameter(torch.randn(6, 16))

    def forward(self, x):
        size = x.shape[:3]
        x = self.embed(x) + self.table
        for n in (0, 1, 0):
            x = self.blocks[n](x, size)
        if self.how == "around one":
            x = checkpoint.checkpoint(self.blocks[2], x, size, use_reentrant=False)
            return self.head(self.blocks[3](x, size))
        if self.how == "around two":
            return self.head(checkpoint.checkpoint(self._two, x, size, use_reentrant=False))
        return self.head(self._two(x, size))

    def _two(self, x, size):
        return self.blocks[3](self.blocks[2](x, size), size)


def _nest(rank, ranks, how):
    def build():
        torch.manual_seed(0)
        model = Nested(how)
        if how == "tied":
            model.blocks[3].mlp[0].weight = model.blocks[2].mlp[0].weight
        return model

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = build()
    data = {"mesh": mesh["dp"], "reshard_after_forward": True}
    for n, block in enumerate(model.blocks):
        if how != "tied" or n < 2:
            fully_shard(block.attn, **data)
            fully_shard(block, **data)
    if how == "tied":
        fully_shard([model.blocks[2], model.blocks[3]], **data)
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    fully_shard(parallel, **data)
    at = mesh["dp"].get_local_rank()
    worst = 0.0
    for expected, reference in _one_device(1, 2, build):
        for _ in range(2):
            parallel.zero_grad()
            out = parallel(_batch(2)[at : at + 1])
            (out - 1).square().mean().backward()
            worst = max(worst, deviation(out.detach(), expected[at : at + 1]))
            for name, p in parallel.named_parameters():
                worst = max(worst, deviation(whole(p.grad), reference[name], 1e-3))
    with torch.no_grad():
        assert deviation(parallel(_batch(2)[at : at + 1]), expected[at : at + 1]) <= OUTPUT_TOLERANCE
    state = {name: whole(value) for name, value in parallel.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in build().state_dict().items())
    return worst


@pytest.mark.parametrize("how", ["around one", "around two", "tied"])
def test_modules_that_are_nested_used_twice_tied_or_recomputed_are_gathered_where_they_are_used(world, how):
    assert max(world(4).run(_nest, how)) <= GRADIENT_TOLERANCE


def _recomputed(rank, ranks):
    """Deviation of gradients where the planner recomputes blocks, and what it recomputes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "frames": 8, "tokens": 16}
    batch = torch.randn(8, 8, 16, 4, generator=torch.Generator().manual_seed(1))
    at = mesh["dp"].get_local_rank()
    mine = batch[4 * at : 4 * at + 4]
    reference, model = transformer_2d(**sizes)[0], transformer_2d(**sizes)[0]
    (reference(batch) - 1).square().mean().backward()
    capacity = int(0.7 * dsp_auto.plan(reference, "2", (mine,)).memory["peak_bytes"])
    parallel = dsp_auto.parallelize(model, mesh["sp"], recompute=True, capacity=capacity)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(parallel, mesh=mesh["dp"])
    (parallel(mine) - 1).square().mean().backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    worst = max(deviation(whole(p.grad), grads[name], 1e-3) for name, p in parallel.named_parameters())
    return worst, len(parallel.plan.recomputed)


def test_blocks_that_the_plan_recomputes_are_gathered_for_it(world):
    for worst, recomputed in world(4).run(_recomputed):
        assert worst <= GRADIENT_TOLERANCE and recomputed


def _refused(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    told = []
    for options in ({"strategy": "megatron-lm"}, {"shard_parameters": True}):
        model, args, _ = transformer_2d(**SMALL | {"frames": 4})
        parallel = dsp_auto.parallelize(model, mesh["sp"], **options)
        if "strategy" in options:
            parallel.prepare(*args)
        fully_shard(parallel, mesh=mesh["dp"])
        with pytest.raises(dsp_auto.DspError) as error:
            parallel(*args)
        told.append(str(error.value))
    return told


def test_parameters_in_parts_and_fully_shard_are_told_not_to_go_together(world):
    for told in world(4).run(_refused):
        assert all("cannot hold parameters in parts that fully_shard shards" in message for message in told), told


def _private(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for _ in range(2):
        found = fsdp.managed([model, model[0]])
        assert set(found) == {(id(model[0]), "weight"), (id(model[0]), "bias"), (id(model[1]), "weight")}
        tied = found[id(model[1]), "weight"]
        assert tied.dtype == torch.bfloat16 and not tied.in_parts
        assert isinstance(tied.sharded, DTensor) and tied.owners == ((model[0], "weight"), (model[1], "weight"))
        model(torch.randn(2, 4))  # after which its parameters stay whole
    assert isinstance(model, FSDPModule) and fsdp.casts(model) == (torch.bfloat16, torch.float32)
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    assert len(hooks) == 2 and all(map(fsdp.is_hook, hooks)) and not fsdp.is_hook(print)
    return True


def test_what_fully_shard_keeps_can_be_read(world):
    assert all(world(2).run(_private))
