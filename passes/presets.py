"""Presets: which strategies each system of the paper may pick from. One search space, and restrictions of it.

    dsp          sequence factors, resharded between stages
    ulysses      one sequence; heads inside attention, where no weight is
    megatron-lm  weights in parts, along hidden dims and heads; activations whole in between
    megatron-sp  the same with activations cut along one sequence in between
    ring         one sequence everywhere; keys and values go round
    auto         all of it, and batch

A preset is turned into *spaces*: the same model and devices seen in one way each. There is one for each sequence that a preset
of one sequence could take; the planner solves all of them and keeps the best plan.

`auto` first takes the union of all that leaves parameters whole. That is the best plan unless a preset sends less for more
memory than the union's bound has, or Megatron's way sends less; only where that may be are these looked at too (`when`), and so
without a capacity `auto` never sends more than any preset does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsp_auto.errors import MeshError, NoShardableFactorError, StrategyError
from dsp_auto.mesh import Mesh
from dsp_auto.units import counted

from .factors import Factors

# A preset of one sequence tries those of a model's sequences that so large a share of the bytes has that the first one has.
WORTH_TRYING = 0.5
# A factor is worth splitting a mesh dim for where what has it is at least this share of what has the most common one.
WORTH_SPLITTING = 0.2
# Where ops can be cut in more ways than this, in the mean, one more mesh dim makes the problem too large; and there are other
# ways to cut.
FEW_CHOICES = 4.0


@dataclass(frozen=True)
class Preset:
    """What may be cut.

    kinds: kinds of factor (see `kinds`). needs: one without which the preset is not what its name says.
    one_sequence: of sequence factors, those of one sequence. weights: along the factors of weights too. held: parameters may be
    held in parts. ring: whether keys and values "may" or "must" go round where one op is all of attention.
    everywhere: a kind that an op is cut along wherever it has it; inside: where it computes over the one sequence.
    splits: a mesh dim may be split where it is longer than a factor, and there are no two sequences as long as it.
    """

    kinds: frozenset[str]
    needs: str = ""
    one_sequence: bool = False
    weights: bool = False
    held: bool = False
    ring: str = ""
    everywhere: str = ""
    inside: str = ""
    splits: bool = False


def _kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


_MEGATRON = Preset(_kinds("inner"), needs="inner", weights=True, held=True, everywhere="inner")
_AUTO = Preset(_kinds("sequence", "batch", "heads"), ring="may", splits=True)
PRESETS: Mapping[str, Preset] = {
    "dsp": Preset(_kinds("sequence"), splits=True),
    "ulysses": Preset(_kinds("sequence", "heads"), needs="heads", one_sequence=True, inside="heads"),
    "megatron-lm": _MEGATRON,
    "megatron-sp": replace(_MEGATRON, kinds=_kinds("sequence", "inner"), one_sequence=True),
    "ring": Preset(_kinds("sequence"), one_sequence=True, ring="must"),
    "auto": _AUTO,
}
# When a space is looked at: at once; where a plan with more memory might send less; where one with parameters in parts might;
# then last, and not for long, the union with parameters in parts, which is the largest.
ALWAYS, MEMORY, PARAMETERS, UNION = "always", "memory", "parameters", "union"
_IN_PARTS = replace(_AUTO, kinds=_AUTO.kinds | {"inner"}, weights=True, held=True)
# For `auto` where nothing that it may cut is long enough.
_ANYTHING = replace(_AUTO, kinds=_kinds("sequence", "batch", "feature"), weights=True)
_NAMES = {"inner": "hidden dim or heads", "heads": "heads of attention"}


@dataclass(frozen=True)
class Space:
    """What may be cut over each dim of `mesh` by one preset, and when to look at it.

    factors: per mesh dim. weights: ops may be cut along the factors of their weights. held: parameters may be held in parts.
    ring: see `Preset`. everywhere: factors that an op is cut along wherever it has one of them; inside: where it computes over
    a factor of `sequence`.
    """

    mesh: Mesh
    factors: tuple[frozenset[int], ...]
    weights: bool = True
    held: bool = False
    ring: str = "may"
    everywhere: frozenset[int] = frozenset()
    inside: frozenset[int] = frozenset()
    sequence: frozenset[int] = frozenset()
    preset: str = ""
    when: str = ALWAYS

    @property
    def anywhere(self) -> frozenset[int]:
        return frozenset().union(*self.factors)


def check_preset(strategy: str) -> None:
    """Raises StrategyError for a strategy that does not exist."""
    if strategy not in PRESETS:
        raise StrategyError(asked=f"strategy {strategy!r}", found="no such strategy", remedy=f"use one of {', '.join(PRESETS)}")


def find_spaces(
    factors: Factors, mesh: Mesh, strategy: str, shard_parameters: bool | None = None
) -> tuple[Space, ...]:
    """The spaces of a strategy, the most promising first; at least one.

    shard_parameters: whether parameters may be held in parts; None: where the strategy has it so.
    Raises NoShardableFactorError where the model has no factor of the kind, MeshError where each is shorter than the mesh dim.
    """
    check_preset(strategy)
    if strategy != "auto":
        held = PRESETS[strategy].held and shard_parameters is not False
        return _spaces(factors, mesh, strategy, replace(PRESETS[strategy], held=held))
    found: list[Space] = []
    try:
        found += _spaces(factors, mesh, "auto", _IN_PARTS if shard_parameters else _AUTO)
    except MeshError:
        return _spaces(factors, mesh, "auto", _ANYTHING)
    others = [
        (name, preset, PARAMETERS if preset.held else MEMORY)
        for name, preset in PRESETS.items()
        if name != "auto" and (shard_parameters is not False or not preset.held)
    ]
    others += [("auto", _IN_PARTS, UNION)] if shard_parameters is None else []
    for name, preset, when in others:
        try:
            found += [replace(space, when=when) for space in _spaces(factors, mesh, name, preset)]
        except (MeshError, NoShardableFactorError):
            continue  # this model is none for that preset
    return tuple(found)


def _spaces(factors: Factors, mesh: Mesh, strategy: str, preset: Preset) -> tuple[Space, ...]:
    rest: dict[str, Any] = {"weights": preset.weights, "held": preset.held, "ring": preset.ring, "preset": strategy}
    if mesh.ranks == 1:
        return (Space(mesh, tuple(frozenset() for _ in mesh.sizes), **rest),)
    cut = factors.cut
    split = mesh
    if preset.splits and not has_several_sequences(factors, mesh):
        which = cut & _of_kinds(factors, preset.kinds)
        split = _split(factors, mesh, which) if _choices(factors, which) <= FEW_CHOICES else mesh
    rest |= {name: _of_kinds(factors, {getattr(preset, name)}) for name in ("everywhere", "inside")}
    found = []
    for sequence in _sequences(factors, cut, mesh) if preset.one_sequence else (frozenset(),):
        fitting = _fitting(factors, split, strategy, preset, cut, sequence)
        if preset.needs:
            _check_needed(factors, split, strategy, preset.needs, fitting)
        if preset.ring == "must":
            _check_ring(factors, strategy)
        found.append(Space(split, fitting, sequence=sequence, **rest))
    return tuple(found)


def least_of_megatron(factors: Factors, ranks: int, training: bool) -> float:
    """Wire bytes per device below which no plan comes that cuts every weight it can along its hidden dim or heads: what an op
    with a contracted weight makes is summed over the ranks, by a reduce-scatter at least, whose backward is an all-gather."""
    moved = 0
    cut = {factor for factor in factors.inner if factors.sizes[factor] >= ranks}
    for op in factors.ops:
        weights = [operand[0] in factors.weights for operand in op.operands]
        if op.rule is None or not any(weights) or all(weights) or not op.rule.contracts:
            continue
        if any(cut.intersection(op.axes[axis]) for axis in op.rule.reduces):
            moved += sum(factors.values[result].nbytes for result in op.results)
    return (2 if training else 1) * moved * (ranks - 1) / ranks


def has_several_sequences(factors: Factors, mesh: Mesh) -> bool:
    """Whether there is another sequence to go to from any: two that are long enough for each mesh dim."""
    cut = factors.cut
    long = [group for group in factors.sequences if max(factors.sizes[f] for f in group) >= max(mesh.sizes) and group & cut]
    return len(long) > 1


def _of_kinds(factors: Factors, kinds: Collection[str]) -> frozenset[int]:
    own = {factor for factor, kind in factors.kinds.items() if kind in kinds}
    return frozenset(
        own | (factors.heads if "heads" in kinds else set()) | (factors.inner if "inner" in kinds else set())
    )


def _nbytes(factors: Factors, which: Collection[int]) -> dict[int, int]:
    """Of each factor, the bytes of all results that have it."""
    found = dict.fromkeys(which, 0)
    for op in factors.ops:
        for value in (factors.values[result] for result in op.results if not op.is_view):
            for factor in found.keys() & set(value.factors):
                found[factor] += value.nbytes
    return found


def _sequences(factors: Factors, cut: frozenset[int], mesh: Mesh) -> Sequence[frozenset[int]]:
    """The model's sequences that are long enough to be cut over the mesh, that of most bytes first."""
    long = [group & cut for group in factors.sequences]
    long = [group for group in long if any(factors.sizes[factor] >= mesh.ranks for factor in group)]
    nbytes = _nbytes(factors, frozenset().union(*long))
    most = {group: max(nbytes[factor] for factor in group) for group in long}
    worth = [group for group in long if most[group] >= WORTH_TRYING * max(most.values())]
    return sorted(worth, key=lambda group: -most[group]) or (frozenset(),)


def _choices(factors: Factors, which: frozenset[int]) -> float:
    """In how many ways an op can be cut along some of the factors, in the mean."""
    found = [sum(which.issuperset(op.factors(cut)) for cut in op.cuts) for op in factors.ops if not op.is_view]
    return sum(found) / max(len(found), 1)


def _split(factors: Factors, mesh: Mesh, which: frozenset[int]) -> Mesh:
    """The mesh with a dim that is longer than an important factor split in two, so that the factor can take one of them."""
    nbytes = _nbytes(factors, which)
    worth = [factor for factor in which if nbytes[factor] >= WORTH_SPLITTING * max(nbytes.values())]
    parts = []
    for size in mesh.sizes:
        divisors = [_divisor(size, factors.sizes[factor]) for factor in worth if factors.sizes[factor] < size]
        best = max(divisors, default=1)
        parts.append((best, size // best) if best > 1 else (size,))
    return mesh.split(parts)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is not above `most`."""
    return max(n for n in range(1, most + 1) if size % n == 0)


def _fitting(
    factors: Factors, mesh: Mesh, strategy: str, preset: Preset, cut: frozenset[int], sequence: frozenset[int]
) -> tuple[frozenset[int], ...]:
    """Per mesh dim, what is long enough of what the preset may cut."""
    wanted = cut & _of_kinds(factors, preset.kinds)
    if preset.one_sequence:
        wanted = frozenset(f for f in wanted if f in sequence or factors.kinds[f] != "sequence")
    found = []
    for name, size in zip(mesh.part_of, mesh.sizes, strict=True):
        fitting = frozenset(factor for factor in wanted if factors.sizes[factor] >= size > 1)
        if size > 1 and not fitting:
            raise _nothing(factors, mesh, strategy, name, sorted(wanted), preset.kinds)
        found.append(fitting)
    return tuple(found)


def _nothing(
    factors: Factors, mesh: Mesh, strategy: str, name: str, wanted: Sequence[int], kinds: Collection[str]
) -> NoShardableFactorError | MeshError:
    if not wanted:
        shown = " or ".join(_NAMES.get(kind, kind) for kind in sorted(kinds))
        return NoShardableFactorError(
            asked=f"strategy {strategy!r} over mesh {mesh}",
            found=f"the model has no {shown} factor that any op computes in parallel (its factors: "
            f"{_describe(factors, list(factors.kinds))})",
            remedy="this model has nothing to share out along a sequence; use data parallelism",
        )
    longest = max(wanted, key=lambda factor: factors.sizes[factor])
    parts = [mesh.sizes[m] for m in mesh.dims_of(name)]
    shorter = "shorter" if len(parts) == 1 else f"shorter than {max(parts)}, a part of {' x '.join(map(str, parts))}"
    return MeshError(
        asked=f"cannot shard over mesh dim {name} of {mesh.whole[name]} ranks",
        found=f"every factor that strategy {strategy!r} may shard is {shorter}: {_describe(factors, wanted)}",
        remedy=f"use at most {counted(factors.sizes[longest], 'rank')} on a mesh dim",
    )


def _check_needed(
    factors: Factors, mesh: Mesh, strategy: str, kind: str, fitting: Sequence[frozenset[int]]
) -> None:
    needed = _of_kinds(factors, {kind})
    for name, size, own in zip(mesh.names, mesh.sizes, fitting, strict=True):  # no preset that needs a kind splits dims
        if size > 1 and not own & needed:
            shown = _describe(factors, sorted(needed)) or "none"
            raise NoShardableFactorError(
                asked=f"strategy {strategy!r} over mesh dim {name} of {size} ranks",
                found=f"the model has no {_NAMES[kind]} of so many (it has {shown})",
                remedy="use fewer ranks, or another strategy",
            )


def _check_ring(factors: Factors, strategy: str) -> None:
    if not any(op.rule is not None and op.rule.rings for op in factors.ops):
        raise NoShardableFactorError(
            asked=f"strategy {strategy!r}",
            found="the model has no attention whose keys and values can go round: none is one op without dropout",
            remedy="write attention as scaled_dot_product_attention, or use another strategy",
        )


def _describe(factors: Factors, which: Sequence[int], limit: int = 8) -> str:
    shown = [f"{factors.names[f]}={factors.sizes[f]} ({factors.kinds[f]})" for f in which[:limit]]
    return ", ".join(shown) + (", …" if len(which) > limit else "")
