"""Groups: the process groups that a program's collectives go over, one for each line of ranks along some mesh dims."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .agreement import begin_gather
from .c10d import groups_known, timeout_of_mesh
from .errors import MeshError
from .mesh import Mesh

# Of each set of ranks and timeout, the group and the world that it was made in.
_made: dict[tuple[tuple[int, ...], timedelta], tuple[Any, Any]] = {}


def group_names(device_mesh: DeviceMesh, mesh: Mesh) -> Callable[[tuple[int, ...]], str]:
    """The c10d name of this rank's group along some dims of `mesh`, which is `device_mesh`, its dims perhaps split.

    A group that the DeviceMesh does not have is made when it is first asked for: every rank must then ask for the same dims in
    the same order. Without a process group names are empty.

    Raises MeshError where a group of the DeviceMesh counts its ranks in another order than the mesh.
    """
    if not dist.is_initialized():
        return lambda mesh_dims: ""
    ranks = device_mesh.mesh.reshape(mesh.sizes)
    own = mesh.coordinate(place_in(device_mesh))

    def line(mesh_dims: tuple[int, ...]) -> list[int]:
        return ranks[tuple(slice(None) if m in mesh_dims else at for m, at in enumerate(own))].flatten().tolist()

    groups = {}
    for dim, user in enumerate(mesh.whole):
        group, wanted = device_mesh.get_group(dim), line(mesh.dims_of(user))
        counted = dist.get_process_group_ranks(group)
        if counted != wanted:
            raise MeshError(
                asked=f"a process group over mesh dim {user}",
                found=f"the mesh has its ranks as {', '.join(map(str, wanted))}, and the group counts them as "
                f"{', '.join(map(str, counted))}",
                remedy="make a mesh whose ranks ascend (init_device_mesh does), or one of groups that count as it does "
                "(DeviceMesh.from_group, and dist.new_group with sort_ranks=False)",
            )
        groups[mesh.dims_of(user)] = group

    def name(mesh_dims: tuple[int, ...]) -> str:
        return (groups.get(mesh_dims) or _group(tuple(line(mesh_dims)), timeout_of_mesh(device_mesh))).group_name

    return name


def place_in(device_mesh: DeviceMesh) -> int:
    """This rank's place among the ranks of a mesh, counted row-major."""
    found = 0
    for size, at in zip(device_mesh.shape, device_mesh.get_coordinate() or (0,) * device_mesh.ndim, strict=True):
        found = found * size + at
    return found


def _group(ranks: tuple[int, ...], timeout: timedelta) -> Any:
    world, key = dist.group.WORLD, (ranks, timeout)
    if ranks == tuple(range(dist.get_world_size())):
        return world
    if key not in _made or _made[key][0] is not world:
        ascend = list(ranks) == sorted(ranks)
        if not ascend and "sort_ranks" not in inspect.signature(dist.new_group).parameters:
            raise MeshError(
                asked=f"a process group of the ranks {', '.join(map(str, ranks))}, in this order",
                found=f"torch {torch.__version__} makes groups of ascending ranks only",
                remedy="make a mesh whose ranks ascend (init_device_mesh does), or use torch 2.13",
            )
        _even_out(ranks, timeout)
        # Named after its ranks, so that ranks outside of it need not take part.
        make = partial(dist.new_group, list(ranks), timeout, use_local_synchronization=True)
        _made[key] = (world, make() if ascend else make(sort_ranks=False))
    return _made[key][1]


def _even_out(ranks: tuple[int, ...], timeout: timedelta) -> None:
    """Makes all of some ranks know equally many groups.

    The name of a group is made from its ranks and from how many groups a process knows, and ranks that make different names
    wait for each other for ever. So those that know fewer make some more, alone in them.
    """
    own = torch.tensor([groups_known()], device="cpu")
    known = begin_gather(ranks, ranks.index(dist.get_rank()), timeout, own)()
    for _ in range(int(max(known) - own)):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
