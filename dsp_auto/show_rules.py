"""What `dsp-auto rules` prints: which ops have a rule, where it comes from, and what it says about an example call."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils import _pytree as pytree

from .errors import DspError, first_lines
from .passes import rule_cache
from .passes.discover import discover
from .passes.notation import OpCall, Operand
from .passes.register import find_op
from .passes.rules import FOUND, origin, registered, registered_by_user, rule_function, where


def list_rules() -> str:
    """A table of all rules: op, where the rule comes from, and the place."""
    rows = [[name, "written", _short(where(function))] for name, function in sorted(registered().items())]
    rows += [[name, "registered", where(function)] for name, function in sorted(registered_by_user().items())]
    kept = sorted({(entry["op"], entry["rule"]) for entry in rule_cache.entries() if entry["rule"]})
    rows += [[op, FOUND, rule] for op, rule in kept]
    note = "`pointwise` holds for every op that has torch's tag of that name."
    return tabulate(rows, headers=["op", "rule", "where, or what"], disable_numparse=True) + f"\n\n{note}"


def show_rules(op: str, example: str | None) -> str:
    """The rules of all overloads of an op for an example call, written as `2x3x5:bfloat16, [2x3, 2x3], dim=1`: what the
    schema says is a tensor is given by its sizes. Without one, for calls that a written rule is found to cover.

    Raises RuleError where there is no such op, DspError where the example is no call of it.
    """
    overloads = [overload for overload in find_op(op)[1] if not overload._schema.is_mutable]
    shown, problems = [], []
    for overload in overloads:
        if example is None and rule_function(overload) is None:
            continue
        try:
            text, call = _first_call(overload, _guesses(overload) if example is None else iter([example]))
        except Exception as error:  # whatever an op raises about arguments that it does not take
            problems.append(f"{overload}: {first_lines(error, 200)}")
            continue
        lines = [_origin(overload), *_about(call, text)]
        shown.append("\n    ".join([str(overload._schema), *lines]))
    if example is None and not shown:
        names = {str(overload) for overload in overloads}
        shown = [
            f"{entry['op']}\n    found by running it ({entry['checked']})\n    {entry['rule']}"
            for entry in rule_cache.entries()
            if entry["op"] in names and entry["rule"]
        ]
    if not shown:
        raise DspError(
            asked=f"the rules of {op}",
            found="; ".join(problems) or "nobody wrote one, and it has not been looked for",
            remedy='give a call to look at: --example "2x3x5x8, 2x3x7x8"'
            if example is None
            else "write another example",
        )
    return "\n\n".join(shown)


def _origin(overload: torch._ops.OpOverload) -> str:
    function = rule_function(overload)
    return "nobody wrote a rule" if function is None else f"{origin(overload)} at {_short(where(function))}"


def _first_call(overload: torch._ops.OpOverload, examples: Iterator[str]) -> tuple[str, OpCall]:
    """The first of the examples that the op takes; of several, one that its rule describes."""
    problem: Exception = ValueError("no call of it comes to mind")
    for text in examples:
        try:
            args, kwargs = _parse(overload, text)
            made = pytree.tree_map_only(
                Operand, lambda o: torch.empty(o.shape, dtype=o.dtype, device="meta"), (args, kwargs)
            )
            with torch.no_grad():
                results = overload(*made[0], **made[1])
            tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
            call = OpCall(overload, args, kwargs, tuple(tuple(tensor.shape) for tensor in tensors))
            function = rule_function(overload)
            if function is not None:
                function(call)
            return text, call
        except Exception as error:  # the op's own, or a rule's
            problem = error
    raise problem


def _about(call: OpCall, text: str) -> list[str]:
    function = rule_function(call.target)
    if function is not None:
        return [f"for ({text}): {function(call) or 'it does not describe this call'}"]
    found = discover(call)
    if found.rule is None:
        return [f"for ({text}): none is found: {found.why}", *([found.detail] if found.detail else [])]
    return [f"for ({text}): {found.rule}", f"found by running it ({found.checked})"]


def _parse(overload: torch._ops.OpOverload, text: str) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments; tensors as `Operand`s."""
    arguments = overload._schema.arguments
    args, kwargs, count = [], {}, itertools.count()
    for position, part in enumerate(_split(text)):
        named = re.fullmatch(r"([A-Za-z_]\w*)\s*=\s*(.*)", part)
        wanted = [a for a in arguments if a.name == named[1]] if named else list(arguments[position : position + 1])
        if not wanted:
            raise ValueError(f"{overload._schema} has no argument for {part!r}")
        value = _value(wanted[0].type, named[2] if named else part, count)
        if named:
            kwargs[named[1]] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket and in no quotes."""
    closed = r"""[^,"'\[(]|"[^"]*"|'[^']*'|\[[^\]]*\]|\([^)]*\)"""
    return [part.strip() for part in re.findall(rf"(?:{closed})+", text)]


def _value(kind: Any, text: str, count: Iterator[int]) -> Any:
    while isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    if text == "None":
        return None
    if isinstance(kind, torch.ListType) and not isinstance(kind.getElementType(), (torch.IntType, torch.FloatType)):
        return [_value(kind.getElementType(), part, count) for part in _split(text.strip("[]"))]
    if isinstance(kind, torch.TensorType):
        found = re.fullmatch(r"(\(\)|\d+(?:x\d+)*)(?::(\w+))?", text)
        dtype = getattr(torch, (found[2] if found else None) or "float32", None)
        if found is None or not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"{text!r} is no tensor; write its sizes, and its dtype where it is not float32: 2x3x5:int64"
            )
        return Operand(next(count), tuple(map(int, re.findall(r"\d+", found[1]))), dtype)
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _guesses(overload: torch._ops.OpOverload) -> Iterator[str]:
    """Calls that the op may take: equal tensors of 4, 3, 2 … dims, and simple values for what it cannot do without."""
    needed = [a for a in overload._schema.arguments if not a.has_default_value()]
    for rank, dtype, number in itertools.product((4, 3, 2, 5, 1), ("", ":int64"), ([1], [8], [8] * 4, [0, 1])):
        tensor = "x".join(["8"] * rank) + dtype
        parts = [_guess(a.type, tensor, number) for a in needed]
        if all(parts):
            yield ", ".join(f"{a.name}={part}" if a.kwarg_only else part for a, part in zip(needed, parts))


def _guess(kind: Any, tensor: str, numbers: Sequence[int]) -> str:
    if isinstance(kind, torch.TensorType):
        return tensor
    if isinstance(kind, torch.OptionalType):
        return "None"
    if isinstance(kind, torch.ListType):
        own = kind.getElementType()
        if isinstance(own, torch.IntType):
            return str(list(numbers))
        return f"[{tensor}, {tensor}]" if isinstance(own, torch.TensorType) else ""
    simple = {"int": "1", "float": "0.5", "bool": "False", "number": "2"}
    return simple.get(str(kind), "")


def _short(place: str) -> str:
    """A place below the working directory or the package, without what stands before it."""
    path, colon, line = place.rpartition(":")
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if Path(path).is_relative_to(folder):
            path = str(Path(path).relative_to(folder))
    return f"{path}{colon}{line}"
