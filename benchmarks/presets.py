"""What `auto` sends beside every preset, on small models of every kind, meshes of one and two dims, training and inference.

Each model is captured once a mode and planned under each preset with the same options. Shown: wire bytes per device of forward
and backward together (gradient synchronization included), activations per device at the peak, and seconds of planning
(factorize to rewrite; the export is not in it). "x": the preset does not fit the model or the mesh, for the reason that the
JSON has. Below, on how many models `auto` sends no more than the best preset, and on how many strictly less than all. A solver
may take `--time-limit` seconds for each of the spaces that a preset looks at; the JSON has the gap that is left.

    python benchmarks/presets.py [--only SUBSTRING ...] [--meshes 4 2x4] [--time-limit 60] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests, which is not installed

from dsp_auto.errors import DspError
from dsp_auto.examples.transformer_2d import build
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import Program, capture
from dsp_auto.passes.presets import PRESETS
from dsp_auto.passes.solve import TOLERANCE
from dsp_auto.planner import Options, decide, finish, prepare
from dsp_auto.units import show_bytes
from tests.zoo.axial import axial
from tests.zoo.evoformer import esmfold, evoformer
from tests.zoo.grouped_attention import grouped_attention
from tests.zoo.language import decoder, llama
from tests.zoo.opensora import stdit
from tests.zoo.weather import weather

# Lengths and heads that 8 ranks can share, and beside them those that they cannot: few frames, one video, uneven sizes.
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "transformer_2d": (build, {"layers": 2, "hidden": 64, "heads": 8, "frames": 16, "tokens": 32}),
    "transformer_2d, 2 videos": (build, {"layers": 2, "hidden": 64, "heads": 8, "frames": 16, "tokens": 32, "batch": 2}),
    "transformer_2d, 2 frames": (build, {"layers": 2, "hidden": 64, "heads": 8, "frames": 2, "tokens": 64, "batch": 2}),
    "transformer_2d, uneven": (build, {"layers": 2, "hidden": 72, "heads": 9, "frames": 11, "tokens": 35}),
    "opensora, 2 videos": (stdit, {"layers": 2, "frames": 8, "height": 16, "width": 16, "batch": 2}),
    "evoformer": (evoformer, {"rows": 16, "columns": 24}),
    "esmfold": (esmfold, {"length": 24}),
    "axial, 2 videos": (axial, {"layers": 2, "frames": 4, "height": 16, "width": 16, "batch": 2}),
    "decoder, 2 texts": (decoder, {"layers": 2, "length": 16, "heads": 8, "batch": 2}),
    "llama": (llama, {"layers": 2, "length": 16}),
    "grouped heads": (grouped_attention, {"frames": 16, "tokens": 32, "heads": 16, "kv_heads": 8}),
    "grouped heads, 2 frames": (grouped_attention, {"frames": 2, "tokens": 64, "heads": 16, "kv_heads": 8, "batch": 2}),
    "weather": (weather, {}),
}
MODES = {"training": True, "inference": False}
MESHES = ("4", "2x4")
HEAD = ["model", "mesh", "", *PRESETS, "of best", "auto sends", "auto's peak", "least peak", "auto s"]


def measure(program: Program, mesh: str, strategy: str, time_limit: float) -> dict[str, Any]:
    """One plan: bytes on the wire, the peak, and seconds."""
    started = time.perf_counter()
    try:
        prepared = prepare(program, as_mesh(mesh), Options.of(strategy=strategy, time_limit=time_limit))
        solution = decide(prepared)
        plan, _ = finish(prepared, solution)
    except DspError as error:
        return {"failed": str(error)}
    seconds = time.perf_counter() - started
    return {
        "wire_bytes": plan.communication["forward_bytes"] + plan.communication["backward_bytes"],
        "peak_bytes": plan.memory["activation_bytes"],
        "seconds": seconds,
        "gap": plan.solver["gap"],
        "space": prepared.spaces[solution.space].preset,
        "split": dict(plan.split),
    }


def compared(name: str, mode: str, meshes: list[str], time_limit: float) -> list[dict[str, Any]]:
    """A row for each mesh."""
    make, sizes = MODELS[name]
    model, args, kwargs = make(**sizes)
    model.train(MODES[mode])
    with torch.set_grad_enabled(MODES[mode]):
        program = capture(model, args, kwargs)
    rows = []
    for mesh in meshes:
        plans = {strategy: measure(program, mesh, strategy, time_limit) for strategy in PRESETS}
        row = {"model": name, "sizes": sizes, "mesh": mesh, "mode": mode, "plans": plans}
        planned = {strategy: own["wire_bytes"] for strategy, own in plans.items() if "failed" not in own}
        fixed = {strategy: sent for strategy, sent in planned.items() if strategy != "auto"}
        if fixed:
            best, auto = min(fixed, key=fixed.__getitem__), planned.get("auto")
            row |= {"best": best, "no_more": auto is not None and auto <= (1 + TOLERANCE) * fixed[best]}
            row |= {"less": auto is not None and auto < (1 - TOLERANCE) * fixed[best]}
            row["of_best"] = auto / fixed[best] if auto is not None and fixed[best] else None
        rows.append(row)
    return rows


def shown(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    plans, auto = row["plans"].values(), row["plans"]["auto"]
    sent = ["x" if "failed" in own else show_bytes(own["wire_bytes"]) for own in plans]
    cells = [row["model"], row["mesh"], row["mode"], *sent]
    if "failed" in auto:
        return [*cells, "", "no plan"]
    verdict = "" if "less" not in row else "less" if row["less"] else "equal" if row["no_more"] else "MORE"
    least = min(own["peak_bytes"] for own in plans if "failed" not in own)
    share = "" if row.get("of_best") is None else f"{row['of_best']:.2f}"
    return [*cells, share, verdict, show_bytes(auto["peak_bytes"]), show_bytes(least), f"{auto['seconds']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING")
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/presets.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = [name for name in MODELS if any(part in name for part in options.only)]
    rows = []
    for name in names:
        for mode in MODES:
            rows += compared(name, mode, options.meshes, options.time_limit)
        print(name, file=sys.stderr)
    print(tabulate([shown(row) for row in rows], HEAD, disable_numparse=True, stralign="right"))
    judged = [row for row in rows if "less" in row]
    models = {row["model"] for row in judged}
    less = {name for name in models if any(row["less"] for row in judged if row["model"] == name)}
    always = {name for name in models if all(row["less"] for row in judged if row["model"] == name)}
    summary = {
        "settings": len(judged),
        "auto_no_more": sum(row["no_more"] for row in judged),
        "auto_less": sum(row["less"] for row in judged),
        "models": len(models),
        "models_less": sorted(less),
        "models_less_everywhere": sorted(always),
        "largest_gap": max((own["gap"] for row in rows for own in row["plans"].values() if "gap" in own), default=0.0),
    }
    print(
        f"\nauto sends no more than the best preset in {summary['auto_no_more']} of {len(judged)} settings, strictly less than "
        f"every preset in {summary['auto_less']}: in some setting of {len(less)} of {len(models)} models, in all settings of "
        f"{len(always)}. Largest gap of a solver: {summary['largest_gap']:.1%}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "time_limit": options.time_limit}
    options.out.write_text(json.dumps(where | {"summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
