"""Look-ups by index."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BOOL,
    DTYPES,
    F32,
    F64,
    FLOATS,
    I64,
    SIZE,
    aten,
    broadcastable,
    call,
    cases,
    dim_of,
    distinct,
    generated,
    index,
    one_of,
    rule_of,
    shape_of,
    shards_nothing,
    t,
)


@cases("aten::embedding")
def _():
    for shape in ((5,), (2, 7), (), (3, 1)):
        yield call(aten.embedding.default, t(9, 4), index(9, *shape))
    yield call(aten.embedding.default, t(9, 4, dtype=F32), index(9, 7), 3)
    yield call(aten.embedding.default, t(1, 4), index(1, 7))
    yield call(aten.embedding.default, t(9, 1), index(9, 7))


@cases("aten::index_select")
def _():
    for dtype, dim in itertools.product((F64, I64), (0, 1, -1)):
        yield call(aten.index_select.default, t(5, 6, 7, dtype=dtype), dim, index(5, 4))
    yield call(aten.index_select.default, t(5, 1), 1, index(1, 7))
    yield call(aten.index_select.default, t(5, 7), 1, index(7))


@cases("aten::one_hot")
def _():
    for shape in ((5,), (2, 7), ()):
        yield call(aten.one_hot.default, index(4, *shape), 4)


@cases("aten::gather")
def _():
    for dim, dtype in itertools.product((0, 1, -1), (F64, I64)):
        for shape in ((5, 6, 7), (5, 6, 2), (3, 6, 7), (1, 1, 1)):
            limit = (5, 6, 7)[dim]
            yield call(aten.gather.default, t(5, 6, 7, dtype=dtype), dim, index(limit, *shape))
    yield call(aten.gather.default, t(5, 6), 1, index(6, 5, 9))


@cases("aten::take_along_dim")
def _():
    for dim in (0, 1, -1):
        for shape in ((5, 6, 7), (1, 1, 7), (5, 1, 1), (5, 6, 1)):
            yield call(aten.take_along_dim.default, t(5, 6, 7), index(5, *shape), dim)
    yield call(aten.take_along_dim.default, t(5, 1, 7), index(5, 5, 6, 4), 2)
    yield call(aten.take_along_dim.default, t(5, 7), index(35, 2, 9))
    yield call(aten.take_along_dim.default, t(5, 7), index(35))


@cases("aten::take")
def _():
    for shape in ((5,), (2, 7), ()):
        yield call(aten.take.default, t(5, 7), index(35, *shape))


_INDICES = [
    lambda: [index(5, 9)],
    lambda: [None, index(6, 4)],
    lambda: [index(5, 9), index(6, 9)],
    lambda: [None, index(6, 4), index(7, 4)],
    lambda: [index(5, 4), None, index(7, 4)],
    lambda: [index(5, 3, 1), index(6, 4)],
    lambda: [index(5, 3, 1), None, index(7, 4)],
    lambda: [None, None, index(7, 2, 3)],
    lambda: [index(5), index(6, 4)],
    lambda: [None, index(6)],
]


@cases("aten::index.Tensor")
def _():
    for make, dtype in itertools.product(_INDICES, (F64, I64)):
        yield call(aten.index.Tensor, t(5, 6, 7, dtype=dtype), make())


@cases("aten::index_put")
def _():
    for make, adds in itertools.product(_INDICES, (False, True)):
        indices = make() if adds else [None if i is None else _apart(i) for i in make()]
        values = torch.empty(5, 6, 7)[tuple(slice(None) if i is None else i for i in indices)].shape
        yield call(aten.index_put.default, t(5, 6, 7), indices, t(*values), adds)
        yield call(aten.index_put.default, t(5, 6, 7), indices, t(), adds)
        yield call(aten.index_put.default, t(5, 6, 7), indices, t(*values[-1:]), adds)
    for mask, value in itertools.product(((5, 6, 7), (5, 6), (5,)), ((), (1,), (7,))):
        if len(mask) < 3 or value != (7,):
            yield call(aten.index_put.default, t(5, 6, 7), [t(*mask, dtype=BOOL)], t(*value))
    yield call(aten.index_put.default, t(5, 6, 7), [None, t(6, dtype=BOOL)], t(5, 1, 7))
    yield call(aten.index_put.default, t(5, 6, 7), [None, t(6, 7, dtype=BOOL)], t(5, 1), True)
    mask = t(5, 6, dtype=BOOL)
    yield call(aten.index_put.default, t(5, 6, 7), [mask], t(int(mask.sum()), 7))


def _apart(places: torch.Tensor) -> torch.Tensor:
    """Indices of which no two are equal, as far as there are enough: it is not defined which of two values stays."""
    return torch.arange(places.numel()).reshape(places.shape) % (int(places.max()) + 1)


@cases("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def _(name):
    for dim in (0, 1, -1):
        for cut in ((5, 6, 7), (3, 6, 7), (5, 6, 2), (5, 2, 7)):
            places = torch.argsort(t(*cut), dim)  # no two are equal
            # A source that is longer than the index has no derivative.
            yield from _scattered(name, t(5, 6, 7, dtype=I64), dim, places, t(5, 6, 7, dtype=I64))
            yield from _scattered(name, t(5, 6, 7), dim, places, t(*cut))


def _scattered(name, x, dim, places, source):
    if name == "aten::scatter":
        yield call(aten.scatter.src, x, dim, places, source)
        yield call(aten.scatter.value, x, dim, places, 2.0)
    elif name == "aten::scatter_add":
        yield call(aten.scatter_add.default, x, dim, places % 2, source)
    else:
        for reduce in ("sum", "mean", "amax"):
            yield call(aten.scatter_reduce.two, x, dim, places, source, reduce, include_self=reduce != "mean")


@cases("aten::index_add", "aten::index_copy", "aten::index_reduce", "aten::index_fill")
def _(name):
    for dim in (0, 1, -1):
        shape = [5, 6, 7]
        shape[dim] = 4
        places = torch.arange(4)
        yield from _assigned(name, t(5, 6, 7), dim, places, t(*shape))


def _assigned(name, x, dim, places, source):
    if name == "aten::index_fill":
        yield call(aten.index_fill.int_Scalar, x, dim, places, 2.0)
        yield call(aten.index_fill.int_Tensor, x, dim, places, t())
    elif name == "aten::index_reduce":
        for reduce in ("mean", "amax"):
            yield call(aten.index_reduce.default, x, dim, places, source, reduce)
    elif name == "aten::index_add":
        yield call(aten.index_add.default, x, dim, places % 2, source)
        yield call(aten.index_add.default, x, dim, places, source, alpha=2)
    else:
        yield call(aten.index_copy.default, x, dim, places, source)


shards_nothing("aten::masked_scatter", because="where an element of the source goes depends on the whole mask")


shards_nothing("aten::masked_scatter", because="where an element goes depends on the whole mask")


@cases("aten::masked_scatter")
def _():
    for mask in ((5, 7), (7,), (5, 1)):
        yield call(aten.masked_scatter.default, t(5, 7), t(*mask, dtype=BOOL), t(6, 7))


@cases("aten::searchsorted.Tensor")
def _():
    for rows, values in (((5, 6), (5, 7)), ((6,), (5, 7)), ((2, 5, 6), (2, 5, 3)), ((6,), ())):
        yield call(aten.searchsorted.Tensor, distinct(*rows).sort().values, t(*values), right=True)
    rows = distinct(5, 6)
    yield call(aten.searchsorted.Tensor, rows, t(5, 7), sorter=rows.argsort())


@cases("aten::bucketize.Tensor", "aten::isin.Tensor_Tensor")
def _(name):
    for shape in ((5, 7), (7,), ()):
        if name == "aten::bucketize.Tensor":
            yield call(aten.bucketize.Tensor, t(*shape), t(4).sort().values)
        else:
            yield call(aten.isin.Tensor_Tensor, index(9, *shape), index(9, 2, 3))


@cases("aten::repeat_interleave.self_Tensor")
def _():
    for dim in (0, 1, -1):
        times = index(3, (5, 6, 7)[dim])
        yield call(aten.repeat_interleave.self_Tensor, t(5, 6, 7), times, dim, output_size=int(times.sum()))
    yield call(aten.repeat_interleave.self_Tensor, t(5, 6), torch.tensor([2]), 0)
    yield call(aten.repeat_interleave.self_Tensor, t(2, 3), index(3, 6))


@cases("aten::diff")
def _():
    for dim in (0, 1, -1):
        yield call(aten.diff.default, t(5, 6, 7), 1, dim)
        yield call(aten.diff.default, t(5, 6, 7), 3, dim)
        more = [5, 6, 7]
        more[dim] = 2
        yield call(aten.diff.default, t(5, 6, 7), 1, dim, t(*more), t(*more))
        yield call(aten.diff.default, t(5, 6, 7), 2, dim, t(*more))


@generated("aten::embedding")
def _(draw):
    rows, width, dtype = draw(SIZE), draw(SIZE), one_of(draw, *FLOATS)
    more = one_of(draw, [], [-1], [draw(st.integers(0, rows - 1))], [], [-1, True])
    return call(aten.embedding.default, t(rows, width, dtype=dtype), index(rows, *shape_of(draw, 0, 3)), *more)


@generated("aten::index_select")
def _(draw):
    shape, dtype = shape_of(draw), one_of(draw, *DTYPES)
    dim = dim_of(draw, len(shape))
    places = index(shape[dim] if shape else 1, *([draw(SIZE)] if shape else [1]))
    return call(aten.index_select.default, t(*shape, dtype=dtype), dim, places)


@generated("aten::one_hot")
def _(draw):
    classes = draw(SIZE)
    return call(aten.one_hot.default, index(classes, *shape_of(draw, 0, 3)), classes)


def _along(draw) -> tuple[list[int], int]:
    """A shape, and one of its dims."""
    shape = shape_of(draw, 1, 4)
    return shape, dim_of(draw, len(shape))


@generated("aten::gather")
def _(draw):
    shape, dim = _along(draw)
    places = [one_of(draw, size, size, draw(st.integers(1, size))) for size in shape]
    places[dim] = draw(SIZE)
    x = t(*shape, dtype=one_of(draw, *DTYPES))
    return call(aten.gather.default, x, dim, index(shape[dim], *places))


@generated("aten::take_along_dim")
def _(draw):
    shape, dim = _along(draw)
    if one_of(draw, True, False, False, False):
        return call(aten.take_along_dim.default, t(*shape), index(math.prod(shape), *shape_of(draw, 0, 2)))
    limit = shape[dim]
    places, x = ([one_of(draw, size, size, 1) for size in shape] for _ in "ab")
    places[dim], x[dim] = draw(SIZE), limit
    return call(aten.take_along_dim.default, t(*x), index(limit, *places), dim)


@generated("aten::take")
def _(draw):
    shape = shape_of(draw)
    return call(aten.take.default, t(*shape), index(math.prod(shape), *shape_of(draw, 0, 3)))


def _indices(draw, shape: list[int], distinct: bool) -> list[torch.Tensor | None]:
    """Indices of some of the dims, whose shapes broadcast."""
    common = shape_of(draw, 1, 2)
    found: list[torch.Tensor | None] = [None] * len(shape)
    for dim in {one_of(draw, *range(len(shape))), one_of(draw, *range(len(shape)))}:
        places = index(shape[dim], *broadcastable(draw, common))
        found[dim] = _apart(places) if distinct else places
    return found


@generated("aten::index.Tensor")
def _(draw):
    shape = shape_of(draw, 1, 4)
    return call(aten.index.Tensor, t(*shape, dtype=one_of(draw, *DTYPES)), _indices(draw, shape, False))


@generated("aten::index_put")
def _(draw):
    shape, adds = shape_of(draw, 1, 4), draw(st.booleans())
    x = t(*shape)
    if draw(st.booleans()):
        first = draw(st.integers(0, len(shape) - 1))
        last = draw(st.integers(first + 1, len(shape)))
        values = broadcastable(draw, [*shape[:first], 1, *shape[last:]])
        return call(aten.index_put.default, x, [None] * first + [t(*shape[first:last], dtype=BOOL)], t(*values), adds)
    # Where two places are the same, it is not defined which value stays: there is one value then.
    indices = _indices(draw, shape, False)
    values = x[tuple(slice(None) if i is None else i for i in indices)].shape
    return call(aten.index_put.default, x, indices, t(*broadcastable(draw, values)) if adds else t(), adds)


@generated("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def _(draw, name):
    shape, dim = _along(draw)
    cut = [one_of(draw, size, size, draw(st.integers(1, size))) for size in shape]
    source = [one_of(draw, size, size, size, own) for size, own in zip(cut, shape)]
    places = torch.argsort(t(*cut), dim)
    dtype = F64 if source == cut else I64
    return one_of(draw, *_scattered(name, t(*shape, dtype=dtype), dim, places, t(*source, dtype=dtype)))


@generated("aten::index_add", "aten::index_copy", "aten::index_reduce", "aten::index_fill")
def _(draw, name):
    shape, dim = _along(draw)
    source = list(shape)
    source[dim] = draw(st.integers(1, shape[dim]))
    places = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(0))[: source[dim]]
    return one_of(draw, *_assigned(name, t(*shape), dim, places, t(*source)))


@generated("aten::masked_scatter")
def _(draw):
    shape = shape_of(draw)
    return call(aten.masked_scatter.default, t(*shape), t(*broadcastable(draw, shape), dtype=BOOL), t(*shape))


@generated("aten::searchsorted.Tensor")
def _(draw):
    lead, dtype = shape_of(draw, 0, 2), one_of(draw, F64, I64)
    rows = distinct(*lead, draw(SIZE), dtype=dtype).sort().values
    values = t(*lead, draw(SIZE), dtype=dtype) if lead else t(*shape_of(draw, 0, 3), dtype=dtype)
    return call(aten.searchsorted.Tensor, rows, values, right=draw(st.booleans()))


@generated("aten::bucketize.Tensor", "aten::isin.Tensor_Tensor")
def _(draw, name):
    shape, flag = shape_of(draw), draw(st.booleans())
    if name == "aten::bucketize.Tensor":
        return call(aten.bucketize.Tensor, t(*shape), distinct(draw(SIZE)).sort().values, right=flag)
    return call(aten.isin.Tensor_Tensor, index(9, *shape), index(9, *shape_of(draw, 0, 2)), invert=flag)


@generated("aten::repeat_interleave.self_Tensor")
def _(draw):
    shape, dim = _along(draw)
    times = index(3, shape[dim]) + 1
    return call(aten.repeat_interleave.self_Tensor, t(*shape), times, dim)


@generated("aten::diff")
def _(draw):
    shape, dim = _along(draw)
    n = draw(st.integers(1, 3))
    shape[dim] += n
    more = [*shape]
    more[dim] = draw(SIZE)
    ends = one_of(draw, [], [], [t(*more)], [None, t(*more)], [t(*more), t(*more)])
    return call(aten.diff.default, t(*shape), n, dim, *ends)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.embedding.default, t(9, 4), index(9, 2, 7)), "v c, .1 .0 -> .1 .0 c; moved: v"),
        (call(aten.gather.default, t(5, 6), 1, index(6, 5, 9)), "d0 d1, d0 i1 -> d0 i1; moved: d1"),
        (call(aten.index.Tensor, t(5, 6, 7), [None, index(6, 4)]), "d0 d1 d2, i0 -> d0 i0 d2; moved: d1"),
        (
            call(aten.index.Tensor, t(5, 6, 7), [index(5, 4), None, index(7, 4)]),
            "d0 d1 d2, i0, i0 -> i0 d1; moved: d0 d2",
        ),
        (
            call(aten.index_put.default, t(5, 6), [index(5, 4)], t(4, 6), True),
            "d0 d1, i0, i0 d1 -> d0 d1; moved: d0; reduces: i0",
        ),
        (call(aten.index_put.default, t(5, 6), [t(5, 6, dtype=BOOL)], t()), "d0 d1, d0 d1, () -> d0 d1"),
        (
            call(aten.scatter_add.default, t(5, 6), 0, index(5, 3, 6), t(3, 6)),
            "x0 d1, i0 d1, i0 d1 -> x0 d1; moved: x0; reduces: i0",
        ),
        (call(aten.searchsorted.Tensor, t(6), t(5, 7)), "k, .1 .0 -> .1 .0; moved: k"),
        (call(aten.diff.default, t(5, 7)), "d0 d1 -> d0 step; ranges: d1 step"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.embedding.default, t(9, 4), index(9, 7), -1, True),
        call(aten.index_select.default, t(), 0, index(1, 1)),
        call(aten.one_hot.default, index(4, 5)),
        call(aten.gather.default, t(), 0, index(1)),
        call(aten.index.Tensor, t(5, 7), [t(5, dtype=BOOL)]),
        call(aten.index_put.default, t(5, 7), [t(5, dtype=BOOL), index(7)], t()),
        call(aten.index_add.default, t(5), 0, index(5), t(1)),
    ],
)
def test_a_call_that_no_rule_describes_has_none(made):
    assert rule_of(made) is None
