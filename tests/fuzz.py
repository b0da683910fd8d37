"""Random graphs out of all registered rules, planned under random meshes and run on all ranks in one process.

`make(seed)` draws a graph over inputs of several dims, a mesh, layouts and a capacity; `judge` plans it, runs it and compares
every rank's outputs, gradients and traffic with one device's; `shrink` makes a failing graph small.

Ops are the calls that prove the rules (tests/rules): whatever is registered there is drawn here. An operand of such a call
is a value of the graph brought to the operand's shape, or the operand's own values with one of the graph's added, which
keeps positive what has to be, or a parameter or input of its own. Everything is float64, and what would not be finite is
not drawn. Where the graph itself turns the noise of rounding into large differences (a tie that a sort or a maximum breaks
one way or the other), the comparison says nothing; `judge` finds out by adding such noise on one device.
"""

from __future__ import annotations

import importlib
import math
import operator
import pkgutil
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import hypothesis
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError, InfeasibleError, LayoutError, MeshError, NoShardableFactorError
from dsp_auto.mesh import Mesh, as_mesh
from dsp_auto.passes.capture import GraphInput, Program
from dsp_auto.passes.presets import PRESETS
from dsp_auto.passes.propagate import propagate
from dsp_auto.passes.prove import Example
from dsp_auto.passes.rules import registered
from dsp_auto.rehearse import Rehearsal, rehearse
from dsp_auto.verify import worst
from tests import rules as proofs
from tests.rules import calls

for _file in pkgutil.iter_modules(proofs.__path__):
    if _file.name.startswith("test_") and _file.name != "test_every_rule":
        importlib.import_module(f"{proofs.__name__}.{_file.name}")

aten = torch.ops.aten
TOLERANCE = 1e-9
TRIES = 40  # graphs begun until one is finished
NOISE = 1e-13  # relative; a few hundred roundings
GENERATED = 6  # calls of each rule that hypothesis adds to those that are written out
MESHES = ("2", "3", "4", "5", "2x2", "2x3", "3x2", "1x2", "1")


def _quantile_reads_values() -> bool:
    """Whether torch looks at values before it says a quantile's shape, as 2.11 does: then no model with one exports."""
    with FakeTensorMode():
        try:
            aten.quantile.scalar(torch.empty(2), 0.5)
        except DataDependentOutputException:
            return True
    return False


# Rules of which no call stands in a graph, and why.
NOT_DRAWN = {
    name: "the memory is not filled, so no two runs agree" for name in registered() if re.search("::(new_)?empty", name)
} | {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "wrong where the last dim is not contiguous, as attention sees to",
    "aten::linalg_eigvals": "rounding decides the order of equal eigenvalues",
    "aten::linalg_slogdet": "autograd gives no gradient through its sign, which on ranks is one of zeros",
    "aten::slogdet": "the same",
}
if _quantile_reads_values():
    NOT_DRAWN |= dict.fromkeys(("aten::quantile", "aten::nanquantile"), "this torch cannot export a model with one")


def drawn_rules() -> list[str]:
    """Names of the rules whose calls are drawn."""
    return sorted(registered().keys() - NOT_DRAWN.keys())


# Calls


@cache
def calls_of(name: str) -> tuple[calls.Call, ...]:
    """Calls of one rule, in float64."""
    found = list(calls.fixed_calls(name))

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=GENERATED,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls.generated_calls(name))
    def collect(call: calls.Call) -> None:
        found.append(call)

    collect()
    return tuple((target, *pytree.tree_map(_in_double, (args, kwargs))) for target, args, kwargs in found)


_DOUBLE = {dtype: torch.float64 for dtype in (torch.float32, torch.float16, torch.bfloat16)} | {
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


def _in_double(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().to(_DOUBLE.get(leaf.dtype, leaf.dtype)).contiguous()
    return _DOUBLE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


@contextmanager
def _double() -> Iterator[None]:
    """float64 is the default dtype, and one thread computes."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


# Graphs


@dataclass(frozen=True)
class Case:
    """A graph with the values of its inputs, and how it is planned. `rules`: whose calls stand in it."""

    seed: int
    program: Program
    values: tuple[Tensor, ...]
    mesh: str
    options: dict[str, Any] = field(default_factory=dict)
    tightness: float | None = None  # capacity: this many times the least that any plan needs
    rules: tuple[str, ...] = ()

    def __str__(self) -> str:
        grads = {node.name for node, value in zip(self.program.graph.nodes, self.values) if value.requires_grad}
        entries = {node.name: entry for node, entry in zip(self.program.graph.nodes, self.program.inputs)}
        lines = [
            f"seed {self.seed}, mesh {self.mesh}, {self.options}, {len(self.rules)} rules: {', '.join(self.rules)}"
        ]
        if self.tightness is not None:
            lines[0] += f", capacity {self.tightness} times the least"
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                how = f"{entries[node.name].kind}{' with gradient' if node.name in grads else ''}"
                lines.append(f"  {node.name}: {_shown(node.meta['val'])} = {how}")
            elif node.op == "output":
                lines.append(f"  return {', '.join(map(str, node.args[0]))}")
            else:
                given = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
                target = node.target.__name__ if node.target is operator.getitem else str(node.target)
                lines.append(f"  {node.name}: {_shown(node.meta['val'])} = {target}({given})")
        return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str([_shown(item) for item in value]) if isinstance(value, (tuple, list)) else repr(value)


class _Dead(Exception):
    """A call that cannot stand where it was drawn."""


class _Writer:
    """Writes a graph and computes it as it goes."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.graph = fx.Graph()
        self.generator = torch.Generator().manual_seed(draw.getrandbits(32))
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[tuple[GraphInput, Tensor]] = []
        self.floats: list[fx.Node] = []  # what later ops take

    def source(self, kind: str, value: Tensor, requires_grad: bool = False) -> fx.Node:
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with nullcontext() if first is None else self.graph.inserting_before(first):
            node = self.graph.placeholder(f"{kind}_{len(self.inputs)}")
        value = value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())
        self.inputs.append((GraphInput(kind, node.name), value))
        self.values[node] = value
        node.meta["val"] = value
        return node

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def parameter(self, *shape: int) -> fx.Node:
        return self.source("parameter", self.random(*shape), requires_grad=self.draw.random() < 0.85)

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One node; _Dead where the op refuses, or its results or their gradients are not finite."""
        given, named = fx.map_arg((args, kwargs), self.values.__getitem__)
        try:
            with torch.random.fork_rng(devices=[]):
                example = self.example(target, given, named)
                result = target(*given, **named)
        except Exception as error:  # any op may refuse in its own way
            raise _Dead(f"{target}: {error}") from error
        if not all(map(_is_usable, (*example.results, *example.gradients))):
            raise _Dead(f"{target}: values that are not finite or not double")
        node = self.graph.call_function(target, args, kwargs)
        self.values[node] = pytree.tree_map_only(Tensor, Tensor.detach, result)
        return node

    def example(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Example:
        try:
            return Example.of(target, args, kwargs)
        except RuntimeError:  # some operand may have no gradient; whether it has one is seen when the graph is done
            with torch.no_grad():
                return Example.of(target, args, kwargs)

    def results(self, node: fx.Node) -> list[fx.Node]:
        """The tensors of a node, one node each."""
        value = self.values[node]
        if isinstance(value, Tensor):
            return [node]
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, Tensor) for item in value):
            raise _Dead(f"{node.target} returns no tensors")
        found = []
        for number, item in enumerate(value):
            found.append(self.graph.call_function(operator.getitem, (node, number)))
            self.values[found[-1]] = item
        return found

    def shape(self, node: fx.Node) -> list[int]:
        return list(self.values[node].shape)

    # Values brought to a shape

    def fitted(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A value of `shape` made from `node`: dims of equal size stay what they are, others are cut, mixed, reduced or
        repeated."""
        if self.shape(node) == list(shape):
            return node
        if 0 in shape or 0 in self.shape(node):
            raise _Dead("no elements")
        if math.prod(self.shape(node)) == math.prod(shape) and self.draw.random() < 0.7:
            return self.op(aten.reshape.default, node, list(shape))
        own = self.shape(node)
        free = set(range(len(own)))
        found: dict[int, int] = {}  # target dim -> dim of the value
        for dim, size in enumerate(shape):
            alike = [n for n in sorted(free) if own[n] == size]
            if alike:
                found[dim] = self.draw.choice(alike)
                free.discard(found[dim])
        for dim, size in enumerate(shape):
            if dim not in found and free and self.draw.random() < 0.7:
                found[dim] = self.draw.choice(sorted(free))
                free.discard(found[dim])
                node = self.resized(node, found[dim], size)
        for dim in sorted(free, reverse=True):
            node = self.reduced(node, dim)
        kept = sorted(found.values())
        order = [kept.index(found[dim]) for dim in sorted(found)]
        if order != sorted(order):
            node = self.op(aten.permute.default, node, order)
        for dim in range(len(shape)):
            if dim not in found:
                node = self.op(aten.unsqueeze.default, node, dim)
        return node if self.shape(node) == list(shape) else self.op(aten.expand.default, node, list(shape))

    def resized(self, node: fx.Node, dim: int, size: int) -> fx.Node:
        """`node` with `size` elements along `dim`."""
        own = self.shape(node)[dim]
        way = "cut" if own >= size else "repeat"
        how = self.draw.choices([way, "mix", "look up"], (5, 1, 4))[0]  # what a parameter mixes is no sequence
        if how == "cut":
            start = self.draw.randint(0, own - size)
            return self.op(aten.slice.Tensor, node, dim, start, start + size)
        if how == "repeat":
            whole = self.op(aten.cat.default, [node] * -(-size // own), dim)
            return self.op(aten.slice.Tensor, whole, dim, 0, size)
        if how == "look up":
            index = torch.randint(0, own, (size,), generator=self.generator)
            return self.op(aten.index_select.default, node, dim, self.source("buffer", index))
        mixed = self.op(aten.linear.default, self.op(aten.transpose.int, node, dim, -1), self.parameter(size, own))
        return self.op(aten.transpose.int, mixed, dim, -1)

    def reduced(self, node: fx.Node, dim: int) -> fx.Node:
        how = self.draw.choice(["mean", "sum", "select", "logsumexp"])
        if how == "select":
            return self.op(aten.select.int, node, dim, self.draw.randrange(self.shape(node)[dim]))
        target = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "logsumexp": aten.logsumexp.default}[how]
        return self.op(target, node, [dim])

    # Calls

    def call(self, name: str) -> list[fx.Node]:
        """A call of the rule `name` somewhere in the graph: its results."""
        target, args, kwargs = self.draw.choice(calls_of(name))
        forms = ["value", "around", "own"]
        chances = self.draw.choice([(4, 3, 2), (1, 0, 0), (0, 1, 0)])
        form = [self.draw.choices(forms, chances)[0] for leaf in pytree.tree_leaves((args, kwargs))]
        for forced in (None, "around", "own"):
            try:
                return self.results(self._called(target, args, kwargs, iter([forced] * len(form) if forced else form)))
            except _Dead:
                if forced == "own":
                    raise
        raise AssertionError("not reached")

    def _called(self, target: Any, args: tuple, kwargs: dict[str, Any], forms: Iterator[str]) -> fx.Node:
        args, kwargs = pytree.tree_map(lambda leaf: self.operand(leaf, next(forms)), (args, kwargs))
        return self.op(target, *args, **kwargs)

    def operand(self, leaf: Any, form: str) -> Any:
        """The operand of a call that has `leaf` there: a value of the graph, one around `leaf`'s own, or `leaf`."""
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point() or form == "own" or not leaf.numel():
            if leaf.dtype == torch.bool and form == "value" and leaf.numel():
                return self.op(aten.gt.Scalar, self.fitted(self.draw.choice(self.floats), leaf.shape), 0.1234)
            kind = self.draw.choice(
                ["input", "buffer", "parameter"] if leaf.is_floating_point() else ["input", "buffer"]
            )
            return self.source(kind, leaf, requires_grad=self.draw.random() < 0.6 and kind != "buffer")
        alike = [node for node in self.floats if self.shape(node) == list(leaf.shape)]
        node = self.draw.choice(alike if alike and self.draw.random() < 0.5 else self.floats)
        node = self.fitted(node, leaf.shape)
        if form == "value":
            return node
        return self.op(aten.add.Tensor, self.held(leaf), self.op(aten.sigmoid.default, node), alpha=0.5)

    def held(self, value: Tensor) -> fx.Node:
        """`value` from outside. Seldom a parameter: what parameters have is no sequence."""
        kind = self.draw.choices(["input", "buffer", "parameter"], (4, 4, 1 if value.is_floating_point() else 0))[0]
        return self.source(kind, value, requires_grad=kind != "buffer" and self.draw.random() < 0.6)


def assemble(
    graph: fx.Graph, inputs: Sequence[tuple[GraphInput, Tensor]], keep: Callable[[], bool] = lambda: False
) -> tuple[Program, tuple[Tensor, ...]]:
    """The program of a graph whose placeholders are `inputs`, and its inputs' values: without ops that nobody uses, and
    without the inputs that nobody uses but those that `keep` keeps."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    kept = [bool(node.users) or keep() for node in placeholders]
    for node, stays in zip(placeholders, kept):
        if not stays:
            graph.erase_node(node)
    inputs = [entry for entry, stays in zip(inputs, kept, strict=True) if stays]
    values = tuple(value for _, value in inputs)
    for node, value in zip(graph.nodes, values):
        node.meta["val"] = value
    module = fx.GraphModule({}, graph)
    grads = [value.requires_grad for value in values]
    try:
        training, saved, _ = propagate(module, grads)
    except (CaptureError, RuntimeError) as error:  # an op that fake tensors do not know as it is
        raise _Dead(str(error)) from error
    spec = pytree.tree_structure(((), {}))
    entries = tuple(entry for entry, _ in inputs)
    program = Program(
        module=module,
        inputs=entries,
        in_spec=spec,
        out_spec=spec,
        mutated=(),
        training=training,
        saved=saved,
        seconds={"export": 0.0, "capture": 0.0},
    )
    return program, values


def _is_usable(tensor: Tensor | None) -> bool:
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return tensor.dtype in (torch.float64, torch.complex128) and bool(torch.isfinite(tensor).all())


def make(seed: int, must: str | None = None, most: int = 5) -> Case:
    """The graph of a seed, with at most `most` calls. must: a rule of which it holds a call; LookupError where none can
    stand in a graph."""
    draw = random.Random(f"{seed} {must}")
    with _double():
        for _ in range(TRIES):
            try:
                return _make(draw, seed, must, most)
            except _Dead as error:
                reason = error
    raise LookupError(f"seed {seed}: no graph{f' with a call of {must}' if must else ''} could be drawn: {reason}")


def _make(draw: random.Random, seed: int, must: str | None, most: int) -> Case:
    writer = _Writer(draw)
    batch, channels = draw.choice([1, 2]), draw.choice([2, 3, 4])
    sizes = draw.sample([4, 5, 6, 7], draw.choice([2, 2, 3]))
    shape = [batch, *sizes, channels][draw.choice([0, 0, 1]) :]
    sequence = [dim for dim, size in enumerate(shape) if size in sizes]
    value = writer.source("input", writer.random(*shape), requires_grad=draw.random() < 0.5)
    for dim in draw.sample(sequence, draw.randint(1, len(sequence))):  # what the op needs whole is a sequence
        mixed = writer.op(aten.softmax.int, value, dim)
        value = writer.op(
            aten.add.Tensor, writer.op(aten.linear.default, value, writer.parameter(channels, channels)), mixed
        )
        writer.floats.append(value)
    if draw.random() < 0.3:
        writer.floats.append(writer.source("input", writer.random(*draw.sample(sizes, 2)), draw.random() < 0.5))
    names, others, rules = drawn_rules(), [], []
    for number in range(draw.randint(1, most)):
        name = must if must is not None and number == 0 else draw.choice(names)
        try:
            found = writer.call(name)
        except _Dead:
            if name == must:
                raise
            continue
        rules.append(name)
        floats = [node for node in found if writer.values[node].is_floating_point() and writer.values[node].numel()]
        others += [node for node in found if node not in floats]
        writer.floats += floats
        if floats and draw.random() < 0.6:  # the stream goes on with it
            branch = writer.fitted(draw.choice(floats), shape)
            if draw.random() < 0.1:
                branch = writer.op(aten.detach.default, branch)
            join = draw.choice([aten.add.Tensor, aten.mul.Tensor])
            value = writer.op(join, value, branch)
            writer.floats.append(value)
        if draw.random() < 0.3:
            value = writer.op(aten.softmax.int, value, draw.choice(sequence))
            writer.floats.append(value)
    if not rules:
        raise _Dead("no call")
    if draw.random() < 0.3:
        writer.parameter(draw.choice(sizes))  # used by nobody
    unused = [node for node in (*writer.floats, *others) if not node.users]
    outputs = [node for node in unused if draw.random() < 0.9] or unused or [value]
    if draw.random() < 0.2:
        outputs.append(draw.choice(writer.floats))
    writer.graph.output(tuple(outputs))
    program, values = assemble(writer.graph, writer.inputs, keep=lambda: draw.random() < 0.1)
    alone = _alone(program, values, seed, program.module.forward)
    if not all(map(_is_usable, (*alone[0].values(), *alone[1].values()))):
        raise _Dead("values that are not finite")
    mesh = draw.choices(MESHES, [1 if "x" in mesh or mesh == "1" else 3 for mesh in MESHES])[0]
    return Case(seed, program, values, mesh, *_drawn_options(draw, program, values, as_mesh(mesh)), tuple(rules))


def _drawn_options(
    draw: random.Random, program: Program, values: Sequence[Tensor], mesh: Mesh
) -> tuple[dict[str, Any], float | None]:
    options: dict[str, Any] = {}
    if draw.random() < 0.15:
        options["objective"] = "time"
    if draw.random() < 0.7:
        options["strategy"] = draw.choices(list(PRESETS), [4 if name == "auto" else 1 for name in PRESETS])[0]
    if draw.random() < 0.35:
        named = [(entry.name, value) for entry, value in zip(program.inputs, values) if entry.kind == "input"]
        specs = {name: _drawn_layout(draw, value.shape, mesh) for name, value in named if draw.random() < 0.6}
        options["in_layouts"] = {name: spec for name, spec in specs.items() if spec}
    if draw.random() < 0.35:
        shapes = [node.meta["val"].shape for node in program.graph.output_node().args[0]]
        options["out_layouts"] = [_drawn_layout(draw, shape, mesh) if draw.random() < 0.7 else None for shape in shapes]
    return options, draw.choice([1.0, 1.3, 3.0]) if draw.random() < 0.2 else None


def _drawn_layout(draw: random.Random, shape: Sequence[int], mesh: Mesh) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, ranks in zip(mesh.names, mesh.sizes):
        dims = [dim for dim, size in enumerate(shape) if size >= ranks > 1 and dim not in found.values()]
        if dims and draw.random() < 0.8:
            found[name] = draw.choice(dims)
    return found


# Running them


@dataclass(frozen=True)
class Verdict:
    """kind: "same"; "sent less" (the same, with less traffic than planned); "no plan" (nothing to shard, or too many ranks);
    "unstable" (rounding alone changes the result); or what is wrong: "output", "gradient", "sent more", or the name of an
    exception."""

    kind: str
    found: str = ""

    @property
    def failed(self) -> bool:
        return self.kind not in ("same", "sent less", "no plan", "unstable")


def judge(case: Case) -> Verdict:
    with _double():
        torch.manual_seed(case.seed)
        try:
            found = _rehearsed(case)
        except (NoShardableFactorError, MeshError, LayoutError) as error:
            return Verdict("no plan", str(error))
        except Exception as error:  # whatever it is, it is a finding
            verdict = Verdict(type(error).__name__, str(error))
        else:
            verdict = _verdict(found)
        if verdict.failed and verdict.kind != "sent more" and _is_unstable(case):
            return Verdict("unstable", verdict.found)
        return verdict


def _rehearsed(case: Case) -> Rehearsal:
    with torch.set_grad_enabled(case.program.training):
        options = {"rng": "serial", **case.options}
        if case.tightness is None:
            return rehearse(case.program, case.mesh, case.values, **options)
        try:
            return rehearse(case.program, case.mesh, case.values, **options, capacity=1)
        except InfeasibleError as error:
            capacity = math.ceil(error.least_bytes * case.tightness)
        return rehearse(case.program, case.mesh, case.values, **options, capacity=capacity)


def _verdict(found: Rehearsal) -> Verdict:
    for kind, (deviation, name) in (("output", found.output), ("gradient", found.gradient)):
        if not deviation <= TOLERANCE:
            return Verdict(kind, f"{name} deviates by {deviation:.3g}")
    wrong = [entry for entry in found.traffic if not entry.agrees]
    more = [entry for entry in wrong if entry.measured > entry.predicted]
    if wrong:
        return Verdict("sent more" if more else "sent less", str((more or wrong)[0]))
    return Verdict("same")


class _Noisy(fx.Interpreter):
    """Runs a graph with noise of the size of roundings added to all that its ops make."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, node: fx.Node) -> Any:
        return pytree.tree_map_only(Tensor, self._noisy, super().run_node(node))

    def _noisy(self, tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return tensor * (1 + NOISE * torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64))


def _is_unstable(case: Case) -> bool:
    """Whether noise alone moves outputs or gradients on one device about as far as the tolerance."""
    exact, *noisy = [
        _alone(case.program, case.values, case.seed, forward)
        for forward in (case.program.module.forward, *(_Noisy(case.program.module, seed).run for seed in range(3)))
    ]
    for found in noisy:
        for own, reference in zip(found, exact):
            for name, value in reference.items():
                if value is not None and not (value.is_floating_point() or value.is_complex()):
                    if not torch.equal(value, own[name]):
                        return True
            inexact = [name for name, value in reference.items() if value is None or value.dtype in _DOUBLE.values()]
            if not worst(*({name: of[name] for name in inexact} for of in (own, reference)))[0] <= TOLERANCE / 10:
                return True
    return False


def _alone(
    program: Program, values: Sequence[Tensor], seed: int, forward: Callable[..., Sequence[Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients on one device; _Dead where an op has no derivative."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(0)
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in values]
    graded = [leaf for leaf in leaves if leaf.requires_grad]
    try:
        with torch.set_grad_enabled(program.training):
            results = forward(*leaves)
        used = [result for result in results if result.requires_grad]
        weights = [torch.randn(result.shape, generator=generator, dtype=result.dtype) for result in used]
        grads = torch.autograd.grad(used, graded, weights, allow_unused=True) if used and graded else ()
    except RuntimeError as error:
        raise _Dead(str(error)) from error
    outputs = {f"output {n}": result.detach() for n, result in enumerate(results)}
    return outputs, {f"input {n}": grad for n, grad in enumerate(grads)}


# Small ones


def shrink(case: Case, seconds: float = 60.0) -> Case:
    """A smaller case that fails in the same way: outputs, options and ops are left out one after the other, and what an op
    makes becomes an input, as long as the failure stays."""
    kind, until = judge(case).kind, time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < until:
        progress = False
        for smaller in _smaller(case):
            if time.monotonic() > until:
                break
            try:
                fails = judge(smaller).kind == kind
            except Exception:  # a graph that cannot even be run is no smaller case
                continue
            if fails:
                case, progress = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with less in them, those with the least first."""
    for mesh in MESHES[: MESHES.index(case.mesh)]:
        yield replace(case, mesh=mesh)
    if case.tightness is not None:
        yield replace(case, tightness=None)
    for name in case.options:
        yield replace(case, options={key: value for key, value in case.options.items() if key != name})
    bare = replace(case, options={key: value for key, value in case.options.items() if not key.endswith("layouts")})
    nodes = [node for node in case.program.graph.nodes if node.op == "call_function"]
    outputs = list(case.program.graph.output_node().args[0])
    for node in nodes:
        if isinstance(node.meta["val"], Tensor) and outputs != [node]:
            yield _rewritten(bare, [node], set())
    for output in outputs if len(outputs) > 1 else ():
        yield _rewritten(bare, [other for other in outputs if other is not output], set())
    for count in range(len(nodes) - 1, 0, -1):  # only the last ops
        before = set(nodes[:count])
        crossing = {node for node in before if node in outputs or not before.issuperset(node.users)}
        if all(isinstance(node.meta["val"], Tensor) for node in crossing):
            yield _rewritten(bare, outputs, crossing)
    for node in reversed(nodes):
        if isinstance(node.meta["val"], Tensor):
            yield _rewritten(bare, outputs, {node})
            for operand in node.all_input_nodes:
                if _shown(operand.meta["val"]) == _shown(node.meta["val"]):
                    yield _rewritten(bare, outputs, set(), {node: operand})


def _rewritten(
    case: Case, outputs: Sequence[fx.Node], cut: set[fx.Node], bypassed: Mapping[fx.Node, fx.Node] | None = None
) -> Case:
    """The case that returns `outputs`, with what the ops in `cut` make as inputs, and operands for what others make."""
    run = fx.Interpreter(case.program.module, garbage_collect_values=False)
    with torch.set_grad_enabled(case.program.training), _double():
        torch.manual_seed(case.seed)
        run.run(*case.values)
    graph, copies = fx.Graph(), {}
    inputs = list(zip(case.program.inputs, case.values))
    nodes = list(case.program.graph.nodes)
    for node in nodes[: len(inputs)]:
        copies[node] = graph.node_copy(node)
    for node in nodes:
        if node in cut:
            copies[node] = graph.placeholder(f"was_{node.name}")
            value = run.env[node].detach().requires_grad_(run.env[node].requires_grad)
            inputs.append((GraphInput("input", copies[node].name), value))
    for node in nodes:
        if bypassed and node in bypassed:
            copies[node] = copies[bypassed[node]]
        if node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    with _double():
        program, values = assemble(graph, inputs)
    return replace(case, program=program, values=values)
