"""Random graphs out of all rules: every rank gets one device's outputs and gradients, and sends what the plan says.

`python benchmarks/fuzz.py` runs many more of them.
"""

from __future__ import annotations

import pytest
import torch

from dsp_auto.passes import rules
from dsp_auto.passes.rules.pointwise import pointwise
from tests import fuzz


@pytest.mark.parametrize("seed", range(16))
def test_random_graphs_give_what_one_device_computes(seed):
    case = fuzz.make(seed)
    verdict = fuzz.judge(case)
    assert not verdict.failed, f"{verdict}\n{case}"


def test_most_random_graphs_say_something():
    kinds = [fuzz.judge(fuzz.make(seed, most=2)).kind for seed in range(100, 108)]
    assert kinds.count("same") > len(kinds) / 2, kinds


def test_every_registered_rule_is_drawn():
    assert not fuzz.NOT_DRAWN.keys() - rules.registered().keys(), "no such rule"
    missing = {}
    for name in fuzz.drawn_rules():
        try:
            assert fuzz.make(0, must=name, most=1).rules == (name,)
        except LookupError as error:
            missing[name] = error
    assert not missing, f"let the graphs have calls of these, or say in fuzz.NOT_DRAWN why not: {missing}"


def test_a_seed_makes_one_graph():
    first, second = (fuzz.make(3) for _ in range(2))
    assert str(first) == str(second)
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))
    assert str(first) != str(fuzz.make(4))


@pytest.mark.parametrize("name", ["aten::roll", "aten::flip"])
def test_a_wrong_rule_is_found_and_its_graph_is_made_small(monkeypatch, name):
    """Shards of an op that works across its dim are taken for parts of its result."""
    monkeypatch.setitem(rules._RULES, name, pointwise)

    def ops(case):
        return [node for node in case.program.graph.nodes if node.op == "call_function"]

    cases = (fuzz.make(seed, must=name, most=1) for seed in range(50))
    case = next(case for case in cases if len(ops(case)) > 10 and fuzz.judge(case).failed)
    kind = fuzz.judge(case).kind
    small = fuzz.shrink(case, seconds=90)
    assert kind in ("output", "gradient") and fuzz.judge(small).kind == kind
    assert len(ops(small)) <= 6 and name.removeprefix("aten::") in str(small)


def test_ties_that_rounding_breaks_are_no_findings():
    """The largest of values that are equal but for rounding: which one it is says nothing."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    softmax = graph.call_function(torch.ops.aten.softmax.int, (x, 1))
    total = graph.call_function(torch.ops.aten.sum.dim_IntList, (softmax, [1]))
    largest = graph.call_function(torch.ops.aten.argmax.default, (total, 0))
    graph.output((largest,))
    values = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program, values = fuzz.assemble(graph, [(fuzz.GraphInput("input", "x"), values)])
    assert fuzz._is_unstable(fuzz.Case(0, program, values, "2"))
