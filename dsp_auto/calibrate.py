"""`dsp-auto calibrate`: what this computer's kernels and this mesh's collectives take, measured and fitted to a `Hardware`.

Every rank measures at the same time, so what ranks share (cores, memory, cables) is part of the numbers. Kernels are those
that sample layers launch, forward and backward: they are recorded below autograd, and each is run again by itself, its
results kept alive for a while as a model keeps them, in blocks of 20 ms, longer than a core's turns among processes.
Collectives run over each mesh dim in growing sizes, and last as long as on their slowest rank. All of it is done several
times over, and the median counts. Then, by least squares of the relative error, with nothing below zero,

    seconds of a kernel      = overhead + FLOPs / rate + bytes / bandwidth, or the larger of these two, whichever fits better
    seconds of a collective  = steps alpha + wire bytes / beta

for each op that was measured in enough sizes, and for each kind of op, by dtype. At last two loops: of small layers, for
what the host adds to each kernel; and of kernels and a collective in turns, for what ranks wait for each other where they
meet. Rank 0 decides; all ranks return the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from .cost_models.compute import Launch, RecordLaunches, launch
from .cost_models.hardware import KINDS, RINGS, Hardware, Kernel, Link, Rate
from .errors import DspError, MeshError
from .mesh import Mesh, as_mesh
from .spawn import spawn
from .units import counted

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

BLOCK_SECONDS, SWEEPS = 0.02, 5
COLLECTIVE_BYTES = tuple(2**n for n in range(10, 25, 2))  # that one rank hands in
HELD_BYTES = 2**27  # that a model's activations may take while a kernel runs, on a CPU more than its caches hold
ENOUGH = 4  # sizes of an op that has an entry of its own


@dataclass(frozen=True)
class Fit:
    """How far a formula is from what it was fitted to: relative errors, median and worst, of so many measurements."""

    name: str
    samples: int
    median: float
    worst: float


@dataclass(frozen=True)
class Calibration:
    """The profile, and how well its formulas fit what was measured."""

    hardware: Hardware
    fits: tuple[Fit, ...]

    def __str__(self) -> str:
        rows = [(fit.name, fit.samples, f"{fit.median:.0%}", f"{fit.worst:.0%}") for fit in self.fits]
        return tabulate(rows, ("fit of", "measurements", "median error", "worst"), colalign=("left", *["right"] * 3))


def calibrate(mesh: DeviceMesh, *, quick: bool = False, name: str = "calibrated") -> Calibration:
    """Measure the devices and links of `mesh`; to be called on all its ranks, at a time when nothing else runs there.

    quick: fewer sizes and shorter blocks, for a try. name: of the profile.

    Raises MeshError where the mesh is not all processes there are.
    """
    shape = as_mesh(mesh)
    if not dist.is_initialized() or dist.get_world_size() != shape.ranks:
        found = counted(dist.get_world_size(), "process") if dist.is_initialized() else "no process group"
        raise MeshError(
            asked=f"calibrate the mesh {shape}",
            found=found,
            remedy=f"run it under torchrun with {counted(shape.ranks, 'process')}, or pass the mesh of all of them",
        )
    clock = _Clock(mesh.device_type, BLOCK_SECONDS / (2 if quick else 1))
    kernel_seconds: dict[Launch, list[float]] = {}
    link_seconds: dict[tuple[str, str, int], list[Timed]] = {}
    with torch.no_grad():
        for _ in range(SWEEPS // 2 if quick else SWEEPS):
            for launched, seconds in _measure_kernels(mesh.device_type, clock, quick):
                kernel_seconds.setdefault(launched, []).append(seconds)
            for key, timed in _measure_collectives(mesh, shape, clock, quick):
                link_seconds.setdefault(key, []).append(timed)
    kernels, fits = _fit_kernels([Sample(one, statistics.median(all_of)) for one, all_of in kernel_seconds.items()])
    links, link_fits = _fit_links(link_seconds)
    # On one rank nothing leaves the memory.
    copied = kernels["copy"].memory
    inside = Link(math.inf if copied is None else copied.achieved / 2, 0.0)
    slowest = min(links.values(), key=lambda link: link.bandwidth, default=inside)
    hardware = Hardware(name, slowest, None, shape.ranks, kernels, links)
    hardware = replace(hardware, host=_measure_host(mesh.device_type, hardware, clock))
    hardware = replace(hardware, lockstep=_measure_lockstep(mesh, shape, clock))
    fits += link_fits
    measured = {
        "mesh": dict(zip(shape.names, shape.sizes, strict=True)),
        "device": mesh.device_type,
        "backend": dist.get_backend(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fits": {fit.name: {"samples": fit.samples, "median": fit.median, "worst": fit.worst} for fit in fits},
    }
    found = [Calibration(replace(hardware, measured=measured), tuple(fits))]
    dist.broadcast_object_list(found, src=0)
    return found[0]


class _Clock:
    """Seconds of a call, on all ranks at the same time."""

    def __init__(self, device: str, block: float) -> None:
        self.device, self.block = device, block

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds per call of a block of calls on this rank; the ranks make the same number of them."""
        call()
        once = max(self._seconds(call, 1), 1e-7)
        count = math.ceil(self.block / self.agree(once, dist.ReduceOp.MAX))
        return self._seconds(call, count)

    def agree(self, value: float, how: Any) -> float:
        """The ranks' values put together, when all have come."""
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(told, how)
        return told.item()

    def mean(self, value: float) -> float:
        return self.agree(value, dist.ReduceOp.SUM) / dist.get_world_size()

    def _seconds(self, call: Callable[[], Any], count: int) -> float:
        self._finish()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._finish()
        return (time.perf_counter() - start) / count

    def _finish(self) -> None:
        if self.device != "cpu":
            torch.get_device_module(self.device).synchronize()


# Kernels.


@dataclass(frozen=True)
class Sample:
    """A kernel and the seconds it took."""

    launch: Launch
    seconds: float


class _Calls(TorchDispatchMode):
    """The calls below autograd, with their arguments; one of each kind of launch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Launch, tuple[Any, tuple, dict]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "aten":
            self.found.setdefault(launch(func, args, kwargs, result), (func, args, kwargs))
        return result


def _measure_kernels(device: str, clock: _Clock, quick: bool) -> Iterator[tuple[Launch, float]]:
    seen: set[Launch] = set()
    for layer, *tensors in _layers(device, quick):
        with _Calls() as calls, torch.enable_grad():
            result = layer(*tensors)
            result.backward(torch.ones_like(result))
        for one, (func, args, kwargs) in calls.found.items():
            if one not in seen:
                seen.add(one)
                # Ranks that share a core get it in turn: the mean of them is what one gets.
                yield one, clock.mean(clock(_holding(partial(func, *args, **kwargs), one.nbytes)))


def _holding(call: Callable[[], Any], nbytes: int) -> Callable[[], None]:
    """`call`, its results alive for a while, as a model's are until its backward: so each gets memory that the system has
    to clear and map, and that no cache holds."""
    held: list[Any] = []
    most = HELD_BYTES // max(nbytes, 2**10)

    def run() -> None:
        held.append(call())
        if len(held) > most:
            held.clear()

    return run


def _layers(device: str, quick: bool) -> Iterator[tuple[Callable[..., Tensor], *tuple[Tensor, ...]]]:
    """Sample layers in several sizes: a function, and the tensors that it takes."""

    def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]

    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16, torch.float64]
    rows = [64, 512, 2048] if quick else [64, 512, 2048, 8192]
    if device != "cpu":  # where a core is full, a GPU is not
        for dtype in dtypes[:2]:
            yield aten.linear, *leaves((8192, 4096), (4096, 4096), (4096,), dtype=dtype)
            yield aten.scaled_dot_product_attention, *leaves(*[(2, 16, 4096, 128)] * 3, dtype=dtype)
            yield torch.add, *leaves((8192, 8192), (8192, 8192), dtype=dtype)
            yield aten.clone, *leaves((8192, 8192), dtype=dtype)
    widths = [(64, 192), (64, 256), (256, 64)] + [(256, 768), (256, 1024), (1024, 256), (768, 768)] * (not quick)
    for dtype, n, (k, m) in itertools.product(dtypes, rows, widths):
        if dtype == torch.float32 or n in (512, 2048):
            yield aten.linear, *leaves((n, k), (m, k), (m,), dtype=dtype)
    attentions = [(8, 4, 16, 16), (64, 4, 16, 16), (16, 4, 128, 16), (4, 8, 256, 32)]
    if not quick:
        attentions += [(256, 8, 16, 32), (16, 8, 256, 32), (2, 8, 1024, 64), (128, 4, 32, 16), (64, 4, 64, 64), (128, 8, 8, 32)]
    for dtype, shape in itertools.product(dtypes[:2], attentions):
        if dtype == torch.float32 or shape[0] <= 64:
            yield aten.scaled_dot_product_attention, *leaves(shape, shape, shape, dtype=dtype)
    for b, h, s, d in attentions[:6]:
        yield torch.matmul, *leaves((b, h, s, d), (b, h, d, s))
    for c, size in ((8, 16), (16, 32), (32, 32), (64, 16))[: 2 if quick else 4]:
        yield lambda *given: aten.conv2d(*given, padding=[1, 1]), *leaves((2, c, size, size), (c, c, 3, 3), (c,))
    for n, c in [(64, 64), (512, 64), (2048, 256), (2048, 1024)] + [(4096, 64), (8192, 256)] * (not quick):
        for op in (aten.gelu, aten.silu, aten.relu, aten.sigmoid, aten.exp):
            yield op, *leaves((n, c))
        yield lambda x: aten.softmax(x, -1), *leaves((n, c))
        yield lambda x: x.sum(0), *leaves((n, c))
        yield lambda x: x.mean(-1), *leaves((n, c))
        yield torch.add, *leaves((n, c), (n, c))
        yield torch.mul, *leaves((n, c), (n, c))
        yield torch.mul, *leaves((n, c), (c,))
        yield lambda x, w, b: aten.layer_norm(x, w.shape, w, b), *leaves((n, c), (c,), (c,))
        # What moves: heads to the front, the order of dims that a switch packs, parts put together.
        yield lambda x: _dense(x.unflatten(1, (4, -1)).unflatten(0, (8, -1)).transpose(1, 2)), *leaves((n, c))
        yield lambda x: _dense(x.unflatten(0, (8, -1)).transpose(0, 1)), *leaves((n, c))
        yield lambda x: torch.stack(x.unbind(0), 1), *leaves((3, n, c))
        yield lambda x, y: torch.cat([x, y], 1), *leaves((n, c), (n, c))
        yield aten.clone, *leaves((n, c))


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _fit_kernels(samples: Sequence[Sample]) -> tuple[dict[str, Kernel], list[Fit]]:
    """An entry for each kind, for each op that was measured in enough sizes, and for what is neither; those of other dtypes
    than float32 by name and dtype."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        one = sample.launch
        names = [one.kind] if one.kind == "view" else [one.kind, one.op] + ["memory"] * (not one.flops)
        suffix = "" if one.dtype == "float32" or one.kind == "view" else f"@{one.dtype}"
        for name in dict.fromkeys(names):
            groups.setdefault(name + suffix, []).append(sample)
    kernels, fits = {}, []
    for name, members in groups.items():
        if len({sample.launch.nbytes for sample in members}) >= ENOUGH or name == "view":
            kernels[name] = kernel = fit_kernel(members)
            pairs = [(kernel.seconds(s.launch.flops, s.launch.nbytes, s.launch.dtype), s.seconds) for s in members]
            fits.append(_fit_of(name, pairs))
    return kernels, fits


def fit_kernel(samples: Sequence[Sample]) -> Kernel:
    """The Kernel with the least squares of relative errors, of samples in one dtype.

    First as if arithmetic and traffic added up, and then in turn which of them is the larger one for each sample, and the
    rates that follow.
    """
    dtype = samples[0].launch.dtype
    seconds = np.array([s.seconds for s in samples])
    arithmetic = np.array([float(s.launch.flops) for s in samples])
    traffic = np.array([float(s.launch.nbytes) for s in samples])
    best, least = Kernel(), math.inf
    by_traffic = by_arithmetic = np.full(len(samples), True)
    for turn in range(10):
        columns = np.stack([np.ones_like(seconds), traffic * by_traffic, arithmetic * by_arithmetic], 1)
        overhead, memory, rate = non_negative(columns, seconds)
        kernel = Kernel(
            overhead,
            Rate(1 / memory) if memory else None,
            {dtype: Rate(1 / rate)} if rate else {},
            adds=turn == 0 and bool(memory and rate),
        )
        error = sum((kernel.seconds(s.launch.flops, s.launch.nbytes, dtype) / s.seconds - 1) ** 2 for s in samples)
        if error < least:
            best, least = kernel, error
        by_arithmetic = arithmetic * rate > traffic * memory
        by_traffic = ~by_arithmetic
    return best


def non_negative(columns: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Coefficients >= 0 of `columns` [samples, terms] that are closest to `seconds` [samples], by relative error.

    Exact, by trying which terms are zero: there are few.
    """
    scaled = columns / seconds[:, None]
    size = np.abs(scaled).max(0)
    size[size == 0] = 1.0
    scaled, terms = scaled / size, columns.shape[1]
    best, least = np.zeros(terms), float(len(seconds))
    for chosen in itertools.product((False, True), repeat=terms):
        if not any(chosen):
            continue
        found, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)
        error = float(((scaled[:, chosen] @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(terms), error
            best[list(chosen)] = found
    return (best / size).tolist()


def _fit_of(name: str, pairs: Sequence[tuple[float, float]]) -> Fit:
    errors = [abs(fitted / measured - 1) for fitted, measured in pairs]
    return Fit(name, len(pairs), statistics.median(errors), max(errors))


def _measure_host(device: str, hardware: Hardware, clock: _Clock) -> float:
    """Seconds for each op beside its kernel: what a step of small layers takes longer than its kernels do. Zero on devices
    that the host runs ahead of."""
    if device != "cpu":
        return 0.0
    x, w, b = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(8)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def step() -> None:
        with torch.enable_grad():
            y = x
            for _ in range(8):
                y = aten.linear.default(aten.layer_norm.default(y, [8], b, b), w, b)
                y = aten.add.Tensor(aten.gelu.default(y), aten.transpose.int(y, 0, 1).transpose(0, 1).reshape(2, 4, 8))
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    with RecordLaunches() as record:
        step()
    took = min(clock.mean(clock(step)) for _ in range(SWEEPS))
    kernels = sum(one.seconds(hardware) for one in record.launches)
    return max(took - kernels, 0.0) / len(record.launches)


def _measure_lockstep(mesh: DeviceMesh, shape: Mesh, clock: _Clock) -> float:
    """How much longer kernels take where all ranks meet at a collective every few milliseconds, compared with kernels and
    collectives by themselves."""
    if shape.ranks == 1:
        return 1.0
    x, w = torch.randn(512, 512, device=mesh.device_type), torch.randn(512, 512, device=mesh.device_type)
    m = max(range(len(shape.sizes)), key=lambda m: shape.sizes[m])
    group = mesh.get_group(m)
    meet, _ = _collective("all_to_all", 2**17, shape.sizes[m], dist.get_rank(group), group.group_name, mesh.device_type)

    def compute() -> None:
        for _ in range(4):
            torch.relu(x @ w)

    def both() -> None:
        compute()
        meet()

    factors = []
    for _ in range(SWEEPS):
        alone, meeting = clock.mean(clock(compute)), clock.agree(clock(meet), dist.ReduceOp.MAX)
        factors.append((clock.agree(clock(both), dist.ReduceOp.MAX) - meeting) / alone)
    return max(statistics.median(factors), 0.1)


# Collectives.


@dataclass(frozen=True)
class Timed:
    """A collective: the steps that it takes, what a rank sends, and the seconds on the slowest rank."""

    steps: int
    wire_bytes: float
    seconds: float


def _measure_collectives(
    mesh: DeviceMesh, shape: Mesh, clock: _Clock, quick: bool
) -> Iterator[tuple[tuple[str, str, int], Timed]]:
    """By mesh dim, kind and size. The lines of a dim communicate at the same time."""
    for m, (name, ranks) in enumerate(zip(shape.names, shape.sizes, strict=True)):
        if ranks == 1:
            continue
        group = mesh.get_group(m)
        for kind, nbytes in itertools.product(KINDS, COLLECTIVE_BYTES[:: 2 if quick else 1]):
            call, wire = _collective(kind, nbytes, ranks, dist.get_rank(group), group.group_name, mesh.device_type)
            steps = 1 if kind == "send" else RINGS.get(kind, 1) * (ranks - 1)
            yield (name, kind, nbytes), Timed(steps, wire, clock.agree(clock(call), dist.ReduceOp.MAX))


def _fit_links(measured: Mapping[tuple[str, str, int], Sequence[Timed]]) -> tuple[dict[str, Link], list[Fit]]:
    """A link for each mesh dim, with an entry for each kind of collective."""
    by_dim: dict[str, dict[str, list[Timed]]] = {}
    for (name, kind, _), sweeps in measured.items():
        timed = replace(sweeps[0], seconds=statistics.median(one.seconds for one in sweeps))
        by_dim.setdefault(name, {}).setdefault(kind, []).append(timed)
    links: dict[str, Link] = {}
    fits: list[Fit] = []
    for name, by_kind in by_dim.items():
        kinds = {kind: fit_link(entries) for kind, entries in by_kind.items()}
        links[name] = replace(fit_link([e for entries in by_kind.values() for e in entries]), kinds=kinds)
        for kind, entries in by_kind.items():
            link = kinds[kind]
            pairs = [(e.steps * link.latency + e.wire_bytes / link.bandwidth, e.seconds) for e in entries]
            fits.append(_fit_of(f"{kind} over {name}", pairs))
    return links, fits


def fit_link(measured: Sequence[Timed]) -> Link:
    """The Link with the least squares of relative errors."""
    table = np.array([(e.steps, e.wire_bytes, e.seconds) for e in measured])
    latency, beta = non_negative(table[:, :2], table[:, 2])
    if not beta:  # noise around a latency: no faster than the fastest of them
        beta = 1 / max(e.wire_bytes / e.seconds for e in measured)
    return Link(1 / beta, latency)


def _collective(
    kind: str, nbytes: int, ranks: int, rank: int, group: str, device: str
) -> tuple[Callable[[], Any], float]:
    """A collective as the primitives issue it, on `nbytes` that this rank hands in; and what a rank sends."""
    count = max(nbytes // 4 // ranks, 1)
    x = torch.zeros(count * ranks, device=device)
    issue, sent = {
        "all_to_all": (lambda: c10d.all_to_all_single(x, [count] * ranks, [count] * ranks, group), (ranks - 1) / ranks),
        "all_gather": (lambda: c10d.all_gather_into_tensor(x, ranks, group), ranks - 1),
        "reduce_scatter": (lambda: c10d.reduce_scatter_tensor(x, "sum", ranks, group), (ranks - 1) / ranks),
        "all_reduce": (lambda: c10d.all_reduce(x, "sum", group), 2 * (ranks - 1) / ranks),
        "send": (lambda: c10d.all_to_all_single(x, *_to_next(x.numel(), ranks, rank), group), 1),
    }[kind]
    return lambda: c10d.wait_tensor(issue()), sent * x.nbytes


def _to_next(count: int, ranks: int, rank: int) -> tuple[list[int], list[int]]:
    """Elements received from each rank and sent to each: all of them to the next one."""
    received, sent = ([count * (r == (rank + way) % ranks) for r in range(ranks)] for way in (-1, 1))
    return received, sent


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", required=True, help='the processes that there are, "4" or "2x4"')
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="where the profile goes")
    parser.add_argument("--launch", action="store_true", help="start them on this computer; else run it under torchrun")
    parser.add_argument("--quick", action="store_true", help="a try, in fewer sizes")


def run(options: argparse.Namespace) -> int:
    """`dsp-auto calibrate`: measures, prints how well the formulas fit, and writes the profile. Raises DspError."""
    shape = as_mesh(options.mesh)
    if options.out.suffix != ".json" or not options.out.parent.is_dir():
        raise DspError(asked=f"--out {options.out}", found="not a .json file in a folder that exists", remedy="name one")
    if options.launch:
        spawn(_on_rank, shape.ranks, shape, options.quick, options.out)
        return 0
    there = int(os.environ.get("WORLD_SIZE", 1))
    if there != shape.ranks:
        raise MeshError(
            asked=f"calibrate the mesh {shape}",
            found=f"there {'are' if there > 1 else 'is'} {counted(there, 'process')} (WORLD_SIZE)",
            remedy=f"run it under torchrun --nproc-per-node={shape.ranks}, or with --launch",
        )
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        os.environ.setdefault("MASTER_ADDR", "localhost")
        dist.init_process_group("nccl" if cuda else "gloo")
    _calibrate(shape, options.quick, options.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsp-auto calibrate", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _calibrate(shape: Mesh, quick: bool, out: Path) -> None:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, shape.sizes, mesh_dim_names=shape.names)
    found = calibrate(mesh, quick=quick, name=out.stem)
    if dist.get_rank() == 0:
        out.write_text(found.hardware.to_json(), encoding="utf-8")
        print(f"{found}\n\n{out}: `hardware={str(out)!r}`", flush=True)


def _on_rank(rank: int, ranks: int, shape: Mesh, quick: bool, out: Path) -> None:
    """One process of `--launch`."""
    _calibrate(shape, quick, out)
