"""What a user of `parallelize` relies on, beyond equal numbers (see test_models)."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dsp_auto
from dsp_auto.measure import CountCollectives
from dsp_auto.shards import shard_range
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, compare, deviation, gradients, sp_mesh

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "frames": 5, "tokens": 6}


class Axial(nn.Module):
    """Attention-like mixing over each of two dims; optional second input, a scale that is no tensor, a dict result."""

    def __init__(self) -> None:
        super().__init__()
        self.over_t, self.over_s = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("offset", torch.linspace(0, 1, 8))

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None, *, scale: float = 1.0):
        x = x + self.over_t(x).softmax(1) * scale
        x = x + self.over_s(x).softmax(2) + self.offset
        if extra is not None:
            x = x + extra[:, None]
        return {"x": x, "mean": x.mean((1, 2)), "none": None}


class WithStatistics(nn.Module):
    """Batch norm: buffers change in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x).softmax(1)
        x = x + self.mix(x).softmax(2)
        flat = self.norm(x.flatten(0, 2)).view(x.shape)
        return self.out(flat)


def axial():
    torch.manual_seed(0)
    return Axial(), torch.randn(2, 6, 5, 8)


# --- run on ranks


def _keeps_the_module(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    assert isinstance(parallel, nn.Module)
    assert list(parallel.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(parallel.parameters(), model.parameters(), strict=True))
    assert inspect.signature(parallel.forward) == inspect.signature(model.forward)
    assert parallel.plan is None
    parallel.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    assert deviation(parallel(x)["x"], model(x)["x"]) <= OUTPUT_TOLERANCE
    seen = []
    parallel.register_forward_hook(lambda module, args, out: seen.append(out))
    parallel(x)
    assert len(seen) == 1
    return True


def _takes_every_argument(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), max_signatures=4)
    extra = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    calls = [
        ((x,), {}),
        ((x, extra), {}),
        ((x, None), {}),
        ((x,), {"scale": 0.5, "extra": extra}),
        ((x,), {"scale": 0.5}),
    ]
    for args, kwargs in [*calls, *calls]:
        found, expected = parallel(*args, **kwargs), model(*args, **kwargs)
        assert found.keys() == expected.keys() and found["none"] is None
        assert deviation(found["x"], expected["x"]) <= OUTPUT_TOLERANCE
        assert deviation(found["mean"], expected["mean"]) <= OUTPUT_TOLERANCE
    return len(parallel.plans)


def _modes_are_signatures(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(x)
    parallel.eval()
    assert not model.training and not model.over_t.training
    with torch.no_grad():
        parallel(x)
    parallel.train()
    parallel(x)
    plans = parallel.plans
    return sorted(plan.communication["backward_bytes"] > 0 for plan in plans)


def _plans_at_once_with_arguments(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args=(x,), kwargs={"scale": 2.0})
    planned = parallel.plan
    parallel(x, scale=2.0)
    return planned is parallel.plan


def _local_program(rank, ranks):
    model, args, kwargs = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args=args, dim_names={"video": "B T S C"})
    checked = 0
    reference = {}
    interpreter = torch.fx.Interpreter(parallel.program)

    def run_node(node):
        result = torch.fx.Interpreter.run_node(interpreter, node)
        reference[node.name] = result
        return result

    interpreter.run_node = run_node
    values = [a if not isinstance(a, tuple) else a[0][a[1]] for a in parallel._dsp.latest.sources]
    values = [args[0] if value is None else value for value in values]
    interpreter.run(*values)
    for node in parallel.program.graph.nodes:
        if node.op in ("call_function", "placeholder") and isinstance(node.meta["val"], torch.Tensor):
            assert node.meta["val"].shape == reference[node.name].shape, node
            checked += 1
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default:
            assert node.meta["nn_module_stack"]
    frames, tokens = (shard_range(SMALL[name], ranks, rank)[1] for name in ("frames", "tokens"))
    shapes = {tuple(node.meta["val"].shape[1:3]) for node in parallel.program.graph.nodes if "gelu" in node.name}
    return checked > 40, shapes == {(frames, SMALL["tokens"]), (SMALL["frames"], tokens)}


def _buffers_change(rank, ranks):
    torch.manual_seed(0)
    model = WithStatistics()
    twin = WithStatistics()
    twin.load_state_dict(model.state_dict())
    parallel = dsp_auto.parallelize(twin, sp_mesh(ranks))
    for step in range(2):
        x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(step))
        found, expected = parallel(x), model(x)
        assert deviation(found, expected) <= OUTPUT_TOLERANCE
        own, reference = gradients(twin, found, []), gradients(model, expected, [])
        assert max(deviation(own[name], grad, 1e-3) for name, grad in reference.items()) <= GRADIENT_TOLERANCE
    for name, buffer in model.named_buffers():
        assert deviation(dict(twin.named_buffers())[name].double(), buffer.double()) <= OUTPUT_TOLERANCE, name
    return True


def _sharded_ends(rank, ranks, in_dim, out_dim):
    model, args, _ = transformer_2d(**SMALL, batch=2)
    video = args[0]
    expected = model(video)
    weights = torch.linspace(0.5, 1.5, expected.numel()).view_as(expected)
    (expected * weights).sum().backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parallel = dsp_auto.parallelize(
        model, sp_mesh(ranks), in_layouts={"video": {"sp": in_dim}}, out_layouts={"sp": out_dim}
    )
    mine = video.tensor_split(ranks, in_dim)[rank].contiguous().requires_grad_()
    parallel.prepare(mine)
    with CountCollectives() as count:
        found = parallel(mine)
        assert deviation(found, expected.tensor_split(ranks, out_dim)[rank]) <= OUTPUT_TOLERANCE
        (found * weights.tensor_split(ranks, out_dim)[rank]).sum().backward()
    for name, parameter in model.named_parameters():
        assert deviation(parameter.grad, reference[name], 1e-3) <= GRADIENT_TOLERANCE, name
    assert mine.grad.shape == mine.shape
    return sorted({primitive for primitive, _ in count.by_primitive})


def _uneven_pieces_are_refused(rank, ranks):
    model, _, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), in_layouts={"video": {"sp": 1}})
    with pytest.raises(dsp_auto.LayoutError, match="tensor_split"):
        parallel(torch.randn(1, 1 + 3 * rank, 6, 4))
    return True


def _different_shapes(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    with pytest.raises(dsp_auto.AgreementError) as error:
        parallel(x if rank == 0 else x[:, :4])
    first = str(error.value)
    parallel(x)  # nothing is half-changed
    with pytest.raises(dsp_auto.AgreementError):
        parallel(x[:, :4] if rank == 0 else x)  # the other rank knows its signature already
    parallel(x)
    return first


class Nested(Axial):
    def forward(self, batch, *, page, mask=None):
        x = batch["x"][0] + page
        return super().forward(x if mask is None else x * mask)["x"]


def _different_values(rank, ranks):
    model, x = axial()
    parallel, told = dsp_auto.parallelize(model, sp_mesh(ranks)), []

    def refused(*args, **kwargs):
        with CountCollectives() as count, pytest.raises(dsp_auto.AgreementError, match="different values") as error:
            parallel(*args, **kwargs)
        assert not count.by_primitive
        told.append(str(error.value))

    refused(x + rank)
    refused(x, x[:, 0] if rank == 0 else x[:, 1])
    parallel.prepare(x + rank)  # whose values do not matter
    refused(x + rank)
    assert deviation(parallel(x)["x"], model(x)["x"]) <= OUTPUT_TOLERANCE
    nested = Nested()
    parallel = dsp_auto.parallelize(nested, sp_mesh(ranks))
    mask = torch.ones(x.shape, dtype=torch.bool)
    refused({"x": [x]}, page=x, mask=mask.index_fill(1, torch.tensor(rank), False))
    refused({"x": [x]}, page=x.to(torch.bfloat16) * (1 + rank))
    refused({"x": [x * (-1) ** rank]}, page=x * (-1) ** rank)
    return told


def _equal_values(rank, ranks):
    """Whether a first call with equal values, some of them NaN, gathers more than the two later ones, and what those gather."""
    model, x = axial()
    parallel, found = dsp_auto.parallelize(model, sp_mesh(ranks)), []
    agreement = parallel._dsp.agreement
    gather = agreement._gather_tensors
    agreement._gather_tensors = lambda value: (found.append(value), gather(value))[1]
    parallel(torch.where(x > 0, x, torch.nan))
    first = len(found)
    for _ in range(2):
        parallel(x + rank)  # the signature is known by now
    return first > 2, [tuple(value.shape) for value in found[first:]]


class _Mixed(nn.Module):
    """A parameter to hold in parts, and a buffer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.mlp = nn.Sequential(nn.Linear(200, 240), nn.GELU(), nn.Linear(240, 200))

    def forward(self, x):
        return self.mlp(self.norm(x)).softmax(1) + x.softmax(2)


def _different_parameters(rank, ranks):
    """What ranks are told that hold another parameter, another buffer, and another one that the plan holds in parts."""
    told = []
    for name, options in (("mlp.0.weight", {}), ("norm.running_mean", {}), ("mlp.0.weight", {"strategy": "megatron-sp"})):
        torch.manual_seed(0)
        model = _Mixed()
        with torch.no_grad():
            (model.get_parameter if "weight" in name else model.get_buffer)(name).add_(rank)
        parallel = dsp_auto.parallelize(model.eval(), sp_mesh(ranks), **options)
        with pytest.raises(dsp_auto.AgreementError, match="different parameters") as error:
            parallel(torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(0)))
        told.append(str(error.value))
    return told


def _rounded_values(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr(logging.getLogger("dsp_auto"), "handle", told.append)
        parallel(x * (1 + 1e-6 * rank))
        parallel(x, x[:, 0])
    assert [one.levelname for one in told if "rounding" in one.getMessage()] == ["WARNING"] * (rank == 0)
    with pytest.raises(dsp_auto.AgreementError, match="different values"):
        parallel(x[:1] * (1 + 1e-2 * rank))
    return True


def _values_of_parts(rank, ranks):
    """A mesh of two dims: along sp the ranks hold parts of x, along dp the same ones; the mask is whole on all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    torch.manual_seed(0)
    model, (dp, sp) = Product(), mesh.get_coordinate()
    x, y = torch.randn(2, 6, 5, 8), torch.ones(2, 6, 5, 8)
    parallel = dsp_auto.parallelize(model, mesh, in_layouts={"x": {"sp": 1, "dp": None}})
    part, told = x.tensor_split(2, 1)[sp].contiguous(), []
    for args in ((part + dp, y), (part, y + sp)):
        with pytest.raises(dsp_auto.AgreementError, match="different values") as error:
            parallel(*args)
        told.append(str(error.value))
    return told, deviation(parallel(part, y), model(x, y))


def _different_models(rank, ranks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.Softmax(2), *([nn.GELU()] if rank else [nn.SiLU()]))
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    with pytest.raises(dsp_auto.AgreementError):
        parallel(torch.randn(2, 6, 5, 8))
    return True


def _different_options(rank, ranks):
    model, x = axial()
    strategy = "ulysses" if rank else "dsp"
    with pytest.raises(dsp_auto.AgreementError, match="rank 0: .*strategy='dsp'; rank 1: .*strategy='ulysses'"):
        dsp_auto.parallelize(model, sp_mesh(ranks), strategy=strategy)(x)
    return True


def _different_versions(rank, ranks):
    model, x = axial()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dsp_auto.parallelize"], "version", lambda name: f"7.{rank}")
        with pytest.raises(dsp_auto.AgreementError, match="dsp_auto 7.0; rank 1: .*dsp_auto 7.1"):
            dsp_auto.parallelize(model, sp_mesh(ranks))(x)
    return True


class FailsOnRank1(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.inner, self.rank = nn.Linear(8, 8), rank

    def forward(self, x):
        if self.rank == 1:
            raise ValueError("no such thing")
        return self.inner(x).softmax(1)


def _on_another_device(rank, ranks):
    model, args, _ = transformer_2d(**SMALL)
    mesh = init_device_mesh("cuda", (ranks,), mesh_dim_names=("sp",))
    with pytest.raises(dsp_auto.MeshError, match=r'mesh of cuda devices.*are on cpu.*model.to\("cuda"\)'):
        dsp_auto.parallelize(model, mesh)(*args)
    return True


def _one_rank_fails(rank, ranks):
    parallel = dsp_auto.parallelize(FailsOnRank1(rank), sp_mesh(ranks))
    with pytest.raises(dsp_auto.DspError) as error:
        parallel(torch.randn(2, 6, 5, 8))
    return type(error.value).__name__, str(error.value)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.inner(x).softmax(1)).softmax(2)


def _dropout(rank, ranks):
    torch.manual_seed(0)
    model, x = WithDropout(), torch.randn(2, 6, 5, 8)
    mesh = sp_mesh(ranks)
    torch.manual_seed(7)
    expected = model(x)
    torch.manual_seed(7)
    equal = deviation(dsp_auto.parallelize(model, mesh, rng="serial")(x), expected)
    torch.manual_seed(rank)
    with pytest.raises(dsp_auto.AgreementError, match="manual_seed"):
        dsp_auto.parallelize(model, mesh)(x)
    dsp_auto.parallelize(model.eval(), mesh)(x)  # draws nothing, so seeds do not matter
    return equal


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two, self.spare = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.body(x).softmax(1)
        x = (x + self.body(x)).softmax(2)
        return self.one(x), self.two(x)


def _unused_parameters(rank, ranks):
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(2, 6, 5, 8)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(x)[0].square().sum().backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (own[name] is None) == (parameter.grad is None), name
        assert parameter.grad is None or deviation(own[name], parameter.grad, 1e-3) <= GRADIENT_TOLERANCE
    return sorted(name for name, grad in own.items() if grad is None)


class Product(Axial):
    def forward(self, x, y):
        return super().forward(x)["x"] * y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).softmax(1)).softmax(2)


def _aliases(rank, ranks):
    torch.manual_seed(0)
    model, x = Product(), torch.randn(2, 6, 5, 8, requires_grad=True)
    z = torch.randn(2, 6, 5, 8, generator=torch.Generator().manual_seed(3))
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    for args in ((x, x), (x, z)):
        assert deviation(parallel(*args), model(*args)) <= OUTPUT_TOLERANCE
    tied = Tied()
    parallel = dsp_auto.parallelize(tied, sp_mesh(ranks))
    parallel(x)
    tied.b.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(4)))
    assert deviation(parallel(x), tied(x)) <= OUTPUT_TOLERANCE
    return len(parallel.plans)


class GradAndNoGrad(nn.Module):
    """One tensor is used with a gradient and, as a mask, without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        scores = (self.weight * 1.0).softmax(0)
        return (torch.where(scores > 0.01, x, 0.1 * x) * scores).softmax(1)


def build_grad_and_no_grad():
    torch.manual_seed(0)
    return GradAndNoGrad(), (torch.randn(2, 4, 64, 64),), {}


def _copies_and_pickles(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(x)
    twin = copy.deepcopy(parallel)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert deviation(parallel(x)["x"], model(x)["x"]) <= OUTPUT_TOLERANCE
    changed = copy.deepcopy(model)
    changed.load_state_dict(twin.state_dict())
    assert deviation(twin(x)["x"], changed(x)["x"]) <= OUTPUT_TOLERANCE
    with pytest.raises(dsp_auto.DspError, match="state_dict"):
        pickle.dumps(parallel)
    return True


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(8, 8), 1.0
        self.register_buffer("mask", None)
        self.register_buffer("mesh", torch.ones(8))
        self.options = nn.Linear(8, 8)

    def forward(self, x):
        x = self.options(self.inner(x).softmax(1) * self.mesh).softmax(2) * self.scale
        return x if self.mask is None else x * self.mask

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def _changes_after_the_first_call(rank, ranks):
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(2, 6, 5, 8)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))

    def same():
        return deviation(parallel(x), model(x)) <= OUTPUT_TOLERANCE

    assert same() and parallel.options is model._modules["options"]
    model.mask = torch.full((8,), 2.0)
    assert same()
    handle = model.inner.register_forward_hook(lambda module, args, out: out * 3)
    assert same()
    handle.remove()
    assert same()
    parallel.scale = 5.0
    assert model.scale == 5.0
    parallel.replan()
    assert same()
    assert list(parallel.state_dict()) == list(model.state_dict()) and "_extra_state" in parallel.state_dict()
    parallel.load_state_dict(model.state_dict())
    return True


def _random_state_drifts(rank, ranks):
    torch.manual_seed(0)
    model, x = WithDropout(), torch.randn(2, 6, 5, 8)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(x)
    if rank == 1:
        torch.rand(3)
    with pytest.raises(dsp_auto.AgreementError, match="manual_seed"):
        parallel(x)
    return True


def _groups_on_some_ranks_only(rank, ranks):
    DeviceMesh("cpu", [0], mesh_dim_names=("other",))
    model, x = axial()
    assert deviation(dsp_auto.parallelize(model, sp_mesh(ranks))(x)["x"], model(x)["x"]) <= OUTPUT_TOLERANCE
    if rank == 1:
        with pytest.raises(dsp_auto.MeshError, match="rank 1"):
            dsp_auto.parallelize(model, DeviceMesh("cpu", [0], mesh_dim_names=("other",), _init_backend=False))
    return True


def _free(rank, ranks):
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), capacity="free")
    outputs = parallel(x)
    assert deviation(outputs["x"], model(x)["x"]) <= OUTPUT_TOLERANCE
    return parallel.plan.memory["capacity_bytes"]


def _parts_of_other_ranks_differ(rank, ranks):
    model, _, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), in_layouts={"video": {"sp": 1}})
    with pytest.raises(dsp_auto.LayoutError, match="parts of one tensor"):
        parallel(torch.randn(*((1, 3, 6, 4) if rank == 0 else (3, 6, 4))))
    return True


def _losses_that_differ(rank, ranks):
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(2, 6, 6, 8)
    first, second = model(x)
    (first.tensor_split(ranks, 1)[0].sum() + second.tensor_split(ranks, 1)[1].square().sum()).backward()
    reference = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), out_layouts=[{"sp": 1}, {"sp": 1}])
    first, second = parallel(x)
    (first.sum() if rank == 0 else second.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if reference[name] is not None:
            assert deviation(parameter.grad, reference[name], 1e-3) <= GRADIENT_TOLERANCE, name
    return True


class Resized(nn.Module):
    """Ops whose rules look at numbers: a resampling, and mixing over both dims."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.mix(x).softmax(1)
        small = nn.functional.interpolate(x.movedim(-1, 1), scale_factor=0.5, mode="nearest")
        return (x + nn.functional.interpolate(small, scale_factor=2).movedim(1, -1)).softmax(2)


def _under_defaults(rank, ranks, device, dtype):
    torch.manual_seed(0)
    model, x = Resized(), torch.randn(2, 8, 12, 8)
    expected = model(x)
    reference = gradients(model, expected, [])
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = parallel(x)
        grads = gradients(model, found, [])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert deviation(found, expected) <= OUTPUT_TOLERANCE
    return max(deviation(grads[name], grad, 1e-3) for name, grad in reference.items())


def _training(rank, ranks, steps):
    losses = []
    for parallelized in (False, True):
        model, args, _ = transformer_2d(**SMALL)
        run = dsp_auto.parallelize(model, sp_mesh(ranks)) if parallelized else model
        optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)
        own = []
        for _ in range(steps):
            loss = (run(*args) - args[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        losses.append(own)
    return losses


# --- the promises


def test_the_parallel_module_keeps_keys_parameters_signature_and_hooks(world):
    assert all(world(2).run(_keeps_the_module))


def test_arguments_may_be_optional_none_keyword_or_no_tensors_and_plans_are_kept_up_to_the_bound(world):
    assert world(2).run(_takes_every_argument) == [4, 4]


def test_train_and_eval_are_different_signatures(world):
    assert world(2).run(_modes_are_signatures) == [[False, True]] * 2


def test_with_arguments_the_plan_is_made_at_once(world):
    assert all(world(2).run(_plans_at_once_with_arguments))


def test_every_node_of_the_local_program_has_its_local_shape_and_module_path(world):
    assert world(2).run(_local_program) == [(True, True)] * 2


def test_buffers_that_forward_changes_end_up_as_on_one_device(world):
    assert all(world(2).run(_buffers_change))


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (1, 2)])
def test_inputs_may_arrive_and_outputs_may_leave_cut_along_a_dim(world, ends):
    for used in world(2).run(_sharded_ends, *ends):
        assert "gather" not in used  # nothing is whole at either end


def test_pieces_that_are_not_cut_like_tensor_split_are_refused(world):
    assert all(world(2).run(_uneven_pieces_are_refused))


def test_ranks_with_different_shapes_are_told_so_before_anything_hangs(world):
    for message in world(2).run(_different_shapes):
        assert "[2, 6, 5, 8]" in message and "[2, 4, 5, 8]" in message and "rank 0" in message


def test_ranks_with_different_values_are_told_which_and_what_to_do(world):
    first, second, later, mask, half, both = world(2).run(_different_values)[0]
    assert first == later and "args[0] (float32[2, 6, 5, 8]) differ: rank 0: " in first and "rank 1: " in first
    assert "DistributedSampler" in first and "same batch" in first
    assert "args[1] (float32[2, 5, 8])" in second
    assert "kwargs['mask'] (bool[2, 6, 5, 8])" in mask and "kwargs['page'] (bfloat16[2, 6, 5, 8])" in half
    assert "args[0]['x'][0]" in both and "kwargs['page']" in both


def test_values_are_compared_at_the_first_call_of_a_signature_and_at_no_later_one(world):
    assert world(2).run(_equal_values) == [(True, [(1,), (1,)])] * 2


def test_ranks_that_hold_different_parameters_or_buffers_are_told_which(world):
    first, second, third = world(2).run(_different_parameters)[0]
    assert "mlp.0.weight" in first and "running_mean" not in first and "torch.manual_seed" in first
    assert "norm.running_mean" in second and "mlp.0.weight" not in second
    assert "mlp.0.weight" in third


def test_values_that_differ_as_rounding_does_are_a_warning(world):
    assert all(world(2).run(_rounded_values))


def test_values_are_compared_over_the_ranks_that_hold_the_same(world):
    for (parts, whole), found in world(4).run(_values_of_parts):
        assert re.search(r"args\[0\] \(float32\[2, 3, 5, 8\]\) differ: rank 0: .*; rank 2: ", parts) and "args[1]" not in parts
        assert "args[1] (float32[2, 6, 5, 8]) differ: ranks 0, 2: " in whole and "args[0]" not in whole
        assert found <= OUTPUT_TOLERANCE


def test_ranks_with_different_options_are_told_so(world):
    assert all(world(2).run(_different_options))


def test_ranks_with_different_versions_are_told_so(world):
    assert all(world(2).run(_different_versions))


def test_ranks_with_different_models_are_told_so(world):
    assert all(world(2).run(_different_models))


def test_a_model_on_other_devices_than_those_of_the_mesh_is_told_to_move(world):
    assert all(world(2).run(_on_another_device))


def test_an_error_on_one_rank_is_an_error_on_all(world):
    (first, message), (second, _) = world(2).run(_one_rank_fails)
    assert (first, second) == ("AgreementError", "CaptureError") and "no such thing" in message


def test_serial_dropout_draws_what_one_device_draws_and_ranks_with_different_seeds_are_told_so(world):
    assert all(equal <= OUTPUT_TOLERANCE for equal in world(2).run(_dropout))


def test_parameters_that_the_loss_does_not_use_get_no_gradient(world):
    assert world(2).run(_unused_parameters)[0] == ["spare.bias", "spare.weight", "two.bias", "two.weight"]


def test_tensors_that_are_one_tensor_are_told_from_tensors_that_are_two(world):
    assert world(2).run(_aliases) == [2, 2]


def test_a_tensor_used_with_and_without_a_gradient_gets_its_whole_gradient_once(world):
    for result in world(2).run(compare, build_grad_and_no_grad, {}):
        assert result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]
        predicted, measured = result["plan"]["communication"]["by_primitive"], result["measured"]
        assert measured["gather forward"][1] == predicted["gather"]["forward_bytes"]


def test_a_deep_copy_runs_its_own_weights_and_pickling_says_what_to_save(world):
    assert all(world(2).run(_copies_and_pickles))


def test_what_changes_in_the_model_after_the_first_call_changes_in_the_parallel_module(world):
    assert all(world(2).run(_changes_after_the_first_call))


def test_random_states_that_drift_apart_are_told(world):
    assert all(world(2).run(_random_state_drifts))


def test_groups_that_only_some_ranks_made_hang_nothing(world):
    assert all(world(2).run(_groups_on_some_ranks_only))


def test_the_capacity_that_is_free_is_one_for_all_ranks(world):
    first, second = world(2).run(_free)
    assert first == second > 2**20


def test_parts_of_different_ranks_of_dims_are_refused_on_every_rank(world):
    assert all(world(2).run(_parts_of_other_ranks_differ))


def test_ranks_whose_losses_use_different_outputs_still_sum_the_right_gradients(world):
    assert all(world(2).run(_losses_that_differ))


@pytest.mark.parametrize("default", [("meta", torch.float32), (None, torch.bfloat16)])
def test_the_defaults_of_torch_for_new_tensors_are_the_models_alone(world, default):
    assert max(world(2).run(_under_defaults, *default)) <= GRADIENT_TOLERANCE


def test_training_on_ranks_loses_what_training_on_one_device_loses(world):
    alone, together = world(2).run(_training, 5)[0]
    assert together == pytest.approx(alone, rel=1e-4) and alone[-1] < alone[0]


def _of_other_order(rank, ranks, order):
    mesh = DeviceMesh("cpu", order)
    model, x = axial()
    with pytest.raises((dsp_auto.MeshError, dsp_auto.AgreementError), match="ascend"):
        dsp_auto.parallelize(model, mesh)(x)
    return True


def test_a_mesh_whose_groups_count_its_ranks_in_another_order_is_refused(world):
    """Those that a DeviceMesh makes count them in ascending order, whatever the order of the mesh."""
    assert all(world(2).run(_of_other_order, [1, 0]))
    assert all(world(4).run(_of_other_order, [[0, 1], [3, 2]]))


def test_a_mesh_of_two_dims_computes_the_same(world):
    results = world(4).run(compare, transformer_2d, {**SMALL, "batch": 2}, shape=(2, 2))
    for result in results:
        assert result["output"] <= OUTPUT_TOLERANCE and result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]
    layouts = {tuple(stage["layout"].values()) for stage in results[0]["plan"]["stages"]}
    assert any("R" not in layout for layout in layouts)


def test_a_mesh_of_one_rank_runs_the_model_as_it_is(world):
    model, x = axial()
    assert dsp_auto.plan(model, "1", (x,)).communication["by_primitive"] == {}
    assert gradients(model, model(x), [])  # the model itself is untouched
