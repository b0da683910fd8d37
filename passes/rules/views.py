"""Ops that only rename a tensor's elements: reshapes, permutations, broadcasts, pieces and joins."""

from __future__ import annotations

import torch

from ..notation import Dim, Local, OpCall, OpRule, Shape, from_notation
from . import rule

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
)
def reshape(call: OpCall) -> OpRule | None:
    before, after = call.operands[0].shape, call.outputs[0]
    if 0 in before or call.target is aten.view.dtype:
        return None
    before_dims, after_dims, sizes, opaque = align(before, after)
    inputs = (tuple(before_dims), *(tuple(() for _ in other.shape) for other in call.operands[1:]))
    return OpRule(
        inputs, (tuple(after_dims),), sizes, moved=opaque, is_view=len(inputs) == 1 and not opaque, local=to_local_shape
    )


@rule("aten::permute", "aten::transpose", "aten::t", "aten::swapaxes", "aten::movedim", "aten::numpy_T", "aten::mT")
def permute(call: OpCall) -> OpRule | None:
    """`a b c -> c a b`: the order is read off a tensor that numbers its dims."""
    rank = len(call.operands[0].shape)
    probe = torch.empty([position + 2 for position in range(rank)], device="meta")
    arguments = [probe if position == 0 else argument for position, argument in enumerate(call.args)]
    order = [size - 2 for size in call.target(*arguments, **call.kwargs).shape]
    names = [f"d{position}" for position in range(rank)]
    text = f"{' '.join(names)} -> {' '.join(names[position] for position in order)}"
    return from_notation(text, call, is_view=True)


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to")
def expand(call: OpCall) -> OpRule:
    """A dim of size one repeated: the new axis is made where it is needed, each rank its part."""

    def local(emit, target, args, kwargs, here: Local):
        return emit(aten.expand.default, args[0], list(here.outputs[0]))

    same = call.operands[0].shape == call.outputs[0] and len(call.operands) == 1
    others = ", ..." if len(call.operands) > 1 else ""
    return from_notation(f"...{others} -> ...", call, is_view=same, local=local)


@rule("aten::repeat")
def repeat(call: OpCall) -> OpRule:
    shape, times = call.operands[0].shape, list(call["repeats"])
    lead = len(times) - len(shape)
    names = [f"d{position}" for position in range(len(shape))]
    sizes = dict(zip(names, shape, strict=True)) | {f"r{position}": n for position, n in enumerate(times)}
    out = [f"r{position}" if position < lead else f"(r{position} d{position - lead})" for position in range(len(times))]

    def local(emit, target, args, kwargs, here: Local):
        counts = [here.sizes.get(f"r{position}", n) for position, n in enumerate(times)]
        return emit(target, args[0], counts)

    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, sizes=sizes, local=local)


@rule("aten::repeat_interleave.self_int")
def repeat_interleave(call: OpCall) -> OpRule | None:
    if call["dim"] is None and len(call.operands[0].shape) != 1:
        return None
    dim, count = call.dim(call["dim"] or 0), call["repeats"]
    names = [f"d{position}" for position in range(len(call.operands[0].shape))]
    out = [f"({name} r)" if position == dim else name for position, name in enumerate(names)]
    sizes = dict(zip(names, call.operands[0].shape, strict=True)) | {"r": count}

    def local(emit, target, args, kwargs, here: Local):
        size = here.outputs[0][dim]
        return emit(target, args[0], here.sizes.get("r", count), dim, output_size=size)

    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, sizes=sizes, local=local)


@rule("aten::select")
def select(call: OpCall) -> OpRule:
    rank = len(call.operands[0].shape)
    names = [f"d{position}" for position in range(rank)]
    gone = names[call.dim(call["dim"])]
    kept = " ".join(name for name in names if name != gone)
    return from_notation(f"{' '.join(names)} -> {kept}", call, moved=[gone])


@rule("aten::slice", "aten::narrow")
def slice_(call: OpCall) -> OpRule | None:
    if call.target is aten.narrow.Tensor:
        return None  # where it begins is a value
    shape = call.operands[0].shape
    dim = call.dim(call["dim"])
    names = [f"d{position}" for position in range(len(shape))]
    if shape == call.outputs[0] and call.bound.get("step", 1) == 1:
        return from_notation(
            f"{' '.join(names)} -> {' '.join(names)}", call, is_view=True, local=lambda emit, t, args, kw, here: args[0]
        )
    out = ["piece" if position == dim else name for position, name in enumerate(names)]
    return from_notation(f"{' '.join(names)} -> {' '.join(out)}", call, moved=[names[dim], "piece"])


@rule("aten::slice_scatter", "aten::select_scatter")
def scatter_piece(call: OpCall) -> OpRule:
    """A slice or an index of one dim replaced: that dim stays whole."""
    shape = call.operands[0].shape
    dim = call.dim(call["dim"])
    names = [f"d{position}" for position in range(len(shape))]
    source = [name if position != dim else "piece" for position, name in enumerate(names)]
    if call.target._schema.name == "aten::select_scatter":
        source.pop(dim)
    whole = " ".join(names)
    return from_notation(
        f"{whole}, {' '.join(source)} -> {whole}",
        call,
        moved=[names[dim], "piece"] if "piece" in source else [names[dim]],
    )


@rule("aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unbind", "aten::tensor_split.sections")
def pieces(call: OpCall) -> OpRule:
    """Pieces of equal size are a split of the dim into `(piece rest)`, so a fused qkv shards by its rest."""
    shape = call.operands[0].shape
    dim = call.dim(call["dim"])
    names = [f"d{position}" for position in range(len(shape))]
    count = len(call.outputs)
    unbind = call.target._schema.name == "aten::unbind"
    before, after = list(names), list(names)
    sizes = {name: size for name, size in zip(names, shape, strict=True) if name != names[dim]}
    if unbind:
        after.pop(dim)
        moved = [names[dim]]
        sizes[names[dim]] = shape[dim]
    elif len({out[dim] for out in call.outputs}) == 1:
        before[dim], after[dim] = "(piece rest)", "rest"
        sizes |= {"piece": count, "rest": shape[dim] // count}
        moved = ["piece"]
    else:
        moved = [names[dim], *(f"piece{position}" for position in range(count))]
        groups = [" ".join([*names[:dim], f"piece{k}", *names[dim + 1 :]]) for k in range(count)]
        return from_notation(f"{' '.join(names)} -> {', '.join(groups)}", call, moved=moved)

    def local(emit, target, args, kwargs, here: Local):
        if target._schema.name in ("aten::chunk", "aten::unbind", "aten::tensor_split"):
            return emit(target, *args, **kwargs)
        return emit(aten.split_with_sizes.default, args[0], [out[dim] for out in here.outputs], dim)

    text = f"{' '.join(before)} -> {', '.join([' '.join(after)] * count)}"
    return from_notation(text, call, moved=moved, sizes=sizes, local=local)


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(call: OpCall) -> OpRule | None:
    rank = len(call.outputs[0])
    if any(len(operand.shape) != rank for operand in call.operands):
        return None  # the legacy empty tensor of shape (0,)
    dim = call.dim(call["dim"], rank)
    names = [f"d{position}" for position in range(rank)]

    def at_dim(name: str) -> str:
        return " ".join(name if position == dim else other for position, other in enumerate(names))

    parts = [f"part{position}" for position in range(len(call.operands))]
    text = f"{', '.join(map(at_dim, parts))} -> {at_dim('all')}"
    return from_notation(text, call, moved=[*parts, "all"])


@rule("aten::stack")
def stack(call: OpCall) -> OpRule:
    rank = len(call.outputs[0])
    dim = call.dim(call["dim"], rank)
    names = [f"d{position}" for position in range(rank - 1)]
    out = [*names[:dim], "stacked", *names[dim:]]
    text = f"{', '.join([' '.join(names)] * len(call.operands))} -> {' '.join(out)}"
    return from_notation(text, call, moved=["stacked"])


@rule("aten::flip", "aten::roll", "aten::tril", "aten::triu")
def reorder(call: OpCall) -> OpRule:
    """Along the dims that an op reorders or masks by position, every rank needs all of them."""
    rank = len(call.operands[0].shape)
    dims = (rank - 2, rank - 1) if call.target._schema.name in ("aten::tril", "aten::triu") else call["dims"]
    names = [f"d{position}" for position in range(rank)]
    moved = [names[call.dim(dim)] for dim in dims] if dims else names
    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, moved=moved)


def _local_size(emit, target, args, kwargs, here: Local):
    position = 1 if target._schema.name.startswith("aten::new_") else 0
    return emit(target, *args[:position], list(here.outputs[0]), *args[position + 1 :], **kwargs)


@rule("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones", "aten::new_full")
def constant(call: OpCall) -> OpRule:
    """The same value everywhere: each rank makes its part."""
    names = " ".join(f"d{position}" for position in range(len(call.outputs[0])))
    unread = "_ " * len(call.operands[0].shape) if call.operands else ""
    return from_notation(f"{unread} -> {names}", call, local=_local_size)


@rule("aten::arange", "aten::linspace", "aten::eye")
def positions(call: OpCall) -> OpRule | None:
    """Made from positions: whole on every rank, and split after, so that positions stay global."""
    if call.operands:
        return None
    names = [f"d{position}" for position in range(len(call.outputs[0]))]
    sizes = {name: size for name, size in zip(names, call.outputs[0], strict=True) if size != 1}
    dims = tuple((name,) if name in sizes else () for name in names)
    return OpRule((), (dims,), sizes, moved=frozenset(sizes))
