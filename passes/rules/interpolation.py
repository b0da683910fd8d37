"""Resampling in space: batch and channels are parallel.

By a whole factor, space is too: each result has one source, or is made of neighbours, so that a range of results needs a
range that reaches a little further. By other factors it stays whole.
"""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, OpRule, Window, from_notation, within
from . import numbered, rule
from .sliding import with_windows

aten = torch.ops.aten

_NEAREST = [f"aten::{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)]
# How far from its own place a result looks for its sources.
_REACH = {
    "aten::upsample_linear1d": 1,
    "aten::upsample_bilinear2d": 1,
    "aten::upsample_trilinear3d": 1,
    "aten::upsample_bicubic2d": 2,
}
# Of these, a dim of size one that keeps its size comes out wrong (torch 2.13), so that no shard may be that short.
_ANTIALIASED = ["aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa"]


@rule(*_NEAREST, *_REACH, *_ANTIALIASED)
def interpolate(call: OpCall) -> OpRule:
    """Dims that grow are `s -> (s k)` (each k times), or windows; those that shrink `(s k) -> s` (made of k neighbours)."""
    name = call.target._schema.name
    sizes_before, sizes_after = call.operands[0].shape[2:], call.outputs[0][2:]
    before, after, moved = [], [], []
    sizes: dict[str, int] = {}
    windows: dict[int, Window] = {}
    for n, (old, new, scale) in enumerate(
        zip(sizes_before, sizes_after, _scales(call, len(sizes_before)), strict=True)
    ):
        factor = _whole_factor(call, old, new, scale)
        if old == new and scale in (None, 1.0) and name not in _ANTIALIASED:
            before.append(f"s{n}")
            after.append(f"s{n}")
        elif factor and (name in _NEAREST or new < old):
            before.append(f"s{n}" if new > old else f"(s{n} k{n})")
            after.append(f"(s{n} k{n})" if new > old else f"s{n}")
            sizes |= {f"s{n}": min(old, new), f"k{n}": factor}
            moved.append(f"k{n}")
        else:
            before.append(f"old{n}")
            after.append(f"new{n}")
            if factor:
                windows[n] = _neighbours(n, factor, _REACH[name])
            else:
                moved += [f"old{n}", f"new{n}"]

    def local(emit, target, args, kwargs, here: Local):
        x, goal, cuts = args[0], list(here.outputs[0][2:]), {}
        for n, window in windows.items():
            if window.target in here.sites:
                x = here.window(emit, x, window)
                start, stop = here.range(window.target)
                factor = sizes_after[n] // sizes_before[n]
                first, last = within(*window.needs(start, stop), sizes_before[n])
                goal[n], cuts[n] = (last - first) * factor, (start - first * factor, stop - first * factor)
        out = emit(target, x, goal if args[1] else args[1], *args[2:], **kwargs)
        for n, (start, stop) in cuts.items():
            out = emit(aten.slice.Tensor, out, n + 2, start, stop)
        return out

    text = f"b c {' '.join(before)} -> b c {' '.join(after)}"
    return with_windows(text, call, windows, moved=moved, sizes=sizes, local=local)


def _neighbours(n: int, factor: int, reach: int) -> Window:
    def needs(start: int, stop: int) -> tuple[int, int]:
        return start // factor - reach, (stop - 1) // factor + reach + 1

    return Window(0, n + 2, f"old{n}", f"new{n}", needs, computes=True)


def _whole_factor(call: OpCall, old: int, new: int, scale: float | None) -> int | None:
    """The whole factor between the sizes, where the sources of a result are counted in its own part of the dim alone."""
    name = call.target._schema.name
    factor = max(old, new) // min(old, new)
    if factor * min(old, new) != max(old, new) or factor == 1:
        return None
    if name in _NEAREST:
        return factor if _is_exact(old, new, scale, "exact" in name) else None
    if call["align_corners"] or name in _ANTIALIASED or scale not in (None, new / old):
        return None
    # Where a dim shrinks, the sources of a result are around the middle of its k: four of them do not fit into two.
    return None if new < old and factor == 2 and _REACH[name] == 2 else factor


def _scales(call: OpCall, count: int) -> list[float | None]:
    """The factors asked for, by which the op then goes instead of by the sizes."""
    if "scale_factors" in call.bound:
        return call["scale_factors"] or [None] * count
    return [value for name, value in call.bound.items() if name.startswith("scales")]


def _is_exact(old: int, new: int, scale: float | None, exact: bool) -> bool:
    """Whether the source of every result is what a whole factor says; the op computes it in single precision."""
    factor = max(old, new) // min(old, new)
    with torch.device("cpu"):
        step = torch.tensor(old / new if scale is None else 1 / scale, dtype=torch.float32)
        place = torch.arange(new, dtype=torch.float32)
        source = ((place + 0.5 if exact else place) * step).floor().clamp(max=old - 1)
        expected = torch.arange(new) // factor if new > old else torch.arange(new) * factor
    return torch.equal(source.long(), expected)


@rule("aten::grid_sampler")
def grid_sampler(call: OpCall) -> OpRule:
    """Each place of the grid looks somewhere in the image, which stays whole."""
    space = len(call.operands[0].shape) - 2
    image, grid = " ".join(numbered(space, "s")), " ".join(numbered(space))
    text = f"b c {image}, b {grid} place -> b c {grid}"
    return from_notation(text, call, moved=["place", *image.split()])


@rule("aten::affine_grid_generator")
def affine_grid(call: OpCall) -> OpRule:
    """Places of a grid, moved by a matrix for each sample."""
    space = " ".join(numbered(len(call.outputs[0]) - 2))

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, args[0], [here.outputs[0][0], *args[1][1:]], *args[2:], **kwargs)

    return from_notation(f"b p q -> b {space} p", call, moved=["p", "q", *space.split()], local=local)
