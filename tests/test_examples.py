"""Promises of the example models: both habits are one function, the paper's sizes are met, both export."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.transformer_2d import build

HABITS = ["4d", "flat"]
UNEVEN = dict(layers=2, hidden=32, heads=4, frames=5, tokens=7, batch=2, dtype="float64")
PAPER_720M = dict(layers=28, hidden=1152, heads=16, frames=64, tokens=4096)


def _outputs_and_gradients(habit):
    model, (video,), kwargs = build(**UNEVEN, habit=habit)
    video.requires_grad_()
    output = model(video, **kwargs)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return model, output, {**gradients, "video": video.grad}


def test_habits_agree_in_outputs_and_gradients():
    model, output, gradients = _outputs_and_gradients("4d")
    flat_model, flat_output, flat_gradients = _outputs_and_gradients("flat")
    torch.testing.assert_close(dict(flat_model.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(flat_output, output)
    assert all(g is not None for g in gradients.values())
    torch.testing.assert_close(flat_gradients, gradients)


def test_blocks_attend_over_space_and_time_only():
    """A change at one place reaches its frame after one block, the whole video after two, no other video."""
    model, (video,), _ = build(layers=1, hidden=32, heads=4, frames=3, tokens=4, batch=2, dtype="float64")
    changed = video.clone()
    changed[0, 1, 2] += 1
    space, _ = model.blocks
    size = video.shape[:3]
    moved = (space(model.embed(changed), size) - space(model.embed(video), size)).abs().amax(-1) > 1e-9
    assert moved[0, 1].all() and moved.sum() == 4, "the spatial block mixes the tokens of one frame"
    moved = (model(changed) - model(video)).abs().amax(-1) > 1e-9
    assert moved[0].all() and not moved[1].any(), "both blocks together mix the whole video"


@pytest.mark.parametrize("habit", HABITS)
def test_parameter_count_of_the_720m_config(habit):
    """A block has 12 C^2 in its weights (qkv 3, proj 1, mlp 8), 13 C in biases (3 + 1 + 5) and norms (4)."""
    with torch.device("meta"):
        model, (video,), _ = build(**PAPER_720M, habit=habit)
    layers, c, channels = PAPER_720M["layers"], PAPER_720M["hidden"], video.shape[-1]
    block = 12 * c * c + 13 * c
    ends = (channels * c + c) + 2 * c + (c * channels + channels)
    assert sum(p.numel() for p in model.parameters()) == 2 * layers * block + ends
    assert video.is_meta and video.shape == (1, 64, 4096, 4)


@pytest.mark.parametrize("habit", HABITS)
def test_builds_and_runs_on_fake_tensors(habit):
    with FakeTensorMode():
        model, args, kwargs = build(**PAPER_720M | {"layers": 1}, habit=habit, dtype="bfloat16")
        output = model(*args, **kwargs)
    assert output.shape == args[0].shape and output.dtype == torch.bfloat16


@pytest.mark.parametrize("habit", HABITS)
def test_exports_and_computes_the_same(habit):
    model, args, kwargs = build(**UNEVEN, habit=habit)
    exported = torch.export.export(model, args, kwargs, strict=False)
    torch.testing.assert_close(exported.module()(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default"} <= targets


def test_example_is_reachable_from_the_installed_package():
    module = importlib.import_module("dsp_auto.examples.transformer_2d")
    model, args, kwargs = module.build(layers=1, hidden=16, heads=2, frames=2, tokens=3)
    assert model(*args, **kwargs).shape == (1, 2, 3, 4)


TINY = [word for name, n in dict(UNEVEN, steps=3).items() if name != "dtype" for word in (f"--{name}", str(n))]


def run_script(rank, ranks, name, *argv):
    torch.compiler.reset()
    return importlib.import_module(f"examples.{name}").main([*TINY, *argv])


def one_device(steps, replicas, clipped=False):
    """The mean losses of training on all replicas' videos at once."""
    launch = importlib.import_module("examples.launch")
    _, sizes = launch.options(TINY)
    model, losses = launch.model_on("cpu", sizes), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        video = torch.cat([launch.batch("cpu", sizes, step, replica) for replica in range(replicas)])
        loss = (model(video) - video).square().mean()
        loss.backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_data_parallel_scripts_lose_what_one_device_loses_on_all_videos(world):
    sharded = world(4).run(run_script, "train_fsdp", "--precision", "float32")
    replicated = world(4).run(run_script, "train_ddp")
    assert sharded == [pytest.approx(one_device(3, 2, clipped=True), rel=1e-4)] * 4
    grouped = world(4).run(run_script, "train_groups")
    assert replicated == grouped == [pytest.approx(one_device(3, 2), rel=1e-4)] * 4


def test_the_pipeline_script_loses_what_one_device_loses(world):
    *first, third, fourth = world(4).run(run_script, "train_pipeline")
    assert first == [[], []]
    assert third == fourth == pytest.approx(one_device(3, 1), rel=1e-4)


def test_the_compiled_script_loses_what_one_device_loses(world):
    for losses in world(2).run(run_script, "compile", "--backend", "aot_eager"):
        assert losses == pytest.approx(one_device(3, 1), rel=1e-4)


def test_the_checkpoint_script_goes_on_with_other_ranks_and_another_strategy(world, tmp_path):
    folder = str(tmp_path / "checkpoint")
    first = world(2).run(run_script, "checkpoint", "--folder", folder)[0]
    then = world(4).run(run_script, "checkpoint", "--folder", folder, "--strategy", "megatron-lm")[0]
    assert [*first, *then] == pytest.approx(one_device(6, 1), rel=1e-4)


def test_the_latte_script_makes_the_latents_of_one_device(world):
    latte = importlib.import_module("examples.latte")
    _, sizes = importlib.import_module("examples.launch").options(TINY)
    expected = [latte.generate(latte.pipeline("cpu", sizes), "cpu", sizes, 3, length) for length in (20, 12, 20)]
    for made in world(2).run(run_script, "latte"):
        torch.testing.assert_close([latents for latents, _ in made], expected, rtol=1e-5, atol=1e-5)
        assert [plans for _, plans in made] == [1, 2, 2]
