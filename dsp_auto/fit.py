"""Fit: how few ranks a model's sequences have to be shared out over, and what would fit where a plan does not.

The rule of the paper's end-to-end runs (section 5.1, appendix A.2.2, Table 4): each strategy gets the smallest
sequence-parallel size on which a step fits in memory, and data parallelism has the rest of the GPUs. A size is tried by planning
with the capacity, so that it fits is shown by a plan, and that a smaller one does not by the planner's `InfeasibleError`.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from inspect import Parameter, signature
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from .capacity import Capacity
from .cost_models.hardware import Hardware
from .cost_models.state import TrainingState, as_state, of_parameter
from .errors import CaptureError, DspError, InfeasibleError, MeshError, NoShardableFactorError, StrategyError
from .factory import build
from .mesh import Mesh, as_mesh
from .passes.capture import Program, capture
from .passes.factors import Factors
from .passes.presets import PRESETS
from .passes.solve import OutOfTimeError, Solution
from .planner import Options, Prepared, decide, finish, prepare
from .predict import trace_rank
from .units import show_bytes, show_seconds

FORMAT = 1
# `auto` may do what all others do, which takes as long as all of them: it is tried where it is asked for.
STRATEGIES = tuple(name for name in PRESETS if name != "auto")
TIME_LIMIT = 20.0  # seconds for a plan
SUGGEST_SECONDS = 10.0
# A size is passed over where an even share of what a smaller one needs at least is so much above the capacity.
MARGIN = 1.1
# Of plans for one entry of the table of longest sequences.
PROBES = 24
# Where the least that any plan needs is so near to the capacity, a plan is asked for to be sure that there is none.
NEAR = 1.05
FURTHEST = 64  # times what was tried: how far one guess of a length may go
# Data-parallel ranks that share out the state in a suggestion, where the user has none: those of a node.
SHARING = 8


@dataclass(frozen=True)
class Split:
    """GPUs shared out: `data_parallel` replicas of the model, each on `sequence_parallel` GPUs.

    peak_bytes: of one GPU, as `Plan.memory` has it, and `peak_at` where. recomputed: blocks that the planner recomputes.
    wire_bytes: what a GPU sends in a step of its replica. step_seconds: predicted for that step (see `predict`); sync_seconds:
    for summing gradients over the replicas (and with ZeRO, for collecting parameters), none of it hidden.
    gap: how far the plan's wire bytes may be from the least.
    """

    sequence_parallel: int
    data_parallel: int
    peak_bytes: int
    peak_at: str | None
    recomputed: int
    wire_bytes: float
    step_seconds: float
    sync_seconds: float
    gap: float

    @property
    def seconds(self) -> float:
        """Of a step of all GPUs."""
        return self.step_seconds + self.sync_seconds


@dataclass(frozen=True)
class Fitted:
    """One strategy: its smallest size that fits, and the smallest that recomputes no block; they may be one.

    error, reason: where no size fits, the name of the error's class and what it says for the size that came nearest.
    undecided: sizes for which the solver found no plan in its time, and did not find that there is none.
    """

    strategy: str
    smallest: Split | None = None
    without_recompute: Split | None = None
    error: str = ""
    reason: str = ""
    undecided: tuple[int, ...] = ()


@dataclass(frozen=True)
class Longest:
    """The longest sequence that fits with a strategy on so many ranks.

    value: the largest that was found to fit, None where none was. fails: the least that was found not to; one step above
    `value`, unless the search ended before. reason: why that one fails.
    """

    strategy: str
    sequence_parallel: int
    value: int | None
    fails: int | None
    reason: str


@dataclass(frozen=True)
class Fit:
    """What `fit` found; prints as tables, keeps as JSON.

    capacity_bytes: what a plan may use of a GPU; reserve_bytes: what is kept back. state: what training keeps of each parameter,
    in words. batch: samples of one replica's step, as the factory makes them. sequence: the argument that `longest` is about.
    strategies: in the order of `presets.PRESETS`.
    """

    gpus: int
    capacity_bytes: int
    reserve_bytes: int
    hardware: str
    state: str
    training: bool
    batch: int
    strategies: tuple[Fitted, ...]
    sequence: str | None = None
    longest: tuple[Longest, ...] = ()

    def __getitem__(self, strategy: str) -> Fitted:
        """What was found for a strategy. Raises KeyError where it was not tried."""
        for entry in self.strategies:
            if entry.strategy == strategy:
                return entry
        raise KeyError(strategy)

    @property
    def fits(self) -> bool:
        """Whether any strategy does."""
        return any(entry.smallest is not None for entry in self.strategies)

    def samples_per_second(self, split: Split) -> float:
        """Of all GPUs together."""
        return split.data_parallel * self.batch / split.seconds

    def to_json(self, indent: int | None = None) -> str:
        """What was found as JSON text, which `Fit.from_json` reads."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """What was found as plain data, as JSON has it."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Fit:
        """What `to_json` or `to_dict` gave. Raises DspError where the data is none."""
        try:
            data = dict(json.loads(data) if isinstance(data, str) else data)
            if data.pop("format", None) != FORMAT:
                raise DspError(asked="this is no fit", found=f"its format is not {FORMAT}", remedy="make it again")
            strategies = tuple(_fitted(entry) for entry in data.pop("strategies"))
            longest = tuple(Longest(**entry) for entry in data.pop("longest"))
            return cls(strategies=strategies, longest=longest, **data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DspError(asked="this is no fit", found=f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        kept = f" ({show_bytes(self.reserve_bytes)} more are kept back)" if self.reserve_bytes else ""
        step = f"training with {self.state}" if self.training else "inference"
        samples = f"{self.batch} sample" + "s" * (self.batch > 1)
        lines = [
            f"{self.gpus} GPUs ({self.hardware}) of {show_bytes(self.capacity_bytes)}{kept}; {step}; a replica's batch is "
            f"{samples}, as the model's example has it"
        ]
        if rows := [row for entry in self.strategies for row in self._rows(entry)]:
            heads = ["strategy", "GPUs of a\nreplica", "replicas", "peak", "blocks\nrecomputed", "sent in\na step"]
            heads += ["predicted\nstep"] + ["gradients over\nreplicas"] * self.training + ["samples/s"]
            align = ["left"] + ["right"] * (len(heads) - 1)
            lines.append(tabulate(rows, headers=heads, disable_numparse=True, colalign=align))
        notes = [f"{one.strategy} does not fit: {one.reason}" for one in self.strategies if one.smallest is None]
        notes += [
            f"{one.strategy} on {', '.join(map(str, one.undecided))}: the solver found no plan in its time; that there is none "
            "is not shown"
            for one in self.strategies
            if one.undecided
        ]
        if notes:
            lines.append("\n".join(notes))
        if self.longest:
            lines.append(f"longest {self.sequence} that fits, by GPUs of a replica\n\n{self._longest_table()}")
        return "\n\n".join(lines)

    def _rows(self, entry: Fitted) -> Iterator[list[str]]:
        for number, split in enumerate(dict.fromkeys((entry.smallest, entry.without_recompute))):
            if split is None:
                continue
            row = [entry.strategy if not number else "  keeping all", split.sequence_parallel, split.data_parallel]
            row += [show_bytes(split.peak_bytes), split.recomputed, show_bytes(split.wire_bytes)]
            row += [show_seconds(split.step_seconds)] + [show_seconds(split.sync_seconds)] * self.training
            yield [*map(str, row), f"{self.samples_per_second(split):.4g}"]

    def _longest_table(self) -> str:
        names = list(dict.fromkeys(entry.strategy for entry in self.longest))
        cells: dict[int, dict[str, str]] = {}
        for entry in self.longest:
            shown = "none" if entry.value is None else str(entry.value)
            if entry.value is not None and "InfeasibleError" not in entry.reason:
                shown += " or more" if entry.fails is None else " *"
            cells.setdefault(entry.sequence_parallel, {})[entry.strategy] = shown
        rows = [[str(ranks), *(own.get(name, "") for name in names)] for ranks, own in cells.items()]
        table = tabulate(rows, headers=["GPUs", *names], disable_numparse=True, colalign=["right"] * (1 + len(names)))
        return table
