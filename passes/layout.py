"""Layouts: for each mesh dim, what a tensor is there, and the steps that turn one layout into another.

A *place* is a position among a tensor's factors, counted from its first dim's major factor: in `(B T) S C` the
places are B=0, T=1, S=2, C=3. A layout names places, not factors, because one factor may stand twice in a tensor
(the scores `[s, t]` of self-attention), and then only one of the two is sharded. Several mesh dims may shard one place: the
outermost cuts it, the next one cuts each of the parts.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the mesh dim holds its `torch.tensor_split` part of the factor at `place`, or of what the mesh dims before
    it leave of that."""

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
    """One primitive over all of `mesh_dims` together (outermost first); `before` and `after` are the whole layouts around
    it."""

    primitive: str
    mesh_dims: tuple[int, ...]
    before: Layout
    after: Layout
    _hash: int = field(init=False, repr=False, compare=False)  # which planning asks for a million times

    def __post_init__(self) -> None:
        # Without the text, whose hash is another one in every process.
        object.__setattr__(self, "_hash", hash((self.mesh_dims, self.before, self.after)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def source(self) -> Placement:
        return self.before[self.mesh_dims[0]]

    @property
    def target(self) -> Placement:
        return self.after[self.mesh_dims[0]]


def _primitive(a: Placement, b: Placement) -> str | None:
    """The primitive that turns `a` into `b`, None where there is none (DESIGN section 3)."""
    if isinstance(a, Shard):
        return "switch" if isinstance(b, Shard) else "gather" if isinstance(b, Replicate) else None
    if isinstance(a, Partial):
        return "reduce_scatter" if isinstance(b, Shard) else "reduce" if isinstance(b, Replicate) else None
    if isinstance(b, Shard):
        return "split"
    return "replicate" if a == R and b == V else None  # V -> R and R -> Partial: no plan gains by them


def place_of(placement: Placement) -> int:
    """The place of what is known to be a Shard: either end of a `switch`, what a `gather` starts from or a `split` makes."""
    if not isinstance(placement, Shard):
        raise AssertionError(f"{placement} has no place")
    return placement.place


def cutters(layout: Layout, place: int) -> tuple[int, ...]:
    """The mesh dims that cut a place, the outermost first: each cuts what those before it leave."""
    return tuple(m for m, placement in enumerate(layout) if placement == Shard(place))


@lru_cache(maxsize=2**14)
def moves(layout: Layout, placements: tuple[Placement, ...]) -> tuple[Step, ...]:
    """All single primitives from `layout`, over one mesh dim or several that do the same, to one of `placements`.

    Of the mesh dims that cut a place, the innermost leave it first and come to it last: so every shard is a range.
    """
    return tuple(_moves(layout, placements))


def _moves(layout: Layout, placements: Collection[Placement]) -> Iterator[Step]:
    for a in dict.fromkeys(layout):
        alike = [m for m, placement in enumerate(layout) if placement == a]
        # What leaves a place leaves it from the inside.
        if isinstance(a, Shard):
            leaving = [tuple(alike[n:]) for n in range(len(alike))]
        else:
            leaving = [dims for n in range(1, len(alike) + 1) for dims in itertools.combinations(alike, n)]
        for b in placements:
            primitive = _primitive(a, b)
            if primitive is None or a == b:
                continue
            inside = cutters(layout, b.place)[-1:] if isinstance(b, Shard) else ()
            for dims in leaving:
                if not inside or inside[0] < dims[0]:
                    after = tuple(b if m in dims else placement for m, placement in enumerate(layout))
                    yield Step(primitive, dims, layout, after)
                    if primitive == "switch" and len(dims) > 1:
                        yield Step("hierarchical_switch", dims, layout, after)


def ways(
    source: Layout, placements: tuple[Placement, ...], cost: Callable[[Step], float]
) -> dict[Layout, tuple[Step, ...]]:
    """The cheapest steps from `source` to every layout that moves among `placements` lead to (Dijkstra)."""
    found: dict[Layout, tuple[Step, ...]] = {}
    tried = itertools.count()
    todo: list[tuple[float, int, Layout, tuple[Step, ...]]] = [(0.0, next(tried), source, ())]  # the last step or none
    while todo:
        spent, _, layout, last = heapq.heappop(todo)
        if layout in found:
            continue
        found[layout] = (*found[last[0].before], *last) if last else ()
        for step in moves(layout, placements):
            if step.after not in found:
                heapq.heappush(todo, (spent + cost(step), next(tried), step.after, (step,)))
    return found


def show_placement(placement: Placement, factor_names: tuple[str, ...]) -> str:
    if isinstance(placement, Shard):
        return factor_names[placement.place]
    return "P" if isinstance(placement, Partial) else "R"
