"""Lifetimes: what is in memory at each program point that can be the peak, before anything is decided.

One point for each stage going forward, and in training one more for its backward. At a point are alive

    kept       storages that autograd has saved by now, in every layout in which somebody saved them
    made       storages that are alive and that nobody has saved
    used       copies that the stage's operands were resharded into, where nobody saves them
    internal   what ops save of their own making (a norm's statistics, attention's log-sum-exp)
    gradients  in backward: those of the stage's operands and results, and of storages that wait across it

Parameters, and inputs as they arrive, are on every device under any plan and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .capture import Program
from .checkpointing import region
from .nodes import ValueId
from .stages import OP, Stage, StageGraph, Use


@dataclass(frozen=True)
class Made:
    """Bytes of a storage in the layout its maker gives it."""

    storage: ValueId


@dataclass(frozen=True)
class Used:
    """Bytes of a storage in the layout that one use wants; `only_resharded`: nothing where it takes what is made."""

    use: Use
    only_resharded: bool


@dataclass(frozen=True)
class Kept:
    """Bytes of a storage in each distinct layout that its holders keep: the maker's, or that of a use."""

    storage: ValueId
    by_maker: bool
    by_uses: tuple[Use, ...]


@dataclass(frozen=True)
class Internal:
    """Bytes that a stage's op saves, shared out where the op is."""

    stage: int
    nbytes: int


Term = Made | Used | Kept | Internal


@dataclass(frozen=True)
class Point:
    """`kept` adds to what all earlier points keep; `alive` is there at this point only."""

    stage: int
    phase: str  # "forward" or "backward"
    kept: tuple[Term, ...]
    alive: tuple[Term, ...]


def lifetimes(program: Program, graph: StageGraph) -> tuple[Point, ...]:
    """The program points in the order in which the forward reaches them."""
    born = {storage.id: storage.maker for storage in graph.storages.values()}
    last = {storage: max(use.stage for use in uses) for storage, uses in graph.uses.items()}
    holders = _holders(program, graph) if graph.training else {}
    first_held = {storage: min(at) for storage, (at, _) in holders.items()}
    counted = {s.id for s in graph.storages.values() if s.kind == "activation"}
    by_birth: dict[int, list[ValueId]] = {}
    for storage in counted:
        by_birth.setdefault(born[storage], []).append(storage)
    held_at: dict[int, list[ValueId]] = {}
    for storage, at in first_held.items():
        held_at.setdefault(at, []).append(storage)
    # Not saved, so freed by reference counting after the last use.
    loose: dict[ValueId, None] = {}
    # Made before and used after: their gradient waits in memory.
    waiting: dict[ValueId, None] = {}
    points: list[Point] = []
    for stage in graph.stages:
        if stage.kind != OP:
            continue
        here = stage.index
        for storage in sorted(by_birth.get(here, ())):
            loose[storage] = None
        kept: list[Term] = []
        for storage in sorted(held_at.get(here, ())):
            loose.pop(storage, None)
            kept.append(holders[storage][1])
        saved = program.saved.get(stage.op.name) if graph.training else None
        if saved is not None and saved.internal_bytes:
            kept.append(Internal(here, saved.internal_bytes))
        for storage in [s for s in loose if last.get(s, born[s]) < here]:
            del loose[storage]
        copies = tuple(
            Used(use, only_resharded=True)
            for use in stage.uses
            if graph.storages[use.storage].kind != "parameter" and not _is_held(use, holders)
        )
        alive = tuple(Made(storage) for storage in loose) + copies
        points.append(Point(here, "forward", tuple(kept), alive))
        if graph.training:
            gradients: list[Term] = [Made(r) for r in stage.results if graph.storages[r].root.requires_grad]
            gradients += [
                Used(use, only_resharded=False)
                for use in stage.uses
                if use.grad and graph.storages[use.storage].kind == "activation"
            ]
            operands = {use.storage for use in stage.uses}
            for storage in [s for s in waiting if last[s] <= here]:
                del waiting[storage]
            gradients += [Made(storage) for storage in waiting if storage not in operands]
            waiting |= {
                s: None
                for s in by_birth.get(here, ())
                if last.get(s, 0) > here and graph.storages[s].root.requires_grad
            }
            gradients += _recomputed(program, graph, stage)
            points.append(Point(here, "backward", (), tuple(gradients)))
    return tuple(points)


def _recomputed(program: Program, graph: StageGraph, stage: Stage) -> list[Term]:
    """In the backward of a checkpoint: all that its ops save, and that is not kept anyway."""
    found: dict[Term, None] = {}
    for saved in program.recomputed.get(region(stage.op.node), ()):
        for value in saved.values:
            storage = graph.views[value][0] if value in graph.views else None
            maker = graph.stages[graph.storages[storage].maker] if storage is not None else None
            if maker is not None and maker.op is not None and region(maker.op.node) == region(stage.op.node):
                found[Made(storage)] = None
        if saved.internal_bytes:
            found[Internal(stage.index, saved.internal_bytes)] = None
    return list(found)


def _is_held(use: Use, holders: dict) -> bool:
    found = holders.get(use.storage)
    return found is not None and use in found[1].by_uses


def _holders(program: Program, graph: StageGraph) -> dict[ValueId, tuple[list[int], Kept]]:
    """For each storage that autograd saves: the stages that save it, and in whose layouts."""
    found: dict[ValueId, tuple[list[int], list[Use], list[bool]]] = {}
    for stage in graph.stages:
        saved = program.saved.get(stage.op.name) if stage.op is not None else None
        for value in saved.values if saved is not None else ():
            storage = graph.views[value][0] if value in graph.views else None
            if storage is None or graph.storages[storage].kind != "activation":
                continue
            at, uses, by_maker = found.setdefault(storage, ([], [], []))
            at.append(stage.index)
            own = [use for use in stage.uses if use.storage == storage]
            # An alias (a slice of the storage) keeps the storage as it was made.
            if own:
                uses += [use for use in own if use not in uses]
            else:
                by_maker.append(True)
    return {
        storage: (at, Kept(storage, bool(by_maker), tuple(uses))) for storage, (at, uses, by_maker) in found.items()
    }
