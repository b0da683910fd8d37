"""A calibration finds the constants that its measurements were made from, is the same on all ranks, and only measures the
mesh that it is asked about."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsp_auto import calibrate
from dsp_auto.calibrate import Sample, Timed, fit_kernel, fit_link, non_negative
from dsp_auto.cost_models.compute import Launch
from dsp_auto.cost_models.hardware import KINDS, Hardware, Kernel, Rate, as_hardware
from dsp_auto.errors import DspError, MeshError
from dsp_auto.mesh import as_mesh

SIZES = [(2**a, 2**b) for a in range(10, 34, 4) for b in range(10, 26, 3)]


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("adds", [False, True])
def test_the_fit_of_a_kernel_finds_overhead_rate_and_bandwidth_and_whether_they_add_up(noise, adds):
    draw = random.Random(0)
    true = Kernel(1e-5, Rate(2e10), {"float32": Rate(5e10)}, adds)
    launches = [Launch("mm", "matmul", flops, nbytes, "float32") for flops, nbytes in SIZES]
    seconds = [true.seconds(one.flops, one.nbytes, one.dtype) * (1 + draw.uniform(-noise, noise)) for one in launches]
    found = fit_kernel([Sample(*entry) for entry in zip(launches, seconds)])
    close = {"rel": 1e-6 + noise}
    assert found.adds == adds and found.overhead == pytest.approx(true.overhead, **close)
    assert found.memory.achieved == pytest.approx(true.memory.achieved, **close)
    assert found.rate("float32").achieved == pytest.approx(true.rate("float32").achieved, **close)


def test_a_kernel_without_arithmetic_is_fitted_by_its_bytes():
    launches = [Launch("add", "pointwise", 0, 2**n, "float32") for n in range(8, 26, 2)]
    found = fit_kernel([Sample(one, 2e-6 + one.nbytes / 1e10) for one in launches])
    assert found.overhead == pytest.approx(2e-6) and found.memory.achieved == pytest.approx(1e10) and not found.flops


@pytest.mark.parametrize(("steps", "rounds"), [(3, 1.5), (1, 1.0), (6, 1.5)])
def test_the_fit_of_a_link_finds_alpha_and_beta(steps, rounds):
    measured = [Timed(steps, rounds * 2**n, steps * 1e-4 + rounds * 2**n / 1e9) for n in range(10, 25, 2)]
    found = fit_link(measured)
    assert (found.latency, found.bandwidth) == (pytest.approx(1e-4), pytest.approx(1e9))


def test_no_coefficient_is_negative_and_none_is_better():
    draw = random.Random(1)
    table = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).numpy()
    seconds = (table @ [1.0, -0.3, 0.5]).clip(0.1)
    found = non_negative(table, seconds)

    def error(coefficients):
        return (((table @ coefficients) / seconds - 1) ** 2).sum()

    assert min(found) >= 0 and found[1] == 0
    for _ in range(200):
        assert error(found) <= error([max(c + draw.uniform(-0.1, 0.1), 0.0) for c in found]) + 1e-12


def test_where_only_latency_was_seen_the_bandwidth_stays_a_number():
    found = fit_link([Timed(1, 2.0**n, 1e-3 - n * 1e-6) for n in range(10, 20)])
    assert 0 < found.bandwidth < math.inf and found.latency > 0


def small(rank, ranks, call, *args):
    """On a rank: a calibration in blocks too short to mean anything."""
    calibrate.BLOCK_SECONDS, calibrate.SWEEPS, calibrate.COLLECTIVE_BYTES = 1e-5, 2, (1024, 4096, 65536)
    return call(rank, ranks, *args)


def _profile(rank, ranks):
    found = calibrate.calibrate(init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)), quick=True)
    return found.hardware.to_json(), str(found)


def test_all_ranks_get_the_same_profile_and_every_number_in_it_can_be_used(world):
    told = world(2).run(small, _profile)
    assert told[0] == told[1]
    hardware = Hardware.from_json(told[0][0])  # which refuses what is not positive and finite
    assert dict(hardware.measured["mesh"]) == {"sp": 2}
    assert set(hardware.links) == {"sp"} and set(hardware.links["sp"].kinds) == set(KINDS)
    assert {"matmul", "attention", "attention_backward", "convolution", "pointwise", "copy", "memory"} <= set(hardware.kernels)
    assert hardware.on({"sp": 2}).collective_seconds("all_to_all", 1e6, [("sp", 2)]) > 0
    fits = hardware.measured["fits"]
    assert {f"{kind} over sp" for kind in KINDS} <= set(fits) and all(f["worst"] >= f["median"] >= 0 for f in fits.values())
    assert all(name in told[0][1] for name in fits)


def _links(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "tp", "sp"))
    clock = calibrate._Clock("cpu", calibrate.BLOCK_SECONDS)
    timed = list(calibrate._measure_collectives(mesh, as_mesh(mesh), clock, quick=False))
    links, fits = calibrate._fit_links({key: [one, one] for key, one in timed})
    return links, [fit.name for fit in fits], [(kind, one.steps, one.wire_bytes) for (_, kind, _), one in timed]


def test_each_mesh_dim_of_several_ranks_gets_a_link_from_what_its_collectives_send(world):
    told = world(4).run(small, _links)
    for links, fits, timed in told:
        assert set(links) == {"dp", "sp"} and all(set(link.kinds) == set(KINDS) for link in links.values())
        assert fits == [f"{kind} over {name}" for name in ("dp", "sp") for kind in KINDS]
        sent = {(kind, steps): wire for kind, steps, wire in timed[:: 3]}
        # Of 1024 bytes that each of two ranks hands in.
        assert sent == {
            ("all_to_all", 1): 512,
            ("all_gather", 1): 1024,
            ("reduce_scatter", 1): 512,
            ("all_reduce", 2): 1024,
            ("send", 1): 1024,
        }


def _on_a_part(rank, ranks):
    with pytest.raises(MeshError) as error:
        calibrate.calibrate(DeviceMesh("cpu", [0], mesh_dim_names=("sp",)))
    return str(error.value)


def test_a_mesh_that_is_not_all_processes_is_refused(world):
    for told in world(2).run(_on_a_part):
        assert "calibrate the mesh sp=1" in told and "2 processes" in told and "torchrun" in told


def _by_command(rank, ranks, out, launched):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(launched))
        return calibrate.main(["--mesh", "2", "--quick", "--out", out])


def test_the_command_writes_a_profile_that_can_be_read(world, tmp_path):
    out = tmp_path / "mine.json"
    assert world(2).run(small, _by_command, str(out), 2) == [0, 0]
    assert as_hardware(str(out)).name == "mine"


@pytest.mark.parametrize(
    ("argv", "error", "says"),
    [
        (("--mesh", "3"), MeshError, ("sp=3", "1 process", "--nproc-per-node=3", "--launch")),
        (("--mesh", "3y"), MeshError, ("3y",)),
        (("--mesh", "1", "--out", "no_such_folder/x.json"), DspError, ("no_such_folder/x.json",)),
        (("--mesh", "1", "--out", "profile.txt"), DspError, ("profile.txt", ".json")),
    ],
)
def test_the_command_refuses_what_it_cannot_measure_before_it_measures(tmp_path, monkeypatch, argv, error, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(error) as raised:
        calibrate.main(["--out", "x.json", *argv])
    assert all(part in str(raised.value) for part in says) and not list(tmp_path.iterdir())
