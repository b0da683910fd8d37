"""Seconds of one op on one device: the kernels that it launches, forward and backward, each by the roofline.

An op runs on fake tensors, and its gradient with it, while a mode below autograd writes down every kernel: so a linear's
two products, a norm's backward, the copy in a reshape and the sums of gradients are all there, in the order and number
in which they would run. FLOPs are those of `torch.utils.flop_counter`, which says nothing of attention on a CPU; the same
formulas count it here: 4 s t d forward, 10 s t d backward (the scores once more, and four products), masks not considered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .hardware import Hardware, Kernel

aten = torch.ops.aten


@dataclass(frozen=True)
class Launch:
    """One kernel. `kind`: matmul, convolution, attention, attention_backward, pointwise, reduction, copy, memory (what is
    none of these), or view (nothing but a new description of a tensor)."""

    op: str  # "addmm", "my_library::op"
    kind: str
    flops: int
    nbytes: int  # read and written
    dtype: str

    def seconds(self, hardware: Hardware, shards: int = 1) -> float:
        """With the work shared out over `shards` devices; overheads are not."""
        return hardware.host + self.kernel(hardware).seconds(self.flops, self.nbytes, self.dtype, shards)

    def kernel(self, hardware: Hardware) -> Kernel:
        return hardware.kernel(self.op, self.kind, self.dtype)


class RecordLaunches(TorchDispatchMode):
    """Writes down the kernels that run inside, gradients' too: `with RecordLaunches() as record: ...; record.launches`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace not in _SILENT:
            self.launches.append(launch(func, args, kwargs, result))
        return result


def launch(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> Launch:
    """What one call of an op below autograd does."""
    packet, name = func.overloadpacket, func._schema.name.removeprefix("aten::")
    read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    written = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    kind = _kind(func, name)
    flops = _FLOPS[packet](*args, **kwargs, out_val=result) if packet in _FLOPS else 0
    if kind == "view":
        nbytes = 0
    elif packet in _PICKS:  # reads as much as it gives, and what says where
        nbytes = sum(map(_nbytes, (*written, *written, *read[1:])))
    else:
        if packet in _OVERWRITES:
            read = read[1:]
        elif name.startswith("new_") or name.endswith("_like"):
            read = []
        nbytes = sum(map(_nbytes, (*read, *written)))
    floating = [x.dtype for x in (*read, *written) if x.dtype.is_floating_point or x.dtype.is_complex]
    dtype = (floating or [x.dtype for x in (*read, *written)] or [torch.float32])[0]
    return Launch(name, kind, int(flops), nbytes, str(dtype).removeprefix("torch."))


def op_launches(target: Any, args: tuple, kwargs: Mapping[str, Any], training: bool) -> tuple[tuple[Launch, ...], ...]:
    """Kernels of one call on fake tensors: (forward, backward). In training, gradients come for the operands that require
    them; equal calls are looked at once."""
    return call_of(_launches, target, args, kwargs, training)


def call_seconds(
    target: Any, args: tuple, kwargs: Mapping[str, Any], hardware: Hardware, *, training: bool, shards: int = 1
) -> tuple[float, float]:
    """Seconds of one call on fake tensors, forward and backward, its work shared out over `shards` devices."""
    forward, backward = op_launches(target, args, kwargs, training)
    there, back = (sum(one.seconds(hardware, shards) for one in way) for way in (forward, backward))
    return there, back


@dataclass(eq=False)
class Call:
    """One call of an op on fake tensors; equal to calls whose tensors look the same."""

    target: Any
    args: tuple
    kwargs: Mapping[str, Any]
    key: tuple

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self.key == other.key

    def with_leaves(self, training: bool) -> tuple[tuple, dict[str, Any], list[Tensor]]:
        """The arguments with new tensors like the operands, and these: on `meta` if the op does the same on every device, which
        is several times as fast as fake ones."""
        leaf = _meta_leaf if is_anywhere(self.target) else _leaf
        leaves, spec = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        leaves = [leaf(x, training) if isinstance(x, Tensor) else x for x in leaves]
        return *pytree.tree_unflatten(leaves, spec), [x for x in leaves if isinstance(x, Tensor)]


def call_of(function: Any, target: Any, args: tuple, kwargs: Mapping[str, Any], training: bool) -> Any:
    """What a `function` that is cached `by_call` says of a call."""
    key = (target, _describe(tuple(args)), tuple((name, _describe(value)) for name, value in kwargs.items()), training)
    call = Call(target, args, dict(kwargs), key)
    try:
        return function(call, training)
    except TypeError:  # an argument that cannot be hashed
        return function.__wrapped__(call, training)
    finally:
        call.args, call.kwargs = (), {}  # the cache keeps the call, which would keep a whole graph through its tensors


def by_call(function: Callable[[Call, bool], Any]) -> Any:
    """Decorates a function for `call_of`. It is asked once about equal calls, and inside whatever a call makes is fake: what is
    made of no tensor, however large, and what an op makes by itself (a mask in numbers)."""

    @lru_cache(maxsize=4096)
    def cached(call: Call, training: bool) -> Any:
        if is_anywhere(call.target):
            return function(call, training)
        modes = [x.fake_mode for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, FakeTensor)]
        with modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True):
            return function(call, training)

    return cached


@by_call
def _launches(call: Call, training: bool) -> tuple[tuple[Launch, ...], ...]:
    args, kwargs, leaves = call.with_leaves(training)
    with torch.set_grad_enabled(training), RecordLaunches() as forward:
        result = call.target(*args, **kwargs)
    wanted = [x for x in leaves if x.requires_grad]
    made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if not training or not wanted or not made:
        return tuple(forward.launches), ()
    gradients = [torch.empty_like(x) for x in made]
    with RecordLaunches() as backward:
        torch.autograd.grad(made, wanted, gradients, allow_unused=True)
    return tuple(forward.launches), tuple(backward.launches)


def _leaf(x: Tensor, training: bool) -> Tensor:
    """A tensor like an operand, that a gradient comes to where the operand requires one."""
    return x.detach().requires_grad_(training and x.requires_grad)


def _meta_leaf(x: Tensor, training: bool) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return made.requires_grad_(training and x.requires_grad)


def is_anywhere(target: Any) -> bool:
    """Whether an op runs, and saves, the same ops below autograd on every device."""
    return target in _ANYWHERE or (getattr(target, "namespace", "") == "aten" and torch.Tag.pointwise in target.tags)


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, (list, tuple)):
        return (isinstance(leaf, list), *map(_describe, leaf))
    if isinstance(leaf, Tensor):
        return (Tensor, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
    return (type(leaf), leaf)


def _nbytes(x: Tensor) -> int:
    """Bytes in memory: an expanded dim is there once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride or not size else 1
    return elements * x.element_size()


def _kind(func: Any, name: str) -> str:
    packet = func.overloadpacket
    if packet in _FLOPS:
        kind = "attention" if "attention" in name else "convolution" if "conv" in name else "matmul"
        return kind + "_backward" * (kind == "attention" and "backward" in name)
    if func.is_view or packet in _NOTHING:
        return "view"
    if packet in _COPIES:
        return "copy"
    for tag, kind in ((torch.Tag.pointwise, "pointwise"), (torch.Tag.reduction, "reduction")):
        if tag in func.tags:
            return kind
    return "memory"


_FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
# Beside those that work on each element. Not so attention, convolutions, recurrences, dropouts, and norms, whose statistics
# have a dtype that depends on the device.
_ANYWHERE = {
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default),
    *(aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.cat.default),
    *(aten.stack.default, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.contiguous.default),
    *(aten.softmax.int, aten.sum.dim_IntList, aten.mean.dim),
}
# Collectives are counted by their bytes; prim asks about tensors.
_SILENT = ("_c10d_functional", "c10d", "prim", "profiler")
_NOTHING = {
    getattr(aten, name)
    for name in "_unsafe_view detach alias empty empty_like empty_strided new_empty new_empty_strided lift_fresh".split()
}
_COPIES = {
    getattr(aten, name)
    for name in "clone copy_ _to_copy cat stack constant_pad_nd repeat slice_backward select_backward contiguous".split()
}
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
_PICKS = {aten.embedding, aten.index, aten.index_select, aten.gather}
