"""Random draws, and ops that leave them out."""

from __future__ import annotations

from tests.rules.calls import FLOATS, call, cases, generated, one_of, overload, shape_of, t


@cases("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
def _(name):
    for p, train in ((0.5, False), (0.0, True), (0.0, False)):
        yield call(overload(name), t(5, 7, 3), p, train)


@generated("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
def _(draw, name):
    """Those that draw no random numbers: elsewhere there is no one right result."""
    x = t(*shape_of(draw, 2), dtype=one_of(draw, *FLOATS))
    return call(overload(name), x, *one_of(draw, (0.5, False), (0.0, True), (0.0, False)))
