"""Kinds: what each factor is to the model, told from the graph.

A *feature* factor is made or contracted by parameters; of the rest, a *sequence* factor is one that some op computes over,
or that the model steps through index by index, and a *batch* factor one that no op does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import networkx
import torch

from .capture import Program
from .factors import Factors, Op


@dataclass(frozen=True)
class Kinds:
    """`of`: "feature", "sequence" or "batch" for each factor.

    inner: features that one weight makes and another contracts, and that no other op needs whole: hidden dims and heads, not
        the width of a residual stream. heads: features side by side in an op that computes over a sequence and contracts no
        weight.
    sequences: sequence factors, those of one sequence together (its pieces, and what they are joined to).
    weights: the nodes that are parameters, or made of nothing else.
    """

    of: dict[int, str]
    inner: frozenset[int]
    heads: frozenset[int]
    sequences: tuple[frozenset[int], ...]
    weights: frozenset[str]


def find_kinds(program: Program, made: Factors) -> Kinds:
    """The kinds of the factors of `made`, whose own are not looked at."""
    weights = {
        node.name
        for node, entry in zip((n for n in program.graph.nodes if n.op == "placeholder"), program.inputs, strict=True)
        if entry.kind == "parameter"
    }
    made_by_weight: set[int] = set()
    contracted: set[int] = set()
    needed: set[int] = set()  # by ops that no weight takes part in, and by norms
    whole = _stepped_through(made)
    for op in made.ops:
        if op.rule is None:
            continue
        derived = [operand[0] in weights for operand in op.operands]
        of_weights = bool(derived) and all(derived)
        if of_weights:
            weights.add(op.name)
        contracts = any(derived) and op.rule.contracts
        for axis in op.rule.computes_over:
            whole |= set(op.axes[axis])
        if not of_weights:
            axes = op.rule.computes_over if contracts else op.rule.computes_over | op.rule.reduces
            needed |= {factor for axis in axes for factor in op.axes[axis]}
        if contracts or (any(derived) and op.node.target is torch.ops.aten.embedding.default):
            by_weight, by_other = (_axes(op, derived, of_weight) for of_weight in (True, False))
            results = {axis for dims in op.rule.outputs for dim in dims for axis in dim}
            for axis in by_weight:
                if axis not in results:
                    contracted |= set(op.axes[axis])
                elif axis not in by_other:
                    made_by_weight |= set(op.axes[axis])
    feature = made_by_weight | contracted
    # A piece of a sequence is one, and what it is joined to; the dims before and after a convolution.
    joined = [
        {factor for axis in (window.source, window.target) if axis in op.axes for factor in op.axes[axis]} - feature
        for op in made.ops
        if op.rule is not None
        for window in op.rule.windows
    ]
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(whole - feature)
    graph.add_edges_from(edge for group in joined for edge in itertools.pairwise(group))
    groups = (frozenset(group) for group in networkx.connected_components(graph) if group & whole)
    sequences = tuple(sorted(groups, key=min))
    whole |= frozenset().union(*sequences)
    kinds = {
        factor: "feature" if factor in feature else "sequence" if factor in whole else "batch" for factor in made.sizes
    }
    heads = _heads(made, kinds, weights) - needed
    return Kinds(kinds, frozenset(made_by_weight & contracted - needed), frozenset(heads), sequences, frozenset(weights))


def _axes(op: Op, derived: list[bool], of_weight: bool) -> set[str]:
    """The axes of the operands that are weights, or of the others."""
    dims = [dims for dims, is_weight in zip(op.known_rule.inputs, derived, strict=True) if is_weight == of_weight]
    return {axis for operand in dims for dim in operand for axis in dim}


def _heads(made: Factors, kinds: dict[int, str], weights: set[str]) -> set[int]:
    found: set[int] = set()
    for op in made.ops:
        if op.rule is None or not any(kinds[f] == "sequence" for axis in op.rule.computes_over for f in op.axes[axis]):
            continue
        # A learned bias may have heads too.
        derived = [op.rule.contracts and operand[0] in weights for operand in op.operands]
        of_weights = _axes(op, derived, True)
        cut = {own for cut in op.cuts if len(cut) == 1 for own in cut if own[0] not in of_weights | op.rule.reduces}
        found |= {op.axes[axis][index] for axis, index in cut}
    return {factor for factor in found if kinds[factor] == "feature"}


def _stepped_through(made: Factors) -> set[int]:
    """Factors of which an op takes all indices apart, or different ops different ones."""
    aten = torch.ops.aten
    indices: dict[int, set[int]] = {}
    for op in made.ops:
        if op.node.target not in (aten.select.int, aten.unbind.int):
            continue
        value = made.values[op.operands[0]]
        dim = (op.node.args[1] if len(op.node.args) > 1 else 0) % len(value.dims)
        taken = {op.node.args[2] % value.shape[dim]} if op.node.target is aten.select.int else set(range(value.shape[dim]))
        for factor in value.dims[dim]:
            indices.setdefault(factor, set()).update(taken)
    return {factor for factor, taken in indices.items() if len(taken) > 1}
