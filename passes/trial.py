"""Trial: one op call on made-up inputs of any sizes, run where it can do no harm.

What an op declares is believed where it says no: an op that may change its arguments, draw random numbers, communicate or
act on anything but its results is not tried at all, and one that does so unannounced is given up on sight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch._higher_order_ops.effects import has_effects
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dsp_auto.errors import first_lines

from .notation import OpCall, Operand, Shape
from .prove import Example

# Elements of all operands together that a trial may have.
LARGEST = 2**21
_COMMUNICATES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor", "dsp"}
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_TAGS = {
    "nondeterministic_seeded": "it draws random numbers",
    "maybe_aliasing_or_mutating": "it may change its arguments",
    "data_dependent_output": "its results are no tensors",
    "dynamic_output_shape": "the sizes of its results depend on values",
}


class Unfit(Exception):
    """Why an op's rule cannot be found by running it.

    reason: the same text on every rank and in every run. detail: what the op said, for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class NeverRan(Unfit):
    """The op took none of the inputs that were tried."""

    def __init__(self, detail: str) -> None:
        super().__init__("it ran on no inputs that were tried", detail)


@dataclass(frozen=True)
class Inputs:
    """Made-up operands.

    limit: integers are below it. dtype: of the operands that have the dtype of the call's first floating operand; None for
    that dtype itself. outliers: one number in eight is eight times as large, so that what an op takes from all of them
    (the largest, a mean, a norm) differs from part to part.
    """

    shapes: tuple[Shape, ...]
    limit: int = 2
    dtype: torch.dtype | None = None
    outliers: bool = False

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def refuse_by_declaration(call: OpCall) -> None:
    """Raises Unfit where the op's schema, tags or arguments say that running it tells nothing, or does something."""
    target, schema = call.target, call.target._schema
    declared = [_TAGS[tag.name] for tag in target.tags if tag.name in _TAGS]
    if schema.is_mutable:
        raise Unfit("it changes its arguments")
    if target.namespace in _COMMUNICATES:
        raise Unfit("it communicates")
    if has_effects(target):
        raise Unfit("it has side effects")
    if declared:
        raise Unfit(declared[0])
    if not call.outputs or any("Tensor" not in str(returned.type) for returned in schema.returns):
        raise Unfit("its results are no tensors")
    if not call.operands:
        raise Unfit("it takes no tensors")
    shapes = [*(operand.shape for operand in call.operands), *call.outputs]
    if not all(isinstance(size, int) and size > 0 for shape in shapes for size in shape):
        raise Unfit("some of its sizes are zero, or known only when it runs")
    for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))):
        if not isinstance(leaf, (Operand, *_PLAIN)):
            raise Unfit("its arguments are known only when it runs")


class Trial:
    """Runs `call` on other inputs, on one device."""

    def __init__(self, call: OpCall, device: str) -> None:
        self.call, self.device = call, device
        kinds = [operand.dtype for operand in call.operands]
        self.dtype = next((kind for kind in kinds if _is_inexact(kind)), None)
        self.has_integers = any(not _is_inexact(kind) and kind is not torch.bool for kind in kinds)
        self.positive = False  # numbers, for an op that has no results for others
        self.complaint = ""  # the op's, about the latest inputs that it did not take

    def run(self, inputs: Inputs) -> list[torch.Tensor] | None:
        """The results, without gradients; None where the op does not take these inputs."""
        args, kwargs = self._arguments(self._tensors(inputs))
        with torch.no_grad():
            return self._tried(lambda: _leaves(self.call.target(*args, **kwargs)))

    def example(self, inputs: Inputs) -> Example | None:
        """The call with its results, and gradients where grad mode is on; None where the op does not take these inputs."""
        args, kwargs = self._arguments(self._tensors(inputs))
        return self._tried(lambda: Example.of(self.call.target, args, kwargs))

    def check_is_function(self, inputs: Inputs) -> None:
        """Raises Unfit where the op changes its operands, moves a random state, or answers equal inputs differently."""
        tensors = self._tensors(inputs)
        copies = [tensor.clone() for tensor in tensors]
        args, kwargs = self._arguments(tensors)
        before = _random_states()
        with torch.no_grad():
            first, second = (self._tried(lambda: _leaves(self.call.target(*args, **kwargs))) for _ in range(2))
        if first is None or second is None:
            raise Unfit("it takes an input once and not again", self.complaint)
        if not _equal(_random_states(), before):
            raise Unfit("it draws random numbers")
        if not _equal(tensors, copies):
            raise Unfit("it changes its arguments")
        if not _equal(first, second):
            raise Unfit("it gives different results for equal inputs")

    def is_same_alone(self, inputs: Inputs, operand_dims: dict[int, int], result_dims: dict[int, int]) -> bool:
        """Whether the first half of an axis gives by itself what it gives beside a second half of numbers a hundred times as
        large. Compared on the scale of the first half: an op that rounds by the largest of all shows here in any dtype."""
        tensors = self._tensors(inputs)
        half = {index: tensors[index].shape[dim] // 2 for index, dim in operand_dims.items()}
        for index, dim in operand_dims.items():
            if _is_inexact(tensors[index].dtype):
                tensors[index].narrow(dim, half[index], tensors[index].shape[dim] - half[index]).mul_(100)
        parts = [
            tensor.narrow(operand_dims[index], 0, half[index]).contiguous() if index in operand_dims else tensor
            for index, tensor in enumerate(tensors)
        ]
        with torch.no_grad():
            (args, kwargs), (own_args, own_kwargs) = self._arguments(tensors), self._arguments(parts)
            whole = self._tried(lambda: _leaves(self.call.target(*args, **kwargs)))
            own = self._tried(lambda: _leaves(self.call.target(*own_args, **own_kwargs)))
        if whole is None or own is None:
            return False
        for index, (result, part) in enumerate(zip(whole, own)):
            wanted = result.narrow(result_dims[index], 0, next(iter(half.values())))
            if _is_inexact(wanted.dtype):
                tolerance = 16 * torch.finfo(wanted.dtype).eps * wanted.abs().nan_to_num(0, 0, 0).max().item()
                exact = torch.complex128 if wanted.is_complex() else torch.float64
                if not torch.allclose(part.to(exact), wanted.to(exact), 0, tolerance, equal_nan=True):
                    return False
            elif not torch.equal(part, wanted):
                return False
        return True

    def _tried(self, attempt: Callable[[], Any]) -> Any:
        watch = _Watch(self.call.target, self.device)
        try:
            with watch:
                made = attempt()
        except Exception as error:  # whatever the op raises about inputs that it does not take
            self.complaint = first_lines(error, 300)
            made = None
        if watch.seen:
            raise Unfit(watch.seen)
        return made

    def _tensors(self, inputs: Inputs) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(sum(map(math.prod, inputs.shapes)) + inputs.limit)
        return [
            self._tensor(shape, operand.dtype, inputs, generator).to(self.device)
            for operand, shape in zip(self.call.operands, inputs.shapes, strict=True)
        ]

    def _tensor(self, shape: Shape, dtype: torch.dtype, inputs: Inputs, generator: torch.Generator) -> torch.Tensor:
        if dtype is torch.bool:
            return torch.rand(shape, generator=generator) < 0.75
        if not _is_inexact(dtype):
            return torch.randint(0, inputs.limit, shape, generator=generator, dtype=dtype)
        kind = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(shape, generator=generator, dtype=kind)
        if self.positive:
            values = values.abs() + 0.5
        if inputs.outliers:
            values = torch.where(torch.rand(shape, generator=generator) < 0.125, 8 * values, values)
        return values.to(inputs.dtype if inputs.dtype is not None and dtype == self.dtype else dtype)

    def _arguments(self, tensors: list[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        return pytree.tree_map_only(
            Operand, lambda operand: tensors[operand.index], (self.call.args, dict(self.call.kwargs))
        )


class _Watch(TorchDispatchMode):
    """Looks at every op that the tried one runs, before it runs."""

    supports_higher_order_operators = True

    def __init__(self, target: Any, device: str) -> None:
        super().__init__()
        self.target, self.seen = target, ""
        self.kernels = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is self.target:
            with self:  # its own kernel, and what that calls comes here again
                return func.redispatch(self.kernels, *args, **kwargs)
        if func.namespace in _COMMUNICATES:
            self.seen = "it communicates"
        elif has_effects(func):
            self.seen = "it has side effects"
        if self.seen:
            raise Unfit(self.seen)
        return func(*args, **kwargs)


@contextmanager
def apart(device: str) -> Iterator[None]:
    """Away from the caller's modes, with every random state as it was afterwards."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gradients = torch.is_grad_enabled()
    try:
        with (
            _disable_current_modes(),
            torch.device(device),
            torch.autocast(device, enabled=False),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
        ):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state_all(on_device)


def _random_states() -> list[torch.Tensor]:
    state: Any = numpy.random.get_state()  # a tuple
    numbers = [
        torch.tensor([hash(random.getstate())]),
        torch.tensor([hash(state[1].tobytes()), *state[2:4]]),
    ]
    return [*numbers, torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
        if _is_inexact(a.dtype)
        else torch.equal(a, b)
        for a, b in zip(these, those)
    )


def _leaves(results: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
