"""Watch: what every stage makes, on one device and on all ranks of a rehearsal, and the first stage that makes something else.

One device runs the captured program and every rank its own, op by op, without checkpoints; each stage's results, and the
gradients that reach them, are noted. A rank's part of a result is then what it should have in the result's layout. What is
Partial is summed over the ranks first, and so is the gradient of what is Replicate with a Partial gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import simulate
from .errors import DspError, first_lines
from .passes.layout import Layout, Partial, R, Shard, V, show_placement
from .passes.nodes import ValueId, value_id
from .passes.problem import Problem
from .passes.stages import Stage
from .rehearse import Rehearsed, Run, cotangents_of
from .units import show_tensor
from .verify import deviation

# Largest deviations of results and of gradients, relative to the largest element: sums in another order, and what follows.
TOLERANCES = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-2, 5e-2),
    torch.bfloat16: (5e-2, 1e-1),
}
_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
# A result much smaller than what it is made of (a difference, a mean of about nothing) is judged on this share of their scale.
OF_OPERANDS, OF_GRADIENTS = 0.1, 1e-2
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Difference:
    """The first stage that differs, in the order in which stages run (gradients: in the order of backward).

    stage: its number among the planner's stages. module: its path. way: "forward", or "backward" for the gradient of its
        result. ranks: those that differ; of a sum, those that give it. deviation: the largest, see `verify.deviation`; infinite
        where the op did not run, which `found` tells. allowed: what the dtype admits.
    inputs: whole shapes and layouts of its operands; result: of what it makes.
    """

    stage: int
    module: str
    op: str
    way: str
    ranks: tuple[int, ...]
    deviation: float
    allowed: float
    inputs: tuple[str, ...]
    result: str
    found: str = ""

    def __str__(self) -> str:
        what = "" if self.way == FORWARD else "the gradient of "
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        found = self.found or f"largest error {self.deviation:.1e}, allowed {self.allowed:.0e}"
        taken = f", made of {', '.join(self.inputs)}" if self.inputs else ""
        return f"{self.module}: {what}{self.op} (stage {self.stage}) differs on {ranks}: {found}; it is {self.result}{taken}"


@dataclass
class _Notes:
    """What one device or one rank made, by storage, and the gradients that reached it."""

    values: dict[ValueId, Tensor] = field(default_factory=dict)
    gradients: dict[ValueId, Tensor] = field(default_factory=dict)
    failed: tuple[ValueId | None, str] | None = None  # the storage that was not made, and why


class _Watcher(fx.Interpreter):
    def __init__(self, rehearsed: Rehearsed, graph: fx.Graph, notes: _Notes, wanted: Callable[[fx.Node], Any]) -> None:
        super().__init__(rehearsed.prepared.program.module, graph=graph)
        self.notes, self.wanted = notes, wanted
        self.extra_traceback = False

    def forward(self, *values: Any) -> Any:
        return self.run(*values, enable_io_processing=False)

    def run_node(self, node: fx.Node) -> Any:
        storage = self.wanted(node)
        try:
            result = super().run_node(node)
        except DspError:
            raise  # which says what it is: collectives that do not meet
        except Exception as error:  # whatever an op raises on operands of the wrong shape
            nearest = storage or next((own for own in map(self.wanted, _following(node)) if own), None)
            self.notes.failed = (nearest, first_lines(error))
            raise
        if storage is not None and isinstance(result, Tensor):
            self.notes.values[storage] = result.detach()
            if result.requires_grad:
                result.register_hook(lambda grad: self.notes.gradients.__setitem__(storage, grad.detach()))
        return result


def _following(node: fx.Node) -> Iterator[fx.Node]:
    """What is computed from a node, the nearest first."""
    seen, todo = {node}, list(node.users)
    while todo:
        found = todo.pop(0)
        if found not in seen:
            seen.add(found)
            yield found
            todo += found.users


@dataclass(frozen=True)
class Reference:
    """What one device makes. cotangents: the gradients that its outputs were given."""

    notes: _Notes
    cotangents: Sequence[Tensor | None]


def watch_one_device(rehearsed: Rehearsed) -> Reference:
    """Runs the captured program, forward and backward. Raises DspError where it does not run."""
    program, notes = rehearsed.prepared.program, _Notes()
    storages = rehearsed.parts.graph.storages

    def captured(node: fx.Node) -> ValueId | None:
        value = value_id(node)
        return value if value in storages else None

    with torch.random.fork_rng(devices=[]):
        try:
            run = Run(_Watcher(rehearsed, program.graph, notes, captured).forward, rehearsed.values, _wanted(rehearsed))
            cotangents = cotangents_of(program, run.results)
            run.backward(cotangents)
        except Exception as error:  # whatever an op raises on values that it was not made for
            stage = notes.failed and notes.failed[0] and rehearsed.parts.graph.storages[notes.failed[0]]
            raise DspError(
                asked="the model does not run on one device",
                found=first_lines(error),
                where=(stage and rehearsed.parts.graph.stages[stage.maker].path) or None,
                remedy="give inputs that it runs on",
            ) from error
    return Reference(notes, cotangents)


def first_difference(rehearsed: Rehearsed, reference: Reference) -> Difference | None:
    """The first stage of a plan whose result is not what one device has, or in backward the first whose gradient is not; None
    where all are. Raises AgreementError where collectives do not meet, and DspError where a backward does not run."""
    problem = rehearsed.prepared.problem(rehearsed.solution.space)
    whole, ranks = reference.notes, _watch(rehearsed, reference.cotangents)
    failed = {rank: notes.failed for rank, notes in enumerate(ranks) if notes.failed is not None}
    for found in _forward(rehearsed, problem, whole, ranks):
        return found
    if failed:
        rank, (storage, why) = next(iter(failed.items()))
        stage = problem.graph.stages[problem.graph.storages[storage].maker if storage is not None else -1]
        return _difference(rehearsed, problem, stage, FORWARD, (rank,), math.inf, 0.0, f"it does not run: {why}")
    return next(_backward(rehearsed, problem, whole, ranks), None)


def _watch(rehearsed: Rehearsed, cotangents: Sequence[Tensor | None]) -> list[_Notes]:
    """All ranks, forward and backward."""
    parts, wanted = rehearsed.parts, _wanted(rehearsed)
    notes = [_Notes() for _ in rehearsed.graphs]

    def on_rank(rank: int) -> None:
        coordinate = rehearsed.coordinates[rank]
        watcher = _Watcher(rehearsed, rehearsed.graphs[rank], notes[rank], lambda node: node.meta.get("made"))
        run = Run(watcher.forward, parts.of_inputs(rehearsed.values, coordinate), wanted)
        run.backward(parts.of_results(cotangents, coordinate))

    with torch.random.fork_rng(devices=[]):
        try:
            simulate.run(len(notes), on_rank)
        except DspError:
            raise
        except Exception as error:  # of an op: it is noted which; or of one in backward
            if all(own.failed is None for own in notes):
                told = "; ".join(getattr(error, "__notes__", ()))
                raise DspError(asked="the backward of a rank does not run", found=f"{first_lines(error)} ({told})") from error
    return notes


def _wanted(rehearsed: Rehearsed) -> list[bool]:
    return [isinstance(value, Tensor) and value.requires_grad for value in rehearsed.values]


def _forward(rehearsed: Rehearsed, problem: Problem, whole: _Notes, ranks: Sequence[_Notes]) -> Iterator[Difference]:
    """The stages whose results differ, in order."""
    limit = 0.0
    for stage in problem.graph.stages:
        scale = max((_largest(whole.values.get(use.storage)) for use in stage.uses), default=0.0) * OF_OPERANDS
        for number, storage in enumerate(stage.results):
            expected = whole.values.get(storage)
            if expected is None:
                continue
            # What is made of a coarser dtype is no finer than that.
            limit = max(limit, _tolerance(expected.dtype)[0])
            layout = stage.made[rehearsed.solution.choice[stage.index]][number]
            summed = tuple(m for m, placement in enumerate(layout) if isinstance(placement, Partial))
            found = _judge(rehearsed, [own.values for own in ranks], storage, layout, summed, expected, scale)
            wrong = {rank: own for rank, own in found.items() if own > limit}
            if wrong:
                yield _difference(rehearsed, problem, stage, FORWARD, tuple(wrong), max(wrong.values()), limit)


def _backward(rehearsed: Rehearsed, problem: Problem, whole: _Notes, ranks: Sequence[_Notes]) -> Iterator[Difference]:
    """The stages the gradients of whose results differ, in the order of backward."""
    if not whole.gradients:
        return
    limit = max(_tolerance(value.dtype)[1] for value in whole.values.values())
    scales = sorted(_largest(grad) for grad in whole.gradients.values())
    scale = scales[len(scales) // 2] * OF_GRADIENTS
    for stage in reversed(problem.graph.stages):
        for number, storage in enumerate(stage.results):
            expected = whole.gradients.get(storage)
            if expected is None:
                continue
            layout = stage.made[rehearsed.solution.choice[stage.index]][number]
            summed = tuple(m for m, placement in enumerate(layout) if placement == V)
            found = _judge(rehearsed, [own.gradients for own in ranks], storage, layout, summed, expected, scale)
            wrong = {rank: own for rank, own in found.items() if own > limit}
            if wrong:
                yield _difference(rehearsed, problem, stage, BACKWARD, tuple(wrong), max(wrong.values()), limit)


def _judge(
    rehearsed: Rehearsed,
    held: Sequence[Mapping[ValueId, Tensor]],
    storage: ValueId,
    layout: Layout,
    summed: tuple[int, ...],
    expected: Tensor,
    scale: float,
) -> dict[int, float]:
    """How far what each rank holds of a storage is from its part. summed: mesh dims over which what ranks hold is added up."""
    placed = tuple(placement if isinstance(placement, Shard) else R for placement in layout)
    lines: dict[tuple, list[int]] = {}
    for rank, coordinate in enumerate(rehearsed.coordinates):
        lines.setdefault(tuple(-1 if m in summed else at for m, at in enumerate(coordinate)), []).append(rank)
    found: dict[int, float] = {}
    for line in lines.values():
        parts = [held[rank][storage] for rank in line if storage in held[rank]]
        wanted = rehearsed.parts.part(expected, (storage, placed), rehearsed.coordinates[line[0]])
        if len(parts) < len(line) and not (parts and summed):
            # Nothing of it came to a rank: so it is nothing, or the op did not run there.
            far = math.inf if _largest(wanted) > scale else 0.0
        elif any(part.shape != wanted.shape or part.dtype != wanted.dtype for part in parts):
            far = math.inf
        elif wanted.is_floating_point() or wanted.is_complex():
            far = deviation(sum(parts[1:], parts[0]), wanted, scale)
        else:
            far = 0.0 if torch.equal(sum(parts[1:], parts[0]), wanted) else math.inf
        found |= dict.fromkeys(line, far)
    return found


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return TOLERANCES.get(_COMPLEX.get(dtype, dtype), (0.0, 0.0))


def _largest(value: Tensor | None) -> float:
    """The largest finite element; 0 for what is no floating-point tensor."""
    if value is None or not value.numel() or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    return value.abs().nan_to_num(0, 0, 0).max().item()


def _difference(
    rehearsed: Rehearsed,
    problem: Problem,
    stage: Stage,
    way: str,
    ranks: tuple[int, ...],
    far: float,
    limit: float,
    found: str = "",
) -> Difference:
    graph, k = problem.graph, rehearsed.solution.choice[stage.index]
    inputs = tuple(_show(problem, use.storage, use.wanted[k]) for use in stage.uses)
    result = ", ".join(_show(problem, own, layout) for own, layout in zip(stage.results, stage.made[k])) or "an output"
    if stage.op is not None:
        op, module = str(stage.op.node.target), stage.path or stage.op.name
    elif stage.results:
        op, module = f"the {graph.storages[stage.results[0]].kind} {stage.name}", stage.name
    else:  # what leads to an output, after the last stage that makes something
        op, module = "the output", stage.name
    return Difference(stage.index, module, op, way, ranks, far, limit, inputs, result, found)


def _show(problem: Problem, storage: ValueId, layout: Layout) -> str:
    """`linear_3 float32[2, 8, 16] (sp: T)`."""
    graph = problem.graph
    root, names = graph.storages[storage].root, graph.factors.factor_names(storage)
    cut = ", ".join(f"{name}: {show_placement(own, names)}" for name, own in zip(graph.mesh.names, layout, strict=True))
    return f"{storage[0]} {show_tensor(root.dtype, root.shape)} ({cut})"
