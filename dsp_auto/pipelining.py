"""Pipelines: what `torch.distributed.pipelining` does where a schedule (zero bubble) asks for the gradients of a stage's inputs
first, and for those of its parameters later.

Torch tells by no public name whether it does that right: the private ones stand here alone, see
`test_whether_torch_splits_a_backward_rightly_can_be_asked`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes


@cache
def splits_backward_rightly() -> bool:
    """Whether parameters that are used at several places, one behind the other, get their gradients where backward is split.

    Torch 2.11 counts what a later place sends to an earlier one twice (pytorch/pytorch#180952). To it parameters that go
    through one node of autograd are like one parameter.
    """
    try:
        from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
    except ImportError:  # of a torch without distributed, or of one that has long mended it
        return True
    with _disable_current_modes(), torch.enable_grad():
        x = torch.tensor(3.0, device="cpu", requires_grad=True)
        twice = nn.Parameter(torch.tensor(2.0, device="cpu"))
        _, later = stage_backward_input([x * twice * twice], None, [x], iter([twice]))
        stage_backward_weight(iter([twice]), later)
        return twice.grad is not None and twice.grad.item() == 12.0  # of 3 w w
