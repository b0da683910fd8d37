"""Layouts: for each mesh dim, what a tensor is there, and the steps that turn one layout into another.

A *place* is a position among a tensor's factors, counted from its first dim's major factor: in `(B T) S C` the
places are B=0, T=1, S=2, C=3. A layout names places, not factors, because one factor may stand twice in a tensor
(the scores `[s, t]` of self-attention), and then only one of the two is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the mesh dim holds its `torch.tensor_split` part of the factor at `place`."""

    place: int


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor.

    `partial_grad`: the tensor's gradient is Partial(sum), because ranks do different work with the value. It is
    what the primitive `replicate` makes, and what every operand of sharded work must be that is not sharded itself.
    """

    partial_grad: bool = False


@dataclass(frozen=True, slots=True)
class Partial:
    """The sum over the ranks of what each holds is the tensor; the gradient is replicated."""


R = Replicate()
V = Replicate(partial_grad=True)
P = Partial()

Placement = Shard | Replicate | Partial
Layout = tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One primitive on one mesh dim; `before` and `after` are the whole layouts around it."""

    primitive: str
    mesh_dim: int
    before: Layout
    after: Layout

    @property
    def source(self) -> Placement:
        return self.before[self.mesh_dim]

    @property
    def target(self) -> Placement:
        return self.after[self.mesh_dim]


def _primitives(a: Placement, b: Placement) -> tuple[tuple[str, Placement], ...] | None:
    """The primitives that turn `a` into `b` on one mesh dim, None where there is no way (DESIGN section 3)."""
    if a == b:
        return ()
    if isinstance(a, Shard):
        return (("switch", b),) if isinstance(b, Shard) else (("gather", b),) if isinstance(b, Replicate) else None
    if isinstance(a, Partial):
        return (("reduce_scatter", b),) if isinstance(b, Shard) else (("reduce", b),)
    if isinstance(b, Shard):
        return (("split", b),)
    if b == V:
        return (("replicate", b),)
    return None  # V -> R and R -> Partial: no plan gains by them


def steps(source: Layout, target: Layout) -> tuple[Step, ...] | None:
    """Primitives, mesh dim by mesh dim, from `source` to `target`; None where there is no way.

    No layout on the way shards one place twice: a mesh dim waits until the place it goes to is free; where the mesh
    dims wait for each other in a ring, one of them gathers first.
    """
    todo = {m: _primitives(a, b) for m, (a, b) in enumerate(zip(source, target, strict=True))}
    if any(way is None for way in todo.values()):
        return None
    todo = {m: list(way) for m, way in todo.items() if way}
    current, found = list(source), []

    def take(mesh_dim: int, primitive: str, placement: Placement) -> None:
        before = tuple(current)
        current[mesh_dim] = placement
        found.append(Step(primitive, mesh_dim, before, tuple(current)))

    while todo:
        for m in list(todo):
            primitive, placement = todo[m][0]
            if isinstance(placement, Shard) and placement in current:
                continue
            take(m, primitive, placement)
            del todo[m]
            break
        else:
            m = next(iter(todo))
            take(m, "gather", R)
            todo[m] = [("split", target[m])]
    return tuple(found)


def show_placement(placement: Placement, factor_names: tuple[str, ...]) -> str:
    if isinstance(placement, Shard):
        return factor_names[placement.place]
    return "P" if isinstance(placement, Partial) else "R"
