"""Predict: the seconds of a step of one rank's program, from what its kernels and collectives take on a hardware.

The program runs on fake tensors, backward too, and all that it would launch is written down: kernels by
`cost_models.compute`, collectives with the bytes they send by `measure`. So the copies that pack and unpack, the sums of
gradients and what checkpoints recompute are in it. Kernels run one after the other, and so do collectives; the two run beside
each other from where a collective is issued to where it is waited for, and more so if `Hardware.overlap` says so. The loss and
the optimizer are the user's, and not in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from .cost_models.compute import Launch, RecordLaunches
from .cost_models.hardware import KINDS, Hardware, as_hardware
from .measure import CountCollectives
from .mesh import as_mesh
from .passes.capture import Program, capture
from .passes.checkpointing import local_module
from .passes.solve import Solution
from .planner import Options, Prepared, decide, finish, prepare

Dims = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Issued:
    """One collective: its kind, one of `hardware.KINDS`, what this rank sends, and the mesh dims that it goes over."""

    kind: str
    wire_bytes: float
    dims: tuple[tuple[str, int], ...]

    def seconds(self, hardware: Hardware) -> float:
        return hardware.host + hardware.collective_seconds(self.kind, self.wire_bytes, self.dims)


@dataclass(frozen=True)
class Wait:
    """The kernels after it run when a collective before it is done."""

    issued: Issued


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step. `computation` (with copies, and with what `Hardware.lockstep` adds) and `communication` make up
    `forward` and `backward`, less what is `hidden` of the communication. by_kind: of each kind of kernel and of collective."""

    forward: float
    backward: float
    computation: float
    communication: float
    hidden: float
    by_kind: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Trace:
    """What a program launches on one rank, in order. mesh: the dims that it runs on, outermost first."""

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    mesh: Mapping[str, int]

    def on(self, hardware: Hardware) -> Prediction:
        """The seconds of it. Raises what `Hardware.on` raises."""
        hardware = hardware.on(self.mesh)
        by_kind: dict[str, float] = {}
        computation = communication = hidden = 0.0
        meet = any(isinstance(event, Issued) for event in (*self.forward, *self.backward))
        wait = hardware.lockstep if meet else 1.0
        ways = []
        for events in (self.forward, self.backward):
            sent = sum(event.seconds(hardware) for event in events if isinstance(event, Issued))
            computed = wait * sum(event.seconds(hardware) for event in events if isinstance(event, Launch))
            exposed = min(_exposed(events, hardware, wait), hardware.exposed_seconds(sent, computed))
            ways.append(computed + exposed)
            computation, communication, hidden = computation + computed, communication + sent, hidden + sent - exposed
            for event in events:
                if not isinstance(event, Wait):
                    factor = wait if isinstance(event, Launch) else 1.0
                    by_kind[event.kind] = by_kind.get(event.kind, 0.0) + factor * event.seconds(hardware)
        forward, backward = ways
        return Prediction(forward, backward, computation, communication, hidden, by_kind)


Event = Launch | Issued | Wait


def _exposed(events: Sequence[Event], hardware: Hardware, factor: float) -> float:
    """Seconds in which no kernel runs for want of a collective. factor: how much longer each kernel takes."""
    now = free = exposed = 0.0  # of the kernels, and when the links are
    done: dict[int, float] = {}
    for event in events:
        if isinstance(event, Launch):
            now += factor * event.seconds(hardware)
        elif isinstance(event, Issued):
            free = max(now, free) + event.seconds(hardware)
            done[id(event)] = free
        elif (end := done[id(event.issued)]) > now:
            exposed += end - now
            now = end
    return exposed + max(0.0, free - now)


@unset_fake_temporarily()  # see `plan`
def predict(
    model: nn.Module,
    mesh: Any,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    hardware: str | PathLike | Hardware | None = None,
    rank: int = 0,
    **options: Any,
) -> Prediction:
    """Plan `model(*args, **kwargs)` over `mesh` as `dsp_auto.plan` does, and predict a step of its `rank`-th device: forward
    and backward, or the forward alone under `torch.no_grad()`. No process group, no GPU and no weights.

    hardware: what the prediction is for; None: "h100". options, and what it raises: as `dsp_auto.plan`.
    """
    profile = as_hardware(hardware)
    chosen = Options.of(hardware=profile, **options)
    return trace_plan(prepare(capture(model, args, kwargs), as_mesh(mesh), chosen), rank).on(profile)


def trace_plan(prepared: Prepared, rank: int = 0) -> Trace:
    """What the `rank`-th device launches in a step of the best plan, and the ranks' agreement on the call before it."""
    solution = decide(prepared)
    return trace_rank(prepared, solution, finish(prepared, solution, rank)[1])


def trace_rank(prepared: Prepared, solution: Solution, graph: fx.Graph) -> Trace:
    """What the device launches in a step whose program `finish` gave, and the ranks' agreement on the call before it."""
    mesh = prepared.problem(solution.space).graph.mesh
    sizes = list(zip(mesh.names, mesh.sizes, strict=True))
    lines = [line for n in range(len(sizes)) for line in itertools.combinations(range(len(sizes)), n + 1)]
    dims = {mesh.label(line): [sizes[m] for m in line] for line in lines}
    flags = requires_grad_flags(prepared.program)
    found = trace(local_module(graph, prepared.program.module), flags, dict(sizes), dims)
    agreement = Issued("all_gather", 8.0 * (mesh.ranks - 1), tuple(sizes))
    return replace(found, forward=(agreement, Wait(agreement), *found.forward))


def trace(
    program: fx.GraphModule,
    requires_grad: Sequence[bool],
    mesh: Mapping[str, int],
    dims: Mapping[str, Dims] | None = None,
) -> Trace:
    """What one rank's `program` launches, its gradients too; nothing is computed or sent.

    program: its placeholders carry local shapes in `meta["val"]`. requires_grad: which placeholders do; none: the forward
        alone. mesh: what it runs on.
    dims: of each process group, by name, the mesh dims that it goes over, outermost first. A group that is not named is a
        mesh dim of that name.
    """
    given = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    known = {group: ((group, ranks),) for group, ranks in _groups(program).items()} | dict(dims or {})
    training = any(requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [fake_input(value, wanted) for value, wanted in zip(given, requires_grad, strict=True)]
        with torch.set_grad_enabled(training), CountCollectives() as counter, _Record(counter, known) as forward:
            results = program(*inputs)
        made = [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
        gradients = [torch.empty_like(x) for x in made]
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        with CountCollectives() as counter, _Record(counter, known) as backward:
            if made:
                torch.autograd.grad(made, wanted, gradients, allow_unused=True)
    return Trace(tuple(forward.events), tuple(backward.events), mesh)


class _Record(RecordLaunches):
    """Kernels and, of what `counter` counts, collectives, in order: `events`."""

    def __init__(self, counter: CountCollectives, dims: Mapping[str, Dims]) -> None:
        super().__init__()
        self.counter, self.dims = counter, dims
        self.events: list[Event] = []
        self.under_way: dict[int, Issued] = {}  # by the storage that it gives

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before, known = self.counter.total_bytes, len(self.launches)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.events += self.launches[known:]
        name = func._schema.name.split("::")[1]
        if func.namespace == "_c10d_functional" and name == "wait_tensor":
            if (issued := self.under_way.pop(args[0].untyped_storage()._cdata, None)) is not None:
                self.events.append(Wait(issued))
        elif func.namespace == "_c10d_functional":
            given = {a.name: value for a, value in zip(func._schema.arguments, args)} | (kwargs or {})
            kind = next(kind for kind in KINDS if name.startswith(kind))
            if kind == "all_to_all" and _sparse(given["input_split_sizes"]):
                kind = "send"
            issued = Issued(kind, self.counter.total_bytes - before, tuple(self.dims[given["group_name"]]))
            self.under_way[result.untyped_storage()._cdata] = issued
            self.events.append(issued)
        return result


def _sparse(sends: Sequence[int]) -> bool:
    """Whether an all-to-all only sends to neighbours: some of the other ranks get nothing."""
    return len(sends) > 1 and sum(count > 0 for count in sends) <= max(1, min(2, len(sends) - 2))


def _groups(program: fx.GraphModule) -> dict[str, int]:
    """The process groups of a program's primitives, and how many ranks each has."""
    found = {}
    for module in program.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if getattr(node.target, "namespace", "") == "dsp":
                given = {a.name: value for a, value in zip(node.target._schema.arguments, node.args)} | node.kwargs
                found[given["group"]] = given["ranks"]
    return found


def requires_grad_flags(program: Program) -> list[bool]:
    """Whether each placeholder of a captured program requires a gradient."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    return [isinstance(value, torch.Tensor) and value.requires_grad for value in values]


def fake_input(value: Any, requires_grad: bool) -> Any:
    """A leaf like `value`, to be called within the fake mode; what is no tensor, as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(requires_grad)
