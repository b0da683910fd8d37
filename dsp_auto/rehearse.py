"""Rehearse: a plan carried out by all ranks of its mesh in this one process, against one device.

Every rank runs its own program on its own part of the arguments (see `simulate`); what it holds afterwards, gradients and
traffic included, is compared with its part of what one device computes. No process group, and nothing of the model
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import simulate
from .errors import DspError
from .measure import CountCollectives
from .mesh import Mesh, as_mesh
from .passes.capture import Program, capture, ordered_kwargs, positions_of
from .passes.check_gradients import unchanged
from .passes.checkpointing import local_module
from .passes.layout import Layout, Shard, cutters
from .passes.nodes import ValueId, value_id
from .passes.solve import Solution
from .passes.stages import StageGraph
from .plan import Plan
from .planner import Options, Prepared, decide, finish, prepare
from .verify import Traffic, traffic, worst


@dataclass(frozen=True)
class Outcome:
    """What one device, or one rank, ends with.

    outputs: by name (`output 0`, and `buffer mean` for what the model changes), without a gradient. gradients: of every
    parameter and input that requires one, None where nothing reaches it. sent: (primitive, "forward" or "backward") ->
    collectives issued and wire bytes sent.
    """

    outputs: Mapping[str, Any]
    gradients: Mapping[str, Tensor | None]
    sent: Mapping[tuple[str, str], tuple[int, float]]


@dataclass(frozen=True)
class Rehearsal:
    """`ranks`: what each rank ended with, in the layouts of its program; `expected`: its part of what one device has.

    output, gradient: the largest deviation of any rank, relative (see `verify.deviation`), and whose it is.
    """

    plan: Plan
    ranks: tuple[Outcome, ...]
    expected: tuple[Outcome, ...]
    output: tuple[float, str]
    gradient: tuple[float, str]

    @property
    def traffic(self) -> list[Traffic]:
        """Planned and measured bytes of every primitive."""
        return traffic(self.plan, [rank.sent for rank in self.ranks])


def rehearse(
    model: nn.Module | Program,
    mesh: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    capacity: int | str | None = None,
    hardware: Any = None,
    **options: Any,
) -> Rehearsal:
    """Plan `model(*args, **kwargs)` over `mesh`, run it on one device and on all ranks, and compare.

    model: a module on CPU; or a captured program, whose `args` are then the values of its `inputs`, in their order.
    mesh: `"3"`, `"2x2"`, a `Mesh` or a DeviceMesh. Arguments are whole; `in_layouts` says what each rank gets of them.
    capacity, hardware, options: as in `dsp_auto.plan`. Under `torch.no_grad()` only outputs are compared. Every run starts
    from the state of torch's default CPU generator, which is left as it was.

    Raises what `plan` raises, AgreementError where the ranks' collectives do not meet, and DspError where a rank's result
    has another shape, dtype, or presence of a gradient than on one device.
    """
    mesh = as_mesh(mesh)
    checked = Options.of(capacity, hardware, **options)
    program = model if isinstance(model, Program) else capture(model, tuple(args), kwargs)
    prepared = prepare(program, mesh, checked)
    rehearsed = Rehearsed.of(model, tuple(args), dict(kwargs or {}), prepared, decide(prepared))
    return run(rehearsed)


@dataclass(frozen=True)
class Rehearsed:
    """A plan about to be rehearsed: the programs of all ranks, and whole values of the inputs of `program`.

    alone: the model as a function of `values` that gives what the program gives.
    """

    prepared: Prepared
    solution: Solution
    parts: Parts
    coordinates: tuple[tuple[int, ...], ...]
    plan: Plan
    graphs: tuple[fx.Graph, ...]
    values: list[Any]
    alone: Callable[..., Sequence[Any]]

    @classmethod
    def of(
        cls, model: nn.Module | Program, args: tuple, kwargs: dict, prepared: Prepared, solution: Solution
    ) -> Rehearsed:
        program, problem = prepared.program, prepared.problem(solution.space)
        if isinstance(model, Program):
            values, alone = list(args), model.module.forward
        else:
            values, alone = _of_model(model, program, args, kwargs)
        mesh = problem.graph.mesh
        parts = Parts.of(program, problem.graph, lambda value: problem.made(value, solution.choice))
        coordinates = tuple(mesh.coordinate(rank) for rank in range(mesh.ranks))
        written = [finish(prepared, solution, rank, _lines(mesh, own)) for rank, own in enumerate(coordinates)]
        graphs = tuple(graph for _, graph in written)
        return cls(prepared, solution, parts, coordinates, written[0][0], graphs, values, alone)


def run(rehearsed: Rehearsed) -> Rehearsal:
    """One device and all ranks, compared. Raises as `rehearse`."""
    program, values, parts = rehearsed.prepared.program, rehearsed.values, rehearsed.parts
    coordinates, alone = rehearsed.coordinates, rehearsed.alone
    local = [local_module(graph, program.module).forward for graph in rehearsed.graphs]
    wanted = [isinstance(value, Tensor) and value.requires_grad for value in values]

    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        whole = Run(alone, values, wanted)
        cotangents = cotangents_of(program, whole.results)
        whole.backward(cotangents)
        torch.set_rng_state(state)

        def on_rank(rank: int) -> tuple[Run, dict]:
            with CountCollectives() as count:
                run = Run(local[rank], parts.of_inputs(values, coordinates[rank]), wanted)
                run.backward(parts.of_results(cotangents, coordinates[rank]))
            return run, dict(count.by_primitive)

        runs = simulate.run(len(coordinates), on_rank)

    names = _names(program)
    ranks = tuple(_outcome(*names, run.results, run.gradients, wanted, sent) for run, sent in runs)
    expected = tuple(
        _outcome(*names, parts.of_results(whole.results, own), parts.of_inputs(whole.gradients, own), wanted, {})
        for own in coordinates
    )
    output, gradient = (0.0, ""), (0.0, "")
    for rank, (own, reference) in enumerate(zip(ranks, expected)):
        _check_outputs(rank, own.outputs, reference.outputs)
        floats = [name for name, value in reference.outputs.items() if _is_inexact(value)]
        output = max(output, worst(*({name: of[name] for name in floats} for of in (own.outputs, reference.outputs))))
        gradient = max(gradient, worst(own.gradients, reference.gradients))
    return Rehearsal(rehearsed.plan, ranks, expected, output, gradient)


def _of_model(model: nn.Module, program: Program, args: tuple, kwargs: dict) -> tuple[list[Any], Callable[..., list]]:
    """The values of `program.inputs`, and the model as a function of them that gives what the program gives."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    leaves = iter(pytree.tree_leaves((args, ordered_kwargs(kwargs, program.in_spec))))
    values = [
        next(leaves) if entry.kind == "input" else entry.value if entry.kind == "constant" else held[entry.name]
        for entry in program.inputs
    ]
    positions = positions_of(program.inputs)

    def alone(*given: Any) -> list[Any]:
        given = list(given)
        for key in program.mutated:
            given[positions[key]] = given[positions[key]].clone()
        entries = list(zip(program.inputs, values, given, strict=True))
        instead = {id(old): new for entry, old, new in entries if entry.kind in ("parameter", "buffer")}
        inputs = [new for entry, _, new in entries if entry.kind == "input"]
        own_args, own_kwargs = pytree.tree_unflatten(inputs, program.in_spec)
        # Not functional_call: it forgets a buffer that forward() sets anew.
        with unchanged(model):
            for module in model.modules():
                for kept in (module._parameters, module._buffers):
                    kept.update({name: instead[id(old)] for name, old in kept.items() if id(old) in instead})
            results = model(*own_args, **own_kwargs)
            changed = [
                model.get_buffer(name) if kind == "buffer" else given[positions[kind, name]]
                for kind, name in program.mutated
            ]
        return changed + pytree.tree_leaves(results)

    return values, alone


def _lines(mesh: Mesh, coordinate: Sequence[int]) -> Callable[[tuple[int, ...]], str]:
    """A group's name for the line of ranks through `coordinate` along some mesh dims."""

    def name(mesh_dims: tuple[int, ...]) -> str:
        others = tuple("*" if m in mesh_dims else at for m, at in enumerate(coordinate))
        return f"{mesh.label(mesh_dims)} at {others}"

    return name


class Run:
    """One run of a program on leaves of its own, which share their values with those given."""

    def __init__(self, forward: Callable[..., Sequence[Any]], values: Sequence[Any], wanted: Sequence[bool]) -> None:
        made: dict[int, Tensor] = {}  # a parameter with two names is one leaf
        for value, grad in zip(values, wanted, strict=True):
            if isinstance(value, Tensor) and id(value) not in made:
                # What has no gradient may be changed: some ops do so to buffers behind their schema's back.
                made[id(value)] = value.detach().requires_grad_() if grad else value.detach().clone()
        self.leaves = [made.get(id(value), value) for value in values]
        self.results = list(forward(*self.leaves))
        self.gradients: list[Tensor | None] = [None] * len(self.leaves)

    def backward(self, cotangents: Sequence[Tensor | None]) -> None:
        pairs = [(result, grad) for result, grad in zip(self.results, cotangents, strict=True) if grad is not None]
        for result, _ in pairs:
            if not result.requires_grad:
                raise DspError(
                    asked="cannot compare gradients",
                    found=f"an output of shape {list(result.shape)} has one on one device, and none on this rank",
                )
        graded = {id(leaf): leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
        if pairs and graded:
            outputs, grads = zip(*pairs)
            torch.autograd.backward(outputs, grads)  # not autograd.grad, which some checkpoints refuse
            self.gradients = [leaf.grad if id(leaf) in graded else None for leaf in self.leaves]
        self.results = [result.detach() if isinstance(result, Tensor) else result for result in self.results]


def cotangents_of(program: Program, results: Sequence[Any]) -> list[Tensor | None]:
    """Random ones of the outputs that have a gradient; what the model writes back to its buffers has none."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(result.shape, generator=generator, dtype=result.dtype)
        if n >= len(program.mutated) and isinstance(result, Tensor) and result.requires_grad
        else None
        for n, result in enumerate(results)
    ]


@dataclass(frozen=True)
class Parts:
    """Where each rank finds its part of the whole inputs and results: value and layout, None for what is no tensor."""

    graph: StageGraph
    inputs: tuple[tuple[ValueId, Layout] | None, ...]
    results: tuple[tuple[ValueId, Layout] | None, ...]

    @classmethod
    def of(cls, program: Program, graph: StageGraph, made: Callable[[ValueId], Layout]) -> Parts:
        sources = [(node.name, 0) for node in program.graph.nodes if node.op == "placeholder"]
        inputs = tuple((value, made(value)) if value in graph.storages else None for value in sources)
        uses = iter(graph.stages[-1].uses)
        outputs = [value_id(out) if isinstance(out, fx.Node) else None for out in program.graph.output_node().args[0]]
        results = tuple(
            (out, next(uses).wanted[0]) if out is not None and out in graph.views else None for out in outputs
        )
        return cls(graph, inputs, results)

    def of_inputs(self, values: Sequence[Any], coordinate: Sequence[int]) -> list[Any]:
        return [self.part(value, at, coordinate) for value, at in zip(values, self.inputs, strict=True)]

    def of_results(self, values: Sequence[Any], coordinate: Sequence[int]) -> list[Any]:
        return [self.part(value, at, coordinate) for value, at in zip(values, self.results, strict=True)]

    @torch.no_grad()
    def part(self, whole: Any, at: tuple[ValueId, Layout] | None, coordinate: Sequence[int]) -> Any:
        """The part of `whole` at `coordinate` of the mesh; the layout names places of the storage that it is a view of."""
        if whole is None or at is None:
            return whole
        value, layout = at
        sharded = {p.place for p in layout if isinstance(p, Shard)}
        if not sharded:
            return whole
        places, entry = self.graph.views[value][1], self.graph.factors.values[value]
        sizes = [self.graph.factors.sizes[factor] for factor in entry.factors]
        found = whole.reshape(sizes)
        for position, place in enumerate(places):
            if place in sharded:
                mesh_dims = cutters(layout, place)
                lengths = self.graph.lengths(entry.factors[position], mesh_dims)
                rank = self.graph.line(mesh_dims, coordinate)
                found = found.narrow(position, sum(lengths[:rank]), lengths[rank])
        rest = iter(found.shape)
        return found.reshape([torch.Size(next(rest) for _ in dim).numel() for dim in entry.dims])


def _names(program: Program) -> tuple[list[str], list[str]]:
    """Of the program's results, and of its inputs."""
    changed = [f"{kind} {name}" for kind, name in program.mutated]
    count = len(program.graph.output_node().args[0]) - len(changed)
    inputs = [f"{'input ' if entry.kind == 'input' else ''}{entry.name}" for entry in program.inputs]
    return [*changed, *(f"output {n}" for n in range(count))], inputs


def _outcome(
    result_names: Sequence[str],
    input_names: Sequence[str],
    results: Sequence[Any],
    gradients: Sequence[Any],
    wanted: Sequence[bool],
    sent: Mapping[tuple[str, str], tuple[int, float]],
) -> Outcome:
    graded = {name: grad for name, grad, asked in zip(input_names, gradients, wanted) if asked}
    return Outcome(dict(zip(result_names, results, strict=True)), graded, sent)


def _check_outputs(rank: int, own: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """What is not compared by deviation: shapes and dtypes, and all that is no floating-point number."""
    for name, reference in expected.items():
        shown = [f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in (own[name], reference)]
        if shown[0] == shown[1] and isinstance(reference, Tensor) and not _is_inexact(reference):
            count = (own[name] != reference).sum().item()
            shown[0] += f" with {count} other elements" if count else ""
        if shown[0] != shown[1]:
            raise DspError(asked=f"{name} on rank {rank} is {shown[0]}", found=f"one device has {shown[1]}")


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
