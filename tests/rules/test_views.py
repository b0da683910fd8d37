"""Reshapes, permutations, broadcasts and repeats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from tests.rules.calls import (
    BF16,
    DTYPES,
    F32,
    F64,
    I64,
    aten,
    broadcastable,
    call,
    cases,
    dim_of,
    dims_of,
    fixed_calls_like,
    generated,
    generated_calls_like,
    one_of,
    overload,
    rule_of,
    shape_of,
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


# Ops that take the arguments of another.
_LIKE = {
    "aten::view_copy": "aten::view",
    "aten::unsqueeze_copy": "aten::unsqueeze",
    "aten::squeeze_copy": "aten::squeeze",
    "aten::permute_copy": "aten::permute",
    "aten::transpose_copy": "aten::transpose",
    "aten::t_copy": "aten::t",
    "aten::swapdims": "aten::swapaxes",
    "aten::moveaxis": "aten::movedim",
    "aten::mH": "aten::mT",
    "aten::adjoint": "aten::mT",
    "aten::matrix_H": "aten::numpy_T",
    "aten::expand_copy": "aten::expand",
    "aten::tile": "aten::repeat",
}


@cases(*_LIKE)
def _(name):
    yield from fixed_calls_like(_LIKE[name], name)
    if name == "aten::tile":
        yield call(aten.tile.default, t(5, 1, 7), [3])
        yield call(aten.tile.default, t(5, 7), [])


@generated(*_LIKE)
def _(draw, name):
    return draw(generated_calls_like(_LIKE[name], name))


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


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.view.default, t(2, 5, 12), [10, 3, 4]), "a0 a1 (a2 a3) -> (a0 a1) a2 a3"),
        (call(aten.view.default, t(6, 4, 5), [8, 3, 5]), "a0 a1 a4 -> a2 a3 a4; moved: a0 a1 a2 a3"),
        (call(aten.repeat.default, t(5, 7), [1, 3]), "d0 d1 -> d0 (r1 d1)"),
        (call(aten.expand.default, t(5, 1), [3, 5, 7]), ".1 1 -> .2 .1 .0"),
        (call(aten.tile.default, t(5, 7), [3]), "d0 d1 -> d0 (r1 d1)"),
        (call(aten.repeat_interleave.self_int, t(5, 7), 2), "d0 d1 -> (d0 d1 r)"),
        (call(aten.view.dtype, t(5, 6), F32), ".0 before -> .0 after; moved: after before"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation


@pytest.mark.parametrize(
    "made",
    [
        call(aten.reshape.default, t(5, 7), [35]),
        call(aten.permute.default, t(5, 7), [1, 0]),
        call(aten.contiguous.default, t(5, 7)),
        call(aten.unsqueeze.default, t(5, 7), 0),
    ],
    ids=lambda made: str(made[0]),
)
def test_ops_that_only_rename_elements_are_views(made):
    assert rule_of(made).is_view
