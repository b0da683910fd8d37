"""Hugging Face Accelerate around a parallel module: what `Accelerator` prepares, saves and takes apart again."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import dsp_auto
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation
from tests.test_examples import TINY, one_device, run_script
from tests.world import launched

SMALL = dict(layers=1, hidden=16, heads=2, frames=5, tokens=7, batch=4)


@contextmanager
def started(rank, ranks):
    """Accelerate as in a process that a launcher has started."""
    with launched(rank, ranks):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _script(rank, ranks, *argv):
    with started(rank, ranks):
        return run_script(rank, ranks, "train_accelerate", *argv)


def test_the_script_loses_what_one_device_loses_on_all_videos(world):
    assert world(4).run(_script) == [pytest.approx(one_device(3, 2, clipped=True), rel=1e-4)] * 4


def test_accelerates_own_launcher_starts_the_script():
    # Accelerate starts several processes where it is told of GPUs, and computes on the CPU where it finds none.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    told = subprocess.run(
        [*command, "dsp_auto.examples.train_accelerate", *TINY], env=environment, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    expected = [f"step {step}: loss {loss:.4f}" for step, loss in enumerate(one_device(3, 1, clipped=True))]
    assert [line for line in told.stdout.splitlines() if line.startswith("step")] == expected


def _accumulated(rank, ranks, folder):
    """Deviations from one device: gradients of two batches that add up, and what comes back from a saved state."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    at = mesh["dp"].get_local_rank()
    (model, (videos,), _), (reference, _, _) = transformer_2d(**SMALL), transformer_2d(**SMALL)
    with started(rank, ranks):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        parallel = dsp_auto.parallelize(model, mesh["sp"])
        run, optimizer = accelerator.prepare(parallel, torch.optim.AdamW(parallel.parameters(), lr=0.1))
        assert isinstance(run, DistributedDataParallel)
        for n in range(2):
            with accelerator.accumulate(run):
                accelerator.backward(run(videos[2 * n + at : 2 * n + at + 1]).square().mean())
        reference(videos).square().mean().backward()
        pairs = zip(model.parameters(), reference.parameters())
        worst = max(deviation(own.grad, other.grad, 1e-3) for own, other in pairs)
        optimizer.step()
        kept = run(videos).detach()
        accelerator.save_state(folder)
        run(videos).square().mean().backward()
        optimizer.step()
        assert not torch.equal(run(videos), kept)
        accelerator.wait_for_everyone()
        accelerator.load_state(folder)
        return worst, deviation(run(videos), kept), accelerator.unwrap_model(run) is parallel


def test_gradients_accumulate_to_those_of_one_device_and_a_saved_state_comes_back(world, tmp_path):
    for gradients, outputs, unwrapped in world(4).run(_accumulated, tmp_path):
        assert gradients <= GRADIENT_TOLERANCE
        assert outputs <= OUTPUT_TOLERANCE
        assert unwrapped


def _mixed(rank, ranks):
    """In mixed precision, and taken out of it again: deviations from a plain module that is treated alike."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    (model, (videos,), _), (reference, _, _) = transformer_2d(**SMALL), transformer_2d(**SMALL)
    with started(rank, ranks):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        both = [accelerator.prepare(one) for one in (dsp_auto.parallelize(model, mesh), reference)]
        found = [[run(videos) for run in both]]
        found.append([accelerator.unwrap_model(run, keep_fp32_wrapper=False)(videos) for run in both])
        assert not torch.equal(found[0][1], found[1][1])
        return [(str(own.dtype), deviation(own, other)) for own, other in found]


def test_mixed_precision_is_that_of_a_plain_module_and_comes_off_again(world):
    for (mixed, coarse), (whole, fine) in world(2).run(_mixed):
        assert mixed == whole == "torch.float32"  # Accelerate gives back outputs as float32
        assert coarse <= 2e-2
        assert fine <= OUTPUT_TOLERANCE
