"""The wheel that `pip wheel .` builds works where nothing else of the project is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIZES = ["-a", "layers=1", "hidden=16", "heads=2", "frames=4", "tokens=6"]

SCRIPT = """
import sys, torch, dsp_auto
from dsp_auto.examples.transformer_2d import build
assert dsp_auto.__file__.startswith(sys.argv[1]), dsp_auto.__file__
model, args, kwargs = build(layers=1, hidden=16, heads=2, frames=4, tokens=6)
plan = dsp_auto.plan(model, "2", args, kwargs)
plan.save("plan.json")
assert dsp_auto.Plan.load("plan.json") == plan
assert dsp_auto.verify(model, "2", args, kwargs).agrees
assert "dsp_auto" in torch.compiler.list_backends()
"""


def _run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "results", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    _run(*pip, "-w", folder, ".", cwd=folder / "source")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The scripts of an environment that has the wheel, and of ours nothing but what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not read: so not the project that is installed for editing.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    _run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_puts_nothing_but_dsp_auto_into_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dsp_auto", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    missing = [
        path.relative_to(ROOT)
        for top in ("dsp_auto", "passes", "cost_models", "examples")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
        if "/".join(path.relative_to(ROOT / "dsp_auto" if top == "dsp_auto" else ROOT).parts)
        not in {name.removeprefix("dsp_auto/") for name in names}
    ]
    assert not missing
    assert "dsp_auto/py.typed" in names


def test_the_installed_package_plans_verifies_and_registers_its_backend(installed, tmp_path):
    _run(installed / "python", "-c", SCRIPT, installed.parent, cwd=tmp_path)


def test_the_installed_command_explains_and_runs_on_two_ranks(installed, tmp_path):
    target = "dsp_auto.examples.transformer_2d:build"
    told = _run(installed / "dsp-auto", "explain", target, "--mesh", "2", *SIZES, cwd=tmp_path)
    assert "wire bytes per device" in told
    told = _run(installed / "dsp-auto", "demo", "--ranks", "2", *SIZES, cwd=tmp_path)
    assert "All agree" in told
