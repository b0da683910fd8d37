"""Plans models for an accelerator that this computer need not have, and runs the programs of ranks on fake tensors of it.

    python -m tests.on_accelerator

prints a JSON object by model (see `Found`). A process of its own: PyTorch is told for good that there is an accelerator, "gpu",
which computes nothing. Fake tensors of it, and autograd over them, are as on a GPU: tensors of two devices do not mix. Only
attention with a mask is left out: what PyTorch does with the mask needs a kernel of the accelerator.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as make_accelerator

from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, finish, prepare
from dsp_auto.track import track
from examples.transformer_2d import build as transformer_2d
from tests.zoo.axial import axial
from tests.zoo.evoformer import evoformer
from tests.zoo.recurrent import space_time
from tests.zoo.unet3d import unet3d
from tests.zoo.weather import weather

GPU = "gpu"


class HostTable(nn.Module):
    """A table of positions as diffusers makes it: on the CPU at every call, and then moved. It is larger than the input."""

    def __init__(self) -> None:
        super().__init__()
        self.over_rows, self.over_columns = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.linspace(0, 1, size) for size in x.shape[1:3])
        table = torch.outer(rows.sin(), columns.cos())[..., None].expand(-1, -1, 64).exp()
        x = x + self.over_rows(x).softmax(1)
        x = x * table.mean(2, keepdim=True).to(x.device)
        return x + self.over_columns(x).softmax(2)


def host_table():
    return HostTable(), (torch.randn(2, 7, 9, 4),), {}


MODELS: dict[str, tuple[Callable[[], tuple], dict[str, str]]] = {
    "transformer 2d": (transformer_2d, {}),
    "ulysses": (transformer_2d, {"strategy": "ulysses"}),
    "megatron-sp": (transformer_2d, {"strategy": "megatron-sp"}),
    "ring": (axial, {"strategy": "ring"}),
    "axial": (axial, {}),
    "evoformer": (evoformer, {}),
    "rwkv": (partial(space_time, "rwkv"), {}),
    "unet3d": (unet3d, {}),
    "weather": (weather, {}),
    "host table": (host_table, {}),
}


class Found(NamedTuple):
    """dsp: the primitives of rank 0's program, and whether what they give is on the accelerator. tracked, planned: bytes at
    the peak of a step, as found by running it and as planned."""

    dsp: list[tuple[str, bool]]
    tracked: int
    planned: int


def moved(model: nn.Module, given: tuple) -> tuple:
    """A model on the CPU, and what it is given, on the accelerator. (`Module.to` does not take fake tensors.)"""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def move(t: torch.Tensor) -> torch.Tensor:
        new = t.detach().to(GPU)
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None:
                    held[name] = made.setdefault(id(t), (t, move(t)))[1]
    return pytree.tree_map_only(torch.Tensor, move, given)


def nodes(module: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        yield node
        inner = getattr(module, node.target) if node.op == "get_attr" and "." not in node.target else None
        if isinstance(inner, fx.GraphModule):
            yield from nodes(inner, inner.graph)


def planned(build: Callable[[], tuple], options: dict[str, str]) -> Found:
    torch.manual_seed(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = build()
        args, kwargs = moved(model, (args, kwargs))
    program = capture(model, args, kwargs)
    prepared = prepare(program, as_mesh("2"), Options.of(None, None, optimizer="none", **options))
    solution = decide(prepared)
    dsp = []
    for rank in (1, 0):
        plan, graph = finish(prepared, solution, rank)
        found = track(program, graph)
        for node in nodes(program.module, graph):
            values = pytree.tree_leaves(node.meta.get("val"))
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dsp":
                name = node.target.overloadpacket._qualified_op_name.removeprefix("dsp::")
                dsp += [(name, value.device.type == GPU) for value in values if rank == 0]
    return Found(dsp, found.peak_bytes, plan.memory["peak_bytes"])


if __name__ == "__main__":
    make_accelerator(GPU)
    logging.getLogger("dsp_auto").setLevel(logging.ERROR)
    print(json.dumps({name: planned(*entry)._asdict() for name, entry in MODELS.items()}))
