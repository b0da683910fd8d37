"""What a device has for a plan: bytes that the user counted, or that the device says are free, less a stated reserve."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from dsp_auto import capacity as capacity_module
from dsp_auto.capacity import RESERVE, Capacity, find_capacity, parse_capacity
from dsp_auto.errors import StrategyError

GIB = 2**30


class Device:
    """An accelerator of 80 GiB: the driver's free memory, what torch's allocator has reserved, and what of it is used."""

    def __init__(self, free=50 * GIB, reserved=20 * GIB, allocated=12 * GIB, fraction=None):
        self.free, self.reserved, self.allocated = free, reserved, allocated
        self.asked = []
        if fraction is not None:
            self.get_per_process_memory_fraction = lambda device: fraction

    def mem_get_info(self, device):
        self.asked.append(device)
        return self.free, 80 * GIB

    def memory_reserved(self, device):
        return self.reserved

    def memory_allocated(self, device):
        return self.allocated


@pytest.fixture
def on(monkeypatch):
    """Puts a module in place of torch's for every device type but the CPU."""

    def put(module):
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        return module

    return put


@pytest.fixture
def computer(monkeypatch, tmp_path):
    """A computer of its own: what /proc and the control groups say."""

    def make(meminfo="MemTotal: 64 kB\nMemFree: 10 kB\nMemAvailable: 48 kB\n", group="/", **limits):
        (tmp_path / "proc" / "self").mkdir(parents=True)
        if meminfo is not None:
            (tmp_path / "proc" / "meminfo").write_text(meminfo)
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"4:memory:/other\n0::{group}\n")
        for folder, (most, used, cached) in limits.items():
            place = tmp_path / "groups" / folder.replace("_", "/").removeprefix("root")
            place.mkdir(parents=True, exist_ok=True)
            (place / "memory.max").write_text(f"{most}\n")
            (place / "memory.current").write_text(f"{used}\n")
            (place / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {cached}\nactive_file 3\n")
        monkeypatch.setattr(capacity_module, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(capacity_module, "_GROUPS", tmp_path / "groups")
        return find_capacity("free", device="cpu").bytes

    return make


def test_a_capacity_is_bytes_or_text_with_a_unit_or_free():
    asked = (None, 5, "7", "80GB", "1.5 KiB", " 2tib ", "free", " Free ")
    assert [parse_capacity(c) for c in asked] == [None, 5, 7, 80 * 10**9, 1536, 2 * 2**40, "free", "free"]


@pytest.mark.parametrize(
    "wrong",
    ["", "much", "80 apples", "-3", -3, 0, "0", "0.4", True, False, "1e9", float("nan"), float("inf"), [5], "9" * 400 + "TB"],
    ids=lambda wrong: repr(wrong)[:12],
)
def test_what_is_no_amount_of_memory_is_refused(wrong):
    with pytest.raises(StrategyError, match='not an amount of memory.*"80GB".*"free"'):
        parse_capacity(wrong)


def test_no_capacity_is_none():
    assert find_capacity(None) is None and find_capacity(None, reserve=0.1) is None


@pytest.mark.parametrize("asked", [1000, "1000"])
def test_bytes_that_the_user_counted_are_used_in_full(asked):
    assert find_capacity(asked) == Capacity(asked, 1000, 0.0)
    assert find_capacity(asked).usable == 1000


def test_of_a_device_s_size_a_reserve_is_kept_back():
    found = find_capacity("80GB")
    assert (found.asked, found.bytes, found.reserve) == ("80GB", 80 * 10**9, RESERVE)
    assert found.usable == 76 * 10**9


@pytest.mark.parametrize("asked", [1000, "1000", "1000 B", "1 KB"])
@pytest.mark.parametrize(("reserve", "usable"), [(0, 1000), (0.25, 750), (0.9999, 0)])
def test_a_reserve_that_is_given_is_the_reserve(asked, reserve, usable):
    found = find_capacity(asked, reserve)
    assert (found.bytes, found.reserve, found.usable) == (1000, reserve, usable)


@pytest.mark.parametrize("reserve", [-0.1, 1, 1.5, True, "0.1", float("nan"), None])
def test_a_reserve_is_a_share_below_one(reserve):
    with pytest.raises(StrategyError, match=r"reserve .*share of the memory.*0 <= reserve < 1"):
        Capacity("80GB", 80 * 10**9, reserve)


@pytest.mark.parametrize("reserve", [-0.1, 1, "0.1"])
def test_a_wrong_reserve_is_refused_without_a_capacity_too(reserve):
    with pytest.raises(StrategyError, match="reserve"):
        find_capacity(None, reserve)


def test_free_is_what_the_driver_has_and_what_torch_reserved_and_does_not_use(on):
    device = on(Device())
    found = find_capacity("free", device="cuda:1")
    assert found == Capacity("free", 58 * GIB, RESERVE)
    assert device.asked == [torch.device("cuda:1")]


def test_free_is_of_the_current_accelerator_where_no_device_is_named(on):
    device = on(Device())
    assert find_capacity("free").bytes == 58 * GIB
    assert device.asked == [torch.device("cuda")]


def test_free_is_of_the_cpu_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(capacity_module, "_free_on_cpu", lambda: 123)
    assert find_capacity("free").bytes == 123


def test_free_stays_below_what_torch_lets_this_process_have(on):
    on(Device(fraction=0.5))
    assert find_capacity("free", device="cuda").bytes == (40 - 12) * GIB
    on(Device(fraction=1.0))
    assert find_capacity("free", device="cuda").bytes == 58 * GIB


def test_what_the_model_holds_already_is_not_counted_twice(on):
    # A plan's memory has the parameters in it, and those on the device are no longer free.
    on(Device())
    assert find_capacity("free", device="cuda", held=10 * GIB).bytes == 68 * GIB
    assert find_capacity("80GB", device="cuda", held=10 * GIB).bytes == 80 * 10**9


def test_a_full_device_still_has_what_the_model_holds(on):
    on(Device(free=0, reserved=12 * GIB))
    assert find_capacity("free", device="cuda", held=10 * GIB).bytes == 10 * GIB


def test_ranks_of_one_computer_share_its_memory_and_have_devices_of_their_own(monkeypatch, on):
    on(Device())
    monkeypatch.setattr(capacity_module, "_free_on_cpu", lambda: 1200)
    assert find_capacity("free", device="cpu", held=7, sharing=4).bytes == 307
    assert find_capacity("free", device="cuda", sharing=4).bytes == 58 * GIB


@pytest.mark.parametrize(
    "module",
    [
        SimpleNamespace(),
        Device(free=0, reserved=0, allocated=0),
        SimpleNamespace(mem_get_info=lambda device: (_ for _ in ()).throw(RuntimeError("out of memory"))),
        SimpleNamespace(mem_get_info=lambda device: (_ for _ in ()).throw(AssertionError("not compiled"))),
    ],
    ids=["says nothing", "full", "fails", "not built"],
)
def test_a_device_that_does_not_say_what_is_free_is_an_error_that_says_what_to_give(module, on):
    on(module)
    with pytest.raises(StrategyError, match="capacity 'free' on cuda.*80GB"):
        find_capacity("free", device="cuda")


@pytest.mark.parametrize("device", ["meta", "no device", 3.5])
def test_what_is_no_device_with_memory_is_refused(device):
    with pytest.raises(StrategyError, match="capacity 'free' on .*80GB"):
        find_capacity("free", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(StrategyError, match="capacity 'free' on cuda"):
        find_capacity("free", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_that_torch_has_reserved_counts_as_free_on_a_gpu():
    before = find_capacity("free", device="cuda").bytes
    block = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    assert before - find_capacity("free", device="cuda").bytes == pytest.approx(GIB, rel=0.1)
    del block
    assert find_capacity("free", device="cuda").bytes == pytest.approx(before, rel=0.01)


def test_free_on_this_computer_is_less_than_it_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**24 < find_capacity("free", device="cpu").bytes < total


def test_free_on_a_cpu_is_what_the_kernel_can_make_available(computer):
    assert computer() == 48 * 1024


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 64 kB\n"], ids=["no meminfo", "an old kernel"])
def test_without_the_kernels_estimate_free_pages_are_what_is_free(meminfo, computer, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert computer(meminfo) == 40960


def test_a_computer_that_does_not_say_what_is_free_is_an_error_that_says_what_to_give(computer, monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(StrategyError, match="capacity 'free' on cpu.*80GB"):
        computer(meminfo=None)


def test_a_containers_limit_bounds_what_is_free(computer):
    # 30,000 bytes, of which 12,000 are used; 2,000 of these are files that the kernel can drop.
    assert computer(root=(30_000, 12_000, 2_000)) == 20_000


def test_the_tightest_group_above_a_process_bounds_what_is_free(computer):
    found = computer(group="/a/b", root=("max", 0, 0), a=(20_000, 5_000, 0), a_b=(40_000, 5_000, 1_000))
    assert found == 15_000


def test_a_group_without_a_limit_bounds_nothing(computer):
    assert computer(group="/a", a=("max", 12_000, 2_000)) == 48 * 1024
