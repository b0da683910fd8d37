"""Every registered rule keeps its promise: run in shards, its op gives what one device computes, gradients included."""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tests.rules
from dsp_auto.passes import rules
from dsp_auto.passes.notation import OpRule
from dsp_auto.passes.prove import Cut, Example, Proof, difference, prove
from tests.rules.calls import CASES, GENERATED, NOTHING_TO_SHARD, fixed_calls, generated_calls, rule_of

# Generated calls of each rule; a longer run sets more.
_EXAMPLES = int(os.environ.get("DSP_AUTO_RULE_EXAMPLES", 20))

for _module in pkgutil.iter_modules(tests.rules.__path__, "tests.rules."):
    importlib.import_module(_module.name)

_many = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


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

    @_many
    @given(generated_calls(name))
    def run(made):
        if rule_of(made) is not None:
            proofs.append(prove(*made))

    run()
    assert _shards_something(proofs, name)


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_two_mesh_dims_at_once_give_what_one_device_computes(name):
    """Two cuts of a generated call, of other axes or of one axis twice, in either order."""

    @settings(_many, max_examples=_EXAMPLES // 2)
    @given(generated_calls(name), st.data())
    def run(made, data):
        rule = rule_of(made)
        cuts = list(_two_cuts(rule)) if rule else []
        if cuts:
            both = data.draw(st.sampled_from(cuts))
            problem = difference(Example.of(*made), rule, *both)
            assert problem is None, f"{made[0]} with rule `{rule}`, cut {both}: {problem}"

    run()


def _two_cuts(rule: OpRule) -> Iterator[tuple[Cut, Cut]]:
    groups = [group for group in rule.cuts() if min(rule.sizes[axis] for axis in group) > 1]
    cuts = [
        Cut(min(3, *(rule.sizes[axis] for axis in group)), {axis: (1, rule.sizes[axis], 1) for axis in group})
        for group in groups
    ]
    for one, other in itertools.permutations(cuts, 2):
        if one.seen.keys().isdisjoint(other.seen):
            yield one, other
    for axis, size in rule.sizes.items():
        major = next((n for n in range(2, size) if size % (2 * n) == 0), None)
        if major and rule.can_shard(axis):
            minor = size // major
            yield Cut(2, {axis: (major, minor, 1)}), Cut(2, {axis: (1, major, minor // 2)})


def _shards_something(proofs: list[Proof], name: str) -> bool:
    return any(proof.axes for proof in proofs) == (name not in NOTHING_TO_SHARD)


def _file(function: Callable) -> str:
    return function.__module__.rpartition(".")[2]
