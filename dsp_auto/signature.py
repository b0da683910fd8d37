"""The signature of a call: all that a plan depends on and that may change between two calls of a module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from . import fsdp
from .errors import LayoutError
from .fsdp import Managed
from .mesh import Mesh
from .passes.hooks import Hooks
from .shards import shard_sizes
from .units import counted, show_tensor


class Signature(NamedTuple):
    """What a call is."""

    read: tuple  # what the plan depends on, equal on every rank
    identity: tuple  # the objects that the model is made of, as far as the plan depends on them
    # By number of the module, the ids of hooks that run around its ops, and whether there are any on its gradients.
    entered: tuple[tuple[int, tuple[int, ...], bool], ...]
    managed: Mapping[tuple[int, str], Managed]  # the parameters that FSDP shards
    hooked: bool  # whether the plan depends on hooks

    @property
    def key(self) -> tuple:
        return self.read, self.identity


def signature(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    shapes: Mapping[int, tuple[int, ...]],
    hooks: Hooks,
    around: nn.Module,
) -> Signature:
    """What the plan of `model(*args, **kwargs)` depends on, which objects the model is made of, and what its hooks are.

    Arguments (shapes, dtypes, requires_grad, values of what is no tensor), modes (train, grad, autocast), kinds of
    parameters and buffers, hooks, and which of all these tensors are one tensor: capture makes one input of them.
    shapes: by id of a tensor, the whole shape of an argument that arrives in parts. hooks: what is known of
    the model's. around: a module that may be called in the model's place.

    Read at every call, so it walks the modules itself: `modules()` and `parameters()` take several times as long.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    modules: list[nn.Module] = []
    seen: set[int] = set()
    todo = [model]
    while todo:
        module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            modules.append(module)
            todo += [child for child in module._modules.values() if child is not None]
    modes = tuple([module.training for module in modules])
    hooked = [
        (n, m)
        for n, m in enumerate(modules)
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    ]
    sharding = [m for m in (around, *(m for _, m in hooked)) if isinstance(m, FSDPModule)]
    managed = fsdp.managed(sharding, {id(around): model}) if sharding else {}
    if managed:
        held, kinds = _managed_kinds(modules, managed)
    else:
        held = [t for module in modules for own in (module._parameters, module._buffers) for t in own.values()]
        kinds = tuple([None if t is None else (t.requires_grad, t.dtype, t.device.type) for t in held])
    buffers = tuple([b.shape for module in modules for b in module._buffers.values() if b is not None])
    traced, entered, casts = _hooks(hooked, hooks) if hooked else ((), (), ())
    autocast = tuple(
        [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    )
    arguments = tuple([_leaf_key(leaf, shapes) for leaf in leaves])
    tensors = [id(t) for t in (*leaves, *held) if isinstance(t, torch.Tensor)]
    return Signature(
        (
            spec,
            arguments,
            modes,
            kinds,
            buffers,
            (tuple([(n, len(after), len(before)) for n, after, before in traced]), casts),
            _aliases(tensors),
            torch.is_grad_enabled(),
            autocast,
        ),
        (*modules, *(id_ for _, after, before in traced for id_ in (*after, *before))),
        entered,
        managed,
        bool(traced),
    )


def _hooks(hooked: Sequence[tuple[int, nn.Module]], hooks: Hooks) -> tuple[tuple, tuple, tuple]:
    """Of modules with hooks: ids of those the plan depends on, of those that run around ops, and what FSDP casts."""
    traced, entered, casts = [], [], []
    for n, module in hooked:
        sides = []
        runs: list[int] = []
        for own in (module._forward_hooks, module._forward_pre_hooks):
            shards = [id_ for id_, hook in own.items() if fsdp.is_hook(hook)]
            sides.append([id_ for id_ in own if id_ not in hooks.untraced and id_ not in shards])
            runs += [id_ for id_ in own if id_ in hooks.running or id_ in shards]
        of_gradients = bool(module._backward_hooks or module._backward_pre_hooks)
        if any(sides):
            traced.append((n, *sides))
        if runs or of_gradients:
            entered.append((n, tuple(runs), of_gradients))
        if isinstance(module, FSDPModule) and any(own := fsdp.casts(module)):
            casts.append((n, own))
    return tuple(traced), tuple(entered), tuple(casts)


def _managed_kinds(modules: Sequence[nn.Module], managed: Mapping[tuple[int, str], Managed]) -> tuple[list, tuple]:
    """The tensors that modules hold, and their kinds: what FSDP shards is the same parameter while it is whole and while it is
    not, of the dtype that modules compute with."""
    held, kinds = [], []
    for module in modules:
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if one := managed.get((id(module), name)):
                    t, dtype = one.sharded, one.dtype
                else:
                    dtype = None if t is None else t.dtype
                held.append(t)
                kinds.append(None if t is None else (t.requires_grad, dtype, t.device.type))
    return held, tuple(kinds)


def _aliases(ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(position, first position) of every id that stands a second time."""
    if len(set(ids)) == len(ids):
        return ()
    first: dict[int, int] = {}
    return tuple((n, first[own]) for n, own in enumerate(ids) if first.setdefault(own, n) != n)


def _leaf_key(leaf: Any, shapes: Mapping[int, tuple[int, ...]]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (shapes.get(id(leaf), tuple(leaf.shape)), leaf.dtype, leaf.device.type, leaf.requires_grad)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), repr(leaf))
    return (type(leaf), leaf)


def as_text(read: tuple) -> str:
    """The signature as text that is equal on every rank: without the addresses in some objects' repr."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(read))


def describe(args: tuple, kwargs: Mapping[str, Any], training: bool) -> str:
    """A call as a person compares it: `(float32[2, 6], scale=0.5), train, grad True`."""

    def show(leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return show_tensor(leaf.dtype, leaf.shape)
        return repr(leaf)[:40]

    shown = [show(leaf) for leaf in pytree.tree_leaves(args)]
    shown += [f"{name}={', '.join(show(leaf) for leaf in pytree.tree_leaves(value))}" for name, value in kwargs.items()]
    return f"({', '.join(shown)}), {'train' if training else 'eval'}, grad {torch.is_grad_enabled()}"


def named_inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensor arguments by the names of the model's `forward`."""
    try:
        bound: Mapping[str, Any] = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        bound = kwargs
    return {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}


def tensor_paths(args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """Where in the call each tensor stands, in the order of its leaves: `args[0]`, `kwargs['text']['mask']`."""
    found = []
    arguments = [(f"args[{n}]", value) for n, value in enumerate(args)]
    for argument, value in (*arguments, *((f"kwargs[{name!r}]", value) for name, value in kwargs.items())):
        try:
            leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]
        except ValueError:  # holds a class of the user's that is registered without the names of what is in it
            leaves = [("", leaf) for leaf in pytree.tree_leaves(value)]
        found += [argument + path for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return found


def whole_shape(
    name: str, spec: Mapping[str, Any], parts: Sequence[tuple[int, ...]], mesh: Mesh, rank: int
) -> tuple[int, ...]:
    """Shape of the tensor of which every rank of `mesh` holds one of `parts`, cut as `spec` says (mesh dim -> dim).

    Raises LayoutError, on every rank alike, where the parts are not what `torch.tensor_split` gives.
    """

    def wrong(found: str, remedy: str) -> LayoutError:
        return LayoutError(asked=f"layout {dict(spec)!r} of {name}", found=found, remedy=remedy)

    if len({len(part) for part in parts}) > 1:
        raise wrong(f"the ranks hold {', '.join(str(list(part)) for part in parts)}", "pass parts of one tensor")
    shape = list(parts[rank])
    for mesh_dim, dim in spec.items():
        if dim is None:
            continue
        if isinstance(dim, str) or mesh_dim not in mesh.names or not -len(shape) <= dim < len(shape):
            raise wrong(
                f"the mesh has dims {', '.join(mesh.names)}, the tensor {counted(len(shape), 'dim')}",
                "write it as {mesh dim: number of the tensor's dim}",
            )
        m = mesh.names.index(mesh_dim)
        # All lines of ranks along this mesh dim, so that every rank comes to the same answer.
        lines: dict[tuple[int, ...], list[int]] = {}
        for other, part in enumerate(parts):
            coordinate = mesh.coordinate(other)
            lines.setdefault((*coordinate[:m], *coordinate[m + 1 :]), []).append(part[dim])
        for sizes in lines.values():
            if sizes != shard_sizes(sum(sizes), len(sizes)):
                raise wrong(
                    f"the ranks hold {sizes} along dim {dim}",
                    "cut it as torch.tensor_split does: sizes differ by at most one, larger ones first",
                )
        own = mesh.coordinate(rank)
        shape[dim] = sum(lines[*own[:m], *own[m + 1 :]])
    return tuple(shape)
