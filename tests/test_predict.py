"""A prediction is the sum of what a program launches: kernels, and collectives with the bytes they send."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto.cost_models.compute import Launch
from dsp_auto.cost_models.hardware import Hardware, Kernel, Link, Rate
from dsp_auto.predict import Issued, trace

aten, dsp = torch.ops.aten, torch.ops.dsp
HARDWARE = Hardware("toy", Link(100.0, 1.0), kernels={"memory": Kernel(memory=Rate(1000.0)), "view": Kernel()})
MESH = {"sp": 2}
X, W = (4, 6, 8), (16, 8)  # T is shared out over two ranks


def program(write, *shapes):
    """The fx program that `write(graph, *placeholders)` makes; its placeholders carry shapes as `rewrite` leaves them."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{n}") for n in range(len(shapes))]
    with FakeTensorMode():
        for node, shape in zip(nodes, shapes):
            node.meta["val"] = torch.empty(shape)
    graph.output((write(graph, *nodes),))
    return fx.GraphModule(torch.nn.Module(), graph)


def layer(graph, x, w):
    w = graph.call_function(dsp.replicate.default, ([w], 2, 0, "sp"))
    w = graph.call_function(operator.getitem, (w, 0))
    y = graph.call_function(aten.linear.default, (x, w))
    return graph.call_function(dsp.switch.default, (y, 0, 8, 1, 2, 0, "sp"))


def collectives(events):
    return [event for event in events if isinstance(event, Issued)]


def test_collectives_are_there_with_the_bytes_they_send_forward_and_backward():
    found = trace(program(layer, X, W), [True, True], MESH)
    switched = 4 * 6 * 16 * 4 / 2
    dims = (("sp", 2),)
    assert collectives(found.forward) == [Issued("all_to_all", switched, dims)]
    assert collectives(found.backward) == [
        Issued("all_to_all", switched, dims),
        Issued("all_reduce", 2 * 16 * 8 * 4 / 2, dims),
    ]


def test_kernels_are_there_with_the_copies_that_a_switch_packs():
    found = trace(program(layer, X, W), [True, True], MESH)
    product = 2 * 24 * 8 * 16
    for events, flops in ((found.forward, product), (found.backward, 2 * product)):
        kernels = [event for event in events if isinstance(event, Launch)]
        assert sum(one.flops for one in kernels) == flops
        assert sum(one.nbytes for one in kernels if one.kind == "copy") >= 2 * 4 * 6 * 16 * 4


def test_without_gradients_only_the_forward_is_there():
    found = trace(program(layer, X, W), [False, False], MESH)
    assert len(collectives(found.forward)) == 1 and found.backward == ()


def test_a_halo_sends_to_neighbours():
    def write(graph, x):
        ways = ([2, 2, 2, 2], [0, 1, 3, 5], [3, 5, 7, 8])
        return graph.call_function(dsp.halo.default, (x, 0, *ways, 4, 1, "sp"))

    found = trace(program(write, (2, 5)), [True], {"sp": 4})
    assert collectives(found.forward) == [Issued("send", 2 * 5 * 4, (("sp", 4),))]


def test_a_group_goes_over_the_mesh_dims_it_is_said_to():
    found = trace(program(layer, X, W), [False, False], MESH, {"sp": [("dp", 1), ("sp.0", 2)]})
    assert collectives(found.forward)[0].dims == (("dp", 1), ("sp.0", 2))


def test_seconds_add_up_and_only_what_may_overlap_is_hidden():
    found = trace(program(layer, X, W), [True, True], MESH)
    plain = found.on(HARDWARE)
    sent = 3 * 1.0 + 1.0 + (2 * 768 + 512) / 100  # an all-reduce takes two steps
    assert plain.communication == pytest.approx(sent)
    kernels = [e for e in found.forward + found.backward if isinstance(e, Launch)]
    assert plain.computation == pytest.approx(sum(one.nbytes for one in kernels) / 1000)
    assert plain.seconds == pytest.approx(plain.computation + plain.communication) and plain.hidden == 0
    assert sum(plain.by_kind.values()) == pytest.approx(plain.seconds)
    hiding = found.on(replace(HARDWARE, overlap=1.0))
    assert hiding.hidden > 0 and hiding.seconds == pytest.approx(plain.seconds - hiding.hidden)
