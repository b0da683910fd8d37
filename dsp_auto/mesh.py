"""The mesh as the planner sees it: names and sizes of its dims, with or without processes behind it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import MeshError


@dataclass(frozen=True)
class Mesh:
    """Mesh dims, outermost first: `Mesh(("node", "sp"), (2, 4))`.

    part_of: where the planner has split a dim (8 ranks as 4 x 2), the name of the user's dim that each dim is a part of.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    part_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names or any(size < 1 for size in self.sizes):
            raise MeshError(f"no mesh has dims {self.names} of sizes {self.sizes}")
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"two dims of the mesh have one name: {self.names}")

        object.__setattr__(self, "part_of", self.part_of or self.names)

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def whole(self) -> dict[str, int]:
        """The user's mesh dims and their sizes."""
        found = dict.fromkeys(self.part_of, 1)
        for name, size in zip(self.part_of, self.sizes, strict=True):
            found[name] *= size
        return found

    def split(self, parts: Sequence[Sequence[int]]) -> Mesh:
        """The same devices with each dim split into `parts`, outermost first: `Mesh(("sp",), (8,)).split([(4, 2)])`."""
        names: list[str] = []
        sizes: list[int] = []
        part_of: list[str] = []
        for name, size, own in zip(self.names, self.sizes, parts, strict=True):
            if math.prod(own) != size:
                raise MeshError(f"mesh dim {name} of {size} ranks is not {' x '.join(map(str, own))}")
            names += [name] if len(own) == 1 else [f"{name}.{n}" for n in range(len(own))]
            sizes += own
            part_of += [name] * len(own)
        return Mesh(tuple(names), tuple(sizes), tuple(part_of))

    def dims_of(self, name: str) -> tuple[int, ...]:
        """The dims that are the user's dim `name`."""
        return tuple(m for m, whole in enumerate(self.part_of) if whole == name)

    def label(self, dims: Sequence[int]) -> str:
        """The names of some dims together: `sp`, `sp.0`, `dp+sp`."""
        found: list[str] = []
        for m in dims:
            own = self.dims_of(self.part_of[m])
            name = self.part_of[m] if set(own) <= set(dims) else self.names[m]
            found += [name] if name not in found else []
        return "+".join(found)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position along every mesh dim of the `rank`-th device, counted row-major."""
        found = []
        for size in reversed(self.sizes):
            found.append(rank % size)
            rank //= size
        return tuple(reversed(found))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.whole.items())


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
        if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", mesh):
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
