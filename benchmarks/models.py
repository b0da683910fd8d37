"""Public models of diffusers and transformers, planned and run on gloo ranks against one device.

Every model of `tests/zoo/public.py` (unmodified, small, random weights) runs in eval without gradients and in training with the
gradients of all parameters. What is shown of each:

    exports     whether torch.export takes it; where not, export's own reason
    planned     whether dsp_auto plans and runs it; where not, its error in one line
    sequences   the factors that the plan shards, and how many ops run on each
    replicated  share of the activation bytes (of the results of all ops, on one device) that ops make which run whole on every
                rank; and the largest such op above 1%, with the reason
    deviation   of outputs and of gradients, relative, from one device; where float32 is above the tolerance, in float64 too
    bytes       wire bytes per device, and whether the ranks sent what was predicted

and over all of them the shares of the bar: planned, without a replicated stage above 1% of the activation bytes, equal to one
device in forward and in gradient. What is random draws the numbers of one device (`rng="serial"`). A model that hangs or dies
ends its own measurement only.

    python benchmarks/models.py [--only SUBSTRING ...] [--ranks 2] [--out benchmarks/results/models.json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsp_auto.errors import CaptureError, DspError
from dsp_auto.verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, traffic
from dsp_auto.verify import compare as compare_on_ranks
from tests.world import RankError, World
from tests.zoo.public import MODELS

MODES = {"eval": False, "train": True}


def measure(rank: int, ranks: int, name: str, train: bool, time_limit: float) -> dict[str, Any]:
    """One model in one mode, on a rank."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # export prints its graphs
        try:
            found = compared(name, train, ranks, time_limit, torch.float32)
            if found["output"] > OUTPUT_TOLERANCE or found["gradient"] > GRADIENT_TOLERANCE:
                double = compared(name, train, ranks, time_limit, torch.float64)
                found |= {"output_float64": double["output"], "gradient_float64": double["gradient"]}
        except DspError as error:
            exports = not isinstance(error, CaptureError) or exported(name, train)
            return {"exports": exports, "planned": False, "error": one_line(error)}
    return found


def compared(name: str, train: bool, ranks: int, time_limit: float, dtype: torch.dtype) -> dict[str, Any]:
    model, args, kwargs = built(name, train, dtype)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    found = compare_on_ranks(model, mesh, args, kwargs, backward=train, time_limit=time_limit, rng="serial")
    plan = found.plan
    made = plan.activations
    layouts: Counter[str] = Counter()
    for stage in plan.stages:
        layouts.update({factor: stage.ops for factor in stage.layout.values()})
    return {
        "exports": True,
        "planned": True,
        "output": found.output,
        "gradient": found.gradient,
        "worst": found.worst[1],
        "ops": dict(layouts.most_common()),
        "activation_bytes": made["bytes"],
        "replicated": made["replicated_bytes"] / made["bytes"],
        "above": sorted(made["large_replicated"], key=lambda entry: -entry["share"]),
        "without_rule": dict(Counter(entry["target"] for entry in plan.without_rule)),
        "forward_bytes": plan.communication["forward_bytes"],
        "backward_bytes": plan.communication["backward_bytes"],
        "peak_bytes": plan.memory["activation_bytes"],
        "gap": plan.solver["gap"],
        "seconds": dict(plan.seconds),
        "plan": plan,
        "measured": found.measured,
    }


def built(name: str, train: bool, dtype: torch.dtype = torch.float32) -> tuple:
    model, args, kwargs = MODELS[name]()
    if dtype == torch.float64:
        model = model.double()
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.dtype == torch.float32 else t, (args, kwargs)
        )
    return model.train(train), args, kwargs


def exported(name: str, train: bool) -> bool:
    model, args, kwargs = built(name, train)
    try:
        with torch.set_grad_enabled(train):
            torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        return False
    return True


def exports(rank: int, ranks: int, name: str, train: bool) -> bool:
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return exported(name, train)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, DspError) else f"{type(error).__name__}: {text}"[:300]


def ask(world: World, name: str, train: bool, time_limit: float) -> dict[str, Any]:
    """`measure` on all ranks; a model that raises, hangs or dies gives a row that says so."""
    try:
        rows = world.run(measure, name, train, time_limit)
    except RankError as error:
        world.stop(force=True)  # where all ranks died, the world itself takes them for alive
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("File ") and ("/dsp_auto/" in line or "/passes/" in line)]
        found = one_line(error.cause) if error.cause is not None else lines[-1][:300]
        row = {"planned": False, "error": found, "at": own[-1].rpartition("/")[2] if own else ""}
        try:
            return row | {"exports": all(world.run(exports, name, train))}
        except RankError:
            return row
    row = dict(rows[0])
    if "measured" in row:
        plan = row.pop("plan")
        measured = [entry["measured"] for entry in rows]
        row["output"], row["gradient"] = (max(entry[key] for entry in rows) for key in ("output", "gradient"))
        row["bytes_agree"] = all(entry.agrees for entry in traffic(plan, measured))
        del row["measured"]
    return row


def is_equal(row: dict[str, Any], what: str, tolerance: float) -> bool:
    """Within the tolerance in float32, or, where rounding alone exceeds it, to rounding in float64."""
    if what not in row:
        return False
    return row[what] <= tolerance or row.get(f"{what}_float64", float("inf")) <= 1e-9


def passes(row: dict[str, Any]) -> bool:
    return bool(row.get("planned")) and not row["above"]


def summary(models: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The shares of the bar, of the models that export."""
    taken = {name: modes for name, modes in models.items() if any(row.get("exports") for row in modes.values())}
    checks = {
        "planned and run": lambda row, mode: row["planned"] and "output" in row,
        "no replicated stage above 1%": lambda row, mode: passes(row),
        "forward equal to one device": lambda row, mode: is_equal(row, "output", OUTPUT_TOLERANCE),
        "gradients equal to one device": lambda row, mode: (
            mode == "eval" or is_equal(row, "gradient", GRADIENT_TOLERANCE)
        ),
        "wire bytes as predicted": lambda row, mode: row.get("bytes_agree", False),
    }
    rows = [{"what": "export", "models": len(taken), "of": len(models), "share": len(taken) / max(len(models), 1)}]
    for what, check in checks.items():
        count = sum(all(check(row, mode) for mode, row in modes.items()) for modes in taken.values())
        rows.append({"what": what, "models": count, "of": len(taken), "share": count / max(len(taken), 1)})
    return rows


def table(models: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for name, modes in models.items():
        found = [row for row in modes.values() if "output" in row]
        if not found:
            rows.append([name, "yes" if any(row.get("exports") for row in modes.values()) else "no", "no"])
            continue
        worst = max(found, key=lambda row: row["replicated"])
        sharded = [f"{factor} {count}" for factor, count in worst["ops"].items() if factor != "R"]
        above = max((entry for row in found for entry in row["above"]), key=lambda e: e["share"], default=None)
        by_mode = {mode: row for mode, row in modes.items() if "output" in row}
        rows.append(
            [
                name,
                "yes",
                "yes" if len(found) == len(modes) else " ".join(by_mode) + " only",
                ", ".join(sharded[:2]) + (", …" if len(sharded) > 2 else ""),
                f"{worst['replicated']:.1%}",
                f"{above['share']:.1%} {above['target']}: {above['why']}"[:70] if above else "",
                len({op for row in found for op in row["without_rule"]}),
                f"{max(row['output'] for row in found):.0e}",
                f"{by_mode['train']['gradient']:.0e}" if "train" in by_mode else "",
                f"{sum(found[-1][key] for key in ('forward_bytes', 'backward_bytes')):,.0f}",
                "" if all(row["bytes_agree"] for row in found) else "differ",
            ]
        )
    headers = "model exports planned sequences replicated largest norule output gradient bytes".split()
    return tabulate.tabulate(rows, [*headers, ""], disable_numparse=True)


def failures(models: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One line for each model and reason."""
    lines = []
    for name, modes in models.items():
        reasons = {row["error"]: mode for mode, row in modes.items() if "error" in row}
        both = len(reasons) == 1 and all("error" in row for row in modes.values())
        lines += [f"{name}{'' if both else f' ({mode})'}: {why}" for why, mode in reasons.items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="models whose names have one of these")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one model in one mode")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for the solver, as in dsp_auto.plan")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.json"))
    options = parser.parse_args()
    names = [name for name in MODELS if any(part in name for part in options.only)]
    models: dict[str, dict[str, dict[str, Any]]] = {}
    where = {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"cpus": os.cpu_count()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    world = World(options.ranks, options.timeout)
    try:
        for name in names:
            models[name] = {mode: ask(world, name, train, options.time_limit) for mode, train in MODES.items()}
            state = {mode: row.get("error", "ok") for mode, row in models[name].items()}
            print(f"{time.perf_counter() - started:.0f} s {name}: {state}", file=sys.stderr, flush=True)
            found = {"ranks": options.ranks, "shares": summary(models), "models": models}
            options.out.write_text(json.dumps(where | found, indent=1) + "\n")  # a long run keeps what it has
    finally:
        world.stop()
    print(f"{len(names)} models on {options.ranks} ranks, {time.perf_counter() - started:.0f} s\n")
    print(table(models))
    print("\nwhy a model is not exported, planned or run:\n")
    print("\n".join(failures(models)) or "none")
    print()
    print(tabulate.tabulate(summary(models), headers="keys", floatfmt=".0%"))


if __name__ == "__main__":
    main()
