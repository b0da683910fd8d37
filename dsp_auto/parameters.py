"""Parameters in parts: where a plan holds parameters in parts, a model's parameters become `DTensor`s over the user's mesh.

Then all of them do, those that stay whole replicated: `clip_grad_norm_` and the optimizers' foreach and fused forms refuse a
mix. A DTensor keeps the parameter's shape; `to_local()` is this rank's part, and only that is in memory.

A part of a factor that is not the first in its dim (heads in a fused `(3 H D) C`) is no range of rows. `DTensor` has a
placement for that, `_StridedShard`, which is private: it stands here alone, see
`test_strided_placements_cut_what_the_planner_cuts`. In a state_dict parts are ranges (`Shard`), which
`torch.distributed.checkpoint` stores and loads on any number of ranks, and into the plain model.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from .errors import LayoutError, StrategyError
from .fsdp import Managed
from .mesh import Mesh
from .passes import layout as planned
from .passes.capture import Program
from .passes.check_gradients import unchanged
from .passes.factors import Factors, Value
from .passes.stages import StageGraph, dim_of

Placements = tuple[Placement, ...]  # one for each dim of the user's mesh: Replicate, Shard or _StridedShard


# --- between the planner's layouts and placements


def placements_of(layout: planned.Layout, value: Value, sizes: Mapping[int, int], mesh: Mesh) -> Placements:
    """A parameter's layout over the planner's mesh, whose split dims act as one, as placements over the user's."""
    found: list[Placement] = []
    for name in mesh.whole:
        placement = layout[mesh.dims_of(name)[0]]
        if isinstance(placement, planned.Shard):
            dim, runs = dim_of(value, placement.place, sizes)
            found.append(Shard(dim) if runs == 1 else _StridedShard(dim, split_factor=runs))
        else:
            found.append(Replicate())
    return tuple(found)


def _dim_and_runs(placement: Any) -> tuple[int, int]:
    """The dim that a Shard or a _StridedShard cuts, and how many runs of it are cut each by itself."""
    return placement.dim, getattr(placement, "split_factor", 1)


def layout_of(placements: Placements, value: Value, sizes: Mapping[int, int], mesh: Mesh) -> planned.Layout | None:
    """The layout over the user's `mesh` that placements are; None where the program sees the tensor in such a way, `(6 C) K`
    for `(3 H D) C`, that they are none."""
    found: list[Any] = []
    for placement in placements:
        if isinstance(placement, Replicate):
            found.append(planned.R)
            continue
        ranks = math.prod(size for size, own in zip(mesh.sizes, placements, strict=True) if own == placement)
        wanted = _dim_and_runs(placement)
        places = [
            place
            for place, factor in enumerate(value.factors)
            if sizes[factor] % ranks == 0 and dim_of(value, place, sizes) == wanted
        ]
        if not places:
            return None
        found.append(planned.Shard(places[0]))
    return tuple(found)


def parts_of_plan(
    program: Program, graph: StageGraph, made: Callable[[tuple[str, int]], planned.Layout]
) -> dict[str, Placements]:
    """Placements of the parameters that a plan holds in parts, by name. made: the layout that the plan gives a placeholder."""
    found = {}
    for value, name in _placeholders(program):
        if value in graph.storages:
            own = placements_of(made(value), graph.factors.values[value], graph.factors.sizes, graph.mesh)
            if any(placement != Replicate() for placement in own):
                found[name] = own
    return found


def held_layouts(
    program: Program, factors: Factors, mesh: Mesh, placements: Mapping[str, Placements]
) -> tuple[dict[str, planned.Layout], frozenset[str]]:
    """What parameters that are held in parts already are to a program: their layouts by name, and the names of those that it
    must be given whole."""
    found, whole = {}, set()
    for value, name in _placeholders(program):
        if name in placements and value in factors.values:
            own = layout_of(placements[name], factors.values[value], factors.sizes, mesh)
            if own is None:
                whole.add(name)
            else:
                found[name] = own
    return found, frozenset(whole)


def _placeholders(program: Program) -> Iterator[tuple[tuple[str, int], str]]:
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, entry in zip(nodes, program.inputs, strict=True):
        if entry.kind == "parameter":
            yield (node.name, 0), entry.name


# --- a model whose parameters are DTensors


def placements_in(
    model: nn.Module, mesh: DeviceMesh, managed: Mapping[tuple[int, str], Managed]
) -> dict[str, Placements]:
    """Placements of all parameters that are DTensors over `mesh`, but not those that FSDP shards, under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    others = {id(one.sharded) for one in managed.values()}
    return {
        name: p.placements
        for name, p in named
        if isinstance(p, DTensor) and p.device_mesh == mesh and id(p) not in others
    }


def how_held(modules: Iterable[Any], managed: Mapping[tuple[int, str], Managed]) -> tuple[Placements | None, ...]:
    """Placements of the modules' own parameters, but those that FSDP shards, in their order.

    For every call: it takes a tenth of `placements_in`.
    """
    own = [(m, name, p) for m in modules if isinstance(m, nn.Module) for name, p in m._parameters.items()]
    return tuple(
        [p.placements if isinstance(p, DTensor) and (id(m), name) not in managed else None for m, name, p in own]
    )


def hold(model: nn.Module, mesh: DeviceMesh, placements: Mapping[str, Placements]) -> None:
    """Turns all parameters of `model` into DTensors over `mesh`: with these placements, replicated where none are given.

    The new parameters have the old ones' gradient, `requires_grad`, hooks and attributes, and optimizers go on with them.
    New ones, because `torch.utils.swap_tensors` does not make a DTensor of a plain tensor (torch 2.13).

    Raises StrategyError where a DistributedDataParallel has them: it would wait for gradients of the old ones.
    """
    _check_no_ddp(model)
    replicated = (Replicate(),) * mesh.ndim
    own = {
        id(p): placements[name] for name, p in model.named_parameters(remove_duplicate=False) if name in placements
    }
    made: dict[int, nn.Parameter] = {}
    owners: dict[nn.Module, None] = {}
    with torch.inference_mode(False):
        for module in model.modules():
            for name, old in list(module._parameters.items()):
                if old is None or isinstance(old, DTensor):
                    continue
                owners[module] = None
                if id(old) not in made:
                    made[id(old)] = _cut_parameter(old, mesh, own.get(id(old), replicated))
                setattr(module, name, made[id(old)])  # some modules (RNNs) keep lists of their parameters
        _tell_optimizers(made)
    for module in owners:
        module.register_state_dict_post_hook(_parts_as_ranges)
        module.register_load_state_dict_pre_hook(_cut_what_is_loaded)


def _check_no_ddp(model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    # A parameter does not know what waits for its gradient.
    for found in [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]:
        if any(id(parameter) in own for parameter in found.parameters()):
            raise StrategyError(
                asked="cannot hold parameters in parts",
                found="a DistributedDataParallel reduces their gradients, and it knows no parts",
                remedy="parallelize with shard_parameters=False, or let fully_shard shard them in its place",
            )


def _cut_parameter(old: nn.Parameter, mesh: DeviceMesh, placements: Placements) -> nn.Parameter:
    new = nn.Parameter(cut(old.detach(), mesh, placements), old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = cut(old.grad.detach(), mesh, placements)
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)
    for hook in (old._post_accumulate_grad_hooks or {}).values():
        new.register_post_accumulate_grad_hook(hook)
    return new


def cut(whole: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """The DTensor of a tensor that every rank has, cut into equal parts: keeps a copy of this rank's part, or the tensor where
    that is all of it. Nothing is sent."""
    part, at = whole, mesh.get_coordinate() or (0,) * mesh.ndim
    for m, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            dim, runs = _dim_and_runs(placement)
            if part.shape[dim] % (runs * mesh.size(m)):
                raise LayoutError(
                    asked=f"cannot cut a parameter of shape {list(whole.shape)} as {placements}",
                    found=f"dim {dim} is no multiple of {runs * mesh.size(m)}",
                    remedy="leave parameters whose parts are not equal to torch.distributed.tensor",
                )
            part = part.unflatten(dim, (runs, part.shape[dim] // runs))
            length = part.shape[dim + 1] // mesh.size(m)
            part = part.narrow(dim + 1, at[m] * length, length).flatten(dim, dim + 1)
    if part is not whole:
        part = part.clone(memory_format=torch.contiguous_format)
    strides = whole.stride() if part is whole else torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=strides)


def local_value(parameter: Tensor, whole: bool) -> Tensor:
    """What a program is given for a parameter: this rank's part, or on all ranks, called alike, the whole. Its gradient goes
    back to where it comes from."""
    if not isinstance(parameter, DTensor):
        return parameter
    if whole:
        return whole_value(parameter, (Replicate(),) * parameter.device_mesh.ndim)
    return parameter.to_local(grad_placements=parameter.placements)


def whole_value(value: DTensor, grad_placements: Placements | None = None) -> Tensor:
    """`full_tensor`, of strided parts too, which torch 2.11 cannot put together: they are plain parts of a tensor with one dim
    more, `(3 H) C` as `3 H C`."""
    runs = {p.dim: p.split_factor for p in value.placements if isinstance(p, _StridedShard)}
    if not runs:
        return value.full_tensor(grad_placements=grad_placements)
    part = value.to_local(grad_placements=value.placements)
    for dim in sorted(runs, reverse=True):
        part = part.unflatten(dim, (runs[dim], -1))
    moved = [
        Shard(p.dim + sum(dim < p.dim for dim in runs) + (p.dim in runs)) if isinstance(p, (Shard, _StridedShard)) else p
        for p in value.placements
    ]
    whole = DTensor.from_local(part, value.device_mesh, moved).full_tensor(grad_placements=grad_placements)
    for dim in sorted(runs):
        whole = whole.flatten(dim, dim + 1)
    return whole


@contextmanager
def fake_whole_parameters(
    model: nn.Module, mode: FakeTensorMode, managed: Mapping[tuple[int, str], Managed]
) -> Iterator[None]:
    """Inside, `model` has fake whole parameters in place of DTensors, to be captured with; after, its own again.

    managed: the parameters that FSDP shards, whether they are whole just now or not.
    """
    made: dict[int, nn.Parameter] = {}
    with unchanged(model):
        for module in model.modules():
            for name, own in list(module._parameters.items()):
                one = managed.get((id(module), name))
                if one is None and not isinstance(own, DTensor):
                    continue
                own = one.sharded if one else own
                if id(own) not in made:
                    dtype = one.dtype if one else own.dtype
                    with mode:
                        fake = torch.empty_strided(own.shape, own.stride(), dtype=dtype, device=own.device)
                    made[id(own)] = nn.Parameter(fake, own.requires_grad)
                setattr(module, name, made[id(own)])
        yield


# --- state_dict


def _parts_as_ranges(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """In a state_dict, which all ranks ask for, parts are ranges of a dim: checkpoints know no others."""
    for name in module._parameters:
        value = state_dict.get(prefix + name)
        # With keep_vars=True the caller wants the parameters themselves.
        if isinstance(value, DTensor) and not isinstance(value, nn.Parameter):
            state_dict[prefix + name] = _as_ranges(value)


def _as_ranges(value: DTensor) -> DTensor:
    return _recut(value, [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in value.placements])


def _recut(value: DTensor, placements: Sequence[Placement]) -> DTensor:
    """`redistribute`, to strided parts and from them too (see `whole_value`)."""
    if not any(isinstance(p, _StridedShard) for p in (*value.placements, *placements)):
        return value.redistribute(placements=placements)
    return value if value.placements == tuple(placements) else cut(whole_value(value), value.device_mesh, tuple(placements))


def _cut_like(value: Tensor, parameter: DTensor) -> DTensor:
    """A tensor of the parameter's shape, whole or cut in another way, as a DTensor cut like the parameter."""
    given = value.detach()
    if isinstance(given, DTensor) and given.device_mesh == parameter.device_mesh:
        return _recut(given, parameter.placements)
    whole = whole_value(given) if isinstance(given, DTensor) else given
    return cut(whole, parameter.device_mesh, parameter.placements)


def _cut_what_is_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded into a DTensor, whole or cut in another way, becomes cut like it. A wrong shape is left to be refused."""
    for name, own in module._parameters.items():
        value = state_dict.get(prefix + name)
        if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
            state_dict[prefix + name] = _cut_like(value, own)


# --- copies and optimizers


def copy_parameters(model: nn.Module, memo: dict[int, Any]) -> None:
    """Puts copies of the model's DTensors, gradients included, into the memo of a deep copy.

    By itself a DTensor cannot be copied whose local tensor is a view into a larger one (torch 2.13), as gradients are that are
    synchronized together.
    """
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in memo:
            made = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            vars(made).update(copy.deepcopy(vars(parameter), memo))
            if parameter.grad is not None:
                made.grad = parameter.grad.detach().clone()
            memo[id(parameter)] = made


def _tell_optimizers(became: Mapping[int, nn.Parameter]) -> None:
    """Optimizers that hold parameters go on with those that they became (by id).

    A parameter knows no optimizer, and an optimizer looks at its parameters only in a step: what is between a forward and
    that, `zero_grad`, loss scaling, would still work on the old ones. So they are looked for.
    """
    for optimizer in [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]:
        for group in optimizer.param_groups:
            group["params"][:] = [became.get(id(parameter), parameter) for parameter in group["params"]]
        for old in [key for key in optimizer.state if id(key) in became]:
            optimizer.state[became[id(old)]] = optimizer.state.pop(old)
        _cut_state(optimizer)
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_watch))


# --- checkpoints of optimizers

_hooked: list[Any] = []  # the handle of `_watch`, which finds optimizers that are made later too
_watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _watch(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    """At the first step of an optimizer of parameters whose parts are no ranges: its state is cut like them, and is so again
    when it is loaded; in its state_dict parts are ranges, as in the model's."""
    own = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if optimizer not in _watched and any(_is_strided(parameter) for parameter in own):
        _watched.add(optimizer)
        optimizer.register_state_dict_post_hook(lambda _, found: pytree.tree_map_only(DTensor, _as_ranges, found))
        optimizer.register_load_state_dict_post_hook(_cut_state)
        _cut_state(optimizer)


def _is_strided(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and any(isinstance(p, _StridedShard) for p in parameter.placements)


def _cut_state(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                # A step count is no state of elements, whatever the shape; `Optimizer.load_state_dict` knows it by name too.
                if name != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = _cut_like(value, parameter)
