"""Pipeline parallelism around sequence parallelism: the stages of `torch.distributed.pipelining` are parallel modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import dsp_auto
from dsp_auto.mesh import as_mesh
from dsp_auto.parameters import whole_value
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, finish, prepare
from examples.train_pipeline import Part
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, TORCH, deviation

SMALL = dict(layers=2, hidden=16, heads=2, frames=5, tokens=7, batch=4)
# Of each schedule: which stages the first and the second rank hold, and whether stages are told what they take and give.
SCHEDULES = {
    "GPipe told": ("ScheduleGPipe", ((0,), (1,)), True),
    "GPipe": ("ScheduleGPipe", ((0,), (1,)), False),
    "1F1B told": ("Schedule1F1B", ((0,), (1,)), True),
    "1F1B": ("Schedule1F1B", ((0,), (1,)), False),
    "interleaved": ("ScheduleInterleaved1F1B", ((0, 2), (1, 3)), False),
    "zero bubble": ("ScheduleInterleavedZeroBubble", ((0, 2), (1, 3)), False),
    "zero bubble V": ("ScheduleZBVZeroBubble", ((0, 3), (1, 2)), False),
}


def _pipeline(rank, ranks, order, name, held, told, strategy=None, steps=2):
    """Worst deviation of losses and gradients from one device, of steps whose gradients add up; the plans of each stage."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=order)
    own, count = held[mesh["pp"].get_local_rank()], sum(map(len, held))
    (model, (video,), _), (reference, _, _) = transformer_2d(**SMALL), transformer_2d(**SMALL)
    target = torch.randn(video.shape, generator=torch.Generator().manual_seed(3))
    inside = torch.empty(1, *video.shape[1:3], 16, requires_grad=True)
    stages = []
    for n in own:
        parallel = dsp_auto.parallelize(Part(model, n, count), mesh["sp"], strategy=strategy)
        known = {}
        if told:
            known["input_args"] = video[:1] if n == 0 else inside
            known["output_args"] = inside if n < count - 1 else torch.empty(video[:1].shape, requires_grad=True)
        group = mesh["pp"].get_group()
        stages.append(pipelining.PipelineStage(parallel, n, count, torch.device("cpu"), group=group, **known))
    schedule = getattr(pipelining, name)(stages if len(own) > 1 else stages[0], 4, loss_fn=F.mse_loss, scale_grads=False)
    first, last = 0 in own, count - 1 in own
    worst, losses = 0.0, []
    for _ in range(steps):
        made = schedule.step(*[video] * first, target=target if last else None, losses=losses)
        expected = reference(video)
        loss = F.mse_loss(expected, target)
        (4 * loss).backward()  # the sum over the microbatches
        if last:
            worst = max(worst, deviation(made, expected), deviation(torch.stack(losses).mean(), loss))
    used = {id(p) for stage in stages for p in stage.submod.parameters()}
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (own.grad is not None) == (id(own) in used)
        if own.grad is not None:
            grad = whole_value(own.grad) if isinstance(own.grad, DTensor) else own.grad
            worst = max(worst, deviation(grad, other.grad, 1e-3))
    return worst, [len(stage.submod.plans) for stage in stages], {s.layout["sp"] for s in stages[0].submod.plan.stages}


ACROSS = pytest.mark.skipif(
    TORCH < (2, 13), reason="torch lets a rank with two neighbouring stages send to itself, which gloo does not do"
)


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=ACROSS if "V" in name else ()) for name in SCHEDULES])
def test_stages_that_are_parallel_modules_have_the_losses_and_gradients_of_one_device(world, schedule):
    order = ("sp", "pp") if schedule == "1F1B" else ("pp", "sp")
    for worst, plans, sharded in world(4).run(_pipeline, order, *SCHEDULES[schedule]):
        assert worst <= GRADIENT_TOLERANCE
        # Seeing what a stage takes and gives is a call like the others, which torch 2.11 makes without gradients.
        assert set(plans) == {1} or TORCH < (2, 13)
        assert len(sharded - {"R"}) == 2  # T and S


@pytest.mark.parametrize("strategy", ["dsp", "megatron-sp", "ring"])
def test_a_backward_that_asks_for_gradients_of_inputs_first_is_right_whatever_is_sharded(world, strategy):
    found = world(4).run(_pipeline, ("pp", "sp"), *SCHEDULES["zero bubble"], strategy)
    assert max(worst for worst, _, _ in found) <= GRADIENT_TOLERANCE


def _trained(staged):
    """How many parameters' gradients each all-reduce sums, in the program of a pipeline's stage or not."""
    model, (video,), _ = transformer_2d(**SMALL)
    program = replace(capture(model, (video.requires_grad_(),)), staged=staged)
    prepared = prepare(program, as_mesh("2"), Options.of())
    plan, graph = finish(prepared, decide(prepared))
    found = [len(node.args[0]) for node in graph.nodes if node.target is torch.ops.dsp.replicate.default]
    assert plan.communication["by_primitive"]["replicate"]["count"] == len(found)
    return found


def test_parameters_are_summed_together_but_in_a_stage_of_a_pipeline_whose_backward_may_come_in_two_parts():
    together, apart = _trained(False), _trained(True)
    assert len(together) < sum(together)
    assert apart == [1] * sum(together)


def _split(rank, ranks):
    """Deviation of the gradients of a model that torch has split into stages by itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "sp"))
    at = mesh["pp"].get_local_rank()
    (model, (video,), _), (reference, _, _) = transformer_2d(**SMALL), transformer_2d(**SMALL)
    halves = pipelining.pipeline(model, (video[:1],), split_spec={"blocks.2": pipelining.SplitPoint.BEGINNING})
    parallel = dsp_auto.parallelize(halves.get_stage_module(at), mesh["sp"])
    stage = pipelining.PipelineStage(parallel, at, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = pipelining.ScheduleGPipe(stage, 4, loss_fn=F.mse_loss)
    made, filled = torch.empty_strided, []

    def fill(*args, **kwargs):
        filled.append(made(*args, **kwargs))
        return filled[-1].fill_(rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_strided", fill)  # what the second stage first sees, which may hold anything
        schedule.step(*[video] * stage.is_first, target=torch.zeros_like(video) if stage.is_last else None)
    assert stage.is_first or TORCH < (2, 13) or any(own.shape == (1, 5, 7, 16) for own in filled)
    reference(video).square().mean().backward()
    others = dict(reference.named_parameters())
    assert any(stage.layout["sp"] != "R" for stage in parallel.plan.stages)
    return max(deviation(own.grad, others[name].grad, 1e-3) for name, own in parallel.named_parameters())


def test_stages_that_torch_has_split_off_have_the_gradients_of_one_device(world):
    assert max(world(4).run(_split)) <= GRADIENT_TOLERANCE


def _values_differ(rank, ranks):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "sp"))
    model, (video,), _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    stage = pipelining.PipelineStage(parallel, 0, 1, torch.device("cpu"), group=mesh["pp"].get_group())
    with pytest.raises(RuntimeError) as error:  # torch's own, around it
        pipelining.ScheduleGPipe(stage, 4, loss_fn=F.mse_loss).step(video + rank, target=video)
    return f"{type(error.value.__cause__).__name__}: {error.value.__cause__}"


def test_a_stage_whose_ranks_are_given_different_values_refuses_them(world):
    """Though what it first runs, to see shapes, may have any values."""
    for told in world(2).run(_values_differ):
        assert told.startswith("AgreementError: the ranks were given different values: those of args[0] (float32[1, 5, 7, 4]) ")


def _disagree(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "sp"))
    model, (video,), _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    mixed = mesh["pp"].get_local_rank() == 0
    for _ in range(3 if mixed else 1):
        try:
            parallel(video[: 1 + rank] if mixed else video)
        except dsp_auto.AgreementError as error:
            return str(error)
    return deviation(parallel(video), model(video))


def test_only_the_ranks_of_a_stage_meet_to_agree(world):
    *told, third, fourth = world(4).run(_disagree)
    assert all("different arguments" in text and "rank 0: (float32[1, 5, 7, 4])" in text for text in told)
    assert third == fourth <= GRADIENT_TOLERANCE
