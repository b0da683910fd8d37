"""Fold: stages of repeated blocks that may share one decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
from torch import fx

from .stages import INPUT, Stage, StageGraph


def fold(graph: StageGraph) -> tuple[int, ...]:
    """For each stage the first stage it shares its decision with (itself, where it stands alone).

    Looks for the longest stretch of stages that repeats with some period, then on both sides of it. Sharing asks only
    for equal lists of strategies, so it is a restriction of the problem and never makes it wrong.
    """
    numbers: dict[tuple, int] = {}
    lists: dict[int, int] = {}  # by identity: many stages share one list
    for stage in graph.stages:
        if id(stage.strategies) not in lists:
            lists[id(stage.strategies)] = numbers.setdefault(_strategies(graph, stage), len(numbers))
    tokens = numpy.array([numbers.setdefault(_token(graph, stage, lists), len(numbers)) for stage in graph.stages])
    same = list(range(len(tokens)))
    todo = [(0, len(tokens))]
    while todo:
        begin, end = todo.pop()
        found = _longest_repeat(tokens[begin:end])
        if found is None:
            continue
        start, period, copies = found
        for n in range(period * copies):
            same[begin + start + n] = begin + start + n % period
        todo += [(begin, begin + start), (begin + start + period * copies, end)]
    return tuple(_sources_too(graph, same))


def split(graph: StageGraph, same: Sequence[int], at: int) -> tuple[int, ...]:
    """Copies before stage `at` share their decisions, and those from it on do."""
    first: dict[int, int] = {}
    found = []
    for index, shared in enumerate(same):
        if index < at or graph.stages[index].kind == INPUT:
            found.append(shared)
        else:
            found.append(first.setdefault(shared, index) if shared < at else first.setdefault(shared, shared))
    return tuple(_sources_too(graph, found))


def _sources_too(graph: StageGraph, same: list[int]) -> list[int]:
    """Inputs and parameters that copies of the same stages use in the same way are copies too."""
    first: dict[tuple, int] = {}
    for stage in graph.stages:
        if stage.kind == INPUT:
            root = graph.storages[stage.results[0]].root
            uses = tuple((same[use.stage], use.operand) for use in graph.uses.get(root.id, ()))
            same[stage.index] = first.setdefault((stage.made, root.shape, root.dtype, uses), stage.index)
    return same


def _strategies(graph: StageGraph, stage: Stage) -> tuple:
    """What a stage may do; blocks have the same sequences, and each its own heads and hidden dims."""
    kinds = graph.factors.kinds
    return tuple(
        (tuple(_by_kind(f, kinds) for f in own.factors), own.cuts, own.operands, own.results)
        for own in stage.strategies
    )


def _by_kind(factor: int | None, kinds: Mapping[int, str]) -> int | str | None:
    return "feature" if factor is not None and kinds.get(factor) == "feature" else factor


def _token(graph: StageGraph, stage: Stage, lists: dict[int, int]) -> tuple:
    """Stages with equal tokens are the same op on like factors."""
    return (
        stage.kind,
        str(stage.op.node.target) if stage.op is not None else stage.results,
        lists[id(stage.strategies)],
        tuple((graph.storages[result].root.shape, graph.storages[result].root.itemsize) for result in stage.results),
        tuple((graph.storages[use.storage].kind, use.grad, use.wanted) for use in stage.uses),
        _reach(stage),
    )


def _reach(stage: Stage) -> str:
    """The arguments beside tensors of an op that communicates: how far its windows reach may depend on them."""
    op = stage.op
    if op is None or op.rule is None or not op.rule.communicates:
        return ""
    return str(fx.map_arg((op.node.args, dict(op.node.kwargs)), lambda _: None))


def _longest_repeat(tokens: numpy.ndarray) -> tuple[int, int, int] | None:
    """(start, period, copies) of the stretch `copies` x `period` that covers most, the shortest period of these."""
    best, covered = None, 0
    for period in range(1, len(tokens) // 2 + 1):
        if len(tokens) // period * period <= covered:
            continue
        equal = numpy.concatenate(([False], tokens[period:] == tokens[:-period], [False]))
        edges = numpy.flatnonzero(numpy.diff(equal.astype(numpy.int8)))
        for start, stop in zip(edges[::2], edges[1::2]):
            copies = (stop - start) // period + 1
            if copies > 1 and copies * period > covered:
                best, covered = (int(start), period, int(copies)), copies * period
    return best
