"""Which ops have a rule, and where it is written: one op family a file.

A rule is a function of an `OpCall` that returns an `OpRule`, or None where this call of the op has no rule (the op then
runs replicated and the plan names it). `@rule("aten::linear")` registers it for all overloads of an op,
`@rule("aten::mean.dim")` for one. Pointwise ops need no entry: their tag tells.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import torch

from ..notation import OpCall, OpRule

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
    if found is None and torch.Tag.pointwise in target.tags:
        found = _RULES["pointwise"]
    return found


def find_rule(call: OpCall) -> OpRule | None:
    """The rule of one op call, None where there is none."""
    function = rule_function(call.target)
    return None if function is None else function(call)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
