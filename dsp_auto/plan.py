"""The plan: a layout for every stage, the reshardings between them, and what they cost. Prints as a table, keeps as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .errors import PlanError
from .plain_data import COUNT, NOTHING, NUMBER, POSITIVE, Either, check, load_json
from .plan_diff import show_diff
from .units import counted, show_bytes

if TYPE_CHECKING:
    from .alternatives import Alternatives

FORMAT = 6
_ASK = "_ask"


@dataclass(frozen=True)
class Enter:
    """One primitive on the way into a stage.

    primitive: "switch" and so on. tensor: its name in the program; tensors: how many, where several come in alike. mesh_dim:
        the one that it goes over, several joined by "+".
    source, target: the sharded factor before and after, "R" for whole on every rank, "P" for a sum of which each rank holds a
        summand.
    forward_bytes, backward_bytes: wire bytes per device, of all tensors together.
    """

    primitive: str
    tensor: str
    mesh_dim: str
    source: str
    target: str
    forward_bytes: float
    backward_bytes: float
    tensors: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As plain data, as JSON has it: `source` and `target` are called "from" and "to" there."""
        found = asdict(self)
        found["from"], found["to"] = found.pop("source"), found.pop("target")
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Enter:
        """What `to_dict` gave."""
        rest = {key: value for key, value in data.items() if key not in ("from", "to")}
        return cls(source=data["from"], target=data["to"], **rest)


@dataclass(frozen=True)
class PlanStage:
    """Neighbouring ops that run on one layout.

    index: from 0, in the order in which they run. name: where in the model they are, paths of modules. ops: how many.
    computes_over: the factors that they need whole. layout: per mesh dim the sharded factor, or "R". enter: the primitives on
        the way in.
    """

    index: int
    name: str
    ops: int
    computes_over: tuple[str, ...]
    layout: Mapping[str, str]
    enter: tuple[Enter, ...]


@dataclass(frozen=True)
class Plan:
    """What `dsp_auto.plan` decided, as plain data.

    objective: "volume" or "time". strategy: which system's ways it may take, also where the user named none.
    stages: the groups of ops in order, the output last.
    mesh: the mesh dims and their sizes. split: where the planner has split one (8 ranks as 4 x 2), the dims that it used
        instead, which `layout`s name.
    communication: wire bytes per device of forward and backward, the paper's forward volume (Table 8: M/N, M, 2M), and
        counts and bytes by primitive; `replicate` counts the buckets in which parameters' gradients are all-reduced (one
        parameter each in a stage of a pipeline). `early`: how many collectives are issued before what they give is wanted,
        and the seconds of them that this hides in a forward.
    memory: bytes per device. `peak_bytes`: of everything, at the worst program point (`peak_at`); `capacity_bytes`: what it was
        held under (None: no capacity was given), `reserve_bytes`: what was kept back of it. `activation_bytes`: of activations
        alone, at their worst point, and `activation_bound_bytes` what they were held under without a capacity. What never
        changes: `parameter_bytes`, `gradient_bytes` (when all are there), `optimizer_bytes` of the `optimizer`, `step_bytes` in
        its step, `input_bytes`. `curve`: phase, module and bytes of every program point in order, "again" where a block
        runs once more.
    recomputed: blocks whose activations backward makes again, by the plan or by the model.
    factors: name, size and kind of every factor that is not a feature.
    parameters: bytes of all parameters, those on one device, and for each that ranks hold in parts the factor that is cut.
    activations: bytes that all ops make (whole), bytes of those that run replicated, and the ops among these that make more
        than 1% of all, with the reason.
    rules: of ops whose rule is not one of dsp_auto's: the op, its rule, and whether a user `registered` it or it was
        `found` by running the op.
    without_rule: ops that no rule covers and that therefore run replicated, and why none does. random: ops that draw random
        numbers and run replicated, so that all ranks draw the same.
    seconds: what making the plan took, by pass. versions: of torch. solver: what the solver said; bytes, or seconds for the
        objective "time".
    decision: all that running the plan takes without solving again, and what it was made for; see `decision`.
    """

    mesh: Mapping[str, int]
    split: Mapping[str, int]
    objective: str
    strategy: str
    stages: tuple[PlanStage, ...]
    communication: Mapping[str, Any]
    memory: Mapping[str, Any]
    recomputed: tuple[Mapping[str, Any], ...]
    activations: Mapping[str, Any]
    parameters: Mapping[str, Any]
    factors: tuple[Mapping[str, Any], ...]
    rules: tuple[Mapping[str, Any], ...]
    without_rule: tuple[Mapping[str, Any], ...]
    random: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    solver: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    decision: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | PathLike) -> None:
        """Writes the plan as JSON, which `Plan.load` reads. Raises PlanError where the file cannot be written."""
        try:
            Path(path).write_text(self.to_json(indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(asked=f"cannot write the plan to {str(path)!r}", found=str(error)) from error

    @classmethod
    def load(cls, path: str | PathLike) -> Plan:
        """The plan that `save` wrote. Raises PlanError where there is no such file, or no plan in it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(
                asked=f"cannot read the plan {str(path)!r}", found=str(error), remedy="name a file that Plan.save wrote"
            ) from error
        return cls.from_json(text)

    def explain(self, modules: str) -> Alternatives:
        """What every other layout of the ops in `modules` ("blocks.3.attn", "blocks.*.attn") would cost in all: wire bytes or
        seconds, and peak memory. Prints as a table. Each is planned for anew, which takes as long as planning did.

        Raises LayoutError where the model has no such module, and PlanError for a plan that was read from a file or belongs to
        a parallel module: it does not hold the model that it was made of.
        """
        ask = self.__dict__.get(_ASK)
        if ask is None:
            raise PlanError(
                asked=f"cannot explain {modules}",
                found="this plan does not hold the model that it was made of",
                remedy="make it with dsp_auto.plan, or ask `dsp-auto explain TARGET --why`",
            )
        return ask(modules)

    def ask_with(self, ask: Callable[[str], Alternatives]) -> None:
        """What answers `explain`; no part of the plan."""
        self.__dict__[_ASK] = ask

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _ASK}

    def diff(self, other: Plan) -> str:
        """What the other plan does otherwise, in tables: options, blocks recomputed, what ops shard, collectives, totals."""
        return show_diff(self, other)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text, which `Plan.from_json` reads."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, as JSON has it."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["stages"] = [
            {
                **{name: getattr(stage, name) for name in stage.__dataclass_fields__},
                "enter": [e.to_dict() for e in stage.enter],
            }
            for stage in self.stages
        ]
        return json.loads(json.dumps({"format": FORMAT, **data}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Plan:
        """The plan that `to_json` or `to_dict` gave. Raises PlanError where the data is none: which entry is not as it was
        written."""
        data = load_json(data, "plan") if isinstance(data, str) else data
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else None
            raise PlanError(
                asked="this is no plan", found=f"its format is not {FORMAT} but {str(found)[:20]}", remedy="make the plan again"
            )
        check(data, _SHAPE, "plan")
        data = {name: value for name, value in data.items() if name != "format"}
        stages = tuple(
            PlanStage(
                **{
                    **stage,
                    "computes_over": tuple(stage["computes_over"]),
                    "enter": tuple(Enter.from_dict(entry) for entry in stage["enter"]),
                }
            )
            for stage in data.pop("stages")
        )
        names = ("factors", "recomputed", "rules", "without_rule", "random")
        lists: dict[str, Any] = {name: tuple(data.pop(name)) for name in names}
        return cls(stages=stages, **lists, **data)

    @property
    def digest(self) -> str:
        """Equal for equal plans, whatever they took to make."""
        data = self.to_dict()
        del data["seconds"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        rows = []
        for stage in self.stages:
            layout = ", ".join(f"{dim}: {factor}" for dim, factor in stage.layout.items())
            head = [stage.index, stage.name, stage.ops, " ".join(stage.computes_over), layout]
            entries = stage.enter or (None,)
            for number, entry in enumerate(entries):
                cells = (
                    ["", "", ""]
                    if entry is None
                    else [_way_in(entry), *map(show_bytes, (entry.forward_bytes, entry.backward_bytes))]
                )
                rows.append([*(head if number == 0 else [""] * len(head)), *cells])
        table = tabulate(
            rows,
            headers=["stage", "module", "ops", "computes over", "shards", "on the way in", "forward", "backward"],
            disable_numparse=True,
            colalign=("right", "left", "right", "left", "left", "left", "right", "right"),
        )
        return f"{self.headline()}\n\n{table}\n\n{self._totals()}"

    def headline(self) -> str:
        """Mesh, strategy, objective and sequence factors on one line."""
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        factors = ", ".join(f"{f['name']}={f['size']}" for f in self.factors if f["kind"] == "sequence")
        return (
            f"mesh {mesh}, strategy {self.strategy}, objective {self.objective}; sequence factors {factors or 'none'}"
        )

    def _memory(self) -> str:
        own = self.memory
        activations = f"activations {show_bytes(own['activation_bytes'])} at their peak"
        if own["activation_bound_bytes"] is not None:
            activations += f", held under {show_bytes(own['activation_bound_bytes'])}"
        peak = f"{show_bytes(own['peak_bytes'])} at the peak"
        if own["capacity_bytes"] is not None:
            peak += f" of {show_bytes(own['capacity_bytes'])}"
            peak += f" ({show_bytes(own['reserve_bytes'])} kept back)" if own["reserve_bytes"] else ""
        state = f" with parameters and {own['optimizer']}" if own["gradient_bytes"] else " with parameters"
        return f"memory per device: {activations}; {peak}{state}"

    def _totals(self) -> str:
        total, solver = self.communication, self.solver
        by_primitive = ", ".join(f"{entry['count']} {name}" for name, entry in total["by_primitive"].items())
        lines = [
            f"wire bytes per device: forward {show_bytes(total['forward_bytes'])}, "
            f"backward {show_bytes(total['backward_bytes'])} "
            f"(paper's forward volume {show_bytes(total['paper_forward_volume'])}): {by_primitive or 'no communication'}",
            self._memory(),
            f"solver {solver['name']}: {solver['status']}, {solver['variables']} variables, {solver['constraints']} "
            f"constraints, gap {solver['gap']:.2%}; seconds: "
            + ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items()),
        ]
        if total["early"]["count"]:
            count, hidden = total["early"]["count"], total["early"]["hidden_seconds"]
            told = f"issued early: {counted(count, 'collective')}, {hidden * 1e6:.0f} us beside other work in a forward"
            lines.insert(1, told)
        chosen = [entry for entry in self.recomputed if entry["by"] == "plan"]
        if chosen:
            names = [entry["modules"] for entry in chosen]
            shown = ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"
            lines.insert(-1, f"recomputed in backward: {counted(len(chosen), 'block')} ({shown})")
        if self.parameters["in_parts"]:
            whole, own = self.parameters["bytes"], self.parameters["device_bytes"]
            lines.insert(
                -1,
                f"parameters per device: {show_bytes(own)} of {show_bytes(whole)}, {len(self.parameters['in_parts'])} of them "
                "held in parts",
            )
        large, made = self.activations["large_replicated"], self.activations
        if large:
            share = made["replicated_bytes"] / made["bytes"]
            lines.append(f"made on every device: {share:.1%} of all activation bytes, most of it by")
            for entry in sorted(large, key=lambda entry: -entry["share"])[:8]:
                place = f" in {entry['path']}" if entry["path"] else ""
                lines.append(f"    {entry['share']:.1%}  {entry['target']}{place}: {entry['why']}")
        lines += [f"rule {rule['origin']}: {rule['target']}  {rule['rule']}" for rule in self.rules]
        for reason, entries in (("no rule", self.without_rule), ("random", self.random)):
            if entries:
                names = sorted({entry["target"] + (f": {entry['why']}" if "why" in entry else "") for entry in entries})
                cost = sum(entry["bytes"] for entry in entries)
                lines.append(f"{reason}, run replicated: {', '.join(names)} ({show_bytes(cost)} on every device)")
        return "\n".join(lines)


def _way_in(entry: Enter) -> str:
    tensor = entry.tensor if entry.tensors == 1 else f"{entry.tensors} tensors"
    way = "" if entry.source == entry.target else f" {entry.source} -> {entry.target}"
    return f"{entry.primitive}{way} ({entry.mesh_dim}): {tensor}"


_BYTES = Either(COUNT, NOTHING)
_REPLICATED = {"op": str, "target": str, "path": str, "bytes": COUNT, "why?": str}
_ENTER = {
    **dict.fromkeys(("primitive", "tensor", "mesh_dim", "from", "to"), str),
    **{"forward_bytes": NUMBER, "backward_bytes": NUMBER, "tensors": COUNT},
}
_SPEC = Either({str: Either(int, str, NOTHING)}, NOTHING)
_PHASES = frozenset(("forward", "again", "backward", "step"))
# What the JSON of a plan looks like (see `plain_data`).
_SHAPE = {
    "format": int,
    "mesh": {str: POSITIVE},
    "split": {str: POSITIVE},
    "objective": str,
    "strategy": str,
    "stages": [
        {
            **{"index": COUNT, "name": str, "ops": COUNT, "computes_over": [str], "layout": {str: str}},
            "enter": [_ENTER],
        }
    ],
    "communication": {
        **dict.fromkeys(("forward_bytes", "backward_bytes", "paper_forward_volume"), NUMBER),
        "by_primitive": {str: {"count": COUNT, "forward_bytes": NUMBER, "backward_bytes": NUMBER}},
        "early": {"count": COUNT, "hidden_seconds": NUMBER},
    },
    "memory": {
        **dict.fromkeys(("peak_bytes", "activation_bytes", "input_bytes"), COUNT),
        **dict.fromkeys(("parameter_bytes", "gradient_bytes", "optimizer_bytes", "step_bytes"), COUNT),
        **dict.fromkeys(("capacity_bytes", "reserve_bytes", "activation_bound_bytes"), _BYTES),
        **{"peak_at": Either(str, NOTHING), "optimizer": str, "curve": [(_PHASES, str, COUNT)]},
    },
    "recomputed": [{"modules": str, "ops": COUNT, "by": str, "keeps": [str]}],
    "activations": {
        **{"bytes": POSITIVE, "replicated_bytes": COUNT},
        "large_replicated": [{"op": str, "target": str, "path": str, "share": NUMBER, "why": str}],
    },
    "parameters": {"bytes": COUNT, "device_bytes": COUNT, "in_parts": {str: {str: str}}},
    "factors": [{"name": str, "size": COUNT, "kind": str}],
    "rules": [{"target": str, "rule": str, "origin": str, "ops": COUNT}],
    "without_rule": [_REPLICATED],
    "random": [_REPLICATED],
    "seconds": {str: NUMBER},
    "solver": {
        **{"name": str, "status": str, "objective": NUMBER, "bound": NUMBER, "gap": NUMBER},
        **{"variables": COUNT, "constraints": COUNT, "folded": bool},
    },
    "versions": {str: str},
    "decision": Either(
        {
            "training": bool,
            "inputs": [str],
            "ops": [(str, str, str, str)],
            "options": {
                **{"objective": str, "strategy": str, "rng": str, "may_stay_whole": NUMBER},
                **dict.fromkeys(("recompute", "shard_parameters"), Either(bool, NOTHING)),
                "overlap": bool,
                "capacity": Either({"bytes": COUNT, "reserve": NUMBER}, NOTHING),
                "optimizer": {
                    **{"optimizer": str, "master_weights": bool, "zero": COUNT, "data_parallel": COUNT},
                    "weight_decay": bool,
                },
                "hardware": Either(NOTHING, {str: object}),
                "dim_names": Either({str: str}, NOTHING),
                "in_layouts": Either({str: _SPEC}, NOTHING),
                "out_layouts": Either(_SPEC, [_SPEC]),
                "constraints": Either({str: {str: Either(str, NOTHING)}}, NOTHING),
                "keep_whole": Either([str], NOTHING),
            },
            "space": COUNT,
            "ways": [{"cuts": [[(str, COUNT)]], "operands": [[str]], "results": [[str]]}],
            "stages": [(str, COUNT, [str])],
            "recomputed": [{"region": COUNT, "ops": (str, str), "keeps": [(str, str, str, COUNT)]}],
            "solution": {"objective": NUMBER, "bound": NUMBER, "peak_bytes": COUNT, "capacity_bytes": COUNT},
        },
        {},
    ),
}
