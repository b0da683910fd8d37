"""Show memory: what a device holds in a step of a plan, in total and block by block, from `Plan.memory` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from .plan import Plan
from .units import show_bytes

# More blocks alike than this are a first one, those in between, and a last one.
APART = 4
BAR = 24  # characters
PHASES = ("forward", "again", "backward")
STEP = "step"


@dataclass
class _Block:
    """A block and the most bytes there are in each of its phases. position: in the program."""

    name: str
    group: tuple
    position: int
    high: dict[str, int] = field(default_factory=dict)

    @property
    def most(self) -> int:
        return max(self.high.values())


def show_memory(plan: Plan) -> str:
    """The bytes of a device by what they are for, and the most there are in each block: where it goes forward, where it does
    once more to be recomputed, and where it goes backward. Blocks alike are shown as their first, those in between, and their
    last; the one with the peak stands by itself.

    plan: as `dsp_auto.plan` gave it, or read back from JSON.
    """
    cells = [(what, show_bytes(nbytes), note) for what, nbytes, note in breakdown(plan)]
    table = tabulate(cells, headers=["a device holds", "bytes", ""], disable_numparse=True, colalign=("left", "right", "left"))
    return f"{table}\n\n{_timeline(plan)}"


def breakdown(plan: Plan) -> list[tuple[str, int, str]]:
    """What a device holds, its bytes, and a note."""
    own = plan.memory
    rows = [("parameters", own["parameter_bytes"], "")]
    if own["gradient_bytes"]:
        rows += [
            ("gradients", own["gradient_bytes"], "when all are there: they come as activations go"),
            ("optimizer", own["optimizer_bytes"], own["optimizer"]),
            ("its step adds", own["step_bytes"], "when activations are gone"),
        ]
    rows += [
        ("inputs", own["input_bytes"], "buffers and constants too"),
        ("activations", own["activation_bytes"], "at their own peak"),
        ("all, at the peak", own["peak_bytes"], own["peak_at"] or ""),
    ]
    if own["capacity_bytes"] is not None:
        kept = f"{show_bytes(own['reserve_bytes'])} more are kept back" if own["reserve_bytes"] else ""
        rows.append(("capacity", own["capacity_bytes"], kept))
    return rows


def timeline(plan: Plan) -> tuple[list[str], list[tuple[str, dict[str, int], bool]]]:
    """The phases that there are, and of each block its name, the most bytes in each of these, and whether the peak is there."""
    own = plan.memory
    blocks, step = _blocks(own["curve"])
    peak = next((block for block in [*blocks, *step] if block.most == own["peak_bytes"]), None)
    phases = [phase for phase in PHASES if any(phase in block.high for block in blocks)]
    rows = []
    for block in [*_folded(blocks, peak), *step]:
        # The optimizer's step comes after all phases, and has one number.
        shown = {phases[-1]: block.high[STEP]} if STEP in block.high else block.high
        rows.append((block.name, shown, block is peak))
    return phases, rows


def _timeline(plan: Plan) -> str:
    own = plan.memory
    phases, rows = timeline(plan)
    scale = max(own["peak_bytes"], own["capacity_bytes"] or 0) or 1
    cells = [
        [
            name,
            *(show_bytes(high[phase]) if phase in high else "" for phase in phases),
            "#" * round(BAR * max(high.values()) / scale) + (" peak" if is_peak else ""),
        ]
        for name, high, is_peak in rows
    ]
    return tabulate(
        cells,
        headers=["the most in", *phases, "of the peak" if own["capacity_bytes"] is None else "of the capacity"],
        disable_numparse=True,
        colalign=("left", *["right"] * len(phases), "left"),
    )


def _blocks(curve: Sequence[Sequence]) -> tuple[list[_Block], list[_Block]]:
    """Modules up to the first number in their path, in the order of the program, and the optimizer's step."""
    found: dict[str, _Block] = {}
    step: list[_Block] = []
    run = 0
    for phase, path, nbytes in curve:
        if phase == STEP:
            block = step[0] if step else _Block("the optimizer's step", (), len(curve))
            step = [block]
        else:
            name, lists = _block(path)
            if name not in found:
                last = next(reversed(found.values()), None)
                # What stands in no list of blocks is alike where no block is in between.
                run += lists is None and last is not None and last.group[0] is not None
                found[name] = _Block(name, (lists, run if lists is None else 0), len(found))
            block = found[name]
        block.high[phase] = max(block.high.get(phase, 0), nbytes)
    return list(found.values()), step


def _block(path: str) -> tuple[str, str | None]:
    """`blocks.3` and `blocks` of `blocks.3.mlp.0`; the first name and None where nothing is numbered."""
    parts = path.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return (parts[0], None) if number is None else (".".join(parts[: number + 1]), ".".join(parts[:number]))


def _folded(blocks: Sequence[_Block], peak: _Block | None) -> list[_Block]:
    """Many blocks of one list, with the same phases, as three."""
    alike: dict[tuple, list[_Block]] = {}
    for block in blocks:
        alike.setdefault((block.group, block is peak, frozenset(block.high)), []).append(block)
    rows: list[_Block] = []
    for own in alike.values():
        if len(own) <= APART:
            rows += own
            continue
        inner = own[1:-1]
        between = [b for b in blocks if b.group == own[0].group and inner[0].position <= b.position <= inner[-1].position]
        count = f"{len(inner)} of " if len(inner) < len(between) else ""
        high = {phase: max(block.high[phase] for block in inner) for phase in inner[0].high}
        name = f"{count}{inner[0].name} … {inner[-1].name}"
        rows += [own[0], _Block(name, own[0].group, inner[0].position, high), own[-1]]
    return sorted(rows, key=lambda block: block.position)
