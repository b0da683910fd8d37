"""Factors: what `factorize` finds out about a program, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from .nodes import ValueId, module_path
from .notation import OpRule, Shape

Cut = tuple[str, int]  # axis of an op's rule, which of its factors


@dataclass(frozen=True)
class Value:
    """One tensor of the graph. `dims` are the factors of each of its dims, major first: `(B T) S C`.

    requires_grad: a gradient arrives at it in backward (not so upstream of a `detach`, whatever autograd records there).
    on_host: it is on the CPU, of a model that computes on accelerators. Ranks do not communicate such values, since their
        collectives are those of the accelerator, and they take no memory of it.
    """

    id: ValueId
    dims: tuple[tuple[int, ...], ...]
    shape: Shape
    dtype: torch.dtype
    requires_grad: bool
    device: torch.device = torch.device("cpu")
    on_host: bool = False

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """Factors by place (see `layout`)."""
        return tuple(factor for dim in self.dims for factor in dim)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def nbytes(self) -> int:
        """Bytes of memory where the model computes."""
        return 0 if self.on_host else math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Op:
    """One op of the graph: its rule (None: it runs replicated), operands and results.

    `axes` are the factors of each axis of the rule, `opaque` the axes whose operands could not be brought together.
    on_host: what it makes is on the host (see `Value`), or a gradient that it gives, so that every rank does all of it.
    """

    node: fx.Node
    operands: tuple[ValueId, ...]
    results: tuple[ValueId, ...]
    rule: OpRule | None
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    opaque: frozenset[str] = frozenset()
    on_host: bool = False

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def known_rule(self) -> OpRule:
        """The rule of an op that has one: one that is sharded, that is a view, or that communicates."""
        if self.rule is None:
            raise AssertionError(f"{self.name} ({self.node.target}) has no rule")
        return self.rule

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
            # The major factor's parts are ranges of the axis.
            if self.rule.cut_into_ranges(group):
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
    kinds: Mapping[int, str]  # "feature", "sequence" or "batch"; see `kinds` for these and what follows
    values: Mapping[ValueId, Value]
    ops: tuple[Op, ...]
    rng: str = "parallel"  # or "serial": random numbers are those that one device would draw
    inner: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()
    sequences: tuple[frozenset[int], ...] = ()
    weights: frozenset[str] = frozenset()

    @cached_property
    def cut(self) -> frozenset[int]:
        """The factors that some op's rule cuts."""
        return frozenset(factor for op in self.ops for cut in op.cuts for factor in op.factors(cut))

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


def common_name(name: str) -> str:
    """What factors of several blocks share: `proj.2` of `proj.2'3`, which is the third of that name."""
    return re.sub(r"'\d+$", "", name)
