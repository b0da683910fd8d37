"""A rehearsal says what all ranks of a mesh end with, and how far that is from one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dsp_auto.rehearse as rehearsal
from dsp_auto.errors import CaptureError, DspError, LayoutError, NoShardableFactorError
from dsp_auto.rehearse import rehearse
from dsp_auto.verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation
from tests.graphs import random_program
from tests.test_parallelize import Axial, WithStatistics


def axial():
    torch.manual_seed(0)
    return Axial().double(), torch.randn(2, 6, 5, 8, dtype=torch.float64, requires_grad=True)


def agrees(found) -> bool:
    return max(found.output[0], found.gradient[0]) < 1e-12 and all(entry.agrees for entry in found.traffic)


@pytest.mark.parametrize("mesh", ["1", "2", "3", "5", "2x2", "1x3"])
def test_all_ranks_end_with_what_one_device_has(mesh):
    model, x = axial()
    found = rehearse(model, mesh, (x,), {"scale": 0.5})
    assert agrees(found)
    whole = model(x, scale=0.5)
    for rank in found.ranks:
        torch.testing.assert_close(list(rank.outputs.values())[:2], [whole["x"].detach(), whole["mean"].detach()])
        assert rank.gradients.keys() == {"input x", *(name for name, _ in model.named_parameters())}


@pytest.mark.parametrize("ranks, in_dim, out_dim", [(2, 1, 2), (4, 2, 1)])
def test_parts_are_cut_as_the_layouts_say(ranks, in_dim, out_dim):
    model, x = axial()
    found = rehearse(model, str(ranks), (x,), in_layouts={"x": {"sp": in_dim}}, out_layouts=[{"sp": out_dim}, None])
    assert agrees(found)
    whole = model(x)["x"].detach()
    for number, rank in enumerate(found.ranks):
        torch.testing.assert_close(rank.outputs["output 0"], whole.tensor_split(ranks, out_dim)[number])
        assert rank.gradients["input x"].shape == x.tensor_split(ranks, in_dim)[number].shape


def test_nothing_of_the_model_changes_and_its_buffers_are_compared():
    torch.manual_seed(0)
    model, x = WithStatistics().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = rehearse(model, "3", (x,))
    assert agrees(found)
    assert {"buffer norm.running_mean", "buffer norm.num_batches_tracked"} <= found.ranks[0].outputs.keys()
    assert not torch.equal(found.ranks[0].outputs["buffer norm.running_mean"], before["norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        x = x + self.first(x).softmax(1)
        return x + self.second(x).softmax(2)


def test_tied_frozen_and_unused_parameters():
    torch.manual_seed(0)
    found = rehearse(_Tied().double(), "3", (torch.randn(2, 6, 5, 4, dtype=torch.float64),))
    assert agrees(found)
    assert "second.bias" not in found.ranks[0].gradients and found.ranks[0].gradients["unused.weight"] is None


def test_random_numbers_are_those_of_one_device_where_the_plan_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Softmax(1), nn.Dropout(0.5), nn.Softmax(2), nn.Dropout(0.5)).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    assert agrees(rehearse(model, "3", (x,), rng="serial"))


def test_without_gradients():
    model, x = axial()
    with torch.no_grad():
        found = rehearse(model, "2", (x,))
    assert agrees(found) and found.output[1] and all(grad is None for grad in found.ranks[0].gradients.values())


def test_a_rank_that_computes_something_else_is_found(monkeypatch):
    written = rehearsal.finish

    def wrong(prepared, solution, rank, groups):
        plan, graph = written(prepared, solution, rank, groups)
        if rank == 1:
            node = next(node for node in graph.nodes if node.target is torch.ops.aten.softmax.int)
            with graph.inserting_after(node):
                scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, 2))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return plan, graph

    monkeypatch.setattr(rehearsal, "finish", wrong)
    model, x = axial()
    found = rehearse(model, "2", (x,))
    assert found.output[0] > 1e-3 and found.gradient[0] > 1e-3


def test_an_output_of_another_dtype_is_an_error(monkeypatch):
    written = rehearsal.finish

    def wrong(*given):
        plan, graph = written(*given)
        output = graph.output_node()
        with graph.inserting_before(output):
            other = graph.call_function(torch.ops.aten.to.dtype, (output.args[0][0], torch.float32))
        output.args = ((other, *output.args[0][1:]),)
        return plan, graph

    monkeypatch.setattr(rehearsal, "finish", wrong)
    model, x = axial()
    with (
        torch.no_grad(),
        pytest.raises(DspError, match="output 0 on rank 0 is torch.float32.*one device has torch.float64"),
    ):
        rehearse(model, "2", (x,))


def test_what_cannot_be_planned_is_the_planners_error():
    model, x = axial()
    with pytest.raises(NoShardableFactorError):
        rehearse(nn.Linear(8, 8).double(), "2", (x,), strategy="dsp")
    with pytest.raises(LayoutError, match="names the input 'y'"):
        rehearse(model, "2", (x,), in_layouts={"y": {"sp": 1}})


def test_a_captured_program_takes_the_values_of_its_inputs():
    program = replace(random_program(3, 12, True), seconds={"export": 0.0, "capture": 0.0})
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [
        torch.randn(node.meta["val"].shape).requires_grad_(entry.kind == "parameter")
        for node, entry in zip(nodes, program.inputs)
    ]
    found = rehearse(program, "3", values)
    assert found.output[0] < 1e-5 and found.gradient[0] < 1e-4 and found.ranks[0].gradients


class DoesNotNest(nn.Module):
    """A dim of (3, 4) read as (4, 3): that dim stays whole, the ones beside it are sharded as ever."""

    def forward(self, x):
        parts = x.unflatten(0, (3, 4)).softmax(1).flatten(0, 1)
        return parts.reshape(4, 3, 5, 7).softmax(2).sin() + parts.softmax(2).reshape(4, 3, 5, 7)


@pytest.mark.parametrize("mesh", ["2", "3", "2x2"])
def test_dims_beside_one_that_does_not_nest_are_sharded(mesh):
    found = rehearse(DoesNotNest(), mesh, (torch.randn(12, 5, 7, requires_grad=True),))
    assert found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE


class Writes(nn.Module):
    """Attention beside a tensor or a buffer that is written in place."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("held", torch.zeros(2, 7, 8))

    def attend(self, x):
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

    def forward(self, x):
        return self.write(self, self.attend(x))


def _new_tensor(self, y):
    z = torch.zeros(2, 7, 8)
    with torch.no_grad():
        z[:, 1:3] = y[:, 2:4]
    return z * 2 + y


def _buffer(self, y):
    with torch.no_grad():
        self.held[:, ::3] += y[:, ::3]
    return self.held * 2 + y


def _cache(self, y):
    with torch.no_grad():
        self.held[:, :3] = self.held[:, 3:6]
        self.held[:, 3:6] = y[:, 1:4]
    return self.attend(torch.cat([self.held, y], 1))


def _running_mean(self, y):
    with torch.no_grad():
        self.held.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
    return y * self.held


def _set_anew(self, y):
    self.held = (self.held + y).detach()
    return self.held * y


@pytest.mark.parametrize("write", [_new_tensor, _buffer, _cache, _running_mean, _set_anew])
def test_what_is_written_without_gradients_passes_none_on(write):
    found = rehearse(Writes(write), "3", (torch.randn(2, 7, 8, requires_grad=True),))
    assert found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE
    assert all(entry.agrees for entry in found.traffic)


def _own_gradient(self, y):
    z = y.sin()
    with torch.no_grad():
        z.copy_(y)
    return z * 2 + y


def _gradient_from_writing(self, y):
    z = torch.zeros(2, 7, 8)
    z[:, 1:3] = y[:, 2:4]
    with torch.no_grad():
        z.mul_(2)
    return z + y


@pytest.mark.parametrize("write", [_own_gradient, _gradient_from_writing])
def test_a_tensor_with_a_gradient_that_is_changed_without_one_is_refused(write):
    with pytest.raises(CaptureError, match="in place that has a gradient.*detach"):
        rehearse(Writes(write), "3", (torch.randn(2, 7, 8, requires_grad=True),))


def test_infinities_that_are_equal_are_no_deviation():
    one = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    assert deviation(one, one.clone()) == 0
    assert deviation(one, torch.tensor([1.0, 2.0, -torch.inf, torch.nan])) == torch.inf
