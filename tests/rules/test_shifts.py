"""Elements that change places, or stay, by where they are."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.rules.calls import (
    DTYPES,
    FLOATS,
    I64,
    SIZE,
    aten,
    call,
    cases,
    dims_of,
    generated,
    one_of,
    overload,
    shape_of,
    t,
)


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
