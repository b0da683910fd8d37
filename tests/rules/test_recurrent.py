"""Recurrent networks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import SIZE, Call, call, cases, generated, one_of, overload, rule_of, t

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_NETWORKS = [f"aten::{kind}.input" for kind in _GATES]
_CELLS = [f"aten::{kind}_cell" for kind in _GATES]


def _network(
    name, time, batch, features, hidden, layers=1, both=False, bias=True, first=False, project=0, drop=0.0
) -> Call:
    """The call of a network of `layers` layers, in one direction or both."""
    kind = name.removeprefix("aten::").removesuffix(".input")
    gates, ways, width = _GATES[kind] * hidden, 1 + both, project or hidden
    weights = []
    for layer in range(layers):
        own = features if layer == 0 else width * ways
        for _ in range(ways):
            weights += [t(gates, own), t(gates, width), *([t(gates), t(gates)] if bias else [])]
            weights += [t(project, hidden)] if project else []
    states = [t(layers * ways, batch, width), t(layers * ways, batch, hidden)]
    x = t(batch, time, features) if first else t(time, batch, features)
    given = states if kind == "lstm" else states[1]
    return call(overload(name), x, given, weights, bias, layers, drop, drop > 0, both, first)


@cases(*_NETWORKS)
def _(name):
    yield _network(name, 3, 5, 4, 2)
    yield _network(name, 3, 5, 4, 2, layers=2, both=True, first=True)
    yield _network(name, 3, 5, 4, 2, bias=False)
    if name == "aten::lstm.input":
        yield _network(name, 3, 5, 4, 3, layers=2, project=2)


@generated(*_NETWORKS)
def _(draw, name):
    sizes = [draw(st.integers(1, 4)), draw(SIZE), draw(st.integers(1, 4)), draw(st.integers(2, 4))]
    both, bias, first = (draw(st.booleans()) for _ in range(3))
    project = one_of(draw, 0, sizes[3] - 1) if name == "aten::lstm.input" else 0
    return _network(name, *sizes, one_of(draw, 1, 2), both, bias, first, project)


def _cell(name, lead, features, hidden, bias) -> Call:
    kind = name.removeprefix("aten::").removesuffix("_cell")
    gates = _GATES[kind] * hidden
    states = [t(*lead, hidden) for _ in range(2)]
    weights = [t(gates, features), t(gates, hidden), *([t(gates), t(gates)] if bias else [])]
    return call(overload(name), t(*lead, features), states if kind == "lstm" else states[0], *weights)


@cases(*_CELLS)
def _(name):
    for lead in ((5,), (1,)):
        yield _cell(name, lead, 4, 3, True)
        yield _cell(name, lead, 4, 3, False)


@generated(*_CELLS)
def _(draw, name):
    return _cell(name, [draw(SIZE)], draw(SIZE), draw(SIZE), draw(st.booleans()))


@pytest.mark.parametrize("name", _NETWORKS)
def test_samples_are_parallel_and_time_is_not(name):
    rule = rule_of(_network(name, 3, 5, 4, 2))
    assert rule.can_shard("b") and not any(rule.can_shard(axis) for axis in rule.sizes.keys() - {"b"})


def test_dropout_between_layers_is_drawn_on_all_ranks_alike():
    rule = rule_of(_network("aten::lstm.input", 3, 5, 4, 2, layers=2, drop=0.5))
    assert rule.is_random
