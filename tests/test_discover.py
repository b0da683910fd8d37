"""Promises of found rules: what shards keep is found, what they do not keep never is, nothing of the caller's changes, and
every rank comes to the same."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._higher_order_ops.effects import _register_effectful_op
from torch._library.effects import EffectType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import dsp_auto
from dsp_auto.passes import discover as discovery
from dsp_auto.passes import rule_cache
from dsp_auto.passes.discover import discover
from dsp_auto.passes.notation import OpCall
from dsp_auto.passes.prove import prove
from tests.parity import OUTPUT_TOLERANCE, compare

aten = torch.ops.aten


def op(function, fake=None, backward=None, **options):
    """`function` as an op of the namespace `tried`."""
    made = torch.library.custom_op(f"tried::{function.__name__}", function, mutates_args=(), **options)
    made.register_fake(fake or function)
    if backward is not None:
        made.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))
    return made._opoverload


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call_of(target, *args, **kwargs):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    with mode, torch.no_grad():
        results = target(*args, **kwargs)
    return OpCall.of(target, args, kwargs, [r for r in pytree.tree_leaves(results) if isinstance(r, torch.Tensor)])


def found(target, *args, grad=False, **kwargs):
    with torch.set_grad_enabled(grad):
        return discover(call_of(target, *args, **kwargs))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSP_AUTO_CACHE", str(tmp_path / "cache"))
    discovery._known.clear()
    return tmp_path / "cache" / "rules"


# --- ops


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    b, s, c = q.shape
    q, k, v = (x.reshape(b, x.shape[1], heads, c // heads).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, s, c)


def _rotated(q: Tensor, k: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos[:, None], k * cos[:, None]


def _scan(x: Tensor, decay: Tensor) -> Tensor:
    states, state = [], torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        state = state * decay + x[:, step]
        states.append(state)
    return torch.stack(states, 1)


def _bilinear(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bsi,ij,btj->bst", x, w, y)


def _several(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ w, (x * x).sum(-1), (x * x).sum((0, 1))


def _doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [2 * x for x in tensors]


def _scaled(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return 2 * x if weight is None else x * weight


def _looked_up(table: Tensor, rows: Tensor) -> Tensor:
    return table[rows]


def _only_half(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise TypeError("this kernel takes bfloat16")
    return x.softmax(-1)


def _blocks_of_128(x: Tensor) -> Tensor:
    if x.shape[1] % 128:
        raise ValueError("whole blocks of 128")
    blocks = x.unflatten(1, (-1, 128))
    return (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)


def _logarithms(x: Tensor) -> Tensor:
    return x.log().cumsum(1)


def _wide(x: Tensor, y: Tensor) -> Tensor:
    return x * y


attention, rotated, scan, bilinear = map(op, (_attention, _rotated, _scan, _bilinear))
several, doubled, scaled, looked_up = map(op, (_several, _doubled, _scaled, _looked_up))
only_half, blocks_of_128, logarithms, wide = map(op, (_only_half, _blocks_of_128, _logarithms, _wide))


@pytest.mark.parametrize(
    ("target", "args", "rule"),
    [
        (
            attention,
            (zeros(2, 1024, 256), zeros(2, 77, 256), zeros(2, 77, 256), 8),
            "a b c, a d c, a d c -> a b c; whole: c d",
        ),
        (
            rotated,
            (zeros(2, 1024, 8, 64), zeros(2, 1024, 2, 64), zeros(1024, 64)),
            "a b c d, a b f d, b d -> a b c d, a b f d; whole: c f",
        ),
        (
            rotated,
            (zeros(2, 1024, 8, 64), zeros(2, 1024, 8, 64), zeros(1024, 64)),
            "a b c d, a b c d, b d -> a b c d, a b c d",
        ),
        (scan, (zeros(2, 300, 16), zeros(16)), "a b c, c -> a b c; whole: b"),
        (
            bilinear,
            (zeros(2, 96, 32), zeros(32, 32), zeros(2, 96, 32)),
            "a b c, c d, a e d -> a b e; reduces: c d",
        ),
        (several, (zeros(2, 96, 32), zeros(32, 8)), "a b c, c d -> a b d, a b, c; whole: d; reduces: a b c"),
        (doubled, ([zeros(2, 96), zeros(2, 96)],), "a b, a b -> a b, a b"),
        (scaled, (zeros(2, 96, 32),), "a b c -> a b c"),
        (scaled, (zeros(2, 96, 32), zeros(32)), "a b c, c -> a b c"),
        (scaled, (zeros(2, 96, 32), zeros(2, 1, 32)), "a b c, a 1 c -> a b c"),
        (scaled, (zeros(1, 96, 32),), "1 a b -> 1 a b"),
        (looked_up, (zeros(5000, 8), zeros(2, 96, dtype=torch.int64)), "a b, c d -> c d b; whole: a"),
        (only_half, (zeros(2, 96, 32, dtype=torch.bfloat16),), "a b c -> a b c; whole: c"),
        (blocks_of_128, (zeros(2, 4096, 32),), "a b c -> a b c; whole: b"),
        (logarithms, (zeros(2, 96, 32),), "a b c -> a b c; whole: b"),
        (wide, (zeros(2, 3, 16, 32, 32, 64), zeros(3, 16, 1, 32, 64)), "a b c d e f, b c 1 e f -> a b c d e f"),
        (
            aten.grid_sampler_2d.default,
            (zeros(2, 4, 9, 8), zeros(2, 6, 7, 2), 0, 0, False),
            "a b c d, a e f g -> a b e f; whole: c d g",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_the_rule_of_an_op_that_nobody_described_is_found(target, args, rule):
    outcome = found(target, *args)
    assert str(outcome.rule) == rule, outcome
    assert outcome.checked and not outcome.why


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_found_is_what_is_written(grad):
    """For ops that have both, but for axes that only cutting into ranges or exchanging statistics makes shardable."""
    x, w = zeros(2, 96, 64), zeros(32, 64)
    for target, args, rule in (
        (aten.linear.default, (x, w, zeros(32)), "a b c, d c, d -> a b d; whole: c"),
        (aten.softmax.int, (x, 1), "a b c -> a b c; whole: b"),
        (aten.tril.default, (zeros(3, 9, 9),), "a b c -> a b c; whole: b c"),
        (aten.flip.default, (x, [1]), "a b c -> a b c; whole: b"),
        (aten.sum.dim_IntList, (x, [1]), "a b c -> a c; reduces: b"),
        (aten.embedding.default, (zeros(50, 8), zeros(2, 9, dtype=torch.int64)), "a b, c d -> c d b; whole: a"),
        (aten.conv1d.default, (zeros(2, 8, 30), zeros(4, 8, 3)), "a b c, d b e -> a d f; whole: c e f; reduces: b"),
    ):
        assert str(found(target, *args, grad=grad).rule) == rule


@pytest.mark.parametrize("name", ["attention", "rotated", "scan", "several", "looked_up"])
def test_a_found_rule_is_one_that_can_be_proven(name):
    generator = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(shape, generator=generator)

    args = {
        "attention": (t(2, 9, 8), t(2, 11, 8), t(2, 11, 8), 2),
        "rotated": (t(2, 9, 4, 6), t(2, 9, 2, 6), t(9, 6)),
        "scan": (t(3, 7, 5), t(5)),
        "several": (t(3, 7, 5), t(5, 4)),
        "looked_up": (t(9, 4), torch.randint(0, 9, (3, 7), generator=generator)),
    }[name]
    target = globals()[name]
    with torch.no_grad():
        prove(target, args, rule=found(target, *args).rule)


# --- what only looks parallel


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).tril().softmax(-1) @ k


def _positions(x: Tensor) -> Tensor:
    return x * torch.cos(0.001 * torch.arange(x.shape[1]))[:, None].to(x.dtype)


def _zero_behind(x: Tensor, most: int) -> Tensor:
    return torch.cat([x[:, :most], 0 * x[:, most:]], 1)


def _window(x: Tensor, width: int) -> Tensor:
    far = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() > width
    return (x @ x.mT).masked_fill(far, -torch.inf).softmax(-1) @ x


def _quantized(x: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).round() * step


def _half_quantized(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise TypeError("this kernel takes bfloat16")
    return _quantized(x)


def _of_groups(x: Tensor, groups: int) -> Tensor:
    rows = x.unflatten(0, (groups, -1))
    return (rows - rows.mean(0)).flatten(0, 1)


def _padded(x: Tensor, lengths: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[1])[:, None] < lengths[:, None, None])


def _segments(x: Tensor, bounds: Tensor) -> Tensor:
    made, places = torch.zeros_like(x), bounds.tolist()
    for start, stop in zip(places, places[1:]):
        made[start:stop] = x[start:stop].mean(0)
    return made


causal, positions, zero_behind, window, quantized, half_quantized, of_groups, padded = map(
    op, (_causal, _positions, _zero_behind, _window, _quantized, _half_quantized, _of_groups, _padded)
)
segments = op(_segments, fake=lambda x, bounds: torch.empty_like(x))


@pytest.mark.parametrize(
    ("target", "args", "whole"),
    [
        (causal, (zeros(2, 64, 8), zeros(2, 64, 8)), (0, 1)),
        (positions, (zeros(2, 1024, 8),), (0, 1)),
        (zero_behind, (zeros(2, 1024, 8), 512), (0, 1)),
        (window, (zeros(2, 600, 8), 256), (0, 1)),
        (quantized, (zeros(2, 64, 8),), (0, 1)),
        (half_quantized, (zeros(2, 64, 8, dtype=torch.bfloat16),), (0, 1)),
        (of_groups, (zeros(4096, 8), 16), (0, 0)),
        (padded, (zeros(4, 64, 8), zeros(4, dtype=torch.int32)), (0, 1)),
        (segments, (zeros(400, 8), zeros(9, dtype=torch.int64)), (0, 0)),
        (segments, (zeros(400, 8), zeros(9, dtype=torch.int64)), (1, 0)),
    ],
)
def test_what_depends_on_its_place_or_on_all_of_a_dim_keeps_that_dim_whole(target, args, whole):
    rule = found(target, *args).rule
    (axis,) = rule.inputs[whole[0]][whole[1]]
    assert axis in rule.whole and not rule.can_shard(axis)
    assert any(map(rule.can_shard, rule.sizes))


def _minute(x: Tensor) -> Tensor:
    return x.softmax(1) * 1e-9


def _constant(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


minute, constant = map(op, (_minute, _constant))


@pytest.mark.parametrize("target", [minute, constant])
def test_a_check_that_could_not_fail_claims_nothing(target):
    assert found(target, zeros(2, 64, 8)).why == "no dim of its operands can be shared out"


# --- gradients


def _square(x: Tensor) -> Tensor:
    return x * x


def _square_again(x: Tensor) -> Tensor:
    return x * x


square = op(_square, backward=lambda ctx, grad: 2 * grad * ctx.saved_tensors[0])
mean_in_backward = op(
    _square_again, backward=lambda ctx, grad: 2 * grad * ctx.saved_tensors[0] / ctx.saved_tensors[0].shape[1]
)


def test_gradients_count_where_gradients_are_asked_for():
    x = zeros(2, 64, 8)
    assert str(found(square, x, grad=True).rule) == "a b c -> a b c"
    assert "backward" in found(square, x, grad=True).checked
    assert str(found(mean_in_backward, x, grad=True).rule) == "a b c -> a b c; whole: b"
    assert str(found(mean_in_backward, x).rule) == "a b c -> a b c"


def test_an_op_without_a_gradient_formula_has_a_rule_for_inference_only():
    outcome = found(scaled, zeros(2, 96, 32), grad=True)
    assert outcome.rule is None and outcome.why == "it has no gradient" and "register_autograd" in outcome.detail
    assert found(scaled, zeros(2, 96, 32)).rule is not None


# --- what is never discovered


def _noise(x: Tensor) -> Tensor:
    return x + 0 * torch.rand_like(x)


def _python_noise(x: Tensor) -> Tensor:
    return x * (1 + (random.random() > 2))


def _numpy_noise(x: Tensor) -> Tensor:
    return x * (1 + (numpy.random.rand() > 2))


_calls = []


def _remembers(x: Tensor) -> Tensor:
    _calls.append(1)
    return x + len(_calls)


def _changes(x: Tensor) -> Tensor:
    x.add_(1)
    return x.clone()


def _talks(x: Tensor) -> Tensor:
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def _prints(x: Tensor) -> Tensor:
    return x + 1


def _prints_inside(x: Tensor) -> Tensor:
    return prints(x) + 1


noise, python_noise, numpy_noise, remembers, changes, talks, prints, prints_inside = (
    op(function, fake=lambda x: torch.empty_like(x))
    for function in (_noise, _python_noise, _numpy_noise, _remembers, _changes, _talks, _prints, _prints_inside)
)
_register_effectful_op(prints, EffectType.ORDERED)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (noise, "it draws random numbers"),
        (python_noise, "it draws random numbers"),
        (numpy_noise, "it draws random numbers"),
        (remembers, "it gives different results for equal inputs"),
        (changes, "it changes its arguments"),
        (prints, "it has side effects"),
        (prints_inside, "it has side effects"),
        (aten.bernoulli.default, "it draws random numbers"),
        (torch.ops._c10d_functional.wait_tensor.default, "it communicates"),
    ],
)
def test_randomness_and_side_effects_are_never_discovered(target, why):
    outcome = found(target, zeros(2, 96, 32))
    assert outcome.rule is None and outcome.why == why


def test_what_its_declaration_refuses_is_not_even_run():
    runs = []
    library = torch.library.Library("tried_by_schema", "FRAGMENT")
    library.define("into(Tensor x, Tensor(a!) y) -> Tensor")
    library.define("seeded(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    library.define("count(Tensor x) -> int")
    for name in ("into", "seeded", "count"):
        library.impl(name, lambda x, *rest: runs.append(1) or x.clone(), "CPU")
    ops, x = torch.ops.tried_by_schema, zeros(4, 6)
    for target, operands, why in (
        (ops.into.default, (x, x), "it changes its arguments"),
        (ops.seeded.default, (x,), "it draws random numbers"),
        (ops.count.default, (x,), "its results are no tensors"),
    ):
        assert discover(OpCall.of(target, operands, {}, [x])).why == why
    assert discover(OpCall.of(ops.into.default, (zeros(0, 6), x), {}, [x])).rule is None
    assert discover(OpCall.of(scaled, (zeros(0, 6),), {}, [zeros(0, 6)])).why.startswith("some of its sizes are zero")
    assert not runs


def test_a_hidden_collective_does_not_run(world):
    assert world(2).run(_tries_a_collective) == [("it communicates", 0)] * 2


def _tries_a_collective(rank, ranks):
    before = dist.group.WORLD._get_sequence_number_for_group()
    return found(talks, zeros(2, 96, 32)).why, dist.group.WORLD._get_sequence_number_for_group() - before


def _on_gpu(x: Tensor) -> Tensor:
    return x * x


def _kernel(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
    return x * x


on_gpu = op(_on_gpu, device_types="cuda")
kernel = op(_kernel, fake=lambda x: torch.empty_like(x))


@pytest.mark.parametrize("target", [on_gpu, kernel])
def test_an_op_with_kernels_for_gpus_is_tried_where_there_is_one_and_said_to_be_untried_elsewhere(target, own_cache):
    outcome = found(target, zeros(2, 96, 32))
    if torch.cuda.is_available():
        assert str(outcome.rule) == "a b c -> a b c"
    else:
        assert outcome.why == "it ran on no inputs that were tried, and this computer has no GPU to try it on"
        assert outcome.detail and not list(own_cache.glob("*"))  # where there is a GPU it will be tried


# --- nothing of the caller's changes


def test_random_states_stay_and_do_not_matter():
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
        discovery._known.clear()
        outcomes.append([found(target, zeros(2, 96, 32)) for target in (noise, python_noise, numpy_noise, scaled)])
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert (numpy.random.get_state()[1] == before[2]).all()
    assert outcomes[0] == outcomes[1]


def test_the_callers_modes_do_not_matter(monkeypatch):
    monkeypatch.setenv("DSP_AUTO_CACHE", "off")
    call = call_of(attention, zeros(2, 96, 32), zeros(2, 7, 32), zeros(2, 7, 32), 4)
    wanted = found(attention, zeros(2, 96, 32), zeros(2, 7, 32), zeros(2, 7, 32), 4)
    for mode in (
        FakeTensorMode(),
        torch.device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        discovery._known.clear()
        with torch.no_grad(), mode:
            assert discover(call) == wanted


# --- the cache


def _counted(x: Tensor) -> Tensor:
    _calls.append(1)
    return x.softmax(-1)


counted = op(_counted, fake=lambda x: torch.empty_like(x))


def test_what_was_found_once_is_not_tried_again(own_cache):
    first = found(counted, zeros(2, 96, 32))
    assert len(list(own_cache.glob("*"))) == 1
    runs = len(_calls)
    assert found(counted, zeros(2, 96, 32)) == first
    discovery._known.clear()  # another process
    assert found(counted, zeros(2, 96, 32)) == first and len(_calls) == runs
    for other in (zeros(2, 97, 32), zeros(2, 96, 32, dtype=torch.bfloat16)):
        found(counted, other)
        assert len(_calls) > runs
        runs = len(_calls)


@pytest.mark.parametrize("change", ["torch", "library", "format"])
def test_another_version_of_torch_or_of_the_ops_library_is_tried_again(monkeypatch, change):
    first, runs = found(counted, zeros(2, 96, 32)), len(_calls)
    discovery._known.clear()
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif change == "library":
        monkeypatch.setattr(rule_cache, "library", lambda target: "tried 2.0")
    else:
        monkeypatch.setattr(rule_cache, "_FORMAT", -1)
    assert found(counted, zeros(2, 96, 32)) == first and len(_calls) > runs


def test_the_library_is_told_by_its_distribution_and_the_code_that_defines_the_op():
    library = torch.library.Library("pytest", "DEF")
    library.define("of_a_distribution(Tensor x) -> Tensor")
    assert f"pytest {pytest.__version__}" in rule_cache.library(torch.ops.pytest.of_a_distribution.default)
    assert rule_cache.library(counted).startswith("code ")
    namespace: dict = {"Tensor": Tensor}
    versions = []
    for number in (1, 2):
        exec(f"def typed_{number}(x: Tensor) -> Tensor:\n    return x * {number}", namespace)
        namespace[f"typed_{number}"].__annotations__ = {"x": Tensor, "return": Tensor}
        versions.append(rule_cache.library(op(namespace[f"typed_{number}"])))
    assert len(set(versions)) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"rule": 3, "key": "x"}', "null", "damaged", "unreadable notation"]
)
def test_a_damaged_entry_is_ignored_with_a_warning_and_written_anew(own_cache, caplog, content):
    first = found(counted, zeros(2, 96, 32))
    (path,) = own_cache.glob("*")
    whole = path.read_text()
    damaged = {"damaged": whole[:50], "unreadable notation": json.dumps({**json.loads(whole), "rule": "a -> a -> a"})}
    path.write_text(damaged.get(content, content))
    discovery._known.clear()
    with caplog.at_level(logging.WARNING):
        assert found(counted, zeros(2, 96, 32)) == first
    assert "ignoring the" in caplog.text and path.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_a_search_and_no_more(own_cache, caplog):
    own_cache.parent.mkdir()
    own_cache.write_text("a file stands where the folder should be")
    assert found(counted, zeros(2, 96, 32)).rule is not None
    assert "cannot keep" in caplog.text


def test_off_keeps_nothing_and_without_the_variable_it_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DSP_AUTO_CACHE", "off")
    assert rule_cache.folder() is None and found(counted, zeros(2, 96, 32)).rule is not None
    monkeypatch.delenv("DSP_AUTO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rule_cache.folder() == tmp_path / "dsp_auto" / "rules"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rule_cache.folder() == tmp_path / ".cache" / "dsp_auto" / "rules"


def _writes(folder, number):
    os.environ["DSP_AUTO_CACHE"] = str(folder)
    for turn in range(200):
        rule_cache.write("key", {"op": "x", "rule": "a -> a", "checked": f"{number} {turn}" * 500})
        assert rule_cache.read("key")["rule"] == "a -> a"


def test_processes_that_write_at_once_never_show_half_an_entry(own_cache, caplog):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_writes, args=(own_cache.parent, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.suffix for path in own_cache.glob("*")] == [".json"]


# --- in a plan


class Mixed(nn.Module):
    """Softmax over two dims, with an op in between that nobody described, and one that cannot be."""

    def __init__(self, tried=scaled) -> None:
        super().__init__()
        self.inner, self.tried = nn.Linear(8, 8), tried

    def forward(self, x):
        x = self.tried(self.inner(x).softmax(1))
        return self.tried(x.softmax(2))


def planned(model):
    with torch.no_grad():
        return dsp_auto.plan(model.eval(), "2", (torch.randn(2, 6, 5, 8),))


def test_the_plan_says_which_rules_were_found_and_is_the_same_when_they_are_kept():
    first = planned(Mixed())
    entry = {"target": "tried._scaled.default", "rule": "a b c d -> a b c d", "origin": "found", "ops": 2}
    assert list(first.rules) == [entry] and not first.without_rule
    assert "rule found: tried._scaled.default  a b c d -> a b c d" in str(first)
    discovery._known.clear()
    again = planned(Mixed())
    assert again.digest == first.digest
    assert dsp_auto.Plan.from_json(first.to_json()).rules == first.rules


def test_the_plan_says_why_an_op_has_no_rule():
    plan = planned(Mixed(noise))
    assert {entry["why"] for entry in plan.without_rule} == {"it draws random numbers"} and not plan.rules
    assert "tried._noise.default: it draws random numbers" in str(plan)


def mixed():
    return Mixed(), (torch.randn(2, 6, 5, 8),), {}


def test_a_model_with_a_found_rule_runs_as_on_one_device(world):
    for outcome in world(2).run(_compare_mixed):
        assert outcome["output"] < OUTPUT_TOLERANCE
        assert [rule["origin"] for rule in outcome["plan"]["rules"]] == ["found"]
        assert outcome["plan"]["communication"]["by_primitive"]["switch"]["count"] == 1


def _compare_mixed(rank, ranks):
    os.environ["DSP_AUTO_CACHE"] = "off"
    with torch.no_grad():
        return compare(rank, ranks, mixed, {}, train=False)
