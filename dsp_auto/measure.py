"""Count the collectives a program really issues, and the bytes they put on the wire."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsp_auto.c10d import group_called

# .label: what the dsp primitive running in this thread is about to communicate; .counters: those active in this thread
_here = threading.local()
_counters = 0


def counting() -> bool:
    """True while some `CountCollectives` is active; primitives label their collectives only then."""
    return _counters > 0


def count(func: Any, args: tuple) -> None:
    """Tells the counters of this thread about a collective that the dispatcher does not see: a simulated one."""
    for counter in getattr(_here, "counters", ()):
        counter._count(func, args, {})


class label:
    """Says which primitive issues the collectives inside: `("switch", "forward")`, its ranks and its rank."""

    def __init__(self, primitive: str, direction: str, ranks: int, rank: int):
        self.value = (primitive, direction, ranks, rank)

    def __enter__(self) -> None:
        _here.label = self.value

    def __exit__(self, *_: object) -> None:
        _here.label = None


class CountCollectives(TorchDispatchMode):
    """Counts collectives and the bytes this rank sends to other ranks, forward and backward alike.

        with CountCollectives() as c:
            f(x).sum().backward()
        c.counts["all_to_all_single"], c.bytes["all_to_all_single"], c.by_primitive["switch", "backward"]

    Bytes are wire bytes of this rank, as the best (ring) algorithm sends them, with m the local input in
    bytes and N the ranks (design section 3; the paper's Table 8 leaves out the factor (N-1)/N):

        all_to_all_single          m less the block that stays at home
        all_gather_into_tensor     m (N-1)
        reduce_scatter_tensor      m (N-1)/N
        all_reduce                 2 m (N-1)/N
        broadcast                  m (N-1)/N: what a ring sends, averaged over its ranks
        send                       m

    Both functional collectives and plain `torch.distributed` calls are seen. On fake tensors without a
    process group only the collectives of dsp primitives can be counted, because only they carry their ranks.
    Raises `RuntimeError` on a collective it has no formula for: a wrong total would be worse than none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, float] = defaultdict(float)
        self.by_primitive: dict[tuple[str, str], tuple[int, float]] = {}

    @property
    def total_bytes(self) -> float:
        """Wire bytes this rank sent, over all collectives."""
        return sum(self.bytes.values())

    def __enter__(self) -> CountCollectives:
        global _counters
        _counters += 1
        _here.counters = (*getattr(_here, "counters", ()), self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        global _counters
        _counters -= 1
        _here.counters = _here.counters[:-1]
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("_c10d_functional", "c10d"):
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: tuple, kwargs: dict) -> None:
        name = func._schema.name.split("::")[1]
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise RuntimeError(f"CountCollectives has no byte count for {func}")
        known, sent = _COLLECTIVES[name]
        given = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
        issued_by = getattr(_here, "label", None)
        ranks, rank = issued_by[2:] if issued_by else _ranks_of(given)
        wire = sent(given, ranks, rank)
        self.counts[known] += 1
        self.bytes[known] += wire
        if issued_by:
            count, total = self.by_primitive.get(issued_by[:2], (0, 0))
            self.by_primitive[issued_by[:2]] = (count + 1, total + wire)


def _ranks_of(given: dict[str, Any]) -> tuple[int, int]:
    if "group_name" in given:
        group = group_called(given["group_name"])
    else:
        group = torch.distributed.ProcessGroup.unbox(given["process_group"])
    return group.size(), group.rank()


def _nbytes(given: dict[str, Any]) -> int:
    """Bytes this rank hands to the collective."""
    tensors = next(given[name] for name in _INPUTS if name in given)
    return sum(t.numel() * t.element_size() for t in tree_iter(tensors))


def _to_others(given: dict[str, Any], ranks: int, rank: int) -> float:
    splits = given.get("input_split_sizes")
    if not splits:  # even
        return _nbytes(given) * (ranks - 1) / ranks
    rows = sum(splits)
    return _nbytes(given) * (rows - splits[rank]) / rows if rows else 0


def _lists_to_others(given: dict[str, Any], ranks: int, rank: int) -> float:
    blocks = given["input_tensors"]
    return sum(b.numel() * b.element_size() for r, b in enumerate(blocks) if r != rank)


def _to_every_other(given: dict[str, Any], ranks: int, rank: int) -> float:
    return _nbytes(given) * (ranks - 1)


def _ring_once(given: dict[str, Any], ranks: int, rank: int) -> float:
    return _nbytes(given) * (ranks - 1) / ranks


def _ring_twice(given: dict[str, Any], ranks: int, rank: int) -> float:
    return 2 * _nbytes(given) * (ranks - 1) / ranks


def _to_one(given: dict[str, Any], ranks: int, rank: int) -> float:
    return _nbytes(given)


_INPUTS = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")
_SILENT = set("wait_tensor barrier monitored_barrier_ check_for_nan recv_ irecv recv_any_source_".split())
_KINDS: dict[str, tuple[Callable[[dict[str, Any], int, int], float], str]] = {  # counted as: bytes, ops
    "all_to_all_single": (_to_others, "all_to_all_single alltoall_base_"),
    "all_to_all": (_lists_to_others, "alltoall_"),
    "all_gather_into_tensor": (
        _to_every_other,
        "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced "
        "_allgather_base_ allgather_into_tensor_coalesced_",
    ),
    "all_gather": (_to_every_other, "allgather_ allgather_coalesced_"),
    "reduce_scatter_tensor": (
        _ring_once,
        "reduce_scatter_tensor reduce_scatter_tensor_out reduce_scatter_tensor_coalesced "
        "_reduce_scatter_base_ reduce_scatter_tensor_coalesced_",
    ),
    "all_reduce": (
        _ring_twice,
        "all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_ allreduce_ allreduce_coalesced_",
    ),
    "broadcast": (_ring_once, "broadcast broadcast_"),
    "send": (_to_one, "send isend"),
}
_COLLECTIVES = {op: (kind, sent) for kind, (sent, ops) in _KINDS.items() for op in ops.split()}
