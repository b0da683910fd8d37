"""`switch` against what one writes by hand: `torch.tensor_split`, list `all_to_all`, `torch.cat`
(`all_to_all_single` over packed blocks where shards are uneven on gloo, whose list form wants equal sizes).

Both move the same bytes; they differ in the copies around the collective. Every pair of calls runs in one process
group, alternating and swapping who goes first; a call lasts as long as its slowest rank. Prints a table and
writes JSON: microseconds per call and the median of the ratios of pairs (below 1: `switch` is faster).

    python benchmarks/switch.py [--pairs 60] [--ranks 2 4] [--device cpu] [--out benchmarks/results/switch.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tabulate
import torch
import torch.distributed as dist
from torch import Tensor

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto.shards import shard_sizes

T, S = 1, 2  # the dims of [B, T, S, C] that are sharded
SHAPES = [(1, 16, 256, 128), (2, 16, 256, 128), (1, 51, 250, 128), (2, 51, 250, 128), (2, 64, 256, 256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def by_hand(x: Tensor, gather_dim: int, size: int, scatter_dim: int, ranks: int, rank: int) -> Tensor:
    sends = [block.contiguous() for block in torch.tensor_split(x, ranks, scatter_dim)]
    shapes = [list(sends[rank].shape) for _ in range(ranks)]
    for shape, n in zip(shapes, shard_sizes(size, ranks)):
        shape[gather_dim] = n
    even = size % ranks == 0 and x.shape[scatter_dim] % ranks == 0
    if even or dist.get_backend() != "gloo":
        receives = [x.new_empty(shape) for shape in shapes]
        dist.all_to_all(receives, sends)
    else:  # gloo's list all_to_all wants equal sizes
        lengths = [math.prod(shape) for shape in shapes]
        received = x.new_empty(sum(lengths))
        packed = torch.cat([block.view(-1) for block in sends])
        dist.all_to_all_single(received, packed, lengths, [block.numel() for block in sends])
        receives = [part.view(shape) for part, shape in zip(received.split(lengths), shapes)]
    return torch.cat(receives, gather_dim)


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(x: Tensor, gather_dim: int, size: int, scatter_dim: int, pairs: int) -> dict[str, float]:
    """Median microseconds of both, and the median ratio of `pairs` pairs."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD.group_name
    calls = [
        lambda: torch.ops.dsp.switch(x, gather_dim, size, scatter_dim, ranks, rank, group),
        lambda: by_hand(x, gather_dim, size, scatter_dim, ranks, rank),
    ]
    if not torch.equal(calls[0](), calls[1]()):
        raise RuntimeError("switch and the hand-written code disagree")
    times = torch.empty(pairs, 2, dtype=torch.float64)
    for pair in range(-5, pairs):  # the first ones warm up
        for which in (0, 1) if pair % 2 else (1, 0):
            took = seconds(calls[which], x.device)
            if pair >= 0:
                times[pair, which] = took
    times = times.to(x.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    switch, hand = times.T.tolist()
    return {
        "switch_us": statistics.median(switch) * 1e6,
        "by_hand_us": statistics.median(hand) * 1e6,
        "ratio": statistics.median(s / h for s, h in zip(switch, hand)),
    }


def run(rank: int, ranks: int, device_type: str, pairs: int, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    rows = []
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            for way, (i, j) in {"T -> S": (T, S), "S -> T": (S, T)}.items():
                x = torch.randn(shape, device=device).to(dtype).tensor_split(ranks, i)[rank].contiguous()
                measured = compare(x, i, shape[i], j, pairs)
                rows.append({"ranks": ranks, "dtype": name, "shape": list(shape), "way": way} | measured)
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/switch.json"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            torch.multiprocessing.spawn(run, (ranks, options.device, options.pairs, folder), nprocs=ranks)
            rows += json.loads(Path(folder, f"{ranks}.json").read_text())
    print(
        tabulate.tabulate(
            [r | {"shape": "x".join(map(str, r["shape"]))} for r in rows],
            headers="keys",
            floatfmt=("", "", "", "", ".0f", ".0f", ".2f"),
        )
    )
    median = statistics.median(r["ratio"] for r in rows)
    print(f"\nmedian ratio {median:.2f}, worst {max(r['ratio'] for r in rows):.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "device": options.device, "cpus": os.cpu_count()}
    options.out.write_text(json.dumps(where | {"pairs": options.pairs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
