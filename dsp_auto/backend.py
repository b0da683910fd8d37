"""The `torch.compile` backend "dsp_auto": `torch.compile(model, backend="dsp_auto", options={"mesh": mesh})`.

Dynamo hands over the graph of what it traced; that is parallelized like any other module. The other way round, compiling what
`parallelize` returns, lets a compiler see this rank's ops and collectives; here nothing is compiled further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from .errors import MeshError, StrategyError
from .parallelize import parallelize


def backend(module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Callable:
    """What runs in place of a graph that Dynamo traced: its program on this rank, planned at the first call.

    options: `mesh`, a DeviceMesh, and any options of `parallelize` but those that name inputs and outputs. Every rank calls
    with the same tensors and gets the same. Parameters stay whole.

    Raises MeshError without a mesh, StrategyError where parameters are to be held in parts, and at the first call what
    `parallelize` raises.
    """
    chosen = dict(options or {})
    mesh = chosen.pop("mesh", None)
    if mesh is None:
        raise MeshError(
            asked='torch.compile with backend="dsp_auto"',
            found="no mesh among its options",
            remedy='pass options={"mesh": mesh}, a DeviceMesh',
        )
    if chosen.setdefault("shard_parameters", False):
        raise StrategyError(
            asked="shard_parameters=True for a backend of torch.compile",
            found="the parameters are the compiled model's, which stay whole",
            remedy="use dsp_auto.parallelize(model, mesh, shard_parameters=True)",
        )
    graph = _Graph(module, [isinstance(value, nn.Parameter) for value in inputs])
    parallel = parallelize(graph, mesh, **chosen)

    def run(*values: Any) -> Any:
        return parallel(*graph.hold(values))

    return run


class _Graph(nn.Module):
    """A graph whose inputs that are parameters are its own."""

    def __init__(self, module: fx.GraphModule, is_parameter: Sequence[bool]) -> None:
        super().__init__()
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        self.names = [name if own else None for name, own in zip(names, is_parameter, strict=True)]
        self.module = module
        for name in filter(None, self.names):
            self.register_parameter(name, None)

    def hold(self, values: Sequence[Any]) -> list[Any]:
        """The other inputs, having taken the parameters: one compiled graph serves all models that are alike."""
        others = []
        for name, value in zip(self.names, values, strict=True):
            if name is None:
                others.append(value)
            else:
                self._parameters[name] = value
        return others

    def forward(self, *others: Any) -> Any:
        left = iter(others)
        return self.module(*(next(left) if name is None else self._parameters[name] for name in self.names))
