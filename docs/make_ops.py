"""Writes `docs/ops.md`, the list of all ops that have a rule: `python -m docs.make_ops`, from the top of the repository.

Each rule is shown for one of the calls that prove it (`tests/rules`). A test fails where the file is not what this writes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tests.rules
from dsp_auto.passes import rules
from dsp_auto.passes.notation import OpRule
from dsp_auto.passes.prove import Example
from tests.rules.calls import CASES, Call, fixed_calls

PLACE = Path(__file__).with_name("ops.md")
_HEAD = """# Ops and their rules

Written by `python -m docs.make_ops`. Every line is one rule for one call of its op, in the notation of `passes/notation.py`:
a group of dims for each tensor operand and each result; the same name is the same axis; `(a b)` is a dim that merges two,
`1` a dim of size one, `_` a dim that is not read, `()` a tensor without dims. Axes are parallel, unless they are

    whole     computed over: every rank needs all of it
    moved     what the op moves data along: every rank needs all of it
    reduces   summed away: shards give partial results
    ranges    cut together, into ranges; ranks exchange what lies over the border where the op looks there
    combines  computed over in a way that ranks share: they exchange statistics

An op may read its arguments before it decides: `dsp-auto rules OP --example "..."` tells the rule of any call, and the file
named for each family proves its rules on many more. All ops that carry torch's tag `pointwise` are covered by the rule of that
name. An op of another library is tried out, unless it is random or has side effects, and its rule found if
it has one; `dsp_auto.register_rule` declares the rule of your own op.
"""


def text() -> str:
    """The whole file."""
    for module in pkgutil.iter_modules(tests.rules.__path__, "tests.rules."):
        importlib.import_module(module.name)
    families: dict[str, list[str]] = {}
    for name, function in sorted(rules.registered().items()):
        families.setdefault(function.__module__, []).append(name)
    parts = [_HEAD]
    for family, names in sorted(families.items()):
        title = re.split(r"[.:]", sys.modules[family].__doc__ or "")[0]
        short = family.rpartition(".")[2]
        parts.append(f"## {title}\n\n`passes/rules/{short}.py`, proven in `tests/rules/test_{short}.py`\n")
        rows = [f"| `{name}` | `{shown}` | `{rule}` |" for name in names for shown, rule in [_typical(name)]]
        parts.append("\n".join(["| op | for example | rule |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _typical(name: str) -> tuple[str, str]:
    """The first of the op's calls whose rule cuts something of three dims or more; else that cuts something; else that has
    a rule."""
    known = list(_ruled(name))
    for least in (3, 0):
        for made, rank, rule in known:
            if rule.cuts() and rank >= least:
                return _show(made), str(rule)
    return (_show(known[0][0]), str(known[0][2])) if known else ("", "no call in the tests")


def _ruled(name: str) -> Iterator[tuple[Call, int, OpRule]]:
    """The calls of the tests that have a rule, each with the most dims that an operand has."""
    for made in fixed_calls(name) if name in CASES else ():
        example = Example.of(*made)
        rule = example.find_rule()
        if rule is not None:
            yield made, max((tensor.ndim for tensor in example.operands), default=0), rule


def _show(made: Call) -> str:
    _, args, kwargs = made
    return ", ".join([*map(_value, args), *(f"{name}={_value(value)}" for name, value in kwargs.items())])


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = "" if value.is_floating_point() else f":{str(value.dtype).removeprefix('torch.')}"
        return ("x".join(map(str, value.shape)) or "()") + dtype
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)


if __name__ == "__main__":
    PLACE.write_text(text())
