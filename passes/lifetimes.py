"""Lifetimes: what is in memory at each program point that can be the peak, before anything is decided.

A point is a moment of a step: an op that runs, a tensor that is resharded for it, and the same on the way back. The memory at
a point is a sum of *terms*, each a number of bytes that depends on layouts alone. Most terms live on from point to point, so a
point only says which of them change:

    Alive     copies of one buffer: in the layout that it is made in, and in those that it was resharded into and that are
              used, awaited or saved for backward
    Internal  what an op saves of its own making (a norm's statistics, attention's log-sum-exp)
    Extra     what an op takes while it runs, beside operands and results
    Buffers   what the primitives on the way in, or on the way back, take beside their ends
    Held      a parameter, and what the optimizer holds of it

A *buffer* is memory for one storage: that of its maker, or that of a view which had to copy (a transposed tensor reshaped).
What an op gives as a view of its operand (a slice) takes nothing, and keeps the operand.

In backward the gradient of a storage waits in the layouts that its users wanted, until all who shared a copy have given theirs;
an add hands its gradient on, and what one storage of memory holds is counted once. Stages of a *region* (see `regions`) that is
recomputed keep what the region takes, and the rest comes back while backward passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from torch import fx

from dsp_auto.cost_models.memory import Footprint, op_footprint
from dsp_auto.cost_models.state import packed

from .capture import Program
from .factors import Op
from .nodes import ValueId, node_values, value_id
from .regions import Region
from .stages import OP, OUTPUT, Stage, StageGraph, Storage, Use, strip

# Of a tensor that many ops use, so many of those that used it last and that use it next decide which copies wait for them.
NEAREST = 2

MADE, VIEW, ALIAS = "made", "view", "alias"
RESULT, COPY = "result", "copy"
FORWARD, BACKWARD, STEP = "forward", "backward", "step"
STATE = "state"  # of a slot: what is no activation


@dataclass(frozen=True, eq=False)
class Reach:
    """A use at `stage` that reads a buffer, in the layout that `use` wants; through views by ops, unless one of these was
    resharded on the way (`unless`). early: a copy is made of it, and it is not needed any more when the stage runs."""

    use: Use
    stage: int
    unless: tuple[Use, ...] = ()
    early: bool = False


@dataclass(frozen=True, eq=False)
class Holder:
    """Who keeps a buffer for backward: a reach, or who made it (None).

    region: only where that region is not recomputed; takes: only where it is, because it takes the buffer; then a resharding
    that makes it no larger comes before. only: the strategies in which the stage of the use keeps it (None: in all). kept: only
    where this is kept although its region is recomputed.
    """

    reach: Reach | None
    region: int | None = None
    takes: int | None = None
    only: tuple[int, ...] | None = None
    kept: Kept | None = None


class Kept(NamedTuple):
    """What a region that is recomputed may keep: what a stage makes, or what is received of a storage that it made."""

    what: str  # RESULT or COPY
    stage: int
    storage: ValueId


class Alive(NamedTuple):
    """Bytes of a buffer in each distinct layout in which it is alive.

    flavor: MADE is there in the layout its maker gives it, VIEW is a copy that a view makes of any, ALIAS lies in another
    buffer and counts resharded copies only. made: the maker's layout is there. now: used at this point. before, after: uses
    that have been and that will be; a copy that both want waits between them, and what is still wanted elsewhere waits as made.
    """

    storage: ValueId
    flavor: str
    made: bool = False
    now: tuple[Reach, ...] = ()
    before: tuple[Reach, ...] = ()
    after: tuple[Reach, ...] = ()
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True)
class Internal:
    """Bytes that a stage's op saves, shared out where the op is; `region`: only where that one is not recomputed, or the result
    is `kept`."""

    stage: int
    nbytes: int
    region: int | None = None
    kept: Kept | None = None


@dataclass(frozen=True)
class Extra:
    """Bytes that a stage's op takes while it runs, or its gradient (`back`), shared out where the op is."""

    stage: int
    nbytes: int
    back: bool = False


@dataclass(frozen=True)
class Buffers:
    """What the primitives of one use take beside their ends, forward or `back`."""

    use: Use
    back: bool


@dataclass(frozen=True)
class Resharded:
    """Bytes of a storage as it is made, where any of the uses reshards what it reads: a gradient that is another one's only
    where neither is resharded."""

    storage: ValueId
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Held:
    """What a parameter takes: all the time ("state"), for its gradient ("gradient"), while ranks gather it or have not summed
    its gradient yet ("gathered", "unreduced"), or while the optimizer steps ("step")."""

    storage: ValueId
    what: str


@dataclass(frozen=True)
class Packed:
    """Bytes of gradients that are packed to be summed over the ranks."""

    nbytes: int


Term = Alive | Internal | Extra | Buffers | Resharded | Held | Packed
Slot = tuple


@dataclass(frozen=True)
class Point:
    """A moment. changes: terms that are there from now on, by slot (None: no longer); momentary: those at this point only.

    operand: which operand is being resharded, None while the op runs. again: forward once more, if this region is recomputed.
    """

    stage: int
    phase: str
    operand: int | None = None
    changes: tuple[tuple[Slot, Term | None], ...] = ()
    momentary: tuple[Term, ...] = ()
    again: int | None = None


def lifetimes(
    program: Program,
    graph: StageGraph,
    regions: Sequence[Region],
    saves: Callable[[Use], tuple[int, ...] | None],
    keeps: Mapping[int, Sequence[Kept]],
) -> tuple[Point, ...]:
    """The program points of a step, in order.

    saves: of a use whose op saves what it reads, the strategies in which it does, None for all. keeps: what each region may
    keep although it is recomputed.
    """
    return tuple(_Lifetimes(program, graph, regions, saves, keeps).points())


def is_state(slot: Slot | None, term: Term | None = None) -> bool:
    """Whether a term is no activation: inputs, parameters, their gradients, the optimizer. By its slot, or a momentary one."""
    return isinstance(term, (Held, Packed)) if slot is None else slot[0] == STATE


def footprint(program: Program, op: Op) -> Footprint:
    args, kwargs = fx.map_arg((op.node.args, dict(op.node.kwargs)), lambda n: n.meta["val"])
    found = op_footprint(op.node.target, args, kwargs, program.training)
    # What runs on the host takes the host's memory.
    return replace(found, extra=0, backward_extra=0, internal=0, long=0) if op.on_host else found


@dataclass
class _Buffer:
    """Memory for one storage, and who reads it, in order."""

    storage: ValueId
    flavor: str
    maker: int
    reaches: list[Reach] = field(default_factory=list)
    holders: list[Holder] = field(default_factory=list)  # in the order of their stages
    since: list[int] = field(default_factory=list)  # from which stage on each holds


class _Lifetimes:
    def __init__(
        self,
        program: Program,
        graph: StageGraph,
        regions: Sequence[Region],
        saves: Callable[[Use], tuple[int, ...] | None],
        keeps: Mapping[int, Sequence[Kept]],
    ) -> None:
        self.program, self.graph, self.saves, self.keeps = program, graph, saves, keeps
        self.kept_result = {kept.stage: kept for own in keeps.values() for kept in own if kept.what == RESULT}
        self.regions = {region.number: region for region in regions}
        self.region_of = {stage: region.number for region in regions for stage in region.stages}
        self.footprints = {s.index: footprint(program, s.op) for s in graph.stages if s.op is not None}
        self.buffers: dict[ValueId, _Buffer] = {}
        self.buffer_of: dict[tuple[int, int], ValueId] = {}  # (stage, operand) -> buffer
        self.lies_in: dict[ValueId, Reach] = {}  # of what is a view of its maker's operand
        self.known_reaches: dict[Use, tuple[tuple[ValueId, Reach], ...]] = {}
        self.resharded: dict[Use, bool] = {}
        self.direct: dict[Use, Reach] = {}
        self.changes: dict[Slot, Term | None] = {}
        self.current: dict[Slot, Term] = {}
        self._make_buffers()
        if graph.training:
            self._find_holders()
        # While its backward runs, or its forward once more, a region holds what it saves in any case.
        self.open: int | None = None
        self.opened: dict[Holder, Holder] = {}
        self.keeping: dict[tuple[Use, Kept], Holder] = {}
        self.is_back = False

    # --- who reads what, and who keeps it

    def _make_buffers(self) -> None:
        graph = self.graph
        own: dict[ValueId, ValueId] = {}  # value -> buffer
        for storage in graph.storages.values():
            flavor = ALIAS if self._is_parameter(storage.id) else MADE  # parameters are counted as such
            self.buffers[storage.id] = _Buffer(storage.id, flavor, storage.maker)
            own[storage.id] = storage.id
        stages = {stage.op.name: stage for stage in graph.stages if stage.op is not None}
        for op in graph.factors.ops:
            if op.is_view:
                value, operand = op.results[0], op.operands[0]
                own[value] = own[operand]
                if self._address(value) != self._address(operand):
                    storage = graph.views[value][0]
                    self.buffers[value] = _Buffer(storage, VIEW, graph.storages[storage].maker)
                    own[value] = value
                continue
            stage = stages[op.name]
            for use, operand in zip(stage.uses, op.operands, strict=True):
                self.buffer_of[stage.index, use.operand] = own[operand]
            for result, operand in zip(op.results, self.footprints[stage.index].aliases):
                if operand is not None:
                    self.buffers[result].flavor = ALIAS
                    self.lies_in[result] = Reach(stage.uses[operand], stage.index)
        last = graph.stages[-1]
        arguments = self.program.graph.output_node().args[0]
        for use in last.uses:
            self.buffer_of[last.index, use.operand] = own[value_id(arguments[use.operand])]
        for stage in graph.stages:
            for use in stage.uses:
                for key, reach in self._reaches(use):
                    self.buffers[key].reaches.append(reach)

    def _reaches(self, use: Use) -> tuple[tuple[ValueId, Reach], ...]:
        """The buffers that a use reads: its own, that which a view copies, that in which a slice lies."""
        if use not in self.known_reaches:
            found = self._reaches_from(self.buffer_of[use.stage, use.operand], Reach(use, use.stage))
            self.known_reaches[use] = tuple(found)
        return self.known_reaches[use]

    def _reaches_from(self, key: ValueId, reach: Reach) -> Iterator[tuple[ValueId, Reach]]:
        yield key, reach
        own = self.buffers[key]
        if own.flavor == VIEW:
            yield from self._reaches_from(own.storage, replace(reach, early=True))
        elif key in self.lies_in:
            through = self.lies_in[key]
            inner = Reach(through.use, reach.stage, (reach.use, *reach.unless), reach.early)
            yield from self._reaches_from(self.buffer_of[through.stage, through.use.operand], inner)

    def _find_holders(self) -> None:
        """Who saves what for backward, by `Program.saved`."""
        by_address: dict[int, ValueId] = {}
        for key in self.buffers:
            by_address.setdefault(self._address(key), key)
        for stage in self.graph.stages[:-1]:
            if stage.op is None:
                continue
            saved, region = self.program.saved.get(stage.op.name), self.region_of.get(stage.index)
            for address in {self._address(value) for value in saved.values} if saved is not None else ():
                mine = [u for u in stage.uses if self._address(self.buffer_of[u.stage, u.operand]) == address]
                for use in mine:
                    self._hold_use(use, stage.index, region)
                if not mine:
                    # Its result, or what some result is a view of; that of another op where it is of no use here.
                    results = [r for r in stage.results if self._address(r) == address]
                    key = results[0] if results else by_address.get(address)
                    if key is not None:
                        self._hold(key, Holder(None, region), stage.index)
            if region is not None:
                self._hold_taken(stage, region)
            if stage.index in self.kept_result:
                for result in stage.results:
                    self._hold(result, Holder(None, kept=self.kept_result[stage.index]), stage.index)
        for use in self.graph.stages[-1].uses:
            self._hold_use(use, use.stage, None)

    def _hold_use(self, use: Use, stage: int, region: int | None) -> None:
        """What is saved of an operand: a copy that a view made, without what it was made from."""
        only = self.saves(use)
        for key, reach in self._reaches(use):
            self._hold(key, Holder(reach, region, only=only if reach.use is use else None), stage)
            if self.buffers[key].flavor == VIEW:
                break

    def _hold_taken(self, stage: Stage, region: int) -> None:
        """A region that is recomputed keeps what comes from outside of it."""
        first = self.regions[region].stages[0]
        for use in stage.uses:
            for key, reach in self._reaches(use):
                if self.buffers[key].maker < first and self.buffers[key].flavor != VIEW:
                    self._hold(key, Holder(reach, takes=region), first)

    def _hold(self, key: ValueId, holder: Holder, since: int) -> None:
        own = self.buffers[key]
        described = (holder.reach, holder.region, holder.takes, holder.kept)
        if all((h.reach, h.region, h.takes, h.kept) != described for h in own.holders):
            own.holders.append(holder)
            own.since.append(since)

    def _address(self, value: ValueId) -> int:
        return node_values(self.program.nodes[value[0]])[value[1]].untyped_storage()._cdata

    # --- slots

    def _put(self, slot: Slot, term: Term | None) -> None:
        if self.current.get(slot) == term:
            return
        self.changes[slot] = term
        if term is None:
            del self.current[slot]
        else:
            self.current[slot] = term

    def _point(self, stage: Stage, phase: str, operand: int | None, momentary: Sequence[Term] = ()) -> Point:
        found = tuple(self.changes.items())
        self.changes.clear()
        return Point(stage.index, phase, operand, found, tuple(momentary), self.again)

    def _slot(self, kind: str, key: ValueId) -> Slot:
        is_given = self.graph.storages[self.buffers[key].storage].kind != "activation"
        return (STATE, kind, key) if is_given else (kind, key)

    def _holders(self, buffer: _Buffer, stage: int) -> tuple[Holder, ...]:
        """Who has saved a buffer when the forward has come to `stage`, or whose backward is still to come. What the program
        returns is the user's from then on."""
        found, end = [], self.graph.stages[-1].index if self.is_back else None
        for holder, since in zip(buffer.holders, buffer.since):
            if since <= stage or since == end:
                is_open = self.open is not None and holder.region == self.open
                found.append(self._opened(holder) if is_open else holder)
        return tuple(found)

    def _opened(self, holder: Holder) -> Holder:
        if holder not in self.opened:
            self.opened[holder] = replace(holder, region=None)
        return self.opened[holder]

    def _put_buffer(
        self, key: ValueId, stage: int, operand: int | None, running: bool, last: int, held: int | None = None
    ) -> None:
        """A buffer while `stage` runs (or its `operand` is being resharded), or after it; uses after `last` do not count.

        held: who has saved it by then, where that is another stage.
        """
        buffer, slot = self.buffers[key], self._slot("kept", key)
        now: list[Reach] = []
        before: list[Reach] = []
        after: list[Reach] = []
        for reach in buffer.reaches:
            if reach.stage == stage and running and operand is not None and reach.use.stage == stage:
                # A view copies what is resharded once it is.
                is_there = reach.use.operand < operand + (buffer.flavor != VIEW)
                (now if is_there else after).append(reach)
            elif reach.stage == stage and running and not reach.early:
                now.append(reach)
            elif reach.stage <= stage:
                before.append(reach)
            elif reach.stage <= last:
                after.append(reach)
        is_given = self.graph.storages[buffer.storage].kind != "activation"
        made = is_given or (running and (buffer.maker == stage or self._is_source(key, stage, operand)))
        made &= buffer.flavor == MADE
        if held is None:
            held = stage - 1 if running and operand is not None else stage
        holders = self._holders(buffer, held)
        if buffer.flavor == ALIAS:
            now, before, after = (
                [r for r in own if self._may_be_resharded(r.use)] for own in (now, before, after)
            )
            holders = tuple(h for h in holders if h.reach is not None and self._may_be_resharded(h.reach.use))
        if buffer.flavor != MADE and not (before or now):
            after = []  # there is no copy yet
        if not (made or now or after or holders):
            return self._put(slot, None)
        if not after:
            before = []
        term = Alive(
            buffer.storage, buffer.flavor, made, tuple(now), tuple(before[-NEAREST:]), tuple(after[:NEAREST]), holders
        )
        self._put(slot, term)

    def _is_source(self, key: ValueId, stage: int, operand: int | None) -> bool:
        return operand is not None and self.graph.stages[stage].uses[operand].storage == key

    # --- points

    def points(self) -> Iterator[Point]:
        self.again: int | None = None
        for key, buffer in self.buffers.items():
            storage = self.graph.storages[buffer.storage]
            if buffer.flavor == MADE and storage.kind != "activation":
                self._put(self._slot("kept", key), Alive(key, MADE, made=True))
            elif key == storage.id and self._is_parameter(key) and key[0] not in self.graph.same_as:
                self._put((STATE, "held", key), Held(key, "state"))
        stages = [stage for stage in self.graph.stages if stage.kind in (OP, OUTPUT)]
        last = stages[-1].index
        for stage in stages:
            if stage.index in self._first_of:
                for key in self._taken[self._first_of[stage.index]]:
                    self._put_buffer(key, stage.index - 1, None, False, last, held=stage.index)
            yield from self._forward(stage, last)
        if self.graph.training:
            yield from self._backward(stages)

    def _forward(self, stage: Stage, last: int) -> Iterator[Point]:
        """Operands are resharded, the op runs, and what nobody needs any more goes."""
        index = stage.index
        touched = [*dict.fromkeys(key for use in stage.uses for key, _ in self._reaches(use))]
        for use in stage.uses:
            if self._may_be_resharded(use):
                for key in touched:
                    self._put_buffer(key, index, use.operand, True, last)
                yield self._point(stage, FORWARD, use.operand, (Buffers(use, False),))
        touched += stage.results
        for key in touched:
            self._put_buffer(key, index, None, True, last)
        momentary: list[Term] = []
        if stage.op is not None:
            if self.footprints[index].extra or self._communicates(stage):
                momentary.append(Extra(index, self.footprints[index].extra))
            self._put_internal(stage, stage.op, running=True)
        yield self._point(stage, FORWARD, None, momentary)
        if stage.op is not None:
            self._put_internal(stage, stage.op)
        for key in touched:
            self._put_buffer(key, index, None, False, last)
        self._put_received(stage)

    def _put_received(self, stage: Stage) -> None:
        """What a region that is recomputed has received by now, and keeps."""
        region = self.region_of.get(stage.index)
        if region is None or self.again is not None:
            return
        for kept in self.keeps.get(region, ()):
            if kept.what == COPY and any(use.storage == kept.storage for use in stage.uses):
                uses = [use for use in self.graph.uses[kept.storage] if self.region_of.get(use.stage) == region]
                holders = tuple(self._keeping(use, kept) for use in uses if use.stage <= stage.index)
                self._put(("received", kept.storage, region), Alive(kept.storage, ALIAS, holders=holders))

    def _keeping(self, use: Use, kept: Kept) -> Holder:
        if (use, kept) not in self.keeping:
            self.keeping[use, kept] = Holder(self._direct(use), kept=kept)
        return self.keeping[use, kept]

    def _put_internal(self, stage: Stage, op: Op, running: bool = False) -> None:
        saved = self.program.saved.get(op.name) if self.graph.training else None
        if saved is not None and (saved.internal_bytes or self._communicates(stage)):
            region = self.region_of.get(stage.index)
            self._put(
                ("internal", stage.index),
                Internal(stage.index, saved.internal_bytes, region, self.kept_result.get(stage.index))
                if region is not None and region != self.open and not running
                else Internal(stage.index, saved.internal_bytes),
            )

    def _communicates(self, stage: Stage) -> bool:
        return stage.op is not None and stage.op.rule is not None and stage.op.rule.communicates

    def _may_be_resharded(self, use: Use) -> bool:
        if use not in self.resharded:
            self.resharded[use] = self._has_several_layouts(use)
        return self.resharded[use]

    def _has_several_layouts(self, use: Use) -> bool:
        storage = self.graph.storages[use.storage]
        made = {strip(own[storage.result]) for own in self.graph.stages[storage.maker].made}
        return len(made | {strip(layout) for layout in use.wanted}) > 1

    @cached_property
    def _first_of(self) -> Mapping[int, int]:
        return {region.stages[0]: region.number for region in self.regions.values()}

    @cached_property
    def _last_of(self) -> Mapping[int, int]:
        return {region.stages[-1]: region.number for region in self.regions.values()}

    @cached_property
    def _taken(self) -> Mapping[int, list[ValueId]]:
        """What each region takes from outside."""
        found: dict[int, list[ValueId]] = {number: [] for number in self.regions}
        for key, buffer in self.buffers.items():
            for number in {holder.takes for holder in buffer.holders if holder.takes is not None}:
                found[number].append(key)
        return found

    @cached_property
    def _held_in(self) -> Mapping[int, list[ValueId]]:
        """What the stages of each region save."""
        found: dict[int, list[ValueId]] = {number: [] for number in self.regions}
        for key, buffer in self.buffers.items():
            for number in {holder.region for holder in buffer.holders if holder.region is not None}:
                found[number].append(key)
        return found

    @cached_property
    def _held_at(self) -> Mapping[int, list[ValueId]]:
        """What is held by a stage's own account, by stage; what a region takes by its first one."""
        found: dict[int, list[ValueId]] = {}
        for key, buffer in self.buffers.items():
            for since in dict.fromkeys(buffer.since):
                found.setdefault(since, []).append(key)
        return found

    # --- backward

    def _backward(self, stages: Sequence[Stage]) -> Iterator[Point]:
        self.is_back = True
        self.given: dict[ValueId, list[Use]] = {}  # whose gradients have come, the last use first
        self.shadows: dict[ValueId, tuple[ValueId, tuple[Use, Use]]] = {}
        by_index = {stage.index: stage for stage in stages}
        for stage in reversed(stages):
            if stage.index in self._last_of:
                yield from self._open(self.regions[self._last_of[stage.index]], by_index)
            yield from self._backward_of(stage)
            for key in self._held_at.get(stage.index, ()):
                self._put_buffer(key, stage.index - 1, None, False, -1)
            self._put(("internal", stage.index), None)
            if stage.index in self._first_of:
                self.open = None
        parameters = [s for s in self.graph.storages if self._is_parameter(s) and s[0] not in self.graph.same_as]
        yield self._point(stages[0], STEP, None, [Held(storage, "step") for storage in parameters])

    def _open(self, region: Region, stages: Mapping[int, Stage]) -> Iterator[Point]:
        """Backward comes to a region: all that it saves is made again, if it is not there."""
        self.open = self.again = region.number
        inside = [stages[index] for index in region.stages]
        first = region.stages[0]
        for key in self._held_in[region.number]:
            self._put_buffer(key, first - 1, None, False, -1, held=first)
        for stage in inside:
            self._put(("internal", stage.index), None)
        for stage in inside:
            yield from self._forward(stage, region.stages[-1])
        self.again = None
        for kept in self.keeps.get(region.number, ()):
            self._put(("received", kept.storage, region.number), None)
        touched = [key for stage in inside for use in stage.uses for key, _ in self._reaches(use)]
        for key in dict.fromkeys((*touched, *(result for stage in inside for result in stage.results))):
            self._put_buffer(key, region.stages[-1], None, False, -1)

    def _backward_of(self, stage: Stage) -> Iterator[Point]:
        """The gradients of an op's operands are made, and then resharded to where the operands were made."""
        index = stage.index
        flows = self.footprints[index].gradients if stage.kind == OP else ("own",) * len(stage.uses)
        uses = [use for use in stage.uses if use.grad]
        if stage.kind == OP:
            fresh = [use for use in uses if flows[use.operand] == "own"]
        else:
            fresh = uses
        uses = [use for use in uses if stage.kind == OUTPUT or flows[use.operand] is not None]
        # A parameter that has been used later too gets a second gradient, until it is added to the first.
        again = [
            Held(use.storage, "gradient")
            for use in fresh
            if self._is_parameter(use.storage) and self._gradient_slot(use.storage) in self.current
        ]
        for use in fresh:
            self._put_gradient(use.storage, index, now=[u for u in fresh if u.storage == use.storage])
        taken = self.footprints[index].backward_extra if stage.kind == OP else 0
        extra: list[Term] = [Extra(index, taken, back=True)] if taken or self._communicates(stage) else []
        extra += again
        if stage.kind == OUTPUT:  # the gradient of what a view copied is copied too
            copied = [use for use in uses if self.buffers[self.buffer_of[index, use.operand]].flavor == VIEW]
            extra += [Alive(use.storage, VIEW, now=(self._direct(use),)) for use in copied]
        yield self._point(stage, BACKWARD, None, extra)
        for use in fresh:
            if self._is_parameter(use.storage):
                self._put_gradient(use.storage, index)
        if index in self._packed:
            yield self._point(stage, BACKWARD, None, (Packed(self._packed[index]),))
        for result in stage.results:
            self.shadows.pop(result, None)
            self._put(self._slot("gradient", result), None)
        for use in uses:
            known = self.given.setdefault(use.storage, [])
            for other, (source, _) in list(self.shadows.items()):
                if source == use.storage:  # which is added to, and no longer the same
                    del self.shadows[other]
                    self._put_gradient(other, index)
            if known and known[-1].stage != index:
                self.shadows.pop(use.storage, None)
            known.append(use)
        self._find_shadows(stage, uses, flows)
        for use in uses:
            if self._may_be_resharded(use) and not self._is_parameter(use.storage):
                self._put_gradient(use.storage, index, now=[use], made=True)
                yield self._point(stage, BACKWARD, use.operand, (Buffers(use, True),))
            self._put_gradient(use.storage, index)

    @cached_property
    def _packed(self) -> Mapping[int, int]:
        """Where all gradients of a bucket of parameters have come (see `buckets`): bytes, by stage."""
        if self.graph.mesh.ranks == 1:
            return {}
        ready: list[tuple[int, Storage]] = []
        for storage in self.graph.storages.values():
            uses = [use.stage for use in self.graph.uses.get(storage.id, ()) if use.grad]
            if self._is_parameter(storage.id) and uses:
                ready.append((min(uses), storage))
        ready.sort(key=lambda item: item[0])
        found: dict[int, int] = {}
        for bucket in packed([(storage.root.dtype, storage.root.nbytes) for _, storage in ready], self.graph.in_buckets):
            first = ready[bucket[0]][0]
            nbytes = sum(ready[n][1].root.nbytes for n in bucket)
            found[first] = max(found.get(first, 0), nbytes)
        return found

    def _find_shadows(self, stage: Stage, uses: Sequence[Use], flows: Sequence[str | int | None]) -> None:
        """An add gives both of its operands one gradient: it is counted for one that waits for others, and for the other one
        only where it is resharded."""
        if stage.kind != OP:
            return
        for result in {flows[use.operand] for use in uses} - {"own", None}:
            alike = [use for use in uses if flows[use.operand] == result and self.given[use.storage] == [use]]
            alike.sort(key=lambda use: self.graph.storages[use.storage].maker)
            for use in alike[1:]:
                if use.storage != alike[0].storage and not self._is_parameter(use.storage):
                    self.shadows[use.storage] = (alike[0].storage, (alike[0], use))

    def _direct(self, use: Use) -> Reach:
        return self.direct.setdefault(use, Reach(use, use.stage))

    def _is_parameter(self, storage: ValueId) -> bool:
        return self.graph.storages[storage].root.id[0] in self.graph.parameters

    def _gradient_slot(self, storage: ValueId) -> Slot:
        """One for all storages of a parameter."""
        return self._slot("gradient", (self.graph.same_as.get(storage[0], storage[0]), storage[1]))

    def _put_gradient(self, storage: ValueId, stage: int, now: Sequence[Use] = (), made: bool = False) -> None:
        """The gradient of a storage, while a stage's backward runs or after it."""
        slot = self._gradient_slot(storage)
        if self._is_parameter(storage):
            self._put(slot, Held(storage, "gradient"))
            return
        given = self.given.get(storage, [])
        if storage in self.shadows and not now and not made:
            self._put(slot, Resharded(storage, self.shadows[storage][1]))
            return
        pending = [use for use in self.graph.uses.get(storage, ()) if use.grad and use.stage < stage]
        here, before, after = (tuple(map(self._direct, uses)) for uses in (now, pending[-NEAREST:], given[-NEAREST:]))
        if now or given or made:
            self._put(slot, Alive(storage, MADE, made, here, before, after))
