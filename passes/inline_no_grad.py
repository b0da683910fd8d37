"""Inline regions under `no_grad`, which export keeps as graphs of their own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dsp_auto.errors import CaptureError

from .nodes import module_path

aten = torch.ops.aten


def inline_no_grad(module: fx.GraphModule, grads: Sequence[bool]) -> None:
    """A region under `no_grad` becomes its ops, with a `detach` of what leaves it and of what in-place ops in it read.

    grads: which placeholders require grad. Raises CaptureError where a region changes a tensor that has a gradient: autograd
    then passes that gradient by the change, which no functional program does.
    """
    switch = torch.ops.higher_order.wrap_with_set_grad_enabled
    graph = module.graph = _rebuilt(module.graph)
    graded: set[fx.Node] = set()
    flags = iter(grads)
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if next(flags, False):
                graded.add(node)
            continue
        if node.op != "call_function" or node.target is not switch:
            if node.target is not aten.detach.default and not graded.isdisjoint(node.all_input_nodes):
                graded |= {node, *map(_base, _changed(node))}
            continue
        enabled, body, *operands = node.args
        inner = getattr(module, body.target)
        inline_no_grad(inner, [enabled and operand in graded for operand in operands])
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        env = dict(zip(placeholders, operands, strict=True))
        for attribute in [n for n in inner.graph.nodes if n.op == "get_attr"]:
            name = f"{node.name}_{attribute.target}".replace(".", "_")
            setattr(module, name, getattr(inner, attribute.target))
            with graph.inserting_before(node):
                env[attribute] = graph.get_attr(name)
        with graph.inserting_before(node):
            for n in inner.graph.nodes:
                if n.op != "call_function":
                    continue
                read = {} if enabled else {x: _detached(graph, env[x]) for x in _only_read(n)}
                for changed in [] if enabled else _changed(n):
                    if env.get(_base(changed)) in graded:
                        raise CaptureError(
                            asked="cannot capture the model for training",
                            found=f"under torch.no_grad() it changes a tensor in place that has a gradient ({n.target})",
                            where=module_path(n) or None,
                            remedy="change a copy (tensor.detach().clone()), or change it with gradients",
                        )
                env[n] = graph.node_copy(n, lambda x, read=read, env=env: read[x] if x in read else env[x])
                if enabled and not graded.isdisjoint(env[n].all_input_nodes):
                    graded.add(env[n])
            results = []
            for result in inner.graph.output_node().args[0]:
                new = env[result] if isinstance(result, fx.Node) else result
                results.append(_detached(graph, new) if not enabled and isinstance(new, fx.Node) else new)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.call_function(aten.detach.default, (node,))
    new.meta["val"] = node.meta.get("val")
    return new


def _writes(node: fx.Node) -> list[tuple[Any, bool]]:
    """The arguments of an op that changes some of them, and whether it changes each."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = {argument.name: argument for argument in schema.arguments}
    given = [*zip(node.args, schema.arguments), *((value, named[name]) for name, value in node.kwargs.items())]
    return [(value, bool(own.alias_info is not None and own.alias_info.is_write)) for value, own in given]


def _only_read(node: fx.Node) -> list[fx.Node]:
    return [value for value, written in _writes(node) if not written and isinstance(value, fx.Node)]


def _changed(node: fx.Node) -> list[fx.Node]:
    return [value for value, written in _writes(node) if written and isinstance(value, fx.Node)]


def _base(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of, through the views taken in its graph."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        first = node.target._schema.arguments[0] if node.target._schema.arguments else None
        if first is None or first.alias_info is None or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def _rebuilt(graph: fx.Graph) -> fx.Graph:
    """The same graph, in which every node knows its users: export leaves out those that are dead (torch 2.13)."""
    new = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, copied)
    new.output(result).meta.update(graph.output_node().meta)
    return new
