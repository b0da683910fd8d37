"""What a node of a captured graph stands for: its values, where it is in the model, the call that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from .notation import OpCall

ValueId = tuple[str, int]  # node name, index among the node's results


def node_values(node: fx.Node) -> tuple[Any, ...]:
    """The fake values that a node produces, one per result."""
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def on_the_host(tensors: Iterable[Tensor]) -> Callable[[Tensor], bool]:
    """Tells of a tensor of a model, all of whose tensors are given, whether it is on the CPU while the model computes on
    accelerators."""
    kinds = {tensor.device.type for tensor in tensors}
    return lambda tensor: tensor.device.type == "cpu" and kinds != {"cpu"}


def module_path(node: fx.Node) -> str:
    """Where in the user's model the op stands: `blocks.3.attn`, empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else ""


def calls(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """The calls of modules that the op stands in, outermost first: a name of the call, and the module's path."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((name, path.removeprefix("L['self']").removeprefix(".")) for name, (path, _) in stack.items())


def is_getitem(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target.__name__ == "getitem"
    )


def value_id(node: fx.Node) -> ValueId:
    """The value that a node stands for: `getitem` only names one of its operand's results."""
    if is_getitem(node):
        return (node.args[0].name, node.args[1])
    return (node.name, 0)


def operand_ids(node: fx.Node) -> list[ValueId]:
    """The tensor operands of a node, in the order in which its arguments name them."""
    found: list[ValueId] = []

    def note(argument: fx.Node) -> fx.Node:
        if is_tensor(argument):
            found.append(value_id(argument))
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found


def is_tensor(node: fx.Node) -> bool:
    """Whether the node stands for one tensor (not for several, nor for a number)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def node_call(node: fx.Node) -> OpCall:
    """The call that a node of the graph makes, as rules see it."""
    results = [value for value in node_values(node) if isinstance(value, torch.Tensor)]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"] if is_tensor(n) else n)
    return OpCall.of(node.target, args, kwargs, results)
