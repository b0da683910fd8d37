"""Which ops have a rule, and where it is written: one op family a file (`sliding` is shared by those with windows).

A rule is a function of an `OpCall` that returns an `OpRule`, or None where this call of the op has no rule (the op then
runs replicated and the plan names it). `@rule("aten::linear")` registers it for all overloads of an op,
`@rule("aten::mean.dim")` for one. Pointwise ops need no entry: their tag tells. Users' rules (`register`) come before
these; an op that has neither is tried out (`discover`).
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsp_auto.errors import RuleError

from ..notation import OpCall, OpRule, from_notation

_log = logging.getLogger(__name__)
RuleFunction = Callable[[OpCall], OpRule | None]


@dataclass(frozen=True, eq=False)
class UserRule:
    """A rule function of `register_rule`: what the user wrote (`text`, `sizes`), and where (`place`, file:line)."""

    text: str
    sizes: Mapping[str, int | str]
    place: str
    make: Callable[[OpCall], OpRule]

    def __call__(self, call: OpCall) -> OpRule:
        return self.make(call)


WRITTEN, REGISTERED, FOUND = "written", "registered", "found"
_RULES: dict[str, RuleFunction] = {}
_USER_RULES: dict[str, UserRule] = {}


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


def registered_by_user() -> dict[str, UserRule]:
    """The rules of `register_rule`, to be read and changed."""
    return _USER_RULES


def rule_function(target: object) -> RuleFunction | None:
    """The rule function of an op overload, None where nobody wrote one."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    tables: tuple[Mapping[str, RuleFunction], ...] = (_USER_RULES, _RULES)
    for rules in tables:
        found = rules.get(f"{name}.{target._overloadname}") or rules.get(name)
        if found is not None:
            return found
    is_pointwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    return _RULES["pointwise"] if is_pointwise else None


def origin(target: object) -> str:
    """Where the rule of an op comes from: `written` here, `registered` by a user, or `found` by trying the op out."""
    function = rule_function(target)
    if function is None:
        return FOUND
    return REGISTERED if isinstance(function, UserRule) else WRITTEN


def where(function: RuleFunction) -> str:
    """file:line of a rule."""
    if isinstance(function, UserRule):
        return function.place
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def find_rule(call: OpCall) -> OpRule | None:
    """The rule of one op call, None where there is none."""
    function = rule_function(call.target)
    if function is not None:
        try:
            return function(call)
        except RuleError as error:
            if isinstance(function, UserRule):
                raise
            _log.warning("the rule in %s does not describe this call: %s", where(function), error)
            return None
    can_be_tried = isinstance(call.target, torch._ops.OpOverload) and not _is_torchs_own(call.target)
    return _discovered(call).rule if can_be_tried else None


def why_none(call: OpCall) -> str:
    """Why `find_rule` has nothing for this call."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return "it is no op of a torch library"
    if _is_torchs_own(call.target) and rule_function(call.target) is None:
        return "nobody wrote one, and PyTorch's own ops are not tried out: some kernels trust the shapes that they get"
    if rule_function(call.target) is not None:
        return "its rule does not describe this call"
    return _discovered(call).why


def _is_torchs_own(target: torch._ops.OpOverload) -> bool:
    return target.namespace in ("aten", "prims")


def _discovered(call: OpCall) -> Any:
    from ..discover import discover  # which proves by the rules here

    return discover(call)


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
    kinds: dict[str, Any] = {kind: over}
    return from_notation(f"{' '.join(names)} -> {', '.join(groups)}", call, **kinds, **flags)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
