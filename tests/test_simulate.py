"""Ranks simulated in one process do what processes of their own do, and where those would hang there is an error."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto import simulate
from dsp_auto.errors import AgreementError, DspError
from dsp_auto.measure import CountCollectives
from dsp_auto.mesh import Mesh
from tests import test_primitives as on_processes

dsp = torch.ops.dsp
WAIT = "wait for each other for ever"
DIFFER = "do not issue the same collective"


# The primitives keep their promises: what test_primitives checks on processes holds here too.


@pytest.fixture
def simulated(monkeypatch):
    """`simulated(n).run(fn, *args)`, as `world(n)` is called."""
    monkeypatch.setattr(on_processes, "_group", lambda: "line")

    class Simulated:
        def __init__(self, ranks):
            self.ranks = ranks

        def run(self, fn, *args):
            return simulate.run(self.ranks, lambda rank: fn(rank, self.ranks, *args))

    assert not torch.distributed.is_initialized()
    return Simulated


@pytest.mark.parametrize("ranks, shape, i, j", on_processes.CASES)
def test_primitives_and_their_adjoints_equal_one_process(simulated, ranks, shape, i, j):
    simulated(ranks).run(on_processes._check_switch, shape, i, j)
    simulated(ranks).run(on_processes._check_one_dim, shape, i)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_dtype_and_tensors_without_elements_move(simulated, ranks):
    simulated(ranks).run(on_processes._check_other_dtypes)
    simulated(ranks).run(on_processes._check_empty)


def test_replicate_sums_gradients(simulated):
    simulated(4).run(on_processes._check_replicate, [torch.float32, torch.bfloat16, torch.float32])
    simulated(3).run(on_processes._check_replicate_of_parameter)
    simulated(3).run(on_processes._check_replicate_of_different_losses)


@pytest.mark.parametrize("ranks, size", [(2, 5), (3, 4)])
def test_gradients_of_gradients_are_those_of_one_process(simulated, ranks, size):
    simulated(ranks).run(on_processes._check_double_backward, size)


def test_no_grad_inference_mode_and_checkpoints_work(simulated):
    simulated(2).run(on_processes._check_modes)


def test_counted_bytes_are_those_that_processes_send(simulated):
    on_processes.test_measured_wire_bytes_are_those_of_the_design(simulated, 4)
    on_processes.test_uneven_shards_send_no_padding(simulated)


# many groups


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 1, 2)])
def test_every_line_of_a_mesh_is_a_group_of_its_own(sizes):
    mesh = Mesh(tuple("abc"[: len(sizes)]), sizes)
    whole = torch.arange(7 * 8 * 5.0).reshape(7, 8, 5)

    def cut(x, coordinate):
        for m, c in enumerate(coordinate):
            x = x.tensor_split(sizes[m], m)[c]
        return x

    def program(rank):
        coordinate = mesh.coordinate(rank)
        x = cut(whole, coordinate).clone().requires_grad_()
        y = x
        for m, c in enumerate(coordinate):
            line = f"{m} of {(*coordinate[:m], *coordinate[m + 1 :])}"
            y = dsp.gather(y, m, whole.shape[m], sizes[m], c, line)
        (y * whole).sum().backward()
        return y, x.grad

    for rank, (y, grad) in enumerate(simulate.run(mesh.ranks, program)):
        assert torch.equal(y, whole)
        assert torch.equal(grad, cut(whole, mesh.coordinate(rank)))


def test_groups_may_be_a_part_of_the_ranks():
    def program(rank):
        return None if rank == 0 else dsp.reduce(torch.ones(2) * rank, 2, rank - 1, "the last two")

    nothing, *sums = simulate.run(3, program)
    assert nothing is None and all(torch.equal(total, torch.full((2,), 3.0)) for total in sums)


# order, random numbers, modes


def test_sums_are_made_in_rank_order():
    terms = [1e30, 1.0, -1e30, 2.0]

    def program(rank):
        return [dsp.reduce(torch.tensor([terms[(rank + k) % 4]]), 4, rank, "line").item() for k in range(2)]

    first = torch.tensor(terms, dtype=torch.float32)
    expected = [(((first[k] + first[k + 1]) + first[(k + 2) % 4]) + first[(k + 3) % 4]).item() for k in range(2)]
    assert simulate.run(4, program) == [expected] * 4


def test_a_rank_draws_what_a_process_of_its_own_would():
    def draws(rank, meet):
        torch.manual_seed(rank)
        found = []
        for _ in range(3):
            found.append(torch.rand(rank + 1))
            meet()
        return torch.cat(found)

    def program(rank):
        return draws(rank, lambda: dsp.reduce(torch.ones(1), 3, rank, "line"))

    for rank, drawn in enumerate(simulate.run(3, program)):
        with torch.random.fork_rng(devices=[]):
            assert torch.equal(drawn, draws(rank, lambda: None))


def test_ranks_start_in_the_callers_random_state_and_leave_it():
    torch.manual_seed(5)
    drawn = simulate.run(3, lambda rank: torch.rand(4))
    assert torch.equal(torch.stack(drawn), torch.rand(4).expand(3, 4))


def test_ranks_start_in_the_callers_grad_mode():
    def program(rank):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert simulate.run(1, program) == [(True, False)]
    with torch.no_grad():
        assert simulate.run(1, program) == [(False, False)]
    with torch.inference_mode():
        assert simulate.run(1, program) == [(False, True)]


def test_fake_tensors_meet_nobody():
    def program(rank):
        with FakeTensorMode():
            return dsp.gather(torch.empty(2 if rank else 3, 4), 0, 5, 2, rank, "line").shape

    assert simulate.run(2, program) == [(5, 4), (5, 4)]


def test_results_of_different_ranks_share_no_memory():
    def program(rank):
        total = dsp.reduce(torch.ones(2), 2, rank, "line")
        gathered = dsp.gather(torch.ones(2), 0, 4, 2, rank, "line")
        total += rank
        gathered += rank
        dsp.reduce(torch.ones(1), 2, rank, "line")
        return total.tolist(), gathered.tolist()

    assert simulate.run(2, program) == [([2.0] * 2, [1.0] * 4), ([3.0] * 2, [2.0] * 4)]


def test_a_simulation_may_run_in_a_rank_of_another():
    def inner(rank):
        return dsp.reduce(torch.ones(1), 2, rank, "line").item()

    def outer(rank):
        first = simulate.run(2, inner)
        return first, dsp.reduce(torch.ones(1), 3, rank, "line").item()

    assert simulate.run(3, outer) == [([2.0, 2.0], 3.0)] * 3


# what real ranks would answer with a hang


def _reduce(rank, *shape, group="line", ranks=2, dtype=torch.float32):
    return dsp.reduce(torch.ones(*shape, dtype=dtype), ranks, rank, group)


def _switch(rank, size):
    return dsp.switch(torch.ones(len(torch.arange(size).tensor_split(2)[rank]), 4), 0, size, 1, 2, rank, "line")


@pytest.mark.parametrize(
    "program, message",
    [
        (lambda rank: _reduce(rank, 4) if rank else dsp.gather(torch.ones(2), 0, 4, 2, 0, "line"), DIFFER),
        (lambda rank: _reduce(rank, 4 + rank), DIFFER),
        (lambda rank: _reduce(rank, 4, dtype=torch.float64 if rank else torch.float32), DIFFER),
        (lambda rank: _reduce(rank, 2, 3 + rank), DIFFER),
        (lambda rank: _reduce(rank, 4, ranks=2 + rank), DIFFER),
        (lambda rank: _reduce(0, 4), DIFFER),
        (lambda rank: _switch(rank, 5 + rank), DIFFER),
        (lambda rank: [_reduce(rank, 4) for _ in range(1 + rank)], WAIT),
        (lambda rank: _reduce(rank, 4, group=f"line {rank}"), WAIT),
        (lambda rank: rank or _reduce(rank, 4), WAIT),
        (lambda rank: rank and _reduce(rank, 4), WAIT),
    ],
)
def test_ranks_that_do_not_meet_are_an_error(program, message):
    before = threading.enumerate()
    with pytest.raises(AgreementError, match=message):
        simulate.run(2, program)
    assert threading.enumerate() == before


def test_the_error_names_both_ranks_and_their_collectives():
    with pytest.raises(AgreementError) as error:
        simulate.run(3, lambda rank: None if rank == 0 else _reduce(rank - 1, rank))
    assert "rank 1 (0 of 2 in group 'line') is in reduce forward, all_reduce of float32[1]" in str(error.value)
    assert "rank 2 (1 of 2 in group 'line') is in reduce forward, all_reduce of float32[2]" in str(error.value)


def test_a_rank_without_a_backward_is_an_error():
    def program(rank):
        x = torch.ones(2, requires_grad=True)
        (y,) = dsp.replicate([x], 2, rank, "line")
        (y if rank else x).sum().backward()

    with pytest.raises(AgreementError, match=f"{WAIT}.*rank 1 .* is in replicate backward"):
        simulate.run(2, program)


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("meetings", [0, 2])
def test_a_rank_that_raises_ends_all_ranks_with_its_exception(culprit, meetings):
    went_on = []

    def program(rank):
        for _ in range(meetings):
            _reduce(rank, 4, ranks=3)
        if rank == culprit:
            raise KeyError("culprit")
        try:
            _reduce(rank, 4, ranks=3)
        except Exception:  # a program that holds its errors up does not hold this up
            went_on.append(rank)
        went_on.append(rank)

    before = threading.enumerate()
    with pytest.raises(KeyError, match="culprit") as error:
        simulate.run(3, program)
    assert error.value.__notes__ == [f"on rank {culprit} of 3 simulated ranks"]
    assert not went_on and threading.enumerate() == before


def test_a_rank_that_raises_in_backward_ends_all_ranks():
    def program(rank):
        x = torch.ones(2, requires_grad=True)
        y = dsp.reduce(x * 2, 2, rank, "line", True)
        if rank:
            y.register_hook(lambda grad: 1 / 0)
        y.sum().backward()

    before = threading.enumerate()
    with pytest.raises(ZeroDivisionError):
        simulate.run(2, program)
    assert threading.enumerate() == before


def test_tensors_of_other_devices_are_refused():
    with pytest.raises(DspError, match="cannot simulate.*CPU"):
        simulate.run(2, lambda rank: dsp.reduce(torch.ones(3, device="meta"), 2, rank, "line"))


def test_nothing_is_simulated_outside():
    simulate.run(2, lambda rank: _reduce(rank, 4))
    assert simulate.current(torch.ones(1)) is None


def test_each_rank_counts_its_own_traffic():
    def program(rank):
        with CountCollectives() as count:
            dsp.gather(torch.ones(2 if rank else 3, 4), 0, 5, 2, rank, "line")
        _reduce(rank, 4)  # outside: not counted
        return dict(count.counts), count.by_primitive

    (first, bytes_of_0), (second, bytes_of_1) = simulate.run(2, program)
    assert first == second == {"all_to_all_single": 1}
    assert bytes_of_0 == {("gather", "forward"): (1, 48)} and bytes_of_1 == {("gather", "forward"): (1, 32)}
