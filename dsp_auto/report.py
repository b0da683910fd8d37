"""Report: a plan with all that speaks for and against it, as data and as one page for a browser.

What a plan alone can tell (its stages, what they send, memory over the program) is told of any plan, one that was read from a
file too. With the model at hand the report adds a predicted step, the other strategies, and for each stage what its other
layouts would cost. Stages that are alike share one answer, and a time budget bounds how many are worked out; the page says
which are not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .alternatives import Alternatives
from .compare import Candidate, Comparison, candidate_of, count_blocks, find_candidate
from .cost_models.hardware import Hardware, as_hardware
from .decision import check_same
from .errors import DspError, StrategyError
from .mesh import Mesh, as_mesh
from .passes.capture import Program, capture
from .passes.constrain import Constraint
from .passes.factors import common_name
from .passes.presets import PRESETS, check_preset
from .passes.solve import OutOfTimeError, Solution
from .passes.stages import Stage
from .passes.summarize import group_stages
from .plan import Plan, PlanStage
from .planner import Options, Prepared, decide, find_alternatives, finish, prepare, prepare_given
from .progress import log_plan, step
from .report_page import MARK, draw_page, split_layout

# What other layouts and strategies may take together. Layouts get the first half of it, and strategies what is left.
SECONDS = 60.0
# Bytes at the start of a file in which a page of ours names itself.
HEAD = 1024


@dataclass(frozen=True)
class Alike:
    """Stages of a plan that are alike, and so are those before and behind each. stages: their numbers.

    alternatives: what the other layouts of the first of them would cost; None where `reason` says why there are none.
    """

    stages: tuple[int, ...]
    alternatives: Alternatives | None = None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `dsp_auto.report` found. `save` writes it as a page that needs nothing else.

    model: the name of its class; empty for a plan that was read from a file. own: the plan's prediction and collectives.
    comparison: the strategies side by side. alike: the plan's stages, each in one entry, in the order of the program.
    seconds: the time that strategies and other layouts had. What takes a model is None for a plan alone.
    """

    plan: Plan
    model: str
    own: Candidate | None
    comparison: Comparison | None
    alike: tuple[Alike, ...]
    seconds: float | None

    @classmethod
    def of_plan(cls, plan: Plan) -> Report:
        """What a plan alone can tell."""
        reason = "a plan alone does not hold the model that it was made of"
        groups = _alike(plan.stages, [()] * len(plan.stages))
        return cls(plan, "", None, None, tuple(Alike(own, None, reason) for own in groups), None)

    def to_html(self) -> str:
        """The page, as text. Equal for equal reports."""
        return draw_page(self)

    def save(self, path: str | PathLike) -> None:
        """Writes the page. Raises DspError where it cannot be written, or where the file is there and no page of this kind."""
        check_writable(path)
        try:
            Path(path).write_text(self.to_html(), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DspError(asked=f"cannot write the page to {str(path)!r}", found=str(error)) from error

    def __str__(self) -> str:
        return self.plan.headline()


@unset_fake_temporarily()  # see `plan`
def report(
    model: nn.Module,
    mesh: Any,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | str | PathLike | None = None,
    strategies: Sequence[str] | None = None,
    hardware: str | PathLike | Hardware | None = None,
    seconds: float = SECONDS,
    **options: Any,
) -> Report:
    """Plan `model(*args, **kwargs)` over `mesh` as `dsp_auto.plan` does, and find out what else there is to know of the plan: a
    predicted step, what other strategies send, and what other layouts of each stage would cost. No process group, no GPU and no
    weights.

    plan: one that was made before, or its file, in place of planning; `options` are its own then.
    strategies: those to compare with; None: all. hardware: what a step is predicted for (and plans are made for, with the
        objective "time"); None: that of the plan, else "h100".
    seconds: how long comparing and trying other layouts may take; what is not done then is told as such.
    options: as `dsp_auto.plan`.

    Raises what `dsp_auto.plan` raises.
    """
    chosen, made = Options.of(hardware=hardware, **options), _given(plan)
    if made is not None:
        replace(chosen, dim_names=None, hardware=None).check_none()
    with step(f"capture of {type(model).__name__}"):
        program = capture(model, args, kwargs)
    return report_program(program, as_mesh(mesh), chosen, made, strategies, seconds, type(model).__name__)


def report_program(
    program: Program,
    mesh: Mesh,
    chosen: Options,
    made: Plan | None,
    strategies: Sequence[str] | None,
    seconds: float,
    model: str,
) -> Report:
    """The same of a captured model. chosen: of a plan that was made before, its hardware alone."""
    names = _checked(strategies, seconds)
    hardware, solution = chosen.hardware, None
    if made is None:
        prepared = prepare(program, mesh, chosen)
    else:
        prepared, solution = prepare_given(program, mesh, made)
        chosen = replace(prepared.options, shard_parameters=None)
    hardware = hardware or chosen.hardware or as_hardware(None)
    hardware.on(mesh.whole)  # which refuses a mesh that it was not measured on
    if solution is None:
        with step(f"solving for {mesh}"):
            solution = decide(prepared)
    plan, graph = finish(prepared, solution)
    if made is None:
        log_plan(plan)
    else:
        check_same(made, plan)
    own = candidate_of(prepared, solution, plan, graph, hardware)
    started = time.perf_counter()
    alike = _worked_out(prepared, solution, plan, started + seconds / 2)
    candidates = tuple(
        _candidate(
            program,
            mesh,
            name,
            replace(chosen, strategy=name, hardware=hardware),
            hardware,
            prepared,
            own,
            (started + seconds - time.perf_counter()) / (len(names) - number),
        )
        for number, name in enumerate(names)
    )
    return Report(
        plan,
        model,
        own,
        Comparison(mesh.whole, hardware.name, program.training, count_blocks(program), None, candidates),
        alike,
        seconds,
    )


def check_writable(path: str | PathLike) -> None:
    """Raises DspError where a page would replace a file that is none, or has no folder to stand in."""
    place = Path(path)
    asked = f"cannot write the page to {str(path)!r}"
    if place.is_dir():
        raise DspError(asked=asked, found="it is a folder", remedy="name a file")
    if not place.parent.is_dir():
        found = f"there is no folder {str(place.parent)!r}"
        raise DspError(asked=asked, found=found, remedy="make the folder, or name another")
    if place.exists():
        try:
            with place.open("rb") as file:
                ours = MARK.encode() in file.read(HEAD)
        except OSError as error:
            raise DspError(asked=asked, found=str(error)) from error
        if not ours:
            raise DspError(
                asked=asked,
                found="there is a file already, and it is no report of dsp-auto",
                remedy="name another file, or move that one away",
            )


def _given(plan: Plan | str | PathLike | None) -> Plan | None:
    return plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)


def _checked(strategies: Sequence[str] | None, seconds: float) -> list[str]:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
        raise StrategyError(asked=f"seconds {seconds!r}", found="not a number of seconds", remedy="use 0 or more")
    for name in strategies or ():
        check_preset(name)
    return [name for name in PRESETS if strategies is None or name in strategies]


def _candidate(
    program: Program,
    mesh: Mesh,
    name: str,
    options: Options,
    hardware: Hardware,
    prepared: Prepared,
    own: Candidate,
    seconds: float,
) -> Candidate:
    """The strategy `name`, solved in so many seconds; the report's own plan, where it was made with the same options."""
    planned_for = options.hardware if options.objective == "time" else prepared.options.hardware
    if replace(options, hardware=planned_for) == prepared.options:
        return own
    try:
        if seconds > 0:
            limited = replace(options, time_limit=min(seconds, options.time_limit))
            return find_candidate(program, mesh, name, limited, hardware)
    except OutOfTimeError:
        pass
    return Candidate(name, error=OutOfTimeError.__name__, reason="not planned, because the time for this page was up")


def _worked_out(prepared: Prepared, solution: Solution, plan: Plan, ends: float) -> tuple[Alike, ...]:
    """Stages that are alike, with the alternatives of the first of them: those that most stages share first, until time is
    up."""
    problem = prepared.problem(solution.space)
    groups = group_stages(problem, solution.choice)
    own = [tuple(_seen(stage) for stage in group) for group in groups]
    found: dict[tuple[int, ...], Alike] = {}
    alike = _alike(plan.stages, own)
    with step("other layouts of each stage"):
        for number, stages in enumerate(sorted(alike, key=lambda stages: (-len(stages), stages))):
            first = plan.stages[stages[0]]
            ops = frozenset(stage.op.name for stage in groups[first.index] if stage.op is not None)
            left = (ends - time.perf_counter()) / (len(alike) - number)
            if not ops:
                reason = "no op runs here; what the model returns is whole, or as out_layouts says"
                found[stages] = Alike(stages, None, reason)
            elif left <= 0:
                found[stages] = Alike(stages, None, "not worked out, because the time for this page was up")
            else:
                of = Constraint(first.name, None, None, ops)
                found[stages] = Alike(stages, find_alternatives(prepared, solution, plan, of, left))
    return tuple(found[stages] for stages in alike)


def _seen(stage: Stage) -> tuple:
    """What tells the ops of two blocks apart."""
    if stage.op is None:
        return (stage.kind,)
    node = stage.op.node
    value = node.meta.get("val")
    shapes = [tuple(one.shape) if hasattr(one, "shape") else None for one in (value if isinstance(value, tuple) else (value,))]
    return (str(node.target), _unnumbered(stage.op.path), *shapes)


def _alike(stages: Sequence[PlanStage], seen: Sequence[tuple]) -> list[tuple[int, ...]]:
    """Numbers of stages that are alike in what they compute, shard and send, and whose neighbours are too."""
    own = [
        (
            _unnumbered(stage.name),
            stage.ops,
            tuple(map(common_name, stage.computes_over)),
            tuple((mesh_dim, *split_layout(layout)) for mesh_dim, layout in stage.layout.items()),
            tuple(
                replace(entry, tensor="", source=common_name(entry.source), target=common_name(entry.target))
                for entry in stage.enter
            ),
            more,
        )
        for stage, more in zip(stages, seen, strict=True)
    ]
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(own))}
    numbers = [None, *(kinds[kind] for kind in own), None]
    found: dict[tuple, list[int]] = {}
    for index, around in enumerate(zip(numbers, numbers[1:], numbers[2:])):
        found.setdefault(around, []).append(index)
    return [tuple(group) for group in found.values()]


def _unnumbered(path: str) -> str:
    return re.sub(r"\d+", "#", path)
