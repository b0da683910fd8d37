"""Check gradients: every parameter, input and output that has a gradient in the model has the same one in the graph.

A reversible network, or any custom `autograd.Function`, exports cleanly and then loses its gradient or gets another one:
torch.export follows the function's forward and forgets its backward. So the model itself is run on fake tensors, and what
its gradients reach is compared with what the graph's reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError, first_lines


def _graph_leaves(outputs: list[Any]) -> tuple[set[int], set[str]]:
    """Ids of the leaves that gradients reach from `outputs`, and the names of custom autograd functions on the way."""
    todo = [o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    seen, leaves, custom = set(todo), set(), set()
    leaves |= {id(o) for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad and o.grad_fn is None}
    while todo:
        function = todo.pop()
        if hasattr(function, "variable"):
            leaves.add(id(function.variable))
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            custom.add(type(function).__name__.removesuffix("Backward"))
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return leaves, custom


# Their backward is the gradient of their forward, so tracing through the forward changes nothing.
_FAITHFUL_FUNCTIONS = {"CheckpointFunction"}


@contextmanager
def _on_fakes(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, `model` holds fake tensors for its own (yields the parameters by name); after, its own again.

    Not `torch.func.functional_call`: where a module stands at two paths that leaves fake tensors behind (torch 2.13).
    """
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in fakes:
                            made = _like(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)
                            fakes[id(tensor)] = nn.Parameter(made, made.requires_grad) if id(tensor) in names else made
                        swapped.append((held, name, tensor))
                        held[name] = fakes[id(tensor)]
                        if id(tensor) in names:
                            found[names[id(tensor)]] = fakes[id(tensor)]
            yield found
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor


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
    kept = {names[leaf][1] for leaf in reached if leaf in names}
    with _on_fakes(model) as parameters, torch.enable_grad():
        call = pytree.tree_map_only(torch.Tensor, lambda t: _like(t).requires_grad_(t.requires_grad), (args, kwargs))
        try:
            result = model(*call[0], **call[1])
        except Exception as error:
            raise CaptureError(
                asked="cannot check that the captured graph keeps the model's gradients",
                found=f"the model does not run on fake tensors: {first_lines(error)}",
                remedy="keep values of tensors out of Python code in forward()",
            ) from error
    model_leaves, custom = _graph_leaves(pytree.tree_leaves(result))
    custom -= _FAITHFUL_FUNCTIONS
    if custom:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"it uses custom autograd functions ({', '.join(sorted(custom))}), and torch.export follows their forward "
            "and forgets their backward",
            where=_module_of_function(model, custom) or None,
            remedy="make them torch.library.custom_op with register_autograd, or run under torch.no_grad()",
        )
    lost = [name for name, p in parameters.items() if id(p) in model_leaves and name not in kept]
    tied = _tied(model)
    lost = [name for name in lost if not tied.get(name, set()) & kept]
    flat_in = pytree.tree_leaves((call[0], call[1]))
    flat_names = [name for kind, name in inputs if kind == "input"]
    if len(flat_in) == len(flat_names):
        lost += [n for n, t in zip(flat_names, flat_in, strict=True) if id(t) in model_leaves and n not in kept]
    if lost:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"the captured graph has no gradient for {_some(lost)}, and the model has",
            where=lost[0].rpartition(".")[0] or None,
            remedy="look for .detach(), .data, torch.no_grad() or torch.autograd.grad between this module and the output",
        )


def _tied(model: nn.Module) -> dict[str, set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() for name in group}


def _module_of_function(model: nn.Module, functions: set[str]) -> str:
    """The first submodule whose class's module or forward names one of the functions."""
    for name, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and functions & set(code.co_names):
            return name
    return ""


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
