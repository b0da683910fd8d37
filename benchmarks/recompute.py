"""Sharding and recomputation decided together, against one after the other, on 8 devices under binding capacities.

    first    shard first, then recompute: the cheapest layouts as without a capacity; then, with these fixed, the cheapest
             blocks to recompute that make the plan fit. Both steps by the same integer program, the second one over the
             blocks alone. The better one of two: layouts that make few bytes (the default without a capacity), and layouts
             that are the cheapest whatever they take
    joint    what `dsp_auto.plan` does: one program over layouts and blocks

Models on fake weights: a Transformer-2D whose blocks hold space and time attention, Evoformer and Latte under "dsp", and a
Transformer-2D of few frames under "auto", which may hold parameters in parts. Capacities lie between what `first` takes with
everything recomputed (0) and with nothing recomputed (1); below 0 it does not fit. Costs are wire bytes a device sends in a
step ("volume") or seconds on H100s ("time"), recomputation included.

A second table is of the solver alone: 36 layers of the paper's 3B Transformer-2D on 64 devices, with a capacity that binds:
a share of what the plan without a capacity takes. Wire bytes with the default time limit, seconds with that of the option.

    python benchmarks/recompute.py [--only SUBSTRING ...] [--time-limit 10] [--out benchmarks/results/recompute.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import evoformer, latte
from dsp_auto.errors import InfeasibleError
from dsp_auto.examples.transformer_2d import Block, build
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import Program, capture
from dsp_auto.passes.problem import Problem
from dsp_auto.passes.solve import TOLERANCE, OutOfTimeError, Solution, solve
from dsp_auto.planner import Options, Prepared, decide, prepare

DEVICES = "8"
OBJECTIVES = ("volume", "time")
SHARES = (0.15, 0.45, 0.75)
BELOW = -0.2
WHATEVER = 10**15  # bytes that nothing exceeds
BINDING = (0.95, 0.8, 0.6)
LARGE = {"layers": 36, "hidden": 2048, "heads": 32, "frames": 128, "tokens": 4096, "dtype": "bfloat16"}
BARS = {"seconds": 10.0, "gap": 0.001}


class SpaceTime(nn.Module):
    """Attention over space, then over time, in one block, as most video models have it."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.space, self.time = (Block(hidden, heads, 4, over) for over in ("space", "time"))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.time(self.space(x, size), size)


class Video(nn.Module):
    """[B, T, S, C] to the same."""

    def __init__(self, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SpaceTime(hidden, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.shape[:3])
        return x


def video(layers: int = 14, hidden: int = 1152, heads: int = 16, frames: int = 64, tokens: int = 1024) -> tuple:
    return Video(layers, hidden, heads), (torch.randn(1, frames, tokens, hidden),), {}


# What makes it, the strategy, and the shares.
CASES = {
    "Transformer-2D, space and time in a block": (partial(video, layers=8), "dsp", SHARES),
    "Evoformer": (partial(evoformer, layers=3), "dsp", SHARES),
    "Latte": (partial(latte, layers=8), "dsp", SHARES),
    "Transformer-2D, 16 frames": (partial(video, layers=4, frames=16), "auto", (BELOW, *SHARES)),
}


def captured(make: Any) -> Program:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = make()
        model.train()
    return capture(model, args, kwargs)


def found_by(look: Callable[[], Solution]) -> Solution | str:
    """What it finds, or why nothing."""
    try:
        return look()
    except InfeasibleError:
        return "does not fit"
    except OutOfTimeError:
        return "none in time"


def blocks(solution: Solution) -> int:
    """How many are recomputed; the rest of `recomputed` is what these keep."""
    return sum(isinstance(item, int) for item in solution.recomputed)


def described(solution: Solution | str, started: float) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    if isinstance(solution, str):
        return {"found": False, "why": solution, "seconds": seconds}
    costs = {"cost": solution.objective, "gap": solution.gap, "blocks": blocks(solution)}
    return {"found": True, **costs, "peak_bytes": solution.peak_bytes, "seconds": seconds}


def compare(
    name: str, program: Program, objective: str, strategy: str, shares: Sequence[float], time_limit: float
) -> list[dict[str, Any]]:
    """One model, at several capacities."""

    def asked(**options: Any) -> Prepared:
        how = {"objective": objective, "strategy": strategy, "time_limit": time_limit, **options}
        return prepare(program, as_mesh(DEVICES), Options.of(**how))

    under = asked(capacity=WHATEVER)
    layouts = {(own.space, own.choice) for own in (decide(asked()), decide(asked(capacity=WHATEVER, recompute=False)))}
    left = [under.problem(space).decided(choice) for space, choice in sorted(layouts)]
    most, least = (min(map(how, left)) for how in (_peak_with_all_kept, _peak_with_all_recomputed))
    rows = []
    for share in shares:
        capacity = int(least + share * (most - least))
        started = time.perf_counter()
        looks = [partial(solve, own, capacity, gap=BARS["gap"], time_limit=time_limit) for own in left]
        found = [found_by(look) for look in looks]
        plans = [own for own in found if isinstance(own, Solution)]
        first = described(min(plans, key=lambda own: own.objective) if plans else found[0], started)
        started = time.perf_counter()
        joint = described(found_by(partial(decide, asked(capacity=capacity))), started)
        row = {"model": name, "strategy": strategy, "objective": objective, "share": share, "capacity_bytes": capacity}
        rows.append(row | {"of_blocks": len(left[0].regions), "first": first, "joint": joint})
        print(rows[-1], file=sys.stderr)
    return rows


def _peak_with_all_kept(left: Problem) -> int:
    return left.peak((0,) * len(left.graph.stages))[0]


def _peak_with_all_recomputed(left: Problem) -> int:
    return left.peak((0,) * len(left.graph.stages), frozenset(region.number for region in left.regions))[0]


def speed(program: Program, objective: str, **options: Any) -> list[dict[str, Any]]:
    """Of the solver on the 3B model."""
    mesh, options = as_mesh("64"), {"objective": objective, **options}
    free = prepare(program, mesh, Options.of(**options))
    solution = decide(free)
    peak = free.problem(solution.space).peak(solution.choice, whole=True)[0]
    rows = []
    for share in BINDING:
        capacity = int(share * peak)
        started = time.perf_counter()
        found = described(found_by(partial(decide, prepare(program, mesh, Options.of(capacity, **options)))), started)
        rows.append({"objective": objective, "share": share, "capacity_bytes": capacity, **found})
        print(rows[-1], file=sys.stderr)
    return rows


def shown(row: Mapping[str, Any]) -> list[str]:
    first, joint = row["first"], row["joint"]

    def cost(own: Mapping[str, Any]) -> str:
        if not own["found"]:
            return own["why"]
        return f"{own['cost'] / 2**20:,.1f} MiB" if row["objective"] == "volume" else f"{own['cost'] * 1e3:,.2f} ms"

    counts = [f"{own['blocks']} of {row['of_blocks']}" if own["found"] else "" for own in (first, joint)]
    ratio = f"{joint['cost'] / first['cost']:.4f}" if first["found"] and joint["found"] else ""
    head = [row["model"], row["strategy"], row["objective"], f"{row['capacity_bytes'] / 2**30:.2f} ({row['share']:+.0%})"]
    return [*head, cost(first), counts[0], cost(joint), counts[1], ratio, f"{joint['seconds']:.1f}"]


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many rows the joint plan is worse, equal, cheaper, and the only one that fits."""
    found = dict.fromkeys(("worse", "equal", "cheaper", "found alone", "neither found"), 0)
    for first, joint in ((row["first"], row["joint"]) for row in rows):
        if not first["found"]:
            found["found alone" if joint["found"] else "neither found"] += 1
        elif not joint["found"] or joint["cost"] > first["cost"] * (1 + TOLERANCE):
            found["worse"] += 1
        else:
            found["cheaper" if joint["cost"] < first["cost"] * (1 - TOLERANCE) else "equal"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="models, and 'solver'")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds of each solve")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recompute.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {"torch": torch.__version__, "cpus": os.cpu_count(), "devices": DEVICES, "time_limit": options.time_limit}
    rows = []
    for name, (make, strategy, shares) in CASES.items():
        if any(part in name for part in options.only):
            program = captured(make)
            for objective in OBJECTIVES:
                rows += compare(name, program, objective, strategy, shares, options.time_limit)
    if rows:
        found |= {"rows": rows, "joint": verdict(rows)}
        head = ["model", "strategy", "objective", "capacity GiB", "first", "blocks", "joint", "blocks", "ratio", "seconds"]
        print(tabulate.tabulate(map(shown, rows), head, disable_numparse=True))
        print("\njoint plan: " + ", ".join(f"{count} {what}" for what, count in found["joint"].items()) + "\n")
    if any(part in "solver" for part in options.only):
        large = captured(partial(build, **LARGE))
        solved = speed(large, "volume") + speed(large, "time", time_limit=options.time_limit)
        found |= {"solver": solved, "bars": BARS}
        print(tabulate.tabulate(solved, "keys", floatfmt=".4g"))
        print(f"\nbars, for wire bytes: {BARS['seconds']:g} s, gap {BARS['gap']:.1%}")
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
