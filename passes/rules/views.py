"""Ops that only rename a tensor's elements, or repeat them: reshapes, permutations, broadcasts, repeats."""

from __future__ import annotations

import torch

from ..notation import Dim, Local, OpCall, OpRule, Shape, from_notation
from . import numbered, rule

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
