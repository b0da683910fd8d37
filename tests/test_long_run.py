"""A long run: hundreds of steps whose shapes change lose what one device loses, and hold no more memory at the end."""

from __future__ import annotations

import copy
import gc
import random

import torch
from torch._subclasses import FakeTensorMode

import dsp_auto
from dsp_auto.examples.transformer_2d import build
from dsp_auto.passes import capture
from tests.parity import sp_mesh

STEPS, NEW_EVERY, WARM = 500, 25, 100


def _resident() -> int:
    """Pages of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def _train(rank, ranks):
    """Two trainings side by side, parallel and alone. Lengths come from the last three of a list that grows, so that plans are
    made, used again, and dropped for newer ones."""
    model = build(layers=2, hidden=16, heads=2, frames=6, tokens=8)[0].double()
    alone = copy.deepcopy(model)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks), max_signatures=4)
    pairs = [(run, torch.optim.AdamW(run.parameters(), lr=1e-3)) for run in (parallel, alone)]
    draw, numbers = random.Random(0), torch.Generator().manual_seed(0)
    worst, held = 0.0, []
    for step in range(STEPS):
        frames = 4 + step // NEW_EVERY + draw.randrange(3)
        video = torch.randn(1, frames, 8, 4, generator=numbers, dtype=torch.float64)
        losses = []
        for run, optimizer in pairs:
            loss = (run(video) - video).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]) / losses[1])
        if step + 1 in (WARM, STEPS):
            del loss
            gc.collect()
            held.append((sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()), _resident()))
    return worst, len(parallel.plans), held


def test_500_steps_of_changing_shapes_lose_what_one_device_loses_in_memory_that_stays_flat(world):
    for worst, plans, ((tensors, pages), (tensors_at_the_end, pages_at_the_end)) in world(2).run(_train):
        assert worst < 1e-12 and plans == 4
        assert tensors_at_the_end <= 1.05 * tensors
        assert pages_at_the_end <= 1.1 * pages


def test_what_pytorch_keeps_of_fake_tensors_does_not_grow_with_every_capture(monkeypatch):
    model, _, _ = build(layers=1, hidden=16, heads=2, frames=6, tokens=8)
    video = torch.randn(1, 6, 8, 4)
    capture.capture(model, (video,))
    monkeypatch.setattr(capture, "MOST_FAKE_RESULTS", 0)
    capture.capture(model, (video,))
    once = FakeTensorMode.cache_info().size
    for length in (5, 7, 9):
        capture.capture(model, (torch.randn(1, length, 8, 4),))
        assert FakeTensorMode.cache_info().size <= 1.2 * once


def test_a_capture_leaves_no_tensor_behind():
    """Autograd's graph is kept by an op that saves its own result, unless what it saves is put elsewhere."""

    def plan(length):
        model, _, _ = build(layers=1, hidden=16, heads=2, frames=6, tokens=8)
        dsp_auto.plan(model, "2", (torch.randn(1, length, 8, 4),))
        del model
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    plan(4)
    held = plan(5)
    assert plan(6) <= held and plan(7) <= held
