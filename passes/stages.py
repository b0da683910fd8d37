"""Stages: the graph that the solver decides over, contracted without changing its optimum.

A view (`reshape`, `permute`, a dropout that does nothing) costs nothing on any layout of its operand, and a resharding
before it or after it moves the same bytes. So views are no decisions: a tensor and all its views are one *storage* with
one layout, a resharded copy of it can be viewed in every way too, and is made once for all who want it. What is left are
the ops that compute, one stage each, and the storages between them. A solved plan then shows groups of neighbouring
stages that ended on one layout, which is what a person calls a stage.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import fx

from dsp_auto.mesh import Mesh
from dsp_auto.shards import nested_sizes

from .capture import GraphInput, Program
from .constrain import Constraint, constrain
from .enumerate_strategies import Strategy, enumerate_strategies, show_strategy, without_gradient
from .factors import Factors, Op, Value
from .layout import Layout, R, Shard, cutters
from .nodes import ValueId, value_id
from .presets import Space

# The share of all bytes that may be made on every device where it could be sharded: a text prompt, a timestep. It is that of
# the smallest tensors, taken together.
MAY_STAY_WHOLE = 0.05

INPUT, OP, OUTPUT = "input", "op", "output"


@dataclass(frozen=True)
class Storage:
    """A tensor and its views. `maker` is the index of the stage that makes it, `result` which of its results it is."""

    root: Value
    maker: int
    result: int
    kind: str  # "activation", "input" or "parameter" (buffers and constants too)

    @property
    def id(self) -> ValueId:
        return self.root.id


@dataclass(frozen=True, eq=False)
class Use:
    """One operand of one stage, equal to itself alone. `wanted[k]` is the layout of `storage` that the k-th strategy needs."""

    storage: ValueId
    stage: int
    operand: int
    wanted: tuple[Layout, ...]
    grad: bool  # a gradient flows back this way


@dataclass(frozen=True)
class Stage:
    """One decision: which of `strategies` runs. `made[k]` are the layouts of its results under the k-th."""

    index: int
    kind: str
    name: str
    op: Op | None
    strategies: tuple[Strategy, ...]
    results: tuple[ValueId, ...]
    made: tuple[tuple[Layout, ...], ...]
    uses: tuple[Use, ...]

    @property
    def path(self) -> str:
        """The module that the stage's op stands in; empty for the root, inputs and outputs."""
        return self.op.path if self.op is not None else ""

    @property
    def label(self) -> str:
        """For people: `blocks.3.attn (linear_7)`; inputs and the output have no op."""
        return f"{self.name} ({self.op.name})" if self.op is not None else self.name


@dataclass(frozen=True)
class StageGraph:
    """`views` gives for each value the storage it is a view of, and the storage's place of each of its places."""

    mesh: Mesh
    factors: Factors
    stages: tuple[Stage, ...]
    storages: Mapping[ValueId, Storage]
    views: Mapping[ValueId, tuple[ValueId, tuple[int, ...]]]
    training: bool
    parameters: frozenset[str] = frozenset()  # names of their nodes
    same_as: Mapping[str, str] = field(default_factory=dict)  # of these, the node of the same parameter that counts
    constrained: frozenset[int] = frozenset()  # the stages that the user's constraints speak of
    # Whether gradients of several parameters are all-reduced together: not in a stage of a pipeline, which may ask for the
    # gradients of inputs first and for those of parameters later (zero bubble). Parameters that go through one node of autograd
    # are then taken for one parameter that is used in many places: torch 2.13 runs all of backward twice, or fails where there
    # are several such nodes, and torch 2.11 counts gradients twice (pytorch/pytorch#180952).
    in_buckets: bool = True

    @cached_property
    def uses(self) -> Mapping[ValueId, tuple[Use, ...]]:
        found: dict[ValueId, list[Use]] = {}
        for stage in self.stages:
            for use in stage.uses:
                found.setdefault(use.storage, []).append(use)
        return {storage: tuple(uses) for storage, uses in found.items()}

    def __str__(self) -> str:
        return self.show()

    def show(self, choice: Sequence[int] | None = None) -> str:
        """A line for each op that is decided about: where it stands, its name, and its strategies, or the chosen one."""
        lines = []
        for stage in self.stages:
            if stage.op is None:
                continue
            own = stage.strategies if choice is None else stage.strategies[choice[stage.index] :][:1]
            shown = " | ".join(show_strategy(strategy, stage.op, self.factors) for strategy in own)
            lines.append(f"{stage.index:3} {stage.path or 'the model':12} {stage.op.name:12} {shown}")
        return "\n".join(lines)

    def local_bytes(self, storage: ValueId, layout: Layout) -> int:
        """Bytes of the storage on the rank that holds most of it (see `Value.nbytes`)."""
        root = self.storages[storage].root
        if root.on_host:
            return 0
        sizes = [self.factors.sizes[factor] for factor in root.factors]
        for place in {placement.place for placement in layout if isinstance(placement, Shard)}:
            sizes[place] = self.lengths(root.factors[place], cutters(layout, place))[0]
        return math.prod(sizes) * root.itemsize

    def local_shape(self, value: ValueId, layout: Layout, coordinate: Sequence[int]) -> tuple[int, ...]:
        """The shape of a value on the rank at `coordinate`; `layout` names places of the value's storage."""
        places = self.views[value][1]
        entry = self.factors.values[value]
        cut = {placement.place for placement in layout if isinstance(placement, Shard)}
        if not cut:
            return entry.shape
        shape, place = [], 0
        for dim, size in zip(entry.dims, entry.shape, strict=True):
            for factor in dim:
                if places[place] in cut:
                    mesh_dims = cutters(layout, places[place])
                    own = self.lengths(factor, mesh_dims)[self.line(mesh_dims, coordinate)]
                    size = size // self.factors.sizes[factor] * own
                place += 1
            shape.append(size)
        return tuple(shape)

    def lengths(self, factor: int, mesh_dims: Sequence[int]) -> tuple[int, ...]:
        """How much of a factor each rank of the mesh dims has that cut it; ranks count row-major."""
        return nested_sizes(self.factors.sizes[factor], tuple(self.mesh.sizes[m] for m in mesh_dims))

    def shards(self, stage: int, strategy: int) -> int:
        """Among how many ranks a strategy shares out a stage's work."""
        cuts = self.stages[stage].strategies[strategy].cuts
        return math.prod(ranks for cut, ranks in zip(cuts, self.mesh.sizes, strict=True) if cut)

    def line(self, mesh_dims: Sequence[int], coordinate: Sequence[int]) -> int:
        """Which of the ranks of some mesh dims together the one at `coordinate` is."""
        rank = 0
        for m in mesh_dims:
            rank = rank * self.mesh.sizes[m] + coordinate[m]
        return rank


def make_stages(
    program: Program,
    factors: Factors,
    space: Space,
    in_layouts: Mapping[str, Layout] | None = None,
    out_layouts: Mapping[int, Layout] | None = None,
    may_stay_whole: float | None = None,
    held: Mapping[str, Layout] | None = None,
    constraints: Sequence[Constraint] = (),
) -> StageGraph:
    """The stage graph of a program.

    in_layouts: placeholder name -> layout in which the input arrives; out_layouts: index among the graph's outputs ->
    layout in which it leaves. Replicate where nothing is said. may_stay_whole: of the stages that can be sharded
    only those with the smallest results, which together make this share of all bytes, may run replicated; the others, and
    these if they do not, are cut over as many mesh dims as they can be. None: any stage as it likes.
    held: parameter name -> layout in which ranks hold it, where that is settled; those that it does not name are whole.
    constraints: of the user, on the strategies of ops (see `constrain`).
    """
    mesh = space.mesh
    replicated = (R,) * len(mesh.sizes)
    nothing, uncut = (None,) * len(mesh.sizes), ((),) * len(mesh.sizes)
    stages: list[Stage] = []
    storages: dict[ValueId, Storage] = {}
    views: dict[ValueId, tuple[ValueId, tuple[int, ...]]] = {}

    def add_storage(value: ValueId, maker: int, result: int, kind: str) -> None:
        root = factors.values[value]
        storages[value] = Storage(root, maker, result, kind)
        views[value] = (value, tuple(range(len(root.factors))))

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    sources: list[tuple[fx.Node, GraphInput | None]] = [*zip(placeholders, program.inputs, strict=True)]
    sources += [(node, None) for node in program.graph.nodes if node.op == "get_attr"]
    for node, entry in sources:
        value = (node.name, 0)
        if value not in factors.values:
            continue
        kind = "input" if entry is not None and entry.kind == "input" else "parameter"
        layouts = [(in_layouts or {}).get(node.name, replicated)]
        if entry is not None and entry.kind == "parameter":
            if held is not None:
                layouts = [held.get(entry.name, replicated)]
            elif space.held:
                layouts += _in_parts(factors.values[value], factors, space)
        index = len(stages)
        strategies = tuple(Strategy(nothing, uncut, (), (layout,)) for layout in layouts)
        name = entry.name if entry is not None else str(node.target)
        stages.append(Stage(index, INPUT, name, None, strategies, (value,), tuple((x,) for x in layouts), ()))
        add_storage(value, index, 0, kind)

    def translated(layout: Layout, value: ValueId) -> Layout:
        places = views[value][1]
        return tuple(Shard(places[p.place]) if isinstance(p, Shard) else p for p in layout)

    known: dict[object, tuple[Strategy, ...]] = {}
    constrained: set[int] = set()
    limit = math.inf if may_stay_whole is None else _small(factors, space, may_stay_whole)
    for op in factors.ops:
        if op.is_view:
            storage, places = views[op.operands[0]]
            operand, result = factors.values[op.operands[0]], factors.values[op.results[0]]
            rule = op.known_rule
            before, after = op.places(rule.inputs[0], operand), op.places(rule.outputs[0], result)
            taken = [0] * len(after)
            for axis, place in after.items():
                taken[place] = places[before[axis]]
            views[op.results[0]] = (storage, tuple(taken))
            continue
        is_large = any(factors.values[result].nbytes > limit for result in op.results)
        own = tuple(one for one in constraints if one.covers(op))
        key = (is_large, _key(op, factors, space), own and op.name)
        if key not in known:
            found = constrain(op, enumerate_strategies(op, factors, space), own, factors, mesh)
            if may_stay_whole is not None:
                whole = () if is_large else tuple(own for own in found if not own.together)
                found = tuple(dict.fromkeys((*whole, *_most_sharded(found))))
            known[key] = found
        strategies = known[key]
        index = len(stages)
        if own:
            constrained.add(index)
        for number, result in enumerate(op.results):
            add_storage(result, index, number, "activation")
        flows = any(factors.values[result].requires_grad for result in op.results)
        uses = tuple(
            Use(
                views[operand][0],
                index,
                number,
                tuple(translated(strategy.operands[number], operand) for strategy in strategies),
                flows and factors.values[operand].requires_grad,
            )
            for number, operand in enumerate(op.operands)
        )
        made = tuple(strategy.results for strategy in strategies)
        stages.append(Stage(index, OP, op.path or op.name, op, strategies, op.results, made, uses))

    index = len(stages)
    outputs = []
    for number, argument in enumerate(program.graph.output_node().args[0]):
        value = None if not hasattr(argument, "meta") else value_id(argument)
        if value is None or value not in factors.values:
            continue
        layout = (out_layouts or {}).get(number, replicated)
        # What is written back to a buffer has no gradient.
        grad = factors.values[value].requires_grad and number >= len(program.mutated)
        outputs.append(Use(views[value][0], index, number, (translated(layout, value),), grad))
    strategy = Strategy(nothing, uncut, tuple(use.wanted[0] for use in outputs), ())
    stages.append(Stage(index, OUTPUT, "output", None, (strategy,), (), ((),), tuple(outputs)))
    parameters = frozenset(node.name for node, entry in sources if entry is not None and entry.kind == "parameter")
    nodes = {entry.name: node.name for node, entry in sources if entry is not None}
    same_as = {node.name: nodes[entry.same_as] for node, entry in sources if entry is not None and entry.same_as}
    return StageGraph(
        mesh,
        factors,
        tuple(stages),
        storages,
        views,
        program.training,
        parameters,
        same_as,
        frozenset(constrained),
        in_buckets=not program.staged,
    )


def _most_sharded(strategies: Sequence[Strategy]) -> tuple[Strategy, ...]:
    """Those that are cut over as many ranks as any."""
    most = max(sum(bool(cut) for cut in strategy.cuts) for strategy in strategies)
    return tuple(strategy for strategy in strategies if sum(bool(cut) for cut in strategy.cuts) == most)


def dim_of(value: Value, place: int, sizes: Mapping[int, int]) -> tuple[int, int]:
    """The dim that a place lies in, and how many runs of its factor the dim has: the product of what comes before it. In
    `(3 H D) C` H has 3 runs in dim 0."""
    first = 0
    for dim, own in enumerate(value.dims):
        if place < first + len(own):
            return dim, math.prod(sizes[factor] for factor in own[: place - first])
        first += len(own)
    raise IndexError(f"{value.dims} has no place {place}")


def _in_parts(parameter: Value, factors: Factors, space: Space) -> list[Layout]:
    """The layouts in which ranks may hold equal parts of a parameter: along one of its hidden dims or heads.

    A mesh dim of the user's cuts it as one, split or not. Several of them cut what makes up its dim from the outside only: a
    DTensor, which is what the parameter becomes, has no placements for anything else.
    """
    mesh = space.mesh
    found: list[Layout] = []
    for place, factor in enumerate(parameter.factors):
        if factor not in factors.inner or parameter.factors.count(factor) > 1:
            continue
        _, runs = dim_of(parameter, place, factors.sizes)
        may = [name for name in mesh.whole if all(factor in space.factors[m] for m in mesh.dims_of(name))]
        for count in range(1, len(may) + 1 if runs == 1 else 2):
            for names in itertools.combinations(may, count):
                if factors.sizes[factor] % math.prod(mesh.whole[name] for name in names) == 0:
                    found.append(tuple(Shard(place) if name in names else R for name in mesh.part_of))
    return found


def _small(factors: Factors, space: Space, share: float) -> float:
    """The size up to which all results that could be sharded together make `share` of all bytes that ops make."""
    sizes: Counter[int] = Counter()
    total = 0
    for op in factors.ops:
        if op.is_view:
            continue
        own = [factors.values[result].nbytes for result in op.results]
        total += sum(own)
        if any(space.anywhere.issuperset(op.factors(cut)) for cut in op.cuts):
            sizes.update({max(own, default=0): sum(own)})
    limit, together = 0, 0
    for size, nbytes in sorted(sizes.items()):
        together += nbytes
        if together > share * total:
            break
        limit = size
    return limit


def _key(op: Op, factors: Factors, space: Space) -> tuple:
    """Ops with equal keys have equal strategies: the same rule over the same shardable factors."""
    return (
        id(op.rule),
        tuple((axis, tuple(f if f in space.anywhere else None for f in own)) for axis, own in op.axes.items()),
        op.opaque,
        tuple((factors.values[operand].requires_grad, operand[0] in factors.weights) for operand in op.operands),
        tuple(factors.values[result].requires_grad for result in op.results),
    )


@lru_cache(maxsize=4096)
def strip(layout: Layout) -> Layout:
    """The layout with one kind of Replicate."""
    return tuple(without_gradient(placement) for placement in layout)
