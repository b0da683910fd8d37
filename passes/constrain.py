"""Constrain: of the strategies of each op, those that the user's constraints leave.

A constraint names modules, a mesh dim, and the factor that their ops shard over it, or None: they do not shard over it. It
speaks of every op in these modules that has the factor among its dims; ops that do not have it are free. Views (reshape,
transpose) are no decisions and follow. Tensors are resharded on the way in and out as ever.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsp_auto.errors import ConstraintError, LayoutError
from dsp_auto.mesh import Mesh

from .enumerate_strategies import Strategy, enumerate_strategies
from .factors import Factors, Op
from .presets import Space


@dataclass(frozen=True)
class Constraint:
    """`modules` is a path, or a pattern in which `*` stands for one part of it: `blocks.*.attn`. mesh_dim: the user's; None:
    all of them. factor: its name as plans print it; None: nothing is sharded. ops: names of these alone, whatever their
    modules."""

    modules: str
    mesh_dim: str | None
    factor: str | None
    ops: frozenset[str] | None = None

    def covers(self, op: Op) -> bool:
        """Whether an op stands in the modules, or is one of the ops."""
        if self.ops is not None:
            return op.name in self.ops
        wanted, parts = self.modules.split("."), op.path.split(".")
        return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))

    def __str__(self) -> str:
        what = "whole" if self.factor is None else f"sharding {self.factor}"
        return f"{self.modules} {what}" + (f" over {self.mesh_dim}" if self.mesh_dim else "")


def read_constraints(
    constraints: Mapping[str, Mapping[str, str | None]] | None, keep_whole: Sequence[str] | None
) -> tuple[Constraint, ...]:
    """What the user wrote. Raises LayoutError where it is nothing of the kind."""
    if not isinstance(constraints or {}, Mapping):
        raise _unreadable("constraints", constraints)
    if isinstance(keep_whole, str) or not isinstance(keep_whole or (), Sequence):
        raise LayoutError(
            asked=f"keep_whole is {keep_whole!r}", found=f"a {type(keep_whole).__name__}", remedy='write it as ["patch_embed"]'
        )
    found = []
    for modules, wanted in (constraints or {}).items():
        if not isinstance(wanted, Mapping) or not wanted or not isinstance(modules, str) or not modules:
            raise _unreadable(modules, wanted)
        for mesh_dim, factor in wanted.items():
            if not isinstance(mesh_dim, str) or not isinstance(factor, str | None):
                raise _unreadable(modules, wanted)
            found.append(Constraint(modules, mesh_dim, factor))
    for modules in keep_whole or ():
        if not isinstance(modules, str) or not modules:
            raise _unreadable("keep_whole", keep_whole)
        found.append(Constraint(modules, None, None))
    return tuple(found)


def _unreadable(modules: object, wanted: object) -> LayoutError:
    return LayoutError(
        asked=f"a constraint {modules!r}: {wanted!r}",
        found=f"a {type(wanted).__name__} where a mesh dim and a factor are wanted",
        remedy='write it as {"blocks.3.attn": {"sp": "T"}}, or {"sp": None} for what is not to be sharded over sp',
    )


def check_constraints(constraints: Sequence[Constraint], factors: Factors, mesh: Mesh) -> None:
    """Raises LayoutError for a constraint that speaks of nothing: no such module, mesh dim or factor there."""
    ops = [op for op in factors.ops if not op.is_view]
    for one in constraints:
        own = [op for op in ops if one.covers(op)]
        if not own:
            paths = {".".join(op.path.split(".")[:n]) for op in ops for n in range(1, op.path.count(".") + 2) if op.path}
            near = difflib.get_close_matches(one.modules, sorted(paths), 5, 0.3) or sorted(paths)[:8]
            raise LayoutError(
                asked=f"constraint {one}",
                found=f"no op of the model stands in {one.modules!r} (near it are {', '.join(near) or 'none'})",
                remedy="name a module by its path; * stands for one part of it",
            )
        if one.mesh_dim is not None and one.mesh_dim not in mesh.whole:
            raise LayoutError(
                asked=f"constraint {one}",
                found=f"the mesh has no dim {one.mesh_dim!r}",
                remedy=f"its dims are {', '.join(mesh.whole)}",
            )
        if one.factor is not None and not any(_carried(op, factors, one.factor) for op in own):
            names = dict.fromkeys(factors.names[factor] for op in own for factor in _factors(op, factors))
            raise LayoutError(
                asked=f"constraint {one}",
                found=f"no op there has a factor {one.factor!r}",
                remedy=f"they have {', '.join(names) or 'none'}; dim_names gives names to the dims of inputs",
            )


def constrain(
    op: Op, strategies: Iterable[Strategy], constraints: Sequence[Constraint], factors: Factors, mesh: Mesh
) -> tuple[Strategy, ...]:
    """Those of an op's strategies that all constraints leave. Raises LayoutError where these are none."""
    left, all_of = tuple(strategies), tuple(strategies)
    for one in constraints:
        if not one.covers(op):
            continue
        carried = _carried(op, factors, one.factor)
        if one.factor is not None and not carried:
            continue
        mesh_dims = range(len(mesh.sizes)) if one.mesh_dim is None else mesh.dims_of(one.mesh_dim)
        mesh_dims = [m for m in mesh_dims if mesh.sizes[m] > 1]  # one rank has all of it, cut or not
        found = tuple(own for own in left if all(_satisfies(op, own, m, carried) for m in mesh_dims))
        if not found:
            could = dict.fromkeys(_show(op, own, factors, mesh) for own in all_of)
            raise ConstraintError(
                asked=f"constraint {one}: {op.name} ({op.node.target}) cannot run so",
                found=f"it could: {'; '.join(could)}" if len(left) == len(all_of) else "another constraint rules it out",
                where=op.path or None,
                remedy="ask for what it can do, name other modules, or another strategy",
            )
        left = found
    return left


def check_satisfiable(constraints: Sequence[Constraint], factors: Factors, space: Space) -> None:
    """Raises ConstraintError where some op of a space has no strategy left."""
    for op in factors.ops:
        if not op.is_view and any(one.covers(op) for one in constraints):
            constrain(op, enumerate_strategies(op, factors, space), constraints, factors, space.mesh)


def _satisfies(op: Op, strategy: Strategy, mesh_dim: int, carried: frozenset[int]) -> bool:
    cut = strategy.cuts[mesh_dim]
    return not carried.isdisjoint(op.factors(cut)) if carried else not cut


def _carried(op: Op, factors: Factors, name: str | None) -> frozenset[int]:
    """The op's factors of that name."""
    return frozenset(factor for factor in _factors(op, factors) if factors.names[factor] == name)


def _factors(op: Op, factors: Factors) -> list[int]:
    own = [factor for axis in op.axes.values() for factor in axis]
    return own + [factor for value in (*op.operands, *op.results) for factor in factors.values[value].factors]


def _show(op: Op, strategy: Strategy, factors: Factors, mesh: Mesh) -> str:
    """`sp: T` or `whole`."""
    shown = [
        f"{name}: {' and '.join(factors.names[factor] for factor in op.factors(cut))}"
        for name, cut in zip(mesh.names, strategy.cuts, strict=True)
        if cut
    ]
    return ", ".join(shown) or "whole"


def ways_of(one: Constraint, factors: Factors, spaces: Sequence[Space]) -> dict[str, list[str | None]]:
    """By the user's mesh dims, the factors that some op that `one` speaks of may shard over it in any space; None (whole)
    last."""
    own = [op for op in factors.ops if not op.is_view and one.covers(op)]
    found: dict[str, dict[str, None]] = {name: {} for name, size in spaces[0].mesh.whole.items() if size > 1}
    for space in spaces:
        for op in own:
            for strategy in enumerate_strategies(op, factors, space):
                for name, cut in zip(space.mesh.part_of, strategy.cuts, strict=True):
                    if cut:
                        found[name] |= dict.fromkeys(factors.names[factor] for factor in op.factors(cut))
    return {name: [*names, None] for name, names in found.items()}
