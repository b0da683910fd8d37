"""`parallelize`: an unmodified module becomes one that runs on every rank of a mesh."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .agreement import Agreement
from .errors import AgreementError, LayoutError, MeshError
from .mesh import as_mesh
from .passes.capture import Program, capture, ordered_kwargs
from .plan import Plan
from .planner import LayoutSpec, Options, Prepared, decide, finish, prepare
from .shards import shard_sizes


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    args: tuple | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    objective: str = "volume",
    capacity: int | str | None = None,
    strategy: str = "auto",
    hardware: Any = None,
    dim_names: Mapping[str, str] | None = None,
    in_layouts: Mapping[str, LayoutSpec] | None = None,
    out_layouts: LayoutSpec | Sequence[LayoutSpec | None] | None = None,
    time_limit: float = 60.0,
    max_signatures: int = 16,
) -> ParallelModule:
    """`model` on every rank of `mesh`: same arguments, same results, same gradients, 1/N of the activations.

    Planned at the first call, once per signature (shapes, dtypes, training and grad mode, non-tensor arguments), or at once
    with `args` and `kwargs`. Every rank passes the same full inputs and gets the same full outputs, and after `backward()`
    holds the gradients one device would, unless `in_layouts` and `out_layouts` say otherwise. The module shares the
    model's parameters, buffers and submodules, and so its `state_dict` keys.

    Options as in `dsp_auto.plan`; max_signatures: how many plans are kept, the least recently used goes first.

    Raises what `plan` raises, and AgreementError where ranks differ in inputs, model or plan.
    """
    options = Options.of(
        capacity,
        hardware,
        objective=objective,
        strategy=strategy,
        dim_names=dim_names,
        in_layouts=in_layouts,
        out_layouts=out_layouts,
        time_limit=time_limit,
    )
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(
            asked=f"parallelize over {mesh!r}",
            found=f"a {type(mesh).__name__}",
            remedy="pass a DeviceMesh (init_device_mesh)",
        )
    parallel = ParallelModule(model, mesh, options, max_signatures)
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
    sources: list[tuple[dict[str, Any], str] | torch.Tensor | None]  # None: the next user input
    program: Program


class ParallelModule(nn.Module):
    """What `parallelize` returns. `plan` is the plan of the latest call, `plans` those of all kept signatures."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, options: Options, max_signatures: int = 16) -> None:
        super().__init__()
        # The same containers, not copies: what is loaded, moved or replaced in one is so in the other.
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = model.__dict__[shared]
        for shared in (
            "_state_dict_hooks",
            "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks",
            "_load_state_dict_post_hooks",
        ):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["_model"] = model  # not a submodule: it would double every key
        self.training = model.training
        self.mesh, self.options, self.max_signatures = mesh, options, max_signatures
        self._abstract = as_mesh(mesh)
        self._agreement = Agreement(mesh)
        self._kept: OrderedDict[tuple, _Prepared] = OrderedDict()
        self._latest: _Prepared | None = None

        @functools.wraps(model.forward)  # the model's signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.__dict__["forward"] = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def train(self, mode: bool = True) -> ParallelModule:
        self._model.train(mode)
        self.training = mode
        return self

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest call; None before the first."""
        return self._latest.plan if self._latest is not None else None

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(prepared.plan for prepared in self._kept.values())

    @property
    def program(self) -> fx.GraphModule | None:
        """This rank's program of the latest call: an `fx.GraphModule` whose nodes carry module paths and local shapes."""
        return self._latest.module if self._latest is not None else None

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for these arguments without running them."""
        return self._find(args, kwargs)[0].plan

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        prepared, leaves = self._find(args, kwargs)
        inputs = iter(leaves)
        values = [
            next(inputs) if source is None else source if isinstance(source, torch.Tensor) else source[0][source[1]]
            for source in prepared.sources
        ]
        program = prepared.program
        if program.mutated:
            results = self._run_and_write_back(prepared, values)
        else:
            results = prepared.run(*values)
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

    def _find(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Prepared, list[Any]]:
        """The program for these arguments, made if need be, and the arguments in its order."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        shapes = self._global_shapes(args, kwargs) if self.options.in_layouts else {}
        state, identity = _state_key(self._model)
        signature = (spec, *(_leaf_key(leaf, shapes) for leaf in leaves), *state)
        key = (signature, identity)
        prepared = self._kept.get(key)
        self._agreement.check(
            f"new {signature!r}" if prepared is None else prepared.signature,
            lambda: _describe(args, kwargs, self.training),
            asked="the ranks were called with different arguments",
            remedy="every rank must pass the same inputs (same shapes, dtypes, modes and non-tensor arguments)",
        )
        if prepared is None:
            prepared = self._prepare(args, kwargs, shapes, repr(signature))
            self._kept[key] = prepared
            if len(self._kept) > self.max_signatures:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        self._latest = prepared
        ordered = ordered_kwargs(kwargs, prepared.program.in_spec)
        return prepared, pytree.tree_leaves((args, ordered)) if kwargs else leaves

    def _prepare(
        self, args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]], signature: str
    ) -> _Prepared:
        agreement = self._agreement
        call = _whole_arguments(args, kwargs, shapes) if shapes else (args, kwargs)

        def own() -> Prepared:
            return prepare(capture(self._model, *call), self._abstract, self.options)

        ready: Prepared = agreement.together(own)
        self._check_random(ready)
        solution = agreement.from_first(lambda: decide(ready))
        coordinate = tuple(self.mesh.get_coordinate() or (0,) * self.mesh.ndim)
        groups = (
            [self.mesh.get_group(m).group_name for m in range(self.mesh.ndim)] if dist.is_initialized() else ["", ""]
        )
        plan, graph = agreement.together(lambda: finish(ready, solution, coordinate, groups))
        module = fx.GraphModule(ready.program.module, graph)
        agreement.check(
            plan.digest + str(ready.program.graph),
            lambda: f"torch {torch.__version__}, plan {plan.digest[:12]}, {len(ready.program.graph.nodes)} nodes",
            asked="the ranks do not hold the same model or plan",
            remedy="run the same code and versions on every rank",
        )
        return _Prepared(signature, plan, module, module.forward, self._sources(ready.program), ready.program)

    def _check_random(self, ready: Prepared) -> None:
        """Random ops run replicated, so the ranks must draw the same numbers."""
        seeded = torch.Tag.nondeterministic_seeded
        ops = ready.problem.graph.factors.ops
        if not any(op.rule.is_random if op.rule else seeded in getattr(op.node.target, "tags", ()) for op in ops):
            return
        states = [torch.get_rng_state()]
        if self.mesh.device_type != "cpu":
            states.append(torch.get_device_module(self.mesh.device_type).get_rng_state())
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()
        if len(set(self._agreement.gather(digest))) > 1:
            raise AgreementError(
                asked="the model draws random numbers",
                found="the ranks' random states differ, and would drop different elements of one tensor",
                remedy="call torch.manual_seed with one seed on every rank",
            )

    def _sources(self, program: Program) -> list[Any]:
        found: list[Any] = []
        for entry in program.inputs:
            if entry.kind == "input":
                found.append(None)
            elif entry.kind == "constant":
                found.append(entry.value)
            else:
                path, _, name = entry.name.rpartition(".")
                owner = self._model.get_submodule(path)
                found.append((owner._parameters if entry.kind == "parameter" else owner._buffers, name))
        return found

    # --- inputs that arrive in shards

    def _global_shapes(self, args: tuple, kwargs: dict[str, Any]) -> dict[int, tuple[int, ...]]:
        """Whole shapes, by id of the tensor, of the inputs named in `in_layouts`: from every rank's part."""
        named = _named_inputs(self._model, args, kwargs)
        found = {}
        for name, spec in self.options.in_layouts.items():
            if name not in named:
                raise LayoutError(
                    asked=f"in_layouts names the input {name!r}",
                    found=f"the tensor arguments of the call are {', '.join(named) or 'none'}",
                    remedy="use one of these names",
                )
            shape = list(named[name].shape)
            for mesh_dim, dim in spec.items():
                if dim is None:
                    continue
                if isinstance(dim, str) or mesh_dim not in self._abstract.names or not -len(shape) <= dim < len(shape):
                    raise LayoutError(
                        asked=f"layout {dict(spec)!r} of {name}",
                        found=f"the mesh has dims {', '.join(self._abstract.names)}, the tensor {len(shape)} dims",
                        remedy="write it as {mesh dim: number of the tensor's dim}",
                    )
                group = self.mesh.get_group(mesh_dim)
                sizes: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(sizes, shape[dim], group=group)
                if sizes != shard_sizes(sum(sizes), len(sizes)):
                    raise LayoutError(
                        asked=f"layout {dict(spec)!r} of {name}",
                        found=f"the ranks hold {sizes} along dim {dim}",
                        remedy="cut it as torch.tensor_split does: sizes differ by at most one, larger ones first",
                    )
                shape[dim] = sum(sizes)
            found[id(named[name])] = tuple(shape)
        return found


def _whole_arguments(args: tuple, kwargs: dict[str, Any], shapes: Mapping[int, tuple[int, ...]]) -> tuple[tuple, dict]:
    """Fake arguments of the whole shapes, to capture with."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            made = torch.empty(shapes.get(id(tensor), tensor.shape), dtype=tensor.dtype, device=tensor.device)
        return made.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))


def _named_inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensor arguments by the names of the model's `forward`."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        bound = kwargs
    return {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}


def _state_key(model: nn.Module) -> tuple[tuple, tuple[nn.Module, ...]]:
    """What of the model and of torch's modes the plan depends on; and which module objects it is made of.

    Read at every call, so it walks the modules itself: `modules()` and `parameters()` take several times as long.
    """
    modules, seen, todo = [], set(), [model]
    while todo:
        module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            modules.append(module)
            todo += [child for child in module._modules.values() if child is not None]
    modes = tuple([module.training for module in modules])
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    kinds = tuple([(p.requires_grad, p.dtype, p.device.type) for p in parameters])
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )
    return (modes, kinds, torch.is_grad_enabled(), autocast), tuple(modules)


def _leaf_key(leaf: Any, shapes: Mapping[int, tuple[int, ...]]) -> Any:
    """What of an argument the plan depends on; for a part of an input, the whole shape."""
    if isinstance(leaf, torch.Tensor):
        return (shapes.get(id(leaf), tuple(leaf.shape)), leaf.dtype, leaf.device.type, leaf.requires_grad)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), repr(leaf))
    return (type(leaf), leaf)


def _describe(args: tuple, kwargs: Mapping[str, Any], training: bool) -> str:
    def show(leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        return repr(leaf)[:40]

    shown = [show(leaf) for leaf in pytree.tree_leaves(args)]
    shown += [f"{name}={', '.join(show(leaf) for leaf in pytree.tree_leaves(value))}" for name, value in kwargs.items()]
    return f"({', '.join(shown)}), {'train' if training else 'eval'}, grad {torch.is_grad_enabled()}"
