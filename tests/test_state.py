"""What a training step holds beside activations is what torch's optimizers hold, shared out as ZeRO's paper says."""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import reduce
from operator import add

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from dsp_auto.cost_models.state import OPTIMIZERS, StateBytes, TrainingState, as_state, of_parameter
from dsp_auto.errors import StrategyError

SHAPES = [(256, 64), (100, 100), (129,)]
MAKE = {
    "adam": lambda parameters, **how: torch.optim.Adam(parameters, lr=1e-3, **how),
    "adamw": lambda parameters, **how: torch.optim.AdamW(parameters, lr=1e-3, **how),
    "sgd": lambda parameters, **how: torch.optim.SGD(parameters, lr=1e-3, **how),
    "sgd-momentum": lambda parameters, **how: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **how),
}


def make_parameters(*dtypes):
    """The last of each dtype is frozen; the others have gradients."""
    found = [nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes for shape in SHAPES]
    for index, parameter in enumerate(found):
        parameter.requires_grad_(index % len(SHAPES) != len(SHAPES) - 1)
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    return found


def predict(parameters, state):
    return reduce(
        add,
        (of_parameter(p.nbytes, p.itemsize, p.is_floating_point(), p.requires_grad, state) for p in parameters),
        StateBytes(),
    )


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def in_state(optimizer):
    return nbytes(value for held in optimizer.state.values() for value in held.values() if torch.is_tensor(value))


def trace_peak(function, path):
    """The most bytes that PyTorch's CPU allocator gave out during a call, and had not got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def step_on_copies(parameters, optimizer):
    """A step on float32 copies of 16-bit parameters, which get float32 gradients for it."""
    copies = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, copy in zip(parameters, copies):
        copy.grad = parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for parameter, copy in zip(parameters, copies):
            parameter.copy_(copy)
            copy.grad = None


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_what_an_optimizer_holds_is_what_torch_holds_after_a_step(name, dtypes):
    parameters = make_parameters(*dtypes)
    optimizer = MAKE[name](parameters)
    optimizer.step()
    found = predict(parameters, as_state(name))
    assert found.parameters == nbytes(parameters)
    assert found.gradients == nbytes(p.grad for p in parameters)
    assert found.optimizer == in_state(optimizer)
    assert (found.gathered, found.unreduced) == (0, 0)


@pytest.mark.parametrize("name", MAKE)
def test_fp32_copies_are_held_beside_the_optimizers_state_which_is_fp32_too(name):
    parameters = [p for p in make_parameters(torch.bfloat16) if p.requires_grad]
    copies = [p.detach().float().requires_grad_() for p in parameters]
    optimizer = MAKE[name](copies)
    step_on_copies(parameters, optimizer)
    found = predict(parameters, TrainingState(name, master_weights=True))
    assert found.parameters == found.gradients == nbytes(parameters)
    assert found.optimizer == nbytes(copies) + in_state(optimizer)


@pytest.mark.parametrize(
    ("itemsize", "is_floating", "requires_grad"), [(4, True, True), (8, True, True), (8, False, True), (2, True, False)]
)
def test_only_trained_parameters_of_16_bits_get_an_fp32_copy(itemsize, is_floating, requires_grad):
    one, other = TrainingState(), TrainingState(master_weights=True)
    assert of_parameter(64, itemsize, is_floating, requires_grad, one) == of_parameter(
        64, itemsize, is_floating, requires_grad, other
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_frozen_parameter_is_held_and_nothing_else(name, zero):
    state = TrainingState(name, zero=zero, data_parallel=4)
    assert of_parameter(4096, 2, True, False, state) == StateBytes(parameters=4096)


def test_a_complex_parameter_has_two_moments_of_its_own_dtype():
    parameter = nn.Parameter(torch.randn(16, 3, dtype=torch.complex64))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    assert predict([parameter], TrainingState(master_weights=True)).optimizer == in_state(optimizer)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_a_step_takes_what_torch_allocates_for_it(name, dtypes, tmp_path):
    parameters = make_parameters(*dtypes)
    optimizer = MAKE[name](parameters, foreach=True)
    optimizer.step()  # makes the state
    measured = trace_peak(optimizer.step, tmp_path / "trace.json")
    assert 0 <= measured - predict(parameters, as_state(name)).step <= 32  # scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_weight_decay_costs_a_step_of_sgd_another_copy_of_the_gradients(name, dtype, tmp_path):
    parameters = make_parameters(dtype)
    optimizer = MAKE[name](parameters, foreach=True, weight_decay=0.1)
    optimizer.step()
    measured = trace_peak(optimizer.step, tmp_path / "trace.json")
    assert 0 <= measured - predict(parameters, TrainingState(name, weight_decay=True)).step <= 32


def test_with_more_dtypes_than_torch_holds_at_once_a_step_is_never_predicted_too_small(tmp_path):
    parameters = make_parameters(torch.float32, torch.bfloat16, torch.float64)
    optimizer = torch.optim.Adam(parameters, foreach=True)
    optimizer.step()
    found = predict(parameters, as_state("adam")).step
    assert found * 0.7 < trace_peak(optimizer.step, tmp_path / "trace.json") < found


@pytest.mark.parametrize("weight_decay", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_a_step_on_fp32_copies_takes_fp32_gradients_too(name, weight_decay, tmp_path):
    parameters = [p for p in make_parameters(torch.bfloat16) if p.requires_grad]
    copies = [p.detach().float().requires_grad_() for p in parameters]
    optimizer = MAKE[name](copies, foreach=True, weight_decay=0.1 if weight_decay else 0)
    step_on_copies(parameters, optimizer)
    measured = trace_peak(lambda: step_on_copies(parameters, optimizer), tmp_path / "trace.json")
    found = predict(parameters, TrainingState(name, master_weights=True, weight_decay=weight_decay)).step
    assert 0 <= measured - found <= 32


@pytest.mark.parametrize("name", MAKE)
def test_a_step_of_3_gb_takes_what_mem_tracker_counts_on_fake_tensors(name):
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(side, 1024, dtype=torch.bfloat16)) for side in (500_000, 1_000_000)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        moments = [[torch.empty_like(parameter) for parameter in parameters] for _ in range(3)]
    optimizer = MAKE[name](parameters, foreach=True)
    for parameter, first, second, buffer in zip(parameters, *moments):
        # Made here, as a fake `step` has no value to read.
        if "adam" in name:
            optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
        elif "momentum" in name:
            optimizer.state[parameter] = {"momentum_buffer": buffer}
    tracker = MemTracker()
    tracker.track_external(*parameters, optimizer)
    with tracker:
        before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
        optimizer.step()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before
    assert 0 <= measured - predict(parameters, as_state(name)).step <= 64  # scalars


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_mixed_precision_adam_under_zero_takes_what_the_papers_figure_1_says(zero, gigabytes):
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, 64 ranks, 2 + 2 + 12 bytes each.
    state = TrainingState("adam", master_weights=True, zero=zero, data_parallel=1 if zero == 0 else 64)
    found = of_parameter(2 * 7_500_000_000, 2, True, True, state)
    assert found.held == pytest.approx(gigabytes * 1e9, abs=0.05e9)


@pytest.mark.parametrize(
    ("zero", "parameters", "gradients", "optimizer"), [(1, 1000, 1000, 1000), (2, 1000, 334, 1000), (3, 334, 334, 1000)]
)
def test_each_stage_of_zero_shares_out_one_thing_more(zero, parameters, gradients, optimizer):
    # 500 elements over 3 ranks are at most 167 each: 2 bytes of each tensor, or 4 + 4 + 4 of the copy and moments.
    found = of_parameter(1000, 2, True, True, TrainingState("adam", False, zero, 3))
    assert (found.parameters, found.gradients, found.optimizer) == (parameters, gradients, 2 * 334 + 4)
    found = of_parameter(1000, 2, True, True, TrainingState("adam", True, zero, 3))
    assert (found.parameters, found.gradients, found.optimizer) == (parameters, gradients, 167 * 12 + 4)
    assert found.step == 167 * 8


def test_what_zero_shares_out_is_whole_while_it_is_used():
    def whole(zero, requires_grad=True):
        found = of_parameter(1000, 2, True, requires_grad, TrainingState(zero=zero, data_parallel=4))
        return found.gathered, found.unreduced

    assert [whole(zero) for zero in range(4)] == [(0, 0), (0, 0), (0, 1000), (1000, 1000)]
    assert whole(3, requires_grad=False) == (1000, 0)  # shared out and gathered like the others


def test_bytes_of_half_a_parameter_are_half_the_bytes():
    for name in OPTIMIZERS:
        for zero in range(4):
            state = TrainingState(name, True, zero, 2, weight_decay=True)
            scalar = 4 if "adam" in name else 0
            whole, half = (of_parameter(size, 2, True, True, state) for size in (4096, 2048))
            fields = zip(astuple(whole), astuple(half), (0, 0, scalar, 0, 0, 0))
            assert all(one - fixed == 2 * (other - fixed) for one, other, fixed in fields)


def test_the_bytes_of_two_parameters_add_up():
    assert StateBytes(1, 2, 3, 4, 5, 6) + StateBytes(10, 20, 30, 40, 50, 60) == StateBytes(11, 22, 33, 44, 55, 66)
    assert StateBytes(1, 2, 4, 8, 16, 32).held == 7


def test_a_state_is_a_name_or_made_and_none_has_no_optimizer():
    state = TrainingState("sgd", zero=1, data_parallel=2)
    assert as_state(state) is state
    assert as_state("sgd-momentum") == TrainingState("sgd-momentum")
    assert as_state(None) == TrainingState("none")
    found = of_parameter(1000, 4, True, True, as_state(None))
    assert found == StateBytes(parameters=1000, gradients=1000)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: as_state("lion"), "lion.*adam, adamw, sgd, sgd-momentum, none.*Use one"),
        (lambda: as_state(3), "3.*TrainingState"),
        (lambda: as_state(["adam"]), "adam.*TrainingState"),
        (lambda: TrainingState("Adam"), "'Adam'.*Use one"),
        (lambda: TrainingState(zero=4), "zero=4.*0 to 3"),
        (lambda: TrainingState(zero=True), "zero=True"),
        (lambda: TrainingState(zero=2), "ZeRO-2.*data_parallel is 1.*data_parallel=.*or zero=0"),
        (lambda: TrainingState(data_parallel=0), "data_parallel=0.*1 or more"),
        (lambda: TrainingState(data_parallel=2.0), "data_parallel=2.0"),
        (lambda: TrainingState(master_weights="yes"), "master_weights='yes'.*True or False"),
        (lambda: TrainingState(weight_decay=0.1), "weight_decay=0.1.*True or False"),
    ],
)
def test_a_state_that_does_not_exist_is_refused_with_what_to_do(make, says):
    with pytest.raises(StrategyError, match=says):
        make()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (TrainingState(), "adam"),
        (TrainingState("none"), "no optimizer"),
        (TrainingState("sgd", weight_decay=True), "sgd with weight decay"),
        (TrainingState("adam", True, 3, 8), "adam, float32 copies of 16-bit parameters, ZeRO-3 over 8 ranks"),
    ],
)
def test_a_state_reads_as_a_line(state, text):
    assert str(state) == text
