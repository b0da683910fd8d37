"""Parts of a tensor taken out or put back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    BOOL,
    DTYPES,
    SIZE,
    aten,
    call,
    cases,
    dim_of,
    fixed_calls_like,
    generated,
    generated_calls_like,
    index,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)


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


# Ops that take the arguments of another.
_LIKE = {
    "aten::unsafe_chunk": "aten::chunk",
    "aten::split_copy": "aten::split",
    "aten::unsafe_split": "aten::split",
    "aten::split_with_sizes_copy": "aten::split_with_sizes",
    "aten::unsafe_split_with_sizes": "aten::split_with_sizes",
    "aten::unbind_copy": "aten::unbind",
}


@cases(*_LIKE)
def _(name):
    yield from fixed_calls_like(_LIKE[name], name)


@generated(*_LIKE)
def _(draw, name):
    return draw(generated_calls_like(_LIKE[name], name))


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


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.chunk.default, t(5, 12), 3, -1), "d0 (piece rest) -> d0 rest, d0 rest, d0 rest; moved: piece"),
        (
            call(aten.split_with_sizes.default, t(9, 7), [1, 6, 2]),
            "d0 d1 -> 1 d1, piece1 d1, piece2 d1; reduces: d0; ranges: d0 piece1, d0 piece2, d0 piece1 piece2",
        ),
        (
            call(aten.split_with_sizes.default, t(5, 7, dtype=BOOL), [2, 3]),
            "d0 d1 -> piece0 d1, piece1 d1; ranges: d0 piece0 piece1",
        ),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


def test_a_piece_that_begins_at_a_value_has_no_rule():
    assert rule_of(call(aten.narrow.Tensor, t(5, 7), 0, index(2), 3)) is None


def test_a_slice_of_the_whole_dim_is_a_view():
    assert rule_of(call(aten.slice.Tensor, t(5, 7), 0, 0, 5)).is_view
