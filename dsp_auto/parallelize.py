"""`parallelize`: an unmodified module becomes one that runs on every rank of a mesh."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .agreement import Agreement
from .capacity import find_capacity
from .cost_models.state import TrainingState
from .decision import check_mesh, check_same, find_fitting, restore
from .errors import DspError, LayoutError, MeshError, PlanError
from .groups import group_names, place_in
from .mesh import Mesh, as_mesh
from .parameters import (
    copy_parameters,
    fake_whole_parameters,
    held_layouts,
    hold,
    how_held,
    local_value,
    parts_of_plan,
    placements_in,
)
from .passes.capture import Program, capture, ordered_kwargs
from .passes.checkpointing import local_module
from .passes.factors import Factors
from .passes.nodes import node_call
from .passes.rules import why_none
from .passes.stages import MAY_STAY_WHOLE
from .plan import Plan
from .planner import LayoutSpec, Options, Prepared, decide, finish, prepare
from .primitives import before_first_collective
from .progress import log_plan, step
from .signature import as_text, describe, named_inputs, signature, whole_shape

# The same containers, not copies: what is loaded, moved or replaced in a parallel module is so in its model.
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_load_state_dict_pre_hooks")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    args: tuple | None = None,
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
    hardware: Any = None,
    dim_names: Mapping[str, str] | None = None,
    in_layouts: Mapping[str, LayoutSpec] | None = None,
    out_layouts: LayoutSpec | Sequence[LayoutSpec | None] | None = None,
    time_limit: float = 60.0,
    rng: str = "parallel",
    constraints: Mapping[str, Mapping[str, str | None]] | None = None,
    keep_whole: Sequence[str] | None = None,
    plan: Plan | str | PathLike | Sequence[Plan | str | PathLike] | None = None,
    max_signatures: int = 16,
) -> ParallelModule:
    """`model` on every rank of `mesh`: same arguments, same results, same gradients, 1/N of the activations.

    Planned at the first call, once per signature (shapes, dtypes, training and grad mode, non-tensor arguments), or at once
    with `args` and `kwargs`. Every rank passes the same full inputs and gets the same full outputs, and after `backward()`
    holds the gradients one device would, unless `in_layouts` and `out_layouts` say otherwise. The module shares the
    model's parameters, buffers and submodules, and so its `state_dict` keys.

    Where the plan holds parameters in parts (see `shard_parameters`), all parameters of the model become DTensors over `mesh`
    once it is made, and so do their gradients: of whole shape, with this rank's part in memory. So they stay, for plans of
    other signatures too. Optimizers made before go on with them; a list of the old parameters kept elsewhere does not.
    `state_dict`, then to be called on all ranks, has DTensors whose parts are ranges of a dim, for
    `torch.distributed.checkpoint`; `load_state_dict` takes whole tensors or DTensors. Buffers stay whole.

    Options as in `dsp_auto.plan`; max_signatures: how many plans are kept, the least recently used goes first.

    plan: one that was made before, or the file that it was saved in; or several, for calls of several signatures (training and
    evaluation). Nothing is solved, the options are those that it was made with, and calls that no plan was made for (another
    shape, dtype or mode) are refused.

    Raises what `plan` raises, PlanError where a plan is not one of this model, call and mesh, and AgreementError where ranks
    differ in inputs, model or plan.
    """
    options = Options.of(
        capacity,
        hardware,
        reserve=reserve,
        optimizer=optimizer,
        recompute=recompute,
        may_stay_whole=may_stay_whole,
        device=getattr(mesh, "device_type", None),
        objective=objective,
        strategy=strategy,
        shard_parameters=shard_parameters,
        dim_names=dim_names,
        in_layouts=in_layouts,
        out_layouts=out_layouts,
        time_limit=time_limit,
        rng=rng,
        constraints=constraints,
        keep_whole=keep_whole,
    )
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(
            asked=f"parallelize over {mesh!r}",
            found=f"a {type(mesh).__name__}",
            remedy="pass a DeviceMesh (init_device_mesh)",
        )
    if plan is not None:
        options.check_none()
        options, given = _given_plans(plan, as_mesh(mesh))
    parallel = ParallelModule(model, mesh, options, max_signatures, given if plan is not None else ())
    if args is not None or kwargs is not None:
        parallel.prepare(*(args or ()), **(kwargs or {}))
    return parallel


@dataclass
class _Prepared:
    """One signature: this rank's program and where its inputs come from."""

    signature: str  # equal on every rank
    plan: Plan
    module: fx.GraphModule
    run: Callable[..., tuple]
    sources: list[_Held | torch.Tensor | None]  # None: the next user input
    program: Program
    draws: bool  # random numbers


class _Held(NamedTuple):
    """A parameter or buffer of the model: `values[name]`. whole: the program takes it whole, though it is held in parts."""

    values: dict[str, Any]
    name: str
    whole: bool = False

    @property
    def value(self) -> Any:
        return local_value(self.values[self.name], self.whole)


@dataclass
class _State:
    """What a ParallelModule keeps beside what it shares with the model."""

    model: nn.Module
    mesh: DeviceMesh
    options: Options
    max_signatures: int
    agreement: Agreement
    given: tuple[Plan, ...] = ()  # to be run as they are
    kept: OrderedDict[tuple, _Prepared] = field(default_factory=OrderedDict)
    latest: _Prepared | None = None
    in_parts: bool = False  # the model's parameters are DTensors over `mesh`


class ParallelModule(nn.Module):
    """What `parallelize` returns. `plan` is the plan of the latest call, `plans` those of all kept signatures.

    Shares the model's parameters, buffers and submodules; other attributes are read from and written to the model. The plan
    follows what `signature` reads. After a change that it does not see (a plain attribute that `forward` uses), `replan()`.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        options: Options,
        max_signatures: int = 16,
        given: tuple[Plan, ...] = (),
    ) -> None:
        super().__init__()
        for shared in _SHARED:
            self.__dict__[shared] = model.__dict__[shared]
        self.training = model.training
        # Not as a submodule, which would double every key.
        in_parts = bool(placements_in(model, mesh))
        self.__dict__["_dsp"] = _State(model, mesh, options, max_signatures, Agreement(mesh), given, in_parts=in_parts)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(model.forward)
        self.__dict__["forward"] = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_dsp" not in self.__dict__:
                raise
            return getattr(self._dsp.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_dsp" not in self.__dict__ or name.startswith("_") or hasattr(nn.Module, name) or name == "training":
            super().__setattr__(name, value)
        else:
            setattr(self._dsp.model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        state = self._dsp
        copy_parameters(state.model, memo)
        made = ParallelModule(
            copy.deepcopy(state.model, memo), state.mesh, state.options, state.max_signatures, state.given
        )
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DspError(
            asked="cannot pickle a parallel module",
            found="its programs belong to the process groups of this run",
            remedy="save its state_dict(), whose keys are the model's, and parallelize the model again",
        )

    def train(self, mode: bool = True) -> ParallelModule:
        self._dsp.model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._dsp.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._dsp.model.load_state_dict(*args, **kwargs)

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest call; None before the first."""
        return self._dsp.latest.plan if self._dsp.latest is not None else None

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(prepared.plan for prepared in self._dsp.kept.values())

    @property
    def program(self) -> fx.GraphModule | None:
        """This rank's program of the latest call: an `fx.GraphModule` whose nodes carry module paths and local shapes."""
        return self._dsp.latest.module if self._dsp.latest is not None else None

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for these arguments without running them."""
        prepared, _, finish = self._find(args, kwargs)
        finish()
        return prepared.plan

    def replan(self) -> None:
        """Forget all plans: the next call captures the model as it is then. To be called on every rank."""
        self._dsp.kept.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        prepared, leaves, finish = self._find(args, kwargs)
        inputs = iter(leaves)
        program = prepared.program
        # The ranks' agreement is on its way while they compute, and must be there before they communicate.
        agreed = before_first_collective(finish)
        try:
            if any(isinstance(source, _Held) and source.whole for source in prepared.sources):
                agreed()
            values = [
                next(inputs) if source is None else source.value if isinstance(source, _Held) else source
                for source in prepared.sources
            ]
            if prepared.draws:
                agreed()
                self._check_random()
            if program.mutated:
                agreed()
                results = self._run_and_write_back(prepared, values)
            else:
                results = prepared.run(*values)
        finally:
            agreed()
        return pytree.tree_unflatten(list(results[len(program.mutated) :]), program.out_spec)

    def _run_and_write_back(self, prepared: _Prepared, values: list[Any]) -> tuple:
        """Runs on copies of what the model changes, because autograd may have saved it, and then changes it."""
        positions = {(entry.kind, entry.name): n for n, entry in enumerate(prepared.program.inputs)}
        changed = [positions[kind, name] for kind, name in prepared.program.mutated]
        copies = {n: values[n].clone() for n in changed}
        results = prepared.run(*(copies.get(n, value) for n, value in enumerate(values)))
        with torch.no_grad():
            for n, result in zip(changed, results):
                values[n].copy_(result)
        return results

    def _find(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Prepared, list[Any], Callable[[], None]]:
        """The program for these arguments, made if need be; the arguments in its order; and what finishes the check that
        all ranks were called alike, to be called before anything is communicated."""
        state = self._dsp
        kwargs = dict(sorted(kwargs.items()))
        shapes = self._global_shapes(args, kwargs) if state.options.in_layouts else {}
        key = self._signature(args, kwargs, shapes)
        prepared = state.kept.get(key)
        finish = state.agreement.begin_check(
            "new " + as_text(key[0]) if prepared is None else prepared.signature,
            lambda: describe(args, kwargs, self.training),
            asked="the ranks were called with different arguments",
            remedy="every rank must pass the same inputs (same shapes, dtypes, modes and non-tensor arguments)",
        )
        if prepared is None:
            finish()
            finish = _nothing
            prepared = self._prepare(args, kwargs, shapes)
            key = self._signature(args, kwargs, shapes)  # which changes where the plan holds parameters in parts
            state.kept[key] = prepared
            if len(state.kept) > state.max_signatures:
                state.kept.popitem(last=False)
        state.kept.move_to_end(key)
        state.latest = prepared
        return prepared, pytree.tree_leaves((args, ordered_kwargs(kwargs, prepared.program.in_spec))), finish

    def _signature(self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> tuple:
        """What is equal on every rank, how parameters are held included, and which objects the model is made of."""
        state = self._dsp
        read, identity = signature(state.model, args, kwargs, shapes)
        held = how_held(identity)
        if not state.in_parts and any(placements is not None for placements in held):
            # Another parallel module of the same model holds its parameters in parts by now.
            state.in_parts = bool(placements_in(state.model, state.mesh))
        return (*read, held if state.in_parts else ()), identity

    def _prepare(self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> _Prepared:
        state, agreement = self._dsp, self._dsp.agreement
        digests = [plan.digest[:12] for plan in state.given]
        agreement.check(
            " ".join(digests),
            lambda: f"plan {', '.join(digests)}" if digests else "no plan",
            asked="the ranks were given different plans",
            remedy="load one file on every rank",
        )
        options = self._options()
        ready, whole, given = agreement.together(lambda: self._ready(args, kwargs, shapes, options))
        if given is None:
            with step(f"solving for {as_mesh(state.mesh)}"):
                solution = agreement.from_first(lambda: decide(ready))
        else:
            solution = agreement.together(lambda: restore(ready, given))
        groups = group_names(state.mesh, ready.problem(solution.space).graph.mesh)
        plan, graph = agreement.together(lambda: finish(ready, solution, place_in(state.mesh), groups))
        if given is not None:
            agreement.together(lambda: check_same(given, plan))
        module = local_module(graph, ready.program.module)
        agreement.check(
            plan.digest + str(ready.program.graph),
            lambda: f"torch {torch.__version__}, plan {plan.digest[:12]}, {len(ready.program.graph.nodes)} nodes",
            asked="the ranks do not hold the same model or plan",
            remedy="run the same code and versions on every rank",
        )
        problem = ready.problem(solution.space)
        parts = parts_of_plan(ready.program, problem.graph, lambda value: problem.made(value, solution.choice))
        if parts and not state.in_parts:
            hold(state.model, state.mesh, parts)
            state.in_parts = True
            state.kept.clear()  # their programs take whole parameters
        log_plan(plan)
        text = as_text(self._signature(args, kwargs, shapes)[0])
        sources = self._sources(ready.program, whole)
        return _Prepared(text, plan, module, module.forward, sources, ready.program, draws(ready.factors))

    def _ready(
        self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]], options: Options
    ) -> tuple[Prepared, frozenset[str], Plan | None]:
        """What is to be decided; the names of the parameters held in parts that the program must be given whole; and of the
        plans that were given the one for this call."""
        state, mesh = self._dsp, as_mesh(self._dsp.mesh)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        call = _whole_arguments(mode, args, kwargs, shapes) if shapes or state.in_parts else (args, kwargs)
        parameters = fake_whole_parameters(state.model, mode) if state.in_parts else nullcontext()
        with step(f"capture of {type(state.model).__name__}"), parameters:
            program = capture(state.model, *call)
        given = find_fitting(state.given, program, mesh) if state.given else None
        ready = prepare(program, mesh, Options.of_plan(given) if given is not None else options)
        if not state.in_parts:
            return ready, frozenset(), given
        held, whole = held_layouts(program, ready.factors, mesh, placements_in(state.model, state.mesh))
        return replace(ready, held=held), whole, given

    def _options(self) -> Options:
        """The options, with what is free now on the rank that has least for the capacity "free"."""
        state, agreement = self._dsp, self._dsp.agreement
        capacity = state.options.capacity
        if capacity is None or capacity.asked != "free":  # a plan that was given has bytes
            return state.options
        device = state.mesh.device_type
        tensors = [*state.model.parameters(), *state.model.buffers()]
        own = {id(x): x for x in (*tensors, *(x.grad for x in tensors if x.grad is not None)) if x.device.type == device}
        held = sum(local_value(x).nbytes for x in own.values())
        free = agreement.together(
            lambda: find_capacity("free", capacity.reserve, device, held=held, sharing=state.mesh.size()).bytes
        )
        return replace(state.options, capacity=replace(capacity, bytes=min(agreement.gather(free))))

    def _check_random(self) -> None:
        """What all ranks hold they must draw alike, and the seeds of what they share too."""
        states = [torch.get_rng_state()]
        if self._dsp.mesh.device_type != "cpu":
            states.append(torch.get_device_module(self._dsp.mesh.device_type).get_rng_state())
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()
        self._dsp.agreement.check(
            digest,
            lambda: f"state {digest[:8]}",
            asked="the model draws random numbers, and the ranks' random states differ",
            remedy="call torch.manual_seed with one seed on every rank",
        )

    def _sources(self, program: Program, whole: Collection[str]) -> list[Any]:
        found: list[Any] = []
        for entry in program.inputs:
            if entry.kind == "input":
                found.append(None)
            elif entry.kind == "constant":
                found.append(entry.value)
            else:
                path, _, name = entry.name.rpartition(".")
                owner = self._dsp.model.get_submodule(path)
                values = owner._parameters if entry.kind == "parameter" else owner._buffers
                found.append(_Held(values, name, entry.kind == "parameter" and entry.name in whole))
        return found

    def _global_shapes(self, args: tuple, kwargs: dict[str, Any]) -> dict[int, tuple[int, ...]]:
        """Whole shapes, by id of the tensor, of the inputs named in `in_layouts`: from every rank's part."""
        state = self._dsp
        mesh = as_mesh(state.mesh)
        named = named_inputs(state.model, args, kwargs)
        wanted = state.options.in_layouts
        told = state.agreement.gather({name: tuple(named[name].shape) for name in wanted if name in named})
        found = {}
        for name, spec in wanted.items():
            parts = [shapes.get(name) for shapes in told]
            if None in parts:
                raise LayoutError(
                    asked=f"in_layouts names the input {name!r}",
                    found=f"the tensor arguments of the call are {', '.join(named) or 'none'} (rank {parts.index(None)} "
                    "passed no such tensor)",
                    remedy="use one of these names",
                )
            found[id(named[name])] = whole_shape(name, spec, parts, mesh, state.agreement.rank)
        return found


def _given_plans(plan: Plan | str | PathLike | Sequence[Any], mesh: Mesh) -> tuple[Options, tuple[Plan, ...]]:
    """Plans that a user gave, and what all of them were made with as far as it matters before a call."""
    listed = list(plan) if isinstance(plan, (list, tuple)) else [plan]
    plans = tuple(own if isinstance(own, Plan) else Plan.load(own) for own in listed)
    if not plans:
        raise PlanError(asked="parallelize with a plan", found="an empty list", remedy="give a plan, or leave it out")
    for own in plans:
        check_mesh(own, mesh)
    options = [Options.of_plan(own) for own in plans]
    if any(own.in_layouts != options[0].in_layouts for own in options):
        raise PlanError(
            asked="parallelize with several plans",
            found="they were made with other in_layouts",
            remedy="make them with the same ones: inputs must arrive alike in every call",
        )
    return options[0], plans


def _nothing() -> None:
    pass


def draws(factors: Factors) -> bool:
    """Whether the program draws random numbers, as far as its rules know; an op without a rule may."""
    seeded = torch.Tag.nondeterministic_seeded
    return any(
        op.rule.is_random
        if op.rule
        else seeded in getattr(op.node.target, "tags", ()) or "random" in why_none(node_call(op.node))
        for op in factors.ops
    )


def _whole_arguments(
    mode: FakeTensorMode, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]
) -> tuple[tuple, dict]:
    """Fake arguments of the whole shapes, to capture with."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            made = torch.empty(shapes.get(id(tensor), tensor.shape), dtype=tensor.dtype, device=tensor.device)
        return made.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))
