"""The signature of a call: all that a plan depends on and that may change between two calls of a module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import LayoutError
from .mesh import Mesh
from .shards import shard_sizes


def signature(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]]
) -> tuple[tuple, tuple]:
    """What the plan of `model(*args, **kwargs)` depends on, equal on every rank; and which objects the model is made of.

    Arguments (shapes, dtypes, requires_grad, values of what is no tensor), modes (train, grad, autocast), kinds of
    parameters and buffers, hooks, and which of all these tensors are one tensor: capture makes one input of them.
    shapes: by id of a tensor, the whole shape of an argument that arrives in parts.

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
    held = [t for module in modules for own in (module._parameters, module._buffers) for t in own.values()]
    kinds = tuple([None if t is None else (t.requires_grad, t.dtype, t.device.type) for t in held])
    buffers = tuple([b.shape for module in modules for b in module._buffers.values() if b is not None])
    hooks = [(n, m._forward_hooks, m._forward_pre_hooks) for n, m in enumerate(modules)]
    hooked = [(n, after, before) for n, after, before in hooks if after or before]
    autocast = tuple(
        [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    )
    arguments = tuple([_leaf_key(leaf, shapes) for leaf in leaves])
    tensors = [id(t) for t in (*leaves, *held) if isinstance(t, torch.Tensor)]
    return (
        (
            spec,
            arguments,
            modes,
            kinds,
            buffers,
            tuple([(n, len(after), len(before)) for n, after, before in hooked]),
            _aliases(tensors),
            torch.is_grad_enabled(),
            autocast,
        ),
        (*modules, *(id_ for _, after, before in hooked for id_ in (*after, *before))),
    )


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
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
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
                f"the mesh has dims {', '.join(mesh.names)}, the tensor {len(shape)} dims",
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
