"""`torch.compile(model, backend="dsp_auto")`: the graph that Dynamo traced runs on ranks."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import dsp_auto
from dsp_auto.backend import backend
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, sp_mesh
from tests.test_parallelize import SMALL, WithStatistics


def _compare(model, twin, compiled, x):
    """The compiled twin against the model: worst deviations of outputs, gradients and buffers."""
    results = []
    for module, run in ((model, model), (twin, compiled)):
        module.zero_grad()
        out = run(x)
        (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), [p.grad for p in module.parameters()], [b.double() for b in module.buffers()]))
    (expected, *reference), (found, *own) = results
    assert deviation(found, expected) <= OUTPUT_TOLERANCE
    return max(deviation(a, b, 1e-2) for mine, other in zip(own, reference) for a, b in zip(mine, other))


def _runs(rank, ranks, which):
    torch.compiler.reset()
    torch.manual_seed(0)
    build = WithStatistics if which == "buffers" else lambda: transformer_2d(**SMALL)[0]
    x = torch.randn(2, 4, 5, 4)
    model, twin, other = build(), build(), build()
    twin.load_state_dict(model.state_dict())
    made = []

    def parallelize(*args, **options):
        made.append(dsp_auto.parallelize(*args, **options))
        return made[-1]

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("dsp_auto.backend.parallelize", parallelize)
    options = {"mesh": sp_mesh(ranks), "may_stay_whole": 0.0}
    compiled = torch.compile(twin, backend=backend, options=options, fullgraph=True)
    worst = _compare(model, twin, compiled, x)
    worst = max(worst, _compare(model, twin, compiled, x[:, :3])) if which != "buffers" else worst
    # A model that is alike may be served by the same graph, with parameters of its own.
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    optimizer.step()
    other.load_state_dict(twin.state_dict())
    again = build()
    again.load_state_dict(twin.state_dict())
    compiled = torch.compile(again, backend=backend, options=options, fullgraph=True)
    worst = max(worst, _compare(other, again, compiled, x))
    monkeypatch.undo()
    return worst, all(plan.communication["by_primitive"] for parallel in made for plan in parallel.plans)


@pytest.mark.parametrize("which", ["shapes", "buffers"])
def test_the_backend_computes_what_one_device_computes_and_communicates(world, which):
    for worst, communicates in world(2).run(_runs, which):
        assert worst <= GRADIENT_TOLERANCE and communicates


def test_the_backend_says_what_it_needs():
    graph = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(dsp_auto.MeshError, match="options"):
        backend(graph, [torch.randn(2, 4)])
    with pytest.raises(dsp_auto.DspError, match="stay whole"):
        backend(graph, [torch.randn(2, 4)], options={"mesh": object(), "shard_parameters": True})


def test_the_backend_is_found_by_its_name():
    """torch looks for backends among the entry points of installed packages."""
    told = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    module, _, name = told["project"]["entry-points"]["torch_dynamo_backends"]["dsp_auto"].partition(":")
    assert getattr(importlib.import_module(module), name) is backend
