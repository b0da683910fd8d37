"""The page of a report: what stands where, as plain values for the template `report.html`.

The template escapes whatever comes from the user's model. Shapes are SVG that stretches with the page, and all that is to be
read is text of the page itself, so that it keeps its size on a phone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .alternatives import Alternative, Alternatives, figures
from .passes.factors import common_name
from .plan import Enter, Plan, PlanStage
from .show_memory import STEP, breakdown, timeline
from .units import counted, show_bytes, show_seconds

if TYPE_CHECKING:
    from .report import Alike, Report

# What tells a page of ours from other files.
MARK = '<meta name="generator" content="dsp-auto report">'
WHOLE = "R"
# Dims beyond these share colours; rows and names tell them apart.
COLOURS = 8
# Pixels of the strip: of the bars, of a row, and the least of a stage.
BARS, ROW, STAGE = 72, 26, 7
# Of the width of the memory chart, the share of a point that would be too thin to be seen.
THIN = 0.02
TICKS = 8
# Stages that are named one by one.
NAMED = 6
EQUAL = 1e-9  # relative; sums of the same numbers in another order

PRIMITIVES = {
    "split": "takes this device's part; its gradient is gathered",
    "switch": "shards another dim, by one all-to-all; and back for the gradient",
    "hierarchical_switch": "a switch over two mesh dims: an all-to-all inside nodes, then one between them",
    "gather": "collects the parts, by an all-gather",
    "reduce": "sums partial results, by an all-reduce",
    "reduce_scatter": "sums partial results, and each device keeps its part",
    "ring": "attention whose keys and values go round all devices",
    "halo": "fetches what lies over the border of this device's part",
    "replicate": "parameters or other whole tensors that sharded work uses: their gradients are summed, by all-reduces",
}


def draw_page(report: Report) -> str:
    """The page as text of HTML that needs nothing else."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"nbytes": _nbytes, "more": _more, "seconds": show_seconds}
    here = files(__package__)
    template = environment.from_string((here / "report.html").read_text(encoding="utf-8"))
    # Our own files, and no text of anyone else's.
    own = {name: Markup((here / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return template.render(mark=Markup(MARK), **own, **_view(report))


def _view(report: Report) -> dict[str, Any]:
    plan = report.plan
    colours = _colours(plan)
    return {
        "title": f"Plan of {report.model}" if report.model else "A plan",
        "mesh": " × ".join(f"{name}={size}" for name, size in plan.mesh.items()),
        "plan": plan,
        "report": report,
        "training": plan.decision.get("training", bool(plan.memory["gradient_bytes"])),
        "inputs": [line.removeprefix("input ") for line in plan.decision.get("inputs", ()) if line.startswith("input ")],
        "sent": figures(plan)["wire"],
        "costs": show_seconds if plan.objective == "time" else show_bytes,
        "strip": _strip(plan, colours, report.alike),
        "colour": lambda name: colours.get(common_name(name), 0),
        "shards": lambda stage: _shards(plan, stage),
        "way": _way,
        "primitives": [(name, PRIMITIVES.get(name, ""), own) for name, own in plan.communication["by_primitive"].items()],
        "reshardings": list(_reshardings(plan)),
        "listed": _listed(plan),
        "memory": _memory(plan),
        "strategies": _strategies(report),
        "kinds": [_kind(report, own) for own in report.alike],
        "kind_of": {stage: number for number, own in enumerate(report.alike) for stage in own.stages},
        "notes": list(_notes(plan)),
        "options": list(_options(plan)),
    }


def _nbytes(amount: float) -> Markup:
    """Bytes for people, with the exact number for whoever wants it."""
    exact = f"{amount:,.0f} bytes" if amount == round(amount) else f"{amount:,.2f} bytes"
    return Markup('<data value="{}" title="{}">{}</data>').format(repr(amount), exact, show_bytes(amount))


def _more(amount: float, show: Any = show_bytes) -> str:
    return f"{show(abs(amount))} {'more' if amount > 0 else 'less'}" if amount else "the same"


def _colours(plan: Plan) -> dict[str, int]:
    """Of each dim that a stage shards or computes over, in the plan's order, the number of its colour from 1; "R" has 0.
    Dims of one name in several blocks are one."""
    used = {WHOLE: None}
    for stage in plan.stages:
        used |= dict.fromkeys(part for layout in stage.layout.values() for part in split_layout(layout))
        used |= dict.fromkeys(map(common_name, stage.computes_over))
    order = [factor["name"] for factor in plan.factors if factor["name"] in used]
    names = dict.fromkeys([*order, *(name for name in used if name != WHOLE)])
    return {WHOLE: 0, **{name: 1 + number % COLOURS for number, name in enumerate(names)}}


def _shards(plan: Plan, stage: PlanStage) -> list[tuple[str, str, str]]:
    """Of each mesh dim its name, what a stage shards over it, and that in words."""
    return [
        (mesh_dim, factor, "whole" if factor == WHOLE else "partial sums" if factor == "P" else factor)
        for mesh_dim, factor in stage.layout.items()
    ]


def split_layout(layout: str) -> list[str]:
    """The common names of what a stage shards over a mesh dim: of more than one where the planner has split that."""
    return [common_name(part) for part in layout.split(" x ")]


def _way(entry: Enter, name: Callable[[str], str] = str) -> str:
    source, target = name(entry.source), name(entry.target)
    return entry.primitive if source == target else f"{entry.primitive} {source} → {target}"


def _strip(plan: Plan, colours: Mapping[str, int], alike: Sequence[Alike]) -> dict[str, Any]:
    """The bars of bytes over the stages, and for each mesh dim a row for each dim: where it is sharded, where it is computed
    over. Stages are one wide, heights are pixels."""
    sent = [(sum(e.forward_bytes for e in s.enter), sum(e.backward_bytes for e in s.enter)) for s in plan.stages]
    most = max(map(sum, sent), default=0)
    bars = []
    for index, (forward, backward) in enumerate(sent):
        heights = [BARS * amount / most if most else 0 for amount in (forward, backward)]
        bars += [(index, BARS - heights[0], heights[0], "forward"), (index, BARS - sum(heights), heights[1], "backward")]
    over = [set(map(common_name, stage.computes_over)) for stage in plan.stages]
    groups, top = [], BARS + 8
    for mesh_dim, size in plan.mesh.items():
        if size == 1 and len(plan.mesh) > 1:
            continue
        rows = []
        parts = [split_layout(stage.layout[mesh_dim]) for stage in plan.stages]
        names = [name for name in colours if name != WHOLE and any(name in own for own in (*parts, *over))]
        if any(WHOLE in own for own in parts):
            names.append(WHOLE)
        top += ROW
        for name in names:
            cells = [(n, "over") for n, own in enumerate(over) if name in own and name not in parts[n]]
            cells += [(n, "cut") for n, own in enumerate(parts) if name in own]
            rows.append({"name": name, "top": top, "colour": colours[name], "cells": cells})
            top += ROW
        groups.append({"mesh_dim": mesh_dim, "size": size, "rows": rows})
    count = len(plan.stages)
    steps = (own * 10**power for power in itertools.count() for own in (1, 2, 5))
    every = next(every for every in steps if count <= every * TICKS)
    return {
        "bars": [bar for bar in bars if bar[2]],
        "most": most,
        "groups": groups,
        "height": top,
        "width": count,
        "least": count * STAGE,
        "ticks": [(n, 100 * (n + 0.5) / count) for n in range(0, count, every)],
        "row": ROW,
        "bars_height": BARS,
    }


def _reshardings(plan: Plan) -> Iterator[dict[str, Any]]:
    """What enters stages, alike entries as one: how often, where, and the bytes of one and of all."""
    found: dict[tuple, list[tuple[int, Enter]]] = {}
    for stage in plan.stages:
        for entry in stage.enter:
            key = (_way(entry, common_name), entry.mesh_dim, entry.forward_bytes, entry.backward_bytes)
            found.setdefault(key, []).append((stage.index, entry))
    for (way, mesh_dim, forward, backward), own in found.items():
        tensors = sum(entry.tensors for _, entry in own)
        yield {
            "way": way,
            "mesh_dim": mesh_dim,
            "count": len(own),
            "stages": _numbers([index for index, _ in own]),
            "tensors": own[0][1].tensor if tensors == 1 else f"{tensors} tensors",
            "forward": forward,
            "backward": backward,
            "total": len(own) * (forward + backward),
        }


def _listed(plan: Plan) -> float:
    """Bytes of all entries: totals count once what two share, and twice what recomputing sends again."""
    return sum(entry.forward_bytes + entry.backward_bytes for stage in plan.stages for entry in stage.enter)


def _numbers(stages: Sequence[int]) -> str:
    """`1, 3, 5 … 53`."""
    own = list(dict.fromkeys(stages))
    if len(own) <= NAMED:
        return ", ".join(map(str, own))
    return f"{', '.join(map(str, own[:3]))} … {own[-1]}"


def _memory(plan: Plan) -> dict[str, Any]:
    own = plan.memory
    phases, blocks = timeline(plan)
    points = [(phase, nbytes) for phase, _, nbytes in own["curve"]]
    # The optimizer's step is one point of thousands.
    wide = max(1, round(THIN * len(points)))
    points = [point for phase, nbytes in points for point in [(phase, nbytes)] * (wide if phase == STEP else 1)]
    top = max(own["peak_bytes"], own["capacity_bytes"] or 0) * 1.08 or 1
    held = own["parameter_bytes"] + own["optimizer_bytes"] + own["input_bytes"]
    bands, start = [], 0
    for name, run in itertools.groupby(points, key=lambda point: "backward" if point[0] == "again" else point[0]):
        length = len(list(run))
        bands.append({"name": name, "left": 100 * start / len(points), "width": 100 * length / len(points)})
        start += length
    at = next((n for n, (_, nbytes) in enumerate(points) if nbytes == own["peak_bytes"]), 0)
    return {
        "breakdown": breakdown(plan),
        "phases": phases,
        "blocks": blocks,
        "bands": bands,
        "again": any(phase == "again" for phase, *_ in own["curve"]),
        "width": len(points),
        "all": _area([nbytes / top for _, nbytes in points]),
        "held": _area([min(held, nbytes) / top for _, nbytes in points]),
        "held_bytes": held,
        "peak": {"x": 100 * (at + 0.5) / max(1, len(points)), "y": 100 * (1 - own["peak_bytes"] / top)},
        "capacity": None if own["capacity_bytes"] is None else 100 * (1 - own["capacity_bytes"] / top),
        "share": None if not own["capacity_bytes"] else own["peak_bytes"] / own["capacity_bytes"],
    }


def _area(shares: Sequence[float]) -> str:
    """A path of steps, each one wide, in a box of 1,000 units of height."""
    path, last = ["M0 1000"], None
    for x, share in enumerate(shares):
        y = round(1000 * (1 - share))
        if y != last:
            path.append(f"H{x}V{y}")
        last = y
    return "".join((*path, f"H{len(shares)}V1000Z"))


def _strategies(report: Report) -> dict[str, Any] | None:
    """A row for each strategy that can run, this plan's among them, the fewest bytes first."""
    if report.comparison is None:
        return None
    candidates = list(report.comparison.candidates)
    if report.own is not None and all(one is not report.own for one in candidates):
        candidates.append(report.own)
    rows = []
    for one in candidates:
        if one.plan is None:
            continue
        plan, prediction, _ = one.found
        sent = plan.communication
        rows.append(
            {
                "name": one.strategy,
                "is_plan": one is report.own,
                "forward": sent["forward_bytes"],
                "backward": sent["backward_bytes"],
                "total": sent["forward_bytes"] + sent["backward_bytes"],
                "peak": plan.memory["peak_bytes"],
                "seconds": prediction.seconds,
                "gap": plan.solver["gap"],
            }
        )
    rows.sort(key=lambda row: (row["total"], not row["is_plan"]))
    least = {name: min(row[name] for row in rows) for name in ("total", "peak", "seconds")}
    for row in rows:
        row["least"] = {name for name in least if row[name] <= (1 + EQUAL) * least[name]}
    own = next(row for row in rows if row["is_plan"])
    others = [row for row in rows if not row["is_plan"] and row["name"] != own["name"]]
    return {
        "rows": rows,
        "most": max(row["total"] for row in rows) or 1,
        "next": _next_strategy(own, others),
        "refused": [one for one in candidates if one.plan is None],
    }


def _next_strategy(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What the best of the others sends, in words."""
    if not others:
        return ""
    best = others[0]
    if abs(best["total"] - own["total"]) <= EQUAL * own["total"]:
        return f"Under {best['name']} it would be the same"
    if best["total"] > own["total"] > 0:
        return f"Under {best['name']} it would be {best['total'] / own['total']:.3g} times that"
    return f"Under {best['name']} it would be {_more(best['total'] - own['total'])}"


def _kind(report: Report, alike: Alike) -> dict[str, Any]:
    """Stages that are alike: what they are, and the other layouts of the first."""
    stages = [report.plan.stages[index] for index in alike.stages]
    names = list(dict.fromkeys(stage.name for stage in stages))
    return {
        "first": stages[0],
        "count": len(stages),
        "numbers": _numbers(alike.stages),
        "names": ", ".join(names) if len(names) <= 2 else f"{names[0]}, {names[1]} … {names[-1]}",
        "reason": alike.reason,
        **_alternatives(alike.alternatives),
    }


def _alternatives(found: Alternatives | None) -> dict[str, Any]:
    """Rows of other layouts, and the one that costs least of those that shard something."""
    if found is None:
        return {"rows": None, "next": None}
    own, timed = figures(found.made), found.made.objective == "time"
    rows = []
    for one in found.entries:
        row: dict[str, Any] = {"mesh_dim": one.mesh_dim, "factor": one.factor or WHOLE, "is_plan": one.is_plan}
        row |= {"reason": one.reason, "gap": 0.0, "more": None}
        if one.plan is not None:
            there = figures(one.plan)
            row["more"] = {name: there[name] - own[name] for name in own}
            row["total"] = there
            row["gap"] = one.plan.solver["gap"]
        rows.append(row)
    others = [(row, one) for row, one in zip(rows, found.entries) if row["more"] is not None and not one.is_plan]
    return {"rows": rows, "timed": timed, "next": _next_layout(others, own), "one": len(found.made.mesh) == 1}


def _next_layout(others: Sequence[tuple[dict[str, Any], Alternative]], own: Mapping[str, Any]) -> dict[str, Any] | None:
    sharding = [row for row, one in others if one.factor is not None] or [row for row, _ in others]
    if not sharding:
        return None
    best = min(sharding, key=lambda row: (row["more"]["objective"], row["more"]["peak"]))
    called = "next best"
    if best["factor"] == WHOLE:
        called = "no other dim; instead"
    elif best["more"]["objective"] < -EQUAL * own["objective"]:  # a forced layout moves the bound on activations
        called = "cheaper, and not within the plan's bounds"
    return {**best, "called": called, "percent": best["more"]["wire"] / own["wire"] if own["wire"] else None}


def _notes(plan: Plan) -> Iterator[str]:
    """What is not as somebody who reads the numbers alone would think."""
    own = plan.activations
    if own["large_replicated"] and any(size > 1 for size in plan.mesh.values()):
        yield f"{own['replicated_bytes'] / own['bytes']:.1%} of all activation bytes are made on every device, most of them by:"
        for entry in sorted(own["large_replicated"], key=lambda entry: -entry["share"])[:8]:
            place = f" in {entry['path']}" if entry["path"] else ""
            yield f"{entry['share']:.1%} {entry['target']}{place}: {entry['why']}"
    for entry in plan.rules:
        whose = "registered by the user" if entry["origin"] != "found" else "found by running the op in shards"
        yield f"The rule of {entry['target']} was {whose}: {entry['rule']}"
    for what, entries in (("has no rule", plan.without_rule), ("draws random numbers", plan.random)):
        for target in dict.fromkeys(entry["target"] for entry in entries):
            same = [entry for entry in entries if entry["target"] == target]
            why = f" ({same[0]['why']})" if "why" in same[0] else ""
            nbytes = show_bytes(sum(entry["bytes"] for entry in same))
            yield f"{target} {what}{why} and runs whole on every device: {nbytes}"
    if plan.parameters["in_parts"]:
        held, whole = show_bytes(plan.parameters["device_bytes"]), show_bytes(plan.parameters["bytes"])
        count = len(plan.parameters["in_parts"])
        yield f"Of {counted(count, 'parameter')} each device holds a part: {held} of {whole}."
    again = [entry["modules"] for entry in plan.recomputed]
    if again:
        names = ", ".join(again) if len(again) <= NAMED else f"{again[0]}, {again[1]} … {again[-1]}"
        yield f"Backward computes {counted(len(again), 'block')} once more instead of keeping their activations: {names}."
    if plan.split:
        parts = " × ".join(f"{name}={size}" for name, size in plan.split.items())
        yield f"The planner split the mesh further: {parts}."


def _options(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the plan was made with, less what is as it is by default."""
    for name, value in plan.decision.get("options", {}).items():
        if name == "hardware" and value:
            value = value.get("name", "given")
        elif name == "capacity" and value:
            value = f"{show_bytes(value['bytes'])}, {value['reserve']:.0%} of it kept back"
        elif name == "optimizer":
            value = plan.memory["optimizer"]
        elif name == "may_stay_whole":
            value = f"{value:.0%} of all activation bytes"
        if value not in (None, {}, []):
            yield name.replace("_", " "), _plain(value)
    for name, version in plan.versions.items():
        yield name, version
    yield "solver", f"{plan.solver['name']}, {plan.solver['status']}"
    yield "digest", plan.digest[:12]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(own)}" for name, own in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "nothing" if value is None else str(value)
