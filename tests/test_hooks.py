"""Hooks of a model's modules: those that look run at every call, those that change something are part of the program."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import dsp_auto
from dsp_auto.passes.hooks import traced
from dsp_auto.rehearse import rehearse
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, sp_mesh
from tests.zoo.public import MODELS

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "frames": 4, "tokens": 6}


def _assert_same(parallel, model, args):
    model.zero_grad()
    expected = model(*args)
    expected.square().sum().backward()
    reference = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = parallel(*args)
    found.square().sum().backward()
    assert deviation(found, expected) <= OUTPUT_TOLERANCE
    assert max(deviation(p.grad, reference[name], 1e-3) for name, p in model.named_parameters()) <= GRADIENT_TOLERANCE


def _looking(rank, ranks):
    model, args, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(*args)
    plan = parallel.plan
    outs, ins, grads = [], [], []
    block = model.blocks[1]
    handles = [
        block.register_forward_hook(lambda module, args, out: outs.append(out)),
        block.attn.register_forward_pre_hook(lambda module, args: ins.append(args)),
        block.register_full_backward_hook(lambda module, wanted, given: grads.append(given)),
    ]
    parallel(*args)
    for _ in range(2):
        for seen in (outs, ins, grads):
            seen.clear()
        parallel(*args).square().sum().backward()
        assert len(outs) == len(ins) == len(grads) == 1 and parallel.plan is plan
    (out,), (ins,), ((grad,),) = outs, ins, grads
    assert all(type(x) is torch.Tensor and not isinstance(x, FakeTensor) for x in (out, *ins, grad))
    # Over time the second block attends: tokens are cut there.
    assert out.shape == grad.shape == (1, SMALL["frames"], SMALL["tokens"] // ranks, SMALL["hidden"])
    for handle in handles:
        handle.remove()
    _assert_same(parallel, model, args)
    assert len(parallel.plans) == 1
    return len(outs)


def _beside_others(rank, ranks):
    """A hook that looks, one that changes, one that asks for values and one that takes keywords, at one module."""
    model, args, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    values, names = [], []
    mlp = model.blocks[0].mlp
    mlp.register_forward_hook(lambda module, args, out: out * 2)
    mlp.register_forward_hook(lambda module, args, out: values.append(out.sum().item()))
    mlp.register_forward_pre_hook(lambda module, args, kwargs: names.append(len(args)), with_kwargs=True)
    mlp.register_full_backward_pre_hook(lambda module, given: (given[0] * 3,))
    _assert_same(parallel, model, args)
    before = len(values), len(names)
    parallel(*args)
    return len(values) - before[0], len(names) - before[1]


class Leaves(nn.Module):
    """Its hook computes what forward reads, as `torch.nn.utils.weight_norm` does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0))
        self.register_forward_pre_hook(self._prepare)
        self.calls = []

    @staticmethod
    def _prepare(module, args):
        module.wanted = module.scale.square()
        module.calls.append(module.wanted)

    def forward(self, x):
        return (self.inner(x).softmax(1) * self.wanted).softmax(2)


def _leaving(rank, ranks):
    torch.manual_seed(0)
    model = Leaves()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    _assert_same(parallel, model, (torch.randn(2, 6, 5, 8),))
    return bool(model.calls) and not isinstance(model.wanted, FakeTensor)


def _changes_its_mind(rank, ranks):
    model, args, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    changes = []
    model.norm.register_forward_hook(lambda module, args, out: out * 2 if changes else None)
    _assert_same(parallel, model, args)
    changes.append(True)
    with pytest.raises(dsp_auto.DspError, match="norm: a hook that only looked"):
        parallel(*args)
    return True


def _on_one_rank(rank, ranks):
    model, args, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel(*args)
    if rank == 0:
        handle = model.norm.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(dsp_auto.AgreementError, match="rank 0: .*, 1 module whose hooks run"):
        parallel(*args)
    if rank == 0:
        handle.remove()
    _assert_same(parallel, model, args)
    return True


# --- the promises


def test_hooks_that_look_run_at_every_call_on_local_tensors_and_change_no_plan(world):
    assert world(2).run(_looking) == [1, 1]


def test_hooks_that_look_that_change_and_that_ask_for_values_stand_side_by_side(world):
    assert world(2).run(_beside_others) == [(1, 1)] * 2


def test_a_hook_that_leaves_what_forward_reads_is_part_of_the_program_and_runs(world):
    assert all(world(2).run(_leaving))


def test_a_hook_that_looked_and_now_returns_a_value_is_told(world):
    assert all(world(2).run(_changes_its_mind))


def test_hooks_that_change_tensors_in_place_are_told_from_hooks_that_look():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)), []
    looks = model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model[1].register_forward_hook(lambda module, args, out: None if out.mul_(2) is out else out)
    model[2].register_forward_pre_hook(lambda module, args: None if module.running_mean.zero_() is None else None)
    with traced(model, (torch.randn(3, 4),), {}) as hooks:
        assert not model[0]._forward_hooks and model[1]._forward_hooks and model[2]._forward_pre_hooks
    assert hooks.running == hooks.untraced == {looks.id}
    assert len(model[0]._forward_hooks) == 1


class Collects(nn.Module):
    """Hooks of its layers leave what they give in a list that is no module's; forward reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.collected = collected = []
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, out: collected.append(out))

    def forward(self, x):
        self.collected.clear()
        for n, layer in enumerate(self.layers):
            x = x + layer(x).softmax(1 + n)
        return x + sum(self.collected)


def test_hooks_that_leave_what_forward_reads_outside_of_any_module_are_part_of_the_program():
    torch.manual_seed(0)
    model, args = Collects(), (torch.randn(2, 6, 5, 8),)
    seen = []
    looks = model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.sum()))
    with traced(model, args, {}) as hooks:
        assert [len(layer._forward_hooks) for layer in model.layers] == [1, 1]
    assert hooks.untraced == {looks.id} and len(hooks.running) == 3
    found = rehearse(model, "2", args)
    assert found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE


def test_a_model_is_planned_alike_before_and_after_its_own_first_call_put_hooks_into_it():
    model, args, kwargs = MODELS["dpt"]()
    with torch.no_grad():
        before = dsp_auto.plan(model.eval(), "2", args, kwargs)
        model(*args, **kwargs)
        assert any(module._forward_hooks for module in model.modules())
        assert dsp_auto.plan(model, "2", args, kwargs).digest == before.digest


def test_hooks_on_some_ranks_only_are_told_before_anything_hangs(world):
    assert all(world(2).run(_on_one_rank))
