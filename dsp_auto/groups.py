"""Groups: the process groups that a program's collectives go over, one for each line of ranks along some mesh dims."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import MeshError
from .mesh import Mesh

# Of each set of ranks, the group and the world that it was made in.
_made: dict[tuple[int, ...], tuple[Any, Any]] = {}


def group_names(device_mesh: DeviceMesh, mesh: Mesh) -> Callable[[tuple[int, ...]], str]:
    """The c10d name of this rank's group along some dims of `mesh`, which is `device_mesh`, its dims perhaps split.

    A group that the DeviceMesh does not have is made when it is first asked for: every rank must then ask for the same dims in
    the same order. Without a process group names are empty.

    Raises MeshError where the ranks along those dims do not ascend: a process group counts its ranks in ascending order.
    """
    if not dist.is_initialized():
        return lambda mesh_dims: ""
    ranks = device_mesh.mesh.reshape(mesh.sizes)
    own = mesh.coordinate(place_in(device_mesh))
    users = device_mesh.mesh_dim_names or mesh.part_of

    def name(mesh_dims: tuple[int, ...]) -> str:
        others = tuple(m for m in range(len(mesh.sizes)) if m not in mesh_dims)
        lines = ranks.permute(*others, *mesh_dims).reshape(-1, math.prod(mesh.sizes[m] for m in mesh_dims)).tolist()
        wrong = next((line for line in lines if line != sorted(line)), None)
        if wrong is not None:
            raise MeshError(
                asked=f"a process group over mesh dim {mesh.label(mesh_dims)}",
                found=f"its ranks would be {', '.join(map(str, wrong))}, and a group counts them in ascending order",
                remedy="make a mesh whose ranks ascend (init_device_mesh does)",
            )
        if len({mesh.part_of[m] for m in mesh_dims}) == 1 and mesh.dims_of(mesh.part_of[mesh_dims[0]]) == mesh_dims:
            return device_mesh.get_group(users.index(mesh.part_of[mesh_dims[0]])).group_name
        line = ranks[tuple(slice(None) if m in mesh_dims else at for m, at in enumerate(own))]
        return _group(tuple(line.flatten().tolist())).group_name

    return name


def place_in(device_mesh: DeviceMesh) -> int:
    """This rank's place among the ranks of a mesh, counted row-major."""
    found = 0
    for size, at in zip(device_mesh.shape, device_mesh.get_coordinate() or (0,) * device_mesh.ndim, strict=True):
        found = found * size + at
    return found


def _group(ranks: tuple[int, ...]) -> Any:
    world = dist.group.WORLD
    if len(ranks) == dist.get_world_size():
        return world
    if ranks not in _made or _made[ranks][0] is not world:
        # Named after its ranks, so that ranks outside of it need not take part.
        _made[ranks] = (world, dist.new_group(list(ranks), use_local_synchronization=True))
    return _made[ranks][1]
