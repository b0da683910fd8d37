"""Hooks: which hooks of a model become part of its graph, and which run at every call.

A hook that gives something else than it was given is traced. One that only looks (returns None) is not: it runs at every call
around the module's ops (see `segments`), on what this rank holds. So do FSDP's own hooks, of which the graph has only the casts
of mixed precision, and hooks on gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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
    """The hooks that only look, found by running the model on fake tensors. Those that leave something which forward reads, in
    a module or elsewhere, are traced too. A hook that fails on fake tensors only looks: it asks for values.
    """
    run = _Runs(model, args, kwargs)
    flow = run(frozenset())
    if flow is None:  # capture itself says what is wrong with the model
        return Hooks()
    looking, untraced = run.ran - run.changes, run.ran - run.changes - run.leaves
    if untraced and run(untraced) != flow:
        alike: dict[Any, set[int]] = {}
        for id_ in untraced:
            alike.setdefault(getattr(run.hooks[id_], "__code__", type(run.hooks[id_])), set()).add(id_)
        read = frozenset().union(*(own for own in alike.values() if run(frozenset(own)) != flow))
        untraced = untraced - read if run(untraced - read) == flow else frozenset()
    return Hooks(looking, untraced)


class _Runs:
    """Runs of a model on fake tensors, without some of its hooks, and what its other hooks did in them, by id.

    ran: those that ran. changes: those that gave something else than they were given. leaves: those that left something in
    their module.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.model, self.call = model, (args, dict(kwargs))
        self.hooked = [vars(module)[name] for module in model.modules() for name in _FORWARD]
        self.hooks: dict[int, Callable[..., Any]] = {id_: hook for own in self.hooked for id_, hook in own.items()}
        self.numbers: dict[Any, int] = {}
        self.ran: frozenset[int] = frozenset()
        self.changes: frozenset[int] = frozenset()
        self.leaves: frozenset[int] = frozenset()

    def __call__(self, without: frozenset[int]) -> tuple | None:
        """What the model then computes of what (see `_Flow`); None where it fails."""
        fakes: dict[int, torch.Tensor] = {}
        with unchanged(self.model):
            for own in self.hooked:
                for id_ in without.intersection(own):
                    del own[id_]
                own.update({id_: self._watched(id_) for id_ in own})
            try:
                with FakeTensorMode(allow_non_fake_inputs=True), on_fakes(self.model, fakes), marking():
                    call = pytree.tree_map_only(torch.Tensor, lambda t: fake_like(t, fakes), self.call)
                    with _Flow(fakes.values(), self.numbers) as flow:
                        result = self.model(*call[0], **call[1])
                    return flow.ends(result)
            except Exception:
                return None

    def _watched(self, id_: int) -> Callable[..., Any]:
        def run(module: nn.Module, *given: Any) -> Any:
            self.ran |= {id_}
            own, versions = _contents(module), _versions(module, given)
            try:
                result = self.hooks[id_](module, *given)
            except Exception:  # it asks for values
                result = None
            if result is not None or versions != _versions(module, given):
                self.changes |= {id_}
            elif own != _contents(module):
                self.leaves |= {id_}
            return result

        return run


class _Flow(TorchDispatchMode):
    """What is computed of what. `numbers` has one for each op with the arguments that it was computed of, in all runs: equal
    ones where all behind them was computed alike.

    So an op that a hook runs counts where something is made of what it gives.
    """

    def __init__(self, given: Iterable[torch.Tensor], numbers: dict[Any, int]) -> None:
        super().__init__()
        self.numbers = numbers
        self.given = list(given)
        self.held: list[torch.Tensor] = [*self.given]  # as long as a tensor is held, its id is its own
        self.made = {id(tensor): self._number(n) for n, tensor in enumerate(self.given)}

    def ends(self, value: Any) -> tuple:
        """What a value was computed of, and what the given tensors hold now."""
        return self._shown(value), self._shown(self.given)

    def _number(self, computed: Any) -> int:
        return self.numbers.setdefault(computed, len(self.numbers))

    def _shown(self, value: Any) -> tuple:
        leaves = pytree.tree_leaves(value)
        return tuple(self.made.get(id(x)) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        computed = (func.name(), self._shown((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        for n, x in enumerate(pytree.tree_leaves(result)):
            if isinstance(x, torch.Tensor):
                self.held.append(x)
                self.made[id(x)] = self._number((n, *computed))
        return result


def _contents(module: nn.Module) -> dict[str, int]:
    held = {**vars(module), **module._parameters, **module._buffers, **module._modules}
    return {name: id(value) for name, value in held.items()}


def _versions(module: nn.Module, given: tuple) -> list[int]:
    tensors = (*pytree.tree_leaves(given), *module._parameters.values(), *module._buffers.values())
    return [t._version for t in tensors if isinstance(t, torch.Tensor)]
