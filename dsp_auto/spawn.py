"""Spawn: run a function on gloo processes of this computer, one thread each, and bring back what they found."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .errors import DspError


def spawn(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """The results of `function(rank, ranks, *args)`, in the order of ranks. Function, arguments and results are pickled.

    Raises the DspError that a rank raised, or what torch.multiprocessing says of a rank that failed otherwise.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited; read once, when torch is imported
    with tempfile.TemporaryDirectory(prefix="dsp-auto-") as folder:
        failure = None
        try:
            torch.multiprocessing.spawn(_worker, (function, ranks, args, folder), nprocs=ranks)
        except Exception as error:
            failure = error
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        for told in sorted(Path(folder).glob("*.error")):
            raise pickle.loads(told.read_bytes()) from failure
        if failure is not None:
            raise failure
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _worker(rank: int, function: Callable[..., Any], ranks: int, args: Sequence[Any], folder: str) -> None:
    """One process: leaves what the function returns in `folder`, or why it returns nothing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(function(rank, ranks, *args)))
        dist.barrier()
    except DspError as error:  # mostly raised on every rank; a rank left alone at a collective sees its peer go
        Path(folder, f"{rank}.error").write_bytes(pickle.dumps(error))
    dist.destroy_process_group()
