"""Capture takes a model as it is, changes nothing in it, and refuses with a reason what it cannot take."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dsp_auto
from dsp_auto.passes.capture import capture


def video(requires_grad=True):
    return torch.randn(2, 4, 6, 8, requires_grad=requires_grad)


class Function(nn.Module):
    """A model of one linear layer and `function(layer, *args)`."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, *args):
        return self.function(self.linear, *args)


# no_grad regions


def unused_result_before_no_grad(linear, x):
    y = linear(x)
    y + 1
    with torch.no_grad():
        mean = y.mean(1, keepdim=True)
    return x - mean


def unused_result_inside_no_grad(linear, x):
    with torch.no_grad():
        y = linear(x)
        y + 1
        mean = y.mean(1, keepdim=True)
    return x - mean


@pytest.mark.parametrize("function", [unused_result_before_no_grad, unused_result_inside_no_grad])
def test_unused_results_beside_a_no_grad_region_do_not_disturb(function):
    model, x = Function(function), video()
    program = capture(model, (x,))
    assert "set_grad_enabled" not in str(program)
    values = {"parameter": model.state_dict().get, "input": lambda _: x}
    (found,) = program.module(*(values[entry.kind](entry.name) for entry in program.inputs))
    torch.testing.assert_close(found, model(x))


# meta and fake models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.ones(8))
        self.second.register_buffer("table", self.table)

    def forward(self, x, y):
        return self.second(self.first(x) * self.table) * self.second.table + y


def test_a_meta_model_with_tied_weights_is_captured_like_a_real_one():
    with torch.device("meta"):
        model, x = Tied(), torch.randn(2, 4, 8)
    real = torch.randn(2, 4, 8)
    assert str(capture(model, (x, x))) == str(capture(Tied(), (real, real)))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_fake_model_with_meta_arguments_keeps_its_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False))
    x = torch.randn(2, 4, 8, device="meta", requires_grad=True)
    program = capture(model, (x, x))
    assert program.training
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor for name, tensor in before.items()) and len(after) == len(before)


# what requires grad


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("learned", torch.ones(8, requires_grad=True))
        self.register_buffer("fixed", torch.ones(8))
        self.constant = torch.ones(8, requires_grad=True)

    def forward(self, x):
        return x * self.learned + self.fixed * self.constant


def test_buffers_and_constants_that_require_grad_have_gradients_in_the_graph():
    program = capture(Tables(), (video(requires_grad=False),))
    flags = {
        entry.name: node.meta["val"].requires_grad
        for entry, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
    }
    assert flags == {"learned": True, "fixed": False, "constant": True, "x": False}


def test_one_tensor_given_twice_has_one_gradient():
    x = video()
    assert capture(Function(lambda linear, x, y: linear(x) * y), (x, x)).training
    model = Function(lambda linear, x, weight: linear(x) @ weight)
    assert capture(model, (x, model.linear.weight)).training


class Mixed(nn.Module):
    def forward(self, first, second):
        return first + second.detach()


def test_keywords_in_another_order_keep_their_gradients():
    first, second = video(), video(requires_grad=False)
    assert capture(Mixed(), (), {"second": second, "first": first}).training


def test_a_lost_gradient_of_a_buffer_is_refused():
    class Lossy(Tables):
        def forward(self, x):
            return Twice.apply(self.learned) * x

    with pytest.raises(dsp_auto.CaptureError, match="Twice"):
        capture(Lossy(), (video(),))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


# the model stays as it was


class Remembers(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.linear, self.last, self.fails = nn.Linear(8, 8), None, fails
        self.history, self.by_name = ["start"], {"none": 0}

    def forward(self, x):
        y = self.linear(x)
        self.last = self.by_name["last"] = self.new = y.detach()
        self.history.append(y)
        if self.fails and isinstance(self.linear.weight, FakeTensor):
            raise RuntimeError("no")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_that_forward_sets_are_as_before(fails):
    model = Remembers(fails)
    before, history = copy.copy(vars(model)), model.history
    try:
        capture(model, (video(),))
    except dsp_auto.CaptureError:
        assert fails
    assert vars(model) == before
    assert model.last is None and model.by_name == {"none": 0}
    assert model.history is history == ["start"]
    assert not any(isinstance(tensor, FakeTensor) for tensor in model.parameters())


# what is refused


class Two(nn.Module):
    def forward(self, video, text=None, *, scale):
        return video * scale


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((), {"scale": 1.0}, "missing a required argument: 'video'"),
        ((video(),), {"scale": 1.0, "txet": 1}, "got an unexpected keyword argument 'txet'"),
        ((video(),), {}, "missing a required.* argument: 'scale'"),
        ((video(), None, None), {"scale": 1.0}, "too many positional arguments"),
    ],
)
def test_arguments_that_forward_does_not_take_are_named(args, kwargs, message):
    with pytest.raises(dsp_auto.CaptureError, match=message) as caught:
        capture(Two(), args, kwargs)
    assert "Two.forward(video, text=None, *, scale)" in str(caught.value)
    assert "control flow" not in str(caught.value)


def by_cond(linear, x):
    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x + 1, (linear(x),))


@pytest.mark.parametrize("grad", [True, False])
def test_control_flow_on_values_is_refused(grad):
    with torch.set_grad_enabled(grad), pytest.raises(dsp_auto.CaptureError, match="0: cannot plan cond: it runs functions"):
        capture(nn.Sequential(Function(by_cond)), (video(grad),))


def test_parameters_that_belong_to_zero_3_are_refused_with_what_to_use():
    """As DeepSpeed leaves them: marked, and without elements while no module runs."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(1))
    model[0].bias.data = torch.empty(0)
    model[0].bias.ds_id = 1
    with pytest.raises(dsp_auto.CaptureError, match="^0: cannot .*0.bias belongs to DeepSpeed's ZeRO-3.*[Uu]se fully_shard"):
        capture(model, (video(),))


class Decides(nn.Module):
    def forward(self, x):
        print("of the model", file=sys.stderr)
        return x * 2 if x.sum() > 0 else x


def test_what_export_prints_beside_its_error_is_in_the_log_and_not_on_stderr(capsys, caplog):
    model, stream = nn.Sequential(nn.Linear(8, 8), Decides()), sys.stderr
    caplog.set_level(logging.DEBUG, "dsp_auto")
    with pytest.raises(dsp_auto.CaptureError, match="the value of a tensor decides"):
        capture(model, (video(),))
    assert set(capsys.readouterr().err.splitlines()) == {"of the model"} and sys.stderr is stream
    told = [one.getMessage() for one in caplog.records if one.name.startswith("dsp_auto") and one.levelno == logging.DEBUG]
    assert any("aten.item" in message for message in told)
    assert not [one for one in caplog.records if one.name.startswith("torch.fx") and one.levelno >= logging.WARNING]
    assert not logging.getLogger("torch.fx.experimental.symbolic_shapes").filters
