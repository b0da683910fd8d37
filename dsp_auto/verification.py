"""`verify`: a plan proven on this computer before anybody pays for GPUs, or the first stage that is wrong.

All ranks run in this one process on real numbers (see `rehearse`), and are held against one device: outputs, every gradient,
every stage's result and its gradient, and the collectives that the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .decision import transfer
from .errors import DspError, PlanError, first_lines
from .materialize import materialize
from .mesh import as_mesh
from .parallelize import draws
from .passes.capture import capture
from .passes.solve import Solution
from .plan import Plan
from .planner import Options, Prepared, decide, prepare, prepare_given
from .predict import Issued, trace_rank
from .progress import step
from .rehearse import Rehearsed, run
from .verify import Traffic
from .watch import TOLERANCES, Difference, first_difference, watch_one_device


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a report.

    output, gradient: the largest deviation of any rank from one device, relative to the largest element, and whose it is; None
        where it did not come to comparing. allowed: what the coarsest dtype of the program admits of each (`watch.TOLERANCES`).
    plan: None where its programs could not be written. first: the first stage that differs. failure: why the ranks did not come
        to an end, or not to the same kind of results.
    traffic: wire bytes of every primitive, planned and sent. collectives: of the first rank, predicted and issued.
    note: what else there is to know about how it was compared.
    """

    plan: Plan | None
    output: tuple[float, str] | None
    gradient: tuple[float, str] | None
    allowed: tuple[float, float]
    first: Difference | None
    failure: str
    traffic: tuple[Traffic, ...]
    collectives: tuple[int, int]
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether everything is as on one device, and as the plan says."""
        found = (self.output, self.gradient)
        return (
            self.first is None
            and not self.failure
            and all(own is not None and own[0] <= most for own, most in zip(found, self.allowed))
            and all(entry.agrees for entry in self.traffic)
            and self.collectives[0] == self.collectives[1]
        )

    def __str__(self) -> str:
        lines = [self.plan.headline()] if self.plan else []
        lines += [f"first stage that differs: {self.first}"] if self.first else []
        lines += [self.failure] if self.failure else []
        rows = [
            [what, own[1], f"{own[0]:.1e}", f"{most:.0e}", "ok" if own[0] <= most else "TOO LARGE"]
            for what, own, most in zip(("outputs", "gradients"), (self.output, self.gradient), self.allowed)
            if own is not None
        ]
        head = ["largest deviation from one device", "of", "relative", "allowed", ""]
        if rows:
            lines += ["", tabulate(rows, head, disable_numparse=True, colalign=("left", "left", "right", "right", "left"))]
        if self.traffic:
            wire = [
                [
                    entry.primitive,
                    entry.direction,
                    f"{entry.predicted:,.12g}",
                    f"{entry.measured:,.12g}",
                    "equal" if entry.agrees else "DIFFERENT",
                ]
                for entry in self.traffic
            ]
            wire_head = ["wire bytes per device", "", "planned", "sent", ""]
            lines += ["", tabulate(wire, wire_head, disable_numparse=True, colalign=("left", "left", "right", "right", "left"))]
        if self.output is not None:
            predicted, issued = self.collectives
            lines += ["", f"collectives of the first rank: {predicted} predicted, {issued} issued"]
        lines += [self.note] if self.note else []
        return "\n".join([*lines, "", "All agree." if self.agrees else "They DISAGREE."])


def verify(
    model: nn.Module,
    mesh: Any,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | str | PathLike | None = None,
    capacity: int | str | None = None,
    hardware: Any = None,
    seed: int = 0,
    **options: Any,
) -> Verification:
    """Plan `model(*args, **kwargs)` over `mesh`, run all ranks in this process, and compare with one device.

    model, args, kwargs: on CPU; choose small sizes, because one process holds the activations of all ranks. What is fake or on
        `meta` gets random values (see `materialize`). Under `torch.no_grad()` the forward alone is compared.
    mesh: `"8"`, `"2x4"`, a `Mesh` or a DeviceMesh. Nothing is communicated: no process group is needed.
    plan: one that was made before, or its file, in place of planning. capacity, hardware, options: as in `dsp_auto.plan`.
    seed: of random values, and of what the model draws. With rng="parallel" shards draw other numbers than one device, which
        nothing can be compared with: then the same plan is run as with rng="serial".

    Deviations are relative to the largest element of a tensor; what is allowed (`watch.TOLERANCES`) is 1e-5 for outputs and
    1e-4 for gradients in float32.

    Raises what `plan` raises, PlanError where a plan is not one of this model and call, and DspError for a model on another
    device. Disagreement is no error: see `Verification.agrees`.
    """
    mesh = as_mesh(mesh)
    chosen = Options.of(capacity, hardware, **options)
    if plan is not None:
        chosen.check_none()
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    model, args, kwargs = materialize(model, tuple(args), dict(kwargs or {}), seed)
    _check_device(model, args, kwargs)
    with step(f"capture of {type(model).__name__}"):
        program = capture(model, args, kwargs)
    if plan is None:
        prepared = prepare(program, mesh, chosen)
        with step(f"solving for {mesh}"):
            solution = decide(prepared)
    else:
        prepared, solution = prepare_given(program, mesh, plan)
    prepared, solution, note = _drawn_serially(prepared, solution)
    dtypes = {value.dtype for value in prepared.factors.values.values()}
    admitted = [TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES] or [(0.0, 0.0)]
    allowed = (max(own[0] for own in admitted), max(own[1] for own in admitted))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with step(f"running {mesh.ranks} ranks"):
            return _verify(model, args, kwargs, prepared, solution, allowed, note)


def _verify(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    prepared: Prepared,
    solution: Solution,
    allowed: tuple[float, float],
    note: str,
) -> Verification:
    first, failure, found = None, "", None
    try:
        rehearsed = Rehearsed.of(model, args, kwargs, prepared, solution)
    except AssertionError as error:  # a rule that says other shapes than its op gives
        return Verification(None, None, None, allowed, None, f"cannot write the programs: {error}", (), (0, 0), note)
    reference = watch_one_device(rehearsed)
    try:
        first = first_difference(rehearsed, reference)
        if first is None or not first.found:
            found = run(rehearsed)
    except DspError as error:
        failure = str(error)
    except Exception as error:  # whatever a rank raises where the first stage that differs leads to it
        failure = f"the ranks do not run to the end: {first_lines(error)}"
    if found is None:
        return Verification(rehearsed.plan, None, None, allowed, first, failure, (), (0, 0), note)
    launched = trace_rank(prepared, solution, rehearsed.graphs[0])
    # The ranks' agreement on the call comes before the program.
    predicted = sum(isinstance(event, Issued) for event in (*launched.forward[1:], *launched.backward))
    issued = sum(count for count, _ in found.ranks[0].sent.values())
    return Verification(
        rehearsed.plan,
        found.output,
        found.gradient,
        allowed,
        first,
        failure,
        tuple(found.traffic),
        (predicted, issued),
        note,
    )


def _drawn_serially(prepared: Prepared, solution: Solution) -> tuple[Prepared, Solution, str]:
    """The same plan with the numbers that one device draws, where the model draws any."""
    if prepared.options.rng == "serial" or not draws(prepared.factors):
        return prepared, solution, ""
    serial = prepare(prepared.program, prepared.mesh, replace(prepared.options, rng="serial"))
    note = 'The model draws random numbers: compared as with rng="serial"'
    try:
        return serial, transfer(prepared, solution, serial), f"{note}, everything else as planned."
    except PlanError as error:
        return serial, decide(serial), f"{note}, planned for that: {error.where}: {error.found}"


def _check_device(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    other = {str(tensor.device) for tensor in tensors if isinstance(tensor, Tensor) and tensor.device.type != "cpu"}
    if other:
        raise DspError(
            asked=f"cannot verify a model on {', '.join(sorted(other))}",
            found="all ranks run on the CPU of this computer",
            remedy="move the model and its inputs to the CPU, and choose small sizes",
        )
