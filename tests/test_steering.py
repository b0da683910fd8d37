"""What a user fixes in a plan is so, what cannot be is refused with what could, and a plan says what else it would cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import dsp_auto
from dsp_auto import cli
from examples.transformer_2d import build as transformer_2d

NAMES = {"video": "B T S C"}
SMALL = {"layers": 2, "hidden": 16, "heads": 4, "frames": 8, "tokens": 16, "batch": 2}


def planned(mesh="4", **options):
    model, args, kwargs = transformer_2d(**SMALL)
    return dsp_auto.plan(model, mesh, args, kwargs, dim_names=NAMES, **{"strategy": "dsp", **options})


def shards(plan, modules):
    """What each op in a module shards over each mesh dim."""
    paths = {name: path for name, _, path, _ in plan.decision["ops"]}
    return [own for name, _, own in plan.decision["stages"] if f"{paths[name]}.".startswith(f"{modules}.")]


@pytest.fixture(scope="module")
def free():
    return planned()


def test_ops_shard_what_a_constraint_says_under_a_path_and_under_a_pattern(free):
    assert ["S"] not in shards(free, "blocks.0.mlp")
    alone = planned(constraints={"blocks.0.mlp": {"sp": "S"}})
    assert shards(alone, "blocks.0.mlp") == [["S"]] * 3 and ["S"] not in shards(alone, "blocks.2.mlp")
    every = planned(constraints={"blocks.*.mlp": {"sp": "S"}})
    assert all(shards(every, f"blocks.{n}.mlp") == [["S"]] * 3 for n in range(4))
    assert free.solver["objective"] <= alone.solver["objective"] <= every.solver["objective"]


def test_what_is_kept_whole_shards_nothing_and_the_plan_says_why(free):
    for options in ({"keep_whole": ["blocks.1.mlp"]}, {"constraints": {"blocks.1.mlp": {"sp": None}}}):
        plan = planned(**options)
        assert shards(plan, "blocks.1.mlp") == [["R"]] * 3 and plan.solver["objective"] > free.solver["objective"]
        assert {entry["why"] for entry in plan.activations["large_replicated"]} == {"as constrained"}


def test_a_constraint_speaks_of_one_mesh_dim_and_of_all_parts_of_a_split_one():
    model, args, kwargs = transformer_2d(**SMALL)
    plan = planned("2x2", constraints={"blocks.0.mlp": {"dp": "S"}, "blocks.1.mlp": {"sp": None}})
    assert {own[0] for own in shards(plan, "blocks.0.mlp")} == {"S"}
    assert {own[1] for own in shards(plan, "blocks.1.mlp")} == {"R"}
    split = dsp_auto.plan(*transformer_on(16), constraints={"blocks.0.mlp": {"sp": "S"}}, strategy="dsp", dim_names=NAMES)
    assert split.split and shards(split, "blocks.0.mlp") == [["S", "S"]] * 3


def transformer_on(ranks):
    model, args, kwargs = transformer_2d(**SMALL)
    return model, str(ranks), args, kwargs


class TwoLengths(nn.Module):
    """Video of T frames and text of L tokens in one module; what comes after it computes over T."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.after = nn.Module(), nn.Module()
        self.both.forward = lambda video, text: (video.softmax(2), text.softmax(1))
        self.after.forward = lambda video, text: (video.softmax(1), text.softmax(2))

    def forward(self, video, text):
        return self.after(*self.both(video, text))


def of_two_lengths(**options):
    args = (torch.randn(2, 4, 6, 8), torch.randn(2, 12, 10))
    return dsp_auto.plan(TwoLengths(), "2", args, dim_names={"video": "B T S C", "text": "B L D"}, strategy="dsp", **options)


def test_ops_that_do_not_have_the_factor_are_free():
    assert shards(of_two_lengths(constraints={"both": {"sp": "T"}}), "both") == shards(of_two_lengths(), "both")
    assert len(shards(of_two_lengths(), "both")) == 2 and ["T"] in shards(of_two_lengths(), "both")


def test_an_op_that_computes_over_the_factor_is_named_with_what_it_could_do():
    with pytest.raises(dsp_auto.ConstraintError) as error:
        of_two_lengths(constraints={"both": {"sp": "S"}})
    assert str(error.value).startswith("both: constraint both sharding S over sp: softmax (aten.softmax.int) cannot run so")
    assert "it could: whole; sp: T" in str(error.value)
    shown = str(of_two_lengths().explain("*"))
    assert "cannot" in shown and "sp: S: both: constraint" in shown


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"constraints": {"blocks.9": {"sp": "T"}}}, dsp_auto.LayoutError, "near it are blocks."),
        ({"keep_whole": ["patches"]}, dsp_auto.LayoutError, "no op of the model stands in 'patches'"),
        ({"constraints": {"blocks.1": {"tp": "T"}}}, dsp_auto.LayoutError, "Its dims are sp"),
        ({"constraints": {"blocks.1": {"sp": "Q"}}}, dsp_auto.LayoutError, "no op there has a factor 'Q'. They have B, T, S"),
        ({"constraints": {"blocks.1": 3}}, dsp_auto.LayoutError, 'Write it as {"blocks.3.attn"'),
        ({"constraints": {"blocks.1": {"sp": 3}}}, dsp_auto.LayoutError, 'Write it as {"blocks.3.attn"'),
        ({"constraints": ["blocks.1"]}, dsp_auto.LayoutError, 'Write it as {"blocks.3.attn"'),
        ({"keep_whole": "embed"}, dsp_auto.LayoutError, 'Write it as ["patch_embed"]'),
        ({"constraints": {"head": {"sp": "B"}}}, dsp_auto.ConstraintError, "head: constraint head sharding B over sp: linear"),
        ({"constraints": {"head": {"sp": "T"}}, "keep_whole": ["head"]}, dsp_auto.ConstraintError, "another constraint"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(options, error, says):
    with pytest.raises(error) as raised:
        planned(**options)
    assert says in str(raised.value) and type(raised.value) is error


def test_auto_keeps_the_spaces_that_the_constraints_leave():
    model, args, kwargs = transformer_2d(**{**SMALL, "layers": 1})
    plan = dsp_auto.plan(model, "2", args, kwargs, dim_names=NAMES, strategy="auto", constraints={"head": {"sp": "B"}})
    assert shards(plan, "head") == [["B"]]


def test_explain_says_what_every_other_layout_of_a_module_would_cost(free):
    found = free.explain("blocks.1.mlp")
    rows = {entry.factor: entry for entry in found.entries}
    assert set(rows) == {"T", "S", None} and [entry.factor for entry in found.entries if entry.is_plan] == ["S"]
    for factor, entry in rows.items():
        fixed = planned(constraints={"blocks.1.mlp": {"sp": factor}})
        assert entry.plan.solver["objective"] == pytest.approx(fixed.solver["objective"])
    assert "as planned" in str(found) and "peak memory" in str(found)
    assert "seconds" in str(planned(objective="time").explain("head"))
    with pytest.raises(dsp_auto.LayoutError, match="no op of the model stands in 'block'"):
        free.explain("block")


def test_a_plan_from_a_file_says_that_it_cannot_explain(free, tmp_path):
    free.save(tmp_path / "plan.json")
    for other in (dsp_auto.Plan.load(tmp_path / "plan.json"), pickle.loads(pickle.dumps(free)), copy.copy(free)):
        assert other.digest == free.digest
        with pytest.raises(dsp_auto.PlanError, match="does not hold the model"):
            other.explain("head")


def test_diff_shows_stages_collectives_memory_and_options_that_differ_and_nothing_where_none_does(free):
    assert free.diff(free) == free.diff(planned()) == "the two plans do the same"
    shown = free.diff(planned(constraints={"blocks.0.mlp": {"sp": "S"}}, keep_whole=["head"]))
    assert "blocks.0.mlp.0" in shown and "sp: T" in shown and "keep_whole" in shown and "wire bytes" in shown
    assert "blocks.2.mlp" not in shown
    needed = free.memory["peak_bytes"]
    tight = planned(capacity=int(0.8 * needed))
    assert "recomputed" in free.diff(tight) and "peak bytes" in free.diff(tight)
    model, args, kwargs = transformer_2d(**{**SMALL, "layers": 1})
    other = dsp_auto.plan(model, "2", args, kwargs, dim_names=NAMES)
    assert "sp=2" in free.diff(other) and "not there" in free.diff(other)


def test_a_constrained_plan_computes_the_same_and_its_file_holds_the_constraints(tmp_path):
    torch.manual_seed(0)
    model, args, kwargs = transformer_2d(**{**SMALL, "layers": 1})
    options = {"constraints": {"blocks.*.mlp": {"sp": "S"}}, "keep_whole": ["embed"]}
    plan = dsp_auto.plan(model, "3", args, kwargs, dim_names=NAMES, strategy="dsp", **options)
    plan.save(tmp_path / "plan.json")
    found = dsp_auto.verify(model, "3", args, kwargs, plan=tmp_path / "plan.json")
    assert found.agrees and found.plan.digest == plan.digest, str(found)


ARGV = ["examples.transformer_2d:build", "--mesh", "4", "--strategy", "dsp"]
SIZES = ["-a", *(f"{name}={value}" for name, value in SMALL.items())]


def test_the_command_constrains_explains_and_diffs(capsys, tmp_path):
    first, second = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert cli.main(["explain", *ARGV, *SIZES, "--out", first, "--why", "blocks.1.mlp"]) == 0
    assert "as planned" in capsys.readouterr().out
    steered = ["--constraint", "blocks.*.mlp=sp:S", "head=sp:-", "--keep-whole", "embed"]
    assert cli.main(["explain", *ARGV, *SIZES, "--out", second, *steered]) == 0
    capsys.readouterr()
    assert cli.main(["explain", ARGV[0], "--mesh", "4", *SIZES, "--plan", second, "--why", "head"]) == 0
    assert "as planned" in capsys.readouterr().out
    options = dsp_auto.Plan.load(second).decision["options"]
    assert options["constraints"] == {"blocks.*.mlp": {"sp": "S"}, "head": {"sp": None}} and options["keep_whole"] == ["embed"]
    assert cli.main(["diff", first, second]) == 0
    assert "blocks.0.mlp" in capsys.readouterr().out
    for bad in (["--constraint", "head"], ["--constraint", "head=sp"], ["--constraint", "=sp:T"], ["--why", "nothing"]):
        assert cli.main(["explain", *ARGV, *SIZES, *bad]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and err.startswith("dsp-auto: ")
    assert cli.main(["diff", first, str(tmp_path / "none.json")]) == 2


def test_compare_says_of_a_strategy_that_constraints_rule_out_that_it_cannot_run(capsys):
    argv = ["compare", "examples.transformer_2d:build", "--mesh", "2", *SIZES, "--strategies", "dsp", "ring"]
    assert cli.main([*argv, "--constraint", "blocks.0.mlp=sp:T", "blocks.1.mlp=sp:S"]) == 0
    out = capsys.readouterr().out
    assert "ring cannot run: " in out and "dsp cannot run: " not in out
