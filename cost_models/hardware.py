"""What the devices and the links between them can do, as named profiles or as `dsp-auto calibrate` measured it.

Links. A collective takes a latency for each of its steps, and its bytes over the bandwidth (alpha-beta). On N ranks an
all-to-all, an all-gather and a reduce-scatter take N-1 steps, an all-reduce 2(N-1), a send one. A collective over several
links at once (8 devices in a node, nodes behind a network) takes as long as its slowest link, where a link carries

    all_to_all     the bytes for the ranks that it leads to: with a nodes of b devices, (a-1)/a of a device's tensor crosses
                   between nodes, the rest stays inside
    the rings      all-gather, reduce-scatter and all-reduce pass everything from neighbour to neighbour; of a ring of a b
                   devices, a hops leave a node. A node's devices share these out (NCCL opens a ring for each network
                   port), so 1/b of what a device sends crosses between nodes, and (b-1)/b stays inside
    send           everything: the device at the border sends all of it across, and the others wait for it

Kernels. One takes its overhead, and the larger of its arithmetic and its memory traffic (the roofline of Williams et al.,
CACM 2009), or both where a core does one after the other. Peaks are the vendor's numbers; efficiencies, kept apart from
them, say what is reached of them.

Bytes, bytes/s, FLOP/s, seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dsp_auto.errors import StrategyError

FORMAT = 1
LONGEST = 300  # characters of what is told of a wrong entry
LARGEST = 1e30  # of any number in a profile, and one over it the smallest of a rate: products stay numbers
RINGS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}  # how often the data go round
KINDS = ("all_to_all", *RINGS, "send")


@dataclass(frozen=True)
class Rate:
    """What the data sheet says, and which part of it is reached."""

    peak: float
    efficiency: float = 1.0

    @property
    def achieved(self) -> float:
        return self.peak * self.efficiency


@dataclass(frozen=True)
class Link:
    """One interconnect, per device and direction. `kinds`: collectives that differ from the rest, by name."""

    peak: float  # bytes/s
    latency: float  # seconds a step
    efficiency: float = 1.0
    kinds: Mapping[str, Link] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that are reached."""
        return self.peak * self.efficiency

    def of(self, kind: str) -> Link:
        return self.kinds.get(kind, self)


@dataclass(frozen=True)
class Kernel:
    """How long one kind of kernel takes. What is None, or has no rate, takes no time.

    overhead: seconds of each, however small. memory: bytes/s. flops: FLOP/s by dtype (`"bfloat16"`). adds: arithmetic and
    traffic come one after the other.
    """

    overhead: float = 0.0
    memory: Rate | None = None
    flops: Mapping[str, Rate] = field(default_factory=dict)
    adds: bool = False

    def seconds(self, flops: float, nbytes: float, dtype: str, shards: int = 1) -> float:
        """Of a kernel of `flops` and `nbytes` shared out over `shards` devices, on each of them."""
        arithmetic = flops / self.rate(dtype).achieved if flops and self.flops else 0.0
        traffic = nbytes / self.memory.achieved if self.memory is not None else 0.0
        return self.overhead + (arithmetic + traffic if self.adds else max(arithmetic, traffic)) / shards

    def rate(self, dtype: str) -> Rate:
        """The rate of a dtype; of the two halves one stands for the other, and float32 for what is not listed."""
        for name in (dtype, *_STANDS_FOR.get(dtype, ()), "float32"):
            if name in self.flops:
                return self.flops[name]
        return next(iter(self.flops.values()))


_STANDS_FOR = {"bfloat16": ("float16",), "float16": ("bfloat16",), "complex128": ("float64",)}


@dataclass(frozen=True)
class Hardware:
    """A device, the links inside a node and between nodes, and kernels by kind or by op (see `compute.Launch`), or by one of
    these in a dtype (`"attention@bfloat16"`).

    name: of the profile. intra: the link between two devices of a node, of which there are `gpus_per_node`. kernels: by name.
    inter: between nodes; None: there is no second node. links: those of mesh dims that the user names himself, "sp" for
        "sp.0" and "sp.1" too. inside: of mesh dims that lead out of a node, how many neighbours share one (see `on`).
    host: seconds that the host spends on each op besides its kernel, where it does not run ahead of the device.
    lockstep: how much longer ranks compute when they meet in between: each time, they wait for the one that was held up.
    overlap: which part of the communication may run beside the computation, if that is more than what a program issues early:
        0 (the default) for programs as they are; up to 1 for what a compiler moves apart.
    measured: of a calibration, the mesh, the errors of the fits and where it ran.
    """

    name: str
    intra: Link
    inter: Link | None = None
    gpus_per_node: int = 8
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    inside: Mapping[str, int] = field(default_factory=dict)
    host: float = 0.0
    lockstep: float = 1.0
    overlap: float = 0.0
    measured: Mapping[str, Any] | None = None

    def on(self, mesh: Mapping[str, int]) -> Hardware:
        """This hardware under a mesh, dims outermost first: the innermost ones fill a node, the others lead out of it.

        A dim that fills the node and goes on (16 ranks, 8 to a node) is both: two nodes of eight. Raises StrategyError where
        the profile was measured on another number of ranks: what they share (cores, memory, cables) makes their numbers.
        """
        ranks = math.prod(mesh.values())
        if self.measured is not None and math.prod(self.measured["mesh"].values()) != ranks:
            raise StrategyError(
                asked=f"hardware {self.name!r} for the mesh {_shown(mesh)}",
                found=f"it was measured on {_shown(self.measured['mesh'])}",
                remedy=f"calibrate on {ranks} ranks",
            )
        inside, inner = {}, 1
        for name, size in reversed([*mesh.items()]):
            # Groups of 6 neighbours in nodes of 8 do not stay inside: of each, only pairs do for certain.
            left = 1 if self.gpus_per_node % inner else self.gpus_per_node // inner
            if ranks > self.gpus_per_node and (near := math.gcd(size, left)) < size:
                inside[name] = near
            inner *= size
        return replace(self, inside=inside)

    def link(self, mesh_dim: str) -> Link:
        """What the farthest ranks of a mesh dim meet over."""
        return self._parts([(mesh_dim, self.inside.get(mesh_dim, 1))])[0][0]

    def _parts(self, dims: Sequence[tuple[str, int]]) -> list[tuple[Link, int]]:
        """The links that a collective over `dims` crosses, outermost first, and how many ways each leads."""
        found: list[tuple[Link, int]] = []
        for name, size in dims:
            if (own := self.links.get(name) or self.links.get(name.partition(".")[0])) is not None:
                found.append((own, size))
            elif name not in self.inside or self.inter is None:
                found.append((self.intra, size))
            else:
                near = self.inside[name]
                found += [(self.inter, size // near), (self.intra, near)]
        return found

    def collective_seconds(self, kind: str, wire_bytes: float, dims: Sequence[tuple[str, int]]) -> float:
        """Seconds of one collective.

        kind: one of `KINDS`. wire_bytes: what a device sends in all of it (an all-reduce of M bytes: 2M (N-1)/N).
        dims: the mesh dims it goes over and their sizes, outermost first; usually one.
        """
        parts = [(link.of(kind), size) for link, size in self._parts(dims) if size > 1]
        ranks = math.prod(size for _, size in parts)
        if ranks == 1:
            return 0.0
        if kind == "send":
            return max(link.latency + wire_bytes / link.bandwidth for link, _ in parts)
        if kind == "all_to_all":
            shares = [share * ranks / (ranks - 1) for share in _shares_to_all(parts)]
            latency = sum(link.latency * share * (ranks - 1) for (link, _), share in zip(parts, shares))
        else:
            shares = list(_shares_of_ring(parts))
            latency = RINGS[kind] * (ranks - 1) * max(link.latency for link, _ in parts)
        # Dims over the same link (two dims inside a node) share it; different links work at the same time.
        busy: dict[int, float] = {}
        for (link, _), share in zip(parts, shares):
            busy[id(link)] = busy.get(id(link), 0.0) + share * wire_bytes / link.bandwidth
        return latency + max(busy.values())

    def kernel(self, op: str, kind: str, dtype: str = "") -> Kernel:
        """An op's own in its dtype, its kind's, the same without the dtype, and at last what only moves memory."""
        for name in (f"{op}@{dtype}", f"{kind}@{dtype}", op, kind, "memory"):
            if name in self.kernels:
                return self.kernels[name]
        return Kernel()

    def copy_seconds(self, nbytes: float) -> float:
        """Of a copy that reads and writes `nbytes`: a pack or an unpack."""
        return self.host + self.kernel("clone", "copy").seconds(0, 2 * nbytes, "")

    def exposed_seconds(self, communication: float, computation: float) -> float:
        """What is left of the communication where `overlap` of it may hide behind the computation beside it."""
        return communication - min(self.overlap * communication, computation)

    def to_json(self) -> str:
        """The profile as JSON text, as `dsp-auto calibrate` writes it."""
        return json.dumps({"format": FORMAT, **_plain(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "a hardware profile") -> Hardware:
        """Raises StrategyError where `text` is no profile: what is wrong, and with which entry."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(where, f"not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise _malformed(where, f"its format is {found!r}, and this version reads {FORMAT}")
        return _Reader(where).hardware({key: value for key, value in data.items() if key != "format"})


def _shown(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in mesh.items())


def _shares_to_all(parts: Sequence[tuple[Link, int]]) -> Iterator[float]:
    """Of a device's whole tensor, what goes to the ranks that differ in each part, and in none before it."""
    here = 1.0
    for _, size in parts:
        yield here * (size - 1) / size
        here /= size


def _shares_of_ring(parts: Sequence[tuple[Link, int]]) -> Iterator[float]:
    """Of a ring's hops, the share that crosses each part: one for every group of ranks that the part tells apart."""
    ranks, groups, before = math.prod(size for _, size in parts), 1, 0
    for _, size in parts:
        groups *= size
        yield (groups - before) / ranks
        before = groups


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


def _malformed(where: str, found: str) -> StrategyError:
    found = found if len(found) <= LONGEST else f"{found[:LONGEST]} …"
    return StrategyError(
        asked=f"cannot read {where}", found=found, remedy="write it anew with `dsp-auto calibrate --out FILE`"
    )


class _Reader:
    """Plain data as a Hardware; every entry is checked."""

    def __init__(self, where: str) -> None:
        self.where = where

    def hardware(self, data: Any) -> Hardware:
        known = self._known(data, Hardware, "the profile")
        made: dict[str, Any] = {"name": self._text(known.pop("name", None))}
        made["intra"] = self.link(known.pop("intra", None), "intra")
        if (inter := known.pop("inter", None)) is not None:
            made["inter"] = self.link(inter, "inter")
        for name, read in (("kernels", self.kernel), ("links", self.link)):
            entries = self._mapping(known.pop(name, {}), name)
            made[name] = {key: read(value, f"{name}.{key}") for key, value in entries.items()}
        inside = self._mapping(known.pop("inside", {}), "inside")
        made["inside"] = {key: self._count(value, f"inside.{key}") for key, value in inside.items()}
        made["gpus_per_node"] = self._count(known.pop("gpus_per_node", 8), "gpus_per_node")
        made["host"] = self._number(known.pop("host", 0.0), "host")
        made["lockstep"] = self._number(known.pop("lockstep", 1.0), "lockstep", above=0.0)
        made["overlap"] = self._number(known.pop("overlap", 0.0), "overlap", most=1.0)
        if (measured := known.pop("measured", None)) is not None:
            mesh = self._mapping(self._mapping(measured, "measured").get("mesh"), "measured.mesh")
            sizes = {key: self._count(value, f"measured.mesh.{key}") for key, value in mesh.items()}
            made["measured"] = {**measured, "mesh": sizes}
        return Hardware(**made)

    def link(self, data: Any, place: str) -> Link:
        known = self._known(data, Link, place)
        kinds = self._mapping(known.get("kinds", {}), f"{place}.kinds")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise _malformed(self.where, f"{place} has the collective {unknown[0]!r}, and there are {', '.join(KINDS)}")
        return Link(
            self._number(known.get("peak"), f"{place}.peak", above=0.0),
            self._number(known.get("latency"), f"{place}.latency"),
            self._number(known.get("efficiency", 1.0), f"{place}.efficiency", above=0.0),
            {kind: self.link(value, f"{place}.kinds.{kind}") for kind, value in kinds.items()},
        )

    def kernel(self, data: Any, place: str) -> Kernel:
        known = self._known(data, Kernel, place)
        memory, flops = known.get("memory"), self._mapping(known.get("flops", {}), f"{place}.flops")
        return Kernel(
            self._number(known.get("overhead", 0.0), f"{place}.overhead"),
            None if memory is None else self.rate(memory, f"{place}.memory"),
            {dtype: self.rate(value, f"{place}.flops.{dtype}") for dtype, value in flops.items()},
            self._flag(known.get("adds", False), f"{place}.adds"),
        )

    def rate(self, data: Any, place: str) -> Rate:
        known = self._known(data, Rate, place)
        return Rate(
            self._number(known.get("peak"), f"{place}.peak", above=0.0),
            self._number(known.get("efficiency", 1.0), f"{place}.efficiency", above=0.0),
        )

    def _known(self, data: Any, kind: type[Any], place: str) -> dict[str, Any]:
        fields = kind.__dataclass_fields__
        if unknown := [name for name in self._mapping(data, place) if name not in fields]:
            raise _malformed(self.where, f"{place} has {unknown[0]!r}, and may have {', '.join(fields)}")
        return dict(data)

    def _mapping(self, data: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(data, dict):
            raise _malformed(self.where, f"{place} is {data!r}, not an object")
        return data

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise _malformed(self.where, f"its name is {value!r}, not a text")
        return value

    def _count(self, value: Any, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _malformed(self.where, f"{place} is {value!r}, not a number of devices")
        return value

    def _flag(self, value: Any, place: str) -> bool:
        if not isinstance(value, bool):
            raise _malformed(self.where, f"{place} is {value!r}, neither true nor false")
        return value

    def _number(self, value: Any, place: str, above: float | None = None, most: float = math.inf) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
        if not fits or value > most or (value < 0 if above is None else value <= above + 1 / LARGEST):
            wanted = "0 or more" if above is None else f"above {above:g}"
            raise _malformed(self.where, f"{place} is {value!r}, not a number {wanted}")
        return float(value)


# Peaks are of the vendors' data sheets: dense, without sparsity; float32 without TF32, as PyTorch multiplies by default.
# Efficiencies are working values for large sizes, from what is published; `dsp-auto calibrate` replaces all of them:
#   matmul       cuBLAS on large bfloat16 products: 60 to 75% of the dense peak on Ampere and Hopper
#   attention    FlashAttention-2 (Dao 2023): on A100 up to 73% forward, 63% backward; on H100 35% (Shah et al. 2024,
#                FlashAttention-3, section 1). It is what PyTorch's flash kernel is
#   memory       large streaming kernels: 85 to 92% of the peak (BabelStream)
#   links        nccl-tests' bus bandwidth of large messages: about 80% of NVLink (370 of an H100's 450 GB/s: NVIDIA/nccl-tests
#                issue 212), 90% of InfiniBand (rings over 4 nodes of H100 at 360 GB/s, 45 a port, as NVIDIA/nccl issue 1229
#                reports; 280 over 64 nodes), 75% of PCIe. All-reduces in the switch (NVLink SHARP) are not in it
# A kernel's overhead is what the device spends on one that does nothing, where the host runs ahead; latencies are those of
# nccl-tests' smallest messages, over their steps.
_LAUNCH = 3e-6
_HOPPER = {"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12, "float64": 66.9e12}
_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 19.5e12}
# float64 at 1/64 of float32: CUDA programming guide, arithmetic of compute capability 8.9.
_ADA = {"bfloat16": 362.05e12, "float16": 362.05e12, "float32": 91.6e12, "float64": 1.43e12}
_NDR, _HDR = Link(50e9, 8e-6, 0.9), Link(25e9, 8e-6, 0.9)


def _gpu(
    name: str, peaks: Mapping[str, float], memory: float, intra: Link, inter: Link, reached: tuple[float, float, float]
) -> Hardware:
    """reached: of `peaks` (FLOP/s), by matmul, attention and its backward."""
    kernels = {"memory": Kernel(_LAUNCH, Rate(memory, 0.88)), "view": Kernel()}
    for kind, efficiency in zip(("matmul", "attention", "attention_backward"), reached):
        flops = {dtype: Rate(peak, efficiency) for dtype, peak in peaks.items()}
        kernels[kind] = Kernel(_LAUNCH, Rate(memory, 0.88), flops)
    kernels["convolution"] = kernels["matmul"]
    return Hardware(name, intra, inter, 8, kernels)


def _cpu_core(matmul: Mapping[str, float], attention: Mapping[str, float], copy: float, link: Link) -> Hardware:
    def kernel(overhead: float, memory: float, flops: Mapping[str, float]) -> Kernel:
        return Kernel(overhead, Rate(memory), {dtype: Rate(rate) for dtype, rate in flops.items()})

    kernels = {
        "memory": kernel(5e-6, copy, {}),
        "view": Kernel(2e-6),
        "matmul": kernel(5e-6, copy, matmul),
        "convolution": kernel(20e-6, copy, matmul),
        "attention": kernel(50e-6, copy, attention),
        "attention_backward": kernel(50e-6, copy, attention),
    }
    return Hardware("cpu-gloo", link, None, 1024, kernels)


PROFILES = {
    profile.name: profile
    for profile in (
        # H100 SXM5 data sheet: HBM3 3.35 TB/s; NVLink 4, 900 GB/s both ways. DGX H100: a 400 Gb/s NDR port for each GPU.
        _gpu("h100", _HOPPER, 3.35e12, Link(450e9, 3e-6, 0.8), _NDR, (0.65, 0.35, 0.33)),
        # H200 SXM data sheet: the H100's arithmetic and links; HBM3e 4.8 TB/s.
        _gpu("h200", _HOPPER, 4.8e12, Link(450e9, 3e-6, 0.8), _NDR, (0.65, 0.35, 0.33)),
        # H800 SXM data sheet: the H100 with NVLink at 400 GB/s both ways and float64 at 1 TFLOP/s.
        _gpu("h800", {**_HOPPER, "float64": 1e12}, 3.35e12, Link(200e9, 3e-6, 0.8), _NDR, (0.65, 0.35, 0.33)),
        # A100 SXM4 80GB data sheet: HBM2e 2.039 TB/s; NVLink 3, 600 GB/s both ways. DGX A100: a 200 Gb/s HDR port each.
        _gpu("a100", _AMPERE, 2.039e12, Link(300e9, 3e-6, 0.8), _HDR, (0.72, 0.65, 0.55)),
        # L40S data sheet: GDDR6 864 GB/s; PCIe 4.0 x16, 64 GB/s both ways. A server with four 200 Gb/s ports for its 8 GPUs.
        _gpu("l40s", _ADA, 864e9, Link(32e9, 6e-6, 0.75), Link(12.5e9, 10e-6, 0.9), (0.65, 0.6, 0.5)),
        # A core of an AMD EPYC with AVX-512 and gloo inside one computer, two ranks on two cores, as `dsp-auto calibrate`
        # measured it, rounded. For an idea only: calibrate your own.
        _cpu_core(
            {"float32": 75e9, "float64": 30e9, "bfloat16": 220e9},
            {"float32": 45e9, "bfloat16": 60e9},
            12e9,
            Link(1.2e9, 250e-6),
        ),
    )
}
DEFAULT = "h100"  # the profile where nothing is said
DEFAULT_ON_CPU = "cpu-gloo"  # and where processes on CPUs are to run


def as_hardware(hardware: str | PathLike | Hardware | None) -> Hardware:
    """A profile by name, from a `.json` file, or as it is; None: `DEFAULT`. Raises StrategyError for what is neither."""
    if isinstance(hardware, Hardware):
        return hardware
    if hardware is None:
        hardware = DEFAULT
    if isinstance(hardware, str) and hardware in PROFILES:
        return PROFILES[hardware]
    if isinstance(hardware, (str, PathLike)) and str(hardware).endswith(".json"):
        try:
            text = Path(hardware).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StrategyError(
                asked=f"hardware {str(hardware)!r}", found=f"cannot read it ({error})", remedy="name a file that exists"
            ) from error
        return Hardware.from_json(text, where=f"hardware {str(hardware)!r}")
    raise StrategyError(
        asked=f"hardware {hardware!r}",
        found=f"the profiles are {', '.join(PROFILES)}",
        remedy="use one, a .json file that `dsp-auto calibrate` wrote, or a Hardware",
    )
