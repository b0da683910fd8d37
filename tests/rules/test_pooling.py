"""Pooling."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.rules.calls import F32, F64, FLOATS, call, cases, generated, one_of, overload, shape_of, t

_POOLS = [f"aten::{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)]


@cases(*_POOLS)
def _(name):
    n = int(name[-2])
    for lead in ((2, 3), (3,)):
        yield call(overload(name), t(*lead, *(8, 12, 4)[:n]), [2] * n)  # patches
        yield call(overload(name), t(*lead, *(7, 6, 5)[:n]), [3] * n, [1] * n, [1] * n)  # overlap
        yield call(overload(name), t(*lead, *(7, 6, 5)[:n]), [2] * n, [3] * n)  # gaps
    if "max" in name:
        yield call(overload(name), t(2, 3, *(7, 8, 6)[:n]), [2] * n, [1] * n, [0] * n, [2] * n)
        yield call(overload(name), t(2, 3, *(7, 8, 6)[:n]), [2] * n, [2] * n, [0] * n, [1] * n, True)
    else:
        yield call(overload(name), t(2, 3, *(7, 8, 6)[:n]), [3] * n, [2] * n, [1] * n, False, False)


@generated(*_POOLS)
def _(draw, name):
    n = int(name[-2])

    def per_dim(numbers) -> list[int]:
        return draw(st.lists(numbers, min_size=n, max_size=n))

    kernel, stride = per_dim(st.integers(1, 4)), one_of(draw, [], per_dim(st.integers(1, 4)))
    padding = [draw(st.integers(0, size // 2)) for size in kernel]
    dilation = per_dim(st.integers(1, 2)) if "max" in name else [1] * n
    space = [(size - 1) * d + draw(st.integers(1, 7 if n < 3 else 4)) for size, d in zip(kernel, dilation)]
    x = t(*shape_of(draw, 1, 2), *space, dtype=one_of(draw, F64, F32))
    if "max" in name:
        return call(overload(name), x, kernel, stride, padding, dilation, draw(st.booleans()))
    more = [] if n == 1 else [one_of(draw, None, 3)]
    return call(overload(name), x, kernel, stride, padding, draw(st.booleans()), draw(st.booleans()), *more)


@cases("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def _(name):
    n = int(name[-2])
    for out in ((1, 1, 1), (4, 6, 2), (3, 5, 4)):
        yield call(overload(name), t(2, 3, *(8, 12, 4)[:n]), list(out[:n]))


@generated("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def _(draw, name):
    n, dtype = int(name[-2]), one_of(draw, *FLOATS)
    out, factors = draw(st.tuples(*[st.integers(1, 4)] * n)), draw(st.tuples(*[st.integers(1, 3)] * n))
    space = [one_of(draw, size * factor, size * factor, size + 1) for size, factor in zip(out, factors)]
    return call(overload(name), t(*shape_of(draw, 1, 2), *space, dtype=dtype), list(out))
