"""A training step of the paper's Transformer-2D: `dsp_auto.parallelize` against the same model with the four calls of the
paper written in by hand; and, on a mesh of one rank, against the plain module.

By hand means plain collectives: the video is cut along T at the start, one `all_to_all_single` stands between blocks, the
output is gathered at the end, and after backward the gradients are all-reduced in flat buckets of 25 MiB. A step is
forward, loss and backward. Both run in one process group on the same video, in pairs that swap who goes first; a step
lasts as long as its slowest rank. Outputs and gradients of both are compared first. Prints a table and writes JSON:
milliseconds of a step and the median of the ratios of pairs (below 1: dsp_auto is faster).

    python benchmarks/step.py [--pairs 20] [--ranks 2] [-a hidden=256 layers=2 ...] [--out benchmarks/results/step.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tabulate
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.examples.transformer_2d import build
from dsp_auto.verify import deviation

SIZES = {"layers": 2, "hidden": 256, "heads": 8, "frames": 16, "tokens": 256, "batch": 1}
BARS = {"by hand": 1.02, "plain module": 1.03}
BUCKET_BYTES = 25 * 2**20
TOLERANCE = 1e-4
T, S = 1, 2  # the dims of [B, T, S, C] that are sharded


class Switch(torch.autograd.Function):
    """[B, T/N, S, C] -> [B, T, S/N, C], or the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather_dim: int, scatter_dim: int) -> Tensor:
        ctx.dims = scatter_dim, gather_dim
        return all_to_all(x, gather_dim, scatter_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return all_to_all(grad, *ctx.dims), None, None


def all_to_all(x: Tensor, gather_dim: int, scatter_dim: int) -> Tensor:
    sends = torch.stack(x.chunk(dist.get_world_size(), scatter_dim))
    receives = torch.empty_like(sends)
    dist.all_to_all_single(receives, sends)
    return torch.cat(receives.unbind(0), gather_dim)


class Gather(torch.autograd.Function):
    """[B, T, S/N, C] -> [B, T, S, C]. Every rank computes the same loss, so its gradient is a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad.chunk(dist.get_world_size(), ctx.dim)[dist.get_rank()], None


class ByHand(nn.Module):
    """`examples.transformer_2d` in its 4-D habit, parallel by four calls. For sizes that divide."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        model = self.model
        x = model.embed(video.chunk(dist.get_world_size(), T)[dist.get_rank()])
        for number, block in enumerate(model.blocks):
            if number:
                x = Switch.apply(x, T, S) if block.over == "time" else Switch.apply(x, S, T)
            x = block(x, x.shape[:3])
        return Gather.apply(model.head(model.norm(x)), S)

    def reduce_gradients(self) -> None:
        bucket: list[Tensor] = []
        for parameter in [*self.parameters(), None]:
            full = sum(grad.nbytes for grad in bucket) >= BUCKET_BYTES
            if bucket and (parameter is None or full):
                flat = torch.cat([grad.view(-1) for grad in bucket])
                dist.all_reduce(flat)
                for grad, piece in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                    grad.copy_(piece.view_as(grad))
                bucket = []
            if parameter is not None:
                bucket.append(parameter.grad)


def step(model: nn.Module, video: Tensor, target: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.grad = None
    output = model(video)
    nn.functional.mse_loss(output, target).backward()
    if isinstance(model, ByHand):
        model.reduce_gradients()
    return output.detach()


def seconds(call: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(ours: nn.Module, theirs: nn.Module, video: Tensor, pairs: int) -> dict[str, float]:
    """Median milliseconds of both, the median ratio of `pairs` pairs, and how far outputs and gradients are apart."""
    target = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    outputs = [step(model, video, target) for model in (ours, theirs)]
    grads = [[parameter.grad.clone() for parameter in model.parameters()] for model in (ours, theirs)]
    scale = statistics.median(grad.abs().max().item() for grad in grads[1]) * 1e-2
    apart = max(deviation(*outputs), *(deviation(a, b, scale) for a, b in zip(*grads, strict=True)))
    if apart > TOLERANCE:
        raise RuntimeError(f"the two steps differ by {apart:.1e}")
    times = torch.empty(pairs, 2, dtype=torch.float64)
    for pair in range(-2, pairs):  # the first ones warm up
        for which in (0, 1) if pair % 2 else (1, 0):
            took = seconds(lambda which=which: step((ours, theirs)[which], video, target))
            if pair >= 0:
                times[pair, which] = took
    dist.all_reduce(times, dist.ReduceOp.MAX)
    own, other = times.T.tolist()
    ratios = [a / b for a, b in zip(own, other)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "dsp_auto_ms": statistics.median(own) * 1e3,
        "other_ms": statistics.median(other) * 1e3,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "apart": apart,
    }


def run(rank: int, ranks: int, sizes: dict[str, Any], pairs: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    model, (video,), _ = build(**sizes)
    twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    parallel = dsp_auto.parallelize(model, mesh, (video,))
    other = "plain module" if ranks == 1 else "by hand"
    found = compare(parallel, twin if ranks == 1 else ByHand(twin), video, pairs)
    if rank == 0:
        row = {"ranks": ranks, "other": other} | found | {"bar": BARS[other]}
        Path(folder, f"{ranks}.json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("-a", dest="sizes", nargs="+", default=[], metavar="NAME=NUMBER", help=f"instead of {SIZES}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    options = parser.parse_args()
    sizes = SIZES | {name: int(value) for name, value in (entry.split("=") for entry in options.sizes)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            torch.multiprocessing.spawn(run, (ranks, sizes, options.pairs, folder), nprocs=ranks)
            rows.append(json.loads(Path(folder, f"{ranks}.json").read_text()))
    print(", ".join(f"{name} {value}" for name, value in sizes.items()), f"- {options.pairs} pairs\n")
    shown = [r | {"ratio_quartiles": " to ".join(f"{q:.3f}" for q in r["ratio_quartiles"])} for r in rows]
    print(tabulate.tabulate(shown, headers="keys", floatfmt=("", "", ".0f", ".0f", ".3f", "", ".0e", ".2f")))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "device": "cpu", "cpus": os.cpu_count()}
    options.out.write_text(json.dumps(where | {"pairs": options.pairs, "sizes": sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
