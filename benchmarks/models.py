"""Public models of diffusers and transformers, planned and run on gloo ranks against one device.

Every model of `tests/zoo/public.py` (unmodified, small, random weights) runs in eval without gradients and in training with the
gradients of all parameters. What is shown of each:

    exports     whether torch.export takes it; where not, export's own reason
    planned     whether dsp_auto plans and runs it; where not, its error in one line
    sequences   the sequence factors that the plan shards, by the share of the activation bytes they shard
    replicated  share of the activation bytes that stages make which run whole on every rank, and the largest one of them.
                Activation bytes are those of the results of all stages (one an op that is no view), on one device
    deviation   of outputs and of gradients, relative, from one device; where float32 is above the tolerance, in float64 too
    bytes       wire bytes per device, and whether the ranks sent what was predicted

and over all of them the shares of the bar: planned, without a replicated stage above 1% of the activation bytes, equal to one
device in forward and in gradient. A model that hangs or dies ends its own measurement only.

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

from dsp_auto import planner, verify
from dsp_auto.errors import CaptureError, DspError, first_lines
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.factorize import Factors, Op
from dsp_auto.passes.stages import OP
from tests.world import RankError, World
from tests.zoo.public import MODELS

BAR = 0.01  # of the activation bytes, for one replicated stage
MODES = {"eval": False, "train": True}


def measure(rank: int, ranks: int, name: str, train: bool, time_limit: float) -> dict[str, Any]:
    """One model in one mode, on a rank."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # export prints its graphs
        row = planned(name, train, ranks, time_limit)
        if "error" in row:
            return row
        try:
            found = compared(name, train, ranks, time_limit, torch.float32)
            if found["output"] > verify.OUTPUT_TOLERANCE or found["gradient"] > verify.GRADIENT_TOLERANCE:
                double = compared(name, train, ranks, time_limit, torch.float64)
                found |= {"output_float64": double["output"], "gradient_float64": double["gradient"]}
        except DspError as error:
            return row | {"planned": False, "error": one_line(error)}
    return row | found


def built(name: str, train: bool, dtype: torch.dtype = torch.float32) -> tuple:
    model, args, kwargs = MODELS[name]()
    if dtype == torch.float64:
        model = model.double()
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.dtype == torch.float32 else t, (args, kwargs)
        )
    return model.train(train), args, kwargs


def planned(name: str, train: bool, ranks: int, time_limit: float) -> dict[str, Any]:
    """What the plan says, from the problem and its solution; or why there is no plan."""
    model, args, kwargs = built(name, train)
    with torch.set_grad_enabled(train):
        model(*args, **kwargs)  # an error here is the benchmark's
        started = time.perf_counter()
        try:
            program = capture(model, args, kwargs)
            options = planner.Options.of(time_limit=time_limit)
            prepared = planner.prepare(program, as_mesh(ranks), options)
            solution = planner.decide(prepared)
        except DspError as error:
            exports = not isinstance(error, CaptureError) or exported(model, args, kwargs)
            return {"exports": exports, "planned": False, "error": one_line(error)}
    row = {"exports": True, "planned": True, "plan_seconds": time.perf_counter() - started, "gap": solution.gap}
    return row | replicated(prepared.problem.graph, solution.choice)


def exported(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    try:
        torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        return False
    return True


def replicated(graph: Any, choice: tuple[int, ...]) -> dict[str, Any]:
    """Activation bytes of a plan: all, those of each sharded factor, and the stages that run replicated."""
    factors = graph.factors
    total = 0
    sharded: Counter[str] = Counter()
    whole = []
    for stage in graph.stages:
        if stage.kind != OP:
            continue
        made = sum(factors.values[result].nbytes for result in stage.results)
        total += made
        chosen = next((f for f in stage.strategies[choice[stage.index]].factors if f is not None), None)
        if chosen is not None:
            sharded[factors.names[chosen]] += made
        else:
            is_choice = len({strategy.factors for strategy in stage.strategies}) > 1
            why = "chosen" if is_choice else reason(stage.op, factors)
            whole.append((made, {"op": str(stage.op.node.target), "module": stage.path, "why": why}))
    total = max(total, 1)
    above = [entry | {"share": made / total} for made, entry in whole if made > BAR * total]
    return {
        "activation_bytes": total,
        "sharded": {name: made / total for name, made in sharded.most_common()},
        "replicated": sum(made for made, _ in whole) / total,
        "largest": max((made for made, _ in whole), default=0) / total,
        "above": sorted(above, key=lambda entry: -entry["share"]),
        "without_rule": dict(Counter(str(op.node.target) for op in factors.ops if op.rule is None)),
    }


def reason(op: Op, factors: Factors) -> str:
    """Why an op has no strategy that shards it."""
    if op.rule is None:
        return "no rule"
    if op.rule.is_random:
        return "random"
    own = {factor for value in (*op.operands, *op.results) for factor in factors.values[value].factors}
    if any(factors.kinds[factor] == "sequence" and factors.sizes[factor] > 1 for factor in own):
        return "needs its sequences whole"
    return "has no sequence factor"


def compared(name: str, train: bool, ranks: int, time_limit: float, dtype: torch.dtype) -> dict[str, Any]:
    model, args, kwargs = built(name, train, dtype)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    found = verify.compare(model, mesh, args, kwargs, backward=train, time_limit=time_limit)
    communication = found.plan.communication
    return {
        "output": found.output,
        "gradient": found.gradient,
        "worst": found.worst[1],
        "forward_bytes": communication["forward_bytes"],
        "backward_bytes": communication["backward_bytes"],
        "peak_bytes": found.plan.memory["peak_bytes"],
        "plan": found.plan,
        "measured": found.measured,
    }


def one_line(error: BaseException) -> str:
    return first_lines(error, 300).partition(": ")[2] if isinstance(error, DspError) else first_lines(error, 300)


def ask(world: World, name: str, train: bool, time_limit: float) -> dict[str, Any]:
    """`measure` on all ranks; a model that raises, hangs or dies gives a row that says so."""
    try:
        rows = world.run(measure, name, train, time_limit)
    except RankError as error:
        if error.cause is None:
            found = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        else:
            found = one_line(error.cause)
        return {"planned": False, "error": found, "raised": type(error.cause).__name__}
    row = dict(rows[0])
    if "measured" in row:
        plan = row.pop("plan")
        measured = [entry["measured"] for entry in rows]
        row["output"], row["gradient"] = (max(entry[key] for entry in rows) for key in ("output", "gradient"))
        row["bytes_agree"] = all(entry.agrees for entry in verify.traffic(plan, measured))
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
        "forward equal to one device": lambda row, mode: is_equal(row, "output", verify.OUTPUT_TOLERANCE),
        "gradients equal to one device": lambda row, mode: (
            mode == "eval" or is_equal(row, "gradient", verify.GRADIENT_TOLERANCE)
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
        worst = max(found, key=lambda row: row["largest"])
        by_mode = {mode: row for mode, row in modes.items() if "output" in row}
        rows.append(
            [
                name,
                "yes",
                "yes" if len(found) == len(modes) else " ".join(by_mode) + " only",
                ", ".join(f"{factor} {share:.0%}" for factor, share in list(worst["sharded"].items())[:2]),
                f"{worst['replicated']:.1%}",
                f"{worst['largest']:.1%}" + (f" {worst['above'][0]['op']}: {worst['above'][0]['why']}" if worst["above"] else ""),
                len({op for row in found for op in row["without_rule"]}),
                f"{max(row['output'] for row in found):.0e}",
                f"{by_mode['train']['gradient']:.0e}" if "train" in by_mode else "",
                f"{sum(found[-1][key] for key in ('forward_bytes', 'backward_bytes')):,.0f}",
                "" if all(row["bytes_agree"] for row in found) else "differ",
            ]
        )
    headers = ["model", "exports", "planned", "sequences", "replicated", "largest", "no rule", "output", "gradient", "bytes", ""]
    return tabulate.tabulate(rows, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="models whose names have one of these")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one model in one mode")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for the solver, as in dsp_auto.plan")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.json"))
    options = parser.parse_args()
    names = [name for name in MODELS if any(part in name for part in options.only)]
    models: dict[str, dict[str, dict[str, Any]]] = {}
    started = time.perf_counter()
    world = World(options.ranks, options.timeout)
    try:
        for name in names:
            models[name] = {mode: ask(world, name, train, options.time_limit) for mode, train in MODES.items()}
            state = {mode: row.get("error", "ok") for mode, row in models[name].items()}
            print(f"{time.perf_counter() - started:.0f} s {name}: {state}", file=sys.stderr, flush=True)
    finally:
        world.stop()
    print(f"{len(names)} models on {options.ranks} ranks, {time.perf_counter() - started:.0f} s\n")
    print(table(models))
    failed = {name: next((r["error"] for r in modes.values() if "error" in r), None) for name, modes in models.items()}
    print("\nwhy a model is not exported, planned or run:\n")
    print("\n".join(f"{name}: {why}" for name, why in failed.items() if why) or "none")
    shares = summary(models)
    print()
    print(tabulate.tabulate(shares, headers="keys", floatfmt=".0%"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where = {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"cpus": os.cpu_count()}
    found = {"ranks": options.ranks, "bar": BAR, "shares": shares, "models": models}
    options.out.write_text(json.dumps(where | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
