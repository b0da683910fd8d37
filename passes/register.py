"""Register: a user's rule for an op, in one line of the factor notation.

    register_rule("my::attention", "b s d, b t d, b t e -> b s e; whole: t d")

What a line can get wrong is told when it is registered; what only a call can show, when a model that has one is planned.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dsp_auto.errors import ProofError, RuleError
from dsp_auto.units import counted

from .notation import ELLIPSIS, UNREAD, Emit, Local, OpCall, OpRule, from_notation, parse
from .prove import prove
from .rules import UserRule, registered_by_user, rule_function, where

KINDS = ("whole", "moved", "reduces")


def register_rule(
    op: Any,
    text: str,
    *,
    whole: str | Iterable[str] = (),
    moved: str | Iterable[str] = (),
    reduces: str | Iterable[str] = (),
    sizes: Mapping[str, int | str] | None = None,
    example: tuple | None = None,
    replace: bool = False,
) -> None:
    """Declare how `op` may be shared out over ranks; plans made from now on use it.

    op: "my::op" (all its overloads), "my::op.overload", `torch.ops.my.op`, or what `torch.library.custom_op` made.
    text: the dims of every tensor argument and of every result, `"b s d, b t d -> b s d"`: a name is an axis, `(h d)` a
        dim that merges two, `1` a dim of size one, `...` the leading dims that operands share by broadcasting, `_` a dim
        that the op does not read. The kinds below may follow in the text, as rules print them: `"...; whole: t d"`.
    whole: axes that the op computes over, moved: that it moves data along; every rank needs all of them. An axis that
        stands only in operands, or only in results, is whole where nothing else is said.
    reduces: axes that the op sums away: the ranks' results add up. All other axes are parallel.
    sizes: of axes that stand in merged dims only: a number, or the name of the op's int argument that gives it
        (`{"h": "num_heads"}`). A rank that has a part of the axis calls the op with its own size for that argument.
    example: `(args, kwargs)` or args alone, to prove the rule on: run in shards, results and gradients (under
        `torch.no_grad()` results alone) must be what the whole call gives.
    replace: override a rule that the op has.

    Raises RuleError where the notation is malformed or does not fit the op's schema, where there is no such op, where it
    changes its arguments or draws random numbers, or where it has a rule; ProofError where the example disagrees.
    """
    name, overloads = find_op(op)
    notation, kinds = read_rule(text)
    for kind, axes in (("whole", whole), ("moved", moved), ("reduces", reduces)):
        kinds[kind] |= _names(axes)
    sizes = dict(sizes or {})
    for overload in overloads:
        _check_op(overload, text)
    _complete(notation, kinds, sizes, text)
    fitting = [overload for overload in overloads if _misfit(overload, notation, sizes) is None]
    if not fitting:
        raise RuleError(
            asked=f"rule {text!r} for {name}",
            found=_misfit(overloads[0], notation, sizes),
            remedy="write one group of dims for each tensor argument, and one for each result",
        )
    place = _caller()
    function = _function(name, notation, kinds, sizes, place)
    known = registered_by_user().get(name)
    if not replace and not (known and known.text == function.text and known.sizes == function.sizes):
        for overload in overloads:
            own = rule_function(overload)
            if own is not None:
                raise RuleError(
                    asked=f"rule {text!r} for {name}",
                    found=f"{overload} has a rule already, written at {where(own)}",
                    remedy="pass replace=True to override it",
                )
    if example is not None:
        _prove(fitting[0], function, example, place)
    registered_by_user()[name] = function


def find_op(op: Any) -> tuple[str, list[torch._ops.OpOverload]]:
    """The name that `op` goes by and its overloads. Raises RuleError where there is none."""
    op = getattr(op, "_opoverload", op)  # a function that torch.library.custom_op made
    if isinstance(op, torch._ops.OpOverload):
        return f"{op._schema.name}.{op._overloadname}", [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        op = op._qualified_op_name
    if not isinstance(op, str):
        raise RuleError(
            asked=f"a rule for {op!r}",
            found=f"a {type(op).__name__}, which is no op",
            remedy='name it "namespace::op", or pass torch.ops.namespace.op',
        )
    found = re.fullmatch(r"(\w+)::(\w+)(?:\.(\w+))?", op)
    if found is None:
        raise RuleError(asked=f"op {op!r}", found="no name of an op", remedy='write it as "namespace::op"')
    try:
        packet = getattr(getattr(torch.ops, found[1]), found[2])
        return op, [getattr(packet, own) for own in ([found[3]] if found[3] else packet.overloads())]
    except AttributeError as error:
        raise RuleError(
            asked=f"op {op!r}",
            found="torch has no such op" if "overload" not in str(error) else f"no overload {found[3]!r}",
            remedy="import the module that defines it first",
        ) from error


def read_rule(text: str) -> tuple[str, dict[str, set[str]]]:
    """A rule as it is printed, `"b t d -> b d; whole: d; reduces: t"`: its notation, and the axes of each kind."""
    notation, *notes = text.split(";")
    kinds: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for note in notes:
        kind, colon, axes = note.partition(":")
        if not colon or kind.strip() not in KINDS:
            raise RuleError(f"rule {text!r}: after ';' comes one of {', '.join(KINDS)} and ':', not {note.strip()!r}")
        kinds[kind.strip()] |= _names(axes)
    notation = re.sub(r"\(\s*\)", "", notation)  # a tensor without dims
    parse(notation)
    return notation.strip(), kinds


def _names(axes: str | Iterable[str]) -> set[str]:
    return set(axes.replace(",", " ").split()) if isinstance(axes, str) else set(axes)


def _caller() -> str:
    """file:line of the code that registers."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _check_op(overload: torch._ops.OpOverload, text: str) -> None:
    problem = None
    if overload._schema.is_mutable:
        problem = "it changes its arguments, and a rule describes a function"
    elif torch.Tag.nondeterministic_seeded in overload.tags:
        problem = "it draws random numbers, which ranks may not split"
    if problem:
        raise RuleError(asked=f"rule {text!r} for {overload}", found=problem, remedy="leave it without a rule")


def _complete(notation: str, kinds: dict[str, set[str]], sizes: Mapping[str, Any], text: str) -> None:
    """Refuses kinds of axes that do not exist; adds the axes that cannot be but whole."""
    inputs, outputs = ({axis for dims in side for dim in dims for axis in _axes_of(dim)} for side in parse(notation))
    for what, axes in (*kinds.items(), ("sizes", set(sizes))):
        unknown = axes - inputs - outputs
        if unknown:
            raise RuleError(f"rule {text!r}: {what} names {' '.join(sorted(unknown))}, which stands in no dim")
    for axis in sorted(inputs | outputs):
        own = [kind for kind, axes in kinds.items() if axis in axes]
        if len(own) > 1:
            raise RuleError(f"rule {text!r}: axis {axis} is {own[0]} and {own[1]}; it can be one")
    if ELLIPSIS in sum(parse(notation)[1], []) and ELLIPSIS not in sum(parse(notation)[0], []):
        raise RuleError(f"rule {text!r}: '...' stands only in a result")
    # Of an axis that only one side has a rank could neither make nor use a part by itself.
    kinds["whole"] |= (inputs ^ outputs) - kinds["moved"] - kinds["reduces"] - sizes.keys()


def _axes_of(dim: Any) -> tuple[str, ...]:
    return () if dim in (ELLIPSIS, UNREAD) else dim


def _misfit(overload: torch._ops.OpOverload, notation: str, sizes: Mapping[str, Any]) -> str | None:
    """What of the op's schema the notation does not fit."""
    operands, results = (len(side) for side in parse(notation))
    arguments, returns = overload._schema.arguments, overload._schema.returns
    single = [_holds_tensor(a.type) for a in arguments if not _is_list(a.type)]
    needed = sum(_holds_tensor(a.type) and not _is_optional(a.type) for a in arguments if not _is_list(a.type))
    lists = any(_is_list(a.type) and _holds_tensor(a.type) for a in arguments)
    if operands < needed or (operands > sum(single) and not lists):
        return f"it has {counted(operands, 'operand')}, and {overload._schema} takes {counted(sum(single), 'tensor')}"
    if results != len(returns) and not any(_is_list(r.type) for r in returns):
        return f"it has {counted(results, 'result')}, and {overload._schema} returns {len(returns)}"
    ints = {a.name for a in arguments if isinstance(a.type, (torch.IntType, torch.SymIntType))}
    unknown = [size for size in sizes.values() if isinstance(size, str) and size not in ints]
    return f"{overload._schema} has no int argument {unknown[0]!r}" if unknown else None


def _is_optional(kind: Any) -> bool:
    return isinstance(kind, torch.OptionalType)


def _is_list(kind: Any) -> bool:
    return isinstance(kind.getElementType() if _is_optional(kind) else kind, torch.ListType)


def _holds_tensor(kind: Any) -> bool:
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, torch.TensorType)


def _function(
    name: str, notation: str, kinds: Mapping[str, set[str]], sizes: Mapping[str, int | str], place: str
) -> UserRule:
    arguments = {axis: size for axis, size in sizes.items() if isinstance(size, str)}

    def local(emit: Emit, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], here: Local) -> Any:
        """The rank's own sizes for the int arguments that are the sizes of axes."""
        args, kwargs = list(args), dict(kwargs)
        positions = {argument.name: n for n, argument in enumerate(target._schema.arguments)}
        for axis, argument in arguments.items():
            if here.sizes.get(axis) == here.whole_sizes.get(axis):
                continue
            if positions[argument] < len(args):
                args[positions[argument]] = here.sizes[axis]
            else:
                kwargs[argument] = here.sizes[axis]
        return emit(target, *args, **kwargs)

    def rule(call: OpCall) -> OpRule:
        known = {axis: call[size] if isinstance(size, str) else size for axis, size in sizes.items()}
        try:
            return from_notation(
                notation,
                call,
                whole=kinds["whole"],
                moved=kinds["moved"],
                reduces=kinds["reduces"],
                sizes=known,
                local=local if arguments else None,
            )
        except RuleError as error:
            shapes = ", ".join(str(list(operand.shape)) for operand in call.operands)
            raise RuleError(
                asked=f"the rule of {name}, registered at {place}, for {call.target} of {shapes}",
                found=str(error),
                remedy="register a rule that describes this call, or none",
            ) from error

    return UserRule(show(notation, kinds), sizes, place, rule)


def show(notation: str, kinds: Mapping[str, Iterable[str]]) -> str:
    """A rule as `read_rule` reads it."""
    return "; ".join([notation, *(f"{kind}: {' '.join(sorted(axes))}" for kind, axes in kinds.items() if axes)])


def _prove(overload: torch._ops.OpOverload, function: UserRule, example: tuple, place: str) -> None:
    has_kwargs = len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], Mapping)
    args, kwargs = example if has_kwargs else (example, {})
    with torch.no_grad():
        results = overload(*args, **kwargs)
    tensors = [results] if isinstance(results, torch.Tensor) else list(results)
    rule = function(OpCall.of(overload, args, kwargs, tensors))
    try:
        prove(overload, args, kwargs, rule=rule)
    except ProofError:
        raise
    except Exception as error:  # the op's own, from forward or backward
        raise ProofError(
            asked=f"the rule `{rule}` of {overload}, registered at {place}, on its example",
            found=f"{type(error).__name__}: {error}",
            remedy="where the op has no gradient, register it under torch.no_grad()",
        ) from error
