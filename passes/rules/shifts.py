"""Elements that change places, or stay, by where they are along their dims: flips, turns, shifts, triangles, padding.

What becomes of an element depends on its place in the whole, so a rank that holds a range of a dim counts from where its
range begins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..notation import Local, OpCall, OpRule, Window, from_notation, shifted
from . import along, numbered, rule
from .sliding import with_windows

aten = torch.ops.aten


@rule("aten::flip")
def flip(call: OpCall) -> OpRule:
    """A range of the result needs the range that is as far from the other end."""
    shape = call.operands[0].shape
    names = [f"d{position}" for position in range(len(shape))]
    dims = [call.dim(dim) for dim in call["dims"]]
    windows = tuple(Window(0, dim, names[dim], names[dim], _flipped(shape[dim])) for dim in dims)
    return _in_place(call, names, windows)


@rule("aten::roll")
def roll(call: OpCall) -> OpRule:
    """A range of the result needs the range `shift` before it, around the end."""
    shape = call.operands[0].shape
    names = [f"d{position}" for position in range(len(shape))]
    shifts, dims = call["shifts"], call["dims"]
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else [call.dim(dim) for dim in dims]
    if not dims or len(set(dims)) != len(dims):
        return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, moved=names)
    windows = tuple(
        Window(0, dim, names[dim], names[dim], shifted(-shift), True, computes=True)
        for dim, shift in zip(dims, shifts)
    )
    return _in_place(call, names, windows, shifts)


def _flipped(size: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda start, stop: (size - stop, size - start)


def _padded(mode: str, left: int, size: int) -> Callable[[int, int], tuple[int, int]]:
    """What a range of a padded dim needs of the `size` elements that it had, `left` of padding before them."""
    if mode == "replicate":
        return lambda a, b: (min(max(a - left, 0), size - 1), max(min(b - left, size), 1))
    if mode == "reflect":
        return lambda a, b: (
            max(min(a - left, 2 * size - 1 - (b - left)), 0),
            min(max(b - left, left - a + 1), size),
        )
    return shifted(-left)


def _in_place(call: OpCall, names: list[str], windows: tuple[Window, ...], shifts: list[int] | None = None) -> OpRule:
    """Elements that change places along some dims: where such a dim is cut, by a window, and a flip of what it gives."""

    def local(emit, target, args, kwargs, here: Local):
        x, left = args[0], []
        for n, window in enumerate(windows):
            if window.target in here.sites:
                x = here.window(emit, x, window)
            if window.target not in here.sites or shifts is None:
                left.append(n)
        dims = [windows[n].dim for n in left]
        if not left:
            return x
        return emit(target, x, *([[shifts[n] for n in left]] if shifts is not None else []), dims)

    ranges = [(window.source,) for window in windows]
    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, ranges=ranges, windows=windows, local=local)


@rule("aten::tril", "aten::triu")
def triangle(call: OpCall) -> OpRule:
    """Rows and columns are counted from the start of the whole."""
    rank = len(call.operands[0].shape)
    names = [f"d{position}" for position in range(rank)]
    row, column = names[-2:]

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, args[0], call["diagonal"] + here.range(row)[0] - here.range(column)[0])

    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, ranges=[(row,), (column,)], local=local)


@rule("aten::pad", "aten::constant_pad_nd")
def pad(call: OpCall) -> OpRule | None:
    """A range of the padded dim needs the range `before` elements earlier, and past the ends what the mode says."""
    shape = call.operands[0].shape
    mode = call.bound.get("mode", "constant")
    value = call["value"] or 0.0
    ends = list(zip(call["pad"][::2], call["pad"][1::2]))[::-1]  # the last dim comes first
    if mode != "constant" and min(call["pad"]) < 0:
        return None
    lead = len(shape) - len(ends)
    before, after = numbered(lead), numbered(lead)
    windows: dict[int, Window] = {}
    for n, (left, right) in enumerate(ends, lead):
        if left == right == 0:
            before.append(f"d{n}")
            after.append(f"d{n}")
            continue
        before.append(f"i{n}")
        after.append(f"o{n}")
        size = shape[n]
        fill = value if mode == "constant" else None
        windows[n] = Window(0, n, f"i{n}", f"o{n}", _padded(mode, left, size), wraps=mode == "circular", fill=fill)

    def local(emit, target, args, kwargs, here: Local):
        x, margins, cuts = args[0], list(ends), {}
        for n, window in windows.items():
            if window.target not in here.sites:
                continue
            x, margins[n - lead] = here.window(emit, x, window), (0, 0)
            if mode in ("replicate", "reflect"):
                start, stop = (at - ends[n - lead][0] for at in here.range(window.target))
                # What the rank makes by itself at an end of the whole; of a reflection it holds more than that.
                held = window.needs(*here.range(window.target))
                margins[n - lead] = (max(-start, 0), max(stop - shape[n], 0))
                first = held[0] - margins[n - lead][0]
                cuts[n] = (start - first, stop - first)
        flat = [end for pair in reversed(margins) for end in pair]
        if any(flat):
            x = emit(target, x, flat, *args[2:], **kwargs)
        for n, (start, stop) in cuts.items():
            x = emit(aten.slice.Tensor, x, n, start, stop)
        return x

    text = f"{' '.join(before)} -> {' '.join(after)}"
    return with_windows(text, call, windows, local=local)


@rule("aten::fliplr", "aten::flipud")
def flip_rows(call: OpCall) -> OpRule:
    return along(call, [1 if call.target._schema.name == "aten::fliplr" else 0], "moved")


@rule("aten::rot90")
def rot90(call: OpCall) -> OpRule:
    """Two dims turned into each other: both stay whole."""
    names = numbered(len(call.operands[0].shape))
    i, j = (call.dim(dim) for dim in call["dims"])
    after = list(names)
    if call["k"] % 2:
        after[i], after[j] = names[j], names[i]
    return from_notation(f"{' '.join(names)} -> {' '.join(after)}", call, moved=[names[i], names[j]])
