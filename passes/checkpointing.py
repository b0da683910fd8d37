"""Checkpointing: the parts of a model that run under `torch.utils.checkpoint` stay parts whose activations are recomputed.

`torch.export` looks through a checkpoint and leaves no trace of it. So while a model is captured a checkpoint only marks the
ops that it runs (`marking`); a rewritten program then runs each marked part under a checkpoint of its own (`local_module`).
The two private names of `torch.utils.checkpoint` that all its forms come through stand here alone, see
`test_every_form_of_checkpoint_comes_through_the_names_that_are_replaced`.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx import traceback
from torch.utils import checkpoint

from dsp_auto.cost_models.memory import takes_long

_MARK = "dsp_auto.recomputed"
_here = threading.local()


class Marks:
    """How many checkpoints ran."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        number, self.count = self.count, self.count + 1
        with traceback.annotate({_MARK: number}):
            yield


@contextmanager
def marking() -> Iterator[Marks]:
    """Inside, checkpoints run what they are given and mark its ops."""
    marks = Marks()

    def without_reentrant(*args: Any, **kwargs: Any) -> Iterator[None]:
        with marks.one():
            yield

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            # Where nothing that it takes requires a gradient, this form gives none to the parameters inside either.
            wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
            with marks.one(), torch.set_grad_enabled(wanted):
                return function(*args)

    replaced = {"_checkpoint_without_reentrant_generator": without_reentrant, "CheckpointFunction": Reentrant}
    original = {name: getattr(checkpoint, name) for name in replaced}
    for name, value in replaced.items():
        setattr(checkpoint, name, value)
    try:
        yield marks
    finally:
        for name, value in original.items():
            setattr(checkpoint, name, value)


def region(node: fx.Node) -> int | None:
    """The checkpoint that a captured op stands in, None outside of all."""
    return node.meta.get("custom", {}).get(_MARK)


def recompute(body: Callable[..., Any], selective: bool, *args: Any) -> Any:
    """Runs a part of a program; backward runs it again instead of keeping its activations.

    All of it, on every rank: its collectives must meet. selective: but for what it keeps (see `keep`).
    """
    if not torch.is_grad_enabled():
        return body(*args)
    if torch.compiler.is_dynamo_compiling():  # which knows how to recompute, collectives included, but not what to keep
        return checkpoint.checkpoint(body, *args, use_reentrant=False)
    contexts = partial(checkpoint.create_selective_checkpoint_contexts, _policy)
    with checkpoint.set_checkpoint_early_stop(False):
        if selective:
            return checkpoint.checkpoint(body, *args, use_reentrant=False, context_fn=contexts)
        return checkpoint.checkpoint(body, *args, use_reentrant=False)


def keep(results: bool) -> None:
    """Whether what the ops of a body make from here on is kept, though the body is recomputed."""
    if not torch.compiler.is_dynamo_compiling():
        _here.keeps = results


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    """Of what is kept, what takes long. The rest of it (views, copies) is made again from these."""
    kept = getattr(_here, "keeps", False) and takes_long(op)
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


def local_module(graph: fx.Graph, owner: torch.nn.Module) -> fx.GraphModule:
    """A rewritten graph as a module, with each run of ops of one checkpoint as one call of `recompute`.

    owner: the module whose attributes the graph's `get_attr`s are.
    """
    if not any("region" in node.meta for node in graph.nodes):
        return fx.GraphModule(owner, graph)
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes = {node.target: getattr(owner, node.target) for node in graph.nodes if node.op == "get_attr"}
    for number, run in itertools.groupby(_hoisted(graph), lambda node: node.meta.get("region")):
        nodes = list(run)
        if number is None:
            for node in nodes:
                env[node] = new.node_copy(node, env.__getitem__)
            continue
        body, inputs, results = _body(nodes)
        name = f"recomputed_{len(attributes)}"
        attributes[name] = fx.GraphModule(owner, body)
        selective = any(node.meta.get("kept") for node in nodes)
        call = new.call_function(recompute, (new.get_attr(name), selective, *(env[node] for node in inputs)))
        call.meta["val"] = tuple(node.meta["val"] for node in results)
        for position, node in enumerate(results):
            env[node] = new.call_function(operator.getitem, (call, position))
            env[node].meta = dict(node.meta)
    root = torch.nn.Module()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            root.register_buffer(name, value)
        else:
            setattr(root, name, value)
    return fx.GraphModule(root, new)


def _body(nodes: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """The nodes as a graph of their own, what it takes, and what it returns."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    body, own = fx.Graph(), {}
    for node in inputs:
        own[node] = body.placeholder(node.name)
        own[node].meta = dict(node.meta)
    for kept, run in itertools.groupby(nodes, lambda node: node.meta.get("kept", False)):
        if kept:
            body.call_function(keep, (True,))
        for node in run:
            own[node] = body.node_copy(node, own.__getitem__)
        if kept:
            body.call_function(keep, (False,))
    body.output(tuple(own[node] for node in results)).meta["val"] = tuple(node.meta["val"] for node in results)
    return body, inputs, results


def draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers."""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in (node.target, *node.args[:1])
    )


def _hoisted(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in an order in which what a checkpoint does not hold, and does not need it, comes before it. Random numbers
    are drawn in the order of the model."""
    found: list[fx.Node] = []
    waiting: list[fx.Node] = []  # the run of a checkpoint that may go on
    for node in graph.nodes:
        number = node.meta.get("region")
        moves = number is None and node.op != "output" and not set(node.all_input_nodes) & set(waiting)
        if waiting and moves and not draws(node):
            found.append(node)
            continue
        if waiting and number != waiting[0].meta["region"]:
            found += waiting
            waiting = []
        (waiting if number is not None else found).append(node)
    return found + waiting
