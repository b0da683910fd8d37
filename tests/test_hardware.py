"""A hardware profile is arithmetic that a person can redo, and plain JSON that is checked entry by entry."""

from __future__ import annotations

import json
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import dsp_auto
from dsp_auto.cost_models.hardware import KINDS, PROFILES, Hardware, Kernel, Link, Rate, as_hardware
from dsp_auto.errors import StrategyError
from dsp_auto.predict import predict

FAST, SLOW = Link(100.0, 1.0), Link(10.0, 5.0)
NODES = Hardware("toy", FAST, SLOW, gpus_per_node=8)


@pytest.mark.parametrize(
    ("kind", "steps"), [("all_to_all", 3), ("all_gather", 3), ("reduce_scatter", 3), ("all_reduce", 6), ("send", 1)]
)
def test_a_collective_takes_a_latency_for_each_step_and_its_bytes_over_the_bandwidth(kind, steps):
    assert NODES.collective_seconds(kind, 700.0, [("sp", 4)]) == steps * 1.0 + 7.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_communicates_nothing(kind):
    assert NODES.collective_seconds(kind, 0.0, [("dp", 1), ("sp", 1)]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_two_dims_inside_a_node_are_one_ring_or_one_exchange(kind):
    hardware = NODES.on({"a": 2, "b": 4})
    one = hardware.collective_seconds(kind, 700.0, [("ab", 8)])
    assert hardware.collective_seconds(kind, 700.0, [("a", 2), ("b", 4)]) == pytest.approx(one)


def test_the_innermost_dims_fill_a_node_and_the_others_lead_out():
    hardware = NODES.on({"dp": 2, "tp": 4, "sp": 2})
    assert (hardware.link("dp"), hardware.link("tp"), hardware.link("sp")) == (SLOW, FAST, FAST)
    assert NODES.on(UserDict({"dp": 2, "sp": 3})).link("dp") == FAST  # six ranks fit one node; any mapping will do
    assert NODES.on({"dp": 4, "sp": 6}).link("sp") == SLOW  # the second six stand in two nodes


def test_between_nodes_an_all_to_all_sends_what_the_other_nodes_get():
    # 2 nodes of 8: of 1600 bytes, half go to the other node; 15/16 leave the device, of which 8/15 do.
    hardware = NODES.on({"dp": 2, "sp": 8})
    latency = 8 * SLOW.latency + 7 * FAST.latency
    assert hardware.collective_seconds("all_to_all", 1500.0, [("dp", 2), ("sp", 8)]) == pytest.approx(latency + 800 / 10)


@pytest.mark.parametrize(("kind", "rounds"), [("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)])
def test_between_nodes_a_ring_sends_one_part_in_eight_over_each_network_port(kind, rounds):
    hardware = NODES.on({"dp": 2, "sp": 8})
    found = hardware.collective_seconds(kind, 1600.0, [("dp", 2), ("sp", 8)])
    assert found == pytest.approx(rounds * 15 * SLOW.latency + max(1600 / 8 / 10, 1600 * 7 / 8 / 100))


def test_a_send_waits_for_the_device_at_the_border():
    hardware = NODES.on({"dp": 2, "sp": 8})
    assert hardware.collective_seconds("send", 100.0, [("dp", 2), ("sp", 8)]) == SLOW.latency + 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_dim_that_fills_a_node_and_goes_on_is_nodes_of_devices(kind):
    split, whole = NODES.on({"a": 2, "b": 8}), NODES.on({"sp": 16})
    seconds = split.collective_seconds(kind, 1600.0, [("a", 2), ("b", 8)])
    assert whole.collective_seconds(kind, 1600.0, [("sp", 16)]) == pytest.approx(seconds)


def test_a_link_that_the_user_names_is_taken_for_all_parts_of_the_dim():
    own = Link(1.0, 0.0, kinds={"send": Link(2.0, 0.0)})
    hardware = replace(NODES, links={"sp": own})
    assert hardware.collective_seconds("all_gather", 4.0, [("sp.1", 2)]) == 4.0
    assert hardware.collective_seconds("send", 4.0, [("sp", 2)]) == 2.0


def test_a_kernel_takes_its_overhead_and_the_larger_of_arithmetic_and_traffic():
    kernel = Kernel(1.0, Rate(20.0, 0.5), {"float32": Rate(100.0), "bfloat16": Rate(400.0, 0.5)})
    assert kernel.seconds(1000, 10, "float32") == 1 + 10
    assert kernel.seconds(1000, 10, "float16") == 1 + 5
    assert kernel.seconds(10, 100, "float32") == 1 + 10
    assert kernel.seconds(1000, 10, "float32", shards=5) == 1 + 2
    assert kernel.seconds(1000, 10, "float64") == 1 + 10


def test_a_copy_reads_and_writes():
    hardware = replace(NODES, kernels={"memory": Kernel(1.0, Rate(10.0))}, host=0.5)
    assert hardware.copy_seconds(100) == 0.5 + 1 + 20


def test_nothing_hides_behind_computation_unless_the_profile_says_so():
    assert NODES.exposed_seconds(10.0, 4.0) == 10.0
    assert replace(NODES, overlap=0.5).exposed_seconds(10.0, 100.0) == 5.0
    assert replace(NODES, overlap=1.0).exposed_seconds(10.0, 4.0) == 6.0


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_json(name):
    assert Hardware.from_json(PROFILES[name].to_json()) == PROFILES[name] == as_hardware(name)


def test_a_profile_is_read_from_a_file(tmp_path):
    made = replace(NODES, links={"sp": Link(1.0, 0.0, 0.5, {"send": SLOW})}, measured={"mesh": {"sp": 4}})
    (tmp_path / "my.json").write_text(made.to_json())
    assert as_hardware(str(tmp_path / "my.json")) == as_hardware(tmp_path / "my.json") == made
    assert as_hardware(made) is made and as_hardware(None) is PROFILES["h100"]


@pytest.mark.parametrize("hardware", [{}, {"hardware": None}])
def test_without_hardware_predictions_are_for_h100(hardware):
    model, args = nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.Softmax(2)), (torch.ones(2, 4, 6, 8),)
    for call in (
        lambda **given: dsp_auto.compare(model, "2", args, strategies=["dsp"], **given)["dsp"].prediction,
        lambda **given: dsp_auto.fit(model, 2, 10**9, args, strategies=["dsp"], **given),
        lambda **given: dsp_auto.report(model, "2", args, strategies=["dsp"], **given).own.prediction,
        lambda **given: predict(model, "2", args, **given),
    ):
        assert call(**hardware) == call(hardware="h100") and call(hardware="h100") != call(hardware="a100")


def test_h800_moves_over_nvlink_at_less_than_half_of_h100():
    seconds = [PROFILES[name].collective_seconds("all_gather", 1e9, [("sp", 8)]) for name in ("h100", "h800")]
    assert seconds[1] > 2 * seconds[0]


def test_a_profile_measured_on_four_ranks_is_refused_for_eight():
    made = replace(NODES, measured={"mesh": {"sp": 4}})
    assert made.on({"sp.0": 2, "sp.1": 2}).link("sp.0") == FAST
    with pytest.raises(StrategyError, match="measured on sp=4.*alibrate on 8 ranks"):
        made.on({"sp": 8})


def _broken(change) -> str:
    data = json.loads(NODES.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "format is None"),
        (_broken(lambda d: d.update(format=99)), "format is 99"),
        (_broken(lambda d: d.pop("name")), "name is None"),
        (_broken(lambda d: d.pop("intra")), "intra is None"),
        (_broken(lambda d: d.update(colour="red")), "'colour'"),
        (_broken(lambda d: d["intra"].update(peak=0)), "intra.peak is 0"),
        (_broken(lambda d: d["intra"].update(peak="fast")), "intra.peak is 'fast'"),
        (_broken(lambda d: d["intra"].update(latency=-1)), "intra.latency is -1"),
        (_broken(lambda d: d["intra"].update(kinds={"shout": {}})), "'shout'"),
        (_broken(lambda d: d.update(kernels={"mm": {"memory": {"peak": float("inf")}}})), "kernels.mm.memory.peak is inf"),
        (_broken(lambda d: d.update(kernels=[])), "kernels is [], not an object"),
        (_broken(lambda d: d.update(gpus_per_node=0)), "gpus_per_node is 0"),
        (_broken(lambda d: d.update(overlap=2)), "overlap is 2"),
        (_broken(lambda d: d.update(measured={"mesh": {"sp": "4"}})), "measured.mesh.sp is '4'"),
        (_broken(lambda d: d.update(measured={})), "measured.mesh is None"),
    ],
)
def test_what_is_no_profile_is_told_by_the_entry_that_is_wrong(tmp_path, text, says):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(StrategyError) as error:
        as_hardware(str(tmp_path / "my.json"))
    assert says in str(error.value) and "my.json" in str(error.value) and "calibrate" in error.value.remedy


@pytest.mark.parametrize("asked", ["abacus", 7, "no_such_file.json"])
def test_what_is_neither_a_profile_nor_a_file_is_refused(asked):
    with pytest.raises(StrategyError, match=str(asked)):
        as_hardware(asked)


def test_an_entry_for_a_dtype_comes_before_those_for_all():
    own = {"mm": Kernel(1.0), "matmul": Kernel(2.0), "matmul@bfloat16": Kernel(3.0), "memory": Kernel(4.0)}
    hardware = replace(NODES, kernels=own)
    names = [("mm", "matmul", "float32"), ("bmm", "matmul", "float32"), ("mm", "matmul", "bfloat16"), ("sort", "pointwise", "")]
    assert [hardware.kernel(*name).overhead for name in names] == [1.0, 2.0, 3.0, 4.0]


def test_where_a_core_does_one_after_the_other_both_count():
    assert Kernel(1.0, Rate(10.0), {"float32": Rate(100.0)}, adds=True).seconds(1000, 100, "float32") == 1 + 10 + 10
