"""Alternatives: what a plan would cost in all if some modules ran on other layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from .plan import Plan
from .units import show_bytes, show_seconds


@dataclass(frozen=True)
class Alternative:
    """One layout of the modules on one mesh dim, everything else as is best then.

    factor: what their ops shard over `mesh_dim`; None: nothing. is_plan: the plan has it so. plan: the best one; None where
    there is none, and `reason` says why.
    """

    mesh_dim: str
    factor: str | None
    is_plan: bool
    plan: Plan | None
    reason: str = ""


@dataclass(frozen=True)
class Alternatives:
    """Of the ops in `modules`, under the plan `made`; prints as a table of differences. entries: one for each mesh dim and what
    could be sharded over it."""

    modules: str
    made: Plan
    entries: tuple[Alternative, ...]

    def __str__(self) -> str:
        timed = self.made.objective == "time"
        heads = ["mesh dim", "shards", "wire bytes", "more", *(["seconds", "more"] if timed else []), "peak memory", "more", ""]
        own, rows, refused = figures(self.made), [], []
        for one in self.entries:
            row: list[str] = [one.mesh_dim, "nothing" if one.factor is None else one.factor]
            if one.plan is None:
                refused.append(f"{one.mesh_dim}: {row[1]}: {one.reason}")
                rows.append([*row, *[""] * (len(heads) - 3), "cannot"])
                continue
            for what, show in (("wire", show_bytes), *([("objective", show_seconds)] if timed else []), ("peak", show_bytes)):
                amount = figures(one.plan)[what]
                more = amount - own[what]
                row += [show(amount), ("+" if more > 0 else "-" if more < 0 else "") + show(abs(more))]
            rows.append([*row, "as planned" if one.is_plan else ""])
        align = ["left", "left", *["right"] * (len(heads) - 3), "left"]
        table = tabulate(rows, heads, disable_numparse=True, colalign=align)
        where = f"the ops in {self.modules} sharded this, where they can, over a mesh dim"
        head = f"what the whole plan would cost on a device if {where}"
        return "\n\n".join([head, table] + ["\n".join(refused)] * bool(refused))


def figures(plan: Plan) -> Mapping[str, Any]:
    """What plans are told apart by: wire bytes, objective and peak memory of a device."""
    sent = plan.communication
    return {
        "wire": sent["forward_bytes"] + sent["backward_bytes"],
        "objective": plan.solver["objective"],
        "peak": plan.memory["peak_bytes"],
    }
