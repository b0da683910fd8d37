"""Synthetic graphs: small programs of ATen ops, made without a model and without torch.export."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.cost_models.state import TrainingState
from dsp_auto.mesh import Mesh, as_mesh
from dsp_auto.passes.capture import GraphInput, Program
from dsp_auto.passes.factorize import factorize
from dsp_auto.passes.factors import Factors
from dsp_auto.passes.layout import Layout
from dsp_auto.passes.presets import find_spaces
from dsp_auto.passes.problem import Problem
from dsp_auto.passes.propagate import propagate
from dsp_auto.passes.regions import find_regions
from dsp_auto.passes.stages import make_stages

aten = torch.ops.aten


class Builder:
    """Writes a graph op by op: `b.input("x", 4, 6)`, `b.op(aten.add.Tensor, x, y)`, `b.program(out)`."""

    def __init__(self, training: bool = True) -> None:
        self.graph, self.inputs, self.training = fx.Graph(), [], training

    def _placeholder(self, kind: str, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, device="meta")
        self.inputs.append(GraphInput(kind, name))
        return node

    def input(self, name: str, *shape: int) -> fx.Node:
        return self._placeholder("input", name, shape)

    def parameter(self, name: str, *shape: int) -> fx.Node:
        return self._placeholder("parameter", name, shape)

    def op(self, target, *args, **kwargs) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(tuple(outputs))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = torch.empty(node.meta["val"].shape)
        module = fx.GraphModule({}, self.graph)
        grads = [self.training and entry.kind == "parameter" for entry in self.inputs]
        with torch.set_grad_enabled(self.training):
            training, saved, _ = propagate(module, grads)
        spec = pytree.tree_structure(((), {}))
        return Program(module, tuple(self.inputs), spec, spec, (), training, saved, {})


def problem_of(
    program: Program,
    mesh: str | Mesh = "2",
    change: Callable[[Factors], Factors] = lambda factors: factors,
    in_layouts: dict[str, Layout] | None = None,
    out_layouts: dict[int, Layout] | None = None,
    objective: str = "volume",
    strategy: str = "dsp",
    recompute: bool = False,
    whole: bool = False,
    hardware: Hardware | None = None,
    compute_seconds: Callable[[int, int, bool], float] | None = None,
) -> Problem:
    """The passes up to the problem; `change` may edit what factorize found. recompute: regions may be recomputed; whole:
    capacity is for everything on a device, with Adam."""
    mesh = as_mesh(mesh)
    factors = change(factorize(program))
    graph = make_stages(program, factors, find_spaces(factors, mesh, strategy)[0], in_layouts, out_layouts)
    state = TrainingState() if whole else None
    regions = find_regions(graph, candidates=recompute)
    return Problem(program, graph, objective, hardware, compute_seconds, state, regions, whole)


def random_program(seed: int, ops: int, training: bool) -> Program:
    """A random program over `[T, S, C]`: attention-like ops over T or S, pointwise ops, linears, reshapes, reductions."""
    draw = random.Random(seed)
    sizes = (draw.choice([4, 5, 6]), draw.choice([3, 4, 7]), draw.choice([2, 3]))
    builder = Builder(training)
    x = builder.input("x", *sizes)
    # Whatever follows, T and S are sequence factors: something computes over each.
    values = [builder.op(aten.softmax.int, x, draw.choice([0, 1]))]
    values.append(builder.op(aten.softmax.int, builder.op(aten.transpose.int, values[0], 0, 1), draw.choice([0, 1])))
    values[1] = builder.op(aten.transpose.int, values[1], 0, 1)
    for number in range(ops - 2):
        kind = draw.choice(["softmax", "pointwise", "linear", "add", "reshape", "scale", "half"])
        a = draw.choice(values)
        if kind == "softmax":
            values.append(builder.op(aten.softmax.int, a, draw.choice([0, 1])))
        elif kind == "pointwise":
            values.append(builder.op(draw.choice([aten.gelu.default, aten.sin.default]), a))
        elif kind == "linear":
            weight = builder.parameter(f"w{number}", sizes[2], sizes[2])
            values.append(builder.op(aten.linear.default, a, weight))
        elif kind == "add":
            values.append(builder.op(aten.add.Tensor, a, draw.choice(values)))
        elif kind == "reshape":
            flat = builder.op(aten.reshape.default, a, [sizes[0] * sizes[1], sizes[2]])
            values.append(builder.op(aten.reshape.default, builder.op(aten.neg.default, flat), list(sizes)))
        elif kind == "scale":
            mean = builder.op(aten.mean.dim, a, [draw.choice([0, 1])], True)
            values.append(builder.op(aten.mul.Tensor, a, mean))
        else:
            values.append(builder.op(aten.to.dtype, a, draw.choice([torch.float64, torch.float32])))
    unused = [value for value in values if not value.users]
    return builder.program(*unused)
