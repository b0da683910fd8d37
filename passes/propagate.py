"""Propagate: run a captured graph once on fake tensors, node by node.

That gives every value its shape and `requires_grad`, and tells what autograd saves for backward: counted by storage under
`saved_tensors_hooks`, not guessed per op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError

from .nodes import module_path


@dataclass(frozen=True)
class Saved:
    """Memory that autograd keeps for backward from the execution of one op.

    `values` are the graph values (node name, index) it keeps; `internal_bytes` is what only the op knows (the
    statistics of a norm, the log-sum-exp of attention).
    """

    values: tuple[tuple[str, int], ...] = ()
    internal_bytes: int = 0


def propagate(module: fx.GraphModule, grads: Sequence[bool]) -> tuple[bool, dict[str, Saved], list[Any]]:
    """Run the graph node by node on fake tensors that require grad as the model's do.

    grads: which placeholders require grad. Sets every node's `meta["val"]` and returns whether any result requires grad,
    what each op saves, and the placeholders' fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    owner: dict[int, tuple[str, int]] = {}
    keep = []  # storages stay alive, so that no address is met twice
    saved: dict[str, Saved] = {}
    env: dict[fx.Node, Any] = {}
    flags = iter(grads)
    leaves = []
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        # Nothing is kept, as no backward runs here: an op that saved its own result would keep it for ever.
        packed.append(tensor)

    with mode, torch.set_grad_enabled(any(grads)), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value, flag = node.meta.get("val"), next(flags)
                if isinstance(value, torch.Tensor):
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                    value.requires_grad_(flag)
                leaves.append(value)
            elif node.op == "get_attr":
                value = getattr(module, node.target)
                if isinstance(value, torch.Tensor):
                    value = mode.from_tensor(value)
            elif node.op == "output":
                break
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(
                    asked=f"cannot plan {node.target}",
                    found="it runs functions that are not in the graph, as control flow does",
                    where=module_path(node) or None,
                    remedy="write both ways out and choose with torch.where, or write loops in Python",
                )
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                packed.clear()
                try:
                    value = node.target(*args, **kwargs)
                except Exception as error:
                    by_value = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
                    if not by_value and node.target is not torch.ops.aten.item.default:
                        raise
                    raise CaptureError(
                        asked=f"cannot plan {node.target}",
                        found="its result depends on the values of tensors, in size or as a number in Python",
                        where=module_path(node) or None,
                        remedy="write it with masks of fixed size, or keep it out of the model",
                    ) from error
            env[node] = value
            node.meta["val"] = value
            for index, result in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                if isinstance(result, torch.Tensor):
                    storage = result.untyped_storage()
                    keep.append(storage)
                    owner.setdefault(storage._cdata, (node.name, index))
            if packed and node.op == "call_function":
                saved[node.name] = _saved(packed, owner, keep)
    results = pytree.tree_leaves(fx.map_arg(module.graph.output_node().args, env.__getitem__))
    training = any(isinstance(r, torch.Tensor) and r.requires_grad for r in results)
    return training, saved, leaves


def _saved(packed: list[torch.Tensor], owner: Mapping[int, tuple[str, int]], keep: list) -> Saved:
    values: dict[tuple[str, int], None] = {}
    internal: dict[int, int] = {}
    for tensor in packed:
        storage = tensor.untyped_storage()
        keep.append(storage)
        if storage._cdata in owner:
            values[owner[storage._cdata]] = None
        else:
            internal[storage._cdata] = storage.nbytes()
    return Saved(tuple(values), sum(internal.values()))
