"""Look-ups and assignments by index: the dim that is looked up stays whole, the index's dims are parallel."""

from __future__ import annotations

import torch

from ..notation import Local, OpCall, Operand, OpRule, Window, from_notation
from . import numbered, rule
from .contractions import bias_once


@rule("aten::embedding")
def embedding(call: OpCall) -> OpRule | None:
    if call["scale_grad_by_freq"]:
        return None  # gradients that count how often an index stands in the whole input
    return from_notation("v c, ... -> ... c", call, moved="v")


@rule("aten::one_hot")
def one_hot(call: OpCall) -> OpRule | None:
    if call["num_classes"] < 0:
        return None  # as many as the largest index says
    return from_notation("... -> ... c", call, moved="c")


@rule("aten::index_select")
def index_select(call: OpCall) -> OpRule | None:
    if not call.operands[0].shape:
        return None
    names = numbered(len(call.operands[0].shape))
    dim = call.dim(call["dim"])
    index = "i" if call.operands[1].shape else "1"
    out = [index if position == dim else name for position, name in enumerate(names)]
    return from_notation(f"{' '.join(names)}, {index.strip('1')} -> {' '.join(out)}", call, moved=[names[dim]])


@rule("aten::gather")
def gather(call: OpCall) -> OpRule | None:
    """`out[i, j] = x[i, index[i, j]]`: where the index is shorter than x in another dim, that dim stays whole."""
    x, index = (operand.shape for operand in call.operands)
    if len(x) != len(index) or not x:
        return None
    dim = call.dim(call["dim"])
    names, own = numbered(len(x)), numbered(len(x), "i")
    cut = {n for n in range(len(x)) if n != dim and x[n] != index[n]}
    out = [own[n] if n in {dim, *cut} else name for n, name in enumerate(names)]
    moved = [names[dim], *(names[n] for n in cut), *(own[n] for n in cut)]
    return from_notation(f"{' '.join(names)}, {' '.join(out)} -> {' '.join(out)}", call, moved=moved)


@rule("aten::take_along_dim")
def take_along_dim(call: OpCall) -> OpRule | None:
    """`gather` whose operands broadcast in the other dims; without a dim, both are flattened."""
    x, index = (operand.shape for operand in call.operands)
    names, own = numbered(len(x)), numbered(len(index), "i")
    if call["dim"] is None:
        flat = f"({' '.join(own)})" if own else "1"
        text = f"{' '.join(names)}, {' '.join(own)} -> {flat}"
        return from_notation(text, call, moved=names, sizes=dict(zip(own, index, strict=True)))
    if len(x) != len(index) or not x:
        return None
    dim = call.dim(call["dim"])
    out = [own[n] if n == dim else name for n, name in enumerate(names)]
    return from_notation(f"{' '.join(names)}, {' '.join(out)} -> {' '.join(out)}", call, moved=[names[dim]])


@rule("aten::take")
def take(call: OpCall) -> OpRule:
    """A look-up in the flattened operand."""
    names = numbered(len(call.operands[0].shape))
    return from_notation(f"{' '.join(names)}, ... -> ...", call, moved=names)


class _Indexed:
    """The dims of `x[:, i, j]`: i and j broadcast, and their common dims stand where i and j stood, or first where they
    stood apart.

    names: the axes of x. own: those of the common shape of the indices. gone: those of x that are indexed.
    """

    def __init__(self, call: OpCall) -> None:
        indices: list[Operand | None] = list(call["indices"])
        self.indices = [operand for operand in indices if operand is not None]
        self.positions = [position for position, operand in enumerate(indices) if operand is not None]
        self.masks = [operand for operand in self.indices if operand.dtype in (torch.bool, torch.uint8)]
        self.names = numbered(len(call.operands[0].shape))
        self.own = numbered(max((len(operand.shape) for operand in self.indices), default=0), "i")
        self.gone = [self.names[position] for position in self.positions]
        kept = [name for name in self.names if name not in self.gone]
        adjacent = len({position - n for n, position in enumerate(self.positions)}) == 1
        at = self.positions[0] if adjacent else 0
        self.result = [*kept[:at], *self.own, *kept[at:]]

    def operands(self) -> str:
        groups = [self.names, *(self.own[len(self.own) - len(operand.shape) :] for operand in self.indices)]
        return ", ".join(map(" ".join, groups))


@rule("aten::index.Tensor")
def index(call: OpCall) -> OpRule | None:
    """A mask has a result whose size depends on what is in it: such a call has no rule."""
    dims = _Indexed(call)
    if not dims.indices or dims.masks:
        return None
    return from_notation(f"{dims.operands()} -> {' '.join(dims.result)}", call, moved=dims.gone)


@rule("aten::index_put")
def index_put(call: OpCall) -> OpRule | None:
    """`x[:, i, j] = values`: the indexed dims stay whole. Values that are added may be shared out: ranks sum, and one of
    them adds x."""
    dims = _Indexed(call)
    if dims.masks:
        return _masked_put(call, dims) if len(dims.indices) == 1 and dims.masks[0].shape else None
    given = dims.result[len(dims.result) - len(call.operands[-1].shape) :]

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces, 0), **kwargs)

    summed = dims.own if call["accumulate"] and _is_number(call) else []
    text = f"{dims.operands()}, {' '.join(given)} -> {' '.join(dims.names)}"
    moved = {*dims.gone, *dims.own} - {*summed}
    rule_ = from_notation(text, call, moved=moved, reduces=summed, local=local)
    return rule_


def _masked_put(call: OpCall, dims: _Indexed) -> OpRule:
    """`x[:, mask] = values`: with one value for all of the mask's places, each element by itself. (The values of several
    places are counted by what is in the mask.)"""
    mask, values = dims.masks[0].shape, call.operands[-1].shape
    first = dims.positions[0]
    covered = dims.names[first : first + len(mask)]
    result = [*dims.names[:first], "places", *dims.names[first + len(mask) :]]
    given = result[len(result) - len(values) :]
    several = "places" in given and values[given.index("places")] != 1
    text = f"{' '.join(dims.names)}, {' '.join(covered)}, {' '.join(given)} -> {' '.join(dims.names)}"
    return from_notation(text, call, moved=["places", *covered] if several else [])


def _is_number(call: OpCall) -> bool:
    """What ranks can sum."""
    return call.operands[0].dtype != torch.bool


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: OpCall) -> OpRule | None:
    """`out[i, index[i, j]] = source[i, j]`: a dim in which the three differ in size is cut, so it stays whole.

    What is added may be shared out along the index: ranks sum, and one of them adds x.
    """
    shapes = [operand.shape for operand in call.operands]
    if any(len(shape) != len(shapes[0]) or not shape for shape in shapes):
        return None
    dim, rank = call.dim(call["dim"]), len(shapes[0])
    names = numbered(rank)
    cut = {n for n in range(rank) if n == dim or len({shape[n] for shape in shapes}) > 1}
    groups = [[f"{letter}{n}" if n in cut else name for n, name in enumerate(names)] for letter in "xis"]
    same = len(shapes) > 2 and shapes[1][dim] == shapes[2][dim]
    if same:
        groups[2][dim] = groups[1][dim]
    name = call.target._schema.name
    adds = name == "aten::scatter_add" or (
        name == "aten::scatter_reduce" and call["reduce"] == "sum" and call["include_self"]
    )
    summed = {groups[1][dim]} if adds and same and _is_number(call) else set()

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces, 0), **kwargs)

    text = f"{', '.join(map(' '.join, groups[: len(shapes)]))} -> {' '.join(groups[0])}"
    moved = {axis for group in groups for axis in group if axis not in names} - summed
    rule_ = from_notation(text, call, moved=moved, reduces=summed, local=local)
    return rule_


@rule("aten::index_add", "aten::index_copy", "aten::index_reduce", "aten::index_fill")
def index_assign(call: OpCall) -> OpRule | None:
    """Slices along one dim assigned, or added: what is added may be shared out, and one rank adds x."""
    if not call.operands[0].shape or not call.operands[1].shape:
        return None
    names = numbered(len(call.operands[0].shape))
    dim = call.dim(call["dim"])
    source = [name if n != dim else "i" for n, name in enumerate(names)]
    groups = [names, ["i"], [] if call.target._schema.name == "aten::index_fill" else source]
    adds = call.target._schema.name == "aten::index_add" and _is_number(call)

    def local(emit, target, args, kwargs, here: Local):
        return emit(target, *bias_once(emit, args, here, rule_.reduces, 0), **kwargs)

    text = f"{', '.join(map(' '.join, groups))} -> {' '.join(names)}"
    moved = [names[dim], *([] if adds else ["i"])]
    rule_ = from_notation(text, call, moved=moved, reduces="i" if adds else "", local=local)
    return rule_


@rule("aten::masked_scatter")
def masked_scatter(call: OpCall) -> OpRule:
    """Where an element of the source goes depends on the whole mask."""
    ranks = [len(operand.shape) for operand in call.operands]
    names, source = numbered(len(call.outputs[0])), numbered(ranks[2], "s")
    x, mask = (" ".join(names[len(names) - rank :]) for rank in ranks[:2])
    return from_notation(f"{x}, {mask}, {' '.join(source)} -> {' '.join(names)}", call, moved=names + source)


@rule("aten::searchsorted.Tensor")
def searchsorted(call: OpCall) -> OpRule:
    """Rows of sorted numbers, or one for all; each value is looked up by itself."""
    many = len(call.operands[0].shape) > 1
    return from_notation("... k, ... v, ... k -> ... v" if many else "k, ..., k -> ...", call, moved="k")


@rule("aten::bucketize.Tensor", "aten::isin.Tensor_Tensor")
def look_up(call: OpCall) -> OpRule:
    """Every element is compared with all of the second operand."""
    others = numbered(len(call.operands[1].shape), "k")
    return from_notation(f"..., {' '.join(others)} -> ...", call, moved=others)


@rule("aten::repeat_interleave.self_Tensor")
def repeat_interleave(call: OpCall) -> OpRule:
    """Each element as often as a number says, so that where it goes depends on all of them."""
    rank = len(call.operands[0].shape)
    names = numbered(rank)
    at = range(rank) if call["dim"] is None else [call.dim(call["dim"])]
    out = ["o"] if call["dim"] is None or not rank else ["o" if n in at else name for n, name in enumerate(names)]
    count = "k" * len(call.operands[1].shape)
    text = f"{' '.join(names)}, {count} -> {' '.join(out)}"
    return from_notation(text, call, moved=["k", "o", *(names[n] for n in at if rank)])


@rule("aten::diff")
def diff(call: OpCall) -> OpRule | None:
    """Differences of neighbours, with more elements before and after where they are given."""
    if not call.operands[0].shape:
        return None
    dim = call.dim(call["dim"])
    names = numbered(len(call.operands[0].shape))
    if len(call.operands) == 1:
        own, count = names[dim], call["n"]
        out = ["step" if name == own else name for name in names]
        window = Window(0, dim, own, "step", lambda start, stop: (start, stop + count), computes=True)

        def local(emit, target, args, kwargs, here: Local):
            x = here.window(emit, args[0], window) if "step" in here.sites else args[0]
            return emit(target, x, *args[1:], **kwargs)

        text = f"{' '.join(names)} -> {' '.join(out)}"
        return from_notation(text, call, ranges=[(own, "step")], windows=(window,), local=local)
    parts = [f"part{n}" for n in range(len(call.operands) + 1)]
    groups = [" ".join([*names[:dim], part, *names[dim + 1 :]]) for part in parts]
    return from_notation(f"{', '.join(groups[:-1])} -> {groups[-1]}", call, moved=parts)
