"""Windows of a dim as a dim of their own, and space folded into channels.

Where windows stand side by side (step = size) they are a reshape of the dim, `(window place)`: both parts are parallel.
Where they overlap or leave something out, a range of windows needs a range of the dim.
"""

from __future__ import annotations

from ..notation import Local, OpCall, OpRule, Window, from_notation
from . import numbered, rule
from .sliding import Sliding, per_dim, with_windows


@rule("aten::unfold", "aten::unfold_copy")
def unfold(call: OpCall) -> OpRule | None:
    """`d -> window place`, where the place in the window comes last."""
    shape = call.operands[0].shape
    if not shape:
        return None
    dim, size = call.dim(call["dimension"]), call["size"]
    names = numbered(len(shape))
    after = [*names, "place"]
    after[dim] = "window"
    slide = Sliding(size, call["step"], 1, 0, 0)
    if not slide.is_patches(shape[dim]):
        window = Window(0, dim, names[dim], "window", slide.needs, computes=True)

        def overlapping(emit, target, args, kwargs, here: Local):
            x = here.window(emit, args[0], window) if "window" in here.sites else args[0]
            return emit(target, x, *args[1:])

        text = f"{' '.join(names)} -> {' '.join(after)}"
        return with_windows(text, call, {dim: window}, moved=["place"], local=overlapping)
    before = list(names)
    before[dim] = "(window place)"

    def local(emit, target, args, kwargs, here: Local):
        length = here.sizes.get("place", 1)
        return emit(target, args[0], dim, length, length)

    text = f"{' '.join(before)} -> {' '.join(after)}"
    sizes = {"window": shape[dim] // size, "place": size}
    return from_notation(text, call, sizes=sizes, local=local)


@rule("aten::im2col", "aten::col2im")
def columns(call: OpCall) -> OpRule:
    """An image `b c h w` as columns `b (c p q) (i j)`, or back: p and q are places in the window, i and j number windows.

    Back from windows that overlap, places are sums of several windows: they stay whole.
    """
    to_columns = call.target._schema.name == "aten::im2col"
    image = call.operands[0].shape if to_columns else call.outputs[0]
    lead = len(image) - 2
    kernel, stride, padding, dilation = (
        per_dim(call, name, 2) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    slides = [Sliding(k, s, d, p, p) for k, s, d, p in zip(kernel, stride, dilation, padding)]
    sides, sizes, moved = [], {"c": image[lead - 1], "p": kernel[0], "q": kernel[1]}, []
    windows: dict[int, Window] = {}
    for n, (slide, size, side, count, place) in enumerate(zip(slides, image[lead:], "hw", "ij", "pq")):
        sizes[count] = (size + 2 * slide.before - slide.span) // slide.stride + 1
        if slide.is_patches(size):
            sides.append(f"({count} {place})")
            continue
        sides.append(side)
        moved.append(place)
        if to_columns:
            windows[n] = Window(0, lead + n, side, count, slide.needs, fill=0.0, computes=True)
        else:
            moved += [side, count]

    def local(emit, target, args, kwargs, here: Local):
        x, margins = args[0], list(padding)
        for n, window in windows.items():
            if window.target in here.sites:
                x, margins[n] = here.window(emit, x, window), 0
        places = [here.sizes.get(place, 1) for place in "pq"]
        steps = [own if own != k else step for own, k, step in zip(places, kernel, stride)]
        size = [] if to_columns else [list(here.outputs[0][-2:])]
        return emit(target, x, *size, places, dilation, margins, steps)

    batch = "b " * (lead - 1)
    groups = (f"{batch}c {' '.join(sides)}", f"{batch}(c p q) (i j)")
    text = " -> ".join(groups if to_columns else reversed(groups))
    return with_windows(text, call, windows, moved=moved, sizes=sizes, local=local)


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle")
def pixel_shuffle(call: OpCall) -> OpRule:
    """Channels `(c p q)` to space `(h p) (w q)`, or back: every rank needs the whole square p q."""
    deep, wide = "... (c p q) h w", "... c (h p) (w q)"
    if call.target._schema.name == "aten::pixel_shuffle":
        text, factor = f"{deep} -> {wide}", call["upscale_factor"]
    else:
        text, factor = f"{wide} -> {deep}", call["downscale_factor"]
    return from_notation(text, call, moved="pq", sizes={"p": factor, "q": factor})


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: OpCall) -> OpRule:
    """`b (g c) ... -> b (c g) ...`"""
    groups = call["groups"]
    rest = " ".join(numbered(len(call.operands[0].shape) - 2))

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, args[0], here.sizes.get("g", 1))

    return from_notation(f"b (g c) {rest} -> b (c g) {rest}", call, sizes={"g": groups}, local=local)
