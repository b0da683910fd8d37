"""Parts of a tensor taken out or put back: an index or a range of one dim, or the dim in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..notation import Local, OpCall, OpRule, Window, from_notation, shifted, within
from . import numbered, rule

aten = torch.ops.aten
_TO_THE_END = 2**63 - 1
# Ops that split one certain dim.
_ROW_SPLITS = {"aten::hsplit": 1, "aten::vsplit": 0, "aten::dsplit": 2}


@rule("aten::select")
def select(call: OpCall) -> OpRule:
    """One index of a dim: the rank that holds it gives it, the others give 0 of it."""
    rank = len(call.operands[0].shape)
    names = [f"d{position}" for position in range(rank)]
    dim = call.dim(call["dim"])
    gone = names[dim]
    index = call["index"] % call.operands[0].shape[dim]
    kept = " ".join(name for name in names if name != gone)
    if call.operands[0].dtype == torch.bool:
        return from_notation(f"{' '.join(names)} -> {kept}", call, moved=[gone])

    def local(emit, target, args, kwargs, here: Local):
        start, stop = here.range(gone)
        if start <= index < stop:
            return emit(target, args[0], dim, index - start)
        nothing = emit(aten.slice.Tensor, args[0], dim, 0, 0)
        return emit(aten.sum.dim_IntList, nothing, [dim], False, dtype=call.operands[0].dtype)

    return from_notation(f"{' '.join(names)} -> {kept}", call, reduces=[gone], ranges=[(gone,)], local=local)


@rule("aten::slice", "aten::narrow")
def slice_(call: OpCall) -> OpRule | None:
    """A range of a dim, or every n-th element of it: a range of the piece needs a range of the dim. A piece too short to be
    shared out is Partial: ranks give what they hold of it, among zeros."""
    if call.target is aten.narrow.Tensor:
        return None  # where it begins is a value
    shape = call.operands[0].shape
    dim, step = call.dim(call["dim"]), call.bound.get("step", 1)
    names = [f"d{position}" for position in range(len(shape))]
    own = names[dim]
    if shape == call.outputs[0] and step == 1:
        return from_notation(
            f"{' '.join(names)} -> {' '.join(names)}", call, is_view=True, local=lambda emit, t, args, kw, here: args[0]
        )
    count = call.outputs[0][dim]
    if call.target is aten.narrow.default:
        first = call["start"] % shape[dim]
    else:
        first = within(*_from_the_front(call["start"], call["end"], shape[dim]), shape[dim])[0]
    if step > 1 and first < step and count * step == shape[dim]:
        # One of each n neighbours, and nothing is left over: ranks that hold whole groups of n need no others.
        before = [f"({own} step)" if name == own else name for name in names]

        def one_of_each(emit, target, args, kwargs, here: Local):
            return emit(aten.slice.Tensor, args[0], dim, first, _TO_THE_END, step)

        text, sizes = f"{' '.join(before)} -> {' '.join(names)}", {own: count, "step": step}
        return from_notation(text, call, moved=["step"], sizes=sizes, local=one_of_each)
    out = ["piece" if name == own else name for name in names]
    window = Window(0, dim, own, "piece", lambda start, stop: (first + start * step, first + (stop - 1) * step + 1))

    def local(emit, target, args, kwargs, here: Local):
        if own not in here.sites and "piece" not in here.sites:
            return emit(target, *args, **kwargs)
        if "piece" in here.sites:
            x = here.window(emit, args[0], window)
            return x if step == 1 else emit(aten.slice.Tensor, x, dim, 0, _TO_THE_END, step)
        start, stop = here.range(own)
        held = within(-(-(start - first) // step), -(-(stop - first) // step), count)
        begin = first + held[0] * step - start
        x = emit(aten.slice.Tensor, args[0], dim, *within(begin, begin + (held[1] - held[0]) * step, stop - start), step)
        ends = [0, 0] * (len(shape) - dim - 1) + [held[0], count - held[1]]
        return emit(aten.constant_pad_nd.default, x, ends)

    ranges = [(own, "piece"), (own,)] if call.operands[0].dtype != torch.bool else [(own, "piece")]
    return from_notation(
        f"{' '.join(names)} -> {' '.join(out)}", call, ranges=ranges, windows=(window,), local=local
    )


@rule("aten::slice_scatter", "aten::select_scatter")
def scatter_piece(call: OpCall) -> OpRule:
    """A range or an index of one dim replaced: ranks replace what they hold of it."""
    shape, source = call.operands[0].shape, call.operands[1].shape
    dim = call.dim(call["dim"])
    names = numbered(len(shape))
    own, piece = names[dim], list(names)
    is_select = call.target._schema.name == "aten::select_scatter"
    if is_select:
        piece.pop(dim)
        first, count = call["index"] % shape[dim], 1
    else:
        piece[dim] = "piece"
        first, count = within(*_from_the_front(call["start"], call["end"], shape[dim]), shape[dim])[0], source[dim]
    text = f"{' '.join(names)}, {' '.join(piece)} -> {' '.join(names)}"
    if not is_select and call["step"] != 1:
        return from_notation(text, call, moved=[own, "piece"])
    window = Window(1, dim, "piece", own, lambda start, stop: (start - first, stop - first))

    def local(emit, target, args, kwargs, here: Local):
        if own not in here.sites:
            return emit(target, *args, **kwargs)
        x, new = args[:2]
        start, stop = here.range(own)
        begin, end = within(first - start, first + count - start, stop - start)
        if is_select:
            new = emit(aten.slice.Tensor, emit(aten.unsqueeze.default, new, dim), dim, 0, end - begin)
        elif "piece" in here.whole_sizes:
            new = here.window(emit, new, window)
        else:
            new = emit(aten.slice.Tensor, new, dim, 0, end - begin)
        return emit(aten.slice_scatter.default, x, new, dim, begin, end)

    windows = () if is_select else (window,)
    return from_notation(text, call, ranges=[(own,), ("piece", own)], windows=windows, local=local)


def _from_the_front(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    start, end = start or 0, size if end is None else end
    return start + size * (start < 0), end + size * (end < 0)


@rule(
    "aten::chunk",
    "aten::unsafe_chunk",
    "aten::split",
    "aten::split_copy",
    "aten::unsafe_split",
    "aten::split_with_sizes",
    "aten::split_with_sizes_copy",
    "aten::unsafe_split_with_sizes",
    "aten::tensor_split.sections",
    "aten::tensor_split.indices",
    *_ROW_SPLITS,
)
def pieces(call: OpCall) -> OpRule | None:
    """Pieces of equal size are a split of the dim into `(piece rest)`, so a fused qkv shards by its rest."""
    shape, count = call.operands[0].shape, len(call.outputs)
    if call.target._schema.name in _ROW_SPLITS:
        dim = min(_ROW_SPLITS[call.target._schema.name], len(shape) - 1)
    else:
        dim = call.dim(call["dim"])
    names = numbered(len(shape))
    before, after = list(names), list(names)
    lengths = [out[dim] for out in call.outputs]
    if 0 in lengths:
        return None
    if len(set(lengths)) > 1:
        return _unequal_pieces(call, names, dim, lengths)
    before[dim], after[dim] = "(piece rest)", "rest"
    sizes = dict(zip(names, shape, strict=True)) | {"piece": count, "rest": lengths[0]}
    del sizes[names[dim]]

    def local(emit, target, args, kwargs, here: Local):
        return emit(aten.split_with_sizes.default, args[0], [out[dim] for out in here.outputs], dim)

    text = f"{' '.join(before)} -> {', '.join([' '.join(after)] * count)}"
    return from_notation(text, call, moved=["piece"], sizes=sizes, local=local)


def _unequal_pieces(call: OpCall, names: list[str], dim: int, lengths: list[int]) -> OpRule:
    """A range of a piece needs a range of the dim. Where the dim is cut and a piece is not, each rank has what it holds of
    the piece, and 0 for the rest."""
    own, pieces = names[dim], numbered(len(lengths), "piece")
    starts = list(itertools.accumulate(lengths, initial=0))
    windows = [Window(0, dim, own, piece, shifted(at)) for piece, at in zip(pieces, starts)]
    sums = call.operands[0].dtype != torch.bool
    long = [piece for piece, length in zip(pieces, lengths) if length > 1]
    ranges = [(own, *some) for some in some_of(long) if sums or len(some) == len(pieces)]

    def local(emit, target, args, kwargs, here: Local):
        if own not in here.sites:
            return emit(target, *args, **kwargs)
        x = args[0]
        return [
            here.window(emit, x, window) if window.target in here.sites else part(emit, x, start, stop, here)
            for window, start, stop in zip(windows, starts, starts[1:])
        ]

    def part(emit, x, start: int, stop: int, here: Local):
        first, last = here.range(own)
        begin, end = within(first - start, last - start, stop - start)
        taken = emit(aten.slice.Tensor, x, dim, *within(start + begin - first, start + end - first, last - first))
        around = [0, 0] * (len(names) - dim - 1) + [begin, stop - start - end]
        return emit(aten.constant_pad_nd.default, taken, around)

    groups = [" ".join(piece if name == own else name for name in names) for piece in pieces]
    return from_notation(
        f"{' '.join(names)} -> {', '.join(groups)}",
        call,
        reduces=[own] if sums else [],
        ranges=ranges,
        windows=tuple(windows),
        moved=[] if ranges else [own, *pieces],
        local=local,
    )


def some_of(long: list[str]) -> Iterator[tuple[str, ...]]:
    """Which of several parts may be sharded at once: any of up to three; of more of them, all."""
    for count in range(1, len(long) + 1) if len(long) <= 3 else [len(long)]:
        yield from itertools.combinations(long, count)


@rule("aten::unbind", "aten::unbind_copy")
def unbind(call: OpCall) -> OpRule:
    names = numbered(len(call.operands[0].shape))
    gone = names[call.dim(call["dim"])]
    kept = " ".join(name for name in names if name != gone)
    return from_notation(f"{' '.join(names)} -> {', '.join([kept] * len(call.outputs))}", call, moved=[gone])
