"""Plan diff: what two plans do differently, as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .units import show_bytes

if TYPE_CHECKING:
    from .plan import Plan


def show_diff(first: Plan, second: Plan) -> str:
    """The options, stages, reshardings, blocks recomputed and totals that differ; that all are alike, where none does."""
    parts = [
        _table("", ["", "first", "second"], _options(first, second)),
        _table("what ops shard", ["module", "ops", "first", "second"], _stages(first, second)),
        _table(
            "collectives: how many, and wire bytes per device",
            ["primitive", "first", "second"],
            _primitives(first.communication["by_primitive"], second.communication["by_primitive"]),
        ),
        _table("per device", ["", "first", "second", "more"], _totals(first, second)),
    ]
    found = "\n\n".join(part for part in parts if part)
    return found or "the two plans do the same"


def _table(head: str, heads: list[str], rows: Iterator[list[str]]) -> str:
    found = list(rows)
    if not found:
        return ""
    table = tabulate(found, heads, disable_numparse=True)
    return f"{head}\n\n{table}" if head else table


def _options(first: Plan, second: Plan) -> Iterator[list[str]]:
    for name in ("mesh", "split", "strategy", "objective", "versions"):
        own = [_show(getattr(plan, name)) for plan in (first, second)]
        if own[0] != own[1]:
            yield [name, *own]
    options = [plan.decision.get("options", {}) for plan in (first, second)]
    for name in options[0].keys() | options[1].keys():
        own = [_show(given.get(name)) for given in options]
        if own[0] != own[1] and name not in ("strategy", "objective"):
            yield [name, *own]
    kept = [{entry["modules"]: ", ".join(entry["keeps"]) for entry in plan.recomputed} for plan in (first, second)]
    for modules in dict.fromkeys((*kept[0], *kept[1])):
        own = ["recomputed" + f", keeps {of[modules]}" * bool(of[modules]) if modules in of else "kept" for of in kept]
        if own[0] != own[1]:
            yield [modules, *own]


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_show(own)}" for name, own in value.items()) or "none"
    return "none" if value is None else str(value)


def _stages(first: Plan, second: Plan) -> Iterator[list[str]]:
    """Runs of ops in one module that shard something else. Where the two are not of one model, by module alone."""
    shards = [_shards(plan) for plan in (first, second)]
    rows = []
    for key in dict.fromkeys((*shards[0], *shards[1])):
        own = [of.get(key, "not there") for of in shards]
        if own[0] != own[1]:
            rows.append((key[0], own[0], own[1]))
    for (module, *own), run in itertools.groupby(rows):
        yield [module, str(len(list(run))), *own]


def _shards(plan: Plan) -> dict[tuple[str, str], str]:
    """By module and node, what is sharded over each mesh dim."""
    paths = {name: path for name, _, path, _ in plan.decision.get("ops", ())}
    mesh = list(plan.split or plan.mesh)
    return {
        (paths.get(name) or name, name): ", ".join(f"{m}: {own}" for m, own in zip(mesh, shards))
        for name, _, shards in plan.decision.get("stages", ())
    }


def _primitives(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[list[str]]:
    for name in dict.fromkeys((*first, *second)):
        own = [
            f"{own['count']}, {show_bytes(own['forward_bytes'] + own['backward_bytes'])}" if own else "none"
            for own in (first.get(name), second.get(name))
        ]
        if first.get(name) != second.get(name):
            yield [name, *own]


def _totals(first: Plan, second: Plan) -> Iterator[list[str]]:
    for name, group in (
        *((name, "communication") for name in ("forward_bytes", "backward_bytes")),
        *((name, "memory") for name in ("peak_bytes", "activation_bytes", "parameter_bytes", "optimizer_bytes")),
    ):
        own = [getattr(plan, group)[name] for plan in (first, second)]
        more = own[1] - own[0]
        if more:
            what = f"{name.removesuffix('_bytes')}{' wire' if group == 'communication' else ''} bytes"
            yield [what, *map(show_bytes, own), ("+" if more > 0 else "-") + show_bytes(abs(more))]
