"""Rewrite: the program that one rank runs under a plan.

Every op is emitted on this rank's shapes; where an operand is wanted in another layout than it is made in, primitives
(`torch.ops.dsp.*`) come first. A storage is resharded once for all who want it that way, and its views are taken again
from the resharded copy. Parameters that sharded work uses are replicated in buckets, one all-reduce of gradients each.
Each node keeps its module path, and has its local shape in `meta["val"]` from running the local program on fake tensors.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto.primitives  # noqa: F401  registers torch.ops.dsp
from dsp_auto.randomness import on_shard
from dsp_auto.shards import shard_sizes

from .buckets import Bucket
from .capture import Program
from .factors import Cut, Op
from .layout import Layout, Replicate, Shard, Step, cutters, place_of
from .lifetimes import COPY, RESULT, Kept
from .nodes import ValueId, is_tensor, value_id
from .notation import Emit, Local
from .overlap import Early
from .problem import Problem
from .solve import Solution
from .stages import Stage, StageGraph, Use

aten, dsp = torch.ops.aten, torch.ops.dsp
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


def rewrite(
    program: Program,
    problem: Problem,
    solution: Solution,
    buckets: Sequence[Bucket],
    coordinate: Sequence[int],
    groups: Mapping[tuple[int, ...], str],
    shown: Mapping[int, int],
    early: Sequence[Early] = (),
) -> fx.Graph:
    """The local program of the rank at `coordinate` of the mesh; its `get_attr`s are those of `program.module`.

    groups: c10d group name of this rank's line along each set of mesh dims that is communicated over (`Problem.lines`).
    shown: by the index of a stage, the stage of the plan that it is in, which the primitives name in their errors.
    early: the collectives that are issued before what they give is wanted.
    Takes this rank's inputs in the order of `program.inputs` and returns what `program` returns, in local layouts.
    """
    return _Writer(program, problem, solution, buckets, coordinate, groups, shown, early).write()


class _Writer:
    def __init__(
        self,
        program: Program,
        problem: Problem,
        solution: Solution,
        buckets: Sequence[Bucket],
        coordinate: Sequence[int],
        groups: Mapping[tuple[int, ...], str],
        shown: Mapping[int, int],
        early: Sequence[Early],
    ) -> None:
        self.program, self.problem, self.choice = program, problem, solution.choice
        self.recomputed = solution.recomputed | problem.forced
        self.graph: StageGraph = problem.graph
        self.factors = self.graph.factors
        self.coordinate, self.groups, self.shown = coordinate, groups, shown
        self.out = fx.Graph()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies: dict[tuple, fx.Node] = {}  # (storage, layout) -> node
        self.early: dict[int, list[Early]] = defaultdict(list)  # by the stage before which they are issued
        for one in early:
            self.early[one.before].append(one)
        self.coming: dict[tuple, tuple[Step, list[fx.Node]]] = {}  # (storage, layout) -> what `start_...` gave
        self.numbers: dict[str, fx.Node] = {}  # results that are no tensors
        self.viewed: dict[tuple, fx.Node] = {}
        self.view_ops = {op.results[0]: op for op in self.factors.ops if op.is_view}
        self.in_bucket = {storage: bucket for bucket in buckets for storage in bucket.storages}
        self.interned: dict[tuple, torch.Tensor] = {}
        self.results: dict[tuple, Any] = {}
        self.meta: dict[str, Any] = {}
        self.at = ""  # for whom ops are emitted, for people
        # Where an output leaves cut, each rank has a loss of its own, which may use other parameters than another's.
        self.losses_differ = any(isinstance(p, Shard) for use in self.graph.stages[-1].uses for p in use.wanted[0])

    def write(self) -> fx.Graph:
        ops = {stage.op.name: (stage.op, stage) for stage in self.graph.stages if stage.op is not None}
        with self.fake:
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    self._placeholder(node)
                elif node.op == "get_attr":
                    new = self.out.get_attr(node.target)
                    self._source(node, new)
                elif node.op == "call_function" and node.name in ops:
                    self._op(*ops[node.name])
                elif node.op == "output":
                    self._output(node)
        return self.out

    # --- nodes

    def _placeholder(self, node: fx.Node) -> None:
        new = self.out.placeholder(node.name)
        if (node.name, 0) in self.graph.storages:
            self._source(node, new)
        else:
            new.meta["val"] = node.meta.get("val")

    def _source(self, node: fx.Node, new: fx.Node) -> None:
        storage = (node.name, 0)
        layout = self.problem.made(storage, self.choice)
        value = node.meta["val"]
        new.meta["val"] = self._fake(self.local_shape(storage, layout), value)
        new.meta["made"] = storage  # which others look for: see `watch`
        self.copies[storage, layout] = new

    def _fake(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A fake tensor like `like`, of the given local shape."""
        shape = torch.Size(shape)
        stride = like.stride() if shape == like.shape else _contiguous(shape)
        key = (shape, stride, like.dtype, like.device)
        if key not in self.interned:
            self.interned[key] = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        return self.interned[key]

    def _interned(self, value: Any) -> Any:
        """One fake tensor for all that look alike, so that equal calls are met again (see `emit`)."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._interned(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        return self.interned.setdefault((value.shape, value.stride(), value.dtype, value.device), value)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One node of the local program; its value comes from running the op on fake tensors, once per distinct call."""
        new = self.out.call_function(target, args, kwargs)
        new.meta.update(self.meta)
        key = (target, _identity(args), _identity(kwargs))
        if key not in self.results:
            values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            self.results[key] = self._interned(target(*values[0], **values[1]))
        new.meta["val"] = self.results[key]
        if getattr(target, "namespace", None) == "dsp":
            new.kwargs = {**kwargs, "where": self.at}
        return new

    def _op(self, op: Op, stage: Stage) -> None:
        for early in self.early.get(stage.index, ()):
            self._start(early)
        strategy = stage.strategies[self.choice[stage.index]]
        self.meta, self.at = self._meta_of(stage), self._site(stage)
        operands = iter([self.operand(value, use) for value, use in zip(op.operands, stage.uses, strict=True)])
        args, kwargs = fx.map_arg(
            (op.node.args, op.node.kwargs), lambda n: next(operands) if is_tensor(n) else self.numbers[n.name]
        )
        layouts = stage.made[self.choice[stage.index]]
        if op.rule is None:
            result = self.emit(op.node.target, *args, **kwargs)
        else:
            emit = self._drawing(strategy.cuts) if op.rule.is_random else self.emit
            result = op.rule.call(emit, op.node.target, args, kwargs, self._here(op, strategy.together))
        if not op.results:
            self.numbers[op.name] = result
            return
        apart = isinstance(result, (tuple, list))  # written op by op, one node a result
        values = tuple(r.meta["val"] for r in result) if apart else result.meta["val"]
        single = isinstance(values, torch.Tensor)
        for storage, layout in zip(op.results, layouts, strict=True):
            new = result[storage[1]] if apart else result
            if not single and not apart:
                new = self._result(result, storage[1])
            expected = self.local_shape(storage, layout)
            if tuple(new.meta["val"].shape) != expected:
                raise AssertionError(
                    f"{op.path}: {op.name} ({op.node.target}) gives {list(new.meta['val'].shape)} on this rank where its "
                    f"rule {op.rule} says {list(expected)}"
                )
            new.meta["made"] = storage
            self.copies[storage, layout] = new

    def _meta_of(self, stage: Stage) -> dict[str, Any]:
        """What the nodes of a stage's op carry."""
        op, number = stage.op, self.problem.region_of.get(stage.index)
        if op is None:
            return {}
        meta = _kept_meta(op.node)
        if number in self.recomputed:
            meta["region"] = number
            meta["kept"] = bool(op.results) and Kept(RESULT, stage.index, op.results[0]) in self.recomputed
        return meta

    def _drawing(self, cuts: Sequence[Sequence[Cut]]) -> Emit:
        """`emit` for an op that draws random numbers: each of its shards other ones, unless all draw what one device would."""
        mesh_dims = [m for m, cut in enumerate(cuts) if cut]
        shard, shards = self.graph.line(mesh_dims, self.coordinate), self._ranks(mesh_dims)
        if shards == 1 or self.factors.rng == "serial":
            return self.emit

        def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            if torch.Tag.nondeterministic_seeded in target.tags:
                return self.emit(on_shard, target, shard, *args, **kwargs)
            return self.emit(target, *args, **kwargs)

        return emit

    def _site(self, stage: Stage) -> str:
        path = stage.op.path if stage.op is not None else "output"
        return f"stage {self.shown[stage.index]}, {path}" if path else f"stage {self.shown[stage.index]}"

    def _here(self, op: Op, together: Mapping[tuple[Cut, ...], tuple[int, ...]]) -> Local:
        return self.problem.here(op, together, self.coordinate, self.groups)

    def _ranks(self, mesh_dims: Sequence[int]) -> int:
        return math.prod(self.graph.mesh.sizes[m] for m in mesh_dims)

    def _where(self, mesh_dims: tuple[int, ...]) -> tuple[int, int, str]:
        """How many ranks some mesh dims have together, which this one is, and their group."""
        return self._ranks(mesh_dims), self.graph.line(mesh_dims, self.coordinate), self.groups.get(mesh_dims, "")

    def _output(self, node: fx.Node) -> None:
        stage = self.graph.stages[-1]
        uses = iter(stage.uses)
        self.meta, self.at = {}, self._site(stage)
        results = []
        for argument in node.args[0]:
            if isinstance(argument, fx.Node) and value_id(argument) in self.factors.values:
                results.append(self.operand(value_id(argument), next(uses)))
            elif isinstance(argument, fx.Node):
                raise AssertionError(f"the graph returns {argument}, which is no tensor")
            else:
                results.append(argument)
        self.out.output(tuple(results)).meta["val"] = tuple(
            r.meta["val"] if isinstance(r, fx.Node) else r for r in results
        )

    # --- layouts

    def local_shape(self, value: ValueId, layout: Layout) -> tuple[int, ...]:
        return self.graph.local_shape(value, layout, self.coordinate)

    def _length(self, factor: int, mesh_dims: tuple[int, ...]) -> int:
        """This rank's share of a factor that mesh dims cut."""
        return self.graph.lengths(factor, mesh_dims)[self.graph.line(mesh_dims, self.coordinate)]

    def operand(self, value: ValueId, use: Use) -> fx.Node:
        """`value` in the layout that `use` wants, resharded and viewed as needed."""
        source = current = self.problem.made(use.storage, self.choice)
        target = self.problem.target(use, source, use.wanted[self.choice[use.stage]])
        if target != source:
            meta, at = self.meta, self.at
            self._reshard_for(use.storage, source, target)
            for step in self.problem.known_resharding(use.storage, source, target, use.grad).steps:
                if (use.storage, step.after) not in self.copies:
                    self._step(use.storage, current, step)
                current = step.after
            self.meta, self.at = meta, at
        return self._view(value, current)

    def _reshard_for(self, storage: ValueId, source: Layout, target: Layout) -> None:
        """What the nodes carry that reshard a storage for the op that is written."""
        meta = self.meta
        if self.problem.is_inside(storage, meta.get("region"), source, target):
            kept = Kept(COPY, self.graph.storages[storage].maker, storage)
            self.meta = {**meta, "kept": kept in self.recomputed}
        else:
            self.meta = {key: value for key, value in meta.items() if key not in ("region", "kept")}
        self.at = f"{self.at}, {storage[0]}"

    def _start(self, early: Early) -> None:
        """Issues a collective for an op that comes later."""
        wanted = self.graph.stages[early.wanted]
        self.meta, self.at = self._meta_of(wanted), self._site(wanted)
        self._reshard_for(early.storage, early.source, early.target)
        current = early.source
        for step in early.steps:
            if (early.storage, step.after) not in self.copies:
                self._step(early.storage, current, step, half="start_" if step is early.steps[-1] else "")
            current = step.after

    def _step(self, storage: ValueId, current: Layout, step: Step, half: str = "") -> None:
        """half: "start_" for the first half of a primitive alone."""
        key = (storage, step.after)
        if step.primitive == "replicate" and storage in self.in_bucket:
            steps = next(steps for steps in self.in_bucket[storage].steps if step in steps)
            self._replicate_bucket(self.in_bucket[storage].storages, steps)
        elif half:
            started = self._primitive(storage, [self.copies[storage, current]], step, half)
            self.coming[key] = step, [self._result(started, number) for number in (0, 1)]
        elif key in self.coming:
            step, halves = self.coming[key]
            self.copies[key] = self._primitive(storage, halves, step, "wait_")
        else:
            self.copies[key] = self._primitive(storage, [self.copies[storage, current]], step)

    def _result(self, node: fx.Node, number: int) -> fx.Node:
        """One of the results of a node."""
        new = self.out.call_function(operator.getitem, (node, number))
        new.meta.update(self.meta, val=node.meta["val"][number])
        return new

    def _replicate_bucket(self, storages: Sequence[ValueId], steps: Sequence[Step]) -> None:
        """One `replicate` of parameters that go the same way, each from a layout of its own."""
        meta, self.meta = self.meta, {}
        nodes = [self.copies[storage, step.before] for storage, step in zip(storages, steps, strict=True)]
        arguments = (nodes, *self._where(steps[0].mesh_dims), self.losses_differ)
        result = self.out.call_function(dsp.replicate.default, arguments, {"where": self.at})
        result.meta["val"] = [node.meta["val"] for node in nodes]  # the identity
        for number, (storage, step) in enumerate(zip(storages, steps, strict=True)):
            self.copies[storage, step.after] = self._result(result, number)
        self.meta = meta

    def _primitive(self, storage: ValueId, operands: Sequence[fx.Node], step: Step, half: str = "") -> fx.Node:
        """A step on its operand; of its half "wait_" on what the half "start_" gave."""
        split_dims, dim_of = self._unmerged(
            storage, [p.place for p in (step.source, step.target) if isinstance(p, Shard)]
        )
        if split_dims is not None and half != "wait_":
            operands = [self.emit(aten.reshape.default, *operands, self._shape(storage, split_dims, step.before))]
        arguments = self._arguments(storage, step, dim_of)
        if step.primitive == "replicate":
            return self._result(self.emit(dsp.replicate.default, list(operands), *arguments), 0)
        new = self.emit(getattr(dsp, half + step.primitive).default, *operands, *arguments)
        if split_dims is not None and half != "start_":
            new = self.emit(aten.reshape.default, new, list(self.local_shape(storage, step.after)))
        return new

    def _arguments(self, storage: ValueId, step: Step, dim_of: Mapping[int, int]) -> list[Any]:
        """Of a step's primitive, after its tensors. dim_of: the dim of each place that is sharded."""
        source, target, where = step.source, step.target, self._where(step.mesh_dims)
        ends = [dim_of[place_of(end)] for end in (source, target) if isinstance(end, Shard)]
        before = [self._sizes(storage, step, step.before)] if isinstance(source, Shard) else []
        # How a dim is cut is said only where it is not as `torch.tensor_split` does.
        after = [self._sizes(storage, step, step.after)] if isinstance(target, Shard) else []
        uneven = [sizes for sizes in after if len(sizes) > 1]
        if step.primitive == "hierarchical_switch":
            where = (*self._where(step.mesh_dims[:1]), *self._where(step.mesh_dims[1:]))
        return {
            "switch": [*ends[:1], *before, *ends[1:], *where, *uneven],
            "hierarchical_switch": [*ends[:1], *before, *ends[1:], *where, *uneven],
            "split": [*ends, *where, _partial(source), *uneven],
            "gather": [*ends, *before, *where, _partial(target)],
            "reduce": [*where, _partial(target)],
            "reduce_scatter": [*ends, *where, *uneven],
            "replicate": [*where, self.losses_differ],
        }[step.primitive]

    def _sizes(self, storage: ValueId, step: Step, layout: Layout) -> list[int]:
        """How a step's mesh dims cut a dim in `layout`: its size where they cut as `torch.tensor_split` does, else the size of
        every rank's shard."""
        place = place_of(layout[step.mesh_dims[0]])
        factor, every = self.graph.storages[storage].root.factors[place], cutters(layout, place)
        count, lengths = self._ranks(step.mesh_dims), self.graph.lengths(factor, every)
        # The step's mesh dims are the innermost: their ranks stand side by side.
        first = self.graph.line(every, self.coordinate) // count * count
        own = list(lengths[first : first + count])
        return [sum(own)] if own == shard_sizes(sum(own), count) else own

    def _unmerged(self, storage: ValueId, places: Sequence[int]) -> tuple[list[list[int]] | None, dict[int, int]]:
        """Dims (as lists of places) with the sharded places' dims taken apart, None where none is merged; and the dim of
        each place."""
        dims: list[list[int]] = []
        place, merged = 0, False
        for dim in self.graph.storages[storage].root.dims:
            own = list(range(place, place + len(dim)))
            place += len(dim)
            if len(own) > 1 and any(p in own for p in places):
                dims += [[p] for p in own]
                merged = True
            else:
                dims.append(own)
        return dims if merged else None, {p: n for n, dim in enumerate(dims) for p in dim}

    def _shape(self, storage: ValueId, dims: Sequence[Sequence[int]], layout: Layout) -> list[int]:
        """This rank's shape of a storage whose dims are the given lists of places."""
        factors = self.graph.storages[storage].root.factors
        return [math.prod(self._length(factors[p], cutters(layout, p)) for p in dim) for dim in dims]

    def _view(self, value: ValueId, layout: Layout) -> fx.Node:
        """`value`, a view of a storage, taken from the storage's copy in `layout`."""
        storage = self.graph.views[value][0]
        if value == storage:
            return self.copies[storage, layout]
        if (value, layout) not in self.viewed:
            op = self.view_ops[value]
            operand = self._view(op.operands[0], layout)
            meta = self.meta
            # A view is taken where it is used.
            self.meta = _kept_meta(op.node)
            self.meta |= {key: value for key, value in meta.items() if key == "region"}
            args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), lambda node: operand)
            places = self.graph.views[value][1]
            rule = op.known_rule
            keys = {places[place]: key for key, place in op.places(rule.outputs[0], self.factors.values[value]).items()}
            cuts: dict[tuple[Cut, ...], tuple[int, ...]] = {
                (keys[p.place],): cutters(layout, p.place) for p in layout if isinstance(p, Shard)
            }
            new = rule.call(self.emit, op.node.target, args, kwargs, self._here(op, cuts))
            self.viewed[value, layout] = new
            self.meta = meta
        return self.viewed[value, layout]


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _KEPT_META if key in node.meta}


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def _identity(argument: Any) -> Any:
    """Hashable, and equal for arguments that are the same but for which node they come from."""
    if isinstance(argument, fx.Node):
        return id(argument.meta["val"])
    if isinstance(argument, (tuple, list)):
        return tuple(_identity(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _identity(item)) for name, item in argument.items())
    return (type(argument), argument)


def _partial(placement: Any) -> bool:
    return isinstance(placement, Replicate) and placement.partial_grad
