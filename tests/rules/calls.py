"""Calls of ops for the proofs of their rules: makers of tensors, and which calls prove which rule.

Each file here registers, for the rules of the file of the same name in `passes/rules`, under the names they have there:

    @cases("aten::linear")        yields calls worth naming: each form of the arguments that the rule looks at
    @generated("aten::linear")    draws one call at random: ranks, sizes, dtypes and forms of the arguments

`test_every_rule.py` proves them all. Of each rule some call must shard something; `shards_nothing` names those that cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from dsp_auto.passes.notation import OpRule
from dsp_auto.passes.prove import Example

aten = torch.ops.aten
Call = tuple[Any, tuple, dict[str, Any]]
F64, F32, BF16, I64, BOOL = torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool
FLOATS = (F64, F32, BF16)
DTYPES = (*FLOATS, I64, BOOL)
_generator = torch.Generator()

# What makes calls, by the name under which the rule is registered.
CASES: dict[str, Callable[..., Iterator[Call]]] = {}
GENERATED: dict[str, Callable[..., Call]] = {}
# Rules that let no axis be sharded, and why.
NOTHING_TO_SHARD: dict[str, str] = {}


def t(*shape: int, dtype: torch.dtype = F64, positive: bool = False) -> torch.Tensor:
    """Random numbers, other ones in every element; positive: from 0.5 on, integers from 1 on."""
    values = torch.randn(shape, generator=_generator, dtype=F64)
    if dtype is torch.bool:
        return values > 0
    if not dtype.is_floating_point:
        values = values * 4
    if positive:
        values = values.abs() + (0.5 if dtype.is_floating_point else 1)
    return values.to(dtype)


def distinct(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    """Random numbers of which no two are equal, so that there is one order."""
    count = torch.Size(shape).numel()
    return torch.randperm(count, generator=_generator).sub(count // 2).reshape(shape).to(dtype)


def index(limit: int, *shape: int) -> torch.Tensor:
    """Random indices below `limit`."""
    return torch.randint(0, limit, shape, generator=_generator)


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    return target, args, kwargs


def overload(name: str, default: str = "default") -> Any:
    """`aten::mean.dim` -> torch.ops.aten.mean.dim"""
    op, _, own = name.removeprefix("aten::").partition(".")
    return getattr(getattr(aten, op), own or default)


def trainable(made: Call) -> Call:
    """The call, or one of `nn.Buffer`s, which get no gradient, where torch itself has none to compare with: that of aminmax is
    not there in 2.11, and that of clamp fails where operand and bounds are broadcast to each other."""
    target, args, kwargs = made
    try:
        Example.of(*made)
    except RuntimeError:
        args, kwargs = pytree.tree_map_only(torch.Tensor, nn.Buffer, (args, kwargs))
    return target, args, kwargs


def rule_of(made: Call) -> OpRule | None:
    return Example.of(*made).find_rule()


def cases(*names: str):
    """Registers a function that yields calls, `()` or `(name)`, for the rules of these names."""
    return _register(CASES, names)


def generated(*names: str):
    """Registers a function that draws one call, `(draw)` or `(draw, name)`, for the rules of these names."""
    return _register(GENERATED, names)


def shards_nothing(*names: str, because: str) -> None:
    """Says of the rules of these names that they let no axis be sharded; of all others some call must prove one."""
    NOTHING_TO_SHARD.update(dict.fromkeys(names, because))


def _register(registry: dict[str, Callable], names: Sequence[str]):
    def register(function):
        for name in names:
            assert name not in registry, f"{name} has calls already, in {registry[name].__module__}"
            registry[name] = function
        return function

    return register


def fixed_calls(name: str) -> Iterator[Call]:
    _generator.manual_seed(0)
    function = CASES[name]
    yield from function(name) if function.__code__.co_argcount else function()


@st.composite
def generated_calls(draw, name: str) -> Call:
    _generator.manual_seed(draw(st.integers(0, 9)))  # the same numbers when the call is drawn again
    function = GENERATED[name]
    return function(draw, name) if function.__code__.co_argcount > 1 else function(draw)


def fixed_calls_like(other: str, name: str) -> Iterator[Call]:
    """The fixed calls of the op `other` as calls of `name`, of the overloads that it has."""
    return (own for made in fixed_calls(other) if (own := _as(name, made)) is not None)


def generated_calls_like(other: str, name: str) -> st.SearchStrategy[Call]:
    """Calls as drawn for the op `other`, of the op `name`."""
    return generated_calls(other).map(lambda made: _as(name, made)).filter(lambda made: made is not None)


def _as(name: str, made: Call) -> Call | None:
    """The call `made` as one of the op `name`; None where it has no such overload."""
    target, args, kwargs = made
    own = getattr(aten, name.removeprefix("aten::"))
    return (getattr(own, target._overloadname), args, kwargs) if target._overloadname in own.overloads() else None


# --- what generated calls draw from

SIZE = st.integers(1, 7)


def shape_of(draw, least: int = 0, most: int = 4) -> list[int]:
    """A shape of `least` to `most` dims, more often of several than of none or one."""
    rank = one_of(draw, *range(most, least - 1, -1), *range(most, max(least, 1), -1))
    return draw(st.lists(SIZE, min_size=rank, max_size=rank))


def dim_of(draw, rank: int) -> int:
    """A dim of a tensor of `rank` dims, counted from the front or from the back."""
    return one_of(draw, *range(-rank, rank)) if rank else one_of(draw, 0, -1)


def dims_of(draw, rank: int, least: int = 0) -> list[int]:
    """Some of a tensor's dims, in any order, each counted from the front or from the back."""
    dims = draw(st.permutations(range(rank)))[: one_of(draw, *range(least, rank + 1))]
    return [dim - rank if draw(st.booleans()) else dim for dim in dims]


def broadcastable(draw, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to `shape`."""
    kept = shape[one_of(draw, 0, 0, *range(len(shape) + 1)) :]
    return [one_of(draw, size, size, 1) for size in kept]


def one_of(draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))
