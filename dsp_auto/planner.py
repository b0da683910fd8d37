"""`plan`: the whole line from a model to a plan, readable top to bottom."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .alternatives import Alternative, Alternatives
from .capacity import Capacity, find_capacity
from .cost_models.compute import Launch, op_launches
from .cost_models.hardware import DEFAULT, Hardware, as_hardware
from .cost_models.state import TrainingState, as_state
from .decision import check_fits, check_same, record, restore, show_inputs, show_ops
from .errors import ConstraintError, DspError, InfeasibleError, LayoutError, PlanError, StrategyError
from .mesh import Mesh, as_mesh
from .passes.buckets import Bucket, make_buckets
from .passes.capture import Program, capture
from .passes.constrain import (
    Constraint,
    check_constraints,
    check_satisfiable,
    constrain,
    read_constraints,
    ways_of,
)
from .passes.factorize import factorize
from .passes.factors import Factors
from .passes.layout import Layout, R, Shard
from .passes.nodes import value_id
from .passes.overlap import Early, find_early
from .passes.presets import (
    ALWAYS,
    MEMORY,
    PARAMETERS,
    UNION,
    Space,
    check_preset,
    find_spaces,
    has_several_sequences,
    least_of_megatron,
)
from .passes.problem import OBJECTIVES, Problem
from .passes.regions import find_regions
from .passes.rewrite import rewrite
from .passes.solve import GAP, SLACK, TOLERANCE, OutOfTimeError, Solution, out_of_time, solve
from .passes.stages import MAY_STAY_WHOLE, StageGraph, make_stages
from .passes.summarize import group_stages, summarize
from .plain_data import shorten
from .plan import Plan
from .progress import log_plan, step
from .units import counted

# What the solver gets at least, where other spaces took the time.
LEAST_SECONDS = 1.0
RNGS = ("parallel", "serial")
LayoutSpec = Mapping[str, int | str | None]


@dataclass(frozen=True)
class Options:
    """How to plan; checked when made, so that nothing is captured for a strategy that does not exist."""

    objective: str = "volume"
    capacity: Capacity | None = None
    optimizer: TrainingState = TrainingState()
    recompute: bool | None = None
    may_stay_whole: float = MAY_STAY_WHOLE
    strategy: str | None = None
    shard_parameters: bool | None = None
    hardware: Hardware | None = None
    dim_names: Mapping[str, str] | None = None
    in_layouts: Mapping[str, LayoutSpec] | None = None
    out_layouts: LayoutSpec | Sequence[LayoutSpec | None] | None = None
    time_limit: float = 60.0
    rng: str = "parallel"
    overlap: bool = True
    constraints: Mapping[str, Mapping[str, str | None]] | None = None
    keep_whole: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        capacity: int | str | None = None,
        hardware: str | PathLike | Hardware | None = None,
        *,
        reserve: float | None = None,
        optimizer: str | TrainingState | None = "adam",
        device: torch.device | str | None = None,
        **rest: Any,
    ) -> Options:
        """device: for the capacity "free"."""
        found = find_capacity(capacity, reserve, device)
        profile = None if hardware is None else as_hardware(hardware)
        options = cls(capacity=found, hardware=profile, optimizer=as_state(optimizer), **rest)
        share = options.may_stay_whole
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise StrategyError(
                asked=f"may_stay_whole={options.may_stay_whole!r}",
                found="it is a share of all bytes that ops make",
                remedy="give a number from 0 to 1",
            )
        if options.recompute and options.capacity is None:
            raise StrategyError(
                asked="recompute=True",
                found="there is no capacity, so nothing says how much has to be recomputed",
                remedy='give one: capacity="80GB"',
            )
        if options.strategy is not None:
            check_preset(options.strategy)
        if options.objective not in OBJECTIVES:
            raise StrategyError(
                asked=f"objective {options.objective!r}",
                found="no such objective",
                remedy=f"use one of {', '.join(OBJECTIVES)}",
            )
        if options.rng not in RNGS:
            raise StrategyError(asked=f"rng {options.rng!r}", found="no such way", remedy=f"use one of {', '.join(RNGS)}")
        if not isinstance(options.overlap, bool):
            raise StrategyError(asked=f"overlap={options.overlap!r}", found="it is yes or no", remedy="use True or False")
        _check_spec_types(options)
        read_constraints(options.constraints, options.keep_whole)
        if options.objective == "time" and options.hardware is None:
            options = replace(options, hardware=as_hardware(None))
        return options


    def check_none(self) -> None:
        """Raises StrategyError where anything is asked for, because there is a plan already."""
        given = [name for name, value in vars(self).items() if value != getattr(Options(), name)]
        if given:
            raise StrategyError(
                asked=f"a plan is given, and {', '.join(given)}",
                found="a plan has the options that it was made with",
                remedy="leave them out, or make the plan with them",
            )

    def to_dict(self) -> dict[str, Any]:
        """What the plan depends on, as plain data that `of_plan` reads."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "capacity": self.capacity and {"bytes": self.capacity.bytes, "reserve": self.capacity.reserve},
            "optimizer": asdict(self.optimizer),
            "hardware": self.hardware and json.loads(self.hardware.to_json()),
        }

    @classmethod
    def of_plan(cls, plan: Plan) -> Options:
        """The options that a plan was made with. Raises PlanError where they are none."""
        given = dict(plan.decision["options"])
        capacity, hardware = given.pop("capacity"), given.pop("hardware")
        try:
            return cls.of(
                capacity and capacity["bytes"],
                hardware and Hardware.from_json(json.dumps(hardware), "the plan's hardware"),
                reserve=capacity and capacity["reserve"],
                optimizer=TrainingState(**given.pop("optimizer")),
                **given,
            )
        except DspError as error:
            raise PlanError(asked="this is no plan", found=shorten(f"its options: {error}")) from error

    @property
    def usable(self) -> int | None:
        """Bytes of a device that a plan may use."""
        return None if self.capacity is None else self.capacity.usable

    @property
    def known_strategy(self) -> str:
        """The strategy of options that are settled."""
        if self.strategy is None:
            raise AssertionError("no strategy is settled")
        return self.strategy

    def settled(self, factors: Factors, mesh: Mesh) -> Options:
        """With a strategy, where none was asked for."""
        if self.strategy is not None:
            return self
        if has_several_sequences(factors, mesh):
            return replace(self, strategy="dsp")
        return replace(self, strategy="auto", shard_parameters=bool(self.shard_parameters))


# The options that are plain data as they are; how long the solver may take is none of the plan.
_PLAIN = (
    *("objective", "recompute", "may_stay_whole", "strategy", "shard_parameters", "dim_names", "in_layouts", "out_layouts"),
    *("rng", "overlap", "constraints", "keep_whole"),
)


def _check_spec_types(options: Options) -> None:
    for name, spec in (options.in_layouts or {}).items():
        if not isinstance(spec, Mapping):
            raise LayoutError(
                asked=f"in_layouts gives {name} the layout {spec!r}",
                found=f"a {type(spec).__name__}",
                remedy='write it as {"sp": 1}: mesh dim, and the dim of the tensor that is cut over it',
            )
    specs = options.out_layouts
    listed = [specs] if isinstance(specs, Mapping) or specs is None else specs
    if not isinstance(listed, Sequence) or not all(spec is None or isinstance(spec, Mapping) for spec in listed):
        raise LayoutError(
            asked=f"out_layouts is {specs!r}",
            found=f"a {type(specs).__name__}",
            remedy='write it as {"sp": 1}, or a list with one such entry (or None) for each tensor that is returned',
        )


@dataclass
class Prepared:
    """A captured model and its spaces, before anything is decided. A space's problem is made when it is asked for."""

    program: Program
    factors: Factors
    mesh: Mesh
    spaces: tuple[Space, ...]
    options: Options
    held: Mapping[str, Layout] | None
    seconds: Mapping[str, float]
    made: dict[int, Problem] = field(default_factory=dict)
    also: tuple[Constraint, ...] = ()

    @cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        """The user's, and `also`."""
        return (*read_constraints(self.options.constraints, self.options.keep_whole), *self.also)

    @cached_property
    def shown_inputs(self) -> list[str]:
        return show_inputs(self.program)

    @cached_property
    def shown_ops(self) -> list[list[str]]:
        return show_ops(self.program)

    def problem(self, space: int) -> Problem:
        """stages, of one space."""
        if space not in self.made:
            with _no_garbage_collection():
                self.made[space] = self._problem(self.spaces[space])
        return self.made[space]

    def _problem(self, space: Space) -> Problem:
        program, factors, options = self.program, self.factors, self.options
        graph = make_stages(
            program,
            factors,
            space,
            _in_layouts(program, factors, space.mesh, options.in_layouts or {}),
            _out_layouts(program, factors, space.mesh, options.out_layouts),
            options.may_stay_whole if options.may_stay_whole < 1 else None,
            None
            if self.held is None
            else {name: _refined(layout, self.mesh, space.mesh) for name, layout in self.held.items()},
            self.constraints,
        )
        return Problem(
            program,
            graph,
            options.objective,
            _hardware(options, space.mesh),
            _compute_seconds(program, graph, options),
            options.optimizer,
            find_regions(graph, candidates=options.capacity is not None and options.recompute is not False),
            whole=options.capacity is not None,
        )


@unset_fake_temporarily()  # a mode of the caller's, which does not know the fake tensors of planning
def plan(
    model: nn.Module,
    mesh: Any,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    objective: str = "volume",
    capacity: int | str | None = None,
    reserve: float | None = None,
    optimizer: str | TrainingState | None = "adam",
    recompute: bool | None = None,
    may_stay_whole: float = MAY_STAY_WHOLE,
    strategy: str | None = None,
    shard_parameters: bool | None = None,
    hardware: str | Hardware | None = None,
    dim_names: Mapping[str, str] | None = None,
    in_layouts: Mapping[str, LayoutSpec] | None = None,
    out_layouts: LayoutSpec | Sequence[LayoutSpec | None] | None = None,
    time_limit: float = 60.0,
    rng: str = "parallel",
    overlap: bool = True,
    constraints: Mapping[str, Mapping[str, str | None]] | None = None,
    keep_whole: Sequence[str] | None = None,
) -> Plan:
    """Plan `model(*args, **kwargs)` over `mesh`, with no process group, no GPU and no weights.

    model, args, kwargs: real, fake or on `meta`; nothing is computed and nothing changes. Under `torch.no_grad()` the plan
        is for inference.
    mesh: a DeviceMesh, `"8"`, `"2x4"` or a `Mesh`.
    objective: "volume" (wire bytes of forward, backward and gradient synchronization) or "time" (seconds by the
        alpha-beta and roofline models on `hardware`: a profile's name or a `Hardware`; "h100" where none is given).
    capacity: memory of a device for everything, in bytes, as `"80GB"`, or "free": what is free on this one now. Without it,
        activations take no more than those of the plan that makes the fewest bytes, plus 10%.
    reserve: the share of the capacity that is kept back for the allocator and libraries; None: 5%, of a bare number of bytes
        nothing.
    optimizer: what a training step holds of each parameter: "adam", "adamw", "sgd", "sgd-momentum", "none", or a
        `TrainingState` with float32 copies and ZeRO over data-parallel ranks.
    recompute: whether blocks may be recomputed in backward instead of keeping their activations; None: where a capacity is
        given. What the model itself runs under `torch.utils.checkpoint` is recomputed in any case.
    may_stay_whole: of what could be sharded the smallest tensors that together make this share of all bytes (a text prompt, a
        timestep) may be made on every device; the others are sharded, whatever fits. 1: anything, as Eq. 9 has it, which then
        replicates all that the capacity has room for.
    strategy: one of `passes.presets`: "dsp", "ulysses", "megatron-lm", "megatron-sp", "ring", or "auto", which may do all that
        they do. None: "dsp" for a model of several sequences that are long enough, else "auto" with all parameters left whole.
    shard_parameters: whether ranks may hold parts of parameters (as DTensors); None: as the strategy has it.
    dim_names: names of the inputs' dims for people: `{"video": "B T S C"}`, or `"B (T S) C"` where the model splits a dim.
    in_layouts: how inputs arrive, `{"video": {"sp": 1}}`: cut along dim 1 over mesh dim sp. out_layouts: how outputs leave,
        `{"sp": 1}`, or one entry for each tensor the model returns. What is not named is replicated.
    time_limit: seconds for the solver; the plan carries the gap that is left.
    rng: "parallel": ranks draw their own numbers for shards of a dropout, and the same ones for what they all hold; "serial":
        they draw what one device would, and keep their part, which takes time and memory.
    overlap: whether a collective is issued before what it gives is wanted, where other ops of the model can run in between (on
        `hardware`; where none is given "h100", or "cpu-gloo" for processes on CPUs) and its memory does not raise the peak. The
        results are the same.
    constraints: what ops in some modules shard: `{"blocks.3.attn": {"sp": "T"}}` makes every op in that module that has the
        factor T among its dims shard it over sp; `{"sp": None}` makes all of them shard nothing over sp. A factor goes by the
        name that plans print; `*` stands for one part of a path (`blocks.*.attn`). Ops that do not have the factor are free,
        views follow, and tensors are resharded on the way in and out as ever. keep_whole: modules whose ops shard nothing over
        any mesh dim. A constraint that speaks of no op, or that some op cannot satisfy, is refused.

    The plan can say what other layouts would cost (`Plan.explain`).

    Raises CaptureError, LayoutError, MeshError, NoShardableFactorError, StrategyError and InfeasibleError.
    """
    options = Options.of(
        capacity,
        hardware,
        reserve=reserve,
        optimizer=optimizer,
        recompute=recompute,
        may_stay_whole=may_stay_whole,
        objective=objective,
        strategy=strategy,
        shard_parameters=shard_parameters,
        dim_names=dim_names,
        in_layouts=in_layouts,
        out_layouts=out_layouts,
        time_limit=time_limit,
        rng=rng,
        overlap=overlap,
        constraints=constraints,
        keep_whole=keep_whole,
    )
    abstract = as_mesh(mesh)
    with step(f"capture of {type(model).__name__}"):
        program = capture(model, args, kwargs)
    with _no_garbage_collection():
        return plan_prepared(prepare(program, abstract, options))


def plan_prepared(prepared: Prepared) -> Plan:
    """The best plan, which can say what others would cost."""
    with step(f"solving for {prepared.mesh}"):
        solution = decide(prepared)
    found = finish(prepared, solution)[0]
    log_plan(found)
    found.ask_with(lambda modules: find_alternatives(prepared, solution, found, Constraint(modules, None, None)))
    return found


def plan_given(program: Program, mesh: Mesh, plan: Plan) -> Plan:
    """A plan that was made before, as it is for `program`; which can say what others would cost. Raises PlanError where it is
    one of something else, or sends something else than it says."""
    prepared, solution = prepare_given(program, mesh, plan)
    found = finish(prepared, solution)[0]
    check_same(plan, found)
    found.ask_with(lambda modules: find_alternatives(prepared, solution, found, Constraint(modules, None, None)))
    return found


@unset_fake_temporarily()
def find_alternatives(
    prepared: Prepared, solution: Solution, made: Plan, of: Constraint, seconds: float = math.inf
) -> Alternatives:
    """What each other layout of the ops that `of` speaks of would cost in all: for each mesh dim each factor that one of them
    may shard, and whole. Plans anew for each in its share of `seconds`; those that are left then have that as their reason.
    Raises LayoutError where there is no such op."""
    ends = time.perf_counter() + seconds
    factors = prepared.factors
    check_constraints((of,), factors, prepared.mesh)
    problem = prepared.problem(solution.space)
    mesh, stages = problem.graph.mesh, problem.graph.stages
    chosen = [(stage.op, stage.strategies[solution.choice[stage.index]]) for stage in stages if stage.op is not None]
    ways = [(mesh_dim, name) for mesh_dim, names in ways_of(of, factors, prepared.spaces).items() for name in names]
    entries = []
    for number, (mesh_dim, name) in enumerate(ways):
        one = replace(of, mesh_dim=mesh_dim, factor=name)
        try:
            is_plan = all(constrain(op, (own,), (one,), factors, mesh) for op, own in chosen)
        except ConstraintError:
            is_plan = False
        share = (ends - time.perf_counter()) / (len(ways) - number)
        entries.append(Alternative(mesh_dim, name, is_plan, *((made, "") if is_plan else _planned_with(prepared, one, share))))
    return Alternatives(of.modules, made, tuple(entries))


def _planned_with(prepared: Prepared, one: Constraint, seconds: float) -> tuple[Plan | None, str]:
    """The plan under one constraint more, or why there is none."""
    if seconds <= 0:
        return None, "not worked out, because the time for it was up"
    options = replace(prepared.options, time_limit=min(seconds, prepared.options.time_limit))
    if one.ops is None and one.mesh_dim is not None:
        wanted = {**(options.constraints or {})}
        wanted[one.modules] = {**wanted.get(one.modules, {}), one.mesh_dim: one.factor}
        changed = replace(prepared, options=replace(options, constraints=wanted), made={})
    else:  # which no option says
        changed = replace(prepared, options=options, also=(*prepared.also, one), made={})
    try:
        again = _constrained(changed)
        return finish(again, decide(again))[0], ""
    except ConstraintError as error:
        # To constrain these ops was not the user's wish.
        return None, str(error) if one.ops is None else f"{error.where or error.asked}: {error.found}"
    except (InfeasibleError, OutOfTimeError) as error:
        return None, str(error)


def _constrained(prepared: Prepared) -> Prepared:
    """Without the spaces in which some op has no strategy that the constraints leave. Raises ConstraintError where that is all
    of them."""
    constraints = prepared.constraints
    if not constraints:
        return prepared
    check_constraints(constraints, prepared.factors, prepared.mesh)
    left, failed = [], []
    for space in prepared.spaces:
        try:
            check_satisfiable(constraints, prepared.factors, space)
            left.append(space)
        except ConstraintError as error:
            failed.append(error)
    if not left:
        raise failed[0]
    if all(space.when != ALWAYS for space in left):  # what was to be looked at later, if at all
        left = [replace(space, when=ALWAYS) for space in left]
    return replace(prepared, spaces=tuple(left))


def prepare(
    program: Program, mesh: Mesh, options: Options, held: Mapping[str, Layout] | None = None
) -> Prepared:
    """factorize, and the spaces of the strategy. held: see `make_stages`; of the user's mesh dims."""
    started = time.perf_counter()
    with _no_garbage_collection():
        factors = factorize(program, options.dim_names, options.rng)
        options = options.settled(factors, mesh)
        spaces = find_spaces(factors, mesh, options.known_strategy, options.shard_parameters)
        # What is wrong with layouts is wrong in every space.
        _in_layouts(program, factors, mesh, options.in_layouts or {})
        _out_layouts(program, factors, mesh, options.out_layouts)
    seconds = {**program.seconds, "prepare": time.perf_counter() - started}
    return _constrained(Prepared(program, factors, mesh, spaces, options, held, seconds))


def prepare_given(program: Program, mesh: Mesh, plan: Plan) -> tuple[Prepared, Solution]:
    """A plan that was made before, ready for `finish`. Raises PlanError where it is one of another model, call or mesh."""
    check_fits(plan, program, mesh)
    prepared = prepare(program, mesh, Options.of_plan(plan))
    return prepared, restore(prepared, plan)


def decide(prepared: Prepared) -> Solution:
    """stages and solve: the best plan of all spaces."""
    options = prepared.options
    found: dict[int, Solution] = {}
    failed: list[InfeasibleError] = []
    late: list[OutOfTimeError] = []
    started = time.perf_counter()
    asks = options.capacity is None and any(space.when == MEMORY for space in prepared.spaces)

    def look(when: str, limit: float = math.inf, gap: float = GAP) -> None:
        for number, space in enumerate(prepared.spaces):
            left = options.time_limit - (time.perf_counter() - started)
            if space.when != when or (found and left <= 0) or (when == MEMORY and _is_the_least(prepared, found)):
                continue
            try:
                problem = prepared.problem(number)
                with _no_garbage_collection():
                    asked = asks and when == ALWAYS
                    seconds = max(min(left, limit), min(LEAST_SECONDS, options.time_limit))
                    solution = solve(problem, options.usable, gap=gap, time_limit=seconds, unbounded=asked)
                found[number] = replace(solution, space=number)
            except InfeasibleError as error:
                failed.append(error)
            except OutOfTimeError as error:
                late.append(error)

    others = any(space.when != ALWAYS for space in prepared.spaces)
    share = options.time_limit / 2 if others else math.inf
    # Where presets with more memory might be better, the union comes to its end only if they are not.
    look(ALWAYS, share, gap=math.inf if asks else GAP)
    if not found or any(_presets_may_be_better(own) for own in found.values()):
        look(MEMORY)
    if asks and found:
        first = min(_frugal(prepared, found), key=lambda own: own.objective)
        if prepared.spaces[first.space].when == ALWAYS and first.gap > GAP:
            look(ALWAYS, share)
    if _parts_may_be_better(prepared, min((own.objective for own in _frugal(prepared, found)), default=math.inf)):
        look(PARAMETERS)
        # With a capacity only the union has all that the presets have.
        look(UNION, math.inf if options.capacity is not None else max(time.perf_counter() - started, LEAST_SECONDS))
    if not found:
        if late:
            raise out_of_time(options.time_limit)
        raise min(failed, key=lambda error: math.inf if error.least_bytes is None else error.least_bytes)
    best = min(_frugal(prepared, found), key=lambda solution: solution.objective)
    return replace(best, seconds={"solve": time.perf_counter() - started})


def _is_the_least(prepared: Prepared, found: Mapping[int, Solution]) -> bool:
    """Whether some plan costs no more than the union would with any memory."""
    least = [own.unbounded for own in found.values() if own.unbounded is not None]
    return bool(least) and any(own.objective <= (1 + TOLERANCE) * min(least) for own in _frugal(prepared, found))


def _presets_may_be_better(union: Solution) -> bool:
    """Whether a restriction might do better than the union: with more memory, or where the solver did not come to the end."""
    costs_memory = union.unbounded is not None and union.objective > (1 + TOLERANCE) * union.unbounded
    return costs_memory or union.gap > GAP


def _parts_may_be_better(prepared: Prepared, objective: float) -> bool:
    """Whether parameters in parts might send less than the plan with `objective` wire bytes that has them whole."""
    in_parts = any(isinstance(p, Shard) for layout in (prepared.held or {}).values() for p in layout)
    if in_parts or prepared.options.objective != "volume":
        return True
    return least_of_megatron(prepared.factors, prepared.mesh.ranks, prepared.program.training) < objective


def _frugal(prepared: Prepared, found: Mapping[int, Solution]) -> list[Solution]:
    """Without a capacity, of a preset's spaces only those whose bound is about as low as any's: the others take a sequence that
    leaves large activations whole."""
    if prepared.options.capacity is not None:
        return list(found.values())
    least: dict[str, int] = {}
    for number, solution in found.items():
        preset = prepared.spaces[number].preset
        least[preset] = min(least.get(preset, solution.capacity_bytes), solution.capacity_bytes)
    return [own for n, own in found.items() if own.capacity_bytes <= (1 + SLACK) * least[prepared.spaces[n].preset]]


def finish(
    prepared: Prepared,
    solution: Solution,
    rank: int = 0,
    groups: Callable[[tuple[int, ...]], str] | None = None,
    usual: str = DEFAULT,
) -> tuple[Plan, fx.Graph]:
    """rewrite: the plan, and the program of the `rank`-th device of the mesh, counted row-major.

    groups: c10d name of this rank's group along some mesh dims, asked for in the same order on every rank; without it the
    program is only to be looked at. usual: the hardware by which collectives are issued early where the user named none.
    """
    started = time.perf_counter()
    problem = prepared.problem(solution.space)
    mesh = problem.graph.mesh
    with _no_garbage_collection():
        buckets: tuple[Bucket, ...] = make_buckets(problem.graph, problem.known_reshardings(solution.choice))
        names = {mesh_dims: (groups or mesh.label)(mesh_dims) for mesh_dims in problem.lines(solution.choice)}
        stages = group_stages(problem, solution.choice)
        shown = {stage.index: number for number, own in enumerate(stages) for stage in own}
        early = _early(prepared, solution, usual)
        graph = rewrite(prepared.program, problem, solution, buckets, mesh.coordinate(rank), names, shown, early)
    seconds = {
        "export": prepared.seconds["export"],
        "capture": prepared.seconds["capture"],
        "plan": prepared.seconds["prepare"] + sum(solution.seconds.values()),
        "rewrite": time.perf_counter() - started,
    }
    with _no_garbage_collection():
        options = prepared.options
        found = summarize(problem, solution, buckets, early, stages, options.known_strategy, options.capacity, seconds)
        return replace(found, decision=record(prepared, solution)), graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Planning makes many small objects that all live on: collections in between only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compute_seconds(program: Program, graph: StageGraph, options: Options) -> Callable[[int, int, bool], float] | None:
    """Roofline seconds of a stage under one of its strategies, for the objective "time"; of its forward alone where it runs
    again."""
    hardware = _hardware(options, graph.mesh)
    return None if options.objective != "time" or hardware is None else _stage_seconds(program, graph, hardware)


def _stage_seconds(program: Program, graph: StageGraph, hardware: Hardware) -> Callable[[int, int, bool], float]:
    """The same on a hardware."""
    launched: dict[int, tuple[tuple[Launch, ...], ...]] = {}

    def seconds(stage: int, strategy: int, again: bool) -> float:
        entry = graph.stages[stage]
        if entry.op is None:
            return 0.0
        if stage not in launched:
            node = entry.op.node
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            launched[stage] = op_launches(node.target, args, kwargs, program.training)
        shards = graph.shards(stage, strategy)
        forward, backward = launched[stage]
        return sum(launch.seconds(hardware, shards) for launch in (forward if again else forward + backward))

    return seconds


def _early(prepared: Prepared, solution: Solution, usual: str) -> tuple[Early, ...]:
    """overlap: what the programs of a plan issue early."""
    options, problem = prepared.options, prepared.problem(solution.space)
    if not options.overlap:
        return ()
    hardware = _on_mesh(options.hardware or as_hardware(usual), problem.graph.mesh)
    seconds = _stage_seconds(prepared.program, problem.graph, hardware)
    return find_early(problem, solution, hardware, lambda stage, strategy: seconds(stage, strategy, True))


def _hardware(options: Options, mesh: Mesh) -> Hardware | None:
    """The profile that was asked for, with the links of this mesh."""
    return None if options.hardware is None else _on_mesh(options.hardware, mesh)


def _on_mesh(hardware: Hardware, mesh: Mesh) -> Hardware:
    return hardware.on(dict(zip(mesh.names, mesh.sizes, strict=True)))


def _in_layouts(program: Program, factors: Factors, mesh: Mesh, specs: Mapping[str, LayoutSpec]) -> dict[str, Layout]:
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = {e.name: n.name for n, e in zip(nodes, program.inputs, strict=True) if e.kind == "input"}
    inputs = {name: node for name, node in inputs.items() if (node, 0) in factors.values}
    unknown = [name for name in specs if name not in inputs]
    if unknown:
        raise LayoutError(
            asked=f"in_layouts names the input {unknown[0]!r}",
            found=f"the model's tensor inputs are {', '.join(inputs) or 'none'}",
            remedy="use one of these names",
        )
    return {inputs[name]: layout_of(spec, factors, (inputs[name], 0), mesh, name) for name, spec in specs.items()}


def _refined(layout: Layout, mesh: Mesh, split: Mesh) -> Layout:
    """A layout over `mesh` as one over the same mesh with some dims split."""
    return tuple(layout[mesh.names.index(name)] for name in split.part_of)


def _out_layouts(program: Program, factors: Factors, mesh: Mesh, specs: Any) -> dict[int, Layout]:
    if specs is None:
        return {}
    outputs = program.graph.output_node().args[0]
    tensors = [
        (number, value_id(node))
        for number, node in enumerate(outputs)
        if number >= len(program.mutated) and isinstance(node, fx.Node) and value_id(node) in factors.values
    ]
    listed = [specs] if isinstance(specs, Mapping) else list(specs)
    if len(listed) != len(tensors):
        raise LayoutError(
            asked=f"out_layouts describes {counted(len(listed), 'output')}",
            found=f"the model returns {counted(len(tensors), 'tensor')}",
            remedy="give one entry for each tensor that the model returns, None for replicated ones",
        )
    return {
        number: layout_of(spec, factors, value, mesh, f"output {position}")
        for position, ((number, value), spec) in enumerate(zip(tensors, listed))
        if spec is not None
    }


def layout_of(spec: LayoutSpec, factors: Factors, value: tuple[str, int], mesh: Mesh, label: str) -> Layout:
    """The layout that a user wrote as `{"sp": 1}` (mesh dim -> dim of the tensor, None for replicated).

    Raises LayoutError where the mesh, the dim, or enough elements in it do not exist.
    """
    entry = factors.values[value]
    found: list[Any] = [R] * len(mesh.sizes)

    def wrong(problem: str, remedy: str) -> LayoutError:
        shape = f"{label} is {list(entry.shape)}, dims {factors.show(value)}"
        return LayoutError(asked=f"layout {dict(spec)!r} of {label}", found=f"{problem} ({shape})", remedy=remedy)

    for name, dim in spec.items():
        if name not in mesh.part_of:
            raise wrong(f"the mesh has no dim {name!r}", f"its dims are {', '.join(mesh.whole)}")
        if dim is None:
            continue
        if isinstance(dim, str):
            dims = [n for n, own in enumerate(entry.dims) if [factors.names[f] for f in own] == [dim]]
            if len(dims) != 1:
                raise wrong(f"it has {'no' if not dims else 'more than one'} dim {dim!r}", "give the dim's number")
            dim = dims[0]
        if not -len(entry.dims) <= dim < len(entry.dims):
            raise wrong(f"it has no dim {dim}", f"use 0 to {len(entry.dims) - 1}")
        dim %= len(entry.dims)
        ranks = mesh.whole[name]
        if not entry.dims[dim] or factors.sizes[entry.dims[dim][0]] < ranks:
            raise wrong(f"dim {dim} cannot be cut over {ranks} ranks", "choose a longer dim")
        placement = Shard(sum(len(own) for own in entry.dims[:dim]))
        if placement in found:
            raise wrong(f"two mesh dims cut dim {dim}", "cut each dim over one mesh dim")
        for m in mesh.dims_of(name):
            found[m] = placement
    return tuple(found)
