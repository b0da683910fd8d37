"""Check gradients: every parameter, input and output that has a gradient in the model has the same one in the graph.

A reversible network, or any custom `autograd.Function`, exports cleanly and then loses its gradient or gets another one:
torch.export follows the function's forward and forgets its backward. So the model itself is run on fake tensors, and what
its gradients reach is compared with what the graph's reach.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError, first_lines

from .checkpointing import marking


def _graph_leaves(outputs: list[Any]) -> tuple[set[int], set[str]]:
    """Ids of the leaves that gradients reach from `outputs`, and the names of custom autograd functions on the way."""
    todo = [o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    seen, custom = set(todo), set[str]()
    leaves = {id(o) for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad and o.grad_fn is None}
    while todo:
        function = todo.pop()
        if hasattr(function, "variable"):
            leaves.add(id(function.variable))
        # Of an op of torch.library the graph keeps the op, and with it this function.
        of_an_op = type(function).__name__.startswith("GeneratedBackwardFor_")
        if isinstance(function, torch.autograd.function.BackwardCFunction) and not of_an_op:
            custom.add(type(function).__name__.removesuffix("Backward"))
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return leaves, custom


_CONTAINERS = (list, dict, OrderedDict, set)  # not what derives from them: it may be frozen


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """After it, every module of `model` holds what it held before: tensors, attributes, and its lists and dicts."""
    before = []
    for module in model.modules():
        inside = [(held, held.copy()) for held in vars(module).values() if type(held) in _CONTAINERS]
        before.append((vars(module), dict(vars(module)), inside))
    try:
        yield
    finally:
        for attributes, values, inside in before:
            _refill(attributes, values)
            for held, contents in inside:
                _refill(held, contents)


def _refill(held: Any, contents: Any) -> None:
    held.clear()
    (held.extend if isinstance(held, list) else held.update)(contents)


@contextmanager
def on_fakes(model: nn.Module, fakes: dict[int, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, `model` holds fake tensors for its own (yields those with a name); after, its own again.

    fakes: filled with the fake of every tensor, by id. Not `torch.func.functional_call`: where a module stands at two
    paths that leaves fake tensors behind (torch 2.13).
    """
    names = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    with unchanged(model):
        for module in model.modules():
            both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in both:
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = fake_like(tensor, fakes)
        yield {name: fakes[tensor] for tensor, name in names.items()}


def fake_like(tensor: torch.Tensor, fakes: dict[int, torch.Tensor]) -> torch.Tensor:
    """One fake tensor for one tensor, wherever it stands."""
    if id(tensor) not in fakes:
        made = _like(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        made = nn.Parameter(made, tensor.requires_grad) if is_parameter else made.requires_grad_(tensor.requires_grad)
        fakes[id(tensor)] = made
    return fakes[id(tensor)]


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def check_gradients(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    module: fx.GraphModule,
    inputs: Sequence[tuple[str, str]],
    leaves: Sequence[Any],
) -> None:
    """Raises CaptureError where the propagated graph `module` lacks a gradient that `model(*args, **kwargs)` has.

    inputs: kind and name of every placeholder; leaves: the fake tensors that it was propagated with.
    """
    names = {id(leaf): entry for leaf, entry in zip(leaves, inputs, strict=True)}
    outputs = pytree.tree_leaves([n.meta["val"] for n in module.graph.output_node().args[0] if isinstance(n, fx.Node)])
    reached, _ = _graph_leaves(outputs)
    kept = {(names[leaf][0] == "input", names[leaf][1]) for leaf in reached if leaf in names}
    fakes: dict[int, torch.Tensor] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, on_fakes(model, fakes) as held, torch.enable_grad():
        call = pytree.tree_map_only(torch.Tensor, lambda t: fake_like(t, fakes), (args, kwargs))
        try:
            with marking():
                result = model(*call[0], **call[1])
        except Exception as error:
            raise CaptureError(
                asked="cannot check that the captured graph keeps the model's gradients",
                found=f"the model does not run on fake tensors: {first_lines(error)}",
                remedy="where forward() uses values of tensors in Python, keep them out; else what the op says",
            ) from error
    model_leaves, custom = _graph_leaves(pytree.tree_leaves(result))
    if custom:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"it uses custom autograd functions ({', '.join(sorted(custom))}), and torch.export follows their forward "
            "and forgets their backward",
            where=_module_of_function(model, custom) or None,
            remedy="make them torch.library.custom_op with register_autograd, or run under torch.no_grad()",
        )
    flat_in = pytree.tree_leaves(call)
    flat_names = [(True, name) for kind, name in inputs if kind == "input"]
    given = list(zip(flat_names, flat_in, strict=True)) if len(flat_in) == len(flat_names) else []
    own = [((False, name), held[first]) for name, first in _names(model).items()]
    same: dict[int, list[tuple[bool, str]]] = {}  # per tensor, whether it is an input, and its name
    for name, tensor in (*own, *given):
        same.setdefault(id(tensor), []).append(name)
    # Export takes one of several names for one tensor: its gradient then stands there.
    lost = [group[0][1] for tensor, group in same.items() if tensor in model_leaves and not kept & set(group)]
    if lost:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"the captured graph has no gradient for {_some(lost)}, and the model has",
            where=lost[0].rpartition(".")[0] or None,
            remedy="look for .detach(), .data, torch.no_grad() or torch.autograd.grad between this module and the output",
        )


def _names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, and the first name of the same tensor."""
    first: dict[int, str] = {}
    found = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in found}


def _module_of_function(model: nn.Module, functions: set[str]) -> str:
    """The first submodule whose class's module or forward names one of the functions."""
    for name, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and functions & set(code.co_names):
            return name
    return ""


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
