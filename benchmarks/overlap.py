"""What a plan hides of its communication by issuing collectives early, against issuing each where it is wanted.

Predicted: models at sizes of use on 8 devices of `--hardware`, planned with fake tensors; communication of a training step,
which part of it runs beside other work, and the step's time against that without. Measured: a training step of a small model
on gloo processes, with and without in pairs that swap who goes first, after outputs and gradients of both were found
bit-equal, as if on H100s. There the processes that compute also move the bytes, so nothing is to be gained, and a plan for
CPUs does not do it; it shows what the halves cost. Writes JSON.

    python benchmarks/overlap.py [--hardware h100] [--pairs 20] [--ranks 2] [--out benchmarks/results/overlap.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests, which is not installed

import tabulate
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.predict import predict
from dsp_auto.spawn import spawn
from tests.zoo.axial import AxialTransformer
from tests.zoo.evoformer import EvoformerBlock


def axial(layers: int, hidden: int, heads: int, *sizes: int) -> tuple[nn.Module, tuple]:
    return AxialTransformer(layers, hidden, heads, 4, sizes), (torch.randn(1, *sizes, 4),)


def evoformer(rows: int, columns: int, c_m: int, c_z: int, heads: int, dim: int) -> tuple[nn.Module, tuple]:
    states = torch.randn(1, rows, columns, c_m), torch.randn(1, columns, columns, c_z)
    masks = torch.ones(1, rows, columns), torch.ones(1, columns, columns)
    return EvoformerBlock(c_m, c_z, heads, dim), (*states, *masks)


LARGE = {
    "axial, 16 x 64 x 64, hidden 1024": (axial, (2, 1024, 16, 16, 64, 64)),
    "Evoformer block, 512 x 384": (evoformer, (512, 384, 256, 128, 8, 32)),
}
SMALL = {
    "axial, 8 x 16 x 16, hidden 128": (axial, (2, 128, 8, 8, 16, 16)),
    "Evoformer block, 24 x 32": (evoformer, (24, 32, 64, 32, 4, 16)),
}
STRATEGIES = ("dsp", "ulysses", "auto")


def predicted(hardware: str) -> list[dict[str, Any]]:
    found = []
    for name, (build, sizes) in LARGE.items():
        with FakeTensorMode():
            model, args = build(*sizes)
        for strategy in STRATEGIES:
            options = {"strategy": strategy, "hardware": hardware}
            beside, wanted = (predict(model, "8", args, overlap=overlap, **options) for overlap in (True, False))
            plan = dsp_auto.plan(model, "8", args, **options)
            found.append(
                {
                    "model": name,
                    "strategy": strategy,
                    "early": plan.communication["early"]["count"],
                    "collectives": sum(entry["count"] for entry in plan.communication["by_primitive"].values()),
                    "communication_ms": 1e3 * beside.communication,
                    "hidden": beside.hidden / beside.communication,
                    "hidden_without": wanted.hidden / wanted.communication,
                    "step": beside.seconds / wanted.seconds,
                }
            )
    return found


def on_rank(rank: int, ranks: int, name: str, strategy: str, pairs: int) -> dict[str, Any]:
    build, sizes = SMALL[name]
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    torch.manual_seed(0)
    model, args = build(*sizes)
    options = {"strategy": strategy, "hardware": "h100"}
    both = [dsp_auto.parallelize(model, mesh, args, overlap=overlap, **options) for overlap in (True, False)]

    def step(parallel: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        outputs = parallel(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().mean() for output in outputs).backward()
        grads = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
        return [*(output.detach() for output in outputs), *grads]

    if not all(torch.equal(a, b) for a, b in zip(*map(step, both), strict=True)):
        raise RuntimeError(f"{name}, {strategy}: issuing early gives other numbers")
    times = torch.empty(pairs, 2, dtype=torch.float64)
    for pair in range(-2, pairs):  # the first ones warm up
        for which in (0, 1) if pair % 2 else (1, 0):
            dist.barrier()
            start = time.perf_counter()
            step(both[which])
            if pair >= 0:
                times[pair, which] = time.perf_counter() - start
    dist.all_reduce(times, dist.ReduceOp.MAX)
    ratios = (times[:, 0] / times[:, 1]).tolist()
    return {
        "early": both[0].plan.communication["early"]["count"],
        "milliseconds": 1e3 * times[:, 0].median().item(),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overlap.json"))
    options = parser.parse_args()
    told = predicted(options.hardware)
    print(f"predicted on 8 devices of {options.hardware}; hidden: without, with")
    print(
        tabulate.tabulate(
            [
                (
                    row["model"],
                    row["strategy"],
                    f"{row['early']} of {row['collectives']}",
                    f"{row['communication_ms']:.2f} ms",
                    f"{row['hidden_without']:.0%}, {row['hidden']:.0%}",
                    f"{row['step']:.3f}",
                )
                for row in told
            ],
            ["model", "strategy", "early", "communication", "hidden", "step"],
        )
    )
    measured = []
    for name in SMALL:
        for strategy in STRATEGIES:
            found = spawn(on_rank, options.ranks, name, strategy, options.pairs)[0]
            measured.append({"model": name, "strategy": strategy, **found})
    print(f"\nmeasured on {options.ranks} gloo processes: a step with, against one without")
    print(
        tabulate.tabulate(
            [
                (row["model"], row["strategy"], row["early"], f"{row['milliseconds']:.1f} ms", f"{row['ratio']:.3f}")
                for row in measured
            ],
            ["model", "strategy", "early", "step", "ratio"],
        )
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"predicted": told, "measured": measured, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
