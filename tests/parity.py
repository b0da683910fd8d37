"""The reference is the single-device model: run both on every rank and compare outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

from dsp_auto.rehearse import rehearse
from dsp_auto.verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation, gradients
from dsp_auto.verify import compare as compare_on_ranks

__all__ = ["GRADIENT_TOLERANCE", "OUTPUT_TOLERANCE", "TORCH", "compare", "deviation", "gradients", "rehearsed", "sp_mesh"]

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])  # (2, 13)


def sp_mesh(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))


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
    model, args, kwargs, inputs = _built(build, build_args, train, input_grad)
    names = ("sp",) if shape is None else tuple(f"m{n}" for n in range(len(shape)))
    mesh = init_device_mesh("cpu", shape or (ranks,), mesh_dim_names=names)
    found = compare_on_ranks(model, mesh, args, kwargs, backward=train, inputs=inputs, **(options or {}))
    return {
        "output": found.output,
        "gradient": found.gradient,
        "worst": found.worst,
        "plan": found.plan.to_dict(),
        "measured": {f"{primitive} {way}": tuple(v) for (primitive, way), v in found.measured.items()},
    }


def rehearsed(
    ranks: int, build: Callable[..., tuple], build_args: dict[str, Any], train: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """What `compare` finds on each of the ranks, all of them in this process: much less work for many of them."""
    model, args, kwargs, _ = _built(build, build_args, train)
    with torch.set_grad_enabled(train):
        found = rehearse(model, str(ranks), args, kwargs, **options)
    (output, _), (gradient, worst) = found.output, found.gradient
    both = {"output": output, "gradient": gradient, "worst": worst, "plan": found.plan.to_dict()}
    return [{**both, "measured": {f"{name} {way}": n for (name, way), n in rank.sent.items()}} for rank in found.ranks]


def _built(
    build: Callable[..., tuple], build_args: dict[str, Any], train: bool, input_grad: bool = True
) -> tuple[torch.nn.Module, tuple, dict[str, Any], list[torch.Tensor]]:
    """The model, its call, and of its inputs those that want a gradient."""
    torch.manual_seed(0)
    model, args, kwargs = build(**build_args)
    model.train(train)
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return model, args, kwargs, [t.requires_grad_(True) for t in inputs] if train and input_grad else []
