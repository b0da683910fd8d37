"""Worlds: gloo processes that stay up, so that many tests share the seconds it takes to start them."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

GRACE = 3.0  # seconds the other ranks get to answer once one rank has failed: they may wait for it forever


class RankError(RuntimeError):
    """A rank raised, died or did not answer. The message holds that rank's traceback.

    `rank`: the first rank that failed. `cause`: its exception where it could be pickled, else None.
    """

    def __init__(self, message: str, rank: int, cause: BaseException | None = None):
        super().__init__(message)
        self.rank, self.cause = rank, cause


class World:
    """`ranks` processes inside one gloo group; they start at the first call, and again after one that failed."""

    def __init__(self, ranks: int, timeout: float = 120.0):
        """`timeout`: seconds a call may take before it counts as a hang."""
        self.ranks, self.timeout = ranks, timeout
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def run(self, fn: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Runs `fn(rank, ranks, *args, **kwargs)` on every rank; returns the results in rank order.

        `fn` is a function of a module that the ranks can import. Arguments and results are pickled: every
        rank gets its own copy. Raises `RankError` where a rank raised, died, or took longer than the timeout.
        """
        return self.run_each(fn, [args] * self.ranks, **kwargs)

    def run_each(self, fn: Callable, args: Sequence[Sequence[Any]], **kwargs: Any) -> list[Any]:
        """`run`, with arguments of its own for each rank: `fn(rank, ranks, *args[rank], **kwargs)`."""
        if len(args) != self.ranks:
            raise ValueError(f"arguments for {len(args)} ranks, but the world has {self.ranks}")
        calls = [pickle.dumps((fn, tuple(mine), kwargs)) for mine in args]
        if not self._processes:
            self._start()
        for pipe, call in zip(self._pipes, calls):
            try:
                pipe.send_bytes(call)
            except OSError:  # died meanwhile; its silence is reported below
                pass
        answers = self._collect()
        failed = {rank: why for rank, (ok, why) in answers.items() if not ok}
        if failed or len(answers) < self.ranks:
            dead = any(not process.is_alive() for process in self._processes)
            if dead or len(failed) < self.ranks:  # the ranks no longer stand at the same collective
                self.stop(force=True)
            raise self._error(failed, silent=[r for r in range(self.ranks) if r not in answers])
        return [answers[rank][1] for rank in range(self.ranks)]

    def stop(self, force: bool = False) -> None:
        """Ends the processes, by force where a rank may wait inside a collective."""
        for pipe in self._pipes:
            pipe.close()  # an idle rank reads the end of its pipe, and leaves
        for process in self._processes:
            if not force:
                process.join(GRACE)
            if process.is_alive():
                process.kill()
            process.join()
        if self._processes:
            self._meeting.cleanup()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = get_context("spawn")
        self._meeting = tempfile.TemporaryDirectory(prefix="world-")
        store = os.path.join(self._meeting.name, "store")
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited; read once, when torch is imported
        try:
            for rank in range(self.ranks):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self.ranks, store, self.timeout, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(GRACE)
                    answers[rank] = (False, (f"died with exit code {self._processes[rank].exitcode}", None))
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _error(self, failed: dict[int, tuple[str, Any]], silent: list[int]) -> RankError:
        if not failed:
            return RankError(f"ranks {silent} of {self.ranks}: no answer in {self.timeout} s", silent[0])
        rank, (report, cause) = next(iter(failed.items()))
        notes = f" (ranks {sorted(failed)} failed)" if len(failed) > 1 else ""
        notes += f" (ranks {silent} did not answer)" if silent else ""
        return RankError(f"rank {rank} of {self.ranks}{notes}:\n{report}", rank, cause)


@contextmanager
def launched(rank: int, ranks: int) -> Iterator[None]:
    """On a rank: what `torchrun` tells a process about itself is in its environment."""
    told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    with mock.patch.dict(os.environ, {name: str(n) for name, n in told.items()}):
        yield


def _serve(rank: int, ranks: int, store: str, timeout: float, pipe: connection.Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(_answer(rank, ranks, call))
    sys.stdout.flush()
    os._exit(0)  # destroying the group would wait for ranks that may be gone


def _answer(rank: int, ranks: int, call: bytes) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(call)
        torch.manual_seed(0)  # every rank draws the same weights, whatever ran on some of them before
        return pickle.dumps((True, fn(rank, ranks, *args, **kwargs)))
    except BaseException as error:  # everything a test function raises belongs to the parent
        report = traceback.format_exc()
        try:
            pickle.loads(cause := pickle.dumps((False, (report, error))))
            return cause
        except Exception:
            return pickle.dumps((False, (report, None)))
