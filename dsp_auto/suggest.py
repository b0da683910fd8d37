"""Suggest: what would fit where no plan does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from .capacity import Capacity
from .cost_models.state import StateBytes, of_parameter
from .errors import InfeasibleError, MeshError, NoShardableFactorError
from .mesh import Mesh
from .passes.capture import Program
from .passes.factors import Factors
from .passes.solve import OutOfTimeError
from .planner import Options, Prepared, decide, prepare
from .units import show_bytes

SECONDS = 10.0
# Data-parallel ranks that share out the state, where the user has none: those of a node.
SHARING = 8
# Where more than this share of the bytes of activations is in wider elements, 16-bit ones are worth a word.
MOSTLY = 0.5


def what_would_fit(program: Program, mesh: Mesh, options: Options, seconds: float = SECONDS) -> list[str]:
    """Sentences on what else would fit, or would not, for a program that no plan with `options` on `mesh` has room for.
    Bytes are the least that any plan needs on a device; those of a smaller batch and of another dtype are estimated.

    seconds: after so many nothing more is tried.
    """
    ends, usable = time.perf_counter() + seconds, options.usable
    found: list[str] = []
    if usable is None:
        return found

    def least(changed: Options, over: Mesh = mesh) -> int | None:
        left = ends - time.perf_counter()
        if left <= 0:
            return None
        try:
            return least_bytes(prepare(program, over, replace(changed, time_limit=left)))
        except (MeshError, NoShardableFactorError, OutOfTimeError):
            return None

    def told(what: str, needed: int) -> str:
        return f"{what} the least is {show_bytes(needed)}: {'fits' if needed <= usable else 'still too much'}"

    if options.recompute is False and program.training:
        options = replace(options, recompute=None)
        if (needed := least(options)) is not None:
            found.append(told("recomputing blocks,", needed))
    ranks = None
    for times in (2, 4, 8):
        larger = Mesh(mesh.names, (*mesh.sizes[:-1], mesh.sizes[-1] * times))
        if (needed := least(options, larger)) is None:
            break
        ranks = told(f"on {larger.ranks} ranks", needed)
        if needed <= usable:
            break
    found += [ranks] if ranks else []
    state = options.optimizer
    if program.training and state.zero < 3:
        sharing = state.data_parallel if state.data_parallel > 1 else SHARING
        if (needed := least(replace(options, optimizer=replace(state, zero=3, data_parallel=sharing)))) is not None:
            found.append(told(f"with ZeRO-3 over {sharing} data-parallel replicas", needed))
    if (needed := least(options)) is not None:
        found += _estimates(program, mesh, options, needed)
    return found


def _estimates(program: Program, mesh: Mesh, options: Options, least: int) -> Iterator[str]:
    """What half the batch and 16-bit elements would come to, from the least that a plan needs now: all that is not held from
    step to step goes with them, and no further than to what the optimizer's step needs."""
    prepared = prepare(program, mesh, options)
    problem = prepared.problem(0)
    now, halved, made = StateBytes(), StateBytes(), {True: 0, False: 0}
    inputs = 0
    for storage in problem.graph.storages.values():
        root, layouts = storage.root, {own[storage.result] for own in problem.graph.stages[storage.maker].made}
        wide = root.dtype.is_floating_point and root.itemsize > 2
        if storage.kind == "activation":
            made[wide] += root.nbytes
        elif root.id[0] in problem.graph.parameters:
            own = min((problem.of_parameter(storage.id, layout) for layout in layouts), key=lambda own: own.held)
            now += own
            if wide:
                nbytes = min(problem.nbytes(storage.id, layout) for layout in layouts) * 2 // root.itemsize
                own = of_parameter(nbytes, 2, True, root.requires_grad and program.training, problem.state)
            halved += own
        else:
            inputs += min(problem.nbytes(storage.id, layout) for layout in layouts)

    def about(state: StateBytes, share: float) -> str:
        moving = least - inputs - now.parameters - now.optimizer
        needed = inputs + max(state.held + state.step, state.parameters + state.optimizer + share * moving)
        return f"about {show_bytes(needed)}"

    if (batch := batch_of(program, prepared.factors)) > 1:
        half = batch // 2
        yield f"with a batch of {half} in place of {batch} the least is {about(now, half / batch)}"
    wide = made[True] / (sum(made.values()) or 1)
    if wide > MOSTLY:
        yield f"in bfloat16 the least is {about(halved, 1 - wide / 2)}"


def least_bytes(prepared: Prepared) -> int:
    """What any plan needs on a device. Raises OutOfTimeError."""
    nothing = replace(prepared.options, capacity=Capacity(0, 0, 0.0))
    try:
        return decide(replace(prepared, options=nothing)).peak_bytes
    except InfeasibleError as error:
        if error.least_bytes is None:
            raise
        return error.least_bytes


def batch_of(program: Program, factors: Factors) -> int:
    """Samples of a step: the first dim of the model's first tensor, where nothing computes over it."""
    for node, entry in zip((n for n in program.graph.nodes if n.op == "placeholder"), program.inputs, strict=True):
        value = factors.values.get((node.name, 0))
        if entry.kind == "input" and value is not None and value.shape:
            return value.shape[0] if all(factors.kinds[factor] == "batch" for factor in value.dims[0]) else 1
    return 1
