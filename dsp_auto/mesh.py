"""The mesh as the planner sees it: names and sizes of its dims, with or without processes behind it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from .errors import MeshError


@dataclass(frozen=True)
class Mesh:
    """Mesh dims, outermost first: `Mesh(("node", "sp"), (2, 4))`."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names or any(size < 1 for size in self.sizes):
            raise MeshError(f"no mesh has dims {self.names} of sizes {self.sizes}")
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"two dims of the mesh have one name: {self.names}")

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position along every mesh dim of the `rank`-th device, counted row-major."""
        found = []
        for size in reversed(self.sizes):
            found.append(rank % size)
            rank //= size
        return tuple(reversed(found))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))


def as_mesh(mesh: Any) -> Mesh:
    """`"8"`, `8`, `"2x4"`, a `Mesh`, or a `torch.distributed.device_mesh.DeviceMesh`.

    Unnamed meshes get `sp`, or `dp` x `sp` outermost first, or `m0` x `m1` x ... for more dims.
    Raises MeshError for anything else.
    """
    if isinstance(mesh, Mesh):
        return mesh
    if isinstance(mesh, int) and not isinstance(mesh, bool):
        mesh = str(mesh)
    if isinstance(mesh, str):
        if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", mesh):
            raise MeshError(asked=f"mesh {mesh!r}", found="not a mesh", remedy='write it as "8" or "2x4"')
        sizes = tuple(int(size) for size in mesh.split("x"))
        return Mesh(_default_names(len(sizes)), sizes)
    shape = getattr(mesh, "shape", None)
    if shape is None or not hasattr(mesh, "get_group"):
        raise MeshError(
            asked=f"mesh {mesh!r}", found=f"a {type(mesh).__name__}", remedy='pass a DeviceMesh, "8" or "2x4"'
        )
    return Mesh(tuple(mesh.mesh_dim_names or _default_names(len(shape))), tuple(shape))


def _default_names(count: int) -> tuple[str, ...]:
    return ("sp",) if count == 1 else ("dp", "sp") if count == 2 else tuple(f"m{n}" for n in range(count))
