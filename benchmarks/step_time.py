"""Predicted against measured seconds of a training step, for the presets of the paper, on processes of this computer.

For each number of ranks, in one run and several rounds: `calibrate` measures this computer with that many processes at
work; from that alone each preset's step is predicted (rank 0's program on fake tensors, forward and backward); and then it
is measured. A step is forward, loss and backward, and lasts as long as its slowest rank; presets take turns, so that what
else the computer does meets all of them. Prints a table and writes JSON: milliseconds predicted and measured (medians of the
rounds, and from the least to the most), the error, and the place of each preset in both orders. `same order`: where all
blocks of one preset are faster than all of another, it is predicted to be faster.

    python benchmarks/step_time.py [--ranks 2 4] [--strategies dsp ring] [-a hidden=256 ...] [--rounds 3] [--full]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tabulate
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.calibrate import calibrate
from dsp_auto.examples.transformer_2d import build
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.presets import PRESETS
from dsp_auto.planner import Options, prepare
from dsp_auto.predict import trace_plan

SIZES = {"layers": 2, "hidden": 128, "heads": 8, "frames": 32, "tokens": 128, "batch": 1}
BAR = 0.25  # of the median error
BLOCKS, BLOCK_SECONDS = 3, 0.3  # of each preset, in a round


def step(model: nn.Module, video: Tensor, target: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    nn.functional.mse_loss(model(video), target).backward()


def block(model: nn.Module, video: Tensor, target: Tensor, count: int) -> float:
    """Seconds of a step in a block of `count`, on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step(model, video, target)
    took = torch.tensor([(time.perf_counter() - start) / count], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def run(
    rank: int, ranks: int, sizes: dict[str, Any], strategies: list[str], rounds: int, quick: bool, folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    rows, entries = [], []
    for strategy in strategies:
        model, (video,), _ = build(**sizes)
        try:
            trace = trace_plan(prepare(capture(model, (video,)), as_mesh(mesh), Options.of(strategy=strategy)))
            parallel = dsp_auto.parallelize(model, mesh, (video,), strategy=strategy)
        except dsp_auto.DspError as error:  # on all ranks: the preset does not fit the model or the ranks
            rows.append({"ranks": ranks, "strategy": strategy, "failed": str(error)})
            continue
        target = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
        block(parallel, video, target, 2)  # warms up
        count = max(1, round(BLOCK_SECONDS / block(parallel, video, target, 1)))
        rows.append({"ranks": ranks, "strategy": strategy, "predicted": [], "measured": []})
        entries.append((rows[-1], trace, (parallel, video, target, count)))
    fits = {}
    for _ in range(rounds):
        hardware = calibrate(mesh, quick=quick).hardware
        fits = hardware.measured["fits"]
        for row, trace, _ in entries:
            prediction = trace.on(hardware)
            row["predicted"].append(prediction.seconds * 1e3)
            row["by_kind_ms"] = {kind: seconds * 1e3 for kind, seconds in prediction.by_kind.items()}
        for _ in range(BLOCKS):
            for row, _, timed in entries:
                row["measured"].append(block(*timed) * 1e3)
    for row, *_ in entries:
        predicted, measured = row.pop("predicted"), row.pop("measured")
        row |= {"predicted_ms": statistics.median(predicted), "predicted_range_ms": [min(predicted), max(predicted)]}
        row |= {"measured_ms": statistics.median(measured), "measured_range_ms": [min(measured), max(measured)]}
        row["error"] = row["predicted_ms"] / row["measured_ms"] - 1
    for key, place in (("predicted_ms", "predicted_place"), ("measured_ms", "measured_place")):
        for number, row in enumerate(sorted((row for row, *_ in entries), key=lambda row: row[key])):
            row[place] = number + 1
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps({"rows": rows, "fits": fits}))
    dist.barrier()
    dist.destroy_process_group()


def swapped(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Presets that are clearly faster than another, and predicted to be slower."""
    return [
        (a["strategy"], b["strategy"])
        for a, b in itertools.permutations(rows, 2)
        if a["measured_range_ms"][1] < b["measured_range_ms"][0] and a["predicted_ms"] > b["predicted_ms"]
    ]


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=[name for name in PRESETS if name != "auto"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="calibrate in all sizes, which takes minutes a round")
    parser.add_argument("-a", dest="sizes", nargs="+", default=[], metavar="NAME=NUMBER", help=f"instead of {SIZES}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_time.json"))
    options = parser.parse_args()
    sizes = SIZES | {name: int(value) for name, value in (entry.split("=") for entry in options.sizes)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            arguments = (ranks, sizes, options.strategies, options.rounds, not options.full, folder)
            torch.multiprocessing.spawn(run, arguments, nprocs=ranks)
            found[ranks] = json.loads(Path(folder, f"{ranks}.json").read_text())
    print(", ".join(f"{name} {value}" for name, value in sizes.items()), f"- {options.rounds} rounds\n")
    rows = [row for one in found.values() for row in one["rows"]]
    measured = [row for row in rows if "measured_ms" in row]
    shown = [
        [row["ranks"], row["strategy"]]
        + [text for key in ("predicted", "measured") for text in (row[f"{key}_ms"], _range(row[f"{key}_range_ms"]))]
        + [f"{row['error']:+.0%}", f"{row['predicted_place']} / {row['measured_place']}"]
        for row in measured
    ]
    head = ["ranks", "strategy", "predicted ms", "range", "measured ms", "range", "error", "place"]
    print(tabulate.tabulate(shown, head, floatfmt=".1f"))
    for row in rows:
        if "failed" in row:
            print(f"{row['ranks']} ranks, {row['strategy']}: {row['failed']}")
    summary = {}
    for ranks in options.ranks:
        own = [row for row in measured if row["ranks"] == ranks]
        if own:
            error, wrong = statistics.median(abs(row["error"]) for row in own), swapped(own)
            summary[ranks] = {"median_error": error, "swapped": wrong}
            order = "same order" if not wrong else "swapped: " + ", ".join(" and ".join(pair) for pair in wrong)
            print(f"\n{ranks} ranks: median error {error:.0%} (bar {BAR:.0%}), {order}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "device": "cpu", "cpus": os.cpu_count(), "rounds": options.rounds}
    where |= {"sizes": sizes, "bar": BAR, "summary": summary, "found": found}
    options.out.write_text(json.dumps(where, indent=1) + "\n")


if __name__ == "__main__":
    main()
