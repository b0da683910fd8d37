"""What `torch.distributed` tells by private names only; `tests/test_failures.py` fails when one of them changes.

`dist.new_group`, `dist.get_process_group_ranks` and the rest of the public API need no such place.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh


def world_store() -> dist.Store:
    """The store that the ranks of the world share: the only way to talk outside of collectives."""
    return distributed_c10d._get_default_store()


def group_called(name: str) -> dist.ProcessGroup:
    """The group that a functional collective names."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str, private too


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long a collective of a group may take on tensors of a device: set for the group, asked for by nothing public."""
    return group._get_backend(device).options._timeout


def timeout_of_mesh(mesh: DeviceMesh) -> timedelta:
    """How long a collective of a mesh's most patient group may take: what groups of more of its ranks get too."""
    device = torch.device(mesh.device_type)
    return max(timeout_of(group, device) for group in mesh.get_all_groups())


def groups_known() -> int:
    """How many groups this process knows, of which `dist.new_group` makes a part of a new group's name."""
    return len(distributed_c10d._world.pg_names)
