"""Promises of the command line: stdout is the plan alone, bad input is one line and exit code 2, the demo can fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsp_auto import Comparison, Fit, Plan, calibrate, cli, demo
from dsp_auto.passes.presets import PRESETS
from dsp_auto.passes.rules import registered, registered_by_user

ROOT = Path(__file__).parents[1]
EXAMPLE = "examples.transformer_2d:build"
SMALL = ["-a", "layers=1", "hidden=16", "heads=2"]
TINY_DEMO = ["demo", "--ranks", "2", *SMALL, "frames=3", "tokens=5"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def factories(tmp_path):
    """A file of factories, most of them wrong."""
    path = tmp_path / "factories.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "number = 3\n"
        "def two(): return nn.Linear(2, 2), ()\n"
        "def no_module(): return 'model', (), {}\n"
        "def listed(): return nn.Linear(2, 2), [torch.ones(2)], {}\n"
        "class OneSequence(nn.Module):\n"
        "    def forward(self, x): return (x @ x.transpose(1, 2)).softmax(-1) @ x\n"
        "def one_sequence(): return OneSequence(), (torch.ones(1, 8, 4),), {}\n"
        "def broken(): raise KeyError('weights')\n"
        "def nothing_to_share(): return nn.Linear(1, 1), (torch.ones(1, 1),), {}\n"
        "class Softmax(nn.Module):\n"
        "    def forward(self, rows): return rows.softmax(0).softmax(1)\n"
        "def noisy():\n"
        "    print('a factory that talks')\n"
        "    return Softmax(), (torch.ones(6, 8),), {}\n"
        "def needs_values(): return Softmax(), (torch.ones(6, 8) * torch.ones(1).item(),), {}\n"
    )
    return path


def _run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_explain_prints_the_table(capsys):
    code, out, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "4", *SMALL)
    assert code == 0
    assert out.startswith("mesh sp=4") and "switch T -> S (sp)" in out and "gather S -> R (sp)" in out


def test_explain_prints_json_that_plan_accepts(capsys):
    code, out, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "4", "--json", *SMALL, "habit=flat")
    plan = Plan.from_json(out)
    assert code == 0 and plan.mesh == {"sp": 4} and plan.to_dict() == json.loads(out)


def test_explain_writes_a_plan_that_it_reads_again_and_refuses_for_another_model(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    argv = ("explain", EXAMPLE, "--mesh", "4", *SMALL)
    code, written, _ = _run(capsys, *argv, "--out", path, "--strategy", "megatron-sp", "--objective", "time")
    assert code == 0 and Plan.load(path).strategy == "megatron-sp"
    code, read, _ = _run(capsys, *argv, "--plan", path)
    assert code == 0 and read.partition("; seconds:")[0] == written.partition("; seconds:")[0]
    code, out, err = _run(capsys, *argv, "--plan", path, "--objective", "time", "--strategy", "dsp")
    assert (code, out) == (2, "") and "a plan is given, and objective, strategy, hardware" in err
    code, out, err = _run(capsys, *argv, "frames=9", "--plan", path)
    assert (code, out) == (2, "") and "another model or call" in err and len(err.splitlines()) == 1


def test_names_come_from_the_option_or_from_the_factory(capsys):
    _, named, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "4", *SMALL)
    assert "sequence factors T=8, S=16" in named
    _, named, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "4", *SMALL, "--dim-names", "video=b frame place c")
    assert "sequence factors frame=8, place=16" in named


def test_inference_sends_nothing_back(capsys):
    _, out, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "4", "--json", "--inference", *SMALL)
    sent = json.loads(out)["communication"]
    assert sent["backward_bytes"] == 0 < sent["forward_bytes"]


def test_options_reach_the_planner(capsys):
    argv = ("explain", EXAMPLE, "--mesh", "4", "--json", *SMALL)
    _, out, _ = _run(
        capsys, *argv, "--objective", "time", "--hardware", "a100", "--capacity", "1GB", "--strategy", "dsp"
    )
    plan = json.loads(out)
    assert (plan["objective"], plan["strategy"]) == ("time", "dsp")
    # Of a device's size 5% are kept back.
    assert (plan["memory"]["capacity_bytes"], plan["memory"]["reserve_bytes"]) == (950_000_000, 50_000_000)
    _, out, _ = _run(capsys, *argv, "--capacity", "1GB", "--reserve", "0.25", "--optimizer", "sgd-momentum", "--zero", "2",
                     "--data-parallel", "8", "--master-weights")  # fmt: skip
    memory = json.loads(out)["memory"]
    assert (memory["capacity_bytes"], memory["reserve_bytes"]) == (750_000_000, 250_000_000)
    assert memory["optimizer"] == "sgd-momentum, float32 copies of 16-bit parameters, ZeRO-2 over 8 ranks"


def test_a_capacity_may_be_what_is_free_here(capsys):
    _, out, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "2", "--json", *SMALL, "--capacity", "free")
    assert json.loads(out)["memory"]["capacity_bytes"] > 10**7


def test_blocks_are_recomputed_unless_they_may_not_be(capsys):
    argv = ("explain", EXAMPLE, "--mesh", "2", "--json", *SMALL, "frames=16", "tokens=32")
    _, out, _ = _run(capsys, *argv)
    capacity = str(json.loads(out)["memory"]["peak_bytes"] * 3 // 4)
    for allowed in ((), ("--recompute",)):
        assert json.loads(_run(capsys, *argv, "--capacity", capacity, *allowed)[1])["recomputed"]
    code, out, err = _run(capsys, *argv, "--capacity", capacity, "--no-recompute")
    assert (code, out) == (2, "") and "no plan fits" in err


def test_memory_is_printed_after_the_plan_where_it_is_asked_for(capsys):
    argv = ("explain", EXAMPLE, "--mesh", "2", *SMALL)
    _, alone, _ = _run(capsys, *argv)
    code, out, _ = _run(capsys, *argv, "--memory")
    assert code == 0 and "a device holds" not in alone
    added = out.partition("\n\na device holds")[2]
    assert "all, at the peak" in added and "blocks.0" in added and " peak" in added
    assert json.loads(_run(capsys, *argv, "--memory", "--json")[1])["memory"]["curve"]


def test_where_no_plan_fits_what_would_stands_below_the_error(capsys):
    argv = ("explain", EXAMPLE, "--mesh", "2", *SMALL, "frames=16", "tokens=32", "--no-recompute", "--capacity", "200KB")
    code, out, err = _run(capsys, *argv)
    first, *rest = err.splitlines()
    assert (code, out) == (2, "") and first.startswith("dsp-auto: ") and "no plan fits" in first
    assert rest and all(line.startswith("    ") and "the least is" in line for line in rest)
    assert rest[0].startswith("    recomputing blocks") and any("ranks" in line for line in rest)


@pytest.mark.parametrize("strategy", PRESETS)
def test_explain_takes_every_preset(capsys, strategy):
    code, out, _ = _run(capsys, "explain", EXAMPLE, "--mesh", "2", *SMALL, "--strategy", strategy)
    assert code == 0 and f"strategy {strategy}," in out


def test_without_a_strategy_it_is_that_of_plan(capsys, factories):
    assert "strategy dsp," in _run(capsys, "explain", EXAMPLE, "--mesh", "4", *SMALL)[1]
    assert "strategy auto," in _run(capsys, "explain", f"{factories}:one_sequence", "--mesh", "4")[1]


def test_parameters_are_held_in_parts_or_whole_as_asked(capsys):
    argv = ("explain", EXAMPLE, "--mesh", "2", "--json", *SMALL, "--strategy", "megatron-lm")
    sent = []
    for option in ((), ("--shard-parameters",), ("--whole-parameters",)):
        code, out, _ = _run(capsys, *argv, *option)
        sent.append(json.loads(out)["communication"]["backward_bytes"] if code == 0 else None)
    # Gradients of weights that are held whole and used in parts come together again.
    assert sent[0] == sent[1] < sent[2]


def test_compare_prints_a_table_and_says_what_cannot_run(capsys):
    argv = ("compare", EXAMPLE, "--mesh", "4", *SMALL, "--strategies", "dsp", "ulysses", "ring")
    code, out, _ = _run(capsys, *argv)
    assert code == 0 and out.startswith("mesh sp=4, hardware h100") and "per block, the mean over the model's 2" in out
    assert "ulysses cannot run" in out and "least time" in out and "megatron" not in out
    code, out, _ = _run(capsys, *argv, "--inference", "--layers", "2", "--hardware", "a100")
    assert code == 0 and "hardware a100" in out and "per layer, the mean over 2" in out and "backward" not in out


def test_compare_prints_json_that_comparison_accepts(capsys):
    code, out, _ = _run(capsys, "compare", EXAMPLE, "--mesh", "2", "--json", *SMALL, "--strategies", "dsp")
    assert code == 0 and Comparison.from_json(out).to_dict() == json.loads(out)


def test_compare_ends_with_exit_code_2_and_the_reasons_where_nothing_can_run(capsys):
    argv = ("compare", EXAMPLE, "--mesh", "2", *SMALL, "--strategies", "dsp", "ring", "--capacity", "1KB")
    code, out, err = _run(capsys, *argv)
    assert (code, err) == (2, "") and out.count("cannot run") == out.count("no plan fits") == 2


FIT = ("fit", EXAMPLE, "--gpus", "2", *SMALL, "--strategies", "dsp", "ring")


def test_fit_prints_a_table_and_ends_with_exit_code_0_where_something_fits(capsys):
    argv = (*FIT, "--zero", "1", "--hardware", "a100", "--capacity", "80GB", "--sequence", "frames", "--step", "100000000")
    code, out, _ = _run(capsys, *argv)
    assert code == 0 and out.startswith("2 GPUs (a100) of ") and "ZeRO-1 over the replicas" in out
    assert "longest frames that fits" in out and "samples/s" in out and "ulysses" not in out


def test_fit_ends_with_exit_code_2_and_the_reasons_where_nothing_fits(capsys):
    code, out, err = _run(capsys, *FIT, "--capacity", "1KB")
    assert (code, err) == (2, "") and out.count("does not fit") == out.count("no plan fits") == 2


def test_fit_prints_json_that_fit_accepts(capsys):
    code, out, _ = _run(capsys, *FIT, "--capacity", "80GB", "--json", "--no-recompute", "--inference")
    assert code == 0 and Fit.from_json(out).to_dict() == json.loads(out) and not json.loads(out)["training"]


def test_fit_in_inference_is_of_the_model_in_eval(capsys, factories):
    with factories.open("a") as file:
        file.write(
            "class Mode(nn.Module):\n"
            "    def forward(self, rows): return rows.softmax(0).softmax(1).repeat(9 if self.training else 1, 1)\n"
            "def mode(): return Mode(), (torch.ones(6, 8),), {}\n"
        )
    argv = ("fit", f"{factories}:mode", "--gpus", "1", "--capacity", "1MB", "--strategies", "dsp", "--json")
    found = [Fit.from_json(_run(capsys, *argv, *more)[1])["dsp"].smallest for more in ((), ("--inference",))]
    assert found[1].peak_bytes < found[0].peak_bytes


def test_calibrate_starts_as_many_processes_as_the_mesh_has(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(calibrate, "spawn", lambda *args: calls.append(args))
    out = tmp_path / "mine.json"
    assert cli.main(["calibrate", "--mesh", "2x2", "--launch", "--quick", "--out", str(out)]) == 0
    (function, ranks, shape, quick, where), = calls
    assert (ranks, shape.sizes, quick, where) == (4, (2, 2), True, out)


def test_a_path_is_a_target_and_what_it_prints_stays_off_stdout(capsys, factories):
    code, out, err = _run(capsys, "explain", f"{factories}:noisy", "--mesh", "2", "--json")
    assert code == 0 and json.loads(out) and "a factory that talks" in err


def test_a_factory_that_needs_values_is_built_for_real_and_that_is_said(capsys, factories):
    code, out, err = _run(capsys, "explain", f"{factories}:needs_values", "--mesh", "2")
    assert code == 0 and out.startswith("mesh sp=2") and "for real" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "COMMAND"),
        (("explain",), "TARGET"),
        (("explain", EXAMPLE), "--mesh"),
        (("explain", "examples.transformer_2d", "--mesh", "2"), "module:factory"),
        (("explain", "no.such.module:build", "--mesh", "2"), "no.such.module"),
        (("explain", "no_such_file.py:build", "--mesh", "2"), "no such file"),
        (("explain", "examples.transformer_2d:nothing", "--mesh", "2"), "nothing"),
        (("explain", EXAMPLE, "--mesh", "2y"), "2y"),
        (("explain", EXAMPLE, "--mesh", "2", "-a", "layers"), "name=value"),
        (("explain", EXAMPLE, "--mesh", "2", "-a", "depth=3"), "depth"),
        (("explain", EXAMPLE, "--mesh", "2", "--dim-names", "B T S"), "name=value"),
        (("explain", EXAMPLE, "--mesh", "2", "--dim-names", "audio=B L"), "audio"),
        (("explain", EXAMPLE, "--mesh", "2", "--strategy", "magic"), "magic"),
        (("explain", EXAMPLE, "--mesh", "2", "--objective", "beauty"), "beauty"),
        (("explain", EXAMPLE, "--mesh", "2", "--hardware", "abacus"), "abacus"),
        (("explain", EXAMPLE, "--mesh", "2", "--capacity", "lots"), "lots"),
        (("explain", EXAMPLE, "--mesh", "2", "--capacity", "1GB", "--reserve", "1.5"), "reserve 1.5"),
        (("explain", EXAMPLE, "--mesh", "2", "--capacity", "1GB", "--reserve", "some"), "some"),
        (("explain", EXAMPLE, "--mesh", "2", "--optimizer", "magic"), "magic"),
        (("explain", EXAMPLE, "--mesh", "2", "--zero", "4"), "--zero"),
        (("explain", EXAMPLE, "--mesh", "2", "--zero", "2"), "data_parallel is 1"),
        (("explain", EXAMPLE, "--mesh", "2", "--data-parallel", "0"), "data_parallel=0"),
        (("explain", EXAMPLE, "--mesh", "2", "--recompute"), "there is no capacity"),
        (("explain", EXAMPLE, "--mesh", "4099"), "at most 256 ranks"),
        (("explain", EXAMPLE, "--mesh", "2", "--shard-parameters", "--whole-parameters"), "not allowed with"),
        (("explain", EXAMPLE, "--mesh", "2", "--hardware", "no_such.json"), "no_such.json"),
        (("compare",), "TARGET"),
        (("compare", EXAMPLE, "--mesh", "2y"), "2y"),
        (("compare", EXAMPLE, "--mesh", "2", "--strategies", "magic"), "magic"),
        (("compare", EXAMPLE, "--mesh", "2", "--layers", "0"), "layers 0"),
        (("compare", EXAMPLE, "--mesh", "2", "--layers", "few"), "few"),
        (("compare", EXAMPLE, "--mesh", "2", "--hardware", "abacus"), "abacus"),
        (("fit",), "TARGET"),
        (("fit", EXAMPLE, "--capacity", "1GB"), "--gpus"),
        (("fit", EXAMPLE, "--gpus", "8"), "--capacity"),
        (("fit", EXAMPLE, "--gpus", "0", "--capacity", "1GB"), "gpus 0"),
        (("fit", EXAMPLE, "--gpus", "few", "--capacity", "1GB"), "few"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "lots"), "lots"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "--strategies", "magic"), "magic"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "--mesh", "2"), "--mesh"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "--hardware", "abacus"), "abacus"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "--sequence", "length"), "the factory takes layers"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "--sequence", "frames", "--step", "0"), "step 0"),
        (("fit", EXAMPLE, "--gpus", "8", "--capacity", "1GB", "-a", "depth=3"), "depth"),
        (("calibrate", "--mesh", "2y", "--out", "x.json"), "2y"),
        (("calibrate", "--mesh", "2"), "--out"),
        (("calibrate", "--mesh", "2", "--launch", "--out", "profile.txt"), "profile.txt"),
        (("demo", "--ranks", "0"), "--ranks 0"),
        (("demo", "--ranks", "many"), "many"),
        (("rules", "nowhere::op"), "no such op"),
        (("rules", "aten::softmax.nothing"), "no overload 'nothing'"),
        (("rules", "softmax"), "namespace::op"),
        (("rules", "aten::einsum"), "--example"),
        (("rules", "aten::softmax", "--example", "2y3, 1"), "'2y3' is no tensor"),
        (("rules", "aten::softmax", "--example", "2x3:float, 1, 2, 3, 4"), "no argument for '3'"),
        (("rules", "aten::linear", "--example", "2x3, 4x5"), "RuntimeError"),
        (("rules", "aten::softmax", "--import", "no.such.module"), "no.such.module"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, says):
    code, out, err = _run(capsys, *argv)
    assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("number", "int, not a function"),
        ("two", "returns 2 values"),
        ("no_module", "a str in place of a Module"),
        ("listed", "a list in place of a tuple"),
        ("nothing_to_share", "nothing to share out"),
    ],
)
def test_a_factory_that_returns_something_else_is_one_line_and_exit_code_2(capsys, factories, factory, says):
    code, out, err = _run(capsys, "explain", f"{factories}:{factory}", "--mesh", "2")
    assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1, err


def test_a_factory_that_raises_is_exit_code_2_and_no_traceback(capsys, factories):
    code, out, err = _run(capsys, "explain", f"{factories}:broken", "--mesh", "2")
    assert (code, out) == (2, "") and err.splitlines()[-1].endswith("fails: KeyError: 'weights'."), err


@pytest.fixture
def own_ops(tmp_path, monkeypatch):
    """A file that defines ops, and registers a rule for one of them."""
    monkeypatch.setenv("DSP_AUTO_CACHE", str(tmp_path / "cache"))
    before = dict(registered_by_user())
    name = f"own_ops_{len(sys.modules)}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        "import torch, dsp_auto\n"
        "def define(name, function):\n"
        f"    torch.library.custom_op('{name}::' + name, function, mutates_args=()).register_fake(torch.empty_like)\n"
        "def mix(x: torch.Tensor) -> torch.Tensor: return x.softmax(1)\n"
        "def noise(x: torch.Tensor) -> torch.Tensor: return x + torch.rand_like(x)\n"
        "for function in (mix, noise): define(function.__name__, function)\n"
        "define('known', mix)\n"
        f"dsp_auto.register_rule('{name}::known', 'b s c -> b s c; whole: s')\n"
        "print('a module that talks')\n"
    )
    yield name, str(path)
    registered_by_user().clear()
    registered_by_user().update(before)


def test_rules_lists_every_rule_with_its_place(capsys, own_ops):
    code, out, _ = _run(capsys, "rules", "--import", own_ops[1])
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(rows) >= set(registered()) and re.search(r"written +passes/rules/\w+\.py:\d+$", rows["aten::linear"])
    assert rows[f"{own_ops[0]}::known"].endswith(f"{own_ops[1]}:8")


def test_rules_of_an_op_are_printed_for_an_example_with_the_place_of_the_source(capsys):
    code, out, _ = _run(capsys, "rules", "aten::softmax")
    assert code == 0 and re.search(r"written at passes/rules/attention\.py:\d+\n.*\(8x8x8x8, 1\): .*; whole: d1\n", out)
    _, out, _ = _run(capsys, "rules", "aten::einsum", "--example", '"bsd,btd->bst", [2x3x5, 2x4x5:float32]')
    assert "b s d, b t d -> b s t; reduces: d" in out
    _, out, _ = _run(capsys, "rules", "aten::sum", "--example", "2x3x5, [1, 2], keepdim=True, dtype=float64")
    assert "d0 d1 d2 -> d0 1 1; reduces: d1 d2" in out


def test_rules_discovers_the_rule_of_an_op_of_ones_own_and_remembers_it(capsys, own_ops):
    name, path = own_ops
    argv = ("rules", f"{name}::mix", "--import", path)
    assert _run(capsys, *argv)[0] == 2
    code, out, err = _run(capsys, *argv, "--example", "2x9x8", "--inference")
    assert code == 0 and "a b c -> a b c; whole: b\n    found by running it (" in out and "talks" in err
    assert "it has no gradient" in _run(capsys, *argv, "--example", "2x9x8")[1]
    code, out, _ = _run(capsys, *argv)  # of what the cache keeps
    assert code == 0 and "a b c -> a b c; whole: b" in out
    assert "a b c -> a b c; whole: b" in _run(capsys, "rules")[1]


def test_rules_says_why_none_is_found_and_where_one_was_registered(capsys, own_ops):
    name, path = own_ops
    code, out, _ = _run(capsys, "rules", f"{name}::noise", "--import", path, "--example", "2x9x8")
    assert code == 0 and "none is found: it draws random numbers" in out
    code, out, _ = _run(capsys, "rules", f"{name}::known")
    assert code == 0 and f"registered at {path}:8" in out and "b s c -> b s c; whole: s" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("dsp-auto ")


def test_explaining_a_large_model_allocates_no_weights():
    """28 layers of hidden 1152 have 3.6 GB of weights; activations of a block at this length are larger still."""
    script = (
        "import resource, sys; from dsp_auto import cli; "
        "code = cli.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
    )
    sizes = ["layers=28", "hidden=1152", "heads=16", "frames=128", "tokens=4096"]
    argv = ["explain", EXAMPLE, "--mesh", "8", "--json", "-a", *sizes]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1])
    assert Plan.from_json(done.stdout).communication["by_primitive"]["switch"]["count"] == 55
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"


def test_demo_runs_and_agrees(capfd):
    code = cli.main(TINY_DEMO)
    out, _ = capfd.readouterr()
    assert code == 0 and "All agree." in out and "DIFFERENT" not in out


@pytest.mark.parametrize("tolerance", ["OUTPUT_TOLERANCE", "GRADIENT_TOLERANCE"])
def test_demo_fails_where_the_deviation_is_above_tolerance(capsys, comparisons, monkeypatch, tolerance):
    monkeypatch.setattr(demo, tolerance, -1.0)  # no deviation is this small
    monkeypatch.setattr(demo, "spawn", lambda function, ranks, sizes: comparisons)
    assert cli.main(TINY_DEMO) == 1
    out = capsys.readouterr().out
    assert out.count("TOO LARGE") == 1 and "DISAGREE" in out


def test_demo_fails_where_bytes_differ_from_the_plan(capsys, comparisons, monkeypatch):
    count, sent = comparisons[0].measured["gather", "forward"]
    comparisons[0].measured["gather", "forward"] = (count, sent + 4)  # one element more
    monkeypatch.setattr(demo, "spawn", lambda function, ranks, sizes: comparisons)
    assert cli.main(TINY_DEMO) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == 1


def test_demo_fails_where_nothing_was_sent(capsys, comparisons, monkeypatch):
    for one in comparisons:
        one.measured.clear()
    monkeypatch.setattr(demo, "spawn", lambda function, ranks, sizes: comparisons)
    assert cli.main(TINY_DEMO) == 1


@pytest.fixture
def comparisons(world):
    return world(2).run(_compare)


def _compare(rank, ranks):
    return demo.compare(rank, ranks, {"layers": 1, "hidden": 16, "heads": 2, "frames": 3, "tokens": 5})


def test_a_demo_that_cannot_be_planned_is_one_line_and_exit_code_2(capfd):
    assert cli.main([*TINY_DEMO, "tokens=1", "frames=1"]) == 2
    err = capfd.readouterr().err
    assert "no sequence factor" in err and len(err.splitlines()) == 1, err


def test_a_reader_that_has_read_enough_gets_no_traceback():
    command = [sys.executable, "-m", "dsp_auto.cli", "rules", "aten::linear"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
