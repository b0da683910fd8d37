"""`dsp-auto`: explain a plan, make a page of it, verify it on this computer, tell two apart, compare strategies, find how few
GPUs a model fits on, run a demo, tell the rule of an op, or measure a mesh."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from .compare import compare as compare_strategies
from .cost_models.state import OPTIMIZERS, TrainingState
from .errors import DspError, InfeasibleError
from .factory import build, reason
from .fit import fit as fit_strategies
from .mesh import Mesh, as_mesh
from .passes.capture import Program, capture
from .passes.presets import PRESETS
from .plain_data import shorten
from .plan import Plan
from .planner import Options, plan_given, plan_prepared, prepare
from .progress import step
from .report import SECONDS, Report, check_writable, report_program
from .show_memory import show_memory
from .suggest import what_would_fit
from .verification import verify as verify_plan

# Characters of an error on stderr.
LONGEST = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where `demo` or `verify` finds a disagreement, or 2 where `compare` or `fit` finds no strategy that
    can run; and 2 with one line on stderr where the input is bad, and more where `explain` finds what would fit."""
    try:
        options = _parser().parse_args(argv)
        found = options.run(options)
        sys.stdout.flush()
        return found
    except DspError as error:
        _print_error(error)
        return 2
    except BrokenPipeError:  # whoever reads has read enough: `dsp-auto explain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 1


def explain(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr), _call(options) as (args, given):  # stdout is for the plan alone
        model, mesh, *call = args
        made = None if options.plan is None else Plan.load(options.plan)
        chosen, mesh = Options.of(strategy=options.strategy, **given), as_mesh(mesh)
        if made is not None:
            replace(chosen, dim_names=None).check_none()
        with step(f"capture of {type(model).__name__}"):
            program = capture(model, *call)
        try:
            if made is not None:
                found = plan_given(program, mesh, made)
            else:
                found = plan_prepared(prepare(program, mesh, chosen))
            asked = [str(found.explain(modules)) for modules in options.why]
        except InfeasibleError as error:
            return _tell_what_would_fit(error, program, mesh, chosen)
        if options.out is not None:
            found.save(options.out)
    if options.json:
        print(found.to_json(indent=2))
    else:
        shown = [str(found), *([show_memory(found)] if options.memory else []), *asked]
        print("\n\n".join(shown))
    return 0


def report(options: argparse.Namespace) -> int:
    check_writable(options.out)  # before planning, which takes longer
    with contextlib.redirect_stdout(sys.stderr):
        made = None if options.plan is None else Plan.load(options.plan)
        if options.target is None:
            found = _of_plan_alone(options, made)
        else:
            if options.mesh is None:
                raise DspError(asked="a report of a model", found="no --mesh", remedy='give one: --mesh "8"')
            with _call(options) as (args, given):
                model, mesh, *call = args
                chosen, mesh = Options.of(strategy=options.strategy, **given), as_mesh(mesh)
                if made is not None:
                    replace(chosen, dim_names=None, hardware=None).check_none()
                with step(f"capture of {type(model).__name__}"):
                    program = capture(model, *call)
                try:
                    found = report_program(
                        program, mesh, chosen, made, options.strategies, options.seconds, type(model).__name__
                    )
                except InfeasibleError as error:
                    return _tell_what_would_fit(error, program, mesh, chosen)
        found.save(options.out)
    print(f"{options.out}: {found}")
    return 0


def _of_plan_alone(options: argparse.Namespace, made: Plan | None) -> Report:
    if made is None:
        raise DspError(asked="a report", found="neither TARGET nor --plan", remedy="name a model, a plan's file, or both")
    chosen = Options.of(strategy=options.strategy, **_planning(options, None))
    chosen.check_none()
    return Report.of_plan(made)


def diff(options: argparse.Namespace) -> int:
    print(Plan.load(options.first).diff(Plan.load(options.second)))
    return 0


def compare(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr), _call(options) as (args, given):
        found = compare_strategies(*args, strategies=options.strategies, layers=options.layers, **given)
    print(found.to_json(indent=2) if options.json else found)
    return 0 if found.runnable else 2


def fit(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr), torch.set_grad_enabled(not options.inference):
        factory, arguments = _load(options.target), _arguments(options.argument)
        given = _planning(options, factory)
        found = fit_strategies(
            _in_eval(factory) if options.inference else factory,
            options.gpus,
            args=(),
            arguments=arguments,
            strategies=options.strategies,
            zero=options.zero,
            sequence=options.sequence,
            step=options.step,
            **given,
        )
    print(found.to_json(indent=2) if options.json else found)
    return 0 if found.fits else 2


def verify(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(options.seed)
        with _call(options, real=True) as (args, given):
            given |= {"strategy": options.strategy, "rng": options.rng}
            if options.plan is not None:
                given["dim_names"] = None  # the factory's; a plan has its own
            found = verify_plan(*args, plan=options.plan, seed=options.seed, **given)
    print(found)
    return 0 if found.agrees else 1


def demo(options: argparse.Namespace) -> int:
    from .demo import run  # needs torch.distributed, which planning does not

    if options.ranks < 1:
        raise DspError(asked=f"--ranks {options.ranks}", found="not a number of processes", remedy="use 1 or more")
    return 0 if run(options.ranks, _arguments(options.argument)) else 1


def rules(options: argparse.Namespace) -> int:
    from .show_rules import list_rules, show_rules

    with contextlib.redirect_stdout(sys.stderr):
        for place in options.imports:
            _load_module(place)
        with torch.set_grad_enabled(not options.inference):
            shown = show_rules(options.op, options.example) if options.op else list_rules()
    print(shown)
    return 0


@contextlib.contextmanager
def _call(options: argparse.Namespace, real: bool = False) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """What `plan`, `compare` and `verify` are called with: model, mesh, args and kwargs, and options by name."""
    factory, arguments = _load(options.target), _arguments(options.argument)
    given = _planning(options, factory)
    model, args, kwargs = build(factory, options.target, arguments, real)
    if options.inference:
        model.eval()
    with torch.set_grad_enabled(not options.inference):
        yield (model, options.mesh, args, kwargs), given


def _planning(options: argparse.Namespace, factory: Callable[..., Any] | None) -> dict[str, Any]:
    """The options of planning by name. factory: may name the dims of inputs."""
    state = {"zero": options.zero, "data_parallel": options.data_parallel} if "data_parallel" in options else {}
    return {
        "objective": options.objective,
        "capacity": options.capacity,
        "reserve": options.reserve,
        "optimizer": TrainingState(options.optimizer, options.master_weights, **state),
        "recompute": options.recompute,
        "hardware": options.hardware,
        "shard_parameters": options.shard_parameters,
        "constraints": _constraints(options.constraint) or None,
        "keep_whole": options.keep_whole or None,
        "dim_names": _pairs("--dim-names", options.dim_names) or getattr(factory, "dim_names", None),
    }


def _in_eval(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with its model in eval mode."""

    @functools.wraps(factory)
    def made(**arguments: Any) -> Any:
        built = factory(**arguments)
        if isinstance(built, tuple) and built and isinstance(built[0], nn.Module):
            built[0].eval()
        return built

    return made


def _load(target: str) -> Callable[..., Any]:
    """`package.module:factory` or `path/to/file.py:factory`."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise DspError(asked=f"target {target!r}", found="no factory is named", remedy="write it as module:factory")
    module = _load_module(place)
    try:
        factory = getattr(module, name)
    except AttributeError as error:
        raise DspError(asked=f"target {target!r}", found=f"{place} has no {name!r}") from error
    if not callable(factory):
        raise DspError(asked=f"target {target!r}", found=f"{name} is a {type(factory).__name__}, not a function")
    return factory


def _load_module(place: str) -> Any:
    """`package.module` or `path/to/file.py`."""
    try:
        return _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise DspError(asked=f"cannot import {place}", found=reason(error)) from error


def _import_module(name: str) -> Any:
    _importable(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    _importable(path.parent.resolve())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("no file that Python imports")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """Python literals where they are some (`layers=28`, `size=(8, 8)`, `flag=True`), else text (`habit=flat`)."""
    found: dict[str, Any] = {}
    for name, text in _pairs("-a", given).items():
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply to be read
            found[name] = text
    return found


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    found = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise DspError(
                asked=f"{option} {entry!r}", found="no name=value", remedy=f"write it as {option} name=value"
            )
        found[name] = value
    return found


def _constraints(given: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """`blocks.*.attn=sp:T`; `sp:-` for what is not to be sharded over sp."""
    found: dict[str, dict[str, str | None]] = {}
    for entry in given:
        modules, equals, wanted = entry.partition("=")
        mesh_dim, colon, factor = wanted.partition(":")
        if not (modules and equals and mesh_dim and colon and factor):
            raise DspError(
                asked=f"--constraint {entry!r}",
                found="no module, mesh dim and factor",
                remedy='write it as --constraint "blocks.*.attn=sp:T", or sp:- for what is not to be sharded over sp',
            )
        found.setdefault(modules, {})[mesh_dim] = None if factor == "-" else factor
    return found


def _tell_what_would_fit(error: InfeasibleError, program: Program, mesh: Mesh, chosen: Options) -> int:
    _print_error(error)
    for line in what_would_fit(program, mesh, chosen):
        print(f"    {line}", file=sys.stderr)
    return 2


def _print_error(error: DspError) -> None:
    print(f"dsp-auto: {shorten(' '.join(str(error).split()), LONGEST)}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DspError(asked=message, remedy=f"See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dsp-auto", description="Plans and runs PyTorch models on N ranks by sharding sequence dims.")
    parser.add_argument("--version", action="version", version=f"dsp-auto {version('dsp_auto')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    entry = commands.add_parser("explain", help="print the plan of a model", description=_EXPLAIN)
    entry.set_defaults(run=explain)
    _add_mesh(entry)
    _add_planning(entry)
    entry.add_argument("--json", action="store_true", help="the plan as JSON")
    entry.add_argument("--out", metavar="FILE", help="write the plan there, as JSON, for `parallelize(plan=FILE)`")
    entry.add_argument("--plan", metavar="FILE", help="a plan that --out wrote, in place of planning")
    entry.add_argument(
        "--why",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULES",
        help="what every other layout of the ops in these modules would cost, too: blocks.3.attn",
    )
    entry.add_argument("--memory", action="store_true", help="what a device holds too, in total and block by block")
    _add_strategy(entry)
    entry.add_argument("--hardware", metavar="PROFILE", help=f'{_HARDWARE} for the objective "time"; h100 without it')

    entry = commands.add_parser("report", help="write a plan as one page for a browser", description=_REPORT)
    entry.set_defaults(run=report)
    _add_mesh(entry, required=False)
    _add_planning(entry, target_required=False)
    _add_strategy(entry)
    entry.add_argument(
        "--out", metavar="FILE", default="plan.html", help="the page (plan.html); it may replace a page, and no other file"
    )
    entry.add_argument(
        "--plan", metavar="FILE", help="a plan that `explain --out` wrote, in place of planning; it needs no TARGET"
    )
    entry.add_argument("--hardware", metavar="PROFILE", help=f'{_PREDICTED}; plans are made for it with the objective "time"')
    entry.add_argument("--strategies", nargs="+", choices=PRESETS, help="compare with these alone; with all without it")
    entry.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help=f"how long other strategies and layouts may be tried ({SECONDS:g}); what is left then is told as such",
    )

    entry = commands.add_parser("diff", help="print what two plans do differently", description=_DIFF)
    entry.set_defaults(run=diff)
    entry.add_argument("first", metavar="FIRST", help="a plan that `explain --out` or `Plan.save` wrote")
    entry.add_argument("second", metavar="SECOND", help="another")

    entry = commands.add_parser("compare", help="print what each strategy would send and take", description=_COMPARE)
    entry.set_defaults(run=compare)
    _add_mesh(entry)
    _add_planning(entry)
    entry.add_argument("--json", action="store_true", help="all plans and figures as JSON")
    entry.add_argument("--strategies", nargs="+", choices=PRESETS, help="these alone; all without it")
    entry.add_argument("--layers", type=int, metavar="N", help="the model's layers; its repeated blocks without it")
    entry.add_argument("--hardware", metavar="PROFILE", default="h100", help=_PREDICTED)

    entry = commands.add_parser("fit", help="print how few GPUs a model fits on under each strategy", description=_FIT)
    entry.set_defaults(run=fit)
    entry.add_argument("--gpus", required=True, type=int, metavar="N", help="all there are")
    _add_planning(entry, capacity_required=True)
    entry.add_argument("--json", action="store_true", help="all figures as JSON")
    entry.add_argument("--strategies", nargs="+", choices=PRESETS, help="these alone; all but auto without it")
    entry.add_argument("--hardware", metavar="PROFILE", default="h100", help=_PREDICTED)
    entry.add_argument(
        "--sequence",
        metavar="NAME",
        help="an argument of the factory that is a length: the longest that fits too, for each size and strategy; takes a few "
        "captures and plans for each",
    )
    entry.add_argument("--step", type=int, default=1, metavar="N", help="what lengths are multiples of (1)")

    entry = commands.add_parser("demo", help="run the paper's Transformer-2D on processes of this computer")
    entry.set_defaults(run=demo)
    entry.add_argument("--ranks", type=int, default=4, help="processes (4)")
    _add_arguments(entry, "of examples.transformer_2d.build")

    entry = commands.add_parser("rules", help="print which dims of an op may be shared out", description=_RULES)
    entry.set_defaults(run=rules)
    entry.add_argument("op", nargs="?", metavar="OP", help='"aten::softmax" or "my::op.overload"; all ops without it')
    entry.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules that define ops or register rules: package.module or path/to/file.py",
    )
    entry.add_argument("--example", help='a call: sizes of tensors and other arguments, "2x5x8, 2x7x8:bfloat16, dim=1"')
    entry.add_argument("--inference", action="store_true", help="look for a rule without gradients")

    entry = commands.add_parser("verify", help="run a plan on this computer, and compare with one device", description=_VERIFY)
    entry.set_defaults(run=verify)
    _add_mesh(entry)
    _add_planning(entry)
    _add_strategy(entry)
    entry.add_argument("--hardware", metavar="PROFILE", help=f'{_HARDWARE} for the objective "time"; h100 without it')
    entry.add_argument("--rng", default="parallel", help='"parallel" (the default) or "serial": see dsp_auto.plan')
    entry.add_argument("--plan", metavar="FILE", help="a plan that `explain --out` wrote, in place of planning")
    entry.add_argument("--seed", type=_seed, default=0, metavar="N", help="of weights, inputs and what the model draws (0)")

    from . import calibrate

    entry = commands.add_parser("calibrate", help="measure this mesh and write a hardware profile")
    calibrate.add_arguments(entry)
    entry.set_defaults(run=calibrate.run)
    return parser


_EXPLAIN = """Plan TARGET's model on fake tensors: no weights, no GPU, no processes, whatever the size of the mesh.
TARGET names a function that returns (model, args, kwargs)."""

_REPORT = """Plan TARGET's model as `explain` does, and write one page that needs no network: what is sent, memory over the
program, the other strategies, and what other layouts of each stage would cost. With --plan and no TARGET, what the plan alone
can tell."""

_DIFF = """Print the options, stages, collectives, blocks recomputed and totals that differ between two plans."""

_VERIFY = """Plan TARGET's model, run all ranks in this process on real numbers, forward and backward, and compare every stage,
output and gradient with one device, and what is sent with the plan. Choose small sizes (-a): one process holds everything. Exit
code 1 where anything differs, with the first stage that does."""

_COMPARE = """Plan TARGET's model under each strategy, as `explain` does, and predict a step of each. Exit code 2 where none can
run it. Per block (or, with --layers, per layer) is the mean over them."""

_FIT = """Find for each strategy the smallest number of GPUs that a step of TARGET's model fits on, with data parallelism on the
rest, by planning it for one size after the other. Exit code 2 where none fits."""

_HARDWARE = "a profile's name or a .json file of `dsp-auto calibrate`,"
_PREDICTED = f"{_HARDWARE} that the step is predicted for; h100 without it"

_RULES = """Print the rule of OP and where it comes from: written in dsp_auto, registered by a user, or found by running the op
on the sizes of the example and others."""


def _add_mesh(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """What `explain`, `report` and `compare` share, and `fit` looks for."""
    parser.add_argument("--mesh", required=required, help='ranks, "8" or "2x4"')
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="replicas that ZeRO shares out over (1)")


def _add_planning(parser: argparse.ArgumentParser, capacity_required: bool = False, target_required: bool = True) -> None:
    """What `explain`, `report`, `compare` and `fit` share."""
    many = None if target_required else "?"
    parser.add_argument("target", nargs=many, metavar="TARGET", help="package.module:factory or path/to/file.py:factory")
    _add_arguments(parser, "of the factory")
    parser.add_argument("--objective", default="volume", help='"volume" (wire bytes, the default) or "time"')
    parser.add_argument(
        "--capacity",
        required=capacity_required,
        help='memory of a device for everything: "80GB", bytes, or "free" for what is free on this computer\'s now',
    )
    parser.add_argument(
        "--reserve",
        type=float,
        metavar="SHARE",
        help="of the capacity, kept back for the allocator and libraries; without it 0.05, of a bare number of bytes nothing",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="what it keeps counts as memory (adam)")
    parser.add_argument("--master-weights", action="store_true", help="it keeps float32 copies of 16-bit parameters")
    parser.add_argument(
        "--zero", type=int, choices=range(4), default=0, help="what data-parallel replicas share out, by ZeRO's stages (0)"
    )
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="blocks may be recomputed in backward instead of keeping their activations; so it is with a capacity",
    )
    held = parser.add_mutually_exclusive_group()
    held.add_argument(
        "--shard-parameters",
        action="store_true",
        default=None,
        help="ranks may hold parts of parameters; without this and the next, as the strategy has it",
    )
    held.add_argument(
        "--whole-parameters", dest="shard_parameters", action="store_false", help="every rank holds all parameters whole"
    )
    parser.add_argument("--inference", action="store_true", help="plan the forward of model.eval() without gradients")
    parser.add_argument(
        "--constraint",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULES=DIM:FACTOR",
        help='what ops in some modules shard over a mesh dim: "blocks.*.attn=sp:T", and sp:- for nothing',
    )
    parser.add_argument(
        "--keep-whole", nargs="+", action="extend", default=[], metavar="MODULES", help="modules whose ops shard nothing"
    )
    parser.add_argument(
        "--dim-names",
        nargs="+",
        action="extend",
        default=[],
        metavar="INPUT=DIMS",
        help="names of an input's dims: video=\"B T S C\"; else the factory's own attribute dim_names",
    )


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no number from 0 to 2**63")
    return int(text)


def _add_strategy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategy",
        choices=PRESETS,
        help='without it, "dsp" for a model of several long sequences, else "auto" with whole parameters',
    )


def _add_arguments(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument(
        "-a",
        dest="argument",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help=f"arguments {whose}: Python literals, else text",
    )


if __name__ == "__main__":
    sys.exit(main())
