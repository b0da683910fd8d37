"""What the devices and the links between them can do, as named profiles. Bytes/s, FLOP/s, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsp_auto.errors import StrategyError


@dataclass(frozen=True)
class Link:
    """One mesh dim's interconnect, per device and direction."""

    bandwidth: float  # bytes/s
    latency: float  # seconds a message


@dataclass(frozen=True)
class Hardware:
    """A device and its links. `links` names mesh dims that differ from `default_link`."""

    name: str
    flops: float  # FLOP/s of dense matmul in the activations' dtype
    memory_bandwidth: float  # bytes/s
    default_link: Link
    links: Mapping[str, Link] = field(default_factory=dict)

    def link(self, mesh_dim: str) -> Link:
        return self.links.get(mesh_dim, self.default_link)


PROFILES = {
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s dense bf16, 3.35 TB/s HBM3, NVLink 4 at 450 GB/s a direction.
    "h100": Hardware("h100", 989e12, 3.35e12, Link(450e9, 3e-6)),
    # NVIDIA A100 SXM 80GB data sheet: 312 TFLOP/s dense bf16, 2.04 TB/s HBM2e, NVLink 3 at 300 GB/s a direction.
    "a100": Hardware("a100", 312e12, 2.04e12, Link(300e9, 3e-6)),
}


def as_hardware(hardware: str | Hardware | None) -> Hardware | None:
    """A profile by name, or as it is. Raises StrategyError for a name that no profile has."""
    if hardware is None or isinstance(hardware, Hardware):
        return hardware
    if hardware not in PROFILES:
        raise StrategyError(
            asked=f"hardware {hardware!r}",
            found=f"the profiles are {', '.join(PROFILES)}",
            remedy="use one, or a Hardware",
        )
    return PROFILES[hardware]
