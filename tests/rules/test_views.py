"""Views, pieces and joins."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    BOOL,
    DTYPES,
    F32,
    F64,
    FLOATS,
    I64,
    SIZE,
    Call,
    aten,
    broadcastable,
    call,
    cases,
    dim_of,
    dims_of,
    fixed_calls,
    generated,
    generated_calls,
    index,
    one_of,
    overload,
    rule_of,
    shape_of,
    shards_nothing,
    t,
)


@cases("aten::view", "aten::reshape", "aten::_unsafe_view")
def _(name):
    for before, after in (
        ((4, 5, 6), (20, 6)),
        ((20, 6), (4, 5, 6)),
        ((4, 5, 6), (120,)),
        ((24, 5), (2, 3, 4, 5)),
        ((6, 4), (4, 6)),
        ((6, 4, 5), (8, 3, 5)),
        ((2, 12, 3), (8, 9)),
        ((1, 5, 1, 6), (5, 6, 1)),
        ((5,), (1, 5, 1)),
        ((1, 1), ()),
        ((7, 6), (7, 3, 2)),
    ):
        yield call(overload(name), t(*before), list(after))
    yield call(overload(name), t(4, 6, dtype=I64), [-1, 3])
    yield call(overload(name), t(4, 6, dtype=BF16), [2, -1, 2])


@cases("aten::view_as", "aten::reshape_as")
def _(name):
    yield call(overload(name), t(5, 6), t(5, 3, 2))
    yield call(overload(name), t(5, 6), t(30))


@cases("aten::flatten", "aten::unflatten", "aten::unsqueeze", "aten::squeeze")
def _(name):
    if name == "aten::flatten":
        for ends in ((0, -1), (1, 2), (-2, -1), (1, 1)):
            yield call(aten.flatten.using_ints, t(5, 6, 7), *ends)
        yield call(aten.flatten.using_ints, t())
    elif name == "aten::unflatten":
        yield call(aten.unflatten.int, t(5, 12), 1, [3, 4])
        yield call(aten.unflatten.int, t(5, 12, 3), -2, [2, -1])
    elif name == "aten::unsqueeze":
        for dim in (0, 1, -1, -2):
            yield call(aten.unsqueeze.default, t(5, 7), dim)
    else:
        yield call(aten.squeeze.default, t(5, 1, 7, 1))
        yield call(aten.squeeze.dim, t(5, 1, 7), 1)
        yield call(aten.squeeze.dim, t(5, 1, 7), -1)
        yield call(aten.squeeze.dims, t(1, 5, 1), [0, 2])


@cases("aten::permute", "aten::transpose", "aten::t", "aten::swapaxes", "aten::movedim", "aten::numpy_T", "aten::mT")
def _(name):
    x = t(2, 5, 1, 7)
    forms = {
        "permute": [(aten.permute.default, x, [3, 0, 2, 1]), (aten.permute.default, x, [-1, -2, 0, 1])],
        "transpose": [(aten.transpose.int, x, 1, -1), (aten.transpose.int, t(5, 7, dtype=I64), 0, 1)],
        "t": [(aten.t.default, t(5, 7)), (aten.t.default, t(5))],
        "swapaxes": [(aten.swapaxes.default, x, 0, 3)],
        "movedim": [(aten.movedim.int, x, 0, -1), (aten.movedim.intlist, x, [0, 1], [2, 0])],
        "numpy_T": [(aten.numpy_T.default, t(5, 7))],
        "mT": [(aten.mT.default, t(3, 5, 7))],
    }
    for form in forms[name.removeprefix("aten::")]:
        yield call(*form)


@cases("aten::expand", "aten::expand_as", "aten::broadcast_to")
def _(name):
    for before, after in (((5, 1), (5, 7)), ((7,), (5, 7)), ((1, 5, 1), (2, 5, 7)), ((5, 7), (5, 7)), ((), (5, 7))):
        size = t(*after, dtype=F32) if name == "aten::expand_as" else list(after)
        yield call(overload(name), t(*before), size)
    if name != "aten::expand_as":
        yield call(overload(name), t(5, 1), [3, -1, 7])


@cases("aten::repeat")
def _():
    for shape, times in (
        ((5,), [3]),
        ((5, 7), [1, 1]),
        ((5, 7), [2, 3]),
        ((5, 7), [4, 1, 2]),
        ((1, 7), [5, 1]),
        ((5, 1), [1, 3]),
        ((), [7]),
    ):
        yield call(aten.repeat.default, t(*shape), times)


@cases("aten::repeat_interleave.self_int")
def _():
    for dim, times in itertools.product((0, 1, -1), (1, 3)):
        yield call(aten.repeat_interleave.self_int, t(5, 1, 7), times, dim)
    yield call(aten.repeat_interleave.self_int, t(5), 3)
    yield call(aten.repeat_interleave.self_int, t(5, 7), 3, 1, output_size=21)


@cases("aten::select", "aten::slice", "aten::narrow")
def _(name):
    for dim in (0, 1, -1):
        if name == "aten::select":
            yield call(aten.select.int, t(5, 6, 7), dim, -2)
        elif name == "aten::slice":
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 1, 4)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 0, 2**63 - 1)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, 0, 2**63 - 1, 2)
            yield call(aten.slice.Tensor, t(5, 6, 7), dim, -3)
        else:
            yield call(aten.narrow.default, t(5, 6, 7), dim, 1, 4)
            yield call(aten.narrow.default, t(5, 6, 7), dim, 0, t(5, 6, 7).shape[dim])
    if name == "aten::select":
        yield call(aten.select.int, t(7), 0, 3)


@cases("aten::slice_scatter", "aten::select_scatter")
def _(name):
    for dim, piece in ((0, (3, 6, 7)), (1, (5, 3, 7)), (-1, (5, 6, 3))):
        if name == "aten::slice_scatter":
            yield call(aten.slice_scatter.default, t(5, 6, 7), t(*piece), dim, 1, 4)
        else:
            index = tuple(size for position, size in enumerate((5, 6, 7)) if position != dim % 3)
            yield call(aten.select_scatter.default, t(5, 6, 7), t(*index), dim, 2)


@cases("aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unbind", "aten::tensor_split.sections")
def _(name):
    for dim in (1, -1, -2):
        x = t(2, 12, 15)
        if name == "aten::unbind":
            yield call(aten.unbind.int, t(5, 3, 7), dim)
        elif name == "aten::split_with_sizes":
            yield call(aten.split_with_sizes.default, x, [3] * (x.shape[dim] // 3), dim)
            yield call(aten.split_with_sizes.default, x, [1, x.shape[dim] - 1], dim)
        elif name == "aten::split":
            yield call(aten.split.Tensor, x, 3, dim)
            yield call(aten.split.Tensor, x, 5, dim)  # uneven where dim is 12
            yield call(aten.split.sizes, x, [x.shape[dim] - 3, 3], dim)
        else:
            for count in (1, 3, 5, 7):
                yield call(overload(name), x, count, dim)
    if name == "aten::unbind":
        yield call(aten.unbind.int, t(3, 7), 0)


@cases("aten::cat", "aten::concat", "aten::concatenate", "aten::stack")
def _(name):
    for dim in (0, 1, -1):
        other = [2, 3, 4]
        if name != "aten::stack":
            other[dim] = 5
        yield call(overload(name), [t(2, 3, 4), t(*other), t(2, 3, 4)], dim)
    yield call(overload(name), [t(5, 7, dtype=I64)] * 2)
    if name == "aten::stack":
        yield call(aten.stack.default, [t(5, 7), t(5, 7)], -2)


@cases("aten::flip", "aten::roll", "aten::tril", "aten::triu")
def _(name):
    for lead in ((), (5,), (2, 3)):
        x = t(*lead, 6, 7)
        if name == "aten::flip":
            yield call(aten.flip.default, x, [0, -1])
            yield call(aten.flip.default, x, [-2])
        elif name == "aten::roll":
            yield call(aten.roll.default, x, [2], [-1])
            yield call(aten.roll.default, x, [2, -1], [0, 1])
            yield call(aten.roll.default, x, [3])
        else:
            yield call(overload(name), x)
            yield call(overload(name), x, 2)


@cases("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones", "aten::new_full")
def _(name):
    before = [t(3, 4, dtype=F32)] if "new_" in name else []
    after = [2.5] if "full" in name else []
    default = "memory_format" if name == "aten::empty" else "default"
    for size in ([5, 7], [5, 1, 3], []):
        yield call(overload(name, default), *before, size, *after)
        yield call(overload(name, default), *before, size, *after, dtype=BF16)


shards_nothing("aten::arange", "aten::linspace", "aten::eye", because="made from positions: every rank makes all of it")


@cases("aten::arange", "aten::linspace", "aten::eye")
def _(name):
    if name == "aten::arange":
        yield call(aten.arange.default, 7)
        yield call(aten.arange.start_step, 1, 9, 2)
    elif name == "aten::linspace":
        yield call(aten.linspace.default, 0, 1, 7)
    else:
        yield call(aten.eye.default, 5)


def _merged(draw, factors: list[int]) -> list[int]:
    """The factors merged into dims at random, with dims of size one in between."""
    dims = [1] if draw(st.booleans()) else []
    for factor in factors:
        if draw(st.booleans()) or not dims:
            dims.append(factor)
        else:
            dims[-1] *= factor
    return dims


def _two_shapes(draw) -> tuple[list[int], list[int]]:
    """Shapes of one number of elements, made of the same factors in the same order or in another one."""
    factors = shape_of(draw, 0, 4)
    others = factors if draw(st.booleans()) else draw(st.permutations(factors))
    return _merged(draw, factors), _merged(draw, others)


@generated("aten::view", "aten::reshape", "aten::_unsafe_view")
def _(draw, name):
    before, after = _two_shapes(draw)
    x = t(*before, dtype=one_of(draw, *DTYPES))
    if after and draw(st.booleans()):
        after[draw(st.integers(0, len(after) - 1))] = -1
    return call(overload(name), x, after)


@generated("aten::view_as", "aten::reshape_as")
def _(draw, name):
    before, after = _two_shapes(draw)
    return call(overload(name), t(*before, dtype=one_of(draw, *DTYPES)), t(*after, dtype=one_of(draw, *DTYPES)))


@generated("aten::flatten")
def _(draw):
    shape = shape_of(draw)
    first, last = sorted(draw(st.tuples(*[st.integers(0, max(len(shape) - 1, 0))] * 2)))
    first, last = (end - len(shape) if shape and draw(st.booleans()) else end for end in (first, last))
    return call(aten.flatten.using_ints, t(*shape, dtype=one_of(draw, *DTYPES)), first, last)


@generated("aten::unflatten")
def _(draw):
    shape, factors = shape_of(draw, 1, 3), draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = dim_of(draw, len(shape))
    shape[dim] = math.prod(factors)
    if draw(st.booleans()):
        factors[draw(st.integers(0, len(factors) - 1))] = -1
    return call(aten.unflatten.int, t(*shape, dtype=one_of(draw, *DTYPES)), dim, factors)


@generated("aten::unsqueeze", "aten::squeeze")
def _(draw, name):
    shape = [one_of(draw, size, size, 1) for size in shape_of(draw, 0, 5)]
    x = t(*shape, dtype=one_of(draw, *DTYPES))
    if name == "aten::unsqueeze":
        return call(aten.unsqueeze.default, x, dim_of(draw, len(shape) + 1))
    form = one_of(draw, "default", "dim", "dims")
    more = {"default": [], "dim": [dim_of(draw, len(shape))], "dims": [dims_of(draw, len(shape))]}[form]
    return call(getattr(aten.squeeze, form), x, *more)


@generated(
    "aten::permute", "aten::transpose", "aten::t", "aten::swapaxes", "aten::movedim", "aten::numpy_T", "aten::mT"
)
def _(draw, name):
    least, most = {"aten::t": (0, 2), "aten::numpy_T": (2, 2), "aten::mT": (2, 4)}.get(name, (0, 4))
    shape = shape_of(draw, least, most)
    x, rank = t(*shape, dtype=one_of(draw, *DTYPES)), len(shape)
    if name == "aten::permute":
        order = draw(st.permutations(range(rank)))
        return call(aten.permute.default, x, [dim - rank if draw(st.booleans()) else dim for dim in order])
    if name == "aten::movedim" and draw(st.booleans()):
        source, target = dims_of(draw, rank), draw(st.permutations(range(rank)))
        return call(aten.movedim.intlist, x, source, target[: len(source)])
    if name in ("aten::transpose", "aten::swapaxes", "aten::movedim"):
        target = overload(name, "default" if name == "aten::swapaxes" else "int")
        return call(target, x, dim_of(draw, rank), dim_of(draw, rank))
    return call(overload(name), x)


@generated("aten::expand", "aten::expand_as", "aten::broadcast_to")
def _(draw, name):
    after = shape_of(draw)
    before = broadcastable(draw, after)
    x = t(*before, dtype=one_of(draw, *DTYPES))
    if name == "aten::expand_as":
        return call(aten.expand_as.default, x, t(*after, dtype=one_of(draw, *DTYPES)))
    new = len(after) - len(before)
    kept = [position >= new and before[position - new] == size for position, size in enumerate(after)]
    return call(overload(name), x, [-1 if own and draw(st.booleans()) else n for own, n in zip(kept, after)])


@generated("aten::repeat")
def _(draw):
    shape = shape_of(draw, 0, 3)
    times = draw(st.lists(st.integers(1, 4), min_size=len(shape), max_size=len(shape) + 2))
    return call(aten.repeat.default, t(*shape, dtype=one_of(draw, *DTYPES)), times)


@generated("aten::repeat_interleave.self_int")
def _(draw):
    shape, times = shape_of(draw, 1), draw(st.integers(1, 4))
    dim = one_of(draw, dim_of(draw, len(shape)), dim_of(draw, len(shape)), None)
    size = math.prod(shape) if dim is None else shape[dim]
    more = one_of(draw, {}, {"output_size": size * times})
    return call(aten.repeat_interleave.self_int, t(*shape, dtype=one_of(draw, *DTYPES)), times, dim, **more)


@generated("aten::select")
def _(draw):
    shape = shape_of(draw, 1)
    dim = dim_of(draw, len(shape))
    return call(aten.select.int, t(*shape, dtype=one_of(draw, *DTYPES)), dim, dim_of(draw, shape[dim]))


def _slice(draw, size: int) -> tuple[int | None, int | None, int]:
    """Bounds that leave something, from the front, from the back, left out or beyond the end; and a step."""
    start = draw(st.integers(0, size - 1))
    end = draw(st.integers(start + 1, size))
    if end == size:
        end = one_of(draw, size, None, size + 3, 2**63 - 1)
    elif draw(st.booleans()):
        end -= size
    start = one_of(draw, start, start - size) if start else one_of(draw, 0, None, -size, -size - 2)
    return start, end, draw(st.integers(1, 3))


@generated("aten::slice", "aten::narrow")
def _(draw, name):
    shape = shape_of(draw, 1)
    dim, x = dim_of(draw, len(shape)), t(*shape, dtype=one_of(draw, *DTYPES))
    if name == "aten::slice":
        return call(aten.slice.Tensor, x, dim, *_slice(draw, shape[dim]))
    start = draw(st.integers(0, shape[dim] - 1))
    length = draw(st.integers(1, shape[dim] - start))
    return call(aten.narrow.default, x, dim, one_of(draw, start, start - shape[dim]), length)


@generated("aten::slice_scatter", "aten::select_scatter")
def _(draw, name):
    shape, dtype = shape_of(draw, 1), one_of(draw, *DTYPES)
    dim, x = dim_of(draw, len(shape)), t(*shape, dtype=dtype)
    if name == "aten::slice_scatter":
        where = _slice(draw, shape[dim])
        piece = x.transpose(0, dim)[slice(*where)].transpose(0, dim)
        return call(aten.slice_scatter.default, x, t(*piece.shape, dtype=dtype), dim, *where)
    source = [size for position, size in enumerate(shape) if position != dim % len(shape)]
    return call(aten.select_scatter.default, x, t(*source, dtype=dtype), dim, dim_of(draw, shape[dim]))


@generated("aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unbind", "aten::tensor_split.sections")
def _(draw, name):
    pieces = one_of(draw, [draw(SIZE)] * draw(st.integers(1, 4)), shape_of(draw, 1, 4))
    shape, dtype = shape_of(draw, 1, 3), one_of(draw, *DTYPES)
    dim = dim_of(draw, len(shape))
    shape[dim] = sum(pieces)
    x = t(*shape, dtype=dtype)
    if name == "aten::unbind":
        return call(aten.unbind.int, x, dim)
    if name == "aten::split_with_sizes":
        return call(aten.split_with_sizes.default, x, pieces, dim)
    if name == "aten::split":
        return (
            call(aten.split.sizes, x, pieces, dim)
            if draw(st.booleans())
            else call(aten.split.Tensor, x, pieces[0], dim)
        )
    # tensor_split into more sections than there are elements leaves empty ones.
    return call(overload(name), x, draw(st.integers(1, min(5, shape[dim]))), dim)


@generated("aten::cat", "aten::concat", "aten::concatenate")
def _(draw, name):
    shape, dtype = shape_of(draw, 1), one_of(draw, *DTYPES)
    dim, lengths = dim_of(draw, len(shape)), shape_of(draw, 1, 4)
    if draw(st.booleans()):
        lengths = lengths[:1] * len(lengths)
    parts = []
    for length in lengths:
        shape[dim] = length
        parts.append(t(*shape, dtype=dtype))
    empty = one_of(draw, [], [], [], [], [t(0, dtype=dtype)])
    return call(overload(name), [*parts, *empty], dim)


@generated("aten::stack")
def _(draw):
    shape, dtype = shape_of(draw, 0, 3), one_of(draw, *DTYPES)
    count = draw(st.integers(1, 4))
    return call(aten.stack.default, [t(*shape, dtype=dtype) for _ in range(count)], dim_of(draw, len(shape) + 1))


@generated("aten::flip", "aten::roll", "aten::tril", "aten::triu")
def _(draw, name):
    shape = shape_of(draw, 2 if name.startswith("aten::tri") else 1)
    x, dims = t(*shape, dtype=one_of(draw, *DTYPES)), dims_of(draw, len(shape))
    if name == "aten::flip":
        return call(aten.flip.default, x, dims)
    shift = st.integers(-9, 9)
    if name == "aten::roll":
        return call(aten.roll.default, x, [draw(shift) for _ in dims or [0]], *([dims] if dims else []))
    return call(overload(name), x, *one_of(draw, [], [draw(shift)]))


@generated(
    "aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones", "aten::new_full"
)
def _(draw, name):
    before = [t(*shape_of(draw, 0, 2), dtype=one_of(draw, *DTYPES))] if "new_" in name else []
    after = [draw(st.integers(0, 1))] if "full" in name else []
    options = one_of(draw, {}, {"dtype": F64}, {"dtype": I64}, {"dtype": BOOL})
    return call(
        overload(name, "memory_format" if name == "aten::empty" else "default"),
        *before,
        shape_of(draw),
        *after,
        **options,
    )


@generated("aten::arange", "aten::linspace", "aten::eye")
def _(draw, name):
    start, length, step = draw(st.tuples(st.integers(-3, 3), SIZE, st.sampled_from([1, 2, -1, 0.5])))
    options = one_of(draw, {}, {"dtype": F64}, {"dtype": F32})
    if name == "aten::arange":
        forms = {
            "default": [length],
            "start": [start, start + length],
            "start_step": [start, start + length * step, step],
        }
        form = one_of(draw, *forms)
        return call(getattr(aten.arange, form), *forms[form], **options)
    if name == "aten::linspace":
        return call(aten.linspace.default, start, start + length * step, draw(SIZE), **options)
    return call(*one_of(draw, (aten.eye.default, length), (aten.eye.m, length, draw(SIZE))), **options)


@cases("aten::pad", "aten::constant_pad_nd")
def _(name):
    for ends in ([1, 2], [2, 0, 0, 3], [0, 1, 0, 0, 2, 2], [-1, 2], [-2, -1]):
        more = [] if name == "aten::constant_pad_nd" else ["constant"]
        yield call(overload(name), t(5, 6, 7), ends, *more, 2.5)
    yield call(overload(name), t(5, 7, dtype=I64), [1, 1])
    if name == "aten::pad":
        for mode in ("reflect", "replicate", "circular"):
            yield call(aten.pad.default, t(2, 3, 7), [3, 2], mode)
            yield call(aten.pad.default, t(2, 3, 6, 7), [1, 0, 2, 5], mode)


@generated("aten::pad", "aten::constant_pad_nd")
def _(draw, name):
    mode = one_of(draw, "constant", "reflect", "replicate", "circular") if name == "aten::pad" else "constant"
    count = draw(st.integers(1, 3))
    shape, dtype = shape_of(draw, count, 4), one_of(draw, *FLOATS)
    if mode != "constant":
        shape = [draw(SIZE), *[draw(SIZE) for _ in range(count + 1)]]
    ends = []
    for size in reversed(shape[len(shape) - count :]):
        most = {"constant": 5, "reflect": size - 1, "replicate": 5, "circular": size}[mode]
        before = draw(st.integers(1 - size if mode == "constant" else 0, most))
        after = draw(st.integers(1 - size - min(before, 0) if mode == "constant" else 0, most))
        ends += [before, after]
    value = one_of(draw, [], [2.5]) if mode == "constant" else []
    return call(overload(name), t(*shape, dtype=dtype), ends, *([mode] if name == "aten::pad" else []), *value)


# Ops that take the arguments of another.
_LIKE = {
    "view_copy": "view",
    "unsqueeze_copy": "unsqueeze",
    "squeeze_copy": "squeeze",
    "permute_copy": "permute",
    "transpose_copy": "transpose",
    "t_copy": "t",
    "swapdims": "swapaxes",
    "moveaxis": "movedim",
    "mH": "mT",
    "adjoint": "mT",
    "matrix_H": "numpy_T",
    "expand_copy": "expand",
    "tile": "repeat",
    "unsafe_chunk": "chunk",
    "split_copy": "split",
    "unsafe_split": "split",
    "split_with_sizes_copy": "split_with_sizes",
    "unsafe_split_with_sizes": "split_with_sizes",
    "unbind_copy": "unbind",
    "new_empty": "new_zeros",
}


def _like(name: str, made: Call) -> Call | None:
    """The call `made` as one of the op `name`; None where it has no such overload."""
    target, args, kwargs = made
    own = getattr(aten, name.removeprefix("aten::"))
    return (getattr(own, target._overloadname), args, kwargs) if target._overloadname in own.overloads() else None


@cases(*(f"aten::{name}" for name in _LIKE))
def _(name):
    for made in fixed_calls(f"aten::{_LIKE[name.removeprefix('aten::')]}"):
        if (own := _like(name, made)) is not None:
            yield own
    if name == "aten::tile":
        yield call(aten.tile.default, t(5, 1, 7), [3])
        yield call(aten.tile.default, t(5, 7), [])


@generated(*(f"aten::{name}" for name in _LIKE))
def _(draw, name):
    calls = generated_calls(f"aten::{_LIKE[name.removeprefix('aten::')]}").map(lambda made: _like(name, made))
    return draw(calls.filter(lambda made: made is not None))


@cases("aten::ravel")
def _():
    for shape in ((5, 6, 7), (5,), ()):
        yield call(aten.ravel.default, t(*shape))


@generated("aten::ravel")
def _(draw):
    return call(aten.ravel.default, t(*shape_of(draw), dtype=one_of(draw, *DTYPES)))


_AT_LEAST = [f"aten::atleast_{n}d.default" for n in (1, 2, 3)]


@cases(*_AT_LEAST)
def _(name):
    for shape in ((), (5,), (5, 7), (2, 5, 7)):
        yield call(overload(name), t(*shape))


@generated(*_AT_LEAST)
def _(draw, name):
    return call(overload(name), t(*shape_of(draw)))


@cases("aten::view.dtype")
def _():
    for dtype in (I64, F32, BF16, torch.complex128):
        yield call(aten.view.dtype, t(5, 6), dtype)
    yield call(aten.view.dtype, t(5, 6, dtype=F32), F64)


@generated("aten::view.dtype")
def _(draw):
    shape, dtypes = shape_of(draw), (F64, F32, I64)
    before, after = one_of(draw, *dtypes), one_of(draw, *dtypes)
    longer = after.itemsize // before.itemsize
    return call(aten.view.dtype, t(*shape, one_of(draw, 1, 2, 3) * max(longer, 1), dtype=before), after)


_ROW_SPLITS = ["aten::hsplit", "aten::vsplit", "aten::dsplit"]


@cases(*_ROW_SPLITS, "aten::tensor_split.indices")
def _(name):
    if name == "aten::tensor_split.indices":
        yield call(aten.tensor_split.indices, t(2, 12, 5), [3, 6, 9], 1)
        yield call(aten.tensor_split.indices, t(2, 12, 5), [1, 4], -2)
        return
    yield call(overload(name, "int"), t(6, 6, 6), 3)
    yield call(overload(name, "array"), t(6, 6, 6), [1, 3])
    if name == "aten::hsplit":
        yield call(aten.hsplit.int, t(6), 2)


@generated(*_ROW_SPLITS, "aten::tensor_split.indices")
def _(draw, name):
    pieces = one_of(draw, [draw(SIZE)] * draw(st.integers(1, 4)), shape_of(draw, 1, 4))
    shape, ends = shape_of(draw, 3, 3), list(itertools.accumulate(pieces))[:-1]
    dim = {"aten::vsplit": 0, "aten::hsplit": 1, "aten::dsplit": 2}.get(name, dim_of(draw, 3))
    shape[dim] = sum(pieces)
    if name == "aten::tensor_split.indices":
        return call(aten.tensor_split.indices, t(*shape), ends, dim)
    if len(set(pieces)) == 1 and draw(st.booleans()):
        return call(overload(name, "int"), t(*shape), len(pieces))
    return call(overload(name, "array"), t(*shape), ends)


@cases("aten::fliplr", "aten::flipud", "aten::rot90")
def _(name):
    for turns in (0, 1, 2, -1) if name == "aten::rot90" else ((),):
        more = [turns, [-1, 0]] if name == "aten::rot90" else []
        yield call(overload(name), t(5, 6, 7), *more)


@generated("aten::fliplr", "aten::flipud", "aten::rot90")
def _(draw, name):
    shape = shape_of(draw, 2, 4)
    dims = draw(st.permutations(range(len(shape))))[:2]
    more = [draw(st.integers(-3, 4)), dims] if name == "aten::rot90" else []
    return call(overload(name), t(*shape, dtype=one_of(draw, *DTYPES)), *more)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.view.default, t(2, 5, 12), [10, 3, 4]), "a0 a1 (a2 a3) -> (a0 a1) a2 a3"),
        (call(aten.view.default, t(6, 4, 5), [8, 3, 5]), "a0 a1 a4 -> a2 a3 a4; moved: a0 a1 a2 a3"),
        (call(aten.chunk.default, t(5, 12), 3, -1), "d0 (piece rest) -> d0 rest, d0 rest, d0 rest; moved: piece"),
        (call(aten.repeat.default, t(5, 7), [1, 3]), "d0 d1 -> d0 (r1 d1)"),
        (call(aten.expand.default, t(5, 1), [3, 5, 7]), ".1 1 -> .2 .1 .0"),
        (call(aten.tile.default, t(5, 7), [3]), "d0 d1 -> d0 (r1 d1)"),
        (call(aten.repeat_interleave.self_int, t(5, 7), 2), "d0 d1 -> (d0 d1 r)"),
        (
            call(aten.split_with_sizes.default, t(9, 7), [1, 6, 2]),
            "d0 d1 -> 1 d1, piece1 d1, piece2 d1; reduces: d0; ranges: d0 piece1, d0 piece2, d0 piece1 piece2",
        ),
        (
            call(aten.split_with_sizes.default, t(5, 7, dtype=BOOL), [2, 3]),
            "d0 d1 -> piece0 d1, piece1 d1; ranges: d0 piece0 piece1",
        ),
        (call(aten.view.dtype, t(5, 6), F32), ".0 before -> .0 after; moved: after before"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.linspace.Tensor_Scalar, t(dtype=I64), 1, 7),
        call(aten.narrow.Tensor, t(5, 7), 0, index(2), 3),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None


@pytest.mark.parametrize(
    "made",
    [
        call(aten.reshape.default, t(5, 7), [35]),
        call(aten.permute.default, t(5, 7), [1, 0]),
        call(aten.contiguous.default, t(5, 7)),
        call(aten.slice.Tensor, t(5, 7), 0, 0, 5),
        call(aten.unsqueeze.default, t(5, 7), 0),
    ],
    ids=lambda made: str(made[0]),
)
def test_ops_that_only_rename_elements_are_views(made):
    assert rule_of(made).is_view
