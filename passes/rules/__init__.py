"""Which ops have a rule, and where it is written: one op family a file.

A rule is a function of an `OpCall` that returns an `OpRule`, or None where this call of the op has no rule (the op then
runs replicated and the plan names it). `@rule("aten::linear")` registers it for all overloads of an op,
`@rule("aten::mean.dim")` for one. Pointwise ops need no entry: their tag tells.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..notation import OpCall, OpRule, from_notation

RuleFunction = Callable[[OpCall], OpRule | None]
_RULES: dict[str, RuleFunction] = {}


def rule(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in _RULES:
                raise ValueError(f"{name} has a rule already, in {_RULES[name].__module__}")
            _RULES[name] = function
        return function

    return register


def registered() -> dict[str, RuleFunction]:
    """Every op (`aten::linear` or one overload, `aten::mean.dim`) with its rule function."""
    return dict(_RULES)


def rule_function(target: object) -> RuleFunction | None:
    """The rule function of an op overload, None where nobody wrote one."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    found = _RULES.get(f"{name}.{target._overloadname}") or _RULES.get(name)
    if found is None and torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags:
        found = _RULES["pointwise"]
    return found


def find_rule(call: OpCall) -> OpRule | None:
    """The rule of one op call, None where there is none."""
    function = rule_function(call.target)
    return None if function is None else function(call)


def numbered(count: int, letter: str = "d") -> list[str]:
    """Names for `count` axes: `d0 d1 d2`."""
    return [f"{letter}{position}" for position in range(count)]


def along(call: OpCall, dims: Iterable[int], kind: str = "whole", **flags: Any) -> OpRule:
    """The rule of an op that works along `dims` of its one operand and leaves the others alone.

    Results have the operand's dims; where the size of one of `dims` changes it is an axis of its own.
    kind: `whole` or `moved`.
    """
    shape = call.operands[0].shape
    names, made = numbered(len(shape)), numbered(len(shape), "o")
    over = {names[dim] for dim in dims}
    groups = []
    for result in call.outputs:
        changed = [names[dim] in over and size != shape[dim] for dim, size in enumerate(result)]
        groups.append(" ".join(made[dim] if new else names[dim] for dim, new in enumerate(changed)))
        over |= {made[dim] for dim, new in enumerate(changed) if new}
    return from_notation(f"{' '.join(names)} -> {', '.join(groups)}", call, **{kind: over}, **flags)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
