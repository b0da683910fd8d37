"""Tracked bytes are those that can be counted by hand, and those that the allocator sees when the program really runs."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import operator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import checkpoint

from dsp_auto.examples.transformer_2d import build
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.checkpointing import local_module, recompute
from dsp_auto.planner import Options, decide, finish, prepare
from dsp_auto.track import Moment, Tracked, track, track_module

aten, dsp = torch.ops.aten, torch.ops.dsp
N = 1000
X = 4 * N  # bytes


def program(write, *shapes, root=None) -> fx.GraphModule:
    """The program that `write(call, *placeholders)` makes; placeholders carry shapes as `rewrite` leaves them."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{n}") for n in range(len(shapes))]
    with FakeTensorMode():
        for node, shape in zip(nodes, shapes):
            node.meta["val"] = torch.empty(shape)
    results = write(lambda target, *args: graph.call_function(target, args), *nodes)
    graph.output(results if isinstance(results, tuple) else (results,))
    return fx.GraphModule(root or nn.Module(), graph)


def chain(*ops):
    return lambda call, x: functools.reduce(lambda value, op: call(op.default, value), ops, x)


def tracked(write, *grads: bool, **options) -> Tracked:
    return track_module(program(write, *[(N,)] * len(grads)), grads, **options)


def test_without_gradients_an_op_has_its_operand_and_its_result():
    found = tracked(chain(aten.exp, aten.sin, aten.cos, aten.tanh), False)
    assert (found.base_bytes, found.forward_peak, found.backward_peak) == (X, 3 * X, 0)
    assert found.peak_bytes == 3 * X and found.at_peak == {"base": X, "activations": 2 * X, "gradients": 0, "optimizer": 0}


KEPT = []


def keep(value: torch.Tensor) -> torch.Tensor:
    KEPT.append(value)
    return value


def test_a_value_that_is_kept_alive_is_seen_for_as_long_as_it_is():
    ops = (aten.exp, aten.sin, aten.cos, aten.tanh)

    def leaking(call, x):
        return chain(*ops)(call, call(keep, call(aten.exp.default, x)))

    found = tracked(leaking, False)
    assert found.peak_bytes == 4 * X and found.curve[-1].nbytes == 2 * X
    KEPT.clear()
    assert tracked(chain(aten.exp, *ops), False).peak_bytes == 3 * X


def test_what_nobody_uses_goes_at_once():
    def write(call, x):
        call(aten.exp.default, x)
        return chain(aten.sin, aten.cos)(call, x)

    assert tracked(write, False).peak_bytes == 3 * X


def test_a_view_takes_nothing_and_keeps_what_it_is_of():
    def write(call, x):
        part = call(aten.slice.Tensor, call(aten.exp.default, x), 0, 0, 10)
        return part, chain(aten.sin, aten.cos, aten.tanh)(call, x)

    found = tracked(write, False)
    assert found.peak_bytes == 4 * X and {m.nbytes for m in found.curve if m.where.startswith("slice")} == {2 * X}


def test_backward_has_what_was_saved_the_outputs_and_two_gradients():
    found = tracked(chain(aten.exp, aten.neg, aten.tanh), True)
    assert found.forward_peak == 4 * X  # exp and tanh save what they give, neg nothing
    assert found.backward_peak == 5 * X
    *_, last = found.curve
    assert last == Moment("backward", "outputs", 2 * X, 3 * X)


def test_what_backward_has_used_goes_and_the_output_stays():
    found = tracked(chain(*[aten.exp] * 6), True)
    assert found.forward_peak == 7 * X
    highs = [moment.high // X for moment in found.curve if moment.phase == "backward"]
    assert highs == [8, 9, 9, 8, 7, 6, 5, 3]


def few(call, y, start):
    """Some elements of y, which backward makes a whole gradient of."""
    return call(aten.exp.default, call(aten.slice.Tensor, y, 0, start, start + 10))


def test_a_gradient_is_added_in_place_where_nobody_else_holds_the_first():
    def write(call, x):
        y = call(aten.neg.default, x)
        return few(call, y, 0), few(call, y, 10)

    # x and two gradients; a third one would be their sum
    assert tracked(write, True).backward_peak // X == 3


def test_a_gradient_is_added_apart_where_somebody_else_holds_the_first():
    def write(call, x, u, scalar):
        v = call(aten.neg.default, u)
        y = call(aten.add.Tensor, scalar, x)
        part = few(call, y, 0)
        return call(aten.add.Tensor, y, v), part

    module = program(write, (N,), (N,), (1,))
    # x, u, the output, its gradient, which waits for v too, that of the part, and the sum of the two
    assert track_module(module, [False, True, True]).backward_peak // X == 6
    assert track_module(module, [False, False, True]).backward_peak // X == 5


def test_a_checkpoint_keeps_what_it_takes_and_makes_the_rest_again():
    ops = [aten.exp] * 6
    body = program(chain(*ops), (N,))
    root = nn.Module()
    root.body = body

    def write(call, x):
        y = call(aten.neg.default, x)
        part = y.graph.get_attr("body")
        return call(aten.neg.default, call(operator.getitem, call(recompute, part, False, y), 0))

    module = program(write, (N,), root=root)
    found = track_module(module, [True])
    assert found.forward_peak == 4 * X
    assert track_module(module, [False]).forward_peak == 4 * X  # y stays while it runs
    # x, y, the output, a gradient and the six that exp gives; then the gradients go as without a checkpoint.
    assert found.backward_peak == 11 * X


def test_a_collective_takes_what_it_sends_and_what_it_receives():
    def write(call, x):
        return call(dsp.switch.default, x, 0, 8, 1, 2, 0, "sp")

    # What is packed, and what comes; the way it comes is the way it lies.
    module = program(write, (4, 6, 10))
    assert track_module(module, [False]).peak_bytes == (1 + 1 + 1) * 4 * 6 * 10 * 4


def test_what_the_model_changes_is_there_twice():
    def write(call, mean, x):
        return call(aten.add.Tensor, mean, x), call(aten.exp.default, x)

    # The copy, its sum; both go when the output is all that is left.
    found = tracked(write, False, False, changed=[0])
    assert found.base_bytes == 2 * X and found.peak_bytes == 5 * X and found.curve[-1].high == 3 * X


@pytest.mark.parametrize(
    "make, kept", [(torch.optim.SGD, 0), (functools.partial(torch.optim.SGD, momentum=0.9), 1), (torch.optim.Adam, 2)]
)
def test_what_an_optimizer_keeps_is_there_from_the_beginning(make, kept):
    def write(call, x, w):
        return call(aten.mul.Tensor, x, w)

    alone = tracked(write, False, True, parameters=[1])
    found = tracked(write, False, True, parameters=[1], optimizer=make)
    assert alone.step_peak == 0 and found.step_peak >= (3 + kept) * X
    assert (found.forward_peak - alone.forward_peak) // X == kept
    assert found.curve[-1].nbytes // X == 3 + kept  # x, w and its gradient


# --- against a run


class Loss(torch.autograd.Function):
    """One whose gradient takes as much as what it is of, and nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return torch.empty_like(*ctx.saved_tensors)


def allocated(run, path) -> int:
    """The most bytes that were there at once while `run()` ran, over those before."""
    gc.collect()
    gc.disable()  # what other tests left behind would be freed inside
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run()
    finally:
        gc.enable()
    found.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes, initial=0))


def checkpointed(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=False)
    return model


def both(rank: int, ranks: int, training: bool, recomputed: bool, path: Path, group: str = "") -> tuple[int, int]:
    """Bytes of a step of one rank, tracked and seen by the allocator; the inputs are in both."""
    model, args, _ = build(layers=2, hidden=32, heads=4, frames=16, tokens=64)
    model = checkpointed(model) if recomputed else model
    with torch.set_grad_enabled(training):
        program = capture(model, args)
        prepared = prepare(program, as_mesh(str(ranks)), Options.of())
        _, graph = finish(prepared, decide(prepared), rank, lambda _: group)
        local = local_module(graph, program.module)
        held = dict(model.named_parameters())
        values = [args[0] if entry.kind == "input" else held[entry.name] for entry in program.inputs]

        def run():
            (out,) = local(*values)
            if training:
                loss = Loss.apply(out)
                torch.autograd.backward(loss, loss.new_empty(0))

        tracked = track(program, graph).peak_bytes
        seen = sum(value.nbytes for value in values) + allocated(run, path / f"{rank}.json")
    # A checkpoint keeps the state of the random numbers; at the peak, in the last block, all do.
    return tracked, seen - (torch.get_rng_state().nbytes * len(model.blocks) if recomputed and training else 0)


@pytest.mark.parametrize("training, recomputed", [(True, False), (True, True), (False, False)])
def test_tracked_bytes_are_those_that_an_allocator_sees(training, recomputed, tmp_path):
    tracked, seen = both(0, 1, training, recomputed, tmp_path)
    assert tracked == seen


def without_peers(rank: int, ranks: int, *args) -> tuple[int, int]:
    """Collectives move nothing here. Those of gloo let go of what they sent a moment later, another one in each run."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

    return both(rank, ranks, *args, dist.new_group(backend="fake").group_name)


@pytest.mark.parametrize("training, recomputed", [(True, False), (True, True), (False, False)])
def test_so_they_are_where_ranks_communicate(world, training, recomputed, tmp_path):
    for tracked, seen in world(2).run(without_peers, training, recomputed, tmp_path):
        assert tracked == seen
