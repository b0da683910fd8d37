"""What a model recomputes in backward its parallel module recomputes too, with the same results and gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import checkpoint

import dsp_auto
from dsp_auto.passes.capture import capture
from dsp_auto.passes.checkpointing import marking, region
from dsp_auto.rehearse import rehearse
from tests import parity


class Blocks(nn.Module):
    """Attention-like ops over both sequence dims, in blocks that may be recomputed."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0):
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(8, 24), nn.Linear(24, 8), reentrant
        self.dropout = nn.Dropout(dropout)

    def block(self, x):
        y = self.down(self.dropout(torch.sin(self.up(torch.softmax(x, 1)))))
        return torch.softmax(y, 2) * y + x

    def forward(self, x):
        for _ in range(2):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


def build(reentrant: bool | None):
    return Blocks(reentrant), (torch.randn(2, 5, 7, 8),), {}


def test_every_form_of_checkpoint_comes_through_the_names_that_are_replaced():
    source = inspect.getsource(checkpoint.checkpoint)
    assert "_checkpoint_without_reentrant_generator(" in source and "CheckpointFunction.apply(" in source
    assert list(inspect.signature(checkpoint.CheckpointFunction.forward).parameters)[1:4] == [
        "run_function",
        "preserve_rng_state",
        "args",
    ]
    before = (checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction)
    x = torch.randn(3, requires_grad=True)
    for reentrant in (False, True):
        with marking() as marks:
            y = checkpoint.checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert marks.count == 1 and torch.equal(torch.autograd.grad(y.sum(), x)[0], x.cos())
    assert before == (checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction)


@pytest.mark.parametrize("reentrant", [False, True])
def test_capture_marks_the_ops_of_each_checkpoint_and_plans_with_less_memory(reentrant):
    model, args, _ = build(reentrant)
    program = capture(model, (args[0].requires_grad_(),))
    marks = [region(node) for node in program.graph.nodes if node.op == "call_function"]
    assert None not in marks and len(set(marks)) == 2
    x = torch.randn(2, 5, 7, 8, requires_grad=True)
    recomputed, kept = (dsp_auto.plan(Blocks(form), "2", (x,)) for form in (reentrant, None))
    assert recomputed.memory["activation_bytes"] < kept.memory["activation_bytes"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_model_equals_one_device_and_communicates_once_more_in_backward(world, reentrant):
    for found in world(3).run(parity.compare, build, {"reentrant": reentrant}):
        assert found["output"] <= parity.OUTPUT_TOLERANCE and found["gradient"] <= parity.GRADIENT_TOLERANCE, found["worst"]
        plan = found["plan"]["communication"]["by_primitive"]["switch"]
        count, sent = found["measured"]["switch forward"]
        # What the first block takes is resharded before it, and so not once more.
        assert plan["count"] < count < 2 * plan["count"] and sent == pytest.approx(plan["forward_bytes"], rel=0.2)


def test_the_activations_of_a_checkpoint_are_not_kept():
    """What autograd holds between forward and backward, by the hooks that pack it."""

    def kept(reentrant) -> int:
        sizes: dict[int, int] = {}
        held = []  # no address is met twice

        def pack(tensor):
            if not isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                held.append(storage)
            return tensor

        x = torch.randn(2, 5, 7, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rehearse(Blocks(reentrant), "2", (x,))
        return sum(sizes.values())

    assert kept(False) < kept(None)


def test_a_block_recomputes_with_the_random_numbers_that_it_drew():
    x = torch.randn(2, 5, 7, 8, requires_grad=True)
    found = rehearse(Blocks(False, dropout=0.5), "2", (x,), rng="serial")
    assert found.output[0] <= parity.OUTPUT_TOLERANCE and found.gradient[0] <= parity.GRADIENT_TOLERANCE


def test_a_checkpoint_whose_inputs_need_no_gradient_gives_none_where_one_device_gives_none():
    """The reentrant form; the other one is no different from none."""
    graph = capture(Blocks(False), (torch.randn(2, 5, 7, 8),))
    assert graph.training
    assert not capture(Blocks(True), (torch.randn(2, 5, 7, 8),)).training
