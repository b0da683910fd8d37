"""Enumerate: the legal ways to run each op, read off its rule.

On one mesh dim an op either shards one factor of one of its axes (or of several axes that are cut together), or runs
replicated:

    shard      operands and results that have the factor are Shard there; operands that lack it are used by sharded
               work, so they are Replicate with a Partial gradient; results that lack it are Partial, because the op sums it
               away, or Replicate, because the ranks combine their statistics inside the op
    replicate  all operands and results Replicate
    varying    under training, all operands and results Replicate with a Partial gradient

With several mesh dims: one choice each, no two on the same place. Which factors may be sharded is the preset's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsp_auto.errors import MeshError, NoShardableFactorError, StrategyError
from dsp_auto.mesh import Mesh

from .factorize import Cut, Factors, Op
from .layout import Layout, P, Placement, R, Shard, V

# The kinds of factor that each preset may shard; the next set where none of a set is long enough for a mesh dim.
PRESETS: Mapping[str, tuple[frozenset[str], ...]] = {
    "dsp": (frozenset({"sequence"}),),
    "auto": (frozenset({"sequence"}), frozenset({"sequence", "batch", "feature"})),
}


@dataclass(frozen=True)
class Strategy:
    """One way to run one op.

    factors: per mesh dim the factor that it shards (that of the results, where axes are cut together), None where it runs
        replicated.
    cuts: per mesh dim the rule's axes that are cut, and which of each axis's factors; nothing where it runs replicated.
    """

    factors: tuple[int | None, ...]
    cuts: tuple[tuple[Cut, ...], ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]


def check_preset(strategy: str) -> None:
    """Raises StrategyError for a strategy that does not exist."""
    if strategy not in PRESETS:
        raise StrategyError(
            asked=f"strategy {strategy!r}", found="no such strategy", remedy=f"use one of {', '.join(sorted(PRESETS))}"
        )


def shardable_factors(factors: Factors, mesh: Mesh, strategy: str) -> tuple[frozenset[int], ...]:
    """Per mesh dim, the factors that `strategy` may shard over it.

    Raises NoShardableFactorError where the model has none of the kind, MeshError where each is shorter than the mesh dim.
    """
    check_preset(strategy)
    if mesh.ranks == 1:
        return tuple(frozenset() for _ in mesh.sizes)
    splittable = {factor for op in factors.ops for cut in op.cuts for factor in op.factors(cut)}
    found = []
    for name, size in zip(mesh.names, mesh.sizes, strict=True):
        fitting: frozenset[int] = frozenset()
        for kinds in PRESETS[strategy] if size > 1 else ():
            wanted = [factor for factor, kind in factors.kinds.items() if kind in kinds and factor in splittable]
            fitting = frozenset(factor for factor in wanted if factors.sizes[factor] >= size)
            if fitting:
                break
        if size > 1 and not wanted:
            raise NoShardableFactorError(
                asked=f"strategy {strategy!r} over mesh {mesh}",
                found=f"the model has no {' or '.join(sorted(kinds))} factor that any op computes in parallel (its factors: "
                f"{_describe(factors, list(factors.kinds))})",
                remedy="this model has nothing to share out along a sequence; use data parallelism",
            )
        if size > 1 and not fitting:
            longest = max(wanted, key=lambda factor: factors.sizes[factor])
            raise MeshError(
                asked=f"cannot shard over mesh dim {name} of {size} ranks",
                found=f"every factor that strategy {strategy!r} may shard is shorter: {_describe(factors, wanted)}",
                remedy=f"use at most {factors.sizes[longest]} ranks",
            )
        found.append(fitting)
    return tuple(found)


def _describe(factors: Factors, which: list[int], limit: int = 8) -> str:
    shown = [f"{factors.names[f]}={factors.sizes[f]} ({factors.kinds[f]})" for f in which[:limit]]
    return ", ".join(shown) + (", …" if len(which) > limit else "")


@dataclass(frozen=True)
class _Choice:
    """What one mesh dim does with an op: what it cuts, if anything, and the placements."""

    cut: tuple[Cut, ...]
    factor: int | None
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]


def enumerate_strategies(op: Op, factors: Factors, shardable: tuple[frozenset[int], ...]) -> tuple[Strategy, ...]:
    """The strategies of one op, replicated first. `shardable`: per mesh dim, see `shardable_factors`."""
    grad = Canonical(op, factors)
    per_dim = [_choices(op, grad, allowed) for allowed in shardable]
    found = []
    for combination in itertools.product(*per_dim):
        cut = [own for choice in combination for own in choice.cut]
        if len(set(cut)) == len(cut):
            found.append(
                Strategy(
                    tuple(choice.factor for choice in combination),
                    tuple(choice.cut for choice in combination),
                    tuple(zip(*(choice.operands for choice in combination))) if op.operands else (),
                    tuple(zip(*(choice.results for choice in combination))) if op.results else (),
                )
            )
    return tuple(dict.fromkeys(found))


class Canonical:
    """Writes the two kinds of Replicate as one for tensors whose gradient nobody asks for."""

    def __init__(self, op: Op, factors: Factors) -> None:
        self.factors = factors
        # Where no result needs a gradient, none flows back to the operands either.
        flows = any(factors.values[result].requires_grad for result in op.results)
        self.operands = [flows and factors.values[operand].requires_grad for operand in op.operands]
        self.results = [factors.values[result].requires_grad for result in op.results]

    def choice(
        self,
        cut: tuple[Cut, ...],
        factor: int | None,
        operand: Callable[[int], Placement],
        result: Callable[[int], Placement],
    ) -> _Choice:
        return _Choice(
            cut,
            factor,
            tuple(without_gradient(operand(n)) if not grad else operand(n) for n, grad in enumerate(self.operands)),
            tuple(without_gradient(result(n)) if not grad else result(n) for n, grad in enumerate(self.results)),
        )


def without_gradient(placement: Placement) -> Placement:
    return R if placement == V else placement


def _choices(op: Op, grad: Canonical, allowed: frozenset[int]) -> list[_Choice]:
    found = [grad.choice((), None, lambda n: R, lambda n: R)]
    if any(grad.operands) and allowed:
        found.append(grad.choice((), None, lambda n: V, lambda n: V))
    if op.rule is None:
        return found
    values = grad.factors.values
    operand_places = [op.places(dims, values[value]) for dims, value in zip(op.rule.inputs, op.operands, strict=True)]
    result_places = [op.places(dims, values[value]) for dims, value in zip(op.rule.outputs, op.results, strict=True)]
    for cut in op.cuts:
        factors = op.factors(cut)
        if not allowed.issuperset(factors):
            continue
        summed = any(axis in op.rule.reduces or axis not in op.rule.combines for axis, _ in cut)
        without = P if summed else R

        def placed(places: list[dict[Cut, int]], n: int, otherwise: Placement, cut=cut) -> Placement:
            return next((Shard(places[n][own]) for own in cut if own in places[n]), otherwise)

        found.append(
            grad.choice(
                cut,
                factors[-1],
                lambda n, placed=placed: placed(operand_places, n, V),
                lambda n, placed=placed, without=without: placed(result_places, n, without),
            )
        )
    return found
