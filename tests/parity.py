"""The reference is the single-device model: run both on every rank and compare outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

import dsp_auto
from dsp_auto.measure import CountCollectives

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def deviation(own: torch.Tensor, reference: torch.Tensor, scale: float = 0.0) -> float:
    """Largest difference, relative to the largest reference value or to `scale`."""
    if own.numel() == 0:
        return 0.0
    return ((own - reference).abs().max() / max(reference.abs().max().item(), scale, 1e-30)).item()


def gradients(model: nn.Module, outputs: Any, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a loss that weighs every output element differently."""
    loss = 0.0
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape)
            loss = loss + (leaf * weights).sum()
    for tensor in [*model.parameters(), *inputs]:
        tensor.grad = None
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found |= {f"input {n}": tensor.grad for n, tensor in enumerate(inputs)}
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def compare(
    rank: int,
    ranks: int,
    build: Callable[..., tuple],
    build_args: dict[str, Any],
    train: bool = True,
    options: dict[str, Any] | None = None,
    input_grad: bool = True,
    shape: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Runs on a rank: the parallel module against the module itself. Returns the worst deviations and the plan's JSON."""
    torch.manual_seed(0)
    model, args, kwargs = build(**build_args)
    model.train(train)
    names = ("sp",) if shape is None else tuple(f"m{n}" for n in range(len(shape)))
    mesh = init_device_mesh("cpu", shape or (ranks,), mesh_dim_names=names)
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    inputs = [t.requires_grad_(True) for t in inputs] if train and input_grad else []
    with torch.set_grad_enabled(train):
        torch.manual_seed(1)
        expected = model(*args, **kwargs)
        reference = gradients(model, expected, inputs) if train else {}
        parallel = dsp_auto.parallelize(model, mesh, **(options or {}))
        parallel.prepare(*args, **kwargs)  # planning runs the program on fake tensors: not to be counted
        torch.manual_seed(1)
        with CountCollectives() as count:
            found = parallel(*args, **kwargs)
            own = gradients(model, found, inputs) if train else {}
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    tensors = [(a.detach(), b.detach()) for a, b in pairs if isinstance(b, torch.Tensor)]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in tensors)
    assert {n for n, g in own.items() if g is None} == {n for n, g in reference.items() if g is None}
    # Some gradients are zero in exact arithmetic (a key's bias under softmax): judge those on the model's scale.
    scales = [g.abs().max().item() for g in reference.values() if g is not None]
    floor = sorted(scales)[len(scales) // 2] * 1e-2 if scales else 0.0
    return {
        "output": max(deviation(a, b) for a, b in tensors),
        "gradient": max((deviation(own[n], g, floor) for n, g in reference.items() if g is not None), default=0.0),
        "worst": max(
            ((deviation(own[n], g, floor), n) for n, g in reference.items() if g is not None), default=(0.0, "")
        ),
        "plan": parallel.plan.to_json(),
        "measured": {f"{primitive} {way}": tuple(v) for (primitive, way), v in count.by_primitive.items()},
    }
