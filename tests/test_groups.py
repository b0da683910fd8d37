"""Process groups that others have made: meshes of them, whatever ranks they hold and in whatever order."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dsp_auto
from dsp_auto.groups import group_names
from dsp_auto.mesh import as_mesh
from dsp_auto.parameters import whole_value
from dsp_auto.verify import compare
from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, deviation

SMALL = dict(layers=1, hidden=16, heads=2, frames=5, tokens=7, batch=2)
# Where a framework puts neighbours into a group, and where it does not; ranks in another order; all of them.
LINES = {
    "neighbours": [[0, 1], [2, 3]],
    "strided": [[0, 2], [1, 3]],
    "backwards": [[2, 0], [3, 1]],
    "all, mixed": [[2, 0, 3, 1]],
}
ORDERED = pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="groups of this torch sort their ranks"
)


def _group(lines):
    """This rank's group among those of some lines, each with its ranks in the order of the line."""
    made = [dist.new_group(line, **({} if line == sorted(line) else {"sort_ranks": False})) for line in lines]
    return next(group for group, line in zip(made, lines, strict=True) if dist.get_rank() in line)


def _alone(rank, ranks, lines, strategy):
    """Over a mesh of one group: deviations from one device, of outputs that arrive in parts too."""
    model, args, kwargs = transformer_2d(**SMALL)
    group = _group(lines)
    mesh = DeviceMesh.from_group(group, "cpu")
    found = compare(model, mesh, args, kwargs, strategy=strategy)
    reference, _, _ = transformer_2d(**SMALL)
    part = dsp_auto.parallelize(model, mesh, strategy=strategy, out_layouts={"sp": 1})(*args)
    own = reference(*args).tensor_split(group.size(), 1)[group.rank()]
    held = [whole_value(p) if isinstance(p, DTensor) else p for p in model.parameters()]
    kept = max(deviation(a, b) for a, b in zip(held, reference.parameters()))
    return found.output, found.gradient, deviation(part, own), kept


@pytest.mark.parametrize("strategy", ["dsp", "megatron-lm", "ring"])
@pytest.mark.parametrize("lines", ["strided", *(pytest.param(name, marks=ORDERED) for name in ("backwards", "all, mixed"))])
def test_a_mesh_of_one_group_computes_what_one_device_does(world, lines, strategy):
    for output, gradient, part, kept in world(4).run(_alone, LINES[lines], strategy):
        assert max(output, part, kept) <= OUTPUT_TOLERANCE
        assert gradient <= GRADIENT_TOLERANCE


def _together(rank, ranks, lines, others):
    """Over a mesh of two groups, and over one of them with DDP over the other."""
    model, (videos,), _ = transformer_2d(**SMALL)
    dp, sp = _group(others), _group(lines)
    mesh = DeviceMesh.from_group([dp, sp], "cpu", mesh=lines, mesh_dim_names=("dp", "sp"))
    found = compare(model, mesh, (videos,), {}, strategy="dsp")
    sent = {name for name, _ in found.measured}
    model.zero_grad()
    reference, _, _ = transformer_2d(**SMALL)
    run = DistributedDataParallel(dsp_auto.parallelize(model, mesh["sp"]), process_group=dp)
    run(videos[dp.rank() : dp.rank() + 1]).square().mean().backward()
    reference(videos).square().mean().backward()
    pairs = zip(model.parameters(), reference.parameters())
    return found.output, found.gradient, max(deviation(a.grad, b.grad, 1e-3) for a, b in pairs), sent


@pytest.mark.parametrize(
    "lines, others", [("neighbours", "strided"), pytest.param("strided", "neighbours", marks=ORDERED)]
)
def test_a_mesh_of_several_groups_computes_what_one_device_does(world, lines, others):
    for output, *gradients, sent in world(4).run(_together, LINES[lines], LINES[others]):
        assert output <= OUTPUT_TOLERANCE
        assert max(gradients) <= GRADIENT_TOLERANCE
        assert "switch" in sent


def _uneven(rank, ranks):
    """The sum of some ranks over all dims of their mesh together, where each has made another number of groups before."""
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    mesh = DeviceMesh("cpu", [[1], [2], [3]])
    own = torch.tensor([float(rank)])
    total = torch.ops.dsp.reduce(own, 3, rank - 1, group_names(mesh, as_mesh(mesh))((0, 1))) if rank else own
    for _ in range(rank, ranks):
        dist.new_group([rank], use_local_synchronization=True)
    return total.item()


def test_ranks_that_have_made_different_numbers_of_groups_meet_in_a_new_one(world):
    assert world(4).run(_uneven) == [0.0, 6.0, 6.0, 6.0]


def _bare(rank, ranks):
    model, _, _ = transformer_2d(**SMALL)
    with pytest.raises(dsp_auto.MeshError, match="DeviceMesh.from_group"):
        dsp_auto.parallelize(model, dist.group.WORLD)
    return True


def test_a_group_that_does_not_say_where_its_ranks_compute_is_told_how_to_become_a_mesh(world):
    assert all(world(2).run(_bare))
