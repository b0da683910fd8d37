"""Materialize: real random values for a model and arguments that are fake or on `meta`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def materialize(model: nn.Module, args: tuple, kwargs: dict, seed: int = 0) -> tuple[nn.Module, tuple, dict]:
    """The model and its arguments on CPU, with every fake or meta tensor drawn from `seed`; a copy where there is any.

    Weights of several dims are normal over the root of what they contract; those of one dim near 1 if they are called weight,
    else near 0. Other floating-point tensors are normal, bool ones true, integers 0 or 1: indices that any table has.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(_is_abstract(tensor) for tensor in (*(own for _, own in named), *leaves)):
        return model, args, kwargs
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}

    def real(tensor: Any, name: str = "") -> Any:
        if not isinstance(tensor, Tensor) or not _is_abstract(tensor):
            return tensor
        if id(tensor) not in made:
            value = _draw(tensor, name, isinstance(tensor, nn.Parameter), generator)
            is_parameter = isinstance(tensor, nn.Parameter)
            own = nn.Parameter(value, tensor.requires_grad) if is_parameter else value.requires_grad_(tensor.requires_grad)
            made[id(tensor)] = own
        return made[id(tensor)]

    held = {id(tensor): real(tensor, name) for name, tensor in named}
    return copy.deepcopy(model, held), *pytree.tree_map(real, (args, kwargs))


def _is_abstract(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _draw(tensor: Tensor, name: str, is_weight: bool, generator: torch.Generator) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.randint(0, 2, shape, generator=generator).to(tensor.dtype)
    drawn = torch.randn(shape, generator=generator)
    if is_weight and len(shape) > 1:
        drawn /= math.sqrt(math.prod(shape[1:]) or 1)
    elif is_weight:
        drawn = drawn * 0.1 + (1.0 if name.rpartition(".")[2] == "weight" else 0.0)
    return drawn.to(tensor.dtype)
