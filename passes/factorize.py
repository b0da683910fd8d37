"""Factorize: which dims of which tensors are the same thing, down to the pieces that no reshape divides.

Every op's rule says which axes its operands and results share. Axes that meet are one *factor* (union-find over the
whole graph); where a dim of 24 meets dims of 4 and 6, the factor splits, here and everywhere else it stands. What does
not nest (6·4 against 8·3) stays apart: that op then needs those dims whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dsp_auto.errors import LayoutError
from dsp_auto.units import counted

from .capture import Program
from .factors import Factors, Op, Value
from .kinds import find_kinds
from .nodes import ValueId, is_getitem, is_tensor, node_call, node_values, on_the_host, operand_ids, value_id
from .notation import OpRule
from .rules import find_rule


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
        if node.op == "output" or is_getitem(node):
            continue
        results = [
            ((node.name, index), value)
            for index, value in enumerate(node_values(node))
            if isinstance(value, torch.Tensor)
        ]
        for own, value in results:
            nodes[own] = value
        if node.op != "call_function":
            for own, value in results:
                dims[own] = [[pieces.new(size)] if size != 1 else [] for size in value.shape]
            continue
        operands = operand_ids(node)
        rule = _rule(node, known_rules, rng)
        axes: dict[str, list[int]] = {}
        opaque: set[str] = set()
        if rule is not None:
            for ident, mapping in zip(operands, rule.inputs, strict=True):
                for own, names in zip(dims[ident], mapping, strict=True):
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
        for position, (ident, value) in enumerate(results):
            if rule is None:
                dims[ident] = [[pieces.new(size)] if size != 1 else [] for size in value.shape]
            else:
                dims[ident] = [[p for name in names for p in axes[name]] for names in rule.outputs[position]]
        calls.append((node, operands, [ident for ident, _ in results], rule, axes, opaque))

    arriving = _arriving(program, nodes)
    on_host = on_the_host(nodes.values())
    values = {
        ident: Value(
            ident,
            tuple(tuple(pieces.leaves(dim)) for dim in own),
            tuple(nodes[ident].shape),
            nodes[ident].dtype,
            ident in arriving,
            nodes[ident].device,
            on_host(nodes[ident]),
        )
        for ident, own in dims.items()
    }
    ops = []
    for node, operands, results, rule, axes, opaque in calls:
        own_axes = {axis: tuple(pieces.leaves(own)) for axis, own in axes.items()}
        there = any(values[v].on_host for v in results) or any(values[v].on_host and v in arriving for v in operands)
        ops.append(Op(node, tuple(operands), tuple(results), rule, own_axes, frozenset(opaque), there))
    factors = {factor: pieces.size[factor] for value in values.values() for factor in value.factors}
    made = Factors(factors, {}, {}, values, tuple(ops), rng)
    kinds = find_kinds(program, made)
    made = replace(
        made,
        kinds=kinds.of,
        inner=kinds.inner,
        heads=kinds.heads,
        sequences=kinds.sequences,
        weights=kinds.weights,
    )
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


def _label(op: Op) -> str:
    """The op's module by its last name, a number with the name before it: `proj`, `layer0`."""
    parts = op.path.split(".") if op.path else [op.name]
    names = [n for n, part in enumerate(parts) if not part.isdigit()]
    return "".join(parts[names[-1] :]) if names else op.name


def _parse_names(argument: str, text: str) -> list[tuple[str, ...]]:
    """Of each dim its name, or several in parentheses: `"B (H W) C"` is `[("B",), ("H", "W"), ("C",)]`."""
    found: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in re.findall(r"[()]|[^\s,()]+", text):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group:
            found.append(tuple(group))
            group = None
        elif token in "()":
            group = []
            break
        elif group is None:
            found.append((token,))
        else:
            group.append(token)
    if group is not None:
        raise LayoutError(
            asked=f"dim_names of {argument} are {text!r}",
            found="its parentheses do not match, or hold nothing",
            remedy='write them as "B T S C", or "B (T S) C" for a dim that the model splits',
        )
    return found


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
        value = inputs[argument]
        given = _parse_names(argument, text)
        if len(given) != len(value.shape):
            raise LayoutError(
                asked=f"dim_names gives {counted(len(given), 'name')} to {argument} ({text!r})",
                found=f"its shape is {list(value.shape)}",
                remedy="give one name a dim, or (H W) to a dim that the model splits",
            )
        for position, (own, dim) in enumerate(zip(given, value.dims, strict=True)):
            if len(own) == 1:
                own = own if len(dim) == 1 else tuple(f"{own[0]}{index}" for index in range(len(dim)))
            elif len(own) != len(dim):
                sizes = " x ".join(str(made.sizes[factor]) for factor in dim)
                raise LayoutError(
                    asked=f"dim_names gives {counted(len(own), 'name')} to dim {position} of {argument} ({text!r})",
                    found=f"the model takes it as {sizes}" if len(dim) > 1 else f"the model does not split its {sizes} places",
                    remedy="give a name to each of these, or one to the dim",
                )
            for name, factor in zip(own, dim, strict=True):
                give(factor, name)
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
