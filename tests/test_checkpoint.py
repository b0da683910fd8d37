"""`torch.distributed.checkpoint`: what is saved under one strategy is loaded under another, on other ranks, and alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dsp_auto
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, sp_mesh

SMALL = {"layers": 1, "hidden": 16, "heads": 4, "frames": 4, "tokens": 8, "batch": 2}
SAVING = {"dsp": 2, "megatron-lm": 2, "fsdp": 4}  # and on how many ranks
LOADING = {"dsp": 4, "megatron-lm": 4, "fsdp": 4}


def _build(kind, ranks, seed):
    """A model that runs in a way, and its optimizer, one step on."""
    model, _, _ = transformer_2d(**SMALL | {"seed": seed})
    x = transformer_2d(**SMALL)[1][0]
    if kind == "fsdp":  # over data-parallel ranks that all have the same batch
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        run = dsp_auto.parallelize(model, mesh["sp"])
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(run, mesh=mesh["dp"])
    elif kind == "alone":
        run = model
    else:
        run = dsp_auto.parallelize(model, sp_mesh(ranks), (x,), strategy=kind)
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2, eps=1e-4)
    _steps(run, optimizer, x, 1)
    return run, optimizer, x


def _steps(run, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (run(x) - x).square().mean().backward()
        optimizer.step()


def _save(rank, ranks, kind, path):
    """Saves, and returns what the model then gives, and what it gives a step later."""
    run, optimizer, x = _build(kind, ranks, seed=0)
    own, states = get_state_dict(run, optimizer)
    assert all(value.shape == p.shape for value, p in zip(own.values(), run.parameters(), strict=True))
    dcp.save({"model": own, "optimizer": states}, checkpoint_id=path)
    found = run(x).detach()
    _steps(run, optimizer, x, 1)
    return found, run(x).detach()


def _load(rank, ranks, kind, paths):
    run, optimizer, x = _build(kind, ranks, seed=1)
    results = []
    for path in paths:
        own, states = get_state_dict(run, optimizer)
        loaded = {"model": own, "optimizer": states}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(
            run, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"],
            options=StateDictOptions(strict=True),
        )  # fmt: skip
        found = run(x).detach()
        _steps(run, optimizer, x, 1)
        results.append((found, run(x).detach()))
    if kind.startswith("megatron"):
        assert all(isinstance(p, DTensor) for p in run.parameters())
    return results


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is so here
def test_what_one_strategy_saves_every_other_loads_on_other_ranks_and_alone(world, tmp_path):
    paths = {kind: str(tmp_path / kind) for kind in SAVING}
    saved = [world(ranks).run(_save, kind, paths[kind])[0] for kind, ranks in SAVING.items()]
    loaded = {kind: world(ranks).run(_load, kind, list(paths.values()))[0] for kind, ranks in LOADING.items()}
    loaded["alone"] = _load(0, 1, "alone", list(paths.values()))
    for results in loaded.values():
        for (found, later), (then, expected) in zip(results, saved, strict=True):
            assert deviation(found, then) <= OUTPUT_TOLERANCE and deviation(later, expected) <= GRADIENT_TOLERANCE
