"""Random graphs out of all registered rules on all ranks of random meshes, against one device (see tests/fuzz.py).

Runs until so many graphs are done or so many seconds have passed. Prints each graph that fails, made small, with the seed
that brings it back, and a summary; writes the summary as JSON. Exits with 1 where one failed.

    python benchmarks/fuzz.py [--graphs 1000] [--seconds 3600] [--first 0] [--out benchmarks/results/fuzz.json]
    python benchmarks/fuzz.py --seed 123        this graph alone, as it is

A seed names a graph as long as the rules and their calls (tests/rules) stay the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import tabulate
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests, which is not installed

from tests import fuzz  # noqa: E402


def one(seed: int) -> bool:
    case = fuzz.make(seed)
    print(case)
    verdict = fuzz.judge(case)
    print(verdict)
    return verdict.failed


def many(first: int, graphs: int, seconds: float, shrinking: float) -> dict:
    """Counts of verdicts, of meshes and of rules, and the seeds that failed."""
    started = time.monotonic()
    verdicts, meshes, rules, failed = Counter(), Counter(), Counter(), []
    for seed in range(first, first + graphs):
        if time.monotonic() - started > seconds:
            break
        case = fuzz.make(seed)
        verdict = fuzz.judge(case)
        verdicts[verdict.kind] += 1
        if verdict.kind == "same":
            meshes[case.mesh] += 1
            rules.update(set(case.rules))
        if verdict.failed:
            failed.append(seed)
            print(f"seed {seed}: {verdict}\nmade small:\n{fuzz.shrink(case, shrinking)}\n", flush=True)
        if sum(verdicts.values()) % 100 == 0:
            print(f"{sum(verdicts.values())} graphs, {time.monotonic() - started:.0f} s: {dict(verdicts)}", flush=True)
    return {
        "seeds": [first, first + sum(verdicts.values()) - 1],
        "verdicts": dict(verdicts),
        "failed": failed,
        "meshes": dict(sorted(meshes.items())),
        "rules_drawn": len(rules),
        "rules": len(fuzz.drawn_rules()),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--shrinking", type=float, default=60.0, help="seconds to make a failing graph small")
    parser.add_argument("--seed", type=int, help="print and run the graph of this seed alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of ops that torch means to drop
    if options.seed is not None:
        sys.exit(one(options.seed))
    found = many(options.first, options.graphs, options.seconds, options.shrinking)
    print(
        tabulate.tabulate([(kind, count) for kind, count in found["verdicts"].items()], headers=["verdict", "graphs"])
    )
    print(
        f"\nseeds {found['seeds'][0]} to {found['seeds'][1]}, {found['seconds']} s, failed: {found['failed'] or 'none'}"
    )
    print(f"rules in graphs that were compared: {found['rules_drawn']} of {found['rules']}; meshes: {found['meshes']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__} | found, indent=1) + "\n")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
