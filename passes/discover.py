"""Discover: the rule of an op that nobody wrote one for, found by running it.

    base     sizes on which the op runs: small ones, where need be (a kernel's blocks, a number of heads) the call's own
    axes     each dim is made longer and shorter. Dims that the op takes so only together are one axis, and the dims of
             results that then change alike have it too
    claims   each axis is cut and the shards put together again as for a proof (`prove.difference`), on several sizes and
             dtypes, on numbers with outliers, and at the length that it has in the call. Where that gives what the whole
             gives the axis is parallel, or reduces; else it is whole

A check that could not fail claims nothing: results must differ along the axis. Everything is drawn from fixed seeds and
bounded by counts, never by time, so that all ranks come to the same rule. What was found is kept on disk (`rule_cache`).
"""

from __future__ import annotations

import itertools
import logging
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dsp_auto.errors import RuleError

from . import rule_cache
from .notation import OpCall, OpRule, Shape, from_notation
from .prove import Cut, Example, difference
from .register import read_rule, show
from .trial import LARGEST, Inputs, NeverRan, Trial, Unfit, apart, refuse_by_declaration

Place = tuple[int, int]  # operand or result, dim
Sizes = Mapping[Place, int]

_log = logging.getLogger(__name__)
_RUNS = 600
_RANKS = (2, 3)
# Sizes of axes, in two orders: primes first, so that nothing fits by accident; and with minor parts to cut.
_FIRST, _SECOND = (5, 7, 6, 9, 8, 11, 10, 13), (8, 6, 9, 10, 12, 7, 4, 11)
_INTEGER_FIRST, _INTEGER_SECOND = (7, 9, 8, 11, 10, 13, 6, 12), (8, 6, 9, 10, 12, 7, 13, 11)


@dataclass(frozen=True)
class Discovery:
    """What trying an op out gave: its rule, or why it has none, and what the op said then; on what the rule was checked."""

    rule: OpRule | None
    why: str = ""
    detail: str = ""
    checked: str = ""


_known: dict[str, dict[str, Any]] = {}


def discover(call: OpCall) -> Discovery:
    """The rule of `call`, from the cache or by trying the op out; with gradients where grad mode is on.

    Nothing of the caller's changes: random states, modes and tensors stay as they are.
    """
    try:
        refuse_by_declaration(call)
    except Unfit as unfit:
        return Discovery(None, unfit.reason)
    key = _key(call)
    if key not in _known:
        kept = rule_cache.read(key)
        if kept is None or (kept["rule"] is not None and _fit(kept["rule"], call) is None):
            kept = _search(call)
            if kept.pop("lasting"):
                rule_cache.write(key, {"op": str(call.target), **kept})
        _known[key] = kept
    found = _known[key]
    rule = None if found["rule"] is None else _fit(found["rule"], call)
    return Discovery(rule, found.get("why", ""), found.get("detail", ""), found.get("checked", ""))


def _key(call: OpCall) -> str:
    """All that the rule may depend on: the call, what the op and torch are, and whether gradients are asked for."""
    gradients = "gradients" if torch.is_grad_enabled() else "no gradients"
    versions = (f"torch {torch.__version__}", rule_cache.library(call.target))
    return " | ".join(
        (str(call.target._schema), repr((call.args, dict(call.kwargs))), str(call.outputs), gradients, *versions)
    )


def _fit(text: str, call: OpCall) -> OpRule | None:
    try:
        notation, kinds = read_rule(text)
        return from_notation(notation, call, whole=kinds["whole"], moved=kinds["moved"], reduces=kinds["reduces"])
    except RuleError as error:
        _log.warning("ignoring the rule kept for %s: %s", call.target, error)
        return None


def _search(call: OpCall) -> dict[str, Any]:
    """A record for the cache; `lasting` where another computer would come to the same."""
    complaint = ""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        with apart(device):
            search = _Search(Trial(call, device))
            try:
                found, checked = search.rule()
                _log.info("found the rule of %s by running it: %s (%s)", call.target, found, checked)
                return {"rule": found, "checked": checked, "lasting": True}
            except NeverRan as unfit:
                reason, complaint = unfit.reason, complaint or unfit.detail
            except Unfit as unfit:
                return {"rule": None, "why": unfit.reason, "detail": unfit.detail, "lasting": True}
    reason += "" if "cuda" in devices else ", and this computer has no GPU to try it on"
    return {"rule": None, "why": reason, "detail": complaint, "lasting": False}


@dataclass(frozen=True)
class _Axis:
    """Dims of operands that the op takes only together, and the dims of results that change as they do.

    divisible: it takes several sizes, shorter ones too, and no other dim of a result changes with it.
    """

    name: str
    places: tuple[Place, ...]
    results: frozenset[Place]
    divisible: bool


class _Search:
    """One call's rule. `base` are sizes, on which the op runs, of all dims that are longer than one in the call."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.call = trial, trial.call
        self.places = [(o.index, dim) for o in self.call.operands for dim, size in enumerate(o.shape) if size != 1]
        self.left = _RUNS
        self.ran: dict[Inputs, list[Shape] | None] = {}
        self.examples: dict[Inputs, Example | None] = {}
        self.base: Sizes = {}

    def rule(self) -> tuple[str, str]:
        """The rule's text, and what it was checked on. Raises Unfit where there is none."""
        self.base = self._base()
        inputs = self._inputs(self.base)
        results = self.trial.run(inputs) or []
        self.trial.positive = not all(bool(result.isfinite().all()) for result in results)
        self.trial.check_is_function(inputs)
        self._check_gradient(inputs)
        axes = list(self._axes())
        self.left = _RUNS
        claimed = {axis.name: self._claim(axis, axes) for axis in axes if axis.divisible}
        for parts in self._equal([axis for axis in axes if axis.divisible and not claimed[axis.name]]):
            if not any(claimed[axis.name] for axis in parts):
                axis = _together(parts)
                merged = [axis if own is parts[0] else own for own in axes if own not in parts[1:]]
                longest = self._claim(axis, merged)
                if longest:
                    axes = merged
                    claimed.update({own.name: longest for own in parts})
        return self._told(axes, claimed)

    def _told(self, axes: Sequence[_Axis], claimed: Mapping[str, int | None]) -> tuple[str, str]:
        """The text of the rule with these claims, and what they were checked on."""
        notation, others = self._notation(axes)
        lengths = {axis.name: claimed[axis.name] for axis in axes if claimed.get(axis.name)}
        if not lengths:
            raise Unfit("no dim of its operands can be shared out")
        everywhere = {axis.name for axis in axes if self._is_everywhere(axis)}
        kinds = {
            "whole": {*others, *(axis.name for axis in axes)} - lengths.keys(),
            "reduces": lengths.keys() - everywhere,
        }
        dtypes = {str(inputs.dtype or self.trial.dtype or "integers") for inputs, own in self.examples.items() if own}
        where = ", ".join(f"{axis} up to {longest}" for axis, longest in lengths.items())
        passes = "forward and backward" if torch.is_grad_enabled() else "forward"
        return show(notation, kinds), f"{where}; {', '.join(sorted(dtypes))}; {passes}"

    def _is_everywhere(self, axis: _Axis) -> bool:
        return len({index for index, _ in axis.results}) == len(self.call.outputs)

    def _equal(self, axes: Sequence[_Axis]) -> Iterator[tuple[_Axis, ...]]:
        """Axes that are equally long in the call and stand in different operands and results, most of them first: an op of
        several results may let each be longer than the others, and still be cut only together."""
        for count in range(len(axes), 1, -1):
            for parts in itertools.combinations(axes, count):
                for places in ([p for axis in parts for p in axis.places], [r for axis in parts for r in axis.results]):
                    if len({index for index, _ in places}) < len(places):
                        break
                else:
                    if len({self._size(axis.places[0]) for axis in parts}) == 1:
                        yield parts

    # --- sizes that the op takes

    def _inputs(self, sizes: Sizes, **more: Any) -> Inputs:
        shapes = tuple(
            tuple(sizes.get((operand.index, dim), 1) for dim in range(len(operand.shape)))
            for operand in self.call.operands
        )
        return Inputs(shapes, **more)

    def _shapes(self, sizes: Sizes) -> list[Shape] | None:
        """Shapes of the results; None where the op does not take operands of these sizes."""
        inputs = self._inputs(sizes)
        if inputs not in self.ran:
            if inputs.elements > LARGEST or self.left == 0:
                return None
            self.left -= 1
            results = self.trial.run(inputs)
            shapes = [tuple(result.shape) for result in results or []]
            same = [len(s) for s in shapes] == [len(s) for s in self.call.outputs] and all(0 not in s for s in shapes)
            self.ran[inputs] = shapes if same else None
        return self.ran[inputs]

    def _base(self) -> Sizes:
        """Dims that are equal in the call stay equal; as many of them as the op lets have small sizes of their own."""
        classes: dict[int, list[Place]] = {}
        for index, dim in self.places:
            classes.setdefault(self.call.operands[index].shape[dim], []).append((index, dim))
        # Tensors of many dims get shorter ones, to stay small.
        free = dict(zip(classes, _primes(5 if max(len(o.shape) for o in self.call.operands) < 6 else 3)))
        for count in range(len(classes) + 1):
            for chosen in itertools.combinations(classes, count):
                for own in itertools.product(*(self._compatible(size) for size in chosen)):
                    size_of = {**free, **dict(zip(chosen, own))}
                    sizes = {place: size_of[size] for size, places in classes.items() for place in places}
                    if self._shapes(sizes) is not None:
                        return sizes
                    if self.left == 0:
                        raise NeverRan(self.trial.complaint)
        raise NeverRan(self.trial.complaint)

    def _compatible(self, size: int) -> list[int]:
        """Sizes for a dim of `size` of an op that does not take any: of whole blocks, of a number of heads that is an
        argument, or `size` itself."""
        leaves = pytree.tree_leaves((self.call.args, dict(self.call.kwargs)))
        numbers = [leaf for leaf in leaves if isinstance(leaf, int) and 1 < leaf < size and size % leaf == 0]
        blocks = [16, 64, 256, 1024] + [factor * number for number in numbers for factor in (2, 8)]
        small = {size} if size <= 64 else set()
        return [*sorted(small | {block for block in blocks if size % block == 0 and block < size}), *({size} - small)]

    # --- axes

    def _axes(self) -> Iterator[_Axis]:
        """Of the dims that are equal in the call, the smallest groups that can change their size together."""
        names = _letters()
        left = list(self.places)
        while left:
            first = left[0]
            same = [place for place in left[1:] if self._size(place) == self._size(first) and place[0] != first[0]]
            found = None
            for count in range(len(same) + 1):
                for rest in itertools.combinations(same, count):
                    if len({index for index, _ in rest}) < count:
                        continue  # an axis stands once in an operand
                    answer = self._answer((first, *rest))
                    if answer is not None and (found is None or answer.divisible):
                        found = answer
                    if found is not None and found.divisible:
                        break
                if found is not None and found.divisible:
                    break
            found = found or _Axis("", (first,), frozenset(), False)
            yield replace(found, name=next(names))
            left = [place for place in left if place not in found.places]

    def _size(self, place: Place) -> int:
        return self.call.operands[place[0]].shape[place[1]]

    def _answer(self, places: tuple[Place, ...]) -> _Axis | None:
        """What results do where these dims get longer and shorter; None where the op does not take them longer."""
        size, before = self.base[places[0]], self._shapes(self.base) or []
        prime, larger = itertools.islice((n for n in _primes(size + 1) if n not in self.base.values()), 2)
        shorter = (size - 2, size // 2) if size > 3 else (larger,)
        changed: list[tuple[int, list[Shape]]] = []
        for sizes in ((prime, 2 * size), shorter):
            tried = ((new, self._shapes({**self.base, **dict.fromkeys(places, new)})) for new in sizes)
            changed += itertools.islice(((new, shapes) for new, shapes in tried if shapes is not None), 1)
            if not changed:
                return None
        follows, entangled = set(), False
        for index, shape in enumerate(before):
            for dim, old in enumerate(shape):
                now = [(shapes[index][dim], new) for new, shapes in changed]
                if old == size and all(a == b for a, b in now):
                    follows.add((index, dim))
                elif any(a != old for a, _ in now):
                    entangled = True
        once = len({index for index, _ in follows}) == len(follows)
        return _Axis("", places, frozenset(follows), len(changed) == 2 and once and not entangled)

    def _notation(self, axes: Sequence[_Axis]) -> tuple[str, list[str]]:
        """The dims of operands and results, and the axes of results that are no operand's."""
        operands = {place: axis.name for axis in axes for place in axis.places}
        results: dict[Place, str] = {}
        for axis in axes:
            results.update(dict.fromkeys(axis.results, axis.name))
        names = itertools.islice(_letters(), len(axes), None)
        others = []
        for index, shape in enumerate(self.call.outputs):
            for dim, size in enumerate(shape):
                if size != 1 and (index, dim) not in results:
                    results[index, dim] = next(names)
                    others.append(results[index, dim])
        groups = [
            ", ".join(
                " ".join(names.get((index, dim), "1") for dim in range(len(shape)))
                for index, shape in enumerate(shapes)
            )
            for names, shapes in ((operands, [o.shape for o in self.call.operands]), (results, self.call.outputs))
        ]
        return " -> ".join(groups), others

    # --- claims

    def _check_gradient(self, inputs: Inputs) -> None:
        if torch.is_grad_enabled() and self.trial.example(inputs) is None:
            raise Unfit("it has no gradient", self.trial.complaint)

    def _claim(self, axis: _Axis, axes: Sequence[_Axis]) -> int | None:
        """The longest that the axis was when its shards gave what the whole gives; None where they once did not."""
        notation, _ = self._notation(axes)
        longest = 0
        for inputs, needed in self._samples(axis, axes):
            if inputs not in self.examples:
                self.examples[inputs] = self.trial.example(inputs)
            example = self.examples[inputs]
            if example is None:
                if needed:
                    return None
                continue
            call = OpCall.of(example.target, example.args, example.kwargs, example.results)
            try:
                rule = from_notation(notation, call)
            except RuleError:
                return None
            size = rule.sizes[axis.name]
            for ranks in _RANKS if inputs.elements < LARGEST // 8 else _RANKS[:1]:
                for outer in (1, 2) if size % 2 == 0 else (1,):
                    if size // outer >= ranks and _differs(example, rule, axis.name, ranks, outer):
                        return None
            if not longest:
                if not _could_fail(example, rule, axis):
                    return None
                if self._is_everywhere(axis) and not self.trial.is_same_alone(
                    inputs, dict(axis.places), dict(axis.results)
                ):
                    return None
            longest = max(longest, size)
        return longest or None

    def _samples(self, axis: _Axis, axes: Sequence[_Axis]) -> Iterator[tuple[Inputs, bool]]:
        """Inputs to check the axis on, and whether the op must take them. Where there are integers, first such as are
        below every shard's sizes: they may be indices, and no shard may look up what it does not have."""
        free = [own for own in axes if own.divisible]
        integers = self.trial.has_integers
        for number, order in enumerate((_INTEGER_FIRST, _INTEGER_SECOND) if integers else (_FIRST, _SECOND)):
            sizes = dict(self.base)
            for own, size in zip(free, itertools.cycle(order)):
                sizes.update(dict.fromkeys(own.places, size))
            if self._shapes(sizes) is None:  # more belongs together than single dims show
                sizes = {**self.base, **dict.fromkeys(axis.places, order[0] + number)}
            limit = min(sizes.values())
            if integers:
                yield self._inputs(sizes, limit=max(1, min(limit, sizes[axis.places[0]] // max(_RANKS)))), True
            yield self._inputs(sizes, limit=limit, outliers=bool(number)), True
            for dtype in _others(self.trial.dtype) if number == 0 else ():
                yield self._inputs(sizes, limit=limit, dtype=dtype), False
        sizes = {**self.base, **{place: 2 for own in free for place in own.places}}
        size = self._size(axis.places[0])
        while True:
            for others in (sizes, self.base):
                long = {**others, **dict.fromkeys(axis.places, size)}
                if self._shapes(long) is not None:
                    yield self._inputs(long, limit=min(long.values())), True
                    return
            if size <= max(_RANKS):
                return
            size //= 2


def _together(parts: Sequence[_Axis]) -> _Axis:
    places = tuple(place for axis in parts for place in axis.places)
    return replace(parts[0], places=places, results=frozenset().union(*(axis.results for axis in parts)))


def _differs(example: Example, rule: OpRule, axis: str, ranks: int, outer: int = 1) -> bool:
    """Whether shards of `axis`, seen as `(outer, minor)`, do not give what the whole call gives."""
    cut = Cut(ranks, {axis: (outer, rule.sizes[axis] // outer, 1)})
    try:
        return difference(example, rule, cut) is not None
    except Exception:  # the op's own: a backward that takes whole operands only
        return True


def _could_fail(example: Example, rule: OpRule, axis: _Axis) -> bool:
    """Whether the check of the axis would see results that are not those of the whole call: it cannot where they are the
    same all along the axis, or next to nothing."""
    dims = dict(axis.results)
    for index, result in enumerate(example.results):
        other = result.roll(1, dims[index]) if index in dims else result + result
        results = (*example.results[:index], other, *example.results[index + 1 :])
        if not _differs(replace(example, results=results), rule, axis.name, 2):
            return False
    return True


def _others(dtype: torch.dtype | None) -> list[torch.dtype]:
    """Dtypes to check with beside the call's own."""
    if dtype is None or dtype.is_complex:
        return []
    return [other for other in (torch.float32, torch.bfloat16) if other != dtype]


def _primes(least: int) -> Iterator[int]:
    return (n for n in itertools.count(max(least, 2)) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _letters() -> Iterator[str]:
    for number in itertools.count():
        yield from (letter + (str(number) if number else "") for letter in string.ascii_lowercase)
