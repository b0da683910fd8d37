"""Hooks: which hooks of a model become part of its graph, and which run at every call.

A hook that gives something else than it was given is traced. One that only looks (returns None) is not: it runs at every call
around the module's ops (see `segments`), on what this rank holds. So do FSDP's own hooks, of which the graph has only the casts
of mixed precision, and hooks on gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from dsp_auto import fsdp

from .check_gradients import fake_like, on_fakes, unchanged
from .checkpointing import marking

_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")


class Hooks(NamedTuple):
    """Ids of a model's forward and forward-pre hooks, FSDP's left out."""

    running: frozenset[int] = frozenset()  # at every call
    untraced: frozenset[int] = frozenset()  # of these, the ones that are no part of the graph


@contextmanager
def traced(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], hooks: Hooks | None = None
) -> Iterator[Hooks]:
    """Inside, `model` has only the hooks that its graph must have; after, its own again.

    hooks: what is known of them. None: it is found out, by running the model on fake tensors.
    """
    with unchanged(model):
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                vars(module)["forward"] = _forward_of(module.module)  # which is all that it computes
            for own in (vars(module)[name] for name in _BACKWARD):
                own.clear()
            for own in (vars(module)[name] for name in _FORWARD):
                for id_ in [id_ for id_, hook in own.items() if fsdp.is_hook(hook)]:
                    del own[id_]
        has_others = any(vars(module)[name] for module in model.modules() for name in _FORWARD)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                _cast(module, fsdp.casts(module))
        if hooks is None:
            hooks = _looking(model, args, kwargs) if has_others else Hooks()
        for module in model.modules():
            for own in (vars(module)[name] for name in _FORWARD):
                for id_ in hooks.untraced.intersection(own):
                    del own[id_]
        yield hooks


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    @wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def _cast(module: nn.Module, casts: fsdp.Casts) -> None:
    def to(dtype: torch.dtype, values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)

    if casts.inputs is not None:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: to(casts.inputs, (args, kwargs)), prepend=True, with_kwargs=True
        )
    if casts.outputs is not None:
        module.register_forward_hook(lambda module, args, out: to(casts.outputs, out))


def _looking(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Hooks:
    """The hooks that only look, found by running the model on fake tensors. Those that leave something in a module, which its
    forward may read, are traced too. A hook that fails on fake tensors only looks: it asks for values.
    """
    hooked = [vars(module)[name] for module in model.modules() for name in _FORWARD]
    ran: set[int] = set()
    changes: set[int] = set()
    leaves: set[int] = set()

    def watching(id_: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(module: nn.Module, *given: Any) -> Any:
            ran.add(id_)
            own, versions = _contents(module), _versions(module, given)
            try:
                result = hook(module, *given)
            except Exception:  # it asks for values
                result = None
            if result is not None or versions != _versions(module, given):
                changes.add(id_)
            elif own != _contents(module):
                leaves.add(id_)
            return result

        return run

    with unchanged(model):
        for own in hooked:
            own.update({id_: watching(id_, hook) for id_, hook in own.items()})
        fakes: dict[int, torch.Tensor] = {}
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), on_fakes(model, fakes), marking():
                call = pytree.tree_map_only(torch.Tensor, lambda t: fake_like(t, fakes), (args, dict(kwargs)))
                model(*call[0], **call[1])
        except Exception:  # capture itself says what is wrong with the model
            return Hooks()
    return Hooks(frozenset(ran - changes), frozenset(ran - changes - leaves))


def _contents(module: nn.Module) -> dict[str, int]:
    held = {**vars(module), **module._parameters, **module._buffers, **module._modules}
    return {name: id(value) for name, value in held.items()}


def _versions(module: nn.Module, given: tuple) -> list[int]:
    tensors = (*pytree.tree_leaves(given), *module._parameters.values(), *module._buffers.values())
    return [t._version for t in tensors if isinstance(t, torch.Tensor)]
