"""An op's rule: which dims of its operands and results are the same axis, and what may be sharded.

Written the way einops and Shardy write it, `... k, o k, o -> ... o`: one group per tensor operand, one per result;
a name is an axis, `(b t)` a dim that merges two axes (major first), `1` a dim of size one, `_` a dim of an operand
that the op does not read (`type_as`), `...` the leading dims that operands share by broadcasting. An axis is *parallel*
(shards compute independently) unless the rule says otherwise:

    whole    the op computes over it (softmax, attention's keys): every rank needs all of it
    moved    the op moves data along it (sort, scatter): every rank needs all of it, but it is no sign of a sequence
    reduces  the op sums it away: shards give Partial results
    ranges   axes that are cut together, and only into ranges: what a rank computes depends on where its part begins.
             A *window* then says which range of an operand a range of a result needs (convolution, slice, cat, roll)
    combines the op computes over it in a way that ranks can share: they exchange statistics inside the op
    rings    axes that are cut together, queries and keys of an attention: blocks of keys and values go round the ranks

An axis of a result that no operand has (`expand`) is parallel too: each rank makes its part. An operand that lacks a
sharded axis is used by sharded work, so it must be Replicate with a Partial gradient.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dsp_auto.errors import RuleError
from dsp_auto.shards import exchanged, wrapped
from dsp_auto.units import counted

Dim = tuple[str, ...]
Shape = tuple[int, ...]
ELLIPSIS = "..."
UNREAD: Dim = ("_",)


@dataclass(frozen=True)
class Operand:
    """Stands for the `index`-th tensor operand in an `OpCall`'s arguments."""

    index: int
    shape: Shape
    dtype: torch.dtype = torch.float32
    # Where numbers are drawn the order in memory matters, and nowhere else.
    stride: tuple[int, ...] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class OpCall:
    """One call of an op as a rule sees it: tensors are `Operand`s, everything else is as in the graph.

    Exported graphs give by position whatever the schema lets them, which is where a rule's `local` looks for it.
    """

    target: Any
    args: tuple
    kwargs: Mapping[str, Any]
    outputs: tuple[Shape, ...]
    same_dtype: bool = True  # the results have the first operand's dtype

    @classmethod
    def of(cls, target: Any, args: tuple, kwargs: Mapping[str, Any], results: Sequence[torch.Tensor]) -> OpCall:
        """The call of `target` on tensors (real or fake) that gave the tensors `results`."""
        operands: list[torch.Tensor] = []

        def marked(argument: Any) -> Any:
            # An op's arguments are nested in lists and tuples only; pytree takes three times as long.
            if isinstance(argument, torch.Tensor):
                operands.append(argument)
                return Operand(len(operands) - 1, tuple(argument.shape), argument.dtype, argument.stride())
            if isinstance(argument, (list, tuple)):  # or what fx has for them
                return (list if isinstance(argument, list) else tuple)(map(marked, argument))
            return argument

        args, kwargs = tuple(map(marked, args)), {name: marked(value) for name, value in kwargs.items()}
        same_dtype = not operands or not results or operands[0].dtype == results[0].dtype
        return cls(target, args, kwargs, tuple(tuple(result.shape) for result in results), same_dtype)

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Operand))

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Arguments by the names of the op's schema, defaults filled in."""
        found = {}
        for position, argument in enumerate(self.target._schema.arguments):
            if not argument.kwarg_only and position < len(self.args):
                found[argument.name] = self.args[position]
            elif argument.name in self.kwargs:
                found[argument.name] = self.kwargs[argument.name]
            else:
                found[argument.name] = argument.default_value
        return found

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def dim(self, value: int, rank: int | None = None) -> int:
        """A dim argument counted from the front."""
        rank = len(self.operands[0].shape) if rank is None else rank
        return value % rank if rank else 0


@dataclass(frozen=True)
class Site:
    """Where an axis is cut: into ranges of `lengths[r]` whole `unit`s, of which this is the `rank`-th."""

    lengths: tuple[int, ...]
    rank: int
    group: str
    unit: int

    @property
    def ranks(self) -> int:
        return len(self.lengths)

    @property
    def lead(self) -> int:
        """How many units all ranks hold."""
        return self.ends[-1]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.lengths))

    @property
    def start(self) -> int:
        """The units before this rank's."""
        return self.ends[self.rank] - self.length

    @property
    def length(self) -> int:
        return self.lengths[self.rank]

    def range(self, rank: int) -> tuple[int, int]:
        """`[start, stop)` of a rank's part."""
        return (self.ends[rank] - self.lengths[rank]) * self.unit, self.ends[rank] * self.unit

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.range(rank) for rank in range(self.ranks))


@dataclass(frozen=True)
class Window:
    """To make a range of its axis `target`, an op needs the range `needs(start, stop)` of `source` in one operand.

    needs: may reach over the ends of the operand: past them there is nothing, or `fill`, or with `wraps` the other end.
    computes: neighbours meet in one result (convolution), rather than being moved (slice).
    """

    operand: int
    dim: int  # the dim of the operand that is `source`
    source: str
    target: str
    needs: Callable[[int, int], tuple[int, int]]
    wraps: bool = False
    fill: float | None = None
    computes: bool = False

    def needed(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """The range of `size` elements of the source that the range `[start, stop)` of the target takes from there."""
        needed = self.needs(start, stop)
        return needed if self.wraps else within(*needed, size)

    def ends(self, target: Iterable[tuple[int, int]], size: int) -> tuple[list[int], list[int]]:
        """Where what each of the ranges `target` needs begins and ends."""
        needed = [self.needed(*part, size) for part in target]
        return [start for start, _ in needed], [stop for _, stop in needed]

    def elements(self, source: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]], size: int) -> int:
        """How many elements of the dim travel between ranks that hold the ranges `source` and make the ranges `target`."""
        return exchanged([b - a for a, b in source], *self.ends(target, size))

    def length(self, start: int, stop: int, size: int) -> int:
        """How many elements of the dim a rank has in the end that makes the range `[start, stop)` of the target."""
        first, last = self.needs(start, stop) if self.fill is not None else self.needed(start, stop, size)
        return last - first


def shifted(by: int) -> Callable[[int, int], tuple[int, int]]:
    """What a `Window` needs of a source that lies `by` further on: the range as it stands there."""
    return lambda start, stop: (start + by, stop + by)


@dataclass(frozen=True)
class Ring:
    """Ranks that each have a range of the axis `queries` and of the axis `keys`, and pass what has keys round.

    traffic(queries, keys, nbytes, grads): bytes a device sends forward and backward, and collectives of each, from the lengths
        of all ranks' ranges, the bytes of the operands and the result that all these ranks hold together, and which operands
        want a gradient.
    """

    queries: str
    keys: str
    traffic: Callable[..., Any]


@dataclass(frozen=True)
class Statistic:
    """A tensor that ranks sum inside an op where they share a `combines` axis. Its gradient comes back where the op's first
    operand has one, and it is no integer.

    is_result: it is what the op returns, so that its gradient is the same on all ranks. Else each rank uses it in work of
    its own, so its gradient is Partial.
    """

    axes: tuple[str, ...]
    dtype: torch.dtype
    is_result: bool = False


@dataclass(frozen=True)
class Local:
    """What a rule knows when it writes one rank's call."""

    outputs: tuple[Shape, ...]  # shapes of the results on this rank
    sizes: Mapping[str, int]  # this rank's size of each axis
    whole_sizes: Mapping[str, int]
    starts: Mapping[str, int]  # where this rank's part of a sharded axis begins; no entry: at 0
    cuts: tuple[tuple[str, Site], ...] = ()  # what is cut, and where; an axis of several factors may be cut twice

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """Where each axis is cut that may only be cut into ranges, and so once."""
        return dict(self.cuts)

    def combined(self, emit: Emit, x: Any, axes: Collection[str], is_result: bool = False) -> Any:
        """`x`, of which every rank that shares one of the axes holds a term, summed (see `Statistic`)."""
        for axis, site in self.cuts:
            if axis in axes:
                x = emit(torch.ops.dsp.reduce.default, x, site.ranks, site.rank, site.group, not is_result)
        return x

    def part(self, emit: Emit, x: Any, dims: Sequence[Dim]) -> Any:
        """This rank's part of a tensor of `dims` that is whole."""
        shape = [self.whole_sizes[axis] for dim in dims for axis in dim]
        places = {axis: place for place, axis in enumerate(axis for dim in dims for axis in dim)}
        # A minor factor's parts lie within those of a major one.
        cuts = sorted((cut for cut in self.cuts if cut[0] in places), key=lambda cut: -cut[1].unit)
        for axis, site in cuts:
            n = places[axis]
            seen = [shape[n] // (site.lead * site.unit), site.lead, site.unit]
            x = emit(torch.ops.aten.reshape.default, x, [*shape[:n], *seen, *shape[n + 1 :]])
            x = emit(torch.ops.aten.slice.Tensor, x, n + 1, site.start, site.start + site.length)
            shape[n] = seen[0] * site.length * seen[2]
        merged = [math.prod(shape[places[axis]] for axis in dim) for dim in dims]
        return emit(torch.ops.aten.reshape.default, x, merged)

    def shares(self, axes: Collection[str]) -> bool:
        """Whether ranks share one of the axes."""
        return any(axis in axes for axis, _ in self.cuts)

    def range(self, axis: str) -> tuple[int, int]:
        """`[start, stop)` of this rank's part of an axis."""
        site = self.sites.get(axis)
        return (0, self.whole_sizes.get(axis, 1)) if site is None else site.range(site.rank)

    def window(self, emit: Emit, x: Any, window: Window) -> Any:
        """`x`, an operand that holds this rank's part of the window's source, becomes what this rank needs of it."""
        size, held = self.whole_sizes.get(window.source, 1), self.sites.get(window.source)
        start, stop = window.needs(*self.range(window.target))
        if held is not None:
            starts, stops = window.ends(self.sites[window.target].ranges, size)
            lengths = [b - a for a, b in held.ranges]
            x = emit(
                torch.ops.dsp.halo.default, x, window.dim, lengths, starts, stops, held.ranks, held.rank, held.group
            )
        else:
            parts = wrapped(start, stop, size) if window.wraps else [window.needed(*self.range(window.target), size)]
            taken = [emit(torch.ops.aten.slice.Tensor, x, window.dim, *part) for part in parts]
            x = taken[0] if len(taken) == 1 else emit(torch.ops.aten.cat.default, taken, window.dim)
        before, after = max(min(0, stop) - start, 0), max(stop - max(size, start), 0)
        if window.fill is None or window.wraps or not before + after:
            return x
        shape = value_of(x).shape
        ends = [0, 0] * (len(shape) - window.dim - 1) + [before, after]
        return emit(torch.ops.aten.constant_pad_nd.default, x, ends, window.fill)


def value_of(x: Any) -> torch.Tensor:
    """The tensor that stands for an argument of `Local`'s calls: a node's, or the tensor itself."""
    return x.meta["val"] if isinstance(x, fx.Node) else x


def within(start: int, stop: int, size: int) -> tuple[int, int]:
    """The part of a range that lies in `[0, size)`, possibly empty."""
    start = min(max(start, 0), size)
    return start, min(max(stop, start), size)


Emit = Callable[..., Any]


@dataclass(frozen=True)
class OpRule:
    """The factor mapping of one op call. `str(rule)` is its notation."""

    inputs: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()
    reduces: frozenset[str] = frozenset()
    # Axes that are cut together, each into ranges; an axis may stand in several groups.
    ranges: tuple[tuple[str, ...], ...] = ()
    windows: tuple[Window, ...] = ()
    # Groups of axes that are cut together only to pass blocks of operands round the ranks; an axis of one may be whole else.
    rings: tuple[Ring, ...] = ()
    # What ranks sum inside the op, in order, where they share one of these axes; results without it are the same on all.
    combines: Mapping[str, tuple[Statistic, ...]] = field(default_factory=dict)
    # The result is the operand, dim sizes and order aside: it costs nothing and has no layout of its own.
    is_view: bool = False
    # Draws random numbers, each shard its own. Where all are to draw what one device would, `serial` writes the call; with
    # `serial_is_whole`, or without it, nothing of the op is cut then.
    is_random: bool = False
    serial: Callable[..., Any] | None = field(default=None, compare=False)
    serial_is_whole: bool = False
    # Writes this rank's call: local(emit, target, args, kwargs, Local) -> result. None: the call as it stands.
    local: Callable[..., Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for axes in (self.whole, self.moved, self.reduces, self.combines.keys(), *map(frozenset, self.ranges)):
            unknown = axes - self.sizes.keys()
            if unknown:
                raise RuleError(f"rule {self}: no axis {sorted(unknown)}")

    @cached_property
    def contracts(self) -> bool:
        """A matmul-like op: an axis of two operands is summed away."""
        return any(sum(axis in _axes(dims) for dims in self.inputs) > 1 for axis in self.reduces)

    @cached_property
    def in_ranges(self) -> frozenset[str]:
        """Axes that may only be cut into ranges."""
        return frozenset(axis for group in self.ranges for axis in group)

    @property
    def communicates(self) -> bool:
        """Whether ranks may talk to each other while the op runs."""
        return bool(self.windows or self.combines or self.rings)

    def cut_into_ranges(self, group: Collection[str]) -> bool:
        """Whether a group of axes (see `cuts`) may only be cut into ranges."""
        return not self.in_ranges.isdisjoint(group) or self.ring(group) is not None

    def ring(self, axes: Collection[str]) -> Ring | None:
        """The ring that cutting the axes together makes."""
        return next((ring for ring in self.rings if set(axes) == {ring.queries, ring.keys}), None)

    @cached_property
    def computes_over(self) -> frozenset[str]:
        """Axes along which elements meet in one result."""
        near = {axis for w in self.windows if w.computes for axis in (w.source, w.target)}
        # To count along an axis is no computing over it.
        together = {
            axis for axis, own in self.combines.items() if any(statistic.dtype.is_floating_point for statistic in own)
        }
        return frozenset(self.whole | together | (near & self.sizes.keys()))

    def can_shard(self, axis: str) -> bool:
        """Whether ranks may each take any part of `axis`."""
        if axis in self.whole or axis in self.moved or axis in self.in_ranges:
            return False
        return (
            axis in self.reduces or axis in self.combines or all(axis in _axes(dims) for dims in self.outputs)
        )

    def cuts(self) -> list[tuple[str, ...]]:
        """The groups of axes that a mesh dim may cut together: one axis alone, or one of `ranges`."""
        alone = [(axis,) for axis in self.sizes if self.can_shard(axis)]
        return alone + list(self.ranges) + [(ring.queries, ring.keys) for ring in self.rings]

    def drawn_serially(self) -> OpRule:
        """The rule where random numbers are those of one device."""
        if not self.is_random:
            return self
        if self.serial is not None and not self.serial_is_whole:
            return replace(self, local=self.serial)
        return replace(self, local=self.serial, moved=frozenset(self.sizes), ranges=(), combines={}, reduces=frozenset())

    def on_rank(
        self, sizes: Mapping[str, int], starts: Mapping[str, int], cuts: Sequence[tuple[str, Site]] = ()
    ) -> Local:
        """What one rank computes that has `sizes` of the axes; see `Local`."""
        sizes = {**self.sizes, **sizes}
        shapes = tuple(tuple(math.prod(sizes[axis] for axis in dim) for dim in dims) for dims in self.outputs)
        return Local(shapes, sizes, self.sizes, starts, tuple(cuts))

    def call(self, emit: Emit, target: Any, args: tuple, kwargs: Mapping[str, Any], here: Local) -> Any:
        """One rank's call, written with `emit`."""
        if self.local is None:
            return emit(target, *args, **kwargs)
        return self.local(emit, target, args, kwargs, here)

    def __str__(self) -> str:
        text = " -> ".join(
            ", ".join(" ".join(_show_dim(dim) for dim in dims) or "()" for dims in group)
            for group in (self.inputs, self.outputs)
        )
        notes = [
            f"{kind}: {' '.join(sorted(axes))}"
            for kind, axes in (("whole", self.whole), ("moved", self.moved), ("reduces", self.reduces))
            if axes
        ]
        if self.ranges:
            notes.append("ranges: " + ", ".join(map(" ".join, self.ranges)))
        if self.combines:
            notes.append("combines: " + " ".join(sorted(self.combines)))
        notes += [f"ring: {ring.queries} {ring.keys}" for ring in self.rings]
        return "; ".join([text, *notes])


def _axes(dims: Sequence[Dim]) -> set[str]:
    return {axis for dim in dims for axis in dim}


def _show_dim(dim: Dim) -> str:
    return "1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})"


def parse(text: str) -> tuple[list[list[Dim | str]], list[list[Dim | str]]]:
    """`"b (h d), o d -> b o"` into dims per operand and per result; `...` stays as the string."""
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(f"rule {text!r}: expected one '->' between operands and results")
    operands, results = ([_parse_group(group, text) for group in side.split(",")] for side in sides)
    return operands, results


def _parse_group(group: str, text: str) -> list[Dim | str]:
    tokens = re.findall(r"\.\.\.|[A-Za-z_]\w*|1|[()]|\S", group)
    dims: list[Dim | str] = []
    merged: list[str] | None = None
    for token in tokens:
        if token == "(" and merged is None:
            merged = []
        elif token == ")" and merged is not None:
            dims.append(tuple(merged))
            merged = None
        elif token == ELLIPSIS and merged is None and ELLIPSIS not in dims:
            dims.append(ELLIPSIS)
        elif token == "1" and merged is None:
            dims.append(())
        elif re.fullmatch(r"[A-Za-z_]\w*", token):
            dims.append((token,)) if merged is None else merged.append(token)
        else:
            raise RuleError(f"rule {text!r}: {token!r} does not belong in {group.strip()!r}")
    if merged is not None:
        raise RuleError(f"rule {text!r}: '(' without ')' in {group.strip()!r}")
    return dims


def from_notation(
    text: str,
    call: OpCall,
    *,
    whole: Iterable[str] = (),
    moved: Iterable[str] = (),
    reduces: Iterable[str] = (),
    ranges: Iterable[tuple[str, ...]] = (),
    combines: Mapping[str, tuple[Statistic, ...]] | None = None,
    rings: Iterable[Ring] = (),
    sizes: Mapping[str, int] | None = None,
    **flags: Any,
) -> OpRule:
    """The rule `text` for this call; operands that the call leaves out may stand at the end of the text.

    `sizes` gives the axes of merged dims that no single dim tells.
    Raises RuleError where text and shapes do not fit, repeating the text, the shape and the axis.
    """
    operand_dims, output_dims = parse(text)
    operands = [operand.shape for operand in call.operands]
    if len(operands) > len(operand_dims) or len(call.outputs) != len(output_dims):
        raise RuleError(
            f"rule {text!r}: {call.target} has {counted(len(operands), 'tensor operand')} and "
            f"{counted(len(call.outputs), 'result')}"
        )
    known: dict[str, int] = dict(sizes or {})
    pairs = list(zip(operand_dims, operands, strict=False)) + list(zip(output_dims, call.outputs, strict=True))
    spread = [_spread(dims, shape, text) for dims, shape in pairs]
    for dims, shape in spread:
        for dim, size in zip(dims, shape, strict=True):
            if len(dim) == 1 and size != 1 and dim != UNREAD:
                if known.setdefault(dim[0], size) != size:
                    raise RuleError(f"rule {text!r}: axis {dim[0]} is {known[dim[0]]} and {size} (shape {shape})")
    for dims, shape in spread:
        for dim, size in zip(dims, shape, strict=True):
            unknown = [axis for axis in dim if axis not in known]
            if len(dim) > 1 and len(unknown) == 1:
                rest = 1
                for axis in dim:
                    rest *= known.get(axis, 1)
                if size % rest:
                    raise RuleError(f"rule {text!r}: dim of size {size} is not a multiple of {rest} (shape {shape})")
                known[unknown[0]] = size // rest
    done: list[tuple[Dim, ...]] = []
    for dims, shape in spread:
        fixed: list[Dim] = []
        for dim, size in zip(dims, shape, strict=True):
            if dim == UNREAD:
                fixed.append(())
                continue
            product = 1
            for axis in dim:
                product *= known.setdefault(axis, 1)
            if size != 1 and product != size:
                raise RuleError(f"rule {text!r}: dim {_show_dim(dim)} should be {product}, is {size} (shape {shape})")
            # A dim of size one against a longer axis is broadcast: this operand does not have the axis.
            fixed.append(tuple(axis for axis in dim if known[axis] != 1) if size != 1 else ())
        done.append(tuple(fixed))
    axes = {axis: size for axis, size in known.items() if size != 1}
    count = len(operands)
    groups = [tuple(dict.fromkeys(group)) for group in ranges]
    whole_groups = tuple(group for group in groups if axes.keys() >= set(group))
    # A group with an axis of size one cannot be cut, and its other axes not by themselves.
    stuck = {axis for group in groups for axis in group} - {axis for group in whole_groups for axis in group}
    return OpRule(
        inputs=tuple(done[:count]),
        outputs=tuple(done[count:]),
        sizes=axes,
        whole=frozenset(whole) & axes.keys(),
        moved=(frozenset(moved) | stuck) & axes.keys(),
        reduces=frozenset(reduces) & axes.keys(),
        ranges=whole_groups,
        combines={axis: statistics for axis, statistics in (combines or {}).items() if axis in axes},
        rings=tuple(ring for ring in rings if axes.keys() >= {ring.queries, ring.keys}),
        **flags,
    )


def _spread(dims: list[Dim | str], shape: Shape, text: str) -> tuple[list[Dim], Shape]:
    """`...` replaced by axes named from the right, so that operands broadcast as tensors do."""
    written = [dim for dim in dims if not isinstance(dim, str)]
    if ELLIPSIS not in dims:
        if len(dims) != len(shape):
            raise RuleError(f"rule {text!r}: {counted(len(dims), 'dim')} written, shape {shape} has {len(shape)}")
        return written, shape
    extra = len(shape) - (len(dims) - 1)
    if extra < 0:
        raise RuleError(f"rule {text!r}: at least {len(dims) - 1} dims written, shape {shape} has {len(shape)}")
    at = dims.index(ELLIPSIS)
    leading: list[Dim] = [(f".{position}",) for position in range(extra - 1, -1, -1)]
    return written[:at] + leading + written[at:], shape
