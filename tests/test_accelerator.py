"""Programs for an accelerator, where there is none: they are run on fake tensors of one (see `on_accelerator`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.on_accelerator import MODELS, Found


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    done = subprocess.run([sys.executable, "-m", "tests.on_accelerator"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # tensors of two devices met, or something cannot be planned
    return {name: Found(**own) for name, own in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", MODELS)
def test_ranks_communicate_only_what_is_on_the_accelerator(found, name):
    # `split` sends nothing; where no gradient comes back it may cut what is on the host.
    assert all(on_it or primitive == "split" for primitive, on_it in found[name].dsp)
    assert any(on_it for _, on_it in found[name].dsp)


def test_what_the_model_makes_on_the_host_is_cut_there_and_not_communicated(found):
    assert ("split", False) in map(tuple, found["host table"].dsp)


# Attention that no kernel takes runs as several ops, and what these copy depends on how tensors lie.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("ring", "unet3d")])
def test_a_plan_counts_the_memory_of_the_accelerator_alone(found, name):
    assert found[name].planned == pytest.approx(found[name].tracked, rel=0.02)
