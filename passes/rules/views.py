"""Ops that only rename a tensor's elements: reshapes, permutations, broadcasts, pieces and joins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..notation import Dim, Local, OpCall, OpRule, Shape, Window, from_notation, within
from . import along, numbered, rule

aten = torch.ops.aten


def align(before: Shape, after: Shape) -> tuple[list[Dim], list[Dim], dict[str, int], frozenset[str]]:
    """Axes shared by the two shapes of a reshape: dims before, dims after, sizes, and the axes that do not nest.

    From the outermost: equal sizes are one axis, 24 against 4·6 is two; 6·4 against 8·3 has no common factors, so
    those dims get axes of their own which nobody may shard.
    """
    dims: tuple[list[list[str]], list[list[str]]] = ([[] for _ in before], [[] for _ in after])
    sizes: dict[str, int] = {}
    opaque: set[str] = set()
    left = [[size, position] for position, size in enumerate(before) if size != 1]
    right = [[size, position] for position, size in enumerate(after) if size != 1]

    def axis(size: int) -> str:
        name = f"a{len(sizes)}"
        sizes[name] = size
        return name

    while left and right:
        (a, i), (b, j) = left[0], right[0]
        common = min(a, b)
        if a % common == 0 and b % common == 0:
            name = axis(common)
            dims[0][i].append(name)
            dims[1][j].append(name)
            for side, size in ((left, a), (right, b)):
                if size == common:
                    side.pop(0)
                else:
                    side[0][0] = size // common
            continue
        products, groups = [a, b], ([left.pop(0)], [right.pop(0)])
        while products[0] != products[1]:
            short = 0 if products[0] < products[1] else 1
            piece = (left, right)[short].pop(0)
            products[short] *= piece[0]
            groups[short].append(piece)
        for side, group in enumerate(groups):
            for size, position in group:
                name = axis(size)
                dims[side][position].append(name)
                opaque.add(name)
    return [tuple(d) for d in dims[0]], [tuple(d) for d in dims[1]], sizes, frozenset(opaque)


def to_local_shape(emit, target, args, kwargs, local: Local):
    # reshape, not view: a resharded operand is contiguous where the model's own may have been strided otherwise.
    return emit(aten.reshape.default, args[0], list(local.outputs[0]))


@rule(
    "aten::view",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::view_as",
    "aten::reshape_as",
    "aten::flatten",
    "aten::unflatten",
    "aten::unsqueeze",
    "aten::squeeze",
    "aten::ravel",
    "aten::view_copy",
    "aten::unsqueeze_copy",
    "aten::squeeze_copy",
    "aten::atleast_1d.default",
    "aten::atleast_2d.default",
    "aten::atleast_3d.default",
)
def reshape(call: OpCall) -> OpRule | None:
    before, after = call.operands[0].shape, call.outputs[0]
    if 0 in before:
        return None
    before_dims, after_dims, sizes, opaque = align(before, after)
    inputs = (tuple(before_dims), *(tuple(() for _ in other.shape) for other in call.operands[1:]))
    return OpRule(
        inputs, (tuple(after_dims),), sizes, moved=opaque, is_view=len(inputs) == 1 and not opaque, local=to_local_shape
    )


@rule("aten::view.dtype")
def view_dtype(call: OpCall) -> OpRule:
    """The same bytes read as another dtype: where an element is longer or shorter, the last dim stays whole."""
    if call.operands[0].shape == call.outputs[0]:
        return from_notation("... -> ...", call)
    return from_notation("... before -> ... after", call, moved=["before", "after"])


@rule(
    "aten::permute",
    "aten::transpose",
    "aten::t",
    "aten::swapaxes",
    "aten::swapdims",
    "aten::movedim",
    "aten::moveaxis",
    "aten::numpy_T",
    "aten::mT",
    "aten::mH",
    "aten::matrix_H",
    "aten::adjoint",
    "aten::permute_copy",
    "aten::transpose_copy",
    "aten::t_copy",
)
def permute(call: OpCall) -> OpRule | None:
    """`a b c -> c a b`: the order is read off a tensor that numbers its dims."""
    conjugates = call.target._schema.name in ("aten::mH", "aten::matrix_H", "aten::adjoint")
    rank = len(call.operands[0].shape)
    probe = torch.empty([position + 2 for position in range(rank)], device="meta")
    arguments = [probe if position == 0 else argument for position, argument in enumerate(call.args)]
    order = [size - 2 for size in call.target(*arguments, **call.kwargs).shape]
    names = [f"d{position}" for position in range(rank)]
    text = f"{' '.join(names)} -> {' '.join(names[position] for position in order)}"
    return from_notation(text, call, is_view=not conjugates)


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to", "aten::expand_copy")
def expand(call: OpCall) -> OpRule:
    """A dim of size one repeated: the new axis is made where it is needed, each rank its part."""

    def local(emit, target, args, kwargs, here: Local):
        return emit(aten.expand.default, args[0], list(here.outputs[0]))

    same = call.operands[0].shape == call.outputs[0] and len(call.operands) == 1
    others = ", ..." if len(call.operands) > 1 else ""
    return from_notation(f"...{others} -> ...", call, is_view=same, local=local)


@rule("aten::repeat", "aten::tile")
def repeat(call: OpCall) -> OpRule:
    shape = call.operands[0].shape
    times = list(call["repeats"] if call.target._schema.name == "aten::repeat" else call["dims"])
    times = [1] * (len(shape) - len(times)) + times  # `tile` may name only the last dims
    lead = len(times) - len(shape)
    names = numbered(len(shape))
    sizes = dict(zip(names, shape, strict=True)) | {f"r{position}": n for position, n in enumerate(times)}
    out = [f"r{position}" if position < lead else f"(r{position} d{position - lead})" for position in range(len(times))]

    def local(emit, target, args, kwargs, here: Local):
        counts = [here.sizes.get(f"r{position}", n) for position, n in enumerate(times)]
        return emit(aten.repeat.default, args[0], counts)

    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, sizes=sizes, local=local)


@rule("aten::repeat_interleave.self_int")
def repeat_interleave(call: OpCall) -> OpRule:
    """Each element several times along a dim; without a dim, of the flattened operand."""
    count, dim = call["repeats"], call["dim"]
    names = numbered(len(call.operands[0].shape))
    flat = dim is None or not names
    at = 0 if flat else call.dim(dim)
    out = [f"({' '.join(names)} r)"] if flat else [f"({name} r)" if n == at else name for n, name in enumerate(names)]
    sizes = dict(zip(names, call.operands[0].shape, strict=True)) | {"r": count}

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, args[0], here.sizes.get("r", count), dim, output_size=here.outputs[0][at])

    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, sizes=sizes, local=local)


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


_TO_THE_END = 2**63 - 1


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


# Ops that split one certain dim.
_ROW_SPLITS = {"aten::hsplit": 1, "aten::vsplit": 0, "aten::dsplit": 2}


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
    windows = [
        Window(0, dim, own, piece, lambda start, stop, at=at: (start + at, stop + at)) for piece, at in zip(pieces, starts)
    ]
    sums = call.operands[0].dtype != torch.bool
    long = [piece for piece, length in zip(pieces, lengths) if length > 1]
    ranges = [(own, *some) for some in _some(long) if sums or len(some) == len(pieces)]

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


def _some(long: list[str]) -> Iterator[tuple[str, ...]]:
    """Which of several parts may be sharded at once: any of up to three; of more of them, all."""
    for count in range(1, len(long) + 1) if len(long) <= 3 else [len(long)]:
        yield from itertools.combinations(long, count)


@rule("aten::unbind", "aten::unbind_copy")
def unbind(call: OpCall) -> OpRule:
    names = numbered(len(call.operands[0].shape))
    gone = names[call.dim(call["dim"])]
    kept = " ".join(name for name in names if name != gone)
    return from_notation(f"{' '.join(names)} -> {', '.join([kept] * len(call.outputs))}", call, moved=[gone])


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
        windows.append(Window(position, dim, part, "all", lambda start, stop, at=ends: (start - at, stop - at)))
        ends += length
    ranges = [(*some, "all") for some in _some([part for part, length in zip(parts, lengths) if length > 1])]
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


@rule("aten::flip")
def flip(call: OpCall) -> OpRule:
    """A range of the result needs the range that is as far from the other end."""
    shape = call.operands[0].shape
    names = [f"d{position}" for position in range(len(shape))]
    dims = [call.dim(dim) for dim in call["dims"]]
    windows = tuple(
        Window(0, dim, names[dim], names[dim], lambda start, stop, size=shape[dim]: (size - stop, size - start))
        for dim in dims
    )
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
        Window(0, dim, names[dim], names[dim], lambda a, b, shift=shift: (a - shift, b - shift), True, computes=True)
        for dim, shift in zip(dims, shifts)
    )
    return _in_place(call, names, windows, shifts)


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
    before, after, ranges = [f"d{position}" for position in range(lead)], [f"d{position}" for position in range(lead)], []
    windows: dict[int, Window] = {}
    for n, (left, right) in enumerate(ends, lead):
        if left == right == 0:
            before.append(f"d{n}")
            after.append(f"d{n}")
            continue
        before.append(f"i{n}")
        after.append(f"o{n}")
        size = shape[n]
        needs = {
            "constant": lambda a, b, left=left: (a - left, b - left),
            "circular": lambda a, b, left=left: (a - left, b - left),
            "replicate": lambda a, b, left=left, size=size: (
                min(max(a - left, 0), size - 1),
                max(min(b - left, size), 1),
            ),
            "reflect": lambda a, b, left=left, size=size: (
                max(min(a - left, 2 * size - 1 - (b - left)), 0),
                min(max(b - left, left - a + 1), size),
            ),
        }[mode]
        fill = value if mode == "constant" else None
        windows[n] = Window(0, n, f"i{n}", f"o{n}", needs, wraps=mode == "circular", fill=fill)
        ranges.append((f"i{n}", f"o{n}"))

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
    return from_notation(text, call, ranges=ranges, windows=tuple(windows.values()), local=local)


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


def local_size(emit, target, args, kwargs, here: Local, position: int):
    """The call with this rank's size as its `position`-th argument."""
    return emit(target, *args[:position], list(here.outputs[0]), *args[position + 1 :], **kwargs)


@rule(
    "aten::zeros",
    "aten::ones",
    "aten::full",
    "aten::empty",
    "aten::new_zeros",
    "aten::new_ones",
    "aten::new_full",
    "aten::new_empty",
)
def constant(call: OpCall) -> OpRule:
    """The same value everywhere: each rank makes its part."""
    names = " ".join(f"d{position}" for position in range(len(call.outputs[0])))
    unread = "_ " * len(call.operands[0].shape) if call.operands else ""

    def local(emit, target, args, kwargs, here: Local):
        return local_size(emit, target, args, kwargs, here, len(call.operands))

    return from_notation(f"{unread} -> {names}", call, local=local)


@rule("aten::arange", "aten::linspace", "aten::eye")
def positions(call: OpCall) -> OpRule | None:
    """Made from positions: whole on every rank, and split after, so that positions stay global."""
    if call.operands:
        return None
    names = [f"d{position}" for position in range(len(call.outputs[0]))]
    sizes = {name: size for name, size in zip(names, call.outputs[0], strict=True) if size != 1}
    dims = tuple((name,) if name in sizes else () for name in names)
    return OpRule((), (dims,), sizes, moved=frozenset(sizes))
