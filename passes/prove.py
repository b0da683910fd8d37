"""Prove: a rule is proven by running it.

Every axis that the rule calls shardable is cut into uneven shards, each rank's call runs by itself, and what the ranks
hold must come together to what one device computes:

    results       that have the axis stand next to each other; where the rule reduces, they add up
    gradients     of operands that have the axis stand next to each other; all others add up over the ranks

The second line is the algebra of layouts: an operand that lacks a sharded axis is Replicate with a Partial gradient.
An axis may be merged from several factors, any one of which is shared out, so its minor part is cut as well; an axis that
may only be cut into ranges is cut in whole units too. Ops that communicate by themselves do so between simulated ranks.
Of ops that draw random numbers the form is run that draws what one device does.
Nothing here needs a rule that somebody wrote: `difference` tries any cut of any rule, guessed ones too; and several cuts
at once, as on a mesh of several dims.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto import simulate
from dsp_auto.errors import ProofError
from dsp_auto.shards import shard_range, shard_sizes
from dsp_auto.units import counted

from .notation import Dim, Local, OpCall, OpRule, Site
from .rules import find_rule

# Largest difference allowed, relative to the largest element of the whole result or of a part (or to 1).
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-4, torch.complex64: 2e-4}
_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True)
class Proof:
    """The axes of one op call that were run in shards, each with the numbers of ranks: `k over 2, 3 ranks`."""

    op: str
    rule: OpRule
    axes: tuple[tuple[str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        shown = "; ".join(f"{axis} over {', '.join(map(str, ranks))} ranks" for axis, ranks in self.axes)
        return f"{self.op}  {self.rule}  proven: {shown or 'nothing to shard'}"


@dataclass(frozen=True)
class Example:
    """One op call on one device: operands, results, cotangents of the results, gradients of the operands.

    Results that have no gradient have no cotangent; operands that get none have None.
    """

    target: Any
    args: tuple
    kwargs: Mapping[str, Any]
    operands: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    cotangents: tuple[torch.Tensor | None, ...]
    gradients: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, target: Any, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Example:
        args, kwargs = tuple(args), dict(kwargs or {})
        operands = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        leaves = _leaves(operands)
        called, named = _replaced(args, kwargs, leaves)
        with _seeded(target):
            results = _tensors(target(*called, **named))
        generator = torch.Generator().manual_seed(0)
        cotangents = tuple(
            torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
            if result.requires_grad
            else None
            for result in results
        )
        gradients = _backward(results, cotangents, leaves)
        return cls(target, args, kwargs, operands, tuple(result.detach() for result in results), cotangents, gradients)

    @cached_property
    def tolerance(self) -> float:
        """Largest difference allowed, relative to the numbers that made it: that of the least precise dtype here."""
        inexact = [x.dtype for x in (*self.operands, *self.results) if x.is_floating_point() or x.is_complex()]
        return max((_TOLERANCE.get(dtype, _TOLERANCE_HALF) for dtype in inexact), default=0.0)

    def find_rule(self) -> OpRule | None:
        """The rule of the call; of random numbers, those of one device."""
        found = find_rule(OpCall.of(self.target, self.args, self.kwargs, self.results))
        return None if found is None else found.drawn_serially()


def prove(
    target: Any,
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    *,
    ranks: Sequence[int] = (2, 3),
    rule: OpRule | None = None,
) -> Proof:
    """Run `target(*args, **kwargs)` in shards of every axis that its rule calls shardable, on every number of `ranks`
    that the axis is long enough for.

    rule: the rule to prove; without it, the registered one. Under `torch.no_grad()` only results are compared.

    Raises ProofError where the op has no rule, or the rule promises what the shards do not keep.
    """
    example = Example.of(target, args, kwargs)
    rule = rule or example.find_rule()
    shown = f"{target} with rule `{rule}`"
    if rule is None:
        raise ProofError(f"{target} has no rule for {_shapes(example.operands)} -> {_shapes(example.results)}")
    problem = _misread(example, rule)
    if problem:
        raise ProofError(asked=f"{shown} does not describe the call", found=problem)
    proven: dict[str, tuple[int, ...]] = {}
    for group in rule.cuts():
        for count in ranks:
            for seen in _ways_to_see(rule, group, count):
                problem = difference(example, rule, Cut(count, seen))
                if problem:
                    raise ProofError(
                        asked=f"{shown} cannot shard {_show(rule, seen)} over {count} ranks", found=problem
                    )
                shown_group = " ".join(group)
                if count not in proven.get(shown_group, ()):
                    proven[shown_group] = (*proven.get(shown_group, ()), count)
    return Proof(str(target), rule, tuple(proven.items()))


Seen = tuple[int, int, int]  # an axis as (outer, lead, unit): what is cut is its middle part


@dataclass(frozen=True)
class Cut:
    """What one mesh dim of `ranks` cuts of an op: some axes together, each in its lead part."""

    ranks: int
    seen: Mapping[str, Seen]


def difference(example: Example, rule: OpRule, *cuts: Cut) -> str | None:
    """What goes wrong where ranks cut the op so; None where the shards keep the rule's promise.

    Several cuts are those of the dims of one mesh, each of what the ones before it leave.
    """
    grid = list(itertools.product(*(range(cut.ranks) for cut in cuts)))
    shards = {at: _Shard.of(rule, cuts, at) for at in grid}
    leaves = {
        at: _leaves(
            [shard.part(x, dims) for x, dims in zip(example.operands, rule.inputs, strict=True)], example.operands
        )
        for at, shard in shards.items()
    }

    def on_rank(rank: int) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, ...]] | str:
        at = grid[rank]
        here = shards[at].here(rule)
        try:
            args, kwargs = _replaced(example.args, example.kwargs, leaves[at])
            with _seeded(example.target):
                own = _tensors(rule.call(_run, example.target, args, kwargs, here))
        except Exception as error:  # any op may refuse a shard in its own way
            return f"the call on rank {rank} fails: {error}"
        shapes = tuple(tuple(result.shape) for result in own)
        if shapes != here.outputs:
            return f"rank {rank} makes results of shapes {_shapes(own)} where the rule says {list(here.outputs)}"
        dtypes = [result.dtype for result in own]
        if dtypes != [result.dtype for result in example.results]:
            return f"rank {rank} makes results of {dtypes} where the op makes {[r.dtype for r in example.results]}"
        cotangents = [
            None if whole is None else shards[at].part(whole, dims)
            for whole, dims in zip(example.cotangents, rule.outputs, strict=True)
        ]
        if [result.requires_grad for result in own] != [cotangent is not None for cotangent in cotangents]:
            return f"on rank {rank} other results have a gradient than in the whole call"
        return [result.detach() for result in own], _backward(own, cotangents, leaves[at])

    if rule.communicates:
        found = simulate.run(len(grid), on_rank)
    else:
        found = [on_rank(rank) for rank in range(len(grid))]
    for outcome in found:
        if isinstance(outcome, str):
            return outcome
    results, gradients = zip(*found)

    def compare(
        own: Sequence[torch.Tensor], whole: torch.Tensor, dims: Sequence[Dim], alike: Sequence[bool]
    ) -> str | None:
        wholes = _together(dict(zip(grid, own, strict=True)), shards, cuts, dims, alike)
        return next(filter(None, (_compare(made, whole, own, example.tolerance) for made in wholes)), None)

    # Where the ranks combine what they compute, results without the axis are the same on all of them.
    alike = [rule.reduces.isdisjoint(cut.seen) and not rule.combines.keys().isdisjoint(cut.seen) for cut in cuts]
    for index, (whole, dims) in enumerate(zip(example.results, rule.outputs, strict=True)):
        problem = compare([of_rank[index] for of_rank in results], whole, dims, alike)
        if problem:
            return f"result {index} {problem}"
    for index, (whole, dims) in enumerate(zip(example.gradients, rule.inputs, strict=True)):
        own = [of_rank[index] for of_rank in gradients]
        if whole is None:
            continue
        missing = [rank for rank, gradient in enumerate(own) if gradient is None]
        if missing:
            return (
                f"operand {index} has a gradient, and none on rank {missing[0]}: "
                "collectives in backward would wait for that rank forever"
            )
        problem = compare(own, whole, dims, [False] * len(cuts))
        if problem:
            return f"the gradient of operand {index} {problem}"
    return None


@dataclass(frozen=True)
class _Shard:
    """One rank's part of an op that is cut: where it stands in each cut, and what each cut finds."""

    at: tuple[int, ...]
    slices: tuple[_Slice, ...]

    @classmethod
    def of(cls, rule: OpRule, cuts: Sequence[Cut], at: tuple[int, ...]) -> _Shard:
        sizes, slices = rule.sizes, []
        for cut, rank in zip(cuts, at, strict=True):
            slices.append(_Slice(sizes, cut))
            sizes = {**sizes, **slices[-1].sizes_on(rank)}
        return cls(at, tuple(slices))

    def here(self, rule: OpRule) -> Local:
        sizes: dict[str, int] = {}
        starts: dict[str, int] = {}
        sites: list[tuple[str, Site]] = []
        for mesh_dim, (own, rank) in enumerate(zip(self.slices, self.at, strict=True)):
            others = self.at[:mesh_dim] + self.at[mesh_dim + 1 :]
            sizes |= own.sizes_on(rank)
            for axis, (_, lead, unit) in own.cut.seen.items():
                starts[axis] = starts.get(axis, 0) + shard_range(lead, own.cut.ranks, rank)[0]
                lengths = tuple(shard_sizes(lead, own.cut.ranks))
                sites.append((axis, Site(lengths, rank, f"{mesh_dim} of {others}", unit)))
        return rule.on_rank(sizes, starts, sites)

    def part(self, tensor: torch.Tensor, dims: Sequence[Dim]) -> torch.Tensor:
        """This rank's shard of a whole tensor."""
        for own, rank in zip(self.slices, self.at, strict=True):
            tensor = own.part(tensor, dims, rank)
        return tensor


def _together(
    parts: Mapping[tuple[int, ...], torch.Tensor],
    shards: Mapping[tuple[int, ...], _Shard],
    cuts: Sequence[Cut],
    dims: Sequence[Dim],
    alike: Sequence[bool],
    at: tuple[int, ...] = (),
) -> list[torch.Tensor]:
    """What the parts of the ranks whose place begins with `at` make: where they should be alike, by any of them."""
    if len(at) == len(cuts):
        return [parts[at]]
    own = [_together(parts, shards, cuts, dims, alike, (*at, rank)) for rank in range(cuts[len(at)].ranks)]
    cut = next(shard.slices[len(at)] for place, shard in shards.items() if place[: len(at)] == at)
    if alike[len(at)] and not cut.reaches(dims):
        return [made for of_rank in own for made in of_rank]
    return [cut.together(made, dims) for made in zip(*own, strict=True)]


@dataclass(frozen=True)
class _Slice:
    """One cut of what has `sizes` of the axes."""

    sizes: Mapping[str, int]
    cut: Cut

    def sizes_on(self, rank: int) -> dict[str, int]:
        """A rank's sizes of the axes that are cut."""
        return {
            axis: outer * shard_range(lead, self.cut.ranks, rank)[1] * unit
            for axis, (outer, lead, unit) in self.cut.seen.items()
        }

    def reaches(self, dims: Sequence[Dim]) -> bool:
        return any(axis in self.cut.seen for dim in dims for axis in dim)

    def part(self, tensor: torch.Tensor, dims: Sequence[Dim], rank: int) -> torch.Tensor:
        """One rank's shard of `tensor`; all of it where it does not have the axis."""
        shape, place, axis = self._apart(tensor.shape, dims)
        if place is None:
            return tensor
        lead = shape[place]
        start, length = shard_range(lead, self.cut.ranks, rank)
        merged = [n // lead * length if axis in dim else n for dim, n in zip(dims, tensor.shape)]
        return tensor.reshape(shape).narrow(place, start, length).reshape(merged)

    def together(self, parts: Sequence[torch.Tensor], dims: Sequence[Dim]) -> torch.Tensor:
        """What the ranks' parts of a tensor make: side by side along the axis, or their sum without it."""
        shape = [
            math.prod(self.sizes[axis] for axis in dim) if dim else size for dim, size in zip(dims, parts[0].shape)
        ]
        apart, place, _ = self._apart(shape, dims)
        if place is None:
            return torch.stack([part.double() if part.is_floating_point() else part for part in parts]).sum(0)
        lengths = [shard_range(apart[place], self.cut.ranks, rank)[1] for rank in range(self.cut.ranks)]
        shapes = [[*apart[:place], length, *apart[place + 1 :]] for length in lengths]
        return torch.cat([part.reshape(own) for part, own in zip(parts, shapes, strict=True)], place).reshape(shape)

    def _apart(self, shape: Sequence[int], dims: Sequence[Dim]) -> tuple[list[int], int | None, str]:
        """`shape` with the dim that holds a cut axis taken apart, and where the part that is cut then stands."""
        found: list[int] = []
        place, cut_axis = None, ""
        for dim, size in zip(dims, shape, strict=True):
            if place is not None or not any(axis in self.cut.seen for axis in dim):
                found.append(size)
                continue
            for name in dim:
                if name in self.cut.seen and place is None:
                    place, cut_axis = len(found) + 1, name
                    found += self.cut.seen[name]
                else:
                    found.append(self.sizes[name])
        return found, place, cut_axis


def _ways_to_see(rule: OpRule, group: tuple[str, ...], ranks: int) -> Iterator[dict[str, Seen]]:
    """Each axis as a whole; and, where its size allows, in two parts: of axes that may only be cut into ranges the major
    part is cut, of others the minor one. Nothing where an axis is too short for the ranks."""
    sizes = {axis: rule.sizes[axis] for axis in group}
    if min(sizes.values()) < ranks:
        return
    yield {axis: (1, size, 1) for axis, size in sizes.items()}
    divisors = {
        axis: next((n for n in range(2, size // ranks + 1) if size % n == 0), 1) for axis, size in sizes.items()
    }
    if set(divisors.values()) == {1}:
        return
    in_ranges = rule.cut_into_ranges(group)
    yield {
        axis: (1, size // divisors[axis], divisors[axis]) if in_ranges else (divisors[axis], size // divisors[axis], 1)
        for axis, size in sizes.items()
    }


def _show(rule: OpRule, seen: Mapping[str, Seen]) -> str:
    shown = []
    for axis, (outer, lead, unit) in seen.items():
        size = rule.sizes[axis]
        part = f"the minor part of {axis} ({outer}·{lead})" if outer > 1 else axis
        shown.append(f"{part} (size {size}{f' in units of {unit}' if unit > 1 else ''})")
    return ", ".join(shown)


def _misread(example: Example, rule: OpRule) -> str | None:
    """Where the rule's notation does not fit the shapes, or a view does more than rename elements."""
    if len(rule.inputs) != len(example.operands) or len(rule.outputs) != len(example.results):
        return f"it has {counted(len(example.operands), 'tensor operand')} and {counted(len(example.results), 'result')}"
    for kind, group, tensors in (
        ("operand", rule.inputs, example.operands),
        ("result", rule.outputs, example.results),
    ):
        for index, (dims, tensor) in enumerate(zip(group, tensors, strict=True)):
            # A dim of an operand may stand for no axis at all: the op only looks at it.
            written = [
                math.prod(rule.sizes[axis] for axis in dim) if dim or kind == "result" else size
                for dim, size in zip(dims, tensor.shape)
            ]
            if len(dims) != tensor.ndim or written != list(tensor.shape):
                return f"{kind} {index} has shape {list(tensor.shape)} and the rule reads {written}"
    if rule.is_view:
        if len(example.operands) != 1 or len(example.results) != 1:
            return "a view has one operand and one result"
        before, after = (tensor.flatten().sort().values for tensor in (*example.operands, *example.results))
        if before.dtype != after.dtype or not torch.equal(before, after):
            return "the result of a view has the operand's elements, and this one has others"
    return None


@contextmanager
def _seeded(target: Any) -> Iterator[None]:
    """Inside, an op that draws random numbers draws the same ones each time; afterwards the generator is as before."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _leaves(tensors: Sequence[torch.Tensor], held: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Contiguous copies (an op may keep or change its operand) that gradients reach, but for those of an `nn.Buffer`.

    held: the whole operands, where `tensors` are parts of them."""
    copies = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    return [
        copy.requires_grad_((copy.is_floating_point() or copy.is_complex()) and not isinstance(whole, nn.Buffer))
        for copy, whole in zip(copies, held or tensors, strict=True)
    ]


def _replaced(args: tuple, kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments with `tensors` for their tensors, in order."""
    following = iter(tensors)
    return pytree.tree_map_only(torch.Tensor, lambda _: next(following), (args, dict(kwargs)))


def _backward(
    results: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor | None], leaves: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    pairs = [(result, cotangent) for result, cotangent in zip(results, cotangents) if cotangent is not None]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return tuple(None for _ in leaves)
    outputs, grad_outputs = zip(*pairs)
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True))
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def _compare(own: torch.Tensor, whole: torch.Tensor, parts: Sequence[torch.Tensor], tolerance: float) -> str | None:
    if not (whole.is_floating_point() or whole.is_complex()):
        count = (own != whole).sum().item()
        return f"differs in {count} of {whole.numel()} elements" if count else None
    exact = torch.complex128 if whole.is_complex() else torch.float64
    own, reference = own.to(exact), whole.to(exact)
    same = (own == reference) | (own.isnan() & reference.isnan())
    gap = torch.where(same, 0, own - reference).abs().nan_to_num(torch.inf).max().item()
    # Parts that add up are rounded as what they are, which may be more than their sum.
    largest = [x.to(exact).abs().nan_to_num(0, 0, 0).max().item() for x in (whole, *parts) if x.numel()]
    scale = max(1.0, *largest)
    if gap > tolerance * scale:
        return f"differs by up to {gap:.3g} (its largest element is {scale:.3g})"
    return None


def _shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]
