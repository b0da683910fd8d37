"""Factorize: which dims of which tensors are the same thing, down to the pieces that no reshape divides.

Every op's rule says which axes its operands and results share. Axes that meet are one *factor* (union-find over the
whole graph); where a dim of 24 meets dims of 4 and 6, the factor splits, here and everywhere else it stands. What does
not nest (6·4 against 8·3) stays apart: that op then needs those dims whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx
import torch
from torch import fx

from dsp_auto.errors import LayoutError

from .capture import Program
from .notation import OpCall, OpRule, Shape
from .propagate import module_path, node_values
from .rules import find_rule

ValueId = tuple[str, int]  # node name, index among the node's results
Cut = tuple[str, int]  # axis of an op's rule, which of its factors


@dataclass(frozen=True)
class Value:
    """One tensor of the graph. `dims` are the factors of each of its dims, major first: `(B T) S C`.

    requires_grad: a gradient arrives at it in backward (not so upstream of a `detach`, whatever autograd records there).
    """

    id: ValueId
    dims: tuple[tuple[int, ...], ...]
    shape: Shape
    dtype: torch.dtype
    requires_grad: bool

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """Factors by place (see `layout`)."""
        return tuple(factor for dim in self.dims for factor in dim)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Op:
    """One op of the graph: its rule (None: it runs replicated), operands and results.

    `axes` are the factors of each axis of the rule, `opaque` the axes whose operands could not be brought together.
    """

    node: fx.Node
    operands: tuple[ValueId, ...]
    results: tuple[ValueId, ...]
    rule: OpRule | None
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    opaque: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def path(self) -> str:
        return module_path(self.node)

    @property
    def is_view(self) -> bool:
        return self.rule is not None and self.rule.is_view and not self.opaque

    @cached_property
    def cuts(self) -> tuple[tuple[Cut, ...], ...]:
        """All that one mesh dim may cut of this op: the axes it cuts, and which of their factors."""
        if self.rule is None:
            return ()
        found: list[tuple[Cut, ...]] = []
        for group in self.rule.cuts():
            if not self.opaque.isdisjoint(group):
                continue
            if group[0] in self.rule.in_ranges:  # the major factor's parts are ranges of the axis
                found.append(tuple((axis, 0) for axis in group))
            else:
                found += [((group[0], index),) for index in range(len(self.axes[group[0]]))]
        return tuple(found)

    def factors(self, cut: tuple[Cut, ...]) -> tuple[int, ...]:
        return tuple(self.axes[axis][index] for axis, index in cut)

    def places(self, dims: tuple[tuple[str, ...], ...], value: Value) -> dict[tuple[str, int], int]:
        """Place of each (axis, which of its factors) in an operand or result that the rule writes as `dims`. In a dim that
        could not be brought together with its axes the value has other factors."""
        found: dict[tuple[str, int], int] = {}
        place = 0
        for axes, own in zip(dims, value.dims, strict=True):
            keys = [(axis, index) for axis in axes for index in range(len(self.axes[axis]))]
            if tuple(self.axes[axis][index] for axis, index in keys) == own:
                found |= {key: place + n for n, key in enumerate(keys)}
            place += len(own)
        return found


@dataclass(frozen=True)
class Factors:
    """What `factorize` found. Factors are numbers; sizes, names and kinds are looked up here."""

    sizes: Mapping[int, int]
    names: Mapping[int, str]
    kinds: Mapping[int, str]  # "feature", "sequence" or "batch"
    values: Mapping[ValueId, Value]
    ops: tuple[Op, ...]
    rng: str = "parallel"  # or "serial": random numbers are those that one device would draw

    def show(self, value: ValueId) -> str:
        """`(B T) S C` with the factors' names."""
        dims = [[self.names[factor] for factor in dim] for dim in self.values[value].dims]
        return " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" if d else "1" for d in dims)

    def factor_names(self, value: ValueId) -> tuple[str, ...]:
        return tuple(self.names[factor] for factor in self.values[value].factors)

    def of_kind(self, kind: str) -> list[int]:
        return [factor for factor, its_kind in self.kinds.items() if its_kind == kind]

    def __str__(self) -> str:
        return "\n".join(f"{name}.{index}: {self.show((name, index))}" for name, index in self.values)


class _Pieces:
    """Union-find over pieces of dims, where a piece can also split into a major and a minor one."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self.parent: list[int] = []
        self.parts: list[tuple[int, int] | None] = []

    def new(self, size: int) -> int:
        self.size.append(size)
        self.parent.append(len(self.parent))
        self.parts.append(None)
        return len(self.parent) - 1

    def find(self, piece: int) -> int:
        while self.parent[piece] != piece:
            self.parent[piece] = self.parent[self.parent[piece]]
            piece = self.parent[piece]
        return piece

    def leaves(self, pieces: Sequence[int]) -> list[int]:
        """The indivisible pieces that `pieces` consist of by now."""
        found: list[int] = []
        todo = list(reversed(pieces))
        while todo:
            piece = self.find(todo.pop())
            parts = self.parts[piece]
            if parts is None:
                found.append(piece)
            else:
                todo += [parts[1], parts[0]]
        return found

    def split(self, piece: int, major: int) -> tuple[int, int]:
        parts = (self.new(major), self.new(self.size[piece] // major))
        self.parts[piece] = parts
        return parts

    def unify(self, a: Sequence[int], b: Sequence[int]) -> bool:
        """Make the two sequences the same factors; False, and nothing changed, where their sizes do not nest."""
        if a == b:
            return True
        left, right = self.leaves(a), self.leaves(b)
        if left == right:
            return True
        if not _nest([self.size[p] for p in left], [self.size[p] for p in right]):
            return False
        while left:
            x, y = self.leaves(left[:1]), self.leaves(right[:1])
            left[:1], right[:1] = x, y
            x, y = left[0], right[0]
            if x == y or self.size[x] == self.size[y]:
                self.parent[x] = y
                left.pop(0)
                right.pop(0)
            elif self.size[x] > self.size[y]:
                left[:1] = self.split(x, self.size[y])
            else:
                right[:1] = self.split(y, self.size[x])
        return True


def _nest(a: list[int], b: list[int]) -> bool:
    """Whether two factorizations of one size have a common refinement."""
    if math.prod(a) != math.prod(b):
        return False
    cuts = set()
    for sizes in (a, b):
        product = 1
        for size in sizes:
            product *= size
            cuts.add(product)
    ordered = sorted(cuts)
    return all(later % earlier == 0 for earlier, later in zip(ordered, ordered[1:], strict=False))


def factorize(program: Program, dim_names: Mapping[str, str] | None = None, rng: str = "parallel") -> Factors:
    """The factors of every tensor of `program`, their names and kinds.

    dim_names: for inputs of the model (by argument name), names of their dims: `{"video": "B T S C"}`, merged dims
        by one name, which their factors number.
    rng: "serial" where random numbers are to be those that one device would draw.

    Raises LayoutError where `dim_names` does not fit an input.
    """
    pieces = _Pieces()
    dims: dict[ValueId, list[list[int]]] = {}
    nodes: dict[ValueId, Any] = {}
    calls: list[tuple[fx.Node, list[ValueId], list[ValueId], OpRule | None, dict[str, list[int]], set[str]]] = []
    known_rules: dict[Any, OpRule | None] = {}

    for node in program.graph.nodes:
        if node.op == "output" or _is_getitem(node):
            continue
        results = [
            ((node.name, index), value)
            for index, value in enumerate(node_values(node))
            if isinstance(value, torch.Tensor)
        ]
        for value_id, value in results:
            nodes[value_id] = value
        if node.op != "call_function":
            for value_id, value in results:
                dims[value_id] = [[pieces.new(size)] if size != 1 else [] for size in value.shape]
            continue
        operands = operand_ids(node)
        rule = _rule(node, known_rules, rng)
        axes: dict[str, list[int]] = {}
        opaque: set[str] = set()
        if rule is not None:
            for value_id, mapping in zip(operands, rule.inputs, strict=True):
                for own, names in zip(dims[value_id], mapping, strict=True):
                    if len(names) == 1 and names[0] not in axes:
                        axes[names[0]] = own  # met for the first time, and alone: the dim's own pieces are the axis
                        continue
                    for name in names:
                        if name not in axes:
                            axes[name] = [pieces.new(rule.sizes[name])]
                    if names and not pieces.unify(own, [p for name in names for p in axes[name]]):
                        opaque |= set(names)
            for name, size in rule.sizes.items():
                if name not in axes:
                    axes[name] = [pieces.new(size)]
        for position, (value_id, value) in enumerate(results):
            if rule is None:
                dims[value_id] = [[pieces.new(size)] if size != 1 else [] for size in value.shape]
            else:
                dims[value_id] = [[p for name in names for p in axes[name]] for names in rule.outputs[position]]
        calls.append((node, operands, [value_id for value_id, _ in results], rule, axes, opaque))

    arriving = _arriving(program, nodes)
    values = {
        value_id: Value(
            value_id,
            tuple(tuple(pieces.leaves(dim)) for dim in own),
            tuple(nodes[value_id].shape),
            nodes[value_id].dtype,
            value_id in arriving,
        )
        for value_id, own in dims.items()
    }
    ops = []
    for node, operands, results, rule, axes, opaque in calls:
        own_axes = {axis: tuple(pieces.leaves(own)) for axis, own in axes.items()}
        ops.append(Op(node, tuple(operands), tuple(results), rule, own_axes, frozenset(opaque)))
    factors = {factor: pieces.size[factor] for value in values.values() for factor in value.factors}
    made = Factors(factors, {}, {}, values, tuple(ops), rng)
    made = replace(made, kinds=_kinds(program, made))
    return replace(made, names=_names(program, made, dim_names or {}))


def _arriving(program: Program, tensors: Mapping[ValueId, Any]) -> set[ValueId]:
    """The values that a gradient reaches, from the outputs backwards; what is written back to buffers has none."""
    found: set[ValueId] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output":
            returned = node.args[0][len(program.mutated) :]
            operands = [value_id(out) for out in returned if isinstance(out, fx.Node) and is_tensor(out)]
        elif node.op == "call_function" and any((node.name, n) in found for n in range(len(node_values(node)))):
            operands = operand_ids(node)
        else:
            continue
        found |= {operand for operand in operands if tensors[operand].requires_grad}
    return found


def _is_getitem(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target.__name__ == "getitem"
    )


def value_id(node: fx.Node) -> ValueId:
    """The value that a node stands for: `getitem` only names one of its operand's results."""
    if _is_getitem(node):
        return (node.args[0].name, node.args[1])
    return (node.name, 0)


def operand_ids(node: fx.Node) -> list[ValueId]:
    """The tensor operands of a node, in the order in which its arguments name them."""
    found: list[ValueId] = []

    def note(argument: fx.Node) -> fx.Node:
        if is_tensor(argument):
            found.append(value_id(argument))
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found


def is_tensor(node: fx.Node) -> bool:
    """Whether the node stands for one tensor (not for several, nor for a number)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def node_call(node: fx.Node) -> OpCall:
    """The call that a node of the graph makes, as rules see it."""
    results = [value for value in node_values(node) if isinstance(value, torch.Tensor)]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"] if is_tensor(n) else n)
    return OpCall.of(node.target, args, kwargs, results)


def _rule(node: fx.Node, known: dict, rng: str) -> OpRule | None:
    """The op's rule; calls that differ only in where their operands come from share it."""
    call = node_call(node)
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    strides = [operand.stride for operand in call.operands] if drawn else None
    key = (node.target, repr((call.args, call.kwargs, strides)), call.outputs, call.same_dtype)
    if key not in known:
        sizes = {size for shape in (*(o.shape for o in call.operands), *call.outputs) for size in shape}
        is_static = all(isinstance(size, int) for size in sizes) and 0 not in sizes
        found = find_rule(call) if is_static and isinstance(node.target, torch._ops.OpOverload) else None
        known[key] = found.drawn_serially() if found is not None and rng == "serial" else found
    return known[key]


def _kinds(program: Program, made: Factors) -> dict[int, str]:
    """A *feature* factor is made or contracted by parameters; of the rest, a *sequence* factor is one that some op
    computes over, or that the model steps through index by index, and a *batch* factor one that no op does."""
    weights = {
        node.name
        for node, entry in zip((n for n in program.graph.nodes if n.op == "placeholder"), program.inputs, strict=True)
        if entry.kind == "parameter"
    }
    feature: set[int] = set()
    whole = _stepped_through(made)
    for op in made.ops:
        if op.rule is None:
            continue
        derived = [operand[0] in weights for operand in op.operands]
        if derived and all(derived):
            weights.add(op.name)
        for axis in op.rule.computes_over:
            whole |= set(op.axes[axis])
        if any(derived) and (op.rule.contracts or op.node.target is torch.ops.aten.embedding.default):
            has = [{axis for dim in dims for axis in dim} for dims in op.rule.inputs]
            by_weight = {axis for axes, is_weight in zip(has, derived, strict=True) if is_weight for axis in axes}
            by_other = {axis for axes, is_weight in zip(has, derived, strict=True) if not is_weight for axis in axes}
            results = {axis for dims in op.rule.outputs for dim in dims for axis in dim}
            for axis in by_weight:
                if axis not in results or axis not in by_other:
                    feature |= set(op.axes[axis])
    # A piece of a sequence is one, and what it is joined to; the dims before and after a convolution.
    joined = [
        {factor for axis in (window.source, window.target) if axis in op.axes for factor in op.axes[axis]} - feature
        for op in made.ops
        if op.rule is not None
        for window in op.rule.windows
    ]
    graph = networkx.Graph()
    graph.add_edges_from(edge for group in joined for edge in itertools.pairwise(group))
    whole |= {factor for group in networkx.connected_components(graph) if group & whole for factor in group}
    return {
        factor: "feature" if factor in feature else "sequence" if factor in whole else "batch" for factor in made.sizes
    }


def _stepped_through(made: Factors) -> set[int]:
    """Factors of which an op takes all indices apart, or different ops different ones."""
    aten = torch.ops.aten
    indices: dict[int, set[int]] = {}
    for op in made.ops:
        if op.node.target not in (aten.select.int, aten.unbind.int):
            continue
        value = made.values[op.operands[0]]
        dim = (op.node.args[1] if len(op.node.args) > 1 else 0) % len(value.dims)
        taken = {op.node.args[2] % value.shape[dim]} if op.node.target is aten.select.int else set(range(value.shape[dim]))
        for factor in value.dims[dim]:
            indices.setdefault(factor, set()).update(taken)
    return {factor for factor, taken in indices.items() if len(taken) > 1}


def _label(op: Op) -> str:
    """The op's module by its last name, a number with the name before it: `proj`, `layer0`."""
    parts = op.path.split(".") if op.path else [op.name]
    names = [n for n, part in enumerate(parts) if not part.isdigit()]
    return "".join(parts[names[-1] :]) if names else op.name


def _names(program: Program, made: Factors, dim_names: Mapping[str, str]) -> dict[int, str]:
    """The user's names first; then the input's name and dim (`video.1`), then the op's (`proj.2`)."""
    names: dict[int, str] = {}
    taken: set[str] = set()

    def give(factor: int, name: str) -> None:
        if factor not in names:
            unique, number = name, 2
            while unique in taken:
                unique, number = f"{name}'{number}", number + 1
            names[factor] = unique
            taken.add(unique)

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = {
        entry.name: made.values[node.name, 0]
        for node, entry in zip(placeholders, program.inputs, strict=True)
        if entry.kind == "input" and (node.name, 0) in made.values
    }
    for argument, text in dim_names.items():
        if argument not in inputs:
            raise LayoutError(
                asked=f"dim_names names the input {argument!r}",
                found=f"the model's tensor inputs are {', '.join(inputs)}",
                remedy="use one of these names",
            )
        given = text.replace(",", " ").split()
        value = inputs[argument]
        if len(given) != len(value.shape):
            raise LayoutError(
                asked=f"dim_names gives {len(given)} names to {argument} ({text!r})",
                found=f"its shape is {list(value.shape)}",
                remedy="give one name a dim",
            )
        for name, dim in zip(given, value.dims, strict=True):
            for index, factor in enumerate(dim):
                give(factor, name if len(dim) == 1 else f"{name}{index}")
    for argument, value in inputs.items():
        for position, dim in enumerate(value.dims):
            for index, factor in enumerate(dim):
                if made.kinds[factor] != "feature":
                    give(factor, f"{argument}.{position}" + (f".{index}" if len(dim) > 1 else ""))
    for op in made.ops:
        label = _label(op)
        for result in op.results:
            for position, dim in enumerate(made.values[result].dims):
                for index, factor in enumerate(dim):
                    give(factor, f"{label}.{position}" + (f".{index}" if len(dim) > 1 else ""))
    for value in made.values.values():
        for position, dim in enumerate(value.dims):
            for factor in dim:
                give(factor, f"{value.id[0]}.{position}")
    return names
