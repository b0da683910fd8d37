"""Sharding and recomputation decided together, against one after the other, on 8 devices under binding capacities.

    first    shard first, then recompute: the cheapest layouts as without a capacity; then, with these fixed, the cheapest
             blocks to recompute that make the plan fit. Both steps by the same integer program, the second one over the
             blocks alone
    joint    what `dsp_auto.plan` does: one program over layouts and blocks

Three models on fake weights: a Transformer-2D whose blocks hold space and time attention, Evoformer, and Latte. Capacities lie
between what `first` takes with everything recomputed (0) and with nothing recomputed (1); below 0 it does not fit. Costs are
wire bytes a device sends in a step ("volume") or seconds on H100s ("time"), recomputation included.

A second table is of the solver alone: 36 layers of the paper's 3B Transformer-2D on 64 devices, with a capacity that binds.

    python benchmarks/recompute.py [--only SUBSTRING ...] [--time-limit 15] [--out benchmarks/results/recompute.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from dsp_auto.passes.solve import OutOfTimeError, Solution, solve
from dsp_auto.passes.stages import StageGraph
from dsp_auto.planner import Options, Prepared, decide, prepare

DEVICES = "8"
OBJECTIVES = ("volume", "time")
SHARES = (-0.05, 0.15, 0.45, 0.75)
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


MODELS = {
    "Transformer-2D, space and time in a block": video,
    "Evoformer": partial(evoformer, layers=4, rows=128, columns=256),
    "Latte": partial(latte, frames=64, size=32, layers=14),
}


def captured(make: Any) -> Program:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = make()
        model.train()
    return capture(model, args, kwargs)


def with_layouts(problem: Problem, program: Program, choice: Sequence[int]) -> Problem:
    """The problem that is left once every stage's strategy is decided: which blocks to recompute."""
    stages = []
    for stage in problem.graph.stages:
        k = choice[stage.index]
        uses = tuple(replace(use, wanted=(use.wanted[k],)) for use in stage.uses)
        stages.append(replace(stage, strategies=(stage.strategies[k],), made=(stage.made[k],), uses=uses))

    def seconds(stage: int, _: int, again: bool) -> float:
        return (problem.compute_again if again else problem.compute_seconds)(stage, choice[stage])

    graph: StageGraph = replace(problem.graph, stages=tuple(stages))
    timed = seconds if problem.objective == "time" else None
    return Problem(
        program, graph, problem.objective, problem.hardware, timed, problem.state, problem.regions, problem.whole
    )


def cheapest_blocks(left: Problem, capacity: int, time_limit: float) -> Solution | None:
    """The cheapest set of blocks to recompute that fits, None where none does."""
    try:
        return solve(left, capacity, gap=BARS["gap"], time_limit=time_limit)
    except InfeasibleError:
        return None


def together(prepared: Prepared, capacity: int, time_limit: float) -> Solution | None:
    try:
        return decide(replace(prepared, options=replace(prepared.options, time_limit=time_limit)))
    except InfeasibleError:
        return None


def blocks(solution: Solution) -> int:
    return sum(isinstance(item, int) for item in solution.recomputed)


def described(solution: Solution | None) -> dict[str, Any]:
    if solution is None:
        return {"fits": False}
    return {
        "fits": True,
        "cost": solution.objective,
        "bound": solution.bound,
        "blocks": blocks(solution),
        "kept": len(solution.recomputed) - blocks(solution),
        "peak_bytes": solution.peak_bytes,
        "seconds": sum(solution.seconds.values()),
    }


def compare(name: str, program: Program, objective: str, time_limit: float) -> list[dict[str, Any]]:
    """One model, at all capacities."""
    mesh = as_mesh(DEVICES)
    free = prepare(program, mesh, Options.of(objective=objective))
    cheapest = decide(free)

    def under(capacity: int) -> Prepared:
        return prepare(program, mesh, Options.of(capacity, objective=objective, time_limit=time_limit))

    problem = under(1).problem(cheapest.space)
    left = with_layouts(problem, program, cheapest.choice)
    choice = (0,) * len(cheapest.choice)
    everything = frozenset(region.number for region in left.regions)
    most, least = (left.peak(choice, recomputed)[0] for recomputed in (frozenset(), everything))
    rows = []
    for share in SHARES:
        capacity = int(least + share * (most - least))
        first = cheapest_blocks(left, capacity, time_limit)
        joint = together(under(capacity), capacity, time_limit)
        row = {"model": name, "objective": objective, "share": share, "capacity_bytes": capacity}
        rows.append(row | {"of_blocks": len(left.regions), "first": described(first), "joint": described(joint)})
        print(f"{name}, {objective}, {share}: {rows[-1]['first']} {rows[-1]['joint']}", file=sys.stderr)
    return rows


def speed(program: Program) -> list[dict[str, Any]]:
    """Of the solver on the 3B model."""
    mesh = as_mesh("64")
    free = prepare(program, mesh, Options.of())
    solution = decide(free)
    peak = free.problem(solution.space).peak(solution.choice, whole=True)[0]
    rows = []
    for share in BINDING:
        started = time.perf_counter()
        prepared = prepare(program, mesh, Options.of(int(share * peak)))
        made = time.perf_counter() - started
        found = decide(prepared)
        row = {"share": share, "capacity_bytes": int(share * peak), "prepare_s": made}
        row |= {"decide_s": sum(found.seconds.values()), "gap": found.gap, "blocks": blocks(found)}
        rows.append(row | {"cost": found.objective, "peak_bytes": found.peak_bytes})
        print(rows[-1], file=sys.stderr)
    return rows
