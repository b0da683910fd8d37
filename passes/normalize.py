"""Normalize: small changes to a captured graph, none of which changes what it computes."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_TAKES_SHAPE = {
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
_FILLS = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}


def drop_assertions(graph: fx.Graph) -> None:
    """Export's own checks of metadata hold on one device's shapes; the plan has its own."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def compose(graph: fx.Graph) -> None:
    """Ops that functionalization took apart for the sake of a result that nobody uses become what the model called."""
    for node in list(graph.nodes):
        composite = None
        if node.target is aten.native_dropout.default and node.args[2]:
            composite, args = aten.dropout.default, node.args
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            composite, args = aten.batch_norm.default, (*node.args[:5], False, *node.args[5:], True)
        if composite is None or any(user.args[1] for user in node.users):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(composite, args)
        new.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


def write_out_shapes(graph: fx.Graph) -> None:
    """Where an op reads only the shape or the dtype of an operand, it takes them as they are, and not the operand: that may
    have any layout then, and waits for no gradient."""
    for node in list(graph.nodes):
        made = node.meta.get("val")
        if node.target in _TAKES_SHAPE:
            call = (_TAKES_SHAPE[node.target], (node.args[0], list(made.shape)))
        elif node.target in _FILLS:
            filled = (list(made.shape), _FILLS[node.target])
            call = (aten.full.default, filled, {"dtype": made.dtype, "device": made.device})
        elif node.target is aten.type_as.default:
            call = (aten.to.dtype, (node.args[0], made.dtype))
        else:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(*call)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def drop_empty_parts(graph: fx.Graph) -> None:
    """A tensor without elements adds nothing to what it is joined with, and has no layout."""
    for node in graph.nodes:
        if node.target is not aten.cat.default:
            continue
        sizes = [part.meta["val"].shape for part in node.args[0]]
        if not all(isinstance(size, int) for shape in sizes for size in shape):
            continue
        full = [part for part, shape in zip(node.args[0], sizes) if 0 not in shape]
        if full and len(full) < len(node.args[0]) and len({part.meta["val"].dtype for part in node.args[0]}) == 1:
            node.args = (full, *node.args[1:])
    graph.eliminate_dead_code(is_impure_node=_matters)


def _matters(node: fx.Node) -> bool:
    """Whether a node does something even where nobody uses its results: the random numbers after it are others."""
    return node.is_impure() or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
