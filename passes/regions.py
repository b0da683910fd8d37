"""Regions: runs of stages whose activations backward may make again instead of keeping them.

What the model itself runs under `torch.utils.checkpoint` is a region that is recomputed. Elsewhere the planner may choose:
candidates are the model's blocks (module paths up to a number), the modules of a block that makes much of everything, and where
there are no modules, runs between which few bytes pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .checkpointing import region
from .stages import Stage, StageGraph

# A block that makes more than this share of all bytes is cut further, if it holds blocks itself.
LARGE = 0.25


@dataclass(frozen=True)
class Region:
    """Consecutive op stages. forced: the model says that it is recomputed; else the planner decides."""

    number: int
    stages: tuple[int, ...]
    forced: bool


def find_regions(graph: StageGraph, candidates: bool) -> tuple[Region, ...]:
    """The regions of a training step, in order; those of the model, and with `candidates` those that the planner may add."""
    if not graph.training:
        return ()
    numbers = {stage.index: region(stage.op.node) for stage in graph.stages if stage.op is not None}
    ops = [graph.stages[index] for index in numbers]
    found: list[tuple[list[Stage], bool]] = []
    for number, run in itertools.groupby(ops, lambda stage: numbers[stage.index]):
        own = list(run)
        if number is not None:
            if any(graph.factors.values[result].requires_grad for stage in own for result in stage.results):
                found.append((own, True))
        elif candidates:
            found += [(part, False) for part in _candidates(own, sum(_made(graph, stage) for stage in ops), graph)]
    return tuple(Region(n, tuple(stage.index for stage in own), forced) for n, (own, forced) in enumerate(found))


def _made(graph: StageGraph, stage: Stage) -> int:
    return sum(graph.storages[result].root.nbytes for result in stage.results)


def _candidates(stages: Sequence[Stage], total: int, graph: StageGraph) -> list[list[Stage]]:
    blocks = _by_block(stages, 1, total, graph)
    if blocks:
        return blocks
    return _by_child(stages, "") or _runs(stages, graph)


def _by_block(stages: Sequence[Stage], numbers: int, total: int, graph: StageGraph) -> list[list[Stage]]:
    """Runs of stages in one block, which is what the path says up to its n-th number."""
    found: list[list[Stage]] = []
    for block, run in itertools.groupby(stages, lambda stage: _block(stage.path, numbers)):
        own = list(run)
        if block is None or len(own) < 2:
            continue
        inner = _by_block(own, numbers + 1, total, graph) or _by_child(own, block)
        if len(inner) > 1 and sum(_made(graph, stage) for stage in own) > LARGE * total:
            found += inner
        else:
            found.append(own)
    return found


def _block(path: str, numbers: int) -> str | None:
    parts = path.split(".") if path else []
    at = [n for n, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: at[numbers - 1] + 1]) if len(at) >= numbers else None


def _by_child(stages: Sequence[Stage], parent: str) -> list[list[Stage]]:
    """Runs of stages in one of a module's children."""

    def child(stage: Stage) -> str:
        return stage.path.removeprefix(parent).lstrip(".").partition(".")[0]

    runs = [list(run) for path, run in itertools.groupby(stages, child) if path]
    return [run for run in runs if len(run) > 1]


def _runs(stages: Sequence[Stage], graph: StageGraph) -> list[list[Stage]]:
    """About as many runs as each has stages, cut where the fewest bytes pass."""
    count = math.isqrt(len(stages))
    if count < 2:
        return []
    last = {storage: max(use.stage for use in uses) for storage, uses in graph.uses.items()}
    crossing = []
    for n in range(1, len(stages)):
        before = {result for stage in stages[:n] for result in stage.results if last.get(result, 0) >= stages[n].index}
        crossing.append(sum(graph.storages[result].root.nbytes for result in before))
    cuts, length = [0], len(stages) / count
    for part in range(1, count):
        near = range(max(cuts[-1] + 2, round((part - 0.5) * length)), min(round((part + 0.5) * length), len(stages) - 1))
        if near:
            cuts.append(min(near, key=lambda n: (crossing[n - 1], abs(n - part * length))))
    return [list(stages[a:b]) for a, b in itertools.pairwise([*cuts, len(stages)])]
