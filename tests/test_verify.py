"""`verify` passes what is right on every rank, and names the first stage that is wrong on any."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsp_auto
import dsp_auto.rehearse as rehearsal
from dsp_auto import cli
from dsp_auto.passes.presets import PRESETS
from dsp_auto.passes.rules import registered_by_user
from dsp_auto.verify import traffic
from examples.transformer_2d import build as transformer_2d

UNEVEN = {"layers": 1, "hidden": 16, "heads": 4, "frames": 7, "tokens": 9, "batch": 2}


def transformer(**arguments):
    torch.manual_seed(0)
    return transformer_2d(**{**UNEVEN, **arguments})


class WithDropout(nn.Module):
    """Dropout by itself and inside attention, where no rank can draw a part of what one device would."""

    def __init__(self, attention: float = 0.0) -> None:
        super().__init__()
        self.inside, self.over_t, self.over_s = attention, nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):  # [B, T, S, C]
        x = x + self.drop(self.over_t(x).softmax(1))
        return x + self.drop(F.scaled_dot_product_attention(x, x, self.over_s(x), dropout_p=self.inside * self.training))


def test_bytes_are_told_in_the_order_of_the_plan():
    """Not in that of a set, which differs from one run of Python to the next."""
    names = [f"primitive_{n}" for n in range(20)]
    sent = {"forward_bytes": 1.0, "backward_bytes": 1.0}
    planned = SimpleNamespace(communication={"by_primitive": {name: sent for name in names}})
    measured = [{(name, way): (1, 1.0) for name in [*reversed(names), "more"] for way in ("backward", "forward")}]
    found = [(entry.direction, entry.primitive) for entry in traffic(planned, measured)]
    assert found == [(way, name) for way in ("forward", "backward") for name in [*names, "more"]]


@pytest.mark.parametrize("strategy", PRESETS)
def test_every_preset_agrees_with_one_device_on_uneven_sizes(strategy):
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3" if strategy != "ulysses" else "4", args, kwargs, strategy=strategy)
    assert found.agrees and found.first is None and "All agree." in str(found), str(found)
    assert found.collectives[0] > 0 and any(entry.measured for entry in found.traffic)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("2x2", {"strategy": "dsp"}),
        ("8", {"strategy": "dsp"}),
        ("3", {"in_layouts": {"video": {"sp": 1}}, "out_layouts": [{"sp": 2}], "strategy": "dsp"}),
    ],
)
def test_two_mesh_dims_a_split_one_and_parts_agree(mesh, options):
    model, args, kwargs = transformer(frames=4, tokens=8) if mesh == "8" else transformer()
    assert dsp_auto.verify(model, mesh, args, kwargs, **options).agrees


def test_a_plan_with_recomputed_blocks_agrees_and_so_does_one_from_a_file(tmp_path):
    model, args, kwargs = transformer(frames=8, tokens=12)
    needed = dsp_auto.plan(model, "2", args, kwargs, strategy="dsp").memory["peak_bytes"]
    plan = dsp_auto.plan(model, "2", args, kwargs, strategy="dsp", capacity=int(0.8 * needed))
    plan.save(tmp_path / "plan.json")
    found = dsp_auto.verify(model, "2", args, kwargs, plan=tmp_path / "plan.json")
    assert found.agrees and found.plan.recomputed and found.plan.digest == plan.digest, str(found)


@pytest.mark.parametrize(("attention", "says"), [(0.0, "everything else as planned"), (0.2, "planned for that")])
def test_dropout_is_compared_with_the_numbers_that_one_device_draws(attention, says):
    torch.manual_seed(0)
    model, x = WithDropout(attention), torch.randn(2, 5, 6, 8)
    found = dsp_auto.verify(model, "2", (x,))
    assert found.agrees and says in found.note and says in str(found), str(found)
    assert not dsp_auto.verify(model.eval(), "2", (x,)).note


def test_fake_and_meta_weights_and_inputs_get_random_values_and_the_model_stays_as_it_was():
    with torch.device("meta"):
        model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert found.agrees and 0 < found.gradient[0] and model.embed.weight.is_meta


def test_without_gradients_the_forward_alone_is_compared():
    model, args, kwargs = transformer()
    with torch.no_grad():
        found = dsp_auto.verify(model, "2", args, kwargs)
    assert found.agrees and all(entry.direction == "forward" for entry in found.traffic)


def test_half_precision_is_judged_by_its_dtype():
    model, (x,), kwargs = transformer()
    found = dsp_auto.verify(model.bfloat16(), "3", (x.bfloat16(),), kwargs)
    assert found.agrees and found.gradient[0] > 1e-4 and found.allowed[1] > 1e-2, str(found)


# --- planted faults


@torch.library.custom_op("dsp_auto_verify::mix", mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(1)


def _backward(ctx, grad):
    return grad


mix.register_fake(torch.empty_like)
mix.register_autograd(_backward)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.mixer = nn.Module()
        self.mixer.forward = mix

    def forward(self, x):  # [B, T, C]
        x = self.blocks[0](x).softmax(1)
        return self.blocks[2](self.blocks[1](mix(x)).sin()).softmax(1)


@pytest.fixture
def wrong_rule():
    before = dict(registered_by_user())
    dsp_auto.register_rule("dsp_auto_verify::mix", "b t c -> b t c")  # which computes over t
    yield
    registered_by_user().clear()
    registered_by_user().update(before)


def test_a_rule_that_shards_what_it_must_not_is_found_with_its_stage_shapes_and_error(wrong_rule):
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    found = dsp_auto.verify(Mixing(), "2", (x,), strategy="dsp")
    assert not found.agrees and found.first.op == "dsp_auto_verify.mix.default" and found.first.way == "forward"
    assert found.first.ranks == (0, 1) and found.first.deviation > 0.1 and found.output[0] > 1e-3
    assert "softmax float32[1, 6, 8] (sp: " in found.first.inputs[0]
    assert "first stage that differs: " in str(found) and "They DISAGREE." in str(found)


def _planted(monkeypatch, target, instead, rank=1, count=0):
    """On one rank, what the count-th op `target` makes is replaced by `instead` of it."""
    written = rehearsal.finish

    def wrong(prepared, solution, own, groups):
        plan, graph = written(prepared, solution, own, groups)
        if own == rank:
            node = [node for node in graph.nodes if node.target is target][count]
            with graph.inserting_after(node):
                new = graph.call_function(instead, (node,))
            new.meta = dict(node.meta)
            node.meta.pop("made", None)  # which a primitive has not
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return plan, graph

    monkeypatch.setattr(rehearsal, "finish", wrong)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def doubles_its_gradient(x):
    return _Doubled.apply(x)


def add_a_little(x):
    return x + 1e-3


def test_one_rank_that_is_wrong_is_found_with_the_stage_in_the_order_of_execution(monkeypatch):
    _planted(monkeypatch, torch.ops.aten.gelu.default, add_a_little, rank=2, count=1)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert not found.agrees and (found.first.module, found.first.op) == ("blocks.1.mlp.1", "aten.gelu.default")
    assert found.first.ranks == (2,) and 1e-5 < found.first.deviation < 1e-2


def test_a_fault_of_backward_alone_is_found_with_the_stage_whose_gradient_it_is(monkeypatch):
    _planted(monkeypatch, torch.ops.aten.gelu.default, doubles_its_gradient)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert not found.agrees and found.output[0] < 1e-5 < found.gradient[0]
    assert found.first.way == "backward" and found.first.module == "blocks.0.mlp.0" and 1 in found.first.ranks
    assert "the gradient of aten.linear.default" in str(found)


def drop_a_row(x):
    return x[:, 1:]


def test_a_rank_whose_program_does_not_run_is_named_with_what_differs(monkeypatch):
    _planted(monkeypatch, torch.ops.aten.gelu.default, drop_a_row)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert not found.agrees and found.first.module == "blocks.0.mlp.1" and found.first.ranks == (1,)
    assert found.first.deviation == float("inf")


def stops(x):
    raise RuntimeError("no more")


def test_a_rank_that_stops_on_the_way_to_an_output_is_named_with_the_output(monkeypatch):
    _planted(monkeypatch, torch.ops.dsp.gather.default, stops, count=-1)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert not found.agrees and (found.first.module, found.first.op) == ("output", "the output")
    assert found.first.ranks == (1,) and "RuntimeError: no more" in str(found)


def test_bytes_that_the_plan_does_not_say_are_a_disagreement(monkeypatch):
    written = rehearsal.finish

    def wrong(*given):
        plan, graph = written(*given)
        sent = {name: {**entry, "forward_bytes": entry["forward_bytes"] + 4}
                for name, entry in plan.communication["by_primitive"].items()}  # fmt: skip
        return replace(plan, communication={**plan.communication, "by_primitive": sent}), graph

    monkeypatch.setattr(rehearsal, "finish", wrong)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "2", args, kwargs, strategy="dsp")
    assert not found.agrees and found.first is None and "DIFFERENT" in str(found)


# --- bad input, and the command


def test_a_plan_of_another_model_is_refused():
    model, args, kwargs = transformer()
    plan = dsp_auto.plan(model, "2", args, kwargs)
    with pytest.raises(dsp_auto.PlanError, match="another model or call"):
        dsp_auto.verify(model, "2", (torch.randn(2, 8, 9, 4),), plan=plan)


class Table(nn.Module):
    """Takes row numbers below 4."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 8)

    def forward(self, numbers):
        return self.rows(numbers).softmax(1).softmax(2)


def test_a_model_that_does_not_run_on_its_inputs_is_bad_input_and_no_disagreement():
    with pytest.raises(dsp_auto.DspError, match="rows: the model does not run on one device"):
        dsp_auto.verify(Table(), "2", (torch.full((2, 6), 9),))


def fails_in_backward(x):
    return _Failing.apply(x)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no gradient today")


def test_a_backward_that_does_not_run_on_a_rank_is_a_disagreement_that_names_the_rank(monkeypatch):
    _planted(monkeypatch, torch.ops.aten.gelu.default, fails_in_backward)
    model, args, kwargs = transformer()
    found = dsp_auto.verify(model, "3", args, kwargs, strategy="dsp")
    assert not found.agrees and "no gradient today" in found.failure and "rank 1 of 3" in found.failure


ARGV = ["verify", "examples.transformer_2d:build", "-a", "layers=1", "hidden=16", "heads=2", "frames=5", "tokens=6"]


def test_the_command_ends_with_0_where_all_agrees_1_where_not_and_2_for_bad_input(capsys, monkeypatch):
    assert cli.main([*ARGV, "--mesh", "2", "--strategy", "dsp", "--rng", "serial"]) == 0
    assert "All agree." in capsys.readouterr().out
    assert cli.main([*ARGV, "--mesh", "2", "--rng", "loud"]) == 2
    out, err = capsys.readouterr()
    assert not out and "loud" in err and len(err.splitlines()) == 1
    _planted(monkeypatch, torch.ops.aten.gelu.default, add_a_little)
    assert cli.main([*ARGV, "--mesh", "2"]) == 1
    assert "first stage that differs: blocks.0.mlp.1: aten.gelu.default" in capsys.readouterr().out
