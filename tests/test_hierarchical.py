"""A switch over two mesh dims in turn gives what one all-to-all over all their ranks gives, and is taken where it is faster."""

from __future__ import annotations

import itertools

import pytest
import torch

import dsp_auto
from dsp_auto import simulate
from dsp_auto.cost_models.hardware import Hardware, Kernel, Link
from dsp_auto.mesh import Mesh
from dsp_auto.rehearse import rehearse
from dsp_auto.shards import nested_sizes
from examples.transformer_2d import build

dsp = torch.ops.dsp


def on_rank(rank, mesh, whole, cotangent, in_turn):
    """This rank's part after the switch of dim 0 for dim 2, and the gradient of its part before."""
    outer, inner = mesh.coordinate(rank)
    gathered, scattered = (list(nested_sizes(whole.shape[dim], mesh.sizes)) for dim in (0, 2))
    mine = whole.split(gathered, 0)[rank].clone().requires_grad_()
    everyone = (mesh.ranks, rank, "all")
    both = (mesh.sizes[0], outer, f"outer {inner}", mesh.sizes[1], inner, f"inner {outer}")
    if in_turn:
        out = dsp.hierarchical_switch(mine, 0, gathered, 2, *both, scattered)
    else:
        out = dsp.switch(mine, 0, gathered, 2, *everyone, scattered)
    out.backward(cotangent.split(scattered, 2)[rank])
    return out.detach(), mine.grad


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("shape", [(12, 2, 24), (7, 3, 11), (5, 1, 6), (1, 1, 13)])
def test_two_all_to_alls_in_turn_are_one_forward_and_backward(sizes, shape):
    mesh = Mesh(("outer", "inner"), sizes)
    whole, cotangent = torch.randn(shape), torch.randn(shape)
    told = [
        simulate.run(mesh.ranks, lambda rank, in_turn=in_turn: on_rank(rank, mesh, whole, cotangent, in_turn))
        for in_turn in (False, True)
    ]
    for (out, grad), (other, other_grad) in zip(*told, strict=True):
        assert torch.equal(out, other) and torch.equal(grad, other_grad)


def cluster(latency: float) -> Hardware:
    """Fast links inside a node, and a network between nodes on which every message costs `latency` seconds."""
    links = {"node": Link(50e9, latency), "sp": Link(400e9, 1e-7)}
    return Hardware("cluster", intra=Link(400e9, 1e-7), links=links, kernels={"memory": Kernel()})


@pytest.mark.parametrize("size", [(8, 16), (7, 18)], ids=["even", "uneven"])
def test_it_is_taken_where_messages_between_nodes_are_dear_and_computes_the_same(size):
    frames, tokens = size
    mesh = Mesh(("node", "sp"), (2, 3))
    counts = {}
    for latency in (1e-3, 0.0):
        model, args, kwargs = build(frames=frames, tokens=tokens, hidden=32, heads=4)
        found = rehearse(model, mesh, args, kwargs, strategy="dsp", objective="time", hardware=cluster(latency))
        assert found.output[0] <= 1e-5 and found.gradient[0] <= 1e-4
        assert all(entry.agrees for entry in found.traffic)
        counts[latency] = set(found.plan.communication["by_primitive"])
    assert "hierarchical_switch" in counts[1e-3] and "hierarchical_switch" not in counts[0.0]


def test_for_least_bytes_it_is_never_taken():
    for frames, tokens in itertools.product((8, 7), (16, 18)):
        model, args, kwargs = build(frames=frames, tokens=tokens, hidden=32, heads=4)
        plan = dsp_auto.plan(model, "2x2", args, kwargs, strategy="dsp")
        assert "hierarchical_switch" not in plan.communication["by_primitive"]
