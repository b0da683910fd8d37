"""Fit: how few ranks a model's sequences have to be shared out over, and what would fit where a plan does not.

The rule of the paper's end-to-end runs (section 5.1, appendix A.2.2, Table 4): each strategy gets the smallest
sequence-parallel size on which a step fits in memory, and data parallelism has the rest of the GPUs. A size is tried by
planning with the capacity: a plan shows that it fits, an `InfeasibleError` that it does not.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import lru_cache
from inspect import Parameter, signature
from os import PathLike
from typing import Any

from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .capacity import find_capacity
from .cost_models.hardware import Hardware, as_hardware
from .cost_models.state import TrainingState, as_state
from .errors import ConstraintError, DspError, InfeasibleError, MeshError, NoShardableFactorError, StrategyError
from .factory import build
from .longest import Longest, find_longest
from .mesh import as_mesh
from .passes.capture import Program, capture
from .passes.factorize import factorize
from .passes.presets import PRESETS, check_preset
from .passes.solve import OutOfTimeError, Solution
from .planner import Options, Prepared, decide, finish, prepare
from .predict import trace_rank
from .suggest import batch_of
from .units import show_bytes, show_seconds

FORMAT = 1
# `auto` may do what all others do, which takes as long as all of them: it is tried where it is asked for.
STRATEGIES = tuple(name for name in PRESETS if name != "auto")
TIME_LIMIT = 20.0  # seconds for a plan
# A size is passed over where an even share of what a smaller one needs at least is so much above the capacity.
MARGIN = 1.1
MOST_GPUS = 2**20  # whose divisors are quickly found, and more than there are anywhere
KEPT = 8  # captured programs, each of another length


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
    """One strategy: its `smallest` size that fits, and the smallest that recomputes no block (`without_recompute`); they may be
    one.

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
class Fit:
    """What `fit` found; prints as tables, keeps as JSON.

    gpus: all there are. hardware: the profile's name. capacity_bytes: what a plan may use of a GPU; reserve_bytes: what is kept
    back. training: whether a step has a backward. state: what training keeps of each
    parameter, in words. batch: samples of one replica's step, as the model's example has them. strategies: in the order of
    `presets.PRESETS`. sequence, step: the argument that `longest` is about, and what its values are multiples of.
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
    step: int = 1
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
        notes = [f"{one.strategy} does not fit: {one.reason}" for one in self.strategies if one.reason]
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
        for split in dict.fromkeys((entry.smallest, entry.without_recompute)):
            if split is None:
                continue
            row = [entry.strategy, split.sequence_parallel, split.data_parallel]
            row += [show_bytes(split.peak_bytes), split.recomputed, show_bytes(split.wire_bytes)]
            row += [show_seconds(split.step_seconds)] + [show_seconds(split.sync_seconds)] * self.training
            yield [*map(str, row), f"{self.samples_per_second(split):.4g}"]

    def _longest_table(self) -> str:
        names = list(dict.fromkeys(entry.strategy for entry in self.longest))
        cells: dict[int, dict[str, str]] = {}
        notes = []
        for entry in self.longest:
            shown = "none" if entry.value is None else str(entry.value)
            if entry.value is not None and (entry.fails is None or entry.fails - entry.value > self.step):
                shown += " or more"
            cells.setdefault(entry.sequence_parallel, {})[entry.strategy] = shown
            if entry.refused:
                notes.append(f"{entry.strategy} on {entry.sequence_parallel}: {entry.refused}")
        rows = [[str(ranks), *(own[name] for name in names)] for ranks, own in cells.items()]
        table = tabulate(rows, headers=["GPUs", *names], disable_numparse=True, colalign=["right"] * (1 + len(names)))
        return "\n\n".join([table] + ["\n".join(notes)] * bool(notes))


def _fitted(data: Mapping[str, Any]) -> Fitted:
    splits = {name: data[name] and Split(**data[name]) for name in ("smallest", "without_recompute")}
    return Fitted(**{**data, **splits, "undecided": tuple(data["undecided"])})


@unset_fake_temporarily()  # see `plan`
def fit(
    model: nn.Module | Callable[..., tuple],
    gpus: int,
    capacity: int | str,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    strategies: Sequence[str] | None = None,
    hardware: str | PathLike | Hardware | None = None,
    reserve: float | None = None,
    optimizer: str | TrainingState | None = "adam",
    zero: int | None = None,
    recompute: bool | None = None,
    sequence: str | None = None,
    step: int = 1,
    time_limit: float = TIME_LIMIT,
    **options: Any,
) -> Fit:
    """For each strategy the smallest number of ranks that a step of `model(*args, **kwargs)` fits on, with data parallelism on
    the rest of `gpus`. No process group, no GPU and no weights. Under `torch.no_grad()` a step is the forward alone.

    model: a module; or a factory, called as `factory(**arguments)` on fake tensors, that returns (model, args, kwargs).
    gpus: all there are, 2**20 at most. Sizes are the powers of two up to them, where they are one themselves; else all their
        divisors.
    capacity, reserve, recompute: as `dsp_auto.plan`. A plan that keeps all activations is preferred on the same size.
    strategies: of `passes.presets`; None: all but "auto". hardware: what predictions are for; None: "h100".
    optimizer: as `dsp_auto.plan`. zero: the stage of ZeRO over the replicas, 0 to 3; None: that of `optimizer`.
    sequence: an argument of the factory; for every size and strategy the largest value of it that fits is looked for, in steps
        of `step`, from the one it has now.
    time_limit: seconds for each plan. options: as `dsp_auto.plan`, the same for all.

    Raises what is wrong whatever the strategy: CaptureError, LayoutError, StrategyError, MeshError for what is no number of
    GPUs, and DspError for what is wrong with the factory.
    """
    names = list(STRATEGIES if strategies is None else strategies)
    _check(names, gpus, step)
    state = as_state(optimizer)
    stage = state.zero if zero is None else TrainingState(zero=zero, data_parallel=2).zero
    rest = {"reserve": reserve, "optimizer": state, "recompute": recompute, "time_limit": time_limit, **options}
    found = find_capacity(capacity, reserve)  # once: what is free changes
    if found is None:
        raise StrategyError(asked="fit", found="there is no capacity to fit in", remedy='give one: capacity="80GB"')
    profile = as_hardware(hardware)
    chosen = {
        name: replace(Options.of(capacity, profile, strategy=name, **rest), capacity=found)
        for name in PRESETS
        if name in names
    }
    if profile.measured is not None:
        raise StrategyError(
            asked=f"fit with the hardware {profile.name!r}",
            found="it was measured on one mesh, and many are tried",
            remedy="use a profile that is for any mesh",
        )
    now = None if sequence is None else _now(model, dict(arguments or {}), sequence)
    made = _programs(model, args, kwargs, dict(arguments or {}), sequence)
    own_state = replace(state, zero=0, data_parallel=1)
    program, search = made(now), _Search(gpus, _sizes(gpus), chosen, own_state, stage, found.usable, profile)
    return Fit(
        gpus=gpus,
        capacity_bytes=found.usable,
        reserve_bytes=found.bytes - found.usable,
        hardware=profile.name,
        state=f"{search.state}, ZeRO-{stage} over the replicas" if stage else str(search.state),
        training=program.training,
        batch=batch_of(program, factorize(program)),
        strategies=tuple(search.smallest(program, name) for name in chosen),
        sequence=sequence,
        step=step,
        longest=()
        if now is None
        else find_longest(
            made, now, step, search.sizes, chosen, lambda name, n: search.options(name, n, recompute), search.usable
        ),
    )


@dataclass(frozen=True)
class _Search:
    """What sizes are tried with. state: of a parameter without replicas; zero: the stage of ZeRO over them. usable: bytes of a
    GPU that a plan may use."""

    gpus: int
    sizes: tuple[int, ...]
    chosen: Mapping[str, Options]
    state: TrainingState
    zero: int
    usable: int
    hardware: Hardware

    def options(self, name: str, ranks: int, recompute: bool | None) -> Options:
        replicas = self.gpus // ranks
        state = replace(self.state, zero=self.zero if replicas > 1 else 0, data_parallel=replicas)
        return replace(self.chosen[name], optimizer=state, recompute=recompute)

    def smallest(self, program: Program, name: str) -> Fitted:
        """The smallest sizes on which a strategy fits, tried from 1 on; on each first without recomputing."""
        may = (False, None) if program.training and self.chosen[name].recompute is not False else (False,)
        splits: dict[bool | None, Split] = {}
        failed: list[tuple[int, DspError]] = []
        undecided: dict[int, None] = {}
        passed: list[int] = []
        least: dict[bool | None, tuple[int, int]] = {}

        def attempt(ranks: int, recompute: bool | None) -> None:
            try:
                prepared = prepare(program, as_mesh(ranks), self.options(name, ranks, recompute))
                splits[recompute] = self._split(prepared, decide(prepared), ranks)
            except InfeasibleError as error:
                if error.least_bytes is not None:
                    least[recompute] = (ranks, error.least_bytes)
                failed.append((ranks, error))
            except (ConstraintError, MeshError, NoShardableFactorError) as error:
                failed.append((ranks, error))
            except OutOfTimeError:
                undecided[ranks] = None

        for ranks, recompute in itertools.product(self.sizes, may):
            if False in splits or recompute in splits:
                continue
            before, needed = least.get(recompute, (1, 0))
            # On more ranks a device needs its even share at least: one device can do the work of several.
            if needed * before > MARGIN * self.usable * ranks:
                passed += [ranks] if recompute == may[-1] else []
            else:
                attempt(ranks, recompute)
        # The reason is that of the largest size that has one in bytes.
        while passed and not splits and least.get(may[-1], (0, 0))[0] < passed[-1]:
            attempt(passed.pop(), may[-1])
        kept = splits.get(False)
        if splits or not failed:
            return Fitted(name, splits.get(None) or kept, kept, undecided=tuple(undecided))
        ranks, nearest = min(failed, key=lambda entry: getattr(entry[1], "least_bytes", None) or math.inf)
        where = f"on {ranks} GPU{'s' * (ranks > 1)}"
        return Fitted(name, None, None, type(nearest).__name__, f"{where}, {nearest}", tuple(undecided))

    def _split(self, prepared: Prepared, solution: Solution, ranks: int) -> Split:
        plan, graph = finish(prepared, solution)
        return Split(
            sequence_parallel=ranks,
            data_parallel=self.gpus // ranks,
            peak_bytes=plan.memory["peak_bytes"],
            peak_at=plan.memory["peak_at"],
            recomputed=sum(entry["by"] == "plan" for entry in plan.recomputed),
            wire_bytes=plan.communication["forward_bytes"] + plan.communication["backward_bytes"],
            step_seconds=trace_rank(prepared, solution, graph).on(self.hardware).seconds,
            sync_seconds=self._sync_seconds(prepared, solution, ranks),
            gap=plan.solver["gap"],
        )

    def _sync_seconds(self, prepared: Prepared, solution: Solution, ranks: int) -> float:
        """All-reduce of the gradients that a device holds; with ZeRO-1 and 2 a reduce-scatter, and an all-gather of what the
        optimizer made of the parameters; with ZeRO-3 one for the forward and one for the backward."""
        replicas, problem = self.gpus // ranks, prepared.problem(solution.space)
        if replicas == 1 or not prepared.program.training:
            return 0.0
        held = {False: 0, True: 0}
        for storage in problem.graph.storages.values():
            if storage.root.id[0] in problem.graph.parameters:
                nbytes = problem.nbytes(storage.id, problem.made(storage.id, solution.choice))
                held[storage.root.requires_grad] += nbytes
        trained, everything, share = held[True], sum(held.values()), (replicas - 1) / replicas
        if not self.zero:
            sent = [("all_reduce", 2 * trained)]
        elif self.zero < 3:
            sent = [("reduce_scatter", trained), ("all_gather", trained)]
        else:
            sent = [("reduce_scatter", trained), *[("all_gather", everything)] * 2]
        links = self.hardware.on({"dp": replicas, "sp": ranks})
        return sum(links.collective_seconds(kind, nbytes * share, [("dp", replicas)]) for kind, nbytes in sent)

def _check(names: Sequence[str], gpus: Any, step: Any) -> None:
    if not names:
        raise StrategyError(asked="fit no strategies", found="an empty list", remedy=f"name some of {', '.join(PRESETS)}")
    for name in names:
        check_preset(name)
    for what, value in (("gpus", gpus), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MeshError(asked=f"{what} {value!r}", found="it is a number", remedy="use 1 or more")
    if gpus > MOST_GPUS:
        raise MeshError(asked=f"gpus {Decimal(gpus):.4g}", found="these are too many to try", remedy=f"use at most {MOST_GPUS}")


def _sizes(gpus: int) -> tuple[int, ...]:
    """Powers of two where the GPUs are one, else all that divide them."""
    return tuple(n for n in range(1, gpus + 1) if gpus % n == 0)


def _programs(
    model: nn.Module | Callable[..., tuple],
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    arguments: dict[str, Any],
    sequence: str | None,
) -> Callable[[int | None], Program]:
    """Captures the model, with the sequence of some length where there is one; a few are kept."""

    @lru_cache(maxsize=KEPT)
    def made(value: int | None) -> Program:
        if isinstance(model, nn.Module):
            return capture(model, args, kwargs)
        given = arguments if sequence is None or value is None else {**arguments, sequence: value}
        return capture(*build(model, getattr(model, "__name__", repr(model)), given))

    return made


def _now(model: Any, arguments: Mapping[str, Any], sequence: str) -> int:
    """The value that the argument `sequence` of a factory has now."""
    if isinstance(model, nn.Module):
        raise DspError(
            asked=f"the longest {sequence}", found="a module has one length", remedy="give a factory that makes it for others"
        )
    taken = signature(model).parameters
    named = [name for name, entry in taken.items() if entry.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    value = arguments.get(sequence, taken[sequence].default if sequence in named else None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        takes = f"the factory takes {', '.join(named) or 'no arguments'}"
        found = f"its value is {value!r}" if sequence in {*named, *arguments} else takes
        raise DspError(
            asked=f"the longest {sequence}", found=found, remedy="name an argument that is a length, and give it a value"
        )
    return value
