"""Bytes on one device: what an op takes beside its operands and results, and what a primitive takes beside its ends.

An op runs on fake tensors, and its gradient with it, while a mode below autograd follows every storage that is alive. So the
halves of a composite op, the copy in a reshape and the way gradients share storages are measured, not guessed. What a kernel
takes inside and gives back at once (a product's workspace) is not seen; PyTorch's kernels take little.

A primitive packs what it sends, receives, and unpacks (see `dsp_auto.primitives`). Beside its ends, of M bytes whole and m on a
device, it takes at the worst moment, where a dim that leads needs no packing or unpacking:

    primitive             forward                          backward
    switch                m                                m
    hierarchical_switch   3m                               3m
    split                 0                                gather's
    gather                M to unpack                      reduce_scatter's, or 0
      uneven              the larger of that and n m to send
    reduce                0                                0
    reduce_scatter        M to pack                        gather's
      uneven              and (n-1) m of n terms; n m if that is more
      not contiguous      M to pack, wherever the dim is
    replicate             0                                M to sum
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .compute import Call, by_call, call_of


class LiveStorages(TorchDispatchMode):
    """Follows the storages that are made inside: `live` bytes now, `peak` since `mark`."""

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.live = self.peak = self.long = 0
        self._seen: set[int] = set()
        for x in pytree.tree_leaves(known):
            if isinstance(x, Tensor):
                self._seen.add(x.untyped_storage()._cdata)

    def mark(self) -> int:
        """Starts a new peak; returns what is alive."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # which only a fake one copies
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.long += self._note(x.untyped_storage()) * takes_long(func)
        return result

    def _note(self, storage: torch.UntypedStorage) -> int:
        """Bytes of the storage, 0 if it is known."""
        key = storage._cdata
        if key in self._seen:
            return 0
        self._seen.add(key)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        finalize(storage, self._free, key, nbytes)
        return nbytes

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


def takes_long(op: Any) -> bool:
    """Whether an op below autograd is a product, a convolution, attention, or a collective."""
    if op.namespace == "_c10d_functional":
        return op is not torch.ops._c10d_functional.wait_tensor.default
    return op.overloadpacket in _LONG or str(op) == "dsp.simulated.default"


# Of attention on a CPU the flop counter says nothing.
_LONG = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


@dataclass(frozen=True)
class Footprint:
    """Memory of one call.

    extra, backward_extra: bytes at the worst moment beside operands, results, what is saved, and gradients.
    aliases: for each result the operand whose storage it is a view of, None where it has one of its own.
    gradients: for each operand None where no gradient comes or it takes no memory, "own", or the number of the result whose
    gradient it is.
    internal: bytes that autograd saves of the call's own making. saved: the operands that it saves. long: bytes that ops make
    which take long (see `takes_long`).
    """

    extra: int = 0
    backward_extra: int = 0
    aliases: tuple[int | None, ...] = ()
    gradients: tuple[str | int | None, ...] = ()
    internal: int = 0
    saved: frozenset[int] = frozenset()
    long: int = 0


def op_footprint(target: Any, args: tuple, kwargs: Mapping[str, Any], training: bool) -> Footprint:
    """Of one call on fake tensors; equal calls are looked at once."""
    return call_of(_footprint, target, args, kwargs, training)


@by_call
def _footprint(call: Call, training: bool) -> Footprint:
    args, kwargs, operands = call.with_leaves(training)
    return run_footprint(lambda: call.target(*args, **kwargs), operands, training)


def run_footprint(run: Callable[[], Any], operands: Sequence[Tensor], training: bool) -> Footprint:
    """Of whatever `run` does with its operands, fake tensors that no other op has made."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x.detach()  # an op that saves its own result would keep itself alive

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with LiveStorages(operands) as storages, torch.set_grad_enabled(training), hooks:
        tensors = [x for x in pytree.tree_leaves(run()) if isinstance(x, Tensor)]
    extra, long = storages.peak - storages.live, storages.long
    owners = {_address(x): n for n, x in reversed(list(enumerate(operands)))}
    saved = {_address(x): x.untyped_storage().nbytes() for x in kept}
    kept.clear()
    own = saved.keys() - owners.keys() - {_address(x) for x in tensors}
    found = Footprint(
        extra,
        0,
        tuple(owners.get(_address(x)) for x in tensors),
        (None,) * len(operands),
        sum(saved[address] for address in own),
        frozenset(owners[address] for address in saved.keys() & owners.keys()),
        long,
    )
    graded = [n for n, x in enumerate(tensors) if x.requires_grad]
    wanted = [n for n, x in enumerate(operands) if x.requires_grad]
    if not training or not graded or not wanted:
        return found
    with storages:
        given = [torch.empty_like(tensors[n]) for n in graded]
        before = storages.mark()
        grads = torch.autograd.grad(
            [tensors[n] for n in graded], [operands[n] for n in wanted], given, allow_unused=True
        )
    made = {_address(x): x.untyped_storage().nbytes() for x in grads if x is not None}
    incoming = {_address(x): n for x, n in zip(given, graded, strict=True)}
    gradients: list[str | int | None] = [None] * len(operands)
    for n, x in zip(wanted, grads, strict=True):
        if x is not None:
            small = made[_address(x)] < x.numel() * x.element_size() / 2  # expanded
            gradients[n] = None if small else incoming.get(_address(x), "own")
    new = sum(nbytes for address, nbytes in made.items() if address not in incoming)
    return replace(found, backward_extra=max(storages.peak - before - new, 0), gradients=tuple(gradients))


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def primitive_buffers(
    primitive: str,
    whole: int,
    part: int,
    *,
    ranks: int,
    leads: bool,
    even: bool,
    partial_grad: bool,
    contiguous: bool = True,
) -> tuple[int, int]:
    """Bytes that a primitive takes beside its ends, forward and backward.

    whole, part: bytes of its larger and of its smaller end. leads: the dim that is gathered or scattered comes first.
    even: all ranks' parts are equal. partial_grad: the replicated side's gradient is Partial. contiguous: what is scattered
    lies in the order of its dims.
    """
    packed = 0 if leads else whole
    # Uneven shards travel by an all-to-all: of my part to each rank, or of every rank's term of mine.
    sent = 0 if even else ranks * part

    def scatter(packed: int) -> int:
        # While terms are on their way there is no sum of them yet, and when there is, nothing is packed any more.
        return packed if even else max(packed + sent - part, sent)

    gather = max(packed, sent)
    return {
        "switch": (part, part),
        "hierarchical_switch": (3 * part, 3 * part),
        "split": (0, 0 if partial_grad else gather),
        "gather": (gather, scatter(packed) if partial_grad else 0),
        "reduce": (0, 0),
        "reduce_scatter": (scatter(packed if contiguous else whole), gather),
        "replicate": (0, whole),
    }[primitive]
