"""A program that is cut computes the same, and enters the modules whose hooks must run."""

from __future__ import annotations

import operator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from dsp_auto.errors import DspError
from dsp_auto.passes.capture import capture
from dsp_auto.passes.checkpointing import region
from dsp_auto.passes.hooks import traced
from dsp_auto.passes.segments import Home, cut, enter


class Block(nn.Module):
    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.recomputed = recomputed

    def _mlp(self, x):
        return self.down(self.up(self.norm(x)).sin())

    def forward(self, x, scale):
        mixed = checkpoint.checkpoint(self._mlp, x, use_reentrant=False) if self.recomputed else self._mlp(x)
        return x + mixed * scale, mixed.sum()


class Model(nn.Module):
    """Two blocks, the second used twice, the first perhaps in a checkpoint with one use of the second."""

    def __init__(self, recomputed: str = "nothing") -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(recomputed == "in blocks") for _ in range(2))
        self.recomputed = recomputed

    def _two(self, x):
        x, first = self.blocks[0](x, 0.5)
        x, second = self.blocks[1](x, 2.0)
        return x, first * second

    def forward(self, x):
        x = self.embed(x)
        if self.recomputed == "blocks":
            x, product = checkpoint.checkpoint(self._two, x, use_reentrant=False)
        else:
            x, product = self._two(x)
        x, last = self.blocks[1](x, 1.0)
        return self.head(x), product + last


def _cut(model, x, entered, homes=(), change=None):
    """The captured model, cut without any rewriting, what it takes, and the names of that."""
    with traced(model, (x,), {}) as hooks:
        program = capture(model, (x,))
    for node in program.graph.nodes:
        if region(node) is not None:
            node.meta["region"] = region(node)
    if change is not None:
        change(program.graph)
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    sources, found = [], {}
    for node, entry in zip(placeholders, program.inputs, strict=True):
        is_parameter = entry.kind == "parameter"
        sources.append(SimpleNamespace(value=model.get_parameter(entry.name)) if is_parameter else None)
        for path in homes:
            if entry.name.startswith(path + "."):
                found[node] = Home(entry.name, frozenset([path]))
    modules = {path: model.get_submodule(path) for path in entered}
    module, taken = cut(program.graph, program.module, sources, modules, found, hooks.running)
    return module, [x if sources[n] is None else sources[n].value for n in taken], [program.inputs[n].name for n in taken]


def _count(model, paths):
    """Hooks that count how often modules are called."""
    found = dict.fromkeys(paths, 0)

    def look(module, args, out, path):
        found[path] += 1

    handles = [model.get_submodule(path).register_forward_hook(partial(look, path=path)) for path in paths]
    return found, handles


def _assert_equal(model, x, results):
    def gradients(results):
        weights = [torch.linspace(0.5, 1.5, r.numel()).view_as(r) for r in results]
        return torch.autograd.grad(sum((r * w).sum() for r, w in zip(results, weights)), [*model.parameters()])

    expected = model(x)
    torch.testing.assert_close(list(results), list(expected))
    torch.testing.assert_close(gradients(results), gradients(expected))


PATHS = [["blocks.0", "blocks.1"], ["blocks.1", "blocks.1.up"], [""], ["", "blocks.0", "blocks.0.down", "head"]]


@pytest.mark.parametrize("recomputed", ["nothing", "in blocks", "blocks"])
@pytest.mark.parametrize("entered", PATHS, ids=str)
def test_a_program_that_is_cut_computes_the_same_and_enters_each_call_once(recomputed, entered):
    torch.manual_seed(0)
    model, x = Model(recomputed), torch.randn(3, 4)
    entries, handles = _count(model, entered)
    module, values, _ = _cut(model, x, entered, homes=[path for path in entered if path])
    entries.update(dict.fromkeys(entered, 0))
    results = module(*values)
    assert entries == {path: 2 if path.startswith("blocks.1") else 1 for path in entered}
    for handle in handles:
        handle.remove()
    _assert_equal(model, x, results)


def test_parameters_are_read_inside_of_their_home_only():
    model, x = Model(), torch.randn(3, 4)
    module, values, names = _cut(model, x, ["blocks.0", "blocks.1"], homes=["blocks.0", "blocks.1"])
    assert not any(name.startswith("blocks") for name in names)
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
    torch.testing.assert_close(list(module(*values)), list(model(x)))


def test_a_parameter_that_is_used_outside_of_its_home_is_told_with_its_name():
    class Ties(Model):
        def forward(self, x):
            x, total = super().forward(x)
            return x @ self.blocks[0].up.weight[:4, :4], total

    with pytest.raises(DspError, match=r"blocks\.0\.up\.weight outside of blocks\.0"):
        _cut(Ties(), torch.randn(3, 4), ["blocks.0"], homes=["blocks.0"])


def test_ops_that_cannot_stand_side_by_side_enter_their_module_once_more():
    model, x = Model(), torch.randn(3, 4)
    entries, handles = _count(model, ["blocks.0"])

    def strange(graph):
        (node,) = [node for node in graph.nodes if node.name == "sin"]
        node.meta["nn_module_stack"] = {}

    module, values, _ = _cut(model, x, ["blocks.0"], homes=["blocks.0"], change=strange)
    entries["blocks.0"] = 0
    results = module(*values)
    assert entries == {"blocks.0": 2}
    handles[0].remove()
    _assert_equal(model, x, results)


def test_ops_between_those_of_a_module_that_do_not_need_it_come_before():
    class Between(Model):
        def forward(self, x):
            x = self.embed(x)
            left = self.blocks[0].norm(x)
            other = x.cos()
            return self.blocks[0].up(left * other), other.sum()

    model, x = Between(), torch.randn(3, 4)

    def stand_in_one_call(graph):
        for node in graph.nodes:
            if node.op == "call_function" and node.name in ("layer_norm", "mul", "linear_1"):
                node.meta["nn_module_stack"] = {"one": ("blocks.0", "Block")}

    module, values, _ = _cut(model, x, ["blocks.0"], change=stand_in_one_call)
    assert [node.target for node in module.graph.nodes].count(enter) == 1
    torch.testing.assert_close(list(module(*values)), list(model(x)))


def test_gradients_are_reduced_in_buckets_of_one_home():
    """`replicate` of parameters of two modules becomes one in each, and one for those that are no module's own."""
    model, x = Model(), torch.randn(3, 4)
    replicate = torch.ops.dsp.replicate.default

    def replicated(graph):
        parameters = [node for node in graph.nodes if node.op == "placeholder" and node.name != "x"]
        with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
            call = graph.call_function(replicate, (parameters, 1, 0, "", False))
            call.meta["val"] = [node.meta["val"] for node in parameters]
            for number, node in enumerate(parameters):
                own = graph.call_function(operator.getitem, (call, number))
                own.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(own, delete_user_cb=lambda user: user is not call)

    module, values, _ = _cut(model, x, ["blocks.0", "blocks.1"], ["blocks.0", "blocks.1"], replicated)

    def members(graph):
        return [len(node.args[0]) for node in graph.nodes if node.target is replicate]

    entrances = [node.args[0].target for node in module.graph.nodes if node.target is enter]
    assert members(module.graph) == [4]
    assert [members(getattr(module, name).body.__self__.graph) for name in entrances] == [[6], [6], [6]]
    _assert_equal(model, x, module(*values))
