"""What a device has for a plan: bytes that the user counted, a device's size, or what is free on it now, less a reserve."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from .errors import StrategyError, first_lines

# What a plan cannot count: PyTorch's caching allocator rounds blocks up and leaves holes between them, and libraries take
# memory past it (the CUDA context and its kernels, NCCL's buffers for each communicator and channel). A round number, 4 GB of
# 80 GB; `torch.cuda.memory_reserved() - memory_allocated()` at the peak, and what nvidia-smi shows beyond that, are yours.
RESERVE = 0.05

# No device has an exbibyte, and a solver cannot tell such numbers apart.
MOST = 2**60

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Capacity:
    """Memory of a device. Raises StrategyError for a reserve that is no share.

    asked: as the user gave it. bytes: what the device has for the plan, before the reserve.
    reserve: the share of it that is kept back, 0 <= reserve < 1.
    """

    asked: int | str
    bytes: int
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        _check_reserve(self.reserve)

    @property
    def usable(self) -> int:
        """Bytes that a plan may use."""
        return int(self.bytes * (1 - self.reserve))


def parse_capacity(capacity: int | str | None) -> int | str | None:
    """Bytes from bytes, `"80GB"` or `"512MiB"`; "free" and None as they are. Raises StrategyError for anything else."""
    if capacity is None or _is_free(capacity):
        return None if capacity is None else "free"
    number, unit = _split(capacity)
    amount = float(number) * _UNITS.get(unit, 1) if number else 0.0
    if not 1 <= amount < MOST or unit not in ("", *_UNITS):
        raise StrategyError(
            asked=f"capacity {capacity!r}",
            found="not an amount of memory",
            remedy='give bytes, "80GB", "512MiB", or "free" for what is free on the device',
        )
    return int(amount)


_Device = torch.device | str | None


@overload
def find_capacity(
    capacity: int | str, reserve: float | None = ..., device: _Device = ..., *, held: int = ..., sharing: int = ...
) -> Capacity: ...


@overload
def find_capacity(
    capacity: int | str | None, reserve: float | None = ..., device: _Device = ..., *, held: int = ..., sharing: int = ...
) -> Capacity | None: ...


def find_capacity(
    capacity: int | str | None,
    reserve: float | None = None,
    device: _Device = None,
    *,
    held: int = 0,
    sharing: int = 1,
) -> Capacity | None:
    """What one device has; None where no capacity is asked for.

    capacity: bytes, a size with a unit ("80GB"), or "free": what is free on the device now.
    reserve: the share of it to keep back. None: `RESERVE` of a size with a unit and of "free", which say what there is; nothing
        of a bare number of bytes, which the user has counted himself.
    device: for "free"; None: the current accelerator, or the CPU where there is none.
    held: bytes on the device that belong to the model already (parameters, gradients, optimizer state). What a plan needs has
        them in it, so "free" counts them as free.
    sharing: for "free" on a CPU, the ranks of this computer: they share its memory.

    Free memory differs between ranks and from one call to the next: ask once on each rank, and plan for the least.

    Raises StrategyError for what is no amount or no share, and for "free" on a device that does not say what is free.
    """
    amount = parse_capacity(capacity)
    if reserve is not None:
        _check_reserve(reserve)
    if capacity is None or amount is None:
        return None
    if reserve is None:
        reserve = RESERVE if amount == "free" or _split(capacity)[1] else 0.0
    nbytes = _free(device, held, sharing) if isinstance(amount, str) else amount
    return Capacity(capacity, nbytes, reserve)


def _is_free(capacity: Any) -> bool:
    return isinstance(capacity, str) and capacity.strip().lower() == "free"


def _split(capacity: Any) -> tuple[str, str]:
    """The number and the unit, as texts; no number where it is no amount."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(capacity))
    return ("", "") if found is None or isinstance(capacity, bool) else (found[1], found[2].upper())


def _check_reserve(reserve: Any) -> None:
    if isinstance(reserve, bool) or not isinstance(reserve, (int, float)) or not 0 <= reserve < 1:
        raise StrategyError(
            asked=f"reserve {reserve!r}",
            found="it is a share of the memory",
            remedy="give a number 0 <= reserve < 1, such as 0.05",
        )


def _free(device: torch.device | str | None, held: int, sharing: int) -> int:
    """Bytes that this process can still get on a device, on a CPU that `sharing` processes share, and those it has."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        free = _free_on_cpu() // sharing if device.type == "cpu" else _free_on_accelerator(device)
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError, OSError) as error:
        # Modules of devices lack these functions, and builds without a device assert that it is there.
        raise _unknown(device, f"it does not say what is free ({first_lines(error)})") from error
    if free + held <= 0:
        raise _unknown(device, "nothing is free there")
    return free + held


def _unknown(device: Any, found: str) -> StrategyError:
    return StrategyError(asked=f"capacity 'free' on {device}", found=found, remedy='give bytes, or a size such as "80GB"')


def _free_on_accelerator(device: torch.device) -> int:
    """What the driver has left, and what PyTorch's allocator keeps without using it."""
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    allocated = module.memory_allocated(device)
    free += module.memory_reserved(device) - allocated
    if hasattr(module, "get_per_process_memory_fraction"):
        free = min(free, int(total * module.get_per_process_memory_fraction(device)) - allocated)
    return free


def _free_on_cpu() -> int:
    """What this process can get without swapping: of the computer, and of the control groups that it is in (containers)."""
    return min([_free_of_computer(), *_free_of_groups()])


def _free_of_computer() -> int:
    if (file := _PROC / "meminfo").exists():
        # The kernel's own estimate: free pages, and caches that it can drop.
        if found := re.search(r"^MemAvailable:\s*(\d+) kB$", file.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_groups() -> Iterator[int]:
    """Of each control group (version 2) with a limit: the limit, less what is used and is not a cache of files."""
    file = _PROC / "self" / "cgroup"
    found = re.search(r"^0::/(.*)$", file.read_text(), re.MULTILINE) if file.exists() else None
    if found is None:
        return
    group = _GROUPS / found[1]
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_GROUPS):
            return
        most = folder / "memory.max"
        if most.exists() and (limit := most.read_text().strip()) != "max":
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / "memory.current").read_text()) - int(cached[1] if cached else 0)
            yield int(limit) - used
