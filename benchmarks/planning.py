"""How long planning takes beside `torch.export`, and how that grows with the number of ranks.

The paper's Transformer-2D at its 720M sizes (28 layers, hidden 1152, 16 heads, S 4096) on fake weights: T 128 planned for
8 ranks, T 1024 for 1,024, and T 128 for a mesh of 4x8 by `auto`. Every repetition is a fresh process, the cases in turn;
"export" is the time inside `torch.export.export`, "planning" is factorize + enumerate + stages + solve + rewrite. Prints a
table of medians and writes JSON.

    python benchmarks/planning.py [--repetitions 3] [--out benchmarks/results/planning.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto.examples.transformer_2d import build

CASES = [
    {"mesh": "8", "frames": 128},
    {"mesh": "1024", "frames": 1024},
    {"mesh": "4x8", "frames": 128, "strategy": "auto"},
]
SIZES = {"hidden": 1152, "heads": 16, "tokens": 4096}
BARS = {"planning to export": 0.25, "1,024 ranks to 8": 1.2, "auto on 4x8 to export": 1.0, "peak RSS in GB": 1.5}


def measure(mesh: str, frames: int, layers: int, strategy: str | None = None) -> dict[str, Any]:
    """One plan, in this process."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = build(**SIZES, frames=frames, layers=layers)
    plan = dsp_auto.plan(model, mesh, args, kwargs, dim_names=build.dim_names, strategy=strategy)
    planning = plan.seconds["plan"] + plan.seconds["rewrite"]
    return {
        "mesh": mesh,
        "strategy": plan.strategy,
        "frames": frames,
        "export_s": plan.seconds["export"],
        "plan_s": plan.seconds["plan"],
        "rewrite_s": plan.seconds["rewrite"],
        "planning_s": planning,
        "ratio": planning / plan.seconds["export"],
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "switches": plan.communication["by_primitive"]["switch"]["count"],
        "gap": plan.solver["gap"],
    }


def apart(case: dict[str, Any], layers: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    argv = [sys.executable, __file__, "--once", json.dumps({**case, "layers": layers})]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number; what is none is the same in all runs."""
    return {
        key: value if isinstance(value, str) else statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planning.json"))
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(measure(**options.once)))
        return
    runs = [[apart(case, options.layers) for case in CASES] for _ in range(options.repetitions)]
    rows = [_medians([run[n] for run in runs]) for n in range(len(CASES))]
    ratios = {
        "planning to export": rows[0]["ratio"],
        "1,024 ranks to 8": statistics.median(run[1]["planning_s"] / run[0]["planning_s"] for run in runs),
        "auto on 4x8 to export": rows[2]["ratio"],
        "peak RSS in GB": max(run[n]["peak_rss_gb"] for run in runs for n in range(len(CASES))),
    }
    print(f"{options.layers} layers, {options.repetitions} repetitions, medians\n")
    print(tabulate.tabulate(rows, headers="keys", floatfmt=".2f", intfmt=","))
    print()
    print(tabulate.tabulate([(name, f"{ratios[name]:.2f}", bar) for name, bar in BARS.items()], ["", "measured", "bar"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "cpus": os.cpu_count(), "layers": options.layers, "sizes": SIZES}
    found = {"cases": rows, "measured": ratios, "bars": BARS, "runs": runs}
    options.out.write_text(json.dumps(where | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
