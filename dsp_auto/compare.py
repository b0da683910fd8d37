"""Compare: what each strategy would send, keep and take for one model and mesh, side by side.

The model is captured once and planned under each preset with the same options. Collectives are those that the first device,
whose shards are the largest, would issue in a step: by kind (shards of several sizes are gathered in an all-to-all), and those
of parameters, mostly to synchronize their gradients, apart from the rest: the paper does not count them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .cost_models.hardware import Hardware, as_hardware
from .errors import ConstraintError, DspError, InfeasibleError, MeshError, NoShardableFactorError, StrategyError
from .mesh import Mesh, as_mesh
from .passes.capture import Program, capture
from .passes.nodes import is_getitem, module_path
from .passes.presets import PRESETS
from .passes.solve import Solution
from .plan import Plan
from .planner import Options, Prepared, decide, finish, prepare
from .predict import Issued, Prediction, Trace, trace, trace_rank
from .progress import step
from .units import show_bytes, show_seconds

FORMAT = 1
FORWARD, BACKWARD, PARAMETERS = "forward", "backward", "parameters"
# What holds fewer of the model's ops than this share of the largest block's is no block: a linear in a Sequential.
WORTH_COUNTING = 0.25
EQUAL = 1e-9  # relative; sums of the same numbers in another order


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many a device issues, and what it sends in them."""

    count: int = 0
    wire_bytes: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One strategy: its plan, the prediction of a step (seconds), and its collectives; or, where it has none of these, why.

    collectives: of "forward", "backward" (without those of parameters) and "parameters" (of both), by kind (see
        `hardware.KINDS`).
    error, reason: the name of the error's class and what it says; empty where there is a plan.
    """

    strategy: str
    plan: Plan | None = None
    prediction: Prediction | None = None
    collectives: Mapping[str, Mapping[str, Traffic]] | None = None
    error: str = ""
    reason: str = ""

    @property
    def found(self) -> tuple[Plan, Prediction, Mapping[str, Mapping[str, Traffic]]]:
        """The plan, the prediction and the collectives of one that has them. Raises StrategyError where there is no plan."""
        if self.plan is None or self.prediction is None or self.collectives is None:
            raise StrategyError(
                asked=f"what {self.strategy} sends and takes",
                found=f"it has no plan: {self.reason}",
                remedy="look at those in `Comparison.runnable`",
            )
        return self.plan, self.prediction, self.collectives

    def wire_bytes(self, *which: str) -> float:
        """Bytes that a device sends in a step, or in "forward", "backward" or for "parameters". Raises as `found` does."""
        _, _, collectives = self.found
        kinds = [collectives[part] for part in which or (FORWARD, BACKWARD, PARAMETERS)]
        return sum(traffic.wire_bytes for part in kinds for traffic in part.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain data, as JSON has it."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.plan is not None:
            plan, prediction, collectives = self.found
            data["plan"] = plan.to_dict()
            data["prediction"] = asdict(prediction)
            data["collectives"] = {
                part: {kind: asdict(traffic) for kind, traffic in kinds.items()} for part, kinds in collectives.items()
            }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """What `to_dict` gave."""
        data = dict(data)
        if data["plan"] is not None:
            data["plan"] = Plan.from_json(data["plan"])
            data["prediction"] = Prediction(**data["prediction"])
            data["collectives"] = {
                part: {kind: Traffic(**traffic) for kind, traffic in kinds.items()}
                for part, kinds in data["collectives"].items()
            }
        return cls(**data)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as tables, keeps as JSON.

    mesh: its dims and their sizes. hardware: the profile's name. training: whether a step has a backward.
    blocks: the model's repeated blocks, as numbers in its modules' paths tell them; 0: none. layers: what the user counts in
        place of them.
    candidates: one for each strategy, in the order of `presets.PRESETS`.
    """

    mesh: Mapping[str, int]
    hardware: str
    training: bool
    blocks: int
    layers: int | None
    candidates: tuple[Candidate, ...]

    def __getitem__(self, strategy: str) -> Candidate:
        """The candidate of a strategy. Raises KeyError where it was not compared."""
        for candidate in self.candidates:
            if candidate.strategy == strategy:
                return candidate
        raise KeyError(strategy)

    @property
    def runnable(self) -> tuple[Candidate, ...]:
        """Those that have a plan."""
        return tuple(candidate for candidate in self.candidates if candidate.plan is not None)

    def best(self, candidate: Candidate) -> tuple[str, ...]:
        """What a candidate is best in: "least wire bytes" of a step, "least time". Several may be equal."""
        measures: dict[str, Callable[[Candidate], float]] = {
            "least wire bytes": lambda one: one.wire_bytes(),
            "least time": lambda one: one.found[1].seconds,
        }
        return tuple(
            what
            for what, of in measures.items()
            if candidate.plan is not None and of(candidate) <= (1 + EQUAL) * min(map(of, self.runnable))
        )

    def to_json(self, indent: int | None = None) -> str:
        """The comparison as JSON text, which `Comparison.from_json` reads."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, as JSON has it."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        return json.loads(json.dumps({"format": FORMAT, **data}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Comparison:
        """The comparison that `to_json` or `to_dict` gave. Raises DspError where the data is none."""
        try:
            data = dict(json.loads(data) if isinstance(data, str) else data)
            if data.pop("format", None) != FORMAT:
                raise DspError(
                    asked="this is no comparison", found=f"its format is not {FORMAT}", remedy="make it again"
                )
            return cls(candidates=tuple(map(Candidate.from_dict, data.pop("candidates"))), **data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DspError(asked="this is no comparison", found=f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        step = "a step of forward and backward" if self.training else "a forward without gradients"
        parts = [f"mesh {mesh}, hardware {self.hardware}; on the first device, whose shards are the largest"]
        if self.runnable:
            parts.append(f"{step}\n\n{self._table(1)}")
            if (shares := self.layers or self.blocks) > 1:
                what = "layer, the mean over" if self.layers else "block, the mean over the model's"
                parts.append(f"per {what} {shares}; what is sent at the model's ends is in it\n\n{self._table(shares)}")
        refused = [f"{one.strategy} cannot run: {one.reason}" for one in self.candidates if one.plan is None]
        return "\n\n".join(parts + ["\n".join(refused)] * bool(refused))

    def _table(self, shares: int) -> str:
        """Of a step, or of one of its `shares`."""
        parts = (FORWARD, BACKWARD, PARAMETERS) if self.training else (FORWARD,)
        heads = ["strategy", *(f"collectives\n{part}" for part in parts), *(f"wire bytes\n{part}" for part in parts)]
        heads += ["paper's\nforward volume"] + ["activations", "predicted", ""] * (shares == 1)
        rows = []
        for one in self.runnable:
            plan, prediction, collectives = one.found
            row = [one.strategy, *(_show_collectives(collectives[part], shares) for part in parts)]
            row += [show_bytes(one.wire_bytes(part) / shares) for part in parts]
            row.append(show_bytes(plan.communication["paper_forward_volume"] / shares))
            if shares == 1:
                memory, seconds = plan.memory["activation_bytes"], prediction.seconds
                row += [show_bytes(memory), show_seconds(seconds), ", ".join(self.best(one))]
            rows.append(row)
        align = ["left"] * (1 + len(parts)) + ["right"] * (len(parts) + 1) + ["right", "right", "left"] * (shares == 1)
        return tabulate(rows, headers=heads, disable_numparse=True, colalign=align)


@unset_fake_temporarily()  # see `plan`
def compare(
    model: nn.Module,
    mesh: Any,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strategies: Sequence[str] | None = None,
    hardware: str | PathLike | Hardware | None = None,
    layers: int | None = None,
    **options: Any,
) -> Comparison:
    """Plan `model(*args, **kwargs)` over `mesh` under each strategy, with no process group, no GPU and no weights, and predict
    a step of each. Under `torch.no_grad()` a step is the forward alone.

    strategies: of `passes.presets`; None: all of them. hardware: what predictions are for (and plans, for the objective
    "time"); None: "h100". layers: how many the table counts per layer; None: the model's repeated blocks.
    options: as `dsp_auto.plan`, the same for each.

    A strategy that this model, mesh or capacity does not admit has the reason in place of a plan. Raises what is wrong
    whatever the strategy: CaptureError, LayoutError, StrategyError, and MeshError for what is not a mesh.
    """
    names = list(PRESETS if strategies is None else strategies)
    if not names:
        raise StrategyError(asked="compare no strategies", found="an empty list", remedy=f"name some of {', '.join(PRESETS)}")
    if layers is not None and layers < 1:
        raise StrategyError(asked=f"layers {layers}", found="not a number of layers", remedy="use 1 or more")
    profile = as_hardware(hardware)
    chosen = {name: Options.of(strategy=name, hardware=profile, **options) for name in names}
    abstract = as_mesh(mesh)
    profile.on(abstract.whole)  # which refuses a mesh that it was not measured on
    with step(f"capture of {type(model).__name__}"):
        program = capture(model, args, kwargs)
    return Comparison(
        mesh=abstract.whole,
        hardware=profile.name,
        training=program.training,
        blocks=count_blocks(program),
        layers=layers,
        candidates=tuple(find_candidate(program, abstract, name, chosen[name], profile) for name in PRESETS if name in chosen),
    )


def count_blocks(program: Program) -> int:
    """How many repeated blocks a model has: modules with a number in their path ("blocks.3"), on the deepest level of such
    numbers that most of its ops stand on. 0: most ops stand in none."""
    numbered = []
    ops = [node for node in program.graph.nodes if node.op == "call_function" and not is_getitem(node)]
    for node in ops:
        parts = module_path(node).split(".")
        numbered.append([".".join(parts[: n + 1]) for n, part in enumerate(parts) if part.isdigit()])
    level = 0
    while 2 * sum(len(prefixes) > level for prefixes in numbered) > len(ops):
        level += 1
    if not level:
        return 0
    sizes = Counter(prefixes[level - 1] for prefixes in numbered if len(prefixes) >= level)
    return sum(size >= WORTH_COUNTING * max(sizes.values()) for size in sizes.values())


def find_candidate(program: Program, mesh: Mesh, strategy: str, options: Options, hardware: Hardware) -> Candidate:
    """What a captured model does on `mesh` under one strategy, with the prediction for `hardware`; or why it cannot."""
    try:
        prepared = prepare(program, mesh, options)
        with step(f"solving for {mesh} with strategy {strategy}"):
            solution = decide(prepared)
    except (ConstraintError, NoShardableFactorError, MeshError, InfeasibleError) as error:
        return Candidate(strategy, error=type(error).__name__, reason=str(error))
    return candidate_of(prepared, solution, *finish(prepared, solution), hardware)


def candidate_of(prepared: Prepared, solution: Solution, plan: Plan, graph: fx.Graph, hardware: Hardware) -> Candidate:
    """What a plan does, and the prediction for `hardware`. plan, graph: as `finish` gave them."""
    launched = trace_rank(prepared, solution, graph)
    own = _trace_parameters(prepared.program, graph, launched.mesh)
    parameters = {FORWARD: _collectives(own.forward), BACKWARD: _collectives(own.backward)}
    # The ranks' agreement on the call comes before the program.
    everything = {FORWARD: _collectives(launched.forward[1:]), BACKWARD: _collectives(launched.backward)}
    return Candidate(
        plan.strategy,
        plan,
        launched.on(hardware),
        {
            **{way: _less(everything[way], parameters[way]) for way in (FORWARD, BACKWARD)},
            PARAMETERS: _collectives((*own.forward, *own.backward)),
        },
    )


def _trace_parameters(program: Program, graph: fx.Graph, mesh: Mapping[str, int]) -> Trace:
    """What a rewritten program launches for its parameters alone: the primitives on them, before any op uses them."""
    captured = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    given = iter(zip(program.inputs, captured, strict=True))
    part, copies, flags, held = fx.Graph(), {}, [], set()
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = part.node_copy(node)
            entry, value = next(given)
            if entry.kind != "input":
                held.add(node)
            flags.append(node in held and isinstance(value, torch.Tensor) and value.requires_grad)
        elif _is_resharding(node) and held.issuperset(node.all_input_nodes):
            copies[node] = part.node_copy(node, copies.__getitem__)
            held.add(node)
    part.output(tuple(copies[node] for node in copies if node.op == "call_function"))
    return trace(fx.GraphModule(nn.Module(), part), flags, mesh)


def _is_resharding(node: fx.Node) -> bool:
    """A primitive, or what stands between two: a result of several, or a shape that a primitive can cut."""
    return node.op == "call_function" and (
        getattr(node.target, "namespace", "") == "dsp"
        or is_getitem(node)
        or node.target is torch.ops.aten.reshape.default
    )


def _collectives(events: Iterable[Any]) -> dict[str, Traffic]:
    found: dict[str, Traffic] = {}
    for event in events:
        if isinstance(event, Issued):
            before = found.get(event.kind, Traffic())
            found[event.kind] = Traffic(before.count + 1, before.wire_bytes + event.wire_bytes)
    return found


def _less(everything: Mapping[str, Traffic], part: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """What is left of collectives without a part of them."""
    left = {}
    for kind, traffic in everything.items():
        own = part.get(kind, Traffic())
        if traffic.count > own.count:
            left[kind] = Traffic(traffic.count - own.count, traffic.wire_bytes - own.wire_bytes)
    return left


def _show_collectives(kinds: Mapping[str, Traffic], shares: int) -> str:
    shown = (f"{traffic.count / shares:.3g} {kind.replace('_', '-')}" for kind, traffic in kinds.items())
    return "\n".join(shown) or "none"
