"""Several tensors side by side, or against each other: joins, grids, rows, columns, padded sequences."""

from __future__ import annotations

from ..notation import Local, OpCall, OpRule, Window, from_notation, shifted
from . import numbered, rule
from .slicing import some_of


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(call: OpCall) -> OpRule | None:
    """Parts of equal size are a dim `(part rest)`. Else a range of the joined dim needs a range of some of the parts,
    each of which may be whole (a class token, a short text) or sharded (the video)."""
    rank = len(call.outputs[0])
    if any(len(operand.shape) != rank for operand in call.operands):
        return None  # the legacy empty tensor of shape (0,)
    dim = call.dim(call["dim"], rank)
    names = [f"d{position}" for position in range(rank)]
    lengths = [operand.shape[dim] for operand in call.operands]

    def at_dim(name: str) -> str:
        return " ".join(name if position == dim else other for position, other in enumerate(names))

    if len(set(lengths)) == 1 and lengths[0] > 1:
        text = f"{', '.join([at_dim('rest')] * len(lengths))} -> {at_dim('(part rest)')}"
        sizes = {"part": len(lengths), "rest": lengths[0]}
        return from_notation(text, call, moved=["part"] if len(lengths) > 1 else [], sizes=sizes)
    parts = [f"part{position}" for position in range(len(lengths))]
    windows, ends = [], 0
    for position, (part, length) in enumerate(zip(parts, lengths)):
        windows.append(Window(position, dim, part, "all", shifted(-ends)))
        ends += length
    ranges = [(*some, "all") for some in some_of([part for part, length in zip(parts, lengths) if length > 1])]
    ranges = ranges or [("all",)]

    def local(emit, target, args, kwargs, here: Local):
        if "all" not in here.sites:
            return emit(target, *args, **kwargs)
        return emit(target, [here.window(emit, x, window) for x, window in zip(args[0], windows)], dim)

    text = f"{', '.join(map(at_dim, parts))} -> {at_dim('all')}"
    return from_notation(text, call, ranges=ranges, windows=tuple(windows), local=local)


@rule("aten::stack")
def stack(call: OpCall) -> OpRule:
    rank = len(call.outputs[0])
    dim = call.dim(call["dim"], rank)
    names = [f"d{position}" for position in range(rank - 1)]
    out = [*names[:dim], "stacked", *names[dim:]]
    text = f"{', '.join([' '.join(names)] * len(call.operands))} -> {' '.join(out)}"
    return from_notation(text, call, moved=["stacked"])


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
