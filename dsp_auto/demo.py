"""`dsp-auto demo`: the paper's Transformer-2D on several processes of this computer, checked against one device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh

from .examples.transformer_2d import build
from .spawn import spawn
from .verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Comparison, traffic
from .verify import compare as compare_on_ranks

# Neither 51 frames nor 250 tokens divide by 4: uneven shards are the normal case.
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "frames": 51, "tokens": 250, "batch": 1}


def run(ranks: int = 4, sizes: Mapping[str, Any] | None = None) -> bool:
    """Run it on `ranks` gloo processes, forward and backward, and print what came out.

    sizes: arguments of `examples.transformer_2d.build` beside or instead of `SIZES`.
    True where outputs, gradients and bytes agree with one device and with the plan. Raises DspError where a rank fails.
    """
    chosen = {**SIZES, **(sizes or {})}
    shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
    print(f"Transformer-2D ({shown}), forward and backward on {ranks} gloo processes\n", flush=True)
    started = time.perf_counter()
    report, agrees = describe(spawn(compare, ranks, chosen))
    print(f"{report}\n\n{time.perf_counter() - started:.1f} s. {'All agree.' if agrees else 'They DISAGREE.'}")
    return agrees


def describe(found: Sequence[Comparison]) -> tuple[str, bool]:
    """The ranks' comparisons as a report for people, and whether all is as it should be."""
    output = max(one.output for one in found)
    gradient, name = max(one.worst for one in found)
    deviations = [
        ["outputs", f"{output:.1e}", f"{OUTPUT_TOLERANCE:.0e}", _verdict(output <= OUTPUT_TOLERANCE)],
        [
            f"gradients, worst {name}",
            f"{gradient:.1e}",
            f"{GRADIENT_TOLERANCE:.0e}",
            _verdict(gradient <= GRADIENT_TOLERANCE),
        ],
    ]
    wire = [
        [
            entry.primitive,
            entry.direction,
            entry.collectives,
            f"{entry.predicted:,.12g}",
            f"{entry.measured:,.12g}",
            "equal" if entry.agrees else "DIFFERENT",
        ]
        for entry in traffic(found[0].plan, [one.measured for one in found])
    ]
    agrees = all(row[-1] == "ok" for row in deviations) and all(row[-1] == "equal" for row in wire)
    head = ["largest deviation from one device", "relative", "allowed", ""]
    wire_head = ["wire bytes per device", "", "collectives", "predicted", "measured", ""]
    parts = [
        str(found[0].plan),
        tabulate(deviations, head, disable_numparse=True, colalign=("left", "right", "right", "left")),
        tabulate(wire, wire_head, disable_numparse=True, colalign=("left", "left", "right", "right", "right", "left")),
    ]
    return "\n\n".join(parts), agrees


def compare(rank: int, ranks: int, sizes: Mapping[str, Any]) -> Comparison:
    """On a rank: the same model as on the others, against its parallel self."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    model, (video,), kwargs = build(**{**SIZES, **sizes})
    video.requires_grad_()
    options: dict[str, Any] = {"dim_names": getattr(build, "dim_names", None), "strategy": "dsp"}
    return compare_on_ranks(model, mesh, (video,), kwargs, inputs=[video], **options)


def _verdict(fits: bool) -> str:
    return "ok" if fits else "TOO LARGE"
