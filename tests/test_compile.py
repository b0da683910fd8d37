"""`torch.compile` of a parallel module: one graph of this rank's ops and collectives, and the same results and gradients."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils import checkpoint

import dsp_auto
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, gradients, sp_mesh
from tests.test_parallelize import SMALL, WithDropout, WithStatistics, axial


def _compare(model, parallel, compiled, args, kwargs=None):
    """Compiled and not, against each other and the model; gradients that are zero in exact arithmetic are noise."""
    results = [run(*args, **(kwargs or {})) for run in (model, parallel, compiled)]
    if isinstance(results[0], dict):
        assert all(found.keys() == results[0].keys() and found["none"] is None for found in results)
        results = [found["x"] for found in results]
    expected, eager, found = results
    assert deviation(found, expected) <= OUTPUT_TOLERANCE and found.requires_grad == expected.requires_grad
    if expected.requires_grad:
        reference, own = gradients(model, eager, []), gradients(model, found, [])
        assert all(deviation(own[name], grad, 1e-2) <= GRADIENT_TOLERANCE for name, grad in reference.items())


def _whole_graph(rank, ranks, backend):
    torch.compiler.reset()
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    # Numbers that change between calls would become inputs of one graph.
    compiled = torch.compile(parallel, backend=backend, fullgraph=True, dynamic=False)
    extra = torch.randn(2, 5, 8)
    calls = [((x,), {}), ((x[:, :4],), {"scale": 0.5}), ((x, extra), {}), ((x,), {"scale": 2.0, "extra": extra})]
    for args, kwargs in calls:
        _compare(model, parallel, compiled, args, kwargs)
    with torch.no_grad():
        _compare(model, parallel, compiled, (x,))
    parallel.eval()
    _compare(model, parallel, compiled, (x,))
    parallel.train()
    parallel.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    with torch.compiler.set_stance("fail_on_recompile"):
        for args, kwargs in calls:
            _compare(model, parallel, compiled, args, kwargs)
    return len(parallel.plans)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_parallel_module_compiles_to_one_graph_a_signature_and_computes_the_same(world, backend):
    assert world(2).run(_whole_graph, backend) == [6, 6]


def _other_shapes(rank, ranks):
    """As it is compiled by default: a second shape would be any shape."""
    torch.compiler.reset()
    model, x = axial()
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    parallel.compile(backend="eager", fullgraph=True)
    compiled, parallel = parallel, dsp_auto.parallelize(model, sp_mesh(ranks))
    calls = [x, x[:, :4], x[:, :, :3].requires_grad_(), x[:1]]
    for x in (*calls, *calls):
        _compare(model, parallel, compiled, (x,))
    return len(compiled.plans)


def test_other_shapes_are_compiled_for_themselves(world):
    assert world(2).run(_other_shapes) == [4, 4]


def _collectives(rank, ranks):
    """What the compiler sees of collectives, forward and backward, and what the plan counts."""
    torch.compiler.reset()
    seen = []

    def count(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        functional = [target for target in targets if target.startswith("_c10d_functional.")]
        waits = sum("wait_tensor" in target for target in functional)
        seen.append((len(functional) - waits, waits, sum(target.startswith("dsp.") for target in targets)))
        return make_boxed_func(graph.forward)

    model, args, _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    compiled = torch.compile(parallel, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    compiled(*args).square().sum().backward()
    forward = sum(entry["count"] for name, entry in parallel.plan.communication["by_primitive"].items())
    return seen, forward


def test_collectives_reach_the_compiler_as_functional_collectives_with_their_waits(world):
    for seen, planned in world(2).run(_collectives):
        assert len(seen) == 2 and all(calls == waits > 0 and own == 0 for calls, waits, own in seen)
        assert seen[0][0] <= planned


def _kinds(rank, ranks, kind):
    torch.compiler.reset()
    torch.manual_seed(0)
    options = {}
    if kind == "buffers":
        build, x = WithStatistics, torch.randn(2, 3, 5, 4)
    elif kind == "parts":
        options, x = {"strategy": "megatron-lm"}, transformer_2d(**SMALL | {"frames": 4})[1][0]

        def build():
            return transformer_2d(**SMALL | {"frames": 4})[0]
    else:
        build, x = Recomputed, torch.randn(2, 5, 7, 8)
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    parallel = dsp_auto.parallelize(twin, sp_mesh(ranks), **options)
    compiled = torch.compile(parallel, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found, expected = compiled(x), model(x)
        assert deviation(found, expected) <= OUTPUT_TOLERANCE
        reference, own = gradients(model, expected, []), gradients(twin, found, [])
        assert max(deviation(own[n], g, 1e-3) for n, g in reference.items()) <= GRADIENT_TOLERANCE
    for name, buffer in model.named_buffers():
        assert deviation(twin.get_buffer(name).double(), buffer.double()) <= OUTPUT_TOLERANCE
    return True


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def block(self, x):
        y = self.down(torch.sin(self.up(torch.softmax(x, 1))))
        return torch.softmax(y, 2) * y + x

    def forward(self, x):
        return checkpoint.checkpoint(self.block, self.block(x), use_reentrant=False)


@pytest.mark.parametrize("kind", ["buffers", "parts", "checkpoint"])
def test_buffers_that_change_parameters_in_parts_and_checkpoints_compile(world, kind):
    assert all(world(2).run(_kinds, kind))


def _refused(rank, ranks):
    torch.compiler.reset()
    model, args, _ = transformer_2d(**SMALL)
    model.blocks[0].register_forward_hook(lambda module, args, out: None)
    told = []
    for made, x in ((model, args[0]), (WithDropout(), torch.randn(2, 6, 5, 8))):
        parallel = dsp_auto.parallelize(made, sp_mesh(ranks))
        with pytest.raises(Exception, match="DspError") as error:
            torch.compile(parallel, backend="eager", fullgraph=True)(x)
        told.append(str(error.value))
    return told


def test_what_cannot_be_compiled_is_told(world):
    for hooks, random in world(2).run(_refused):
        assert "have hooks that run at every call" in hooks and "rng='serial'" in random


def _inductor(rank, ranks, folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what one rank has compiled the other takes
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Softmax(2)).requires_grad_(False), torch.randn(1, 4, 4, 4)
    parallel = dsp_auto.parallelize(model, sp_mesh(ranks))
    with torch._inductor.config.patch(compile_threads=1):
        _compare(model, parallel, torch.compile(parallel, fullgraph=True), (x,))
    return True


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_parallel_module(world, tmp_path):
    assert all(world(2).run(_inductor, str(tmp_path)))
