"""Writes `docs/api.md`, the reference of what `dsp_auto` exports and of its command line: `python -m docs.make_api`, from the
top of the repository.

All text is that of the docstrings and of the command line's help. A test fails where the file is not what this writes.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import dsp_auto
from dsp_auto import cli
from dsp_auto.alternatives import Alternative, Alternatives
from dsp_auto.calibrate import calibrate
from dsp_auto.compare import Candidate
from dsp_auto.cost_models.hardware import Hardware
from dsp_auto.fit import Fitted, Split
from dsp_auto.longest import Longest
from dsp_auto.plan import Enter, PlanStage
from dsp_auto.rehearse import rehearse
from dsp_auto.verify import Traffic
from dsp_auto.watch import Difference

PLACE = Path(__file__).with_name("api.md")
WIDTH = 120
_HEAD = """# API reference

Written by `python -m docs.make_api` from docstrings and the command line's help. Sizes of memory and messages are bytes of one
device, times are seconds, tensors are written with their dims: `[B, T, S, C]`. New to it: [quickstart.md](quickstart.md); the
words: [concepts.md](concepts.md); errors by message: [troubleshooting.md](troubleshooting.md).
"""
# Not exported, but what a user gets from what is, or gives to it.
_PARTS = (
    *(PlanStage, Enter, Alternatives, Alternative, Candidate, Fitted, Split, Longest, Difference, Traffic, Hardware),
    *(calibrate, rehearse),
)


def text() -> str:
    """The whole file."""
    exported = {name: getattr(dsp_auto, name) for name in dsp_auto.__all__}
    errors = {name: own for name, own in exported.items() if inspect.isclass(own) and issubclass(own, Exception)}
    functions = {name: own for name, own in exported.items() if inspect.isfunction(own)}
    classes = {name: own for name, own in exported.items() if name not in errors | functions}
    parts = [_HEAD, "## Functions\n"]
    parts += [_function(f"dsp_auto.{name}", own, "###") for name, own in functions.items()]
    parts += ["## Classes\n", *(_class(f"dsp_auto.{name}", own) for name, own in classes.items())]
    parts.append("## Parts of these\n\nNot exported by `dsp_auto`: found in what it returns, or in the module named.\n")
    for own in _PARTS:
        name = f"{own.__module__}.{own.__name__}"
        parts.append(_class(name, own) if inspect.isclass(own) else _function(name, own, "###"))
    parts += ["## Errors\n", *(_error(own) for own in sorted(errors.values(), key=lambda own: len(own.__mro__)))]
    return "\n".join([*parts, "## Command line\n", *_command_line()])


def public() -> Iterator[tuple[str, Any, Collection[str]]]:
    """Everything that the reference shows and that should have a docstring: its name, itself, and the names (of arguments or
    fields) that its docstring should speak of."""
    exported = [getattr(dsp_auto, name) for name in dsp_auto.__all__]
    for own in (*exported, *_PARTS):
        if inspect.isfunction(own):
            yield own.__name__, own, parameters(own)
            continue
        yield own.__name__, own, [one.name for one in fields(own)] if is_dataclass(own) else ()
        for name, member in _members(own):
            yield f"{own.__name__}.{name}", member, ()


def commands() -> Mapping[str, argparse.ArgumentParser]:
    """The commands of `dsp-auto` by name."""
    parser = cli._parser()
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices


def _function(name: str, function: Callable[..., Any], level: str) -> str:
    return f"{level} `{name}`\n\n{_signature(function)}\n{_doc(function, parameters(function))}"


def _class(name: str, own: type) -> str:
    known = [one.name for one in fields(own)] if is_dataclass(own) else []
    parts = [f"### `{name}`\n"]
    if is_dataclass(own):
        parts.append(_code(f"{own.__name__}({_in_lines(_field(one) for one in fields(own))})"))
    parts.append(_doc(own, known))
    for member, value in _members(own):
        if isinstance(value, property):
            parts.append(f"#### `{own.__name__}.{member}`\n\n{_doc(value.fget, ())}")
        else:
            parts.append(_function(f"{own.__name__}.{member}", getattr(value, "__func__", value), "####"))
    return "\n".join(parts)


def _error(own: type) -> str:
    base = "" if own.__base__ is Exception else f"\n\nA `{own.__base__.__name__}`."
    return f"### `dsp_auto.{own.__name__}`{base}\n\n{_doc(own, inspect.signature(own).parameters)}"


def _members(own: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class; not those of a base class in other words."""
    inherited = {name for base in own.__mro__[1:] for name in vars(base)}
    for name, value in vars(own).items():
        is_member = inspect.isfunction(value) or isinstance(value, (property, classmethod))
        if is_member and not name.startswith("_") and name not in inherited:
            yield name, value


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def _signature(function: Callable[..., Any]) -> str:
    found = inspect.signature(function)
    shown, star = [], False
    for name, own in found.parameters.items():
        if name in ("self", "cls"):
            continue
        if own.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            star = True
            shown.append("*")
        star |= own.kind is inspect.Parameter.VAR_POSITIONAL
        shown.append(str(own).replace("'", "") if own.default in (inspect.Parameter.empty, None) else _with_default(own))
    result = "" if found.return_annotation is inspect.Signature.empty else f" -> {found.return_annotation}"
    return _code(f"{function.__name__}({_in_lines(shown)}){result}")


def _with_default(own: inspect.Parameter) -> str:
    return f"{own.name}: {own.annotation} = {own.default!r}"


def _field(one: Field) -> str:
    if one.default is not MISSING:
        return f"{one.name}: {one.type} = {one.default!r}"
    return f"{one.name}: {one.type}" + (f" = {one.default_factory.__name__}()" if one.default_factory is not MISSING else "")


def _in_lines(parts: Iterator[str] | list[str]) -> str:
    """On one line where that is short, else one part a line."""
    parts = list(parts)
    line = ", ".join(parts)
    return line if len(line) < 80 else "\n    " + ",\n    ".join(parts) + ",\n"


def _code(shown: str) -> str:
    return f"```py\n{shown}\n```\n"


def _doc(own: Any, known: Collection[str]) -> str:
    """A docstring as Markdown: what it says of each of the `known` names is an entry of a list."""
    parts = []
    for paragraph in re.split(r"\n\n+", inspect.cleandoc(own.__doc__ or "")):
        if paragraph.startswith("    ") or not known:
            parts.append(paragraph)
            continue
        first, listed = _entries(" ".join(map(str.strip, paragraph.splitlines())), known)
        parts.append("\n".join([first, ""] * bool(first) + listed) if listed else paragraph)
    return "\n\n".join(parts) + "\n"


def _entries(line: str, known: Collection[str]) -> tuple[str, list[str]]:
    """What a paragraph says before it speaks of one of the `known` names, and an entry for each of these."""
    name = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    starts = re.finditer(rf"(?:^|(?<=[.;)] ))((?:{name})(?:, (?:{name}))*): ", line)
    found = [start for start in starts if line[: start.start()].count("`") % 2 == 0]  # not inside of code
    ends = [*(start.start() for start in found[1:]), len(line)]
    listed = [f"* **{start[1]}**: {line[start.end() : end].rstrip(' ;')}" for start, end in zip(found, ends)]
    return line[: found[0].start()].rstrip(" ;") if found else line, [_wrapped(entry) for entry in listed]


def _wrapped(entry: str) -> str:
    """An entry of a list, in lines."""
    lines = [""]
    for word in entry.split(" "):
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append("  ")
        lines[-1] += word if not lines[-1].strip() else f" {word}"
    return "\n".join(lines)


def _command_line() -> Iterator[str]:
    yield f"{inspect.cleandoc(cli.main.__doc__)}\n"
    for name, parser in commands().items():
        yield f"### `dsp-auto {name}`\n\n{parser.description or _help_of(name)}\n"
        rows = [_option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        yield "\n".join(["| argument | what it is |", "| --- | --- |", *rows]) + "\n"


def _help_of(name: str) -> str:
    action = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    shown = next(own.help for own in action._choices_actions if own.dest == name)
    return shown[0].upper() + shown[1:] + "."


def _option(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    takes = "" if action.nargs == 0 else f" {value}" + " …" * (action.nargs == "+")
    shown = ", ".join(action.option_strings) + takes if action.option_strings else str(action.metavar or action.dest)
    required = " (required)" if action.required and action.option_strings else ""
    cells = (f"`{shown}`{required}", action.help or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PLACE.write_text(text(), encoding="utf-8")
