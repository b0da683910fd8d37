"""Verify: a parallel module against the module it was made from, on every rank.

The reference is always the single-device model. Each rank runs both and compares outputs, every gradient, and the bytes
that really went over the wire with those that the plan predicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from .errors import DspError
from .measure import CountCollectives
from .parallelize import parallelize
from .parameters import whole_value
from .plan import Plan

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class Comparison:
    """What one rank found. Deviations are relative, see `deviation`.

    worst: the largest deviation of a gradient, and whose gradient that is.
    measured: (primitive, "forward" or "backward") -> collectives issued and wire bytes sent by this rank.
    """

    output: float
    worst: tuple[float, str]
    plan: Plan
    measured: Mapping[tuple[str, str], tuple[int, float]]

    @property
    def gradient(self) -> float:
        return self.worst[0]


@dataclass(frozen=True)
class Traffic:
    """Wire bytes per device of one primitive in one direction: the plan's, and the mean of what the ranks sent.

    direction: "forward" or "backward". collectives: how many. predicted, measured: bytes. Shards of uneven factors differ in
    size, and so do the ranks; the plan predicts their mean.
    """

    primitive: str
    direction: str
    collectives: int
    predicted: float
    measured: float

    @property
    def agrees(self) -> bool:
        """Equal, up to the rounding of the mean."""
        return math.isclose(self.predicted, self.measured, rel_tol=1e-9)


def compare(
    model: nn.Module,
    mesh: DeviceMesh,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    backward: bool = True,
    inputs: Sequence[torch.Tensor] = (),
    **options: Any,
) -> Comparison:
    """Run `model` and `parallelize(model, mesh, **options)` on the same arguments, and compare.

    backward: compare gradients too: the parameters', and those of `inputs`, tensors among the arguments that require one.
    Every rank of the mesh calls this with equal arguments. Seeds the global generator before each of the two runs.

    Raises DspError where shapes, dtypes or the presence of gradients differ, and what `parallelize` raises.
    """
    with torch.set_grad_enabled(backward):
        torch.manual_seed(1)
        expected = model(*args, **kwargs)
        reference = gradients(model, expected, inputs) if backward else {}
        parallel = parallelize(model, mesh, **options)
        plan = parallel.prepare(*args, **kwargs)  # planning runs the program on fake tensors: not to be counted
        torch.manual_seed(1)
        with CountCollectives() as count:
            found = parallel(*args, **kwargs)
            if backward:
                _backward(model, found, inputs)
        own = _gradients(model, inputs) if backward else {}
    return Comparison(_output_deviation(found, expected), worst(own, reference), plan, dict(count.by_primitive))


def deviation(own: torch.Tensor, reference: torch.Tensor, scale: float = 0.0) -> float:
    """Largest difference, relative to the largest finite reference value or to `scale`; infinite where one is not a number or
    not finite and the other is not the same."""
    if own.numel() == 0:
        return 0.0
    same = (own == reference) | (own.isnan() & reference.isnan())
    largest = reference.abs().nan_to_num(0, 0, 0).max().item()
    found = torch.where(same, 0, own - reference).abs().max().item() / max(largest, scale, 1e-30)
    return math.inf if math.isnan(found) else found


def gradients(model: nn.Module, outputs: Any, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients, by name, of a loss that weighs every output element differently. Those of DTensors are put together, on all
    their ranks."""
    _backward(model, outputs, inputs)
    return _gradients(model, inputs)


def _backward(model: nn.Module, outputs: Any, inputs: Sequence[torch.Tensor]) -> None:
    loss = 0.0
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            loss = loss + (leaf * weights.reshape(leaf.shape)).sum()
    if not isinstance(loss, torch.Tensor):
        raise DspError(asked="cannot compare gradients", found="no output of the model requires one")
    for tensor in [*model.parameters(), *inputs]:
        tensor.grad = None
    loss.backward()


def _gradients(model: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found |= {f"input {n}": tensor.grad for n, tensor in enumerate(inputs)}
    return {
        name: None if grad is None else whole_value(grad) if isinstance(grad, DTensor) else grad.clone()
        for name, grad in found.items()
    }


def traffic(plan: Plan, measured: Sequence[Mapping[tuple[str, str], tuple[int, float]]]) -> list[Traffic]:
    """Predicted against measured bytes, in the plan's order; `measured` has every rank's counts. Silent primitives are left
    out."""
    planned = plan.communication["by_primitive"]
    predicted = {(primitive, way): entry[f"{way}_bytes"] for primitive, entry in planned.items() for way in _DIRECTIONS}
    found = []
    keys = dict.fromkeys((*predicted, *(key for rank in measured for key in rank)))
    for key in sorted(keys, key=lambda k: _DIRECTIONS.index(k[1])):
        counts, sent = zip(*(rank.get(key, (0, 0.0)) for rank in measured))
        entry = Traffic(*key, max(counts), predicted.get(key, 0.0), sum(sent) / len(measured))
        if entry.collectives or entry.predicted:
            found.append(entry)
    return found


_DIRECTIONS = ("forward", "backward")


def _output_deviation(found: Any, expected: Any) -> float:
    largest = 0.0
    for own, reference in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if not isinstance(reference, torch.Tensor):
            continue
        if own.shape != reference.shape or own.dtype != reference.dtype:
            raise DspError(
                asked="the parallel module's output differs from the model's",
                found=f"{own.dtype}{list(own.shape)} instead of {reference.dtype}{list(reference.shape)}",
            )
        largest = max(largest, deviation(own.detach(), reference.detach()))
    return largest


def worst(own: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, str]:
    """The largest deviation among tensors by name, and whose it is. Raises DspError where one has none and the other some."""
    differ = [name for name, grad in reference.items() if (grad is None) != (own[name] is None)]
    if differ:
        raise DspError(
            asked=f"the gradient of {differ[0]} differs from one device's",
            found="it has none" if own[differ[0]] is None else "one device has none",
        )
    graded = {name: grad for name, grad in reference.items() if grad is not None and grad.numel()}
    # Some gradients are zero in exact arithmetic (a key's bias under softmax): judge those on the model's scale.
    scales = sorted(grad.abs().max().item() for grad in graded.values())
    floor = scales[len(scales) // 2] * 1e-2 if scales else 0.0
    return max(((deviation(own[name], grad, floor), name) for name, grad in graded.items()), default=(0.0, ""))
