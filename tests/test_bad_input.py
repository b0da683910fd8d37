"""A thousand broken plan files, profiles and command lines: each is a clear error or harmless, and nothing in it runs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dsp_auto
from dsp_auto import cli
from dsp_auto.cost_models.hardware import KINDS, PROFILES, Hardware
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, finish, plan_given, prepare
from dsp_auto.show_memory import show_memory

PLANS, TEXTS, PROFILES_TRIED, COMMANDS = 400, 60, 200, 400
WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**63, -(2**70), 10**400, 0.5, -2.5, 1e308, -1e308, 5e-324),
    *("", "x", "R", "S0", "\x00", "é" * 300, "float32", "9" * 5000, "../../etc/passwd"),
    *([], {}, [[]], [None], [1, 2], {"x": 1}, {"sp": "S"}, ["a", "b"], [[["i", 0]]]),
]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Softmax(n), nn.Linear(16, 4)) for n in (1, 2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(scope="module")
def made():
    """A plan with a recomputed block, the program and the mesh that it is of."""
    program, mesh = capture(Small(), (torch.randn(2, 6, 8, 4),)), as_mesh("2")
    without = prepare(program, mesh, Options.of())
    peak = finish(without, decide(without))[0].memory["peak_bytes"]
    prepared = prepare(program, mesh, Options.of(int(0.8 * peak), hardware="h100", in_layouts={"x": {"sp": 1}}))
    return finish(prepared, decide(prepared))[0], program, mesh


@pytest.fixture
def payload(tmp_path):
    """What would leave a file if it were run, and whether it was."""
    sign = tmp_path / "it_ran"
    yield f"__import__('pathlib').Path({str(sign)!r}).touch()"
    assert not sign.exists()


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in JSON data."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(data: Any, draw: random.Random, payload: str) -> Any:
    """A copy in which one or two entries are replaced, missing, doubled, swapped or too many."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.choice([1, 1, 1, 2])):
        *path, key = draw.choice(list(places(data)))
        inner = data
        for step in path:
            inner = inner[step]
        how = draw.choice(["replace", "replace", "replace", "delete", "add", "swap", "run"])
        if how == "replace":
            inner[key] = draw.choice(WRONG)
        elif how == "run":
            inner[key] = draw.choice([payload, {"__reduce__": [payload]}, {"py/object": payload}, f"!!python/object:{payload}"])
        elif how == "delete":
            del inner[key]
        elif how == "swap":
            other = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner[key], inner[other] = inner[other], inner[key]
        elif isinstance(inner, dict):
            inner[draw.choice(["extra", "__class__", payload])] = draw.choice(WRONG)
        else:
            inner.insert(draw.randrange(len(inner) + 1), draw.choice([*WRONG, inner[key]]))
    return data


def broken_text(text: str, draw: random.Random, payload: str) -> str:
    at = draw.randrange(len(text))
    return draw.choice(
        [
            text[:at],
            text[:at] + draw.choice(["}", "]", '"', ",", "NaN", "Infinity", "\x00", "'", payload]) + text[at:],
            "[" * 100_000,
            '{"format":' * 50_000,
            text + text,
            payload,
            text.replace("1", "1" * 5000, 1),
        ]
    )


def _try_plan(given: Any, made) -> None:
    """All that is done with a plan from a file, short of running it."""
    plan, program, mesh = made
    found = dsp_auto.Plan.from_json(given)
    assert str(found) and show_memory(found) and found.diff(plan) and plan.diff(found) and found.digest
    assert dsp_auto.Plan.from_json(found.to_json()).digest == found.digest
    plan_given(program, mesh, found)


def test_broken_plan_files_are_clear_errors_and_nothing_in_them_runs(made, payload):
    draw, data = random.Random(0), made[0].to_dict()
    assert data["recomputed"] and data["decision"]["options"]["hardware"]
    # Half of the changes are in what is read to run a plan.
    refused = 0
    for number in range(PLANS):
        given = dict(data)
        if number % 2:
            given["decision"] = mutate(data["decision"], draw, payload)
        else:
            given = mutate({name: value for name, value in data.items() if name != "decision"}, draw, payload)
            given["decision"] = data["decision"]
        try:
            _try_plan(given, made)
        except dsp_auto.DspError as error:
            refused += 1
            assert 20 < len(str(error)) < 2000, str(error)
    assert PLANS * 0.6 < refused < PLANS
    text, refused = made[0].to_json(), 0
    for _ in range(TEXTS):
        try:
            _try_plan(broken_text(text, draw, payload), made)
        except dsp_auto.PlanError as error:
            refused += 1
            assert 20 < len(str(error)) < 2000, str(error)
    assert refused > TEXTS * 0.7  # some letters more in a name do no harm


def test_broken_hardware_profiles_are_clear_errors(payload):
    draw, text = random.Random(1), PROFILES["h100"].to_json()
    data = json.loads(text)
    data |= {"measured": {"mesh": {"sp": 4}}, "links": {"sp": data["intra"]}, "inside": {"sp": 2}}
    refused = 0
    for number in range(PROFILES_TRIED):
        given = json.dumps(mutate(data, draw, payload)) if number % 4 else broken_text(text, draw, payload)
        try:
            hardware = Hardware.from_json(given).on({"sp": 4})
            for kind in KINDS:
                assert hardware.collective_seconds(kind, 1e6, [("sp", 4)]) >= 0
            assert hardware.kernel("linear", "matmul").seconds(1e9, 1e6, "bfloat16") >= 0
        except dsp_auto.StrategyError as error:
            refused += 1
            assert len(str(error)) < 20_000
    assert PROFILES_TRIED * 0.5 < refused < PROFILES_TRIED


FACTORY = """
import torch
from torch import nn
class Small(nn.Module):
    def forward(self, x): return x.softmax(0).softmax(1)
def build(rows=4): return Small(), (torch.ones(rows, 6),), {}
"""


def commands(folder: str) -> list[list[str]]:
    target = f"{folder}/fuzzed.py:build"
    planning = ["--mesh", "2", "-a", "rows=8", "--capacity", "1GB", "--reserve", "0.1", "--optimizer", "sgd", "--zero", "0"]
    return [
        ["explain", target, *planning, "--strategy", "dsp", "--hardware", f"{folder}/hardware.json", "--objective", "time"],
        ["explain", target, "--mesh", "2", "--plan", f"{folder}/plan.json", "--memory"],
        ["explain", target, "--mesh", "2", "--constraint", "x=sp:T", "--keep-whole", "x", "--dim-names", "x=A B", "--why", "x"],
        ["verify", target, "--mesh", "2", "--seed", "3", "--plan", f"{folder}/plan.json"],
        ["diff", f"{folder}/plan.json", f"{folder}/plan.json"],
        ["compare", target, "--mesh", "2", "--strategies", "dsp", "--layers", "1"],
        ["fit", target, "--gpus", "2", "--capacity", "1GB", "--strategies", "dsp", "--sequence", "rows", "--step", "2"],
        ["rules", "aten::softmax", "--example", "2x3, 1"],
    ]


def broken_command(argv: list[str], draw: random.Random, payload: str) -> list[str]:
    argv = list(argv)
    junk = ["", "-", "--", "--no-such", "nan", "-1", "0", "1e9", "9" * 5000, "9" * 20, "2x", "sp:T", "=", "a=b=c", "x=sp:"]
    junk += ["\x00", "é", payload, f"rows={'(' * 3000}", f"rows={'-' * 10_000}1", f"rows={payload}", "/", ".", "none.json"]
    for _ in range(draw.choice([1, 1, 2])):
        at = draw.randrange(1, len(argv)) if len(argv) > 1 else 0
        how = draw.choice(["replace", "replace", "replace", "insert", "delete", "double"])
        if how == "replace":
            argv[at] = draw.choice(junk)
        elif how == "insert":
            argv.insert(at, draw.choice(junk))
        elif how == "delete":
            del argv[at]
        else:
            argv.insert(at, argv[at])
    return argv


def test_broken_command_lines_end_with_2_and_a_few_lines_never_a_traceback(tmp_path, capsys, payload, made):
    (tmp_path / "fuzzed.py").write_text(FACTORY)
    (tmp_path / "hardware.json").write_text(PROFILES["a100"].to_json())
    assert cli.main(["explain", f"{tmp_path}/fuzzed.py:build", "--mesh", "2", "--out", f"{tmp_path}/plan.json"]) == 0
    capsys.readouterr()
    draw, codes = random.Random(2), []
    for number in range(COMMANDS):
        known = commands(str(tmp_path))
        argv = broken_command(known[number % len(known)], draw, payload)
        codes.append(cli.main(argv))
        out, err = capsys.readouterr()
        assert codes[-1] in (0, 2), (argv, out, err)
        if codes[-1] == 2:
            assert (out or err) and len(err.splitlines()) <= 12 and "Traceback" not in err, (argv, err)
    assert codes.count(2) > COMMANDS * 0.6
