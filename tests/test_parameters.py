"""Parameters in parts: really sharded, and still what users of parameters, optimizers and checkpoints expect."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F

import dsp_auto
from dsp_auto import parameters
from dsp_auto.mesh import Mesh
from dsp_auto.verify import gradients, traffic
from examples.transformer_2d import build as fused
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, TORCH, compare, deviation, sp_mesh

STRATEGIES = ("megatron-lm", "megatron-sp")
SMALL = {"layers": 1, "hidden": 16, "heads": 4, "frames": 4, "tokens": 8, "batch": 2}


class Attention(nn.Module):
    """Separate q, k, v, a tied pair of scales, a frozen bias, and a parameter that nothing uses."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.norm, self.again = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.again.weight = self.norm.weight
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.down.bias.requires_grad_(False)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.again(x))))


def separate(hidden: int = 16, heads: int = 4, batch: int = 2, length: int = 8):
    torch.manual_seed(0)
    return Attention(hidden, heads), (torch.randn(batch, length, hidden),), {}


MODELS = {"fused": (fused, SMALL), "separate": (separate, {})}


class Fused(nn.Module):
    """One weight, seen as `(3 H D) C` or, where there is no attention, as `F C`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, attend: bool = True) -> torch.Tensor:
        if not attend:
            return F.linear(F.gelu(self.qkv(x)), self.qkv.weight.t(), self.out.bias)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def whole(value):
    return parameters.whole_value(value) if isinstance(value, DTensor) else value


# --- run on ranks


def _cuts_as_planned(rank, ranks, shape, placements, factors, place):
    """The part of `cut`, of DTensor's own way back and forth, and of the planner's layout is the same."""
    mesh = init_device_mesh("cpu", shape)
    at = mesh.get_coordinate()
    tensor = torch.arange(torch.Size(factors).numel()).float()
    part = tensor.reshape(factors)
    for size, own, placement in zip(shape, at, placements):
        if placement != Replicate():
            part = part.tensor_split(size, place)[own]
    made = parameters.cut(tensor.reshape(-1, factors[-1]), mesh, placements)
    assert torch.equal(made.to_local().flatten(), part.flatten())
    assert torch.equal(whole(made).flatten(), tensor)
    cut_in_ranges = [Shard(0) if p != Replicate() else p for p in placements]
    ways = [parameters._recut]
    if TORCH >= (2, 13):  # before, DTensor cannot put all strided parts together
        assert torch.equal(made.full_tensor().flatten(), tensor)
        ways.append(DTensor.redistribute)
    for recut in ways:
        ranges = recut(made, placements=cut_in_ranges)
        assert torch.equal(whole(ranges).flatten(), tensor)
        assert torch.equal(recut(ranges, placements=placements).to_local(), made.to_local())
    return True


def _in_memory(rank, ranks, which):
    """How often each parameter and its gradient would fit in the memory of the whole, and how many of the old are left."""
    build, arguments = MODELS[which]
    model, args, _ = build(**arguments)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    old = [weakref.ref(p) for p in model.parameters()]
    gc.disable()  # nor are they held until memory is collected some time
    try:
        parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args, strategy="megatron-lm")
        parallel(*args).square().sum().backward()
    finally:
        gc.enable()
    assert {name: p.shape for name, p in parallel.named_parameters()} == shapes
    assert all(a is b for a, b in zip(parallel.parameters(), model.parameters(), strict=True))
    found = {}
    for name, p in model.named_parameters():
        own, grad = (t.to_local() if isinstance(t, DTensor) else t for t in (p, p.grad))
        # A gradient may share a buffer with others: they are synchronized together.
        assert p.grad is None or (p.grad.shape == p.shape and grad.shape == own.shape), name
        found[name] = p.numel() * p.itemsize / own.untyped_storage().nbytes()
    return found, sum(reference() is not None for reference in old) - sum(p is o() for o in old for p in model.parameters())


def _trains(rank, ranks, which, optimizer, when, steps):
    """Losses, total norms and final parameters of one device and of the ranks."""
    results = []
    for parallelized in (False, True):
        build, arguments = MODELS[which]
        model, args, _ = build(**arguments)
        run = dsp_auto.parallelize(model, sp_mesh(ranks), strategy="megatron-sp") if parallelized else model
        make = {  # eps: some gradients (a key's bias) are zero in exact arithmetic, and Adam's steps would be noise
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, foreach=True),
            "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        }[optimizer]
        if parallelized and when == "after":
            run.prepare(*args)
        own, found = make(run.parameters()), []
        if when == "with state":  # of a step before any parameter was in parts
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.01) if p.requires_grad else None
            own.step()
        for _ in range(steps):
            loss = (run(*args) - args[0]).square().mean()
            own.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(run.parameters(), 0.1)
            own.step()
            found += [loss.item(), whole(norm).item()]
        results.append((found, {name: whole(p.detach()) for name, p in model.named_parameters()}))
    return results


def _accumulates(rank, ranks):
    """A gradient that is there before parameters are cut is kept, and so are hooks."""
    model, args, _ = fused(**SMALL)
    seen = []
    model.blocks[0].attn.qkv.weight.register_hook(lambda grad: grad * 3)
    model.blocks[0].mlp[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    for _ in range(2):
        model(*args).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(*args).square().sum().backward()
    seen.clear()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), strategy="megatron-lm")
    parallel(*args).square().sum().backward()
    assert len(seen) == 1 and seen[0] is model.blocks[0].mlp[0].weight
    return max(deviation(whole(p.grad), expected[name], 1e-3) for name, p in model.named_parameters())


def _state_dicts(rank, ranks, which):
    build, arguments = MODELS[which]
    model, args, _ = build(**arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args, strategy="megatron-lm")
    found = parallel.state_dict()
    assert list(found) == list(before)
    assert {type(p) for value in found.values() for p in value.placements} == {Shard, Replicate}
    assert any(isinstance(p, _StridedShard) for q in model.parameters() for p in q.placements) == (which == "fused")
    assert all(torch.equal(whole(value), before[name]) for name, value in found.items())
    inner = "blocks.0." if which == "fused" else ""
    part = (model.get_submodule(inner[:-1])).state_dict()
    assert all(value.placements == found[inner + name].placements for name, value in part.items())

    changed = {name: value * 2 for name, value in before.items()}
    held = parameters.placements_in(model, sp_mesh(ranks), {})

    def same():
        assert parameters.placements_in(model, sp_mesh(ranks), {}) == held
        return all(torch.equal(whole(v), changed[name]) for name, v in parallel.state_dict().items())

    assert parallel.load_state_dict(changed).missing_keys == [] and same()
    doubled = {name: value.clone() for name, value in parallel.state_dict().items()}
    parallel.load_state_dict(before)
    model.load_state_dict(doubled)
    assert same()
    parallel.load_state_dict(before)
    parallel.load_state_dict(doubled, assign=True)
    assert same()
    parallel.load_state_dict(before)
    outer = nn.Sequential(parallel)  # which loads its parts one by one
    outer.load_state_dict({f"0.{name}": value for name, value in changed.items()})
    assert same() and all(p.shape == changed[name].shape for name, p in parallel.named_parameters())
    name, value = next((n, v) for n, v in changed.items() if v.ndim == 2)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        parallel.load_state_dict(changed | {name: value[1:]})
    plain, _, _ = build(**arguments)
    plain.load_state_dict(changed)
    return deviation(parallel(*args), plain(*args))


def _steps(model, run, args, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (run(*args) - args[0]).square().mean().backward()
        optimizer.step()


def _adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def _saves(rank, ranks, path):
    """Trains and saves; then trains on, and returns what that gives."""
    model, args, _ = fused(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args, strategy="megatron-lm")
    optimizer = _adam(model)
    _steps(model, parallel, args, optimizer, 2)
    dcp.save({"model": parallel.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=path)
    found = parallel(*args).detach()
    _steps(model, parallel, args, optimizer, 2)
    return found, parallel(*args).detach()


def _loads(rank, ranks, path):
    model, args, _ = fused(**SMALL | {"seed": 1})
    _, args, _ = fused(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), args, strategy="megatron-lm")
    optimizer = _adam(model)
    _steps(model, parallel, args, optimizer, 1)  # so that there is a state to load into
    state = {"model": parallel.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=path)
    parallel.load_state_dict(state["model"])
    (optimizer := _adam(model)).load_state_dict(state["optimizer"])
    found = parallel(*args).detach()
    _steps(model, parallel, args, optimizer, 2)
    assert any(isinstance(p.placements[0], _StridedShard) for p in model.parameters())
    assert all(optimizer.state[p]["exp_avg"].placements == p.placements for p in model.parameters())
    return found, parallel(*args).detach()


def _modes_and_shapes(rank, ranks, strategy):
    """Training, evaluation and other shapes in turn, on one set of parameters in parts."""
    model, args, _ = fused(**SMALL)
    plain = copy.deepcopy(model)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), strategy=strategy)
    longer = (torch.randn(1, 6, 8, 4, generator=torch.Generator().manual_seed(1)),)
    worst, held = 0.0, None
    for mode, call in [("train", args), ("eval", args), ("train", args), ("eval", longer), ("train", longer)]:
        parallel.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            found, expected = parallel(*call), plain(*call)
        worst = max(worst, deviation(found, expected))
        held = held or {name: id(p) for name, p in model.named_parameters()}
        assert held == {name: id(p) for name, p in model.named_parameters()}
        if mode == "train":
            own, reference = gradients(model, found, []), gradients(plain, expected, [])
            worst = max(worst, *(deviation(own[name], grad, 1e-3) for name, grad in reference.items()))
    assert len(parallel.plans) == 4
    again = dsp_auto.parallelize(model, sp_mesh(ranks), strategy=strategy)  # a second one of a model in parts
    worst = max(worst, deviation(again(*args), plain(*args)))
    twin = copy.deepcopy(parallel)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert deviation(parallel(*args), plain(*args)) <= OUTPUT_TOLERANCE and not twin(*args).any()
    return worst


def _seen_in_another_way(rank, ranks):
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(2, 8, 16)
    plain = copy.deepcopy(model)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), strategy="megatron-lm")
    worst = 0.0
    for attend in (True, False, True):
        found, expected = parallel(x, attend), plain(x, attend)
        own, reference = gradients(model, found, []), gradients(plain, expected, [])
        differ = [deviation(own[name], grad, 1e-3) for name, grad in reference.items() if grad is not None]
        assert [name for name in own if own[name] is None] == [n for n in own if reference[n] is None]
        worst = max(worst, deviation(found, expected), *differ)
    return worst, str(model.qkv.weight.placements[0])


def _first_in_inference_mode(rank, ranks):
    model, args, _ = separate()
    plain = copy.deepcopy(model)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), strategy="megatron-lm")
    with torch.inference_mode():
        worst = deviation(parallel(*args), plain(*args))
    parallel(*args).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name == "q.weight")
    return max(worst, deviation(parallel(*args), plain(*args)))


# --- the promises

CUTS = [
    ((4,), (Shard(0),), (8, 2, 3), 0),
    ((4,), (_StridedShard(0, split_factor=3),), (3, 8, 2, 3), 1),
    ((4,), (_StridedShard(0, split_factor=4),), (4, 4, 3), 1),
    ((4,), (_StridedShard(0, split_factor=6),), (2, 3, 4, 3), 2),
    ((2, 2), (Shard(0), Shard(0)), (8, 2, 3), 0),
    ((2, 2), (Replicate(), _StridedShard(0, split_factor=2)), (2, 4, 3), 1),
    ((2, 2), (_StridedShard(0, split_factor=3), Replicate()), (3, 4, 2, 3), 1),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_strided_placements_cut_what_the_planner_cuts(world, cut):
    assert all(world(4).run(_cuts_as_planned, *cut))


def _value(dims):
    from dsp_auto.passes.factors import Value

    return Value(("w", 0), dims, (), torch.float32, True)


def test_layouts_and_placements_are_each_others_inverse():
    from dsp_auto.passes.layout import R
    from dsp_auto.passes.layout import Shard as Along

    sizes = {0: 3, 1: 8, 2: 2, 3: 16}
    qkv = _value(((0, 1, 2), (3,)))  # (3 H D) C
    mesh = Mesh(("dp", "sp"), (2, 4))
    for layout in itertools.product((R, Along(1)), (R, Along(3))):
        found = parameters.placements_of(layout, qkv, sizes, mesh)
        assert parameters.layout_of(found, qkv, sizes, mesh) == layout
    split = mesh.split([(2,), (2, 2)])  # its two parts act as the one dim that they are
    assert parameters.placements_of((R, Along(1), Along(1)), qkv, sizes, split) == (
        Replicate(),
        _StridedShard(0, split_factor=3),
    )
    plain = _value(((4,), (3,)))  # a program that sees (48) C
    assert parameters.layout_of((Replicate(), _StridedShard(0, split_factor=3)), plain, sizes | {4: 48}, mesh) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_with_parameters_in_parts_outputs_gradients_and_bytes_are_as_predicted(world, ranks, which, strategy):
    build, arguments = MODELS[which]
    results = world(ranks).run(compare, build, arguments, options={"strategy": strategy})
    for result in results:
        assert result["output"] <= OUTPUT_TOLERANCE and result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]
    measured = [{tuple(key.split()): sent for key, sent in result["measured"].items()} for result in results]
    found = traffic(SimpleNamespace(communication=results[0]["plan"]["communication"]), measured)
    assert found and all(entry.agrees for entry in found), found


@pytest.mark.parametrize("which", MODELS)
def test_parts_over_a_mesh_of_two_dims_compute_the_same(world, which):
    build, arguments = MODELS[which]
    for result in world(4).run(compare, build, arguments, options={"strategy": "megatron-lm"}, shape=(2, 2)):
        assert result["output"] <= OUTPUT_TOLERANCE and result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("which", MODELS)
def test_a_rank_keeps_its_part_of_parameters_and_gradients_and_nothing_else(world, ranks, which):
    for shares, alive in world(ranks).run(_in_memory, which):
        assert alive == 0
        assert {name for name, share in shares.items() if share == ranks} == IN_PARTS[which]
        assert set(shares.values()) == {1, ranks}


IN_PARTS = {
    "fused": {
        f"blocks.{n}.{name}"
        for n in range(2)
        for name in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight")
    },
    "separate": {f"{name}.{kind}" for name in ("q", "k", "v", "up") for kind in ("weight", "bias")}
    | {"out.weight", "down.weight"},
}


@pytest.mark.parametrize("which", MODELS)
def test_parameters_that_do_not_divide_stay_whole_and_plain(world, which):
    for shares, _ in world(3).run(_in_memory, which):
        assert set(shares.values()) == {1}


@pytest.mark.parametrize("when", ["before", "after", "with state"])
@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd"])
def test_optimizers_made_before_or_after_do_what_they_do_on_one_device(world, optimizer, when):
    which = "fused" if when == "before" else "separate"
    for (losses, final), (own, found) in world(2).run(_trains, which, optimizer, when, 3):
        assert own == pytest.approx(losses, rel=1e-4)
        assert max(deviation(found[name], value) for name, value in final.items()) <= GRADIENT_TOLERANCE


def test_gradients_and_hooks_that_are_there_before_are_kept(world):
    assert max(world(2).run(_accumulates)) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("which", MODELS)
def test_a_state_dict_has_whole_shapes_and_ranges_and_loads_whole_or_cut(world, which):
    assert max(world(2).run(_state_dicts, which)) <= OUTPUT_TOLERANCE


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is so here
def test_a_checkpoint_of_two_ranks_goes_on_on_four_and_on_one_device(world, tmp_path):
    then, expected = world(2).run(_saves, str(tmp_path))[0]
    for found, later in world(4).run(_loads, str(tmp_path)):
        assert deviation(found, then) <= OUTPUT_TOLERANCE and deviation(later, expected) <= GRADIENT_TOLERANCE
    model, _, _ = fused(**SMALL | {"seed": 1})
    _, args, _ = fused(**SMALL)
    optimizer = _adam(model)
    _steps(model, model, args, optimizer, 1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert deviation(model(*args).detach(), then) <= OUTPUT_TOLERANCE
    _steps(model, model, args, optimizer, 2)
    assert deviation(model(*args).detach(), expected) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_of_other_signatures_take_the_parameters_as_they_are_held(world, strategy):
    assert max(world(2).run(_modes_and_shapes, strategy)) <= GRADIENT_TOLERANCE


def test_a_program_that_sees_no_such_parts_is_given_the_whole_parameter(world):
    for worst, placement in world(2).run(_seen_in_another_way):
        assert worst <= GRADIENT_TOLERANCE and placement == str(_StridedShard(0, split_factor=3))


def _of_one_model(rank, ranks):
    model, args, kwargs = fused(layers=1, hidden=16, heads=2, frames=4, tokens=6)
    expected = model(*args, **kwargs).detach()
    mesh = sp_mesh(ranks)
    whole, cut = (dsp_auto.parallelize(model, mesh, strategy=name) for name in ("dsp", "megatron-lm"))
    return [deviation(own(*args, **kwargs).detach(), expected) for own in (whole, cut, whole, cut)]


def test_two_parallel_modules_of_one_model_see_its_parameters_as_they_are_held(world):
    assert all(max(told) <= OUTPUT_TOLERANCE for told in world(2).run(_of_one_model))


def test_a_first_call_under_inference_mode_leaves_parameters_that_train(world):
    assert max(world(2).run(_first_in_inference_mode)) <= OUTPUT_TOLERANCE
