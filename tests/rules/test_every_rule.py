"""Every registered rule keeps its promise: run in shards, its op gives what one device computes, gradients included."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import tests.rules
from dsp_auto.passes import rules
from dsp_auto.passes.prove import Proof, prove
from tests.rules.calls import CASES, GENERATED, fixed_calls, generated_calls, rule_of

# Generated calls of each rule; a longer run sets more.
_EXAMPLES = int(os.environ.get("DSP_AUTO_RULE_EXAMPLES", 40))

for _module in pkgutil.iter_modules(tests.rules.__path__, "tests.rules."):
    importlib.import_module(_module.name)

# Rules that let no axis be sharded, and why.
_NOTHING_TO_SHARD = {
    "aten::arange": "made from positions: every rank makes all of it",
    "aten::linspace": "made from positions: every rank makes all of it",
    "aten::eye": "made from positions: every rank makes all of it",
}


@pytest.fixture(autouse=True, scope="module")
def same_numbers():
    """One thread; `empty` is filled, so that its shards can be compared."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("calls", [CASES, GENERATED], ids=["cases", "generated"])
def test_every_registered_rule_has_calls_in_the_file_of_its_family(calls):
    families = {name: _file(function) for name, function in rules.registered().items()}
    missing = [f"{name} (tests/rules/test_{family}.py)" for name, family in families.items() if name not in calls]
    assert not missing, f"rules without @cases or without @generated: {', '.join(missing)}"
    assert {name: _file(function).removeprefix("test_") for name, function in calls.items()} == families


@pytest.mark.parametrize("name", sorted(CASES))
def test_shards_give_what_one_device_computes(name):
    assert _shards_something([prove(*made) for made in fixed_calls(name)], name)


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_shards_of_generated_calls_give_what_one_device_computes(name):
    """A generated call may have a form that no rule describes; it is then left out."""
    proofs: list[Proof] = []

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(generated_calls(name))
    def run(made):
        if rule_of(made) is not None:
            proofs.append(prove(*made))

    run()
    assert _shards_something(proofs, name)


def _shards_something(proofs: list[Proof], name: str) -> bool:
    return any(proof.axes for proof in proofs) == (name not in _NOTHING_TO_SHARD)


def _file(function: Callable) -> str:
    return function.__module__.rpartition(".")[2]
