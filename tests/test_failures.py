"""Where a rank dies or lags the others raise, and say which rank, in which primitive and stage; none hangs."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing import get_context

import dsp_auto
from dsp_auto.c10d import group_called, timeout_of, world_store
from dsp_auto.examples.transformer_2d import build

SMALL = dict(layers=2, hidden=16, heads=2, frames=6, tokens=8)
SOON = timedelta(seconds=4)


def _stops_in(where, model, when):
    """This process ends in the middle of a step, in the forward or in the backward of a block, once `when` says so."""

    def leave(*_):
        if when():
            os._exit(7)

    block = model.blocks[2]
    if where == "forward":
        block.register_forward_pre_hook(leave)
    else:
        block.register_full_backward_pre_hook(leave)


def _step_that_a_rank_does_not_end(rank, store, where, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=timedelta(minutes=2))
    model, args, kwargs = build(**SMALL)
    leaving = []
    _stops_in(where, model, lambda: bool(leaving))
    parallel = dsp_auto.parallelize(model, DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("sp",)))
    for _ in range(2):
        parallel(*args, **kwargs).square().mean().backward()
    if rank == 1:
        leaving.append(True)
    try:
        parallel(*args, **kwargs).square().mean().backward()
        answers.put((rank, None, ()))
    except dsp_auto.CommunicationError as error:
        answers.put((rank, str(error), error.missing))
    answers.close()
    answers.join_thread()
    os._exit(0)  # destroying the group would wait for the rank that is gone


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ranks_that_wait_for_a_dead_one_raise_and_name_it_the_primitive_and_the_stage(where, tmp_path):
    context = get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_step_that_a_rank_does_not_end, args=(rank, str(tmp_path / "store"), where, answers))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    told = [answers.get(timeout=90) for _ in range(2)]
    for process in ranks:
        process.join()
    assert sorted(rank for rank, _, _ in told) == [0, 2]
    for rank, text, missing in told:
        print(text)
        assert missing == (1,)
        assert "rank 1 did not come" in text and f"in the {where}, rank {rank} of 3" in text
        assert "stage " in text and ("blocks." in text or "output" in text)


def _lags(rank, ranks):
    group = dist.new_group(list(range(ranks)), timeout=SOON)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("sp",))
    model, args, kwargs = build(**SMALL)
    parallel = dsp_auto.parallelize(model, mesh)
    parallel(*args, **kwargs)
    store = dist.PrefixStore("lags", world_store())
    started = time.monotonic()
    if rank == ranks - 1:
        store.wait([str(other) for other in range(ranks - 1)], timedelta(seconds=60))
        return None
    with pytest.raises(dsp_auto.CommunicationError, match=f"rank {ranks - 1} did not come") as raised:
        parallel(*args, **kwargs)
    store.set(str(rank), "")
    assert raised.value.missing == (ranks - 1,)
    return time.monotonic() - started


def test_ranks_that_wait_for_a_slow_one_raise_after_the_timeout_of_the_meshs_group(world):
    waited = world(3).run(_lags)[:2]
    assert all(SOON.total_seconds() - 1 < seconds < 4 * SOON.total_seconds() for seconds in waited)


def _out_of_memory_on_one(rank, ranks):
    x = torch.randn(4, 6)
    with pytest.raises(torch.OutOfMemoryError):
        from dsp_auto.collectives import At, told

        with told(At(ranks, rank, "", "switch", ""), x):
            raise torch.OutOfMemoryError("no room")
    return True


def test_a_lack_of_memory_is_not_taken_for_another_ranks_failure(world):
    assert all(world(2).run(_out_of_memory_on_one))


def _private_names(rank, ranks):
    store = dist.PrefixStore("test", world_store())
    store.set(f"rank{rank}", str(rank))
    group = dist.new_group(list(range(ranks)), timeout=SOON)
    assert group_called(group.group_name) is group
    assert timeout_of(group, torch.device("cpu")) == SOON
    return [int(store.get(f"rank{other}")) for other in range(ranks)]


def test_what_torch_tells_by_private_names_only_is_still_there(world):
    assert world(2).run(_private_names) == [[0, 1]] * 2
