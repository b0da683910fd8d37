"""`parallelize`: an unmodified module becomes one that runs on every rank of a mesh."""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from os import PathLike
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from . import fsdp
from .agreement import Agreement
from .capacity import find_capacity
from .collectives import before_first_collective
from .compiled import Compiled, Programs
from .cost_models.hardware import DEFAULT, DEFAULT_ON_CPU
from .cost_models.state import TrainingState
from .decision import check_mesh, check_same, find_fitting, restore
from .errors import DspError, LayoutError, MeshError, PlanError, StrategyError
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
from .passes.capture import Program, capture, check_not_zero_3, ordered_kwargs, positions_of
from .passes.checkpointing import local_module
from .passes.factors import Factors
from .passes.hooks import Hooks, traced
from .passes.nodes import node_call
from .passes.rules import why_none
from .passes.segments import Home, cut
from .passes.stages import MAY_STAY_WHOLE
from .pipelined import called_by_stage, called_for_metadata
from .plan import Plan
from .planner import LayoutSpec, Options, Prepared, decide, finish, prepare
from .progress import log_plan, step
from .randomness import on_shard
from .signature import Signature, as_text, describe, named_inputs, signature, tensor_paths, whole_shape
from .units import counted
from .values import sample

# The same containers, not copies: what is loaded, moved or replaced in a parallel module is so in its model.
_SHARED = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


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
    overlap: bool = True,
    constraints: Mapping[str, Mapping[str, str | None]] | None = None,
    keep_whole: Sequence[str] | None = None,
    plan: Plan | str | PathLike | Sequence[Plan | str | PathLike] | None = None,
    max_signatures: int = 16,
) -> ParallelModule:
    """`model` on every rank of `mesh`: same arguments, same results, same gradients, 1/N of the activations.

    Planned at the first call, once per signature (shapes, dtypes, training and grad mode, non-tensor arguments), or at once
    with `args` and `kwargs`. Every rank passes the same full inputs and gets the same full outputs, and after `backward()`
    holds the gradients one device would, unless `in_layouts` and `out_layouts` say otherwise. The first call of a signature
    checks that the values of inputs are the same. The module shares the model's parameters, buffers and submodules, and so its
    `state_dict` keys.

    Where the plan holds parameters in parts (see `shard_parameters`), all parameters of the model become DTensors over `mesh`
    once it is made, and so do their gradients: of whole shape, with this rank's part in memory. So they stay, for plans of
    other signatures too. Optimizers made before go on with them; a list of the old parameters kept elsewhere does not.
    `state_dict`, then to be called on all ranks, has DTensors whose parts are ranges of a dim, for
    `torch.distributed.checkpoint`; `load_state_dict` takes whole tensors or DTensors. Buffers stay whole.

    `fully_shard` (FSDP2) may be applied to modules of the model before or after, and to the parallel module or the model last,
    over a mesh of the data-parallel ranks or of these and `mesh` together: gradients are those of the loss's mean over the
    data-parallel ranks. No plan then holds parameters in parts. So with DistributedDataParallel over the data-parallel ranks,
    around the parallel module or as the model.

    Forward and forward-pre hooks of the model's modules that return None, and hooks on its gradients, run at every call, on the
    tensors that enter and leave the ops of their module on this rank (a module that leaves no op is not called), and once on
    tensors without data when they are first met. Other hooks are part of the plan.

    `torch.compile` takes the parallel module with `fullgraph=True`, unless hooks run in it: it plans while it compiles a
    signature, and what it compiled runs without the checks that all ranks were called alike. Numbers among the arguments that
    change between calls want `dynamic=False`; after `replan()` comes `torch.compiler.reset()`.

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
        overlap=overlap,
        constraints=constraints,
        keep_whole=keep_whole,
    )
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(
            asked=f"parallelize over {mesh!r}",
            found=f"a {type(mesh).__name__}",
            remedy="pass a DeviceMesh (init_device_mesh, or DeviceMesh.from_group of a group and the kind of its devices)",
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
    graph: fx.Graph
    module: fx.GraphModule
    sources: list[_Held | torch.Tensor | None]  # None: the next user input
    program: Program
    draws: bool  # random numbers
    compared: bool  # in a call: the values that the ranks were given
    cut: _Cut


class _Cut(NamedTuple):
    """The program as it runs: through the modules whose hooks run."""

    entered: tuple  # as in `Signature`
    run: Callable[..., tuple]
    sources: list[_Held | torch.Tensor | None]  # what `run` takes
    positions: dict[tuple[str, str], int]  # by kind and name, where in `sources` an input of the program is


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
    hooks: Hooks = Hooks()
    in_parts: bool = False  # the model's parameters are DTensors over `mesh`
    compared: set[str] = field(default_factory=set)  # the parameters and buffers whose values the ranks have compared


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
        managed = fsdp.managed(m for m in model.modules() if isinstance(m, FSDPModule))
        in_parts = bool(placements_in(model, mesh, managed))
        self.__dict__["_dsp"] = _State(model, mesh, options, max_signatures, Agreement(mesh), given, in_parts=in_parts)

        def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.__dict__["_compiled"] = Programs()
        # A method, because what wraps a module's forward may take it for one.
        taken = inspect.signature(model.forward)
        bound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        made = taken.replace(parameters=[bound, *taken.parameters.values()])
        forward.__signature__ = made  # type: ignore[attr-defined]  # what `inspect` looks for
        self.__dict__["forward"] = MethodType(forward, self)

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
        """The plans of all kept signatures, the least recently used first."""
        return tuple(prepared.plan for prepared in self._dsp.kept.values())

    @property
    def program(self) -> fx.GraphModule | None:
        """This rank's program of the latest call: an `fx.GraphModule` whose nodes carry module paths and local shapes."""
        return self._dsp.latest.module if self._dsp.latest is not None else None

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for these arguments without running them. Raises what `parallelize` raises."""
        prepared, _, finish = self._find(args, kwargs)
        finish()
        return prepared.plan

    def replan(self) -> None:
        """Forget all plans: the next call captures the model as it is then. To be called on every rank."""
        self._dsp.kept.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            leaves = pytree.tree_leaves((args, kwargs))
            numbers = iter(range(len(leaves)))
            call = pytree.tree_map(lambda leaf: next(numbers), (args, kwargs))
            return getattr(self._compiled, self._compile(call, *leaves))(*leaves)
        model = self._dsp.model
        if not isinstance(model, DistributedDataParallel):
            return self._run(args, kwargs)
        # What it does before and after its module's forward, but with the program for that module.
        module = model.module

        def run(*args: Any, **kwargs: Any) -> Any:
            model.module = module
            return self._run(args, kwargs)

        model.module = _StandIn(module, run)
        try:
            return model(*args, **kwargs)
        finally:
            model.module = module

    @torch.compiler.assume_constant_result
    def _compile(self, call: tuple[tuple, dict[str, Any]], *leaves: Any) -> str:
        """The name in `_compiled` of the program for a call, of which `call` has the structure, with numbers for its leaves.

        Runs while Dynamo compiles, and not when what it compiled runs.
        """
        state = self._dsp
        leaves = tuple(_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        args, kwargs = pytree.tree_map(lambda n: leaves[n], call)
        prepared, _, finish = self._find(args, kwargs)
        finish()
        asked = "cannot compile a parallel module with torch.compile"
        if prepared.cut.entered:
            found = "modules in it have hooks that run at every call, or are sharded by fully_shard"
            raise DspError(asked=asked, found=found, remedy="compile it without them")
        if isinstance(state.model, DistributedDataParallel):
            found, remedy = "it holds a DistributedDataParallel", "wrap the compiled parallel module in one"
            raise DspError(asked=asked, found=found, remedy=remedy)
        if any(node.target is on_shard for node in prepared.graph.nodes):
            found = "ranks draw random numbers of their own for shards"
            raise DspError(asked=asked, found=found, remedy="parallelize with rng='serial'")
        name = f"program_{len(vars(self._compiled))}"
        made = Compiled(state.model, prepared.program, prepared.module, prepared.sources, call, leaves)
        setattr(self._compiled, name, made)
        return name

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        prepared, leaves, finish = self._find(args, kwargs, run=True)
        inputs = iter(leaves)
        program = prepared.program
        # The ranks' agreement is on its way while they compute, and must be there before they communicate.
        agreed = before_first_collective(finish)
        try:
            if any(isinstance(source, _Held) and source.whole for source in prepared.sources):
                agreed()
            values = [
                next(inputs) if source is None else source.value if isinstance(source, _Held) else source
                for source in prepared.cut.sources
            ]
            if prepared.draws:
                agreed()
                self._check_random()
            if program.mutated:
                agreed()
                results = self._run_and_write_back(prepared, values)
            else:
                results = prepared.cut.run(*values)
        finally:
            agreed()
        return pytree.tree_unflatten(list(results[len(program.mutated) :]), program.out_spec)

    def _run_and_write_back(self, prepared: _Prepared, values: list[Any]) -> tuple:
        """Runs on copies of what the model changes, because autograd may have saved it, and then changes it."""
        changed = [prepared.cut.positions[mutated] for mutated in prepared.program.mutated]
        copies = {n: values[n].clone() for n in changed}
        results = prepared.cut.run(*(copies.get(n, value) for n, value in enumerate(values)))
        with torch.no_grad():
            for n, result in zip(changed, results):
                values[n].copy_(result)
        return results

    def _find(
        self, args: tuple, kwargs: dict[str, Any], run: bool = False
    ) -> tuple[_Prepared, list[Any], Callable[[], None]]:
        """The program for these arguments, made if need be; the arguments in its order; and what finishes the check that
        all ranks were called alike, to be called before anything is communicated. run: it is to be run, so that the values of
        the arguments are checked too where they are the first of this signature."""
        state = self._dsp
        kwargs = dict(sorted(kwargs.items()))
        shapes = self._global_shapes(args, kwargs) if state.options.in_layouts else {}
        called = self._signature(args, kwargs, shapes)
        prepared = state.kept.get(called.key)
        if prepared is None and called.hooked and self._knows_more_hooks(args, kwargs, shapes, called):
            called = self._signature(args, kwargs, shapes)
            prepared = state.kept.get(called.key)
        text = "new " + as_text(called.read) if prepared is None else prepared.signature
        compare = run and not (prepared is not None and prepared.compared) and not called_for_metadata()
        if compare:
            text = "first " + text
        finish = state.agreement.begin_check(
            text + str([(n, len(hooks), gradients) for n, hooks, gradients in called.entered]) if called.entered else text,
            lambda: describe(args, kwargs, self.training)
            + (f", {counted(len(called.entered), 'module')} whose hooks run" if called.entered else ""),
            asked="the ranks were called with different arguments",
            remedy="every rank must pass the same inputs (same shapes, dtypes, modes, hooks and non-tensor arguments)",
        )
        if prepared is None or compare:
            finish()
            finish = _nothing
        if compare:
            self._check_values(args, kwargs, shapes)
        if prepared is None:
            prepared = self._prepare(args, kwargs, shapes, called)
            called = self._signature(args, kwargs, shapes)  # which changes where the plan holds parameters in parts
            state.kept[called.key] = prepared
            if len(state.kept) > state.max_signatures:
                state.kept.popitem(last=False)
        if compare:
            self._check_parameters(prepared.program)
        prepared.compared |= compare
        if called.entered != prepared.cut.entered:
            prepared.cut = self._cut(prepared, called)
        state.kept.move_to_end(called.key)
        state.latest = prepared
        return prepared, pytree.tree_leaves((args, ordered_kwargs(kwargs, prepared.program.in_spec))), finish

    def _signature(self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> Signature:
        """The signature, of which how parameters are held is a part where some are held in parts, and who calls."""
        state = self._dsp
        called = signature(state.model, args, kwargs, shapes, state.hooks, self)
        held = how_held(called.identity, called.managed)
        if not state.in_parts and any(placements is not None for placements in held):
            # Another parallel module of the same model holds its parameters in parts by now.
            state.in_parts = bool(placements_in(state.model, state.mesh, called.managed))
        return called._replace(read=(*called.read, held if state.in_parts else (), called_by_stage()))

    def _knows_more_hooks(
        self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]], called: Signature
    ) -> bool:
        """Whether some of the hooks that the plan would depend on are now known not to matter to it."""
        state = self._dsp
        with self._to_capture(args, kwargs, shapes, called) as call, traced(state.model, *call) as hooks:
            new = hooks.untraced - state.hooks.untraced
        state.hooks = Hooks(state.hooks.running | hooks.running, state.hooks.untraced | hooks.untraced)
        return bool(new)

    def _prepare(
        self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]], called: Signature
    ) -> _Prepared:
        state, agreement = self._dsp, self._dsp.agreement
        digests = [plan.digest[:12] for plan in state.given]
        agreement.check(
            " ".join(digests),
            lambda: f"plan {', '.join(digests)}" if digests else "no plan",
            asked="the ranks were given different plans",
            remedy="load one file on every rank",
        )
        options = self._options()
        self._check_options(options)
        ready, whole, given = agreement.together(lambda: self._ready(args, kwargs, shapes, called, options))
        if given is None:
            with step(f"solving for {as_mesh(state.mesh)}"):
                solution = agreement.from_first(lambda: decide(ready))
        else:
            solution = agreement.together(lambda: restore(ready, given))
        usual = DEFAULT_ON_CPU if state.mesh.device_type == "cpu" else DEFAULT
        groups = agreement.together(lambda: group_names(state.mesh, ready.problem(solution.space).graph.mesh))
        plan, graph = agreement.together(lambda: finish(ready, solution, place_in(state.mesh), groups, usual))
        if given is not None:
            agreement.together(lambda: check_same(given, plan))
        module = local_module(graph, ready.program.module)
        agreement.check(
            plan.digest + str(ready.program.graph),
            lambda: f"plan {plan.digest[:12]}, {counted(len(ready.program.graph.nodes), 'node')}",
            asked="the ranks do not hold the same model or plan",
            remedy="run the same code on every rank",
        )
        problem = ready.problem(solution.space)
        parts = parts_of_plan(ready.program, problem.graph, lambda value: problem.made(value, solution.choice))
        if parts and not state.in_parts:
            self._check_parameters(ready.program)
            hold(state.model, state.mesh, parts)
            state.in_parts = True
            state.kept.clear()  # their programs take whole parameters
            gc.collect()  # the whole ones are held by what is left of the capture, in cycles
        log_plan(plan)
        text = as_text(self._signature(args, kwargs, shapes).read)
        sources = self._sources(ready.program, whole)
        positions = positions_of(ready.program.inputs)
        flat = _Cut((), module.forward, sources, positions)
        return _Prepared(text, plan, graph, module, sources, ready.program, draws(ready.factors), False, flat)

    def _cut(self, prepared: _Prepared, called: Signature) -> _Cut:
        """The program, to run through the modules that have hooks now."""
        state, program = self._dsp, prepared.program
        if not called.entered:
            positions = positions_of(program.inputs)
            return _Cut((), prepared.module.forward, prepared.sources, positions)
        paths: dict[int, list[str]] = defaultdict(list)
        for path, module in state.model.named_modules(remove_duplicate=False):
            paths[id(module)].append(path)
        modules = [called.identity[n] for n, _, _ in called.entered]
        entered = {path: module for module in modules for path in paths[id(module)]}
        sharding = {path for path, module in entered.items() if isinstance(module, FSDPModule)}
        homes = {}
        nodes = [node for node in prepared.graph.nodes if node.op == "placeholder"]
        for node, entry in zip(nodes, program.inputs, strict=True):
            owner, _, name = entry.name.rpartition(".")
            one = called.managed.get((id(state.model.get_submodule(owner)), name)) if entry.kind == "parameter" else None
            if one is None:
                continue
            within = [_innermost(path, sharding) for owner, _ in one.owners for path in paths[id(owner)]]
            if None not in within:
                homes[node.name] = Home(entry.name, frozenset(path for path in within if path is not None))
        module, taken = cut(
            prepared.graph, program.module, prepared.sources, entered, homes, state.hooks.running
        )
        inputs = [program.inputs[n] for n in taken]
        positions = positions_of(inputs)
        return _Cut(called.entered, module.forward, [prepared.sources[n] for n in taken], positions)

    def _ready(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        shapes: Mapping[int, tuple[int, ...]],
        called: Signature,
        options: Options,
    ) -> tuple[Prepared, frozenset[str], Plan | None]:
        """What is to be decided; the names of the parameters held in parts that the program must be given whole; and of the
        plans that were given the one for this call."""
        state, mesh = self._dsp, as_mesh(self._dsp.mesh)
        self._check_device(args, kwargs)
        with step(f"capture of {type(state.model).__name__}"), self._to_capture(args, kwargs, shapes, called) as call:
            program = capture(state.model, *call, state.hooks)
        given = find_fitting(state.given, program, mesh) if state.given else None
        if given is not None:
            options = Options.of_plan(given)
        if called.managed:
            options = _without_parts(options, called, given)
        ready = prepare(program, mesh, options)
        if not state.in_parts:
            return ready, frozenset(), given
        placements = placements_in(state.model, state.mesh, called.managed)
        held, whole = held_layouts(program, ready.factors, mesh, placements)
        return replace(ready, held=held), whole, given

    @contextmanager
    def _to_capture(
        self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]], called: Signature
    ) -> Iterator[tuple[tuple, dict]]:
        """Inside, the model can be captured with the arguments that this gives."""
        state = self._dsp
        check_not_zero_3(state.model)  # before hooks run
        if not (shapes or state.in_parts or called.managed):
            yield args, kwargs
            return
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        call = _whole_arguments(mode, args, kwargs, shapes)
        with fake_whole_parameters(state.model, mode, called.managed):
            yield call

    def _check_device(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """That something of the model is on the devices of the mesh: their collectives take nothing else."""
        state = self._dsp
        leaves = (*state.model.parameters(), *state.model.buffers(), *pytree.tree_leaves((args, kwargs)))
        kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta}
        own = state.mesh.device_type
        if kinds and own not in kinds:
            raise MeshError(
                asked=f"parallelize over a mesh of {own} devices",
                found=f"the model and its arguments are on {' and '.join(sorted(kinds))}",
                remedy=f'move both, as with model.to("{own}"), or make the mesh of the devices that they are on',
            )

    def _options(self) -> Options:
        """The options, with what is free now on the rank that has least for the capacity "free"."""
        state, agreement = self._dsp, self._dsp.agreement
        capacity = state.options.capacity
        if capacity is None or capacity.asked != "free":  # a plan that was given has bytes
            return state.options
        device = state.mesh.device_type
        tensors = [*state.model.parameters(), *state.model.buffers()]
        own = {id(x): x for x in (*tensors, *(x.grad for x in tensors if x.grad is not None)) if x.device.type == device}
        held = sum(local_value(x, whole=False).nbytes for x in own.values())
        free = agreement.together(
            lambda: find_capacity("free", capacity.reserve, device, held=held, sharing=state.mesh.size()).bytes
        )
        return replace(state.options, capacity=replace(capacity, bytes=min(agreement.gather(free))))

    def _check_options(self, options: Options) -> None:
        """Every rank plans in the same way, before one sends the others anything that they must understand."""
        versions = f"torch {torch.__version__}, dsp_auto {version('dsp_auto')}"
        given, usual = options.to_dict(), Options().to_dict()
        self._dsp.agreement.check(
            versions + json.dumps(given, sort_keys=True, default=str),
            lambda: ", ".join((versions, *(f"{name}={given[name]!r}" for name in given if given[name] != usual[name]))),
            asked="the ranks do not have the same versions and options",
            remedy="run the same code, versions and options on every rank",
        )

    def _check_values(self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> None:
        """Ranks that should hold the same of an argument do: what each computes is a part of the result for all."""
        state, mesh = self._dsp, as_mesh(self._dsp.mesh)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        cut = {id(value): name for name, value in named_inputs(state.model, args, kwargs).items() if id(value) in shapes}

        def parts(tensor: torch.Tensor) -> list[tuple[int, ...]]:
            layout = state.options.in_layouts[cut[id(tensor)]] if id(tensor) in cut else {}
            over = [mesh.names.index(name) for name, dim in layout.items() if dim is not None]
            coordinates = [mesh.coordinate(rank) for rank in range(state.agreement.size)]
            return [tuple(own[m] for m in over) for own in coordinates]

        state.agreement.check_values(
            tensors,
            [parts(tensor) for tensor in tensors],
            lambda: tensor_paths(args, kwargs),
            asked="the ranks were given different values",
            remedy="give every rank of the mesh the same batch. Ranks that are to take batches of their own are a mesh dim "
            'that is not given to parallelize: parallelize(model, mesh["sp"]) and DistributedSampler(data, '
            'num_replicas=mesh["dp"].size(), rank=mesh["dp"].get_local_rank())',
        )

    def _check_parameters(self, program: Program) -> None:
        """Ranks hold the same parameters and buffers, as far as a sample of each tells. What is a DTensor is not looked at."""
        state = self._dsp
        entries = [entry for entry in program.inputs if entry.kind in ("parameter", "buffer")]
        names = [entry.name for entry in entries if entry.name not in state.compared]
        held = [source.values[source.name] for source in self._sources(program, ()) if isinstance(source, _Held)]
        new = [tensor for entry, tensor in zip(entries, held, strict=True) if entry.name not in state.compared]
        state.agreement.check_values(
            [sample(tensor) for tensor in new],
            [[()] * state.agreement.size] * len(new),
            lambda: names,
            asked="the ranks hold different parameters or buffers",
            remedy="make the model alike on every rank: torch.manual_seed with one seed before it is built, or one checkpoint",
        )
        state.compared.update(names)

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
    listed: list[Any] = list(plan) if isinstance(plan, (list, tuple)) else [plan]
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


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which a compiler that took `tensor` for one of any shape knows nothing."""
    shape, stride = (tuple(map(int, own)) for own in (tensor.shape, tensor.stride()))
    made = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)


class _StandIn(nn.Module):
    """A function for the forward of a module, whose tensors it has."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        for shared in _SHARED:
            self.__dict__[shared] = module.__dict__[shared]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _nothing() -> None:
    pass


def _innermost(path: str, of: Collection[str]) -> str | None:
    """The longest of some paths of modules that a path starts with."""
    while path not in of:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _without_parts(options: Options, called: Signature, given: Plan | None) -> Options:
    """The options for a model whose parameters FSDP shards: no plan cuts them once more."""
    found = None
    if options.shard_parameters:
        found = "shard_parameters=True"
    elif any(one.in_parts for one in called.managed.values()):
        found = "DTensors that were given to fully_shard"
    elif given is not None and given.parameters["in_parts"]:
        found = "a plan that holds parameters in parts"
    if found is not None:
        raise StrategyError(
            asked="cannot hold parameters in parts that fully_shard shards",
            found=found,
            remedy="use one of them: fully_shard, or a strategy that holds parameters in parts",
        )
    return options if given is not None else replace(options, shard_parameters=False)


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
