"""Several tensors side by side, or against each other: grids, rows, columns, padded sequences."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import numbered, rule


@rule("aten::meshgrid")
def meshgrid(call: OpCall) -> OpRule:
    """`a, b -> a b, a b`: each result repeats one operand; `xy` swaps the first two dims."""
    names = numbered(len(call.operands))
    groups = [name if operand.shape else "" for name, operand in zip(names, call.operands, strict=True)]
    order = [*names[1::-1], *names[2:]] if call.bound.get("indexing") == "xy" else names
    return from_notation(f"{', '.join(groups)} -> {', '.join([' '.join(order)] * len(names))}", call)


@rule("aten::cartesian_prod")
def cartesian_prod(call: OpCall) -> OpRule:
    names = numbered(len(call.operands))
    sizes = {name: operand.shape[0] for name, operand in zip(names, call.operands, strict=True)}
    out = f"({' '.join(names)}) place" if len(names) > 1 else names[0]
    return from_notation(f"{', '.join(names)} -> {out}", call, moved=["place"], sizes=sizes)


@rule("aten::broadcast_tensors")
def broadcast_tensors(call: OpCall) -> OpRule:
    return from_notation(
        ", ".join(["..."] * len(call.operands)) + " -> " + ", ".join(["..."] * len(call.outputs)), call
    )


@rule("aten::hstack", "aten::vstack", "aten::row_stack", "aten::dstack", "aten::column_stack")
def join(call: OpCall) -> OpRule:
    """Joined along one dim; operands of few dims first get dims of size one."""
    name = call.target._schema.name.removeprefix("aten::")
    rank = len(call.outputs[0])
    dim = {"hstack": min(rank - 1, 1), "dstack": 2, "column_stack": 1}.get(name, 0)
    names = numbered(rank)
    groups = []
    for part, operand in enumerate(call.operands):
        own = len(operand.shape)
        group = [*names[:dim], f"part{part}", *names[dim + 1 :]]
        first = rank - own if name in ("vstack", "row_stack") else 1 if name == "dstack" and own == 1 else 0
        groups.append(" ".join(group[first : first + own]))
    parts = [f"part{part}" for part in range(len(groups))]
    text = f"{', '.join(groups)} -> {' '.join([*names[:dim], 'all', *names[dim + 1 :]])}"
    return from_notation(text, call, moved=[*parts, "all"])


@rule("aten::pad_sequence")
def pad_sequence(call: OpCall) -> OpRule:
    """`t ...` of several lengths, padded to the longest: features are parallel."""
    rest = " ".join(numbered(len(call.operands[0].shape) - 1))
    times = [f"t{n}" for n in range(len(call.operands))]
    order = "several t" if call["batch_first"] else "t several"
    text = f"{', '.join(f'{time} {rest}' for time in times)} -> {order} {rest}"
    return from_notation(text, call, moved=[*times, "t", "several"])
