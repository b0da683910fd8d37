"""The shared worlds return what the ranks return, and never hang."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.world import RankError, World


def _sum_of_ranks(rank, ranks, offset, scale=1):
    x = torch.tensor([float(rank + offset)])
    dist.all_reduce(x)
    return rank, ranks, x * scale


def _raise_on(rank, ranks, culprit):
    if rank == culprit:
        raise KeyError("culprit")
    if culprit >= 0:
        dist.barrier()  # waits for a rank that never comes


def _die(rank, ranks):
    if rank == 1:
        os._exit(7)


def _raise_everywhere(rank, ranks):
    raise ValueError("everywhere")


def _pid(rank, ranks):
    return os.getpid()


def test_run_returns_every_ranks_result(world):
    for rank, (got, ranks, total) in enumerate(world(2).run(_sum_of_ranks, 1, scale=2)):
        assert (got, ranks, total.item()) == (rank, 2, 6.0)


def test_run_each_gives_each_rank_its_arguments(world):
    assert [total.item() for _, _, total in world(2).run_each(_sum_of_ranks, [(10,), (20,)])] == [31.0, 31.0]


def test_processes_are_shared_between_calls_even_after_all_ranks_raised(world):
    pids = world(2).run(_pid)
    with pytest.raises(RankError, match="everywhere") as error:
        world(2).run(_raise_everywhere)
    assert isinstance(error.value.cause, ValueError)
    assert world(2).run(_pid) == pids


def test_a_rank_that_raises_or_dies_does_not_hang_the_others():
    own = World(2)
    try:
        with pytest.raises(RankError, match="KeyError: 'culprit'") as error:
            own.run(_raise_on, 1)
        assert error.value.rank == 1
        assert own.run(_sum_of_ranks, 0)[0][2].item() == 1.0  # restarted
        with pytest.raises(RankError, match="exit code 7"):
            own.run(_die)
    finally:
        own.stop()


def test_a_call_longer_than_the_timeout_is_an_error():
    own = World(2, timeout=8.0)
    try:
        with pytest.raises(RankError):
            own.run(_wait_for_nobody)
    finally:
        own.stop()


def _wait_for_nobody(rank, ranks):
    if rank == 0:
        dist.barrier()
    else:
        connection_that_never_speaks = os.pipe()[0]
        os.read(connection_that_never_speaks, 1)
