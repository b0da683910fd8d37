"""Enumerate: the legal ways to run each op, read off its rule.

On one mesh dim an op either shards one factor of one of its axes (or of several axes that are cut together), or runs
replicated:

    shard      operands and results that have the factor are Shard there; operands that lack it are used by sharded
               work, so they are Replicate with a Partial gradient; results that lack it are Partial, because the op sums it
               away, or Replicate, because the ranks combine their statistics inside the op
    replicate  all operands and results Replicate
    varying    under training, all operands and results Replicate with a Partial gradient

What runs on the host, beside a model on accelerators, runs replicated, so that nothing there is communicated.

With several mesh dims: one choice each; two may cut the same, the outer one first, where it is long enough for both. Which
factors may be sharded, and in which way, is the business of `presets`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

from .factors import Cut, Factors, Op
from .layout import Layout, P, Placement, R, Shard, V, show_placement
from .nodes import ValueId
from .presets import Space


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

    @cached_property
    def together(self) -> dict[tuple[Cut, ...], tuple[int, ...]]:
        """All that is cut, and the mesh dims that cut it, outermost first."""
        found: dict[tuple[Cut, ...], tuple[int, ...]] = {}
        for m, cut in enumerate(self.cuts):
            if cut:
                found[cut] = (*found.get(cut, ()), m)
        return found


def show_strategy(strategy: Strategy, op: Op, factors: Factors) -> str:
    """`T V V -> T`: what operands and results are, V for Replicate with a Partial gradient; over several mesh dims `T/S`."""

    def show(layouts: tuple[Layout, ...], values: tuple[ValueId, ...]) -> str:
        named = [(layout, factors.factor_names(value)) for layout, value in zip(layouts, values, strict=True)]
        return " ".join("/".join("V" if own == V else show_placement(own, names) for own in layout) for layout, names in named)

    return f"{show(strategy.operands, op.operands)} -> {show(strategy.results, op.results)}"


@dataclass(frozen=True)
class _Choice:
    """What one mesh dim does with an op: what it cuts, if anything, and the placements."""

    cut: tuple[Cut, ...]
    factor: int | None
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]


def enumerate_strategies(op: Op, factors: Factors, space: Space) -> tuple[Strategy, ...]:
    """The strategies of one op, replicated first."""
    grad = Canonical(op, factors)
    per_dim = [_choices(op, grad, space, allowed) for allowed in space.factors]
    found = []
    for combination in itertools.product(*per_dim):
        strategy = Strategy(
            tuple(choice.factor for choice in combination),
            tuple(choice.cut for choice in combination),
            tuple(zip(*(choice.operands for choice in combination))) if op.operands else (),
            tuple(zip(*(choice.results for choice in combination))) if op.results else (),
        )
        if _is_possible(op, strategy, factors, space):
            found.append(strategy)
    if not found:  # too short for all mesh dims together
        return enumerate_strategies(op, factors, replace(space, everywhere=frozenset(), inside=frozenset()))
    return tuple(dict.fromkeys(found))


def _is_possible(op: Op, strategy: Strategy, factors: Factors, space: Space) -> bool:
    """Whether mesh dims that cut the same find enough of it, and others nothing in common."""
    for cut, mesh_dims in strategy.together.items():
        ranks = math.prod(space.mesh.sizes[m] for m in mesh_dims)
        if len(mesh_dims) > 1 and any(factors.sizes[factor] < ranks for factor in op.factors(cut)):
            return False
    cut = [own for group in strategy.together for own in group]
    return len(set(cut)) == len(cut)


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


def _choices(op: Op, grad: Canonical, space: Space, allowed: frozenset[int]) -> list[_Choice]:
    found = [grad.choice((), None, lambda n: R, lambda n: R)]
    if op.on_host:
        return found
    if any(grad.operands) and allowed:
        found.append(grad.choice((), None, lambda n: V, lambda n: V))
    if op.rule is None:
        return found
    values = grad.factors.values
    operand_places = [op.places(dims, values[value]) for dims, value in zip(op.rule.inputs, op.operands, strict=True)]
    result_places = [op.places(dims, values[value]) for dims, value in zip(op.rule.outputs, op.results, strict=True)]
    weights = [n for n, operand in enumerate(op.operands) if operand[0] in grad.factors.weights]
    sharded = []
    for cut in op.cuts:
        axes = {axis for axis, _ in cut}
        if not allowed.issuperset(op.factors(cut)) or (op.rule.ring(axes) is not None and not space.ring):
            continue
        of_weight = op.rule.contracts and any(own in operand_places[n] for n in weights for own in cut)
        if of_weight and not space.weights and _is_feature(op, cut, grad):
            continue
        summed = any(axis in op.rule.reduces or axis not in op.rule.combines for axis in axes)
        without = P if summed else R

        def placed(places: list[dict[Cut, int]], otherwise: Placement, n: int, cut: tuple[Cut, ...] = cut) -> Placement:
            return next((Shard(places[n][own]) for own in cut if own in places[n]), otherwise)

        sharded.append(
            grad.choice(
                cut,
                op.factors(cut)[-1],
                partial(placed, operand_places, V),
                partial(placed, result_places, without),
            )
        )
    over = {factor for axis in op.rule.computes_over for factor in op.axes[axis]}
    musts = (space.everywhere, space.inside if over & space.sequence else frozenset())
    must = [choice for choice in sharded if any(own.issuperset(op.factors(choice.cut)) for own in musts)]
    if space.ring == "must" and over & space.sequence:
        must += [choice for choice in sharded if op.rule.ring([axis for axis, _ in choice.cut]) is not None]
    return must or found + sharded


def _is_feature(op: Op, cut: tuple[Cut, ...], grad: Canonical) -> bool:
    return any(grad.factors.kinds[factor] == "feature" for factor in op.factors(cut))
