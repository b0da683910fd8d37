"""Several tensors side by side, or against each other."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    DTYPES,
    F32,
    F64,
    I64,
    SIZE,
    aten,
    broadcastable,
    call,
    cases,
    dim_of,
    generated,
    one_of,
    overload,
    rule_of,
    shape_of,
    t,
)


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


@cases("aten::meshgrid")
def _():
    for sizes in ((5, 7), (5,), (2, 1, 7), (3, 5, 2, 7)):
        yield call(aten.meshgrid.default, [t(size) for size in sizes])
        for indexing in ("ij", "xy"):
            yield call(aten.meshgrid.indexing, [t(size) for size in sizes], indexing=indexing)
    yield call(aten.meshgrid.indexing, [t(5, dtype=I64), t(dtype=I64), t(7, dtype=I64)], indexing="ij")


@generated("aten::meshgrid")
def _(draw):
    operands = [t(*shape_of(draw, 0, 1)) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        return call(aten.meshgrid.default, operands)
    return call(aten.meshgrid.indexing, operands, indexing=one_of(draw, "ij", "xy"))


@cases("aten::cartesian_prod")
def _():
    for sizes in ((5, 7), (5,), (2, 3, 4)):
        yield call(aten.cartesian_prod.default, [t(size) for size in sizes])


@generated("aten::cartesian_prod")
def _(draw):
    return call(aten.cartesian_prod.default, [t(draw(SIZE)) for _ in range(draw(st.integers(1, 3)))])


@cases("aten::broadcast_tensors")
def _():
    for shapes in (((5, 7), (7,)), ((5, 1), (1, 7), ()), ((2, 5, 7), (5, 1)), ((5, 7),)):
        yield call(aten.broadcast_tensors.default, [t(*shape) for shape in shapes])


@generated("aten::broadcast_tensors")
def _(draw):
    shape, dtype = shape_of(draw), one_of(draw, F64, F32, I64)
    shapes = [broadcastable(draw, shape) for _ in range(draw(st.integers(1, 3)))]
    return call(aten.broadcast_tensors.default, [t(*own, dtype=dtype) for own in shapes])


# Names with the shapes that they join: a part's size along the dim may be any.
_JOINS = {
    "aten::hstack": [((5, 2), (5, 3)), ((5,), (7,)), ((), ()), ((5, 2, 3), (5, 1, 3), (5, 4, 3))],
    "aten::vstack": [((2, 5), (3, 5)), ((5,), (5,)), ((5,), (3, 5)), ((2, 5, 3), (4, 5, 3)), ((), ())],
    "aten::row_stack": [((2, 5), (3, 5)), ((5,), (5,)), ((5,), (3, 5))],
    "aten::dstack": [((5, 6), (5, 6)), ((5,), (5,)), ((5, 6, 2), (5, 6, 3)), ((5, 6), (5, 6, 3)), ((), ())],
    "aten::column_stack": [((5, 2), (5, 3)), ((5,), (5,)), ((5,), (5, 3)), ((5, 2, 3), (5, 4, 3))],
}


@cases(*_JOINS)
def _(name):
    for shapes in _JOINS[name]:
        for dtype in (F64, BF16):
            yield call(overload(name), [t(*shape, dtype=dtype) for shape in shapes])


@generated(*_JOINS)
def _(draw, name):
    shapes = [list(shape) for shape in one_of(draw, *_JOINS[name])]
    old = {size for shape in shapes for size in shape}
    new = {size: draw(SIZE) for size in sorted(old)}
    return call(overload(name), [t(*(new[size] for size in shape)) for shape in shapes])


@cases("aten::pad_sequence")
def _():
    for first in (True, False):
        yield call(aten.pad_sequence.default, [t(5, 3), t(7, 3), t(1, 3)], first)
        yield call(aten.pad_sequence.default, [t(5, 3, 2), t(7, 3, 2)], first, -1.0, "left")
        yield call(aten.pad_sequence.default, [t(5), t(5)], first)


@generated("aten::pad_sequence")
def _(draw):
    rest = shape_of(draw, 0, 2)
    parts = [t(draw(SIZE), *rest) for _ in range(draw(st.integers(1, 3)))]
    return call(aten.pad_sequence.default, parts, draw(st.booleans()), 0.5, one_of(draw, "left", "right"))


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.meshgrid.indexing, [t(5), t(7)], indexing="ij"), "d0, d1 -> d0 d1, d0 d1"),
        (call(aten.meshgrid.indexing, [t(5), t(7)], indexing="xy"), "d0, d1 -> d1 d0, d1 d0"),
        (call(aten.cartesian_prod.default, [t(5), t(7)]), "d0, d1 -> (d0 d1) place; moved: place"),
        (call(aten.vstack.default, [t(5), t(3, 5)]), "d1, part1 d1 -> all d1; moved: all part1"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
