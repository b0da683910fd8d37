"""Memory of a step on one device: what a plan says, what running its program shows, and what a process really takes.

Three measurements, each in fresh processes:

    (default)   the paper's Transformer-2D at 720M and 3B, Latte and Evoformer on 1, 8 and 64 devices, in training with and
                without recomputation of every block, and in inference, all on fake tensors. Predicted: `plan.memory`; tracked:
                `dsp_auto.track` on the local program of the first device; MemTracker: PyTorch's own tracker on the same
                program (where it differs from tracked, it adds gradients out of place, which no real run does)
    --real      forward and backward of a Transformer-2D on this CPU, at 0.5 to 2 GB: the growth of the resident memory, by the
                high-water mark that Linux keeps, for one process and for two gloo ranks
    --presets   activations at the peak on 8 devices under each strategy, tracked (the paper's figure 9)

All bytes are on one device: parameters, buffers, inputs, activations and gradients, no optimizer. Prints tables, writes JSON.

    python benchmarks/memory.py [--real] [--presets] [--only SUBSTRING ...] [--out benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dsp_auto
from dsp_auto.errors import DspError
from dsp_auto.examples.transformer_2d import build
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.passes.checkpointing import local_module
from dsp_auto.planner import Options, decide, finish, prepare
from dsp_auto.predict import fake_input, requires_grad_flags
from dsp_auto.spawn import spawn
from dsp_auto.track import track
from tests.zoo.evoformer import EvoformerBlock

MESHES = ("1", "8", "64")
MODES = ("training", "recompute", "inference")
STRATEGIES = ("dsp", "ulysses", "megatron-lm", "megatron-sp", "ring")
VIDEO = {"frames": 64, "tokens": 1024, "dtype": "bfloat16"}
REAL = {"layers": 2, "hidden": 512, "heads": 8, "tokens": 512}
FRAMES = {"training": 16, "recompute": 64, "inference": 128}
SMALL = {"layers": 1, "hidden": 64, "heads": 8, "frames": 4, "tokens": 8}
# Every tensor of some size gets pages of its own, which go back when it does.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}


def latte(frames: int = 64, size: int = 32, layers: int = 28, text: int = 120) -> tuple:
    """Latte-1 of diffusers, with its own checkpoints."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers,
        cross_attention_dim=1152, sample_size=size, patch_size=2, caption_channels=4096, video_length=frames,
        norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False, attention_bias=True,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    video, prompt = torch.randn(1, 4, frames, size, size), torch.randn(1, text, 4096)
    return model, (video,), {"timestep": torch.tensor([3]), "encoder_hidden_states": prompt, "return_dict": False}


class Evoformer(nn.Module):
    """AlphaFold's trunk without what comes before and after it: MSA [1, S, R, 256] and pairs [1, R, R, 128]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvoformerBlock(c_m=256, c_z=128, heads=8, dim=32) for _ in range(layers))

    def forward(self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            m, z = block(m, z, msa_mask, pair_mask)
        return m, z


def evoformer(layers: int = 4, rows: int = 128, columns: int = 256) -> tuple:
    m, z = torch.randn(1, rows, columns, 256), torch.randn(1, columns, columns, 128)
    return Evoformer(layers), (m, z, torch.ones(1, rows, columns), torch.ones(1, columns, columns)), {}


MODELS = {
    "Transformer-2D 720M": functools.partial(build, layers=28, hidden=1152, heads=16, **VIDEO),
    "Transformer-2D 3B": functools.partial(build, layers=36, hidden=2048, heads=32, **VIDEO),
    "Latte": latte,
    "Evoformer": evoformer,
}


def made(name: str, mode: str) -> tuple:
    """A model of `MODELS` on fake weights."""
    model, args, kwargs = MODELS[name]()
    model.train(mode != "inference")
    if mode == "recompute":
        recomputing(model)
    return model, args, kwargs


def recomputing(model: nn.Module) -> None:
    """Puts every block under a checkpoint."""
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
        return
    for block in model.blocks:
        block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=False)


class Loss(torch.autograd.Function):
    """A loss whose gradients take as much as what they are of, and nothing else."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(x) for x in ctx.saved_tensors)


def step(run: Any, inputs: Sequence[Any]) -> None:
    """Forward, and backward where there is one; the outputs are held until it ends."""
    results = run(*inputs)
    outputs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        loss = Loss.apply(*outputs)
        torch.autograd.backward(loss, loss.new_empty(0))


# --- on fake tensors


def fake(name: str, mode: str, meshes: Sequence[str], strategy: str | None = None) -> list[dict[str, Any]]:
    """One model in one mode on all meshes, in this process."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = made(name, mode)
    rows = []
    with torch.set_grad_enabled(mode != "inference"):
        program = capture(model, args, kwargs)
        for mesh in meshes:
            row = {"model": name, "mode": mode, "devices": mesh, "strategy": strategy}
            try:
                prepared = prepare(program, as_mesh(mesh), Options.of(strategy=strategy, optimizer=None))
                plan, graph = finish(prepared, decide(prepared))
            except DspError as error:
                rows.append(row | {"failed": str(error)})
                continue
            tracked = track(program, graph)
            top = next(m for m in tracked.curve if m.high == tracked.peak_bytes)
            row |= {"predicted": plan.memory["peak_bytes"], "tracked": tracked.peak_bytes, "base": tracked.base_bytes}
            row |= {"at": f"{top.phase} of {top.where}", "at_peak": dict(tracked.at_peak)}
            if strategy is None:
                row["memtracker"] = by_memtracker(program, graph)
            rows.append(row)
    return rows


def by_memtracker(program: Any, graph: Any) -> int:
    """The same step under PyTorch's tracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    local = local_module(graph, program.module)
    # Its hooks on calls of modules hold gradients, so that autograd copies those of leaves. Nobody calls these as modules.
    for name, body in list(local.named_children()):
        delattr(local, name)
        setattr(local, name, body.forward)
    given = [node.meta.get("val") for node in local.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [fake_input(value, wanted) for value, wanted in zip(given, requires_grad_flags(program), strict=True)]
        tracker = MemTracker()
        tracker.track_external(*(x for x in inputs if isinstance(x, Tensor)))
        with tracker:
            step(local.forward, inputs)
        found = tracker.get_tracker_snapshot("peak")
    return sum(device["Total"] for device in found.values())


# --- for real


def resident(what: str) -> int:
    """Bytes: `VmRSS` now, or `VmHWM` the most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def real(rank: int, ranks: int, mode: str) -> dict[str, Any]:
    """One step of one rank: predicted, tracked, and how much its memory grew. What is there all the time is not measured."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)) if ranks > 1 else None
    with torch.set_grad_enabled(mode != "inference"):
        one_real(mesh, mode, SMALL)  # libraries fill what they keep
        return one_real(mesh, mode, REAL | {"frames": FRAMES[mode]})


def one_real(mesh: Any, mode: str, sizes: dict[str, Any]) -> dict[str, Any]:
    model, args, kwargs = build(**sizes)
    if mode == "recompute":
        recomputing(model)
    program = capture(model, args, kwargs)
    prepared = prepare(program, as_mesh("1" if mesh is None else mesh), Options.of(optimizer=None))
    plan, graph = finish(prepared, decide(prepared), 0 if mesh is None else mesh.get_local_rank())
    tracked = track(program, graph)
    if mesh is None:
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        inputs = [args[0] if entry.kind == "input" else held[entry.name] for entry in program.inputs]
        run = local_module(graph, program.module)
    else:
        inputs, parallel = args, dsp_auto.parallelize(model, mesh, args)

        def run(*given: Tensor) -> tuple[Tensor]:
            return (parallel(*given),)

    gc.collect()
    gc.disable()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    step(run, inputs)
    gc.enable()
    grown = resident("VmHWM") - before
    measured = tracked.base_bytes + grown
    return {"predicted": plan.memory["peak_bytes"], "tracked": tracked.peak_bytes, "measured": measured}


# --- all of it


def apart(*job: Any) -> Any:
    """A job in a fresh process."""
    argv = [sys.executable, __file__, "--once", json.dumps(job)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (MALLOC if job[0] == "real" else {})
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()[-1])


def once(what: str, *job: Any) -> Any:
    warnings.filterwarnings("ignore")
    if what == "fake":
        return fake(*job)
    ranks, mode = job
    return [real(0, 1, mode)] if ranks == 1 else spawn(real, ranks, mode)


def gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**30:.3f}"


def over(a: int, b: int | None) -> str:
    return f"{a / b:.3f}" if b else ""


def shown(row: dict[str, Any]) -> list[str]:
    cells = [row["model"], row["mode"], row["devices"]]
    if "failed" in row:
        return [*cells, row["failed"][:80]]
    sizes = [gib(row[key]) for key in ("predicted", "tracked", "memtracker")]
    return [*cells, *sizes, over(row["predicted"], row["tracked"]), over(row["predicted"], row["memtracker"]), row["at"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--presets", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="models")
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(once(*options.once)))
        return
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {"torch": torch.__version__}
    if options.real:
        found["real"] = real_table()
    if options.presets:
        found["presets"] = presets_table()
    if not options.real and not options.presets:
        found["fake"] = fake_table([name for name in MODELS if any(part in name for part in options.only)], options.meshes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def fake_table(names: Sequence[str], meshes: Sequence[str]) -> dict[str, Any]:
    rows = []
    for name in names:
        for mode in MODES:
            rows += apart("fake", name, mode, meshes)
            print(name, mode, file=sys.stderr)
    head = ["model", "mode", "devices", "predicted GiB", "tracked", "MemTracker", "/tracked", "/MemTracker", "peak at"]
    print(tabulate.tabulate([shown(row) for row in rows], head, disable_numparse=True))
    planned = [row for row in rows if "failed" not in row]
    ratios = {
        other: [row["predicted"] / row[other] for row in planned] for other in ("tracked", "memtracker") if planned
    }
    bounds = {other: [min(own), max(own)] for other, own in ratios.items()}
    for other, (low, high) in bounds.items():
        print(f"\npredicted over {other}: {low:.3f} to {high:.3f} (bar 0.98 to 1.05)")
    return {"rows": rows, "predicted_over": bounds, "bar": [0.98, 1.05]}


def real_table() -> list[dict[str, Any]]:
    rows = []
    for ranks in (1, 2):
        for mode in MODES:
            own = apart("real", ranks, mode)
            rows += [{"ranks": ranks, "rank": rank, "mode": mode} | found for rank, found in enumerate(own)]
    cells = [
        [row["ranks"], row["rank"], row["mode"], *(gib(row[key]) for key in ("predicted", "tracked", "measured"))]
        + [over(row[key], row["measured"]) for key in ("predicted", "tracked")]
        for row in rows
    ]
    head = ["ranks", "rank", "mode", "predicted GiB", "tracked", "resident", "predicted/resident", "tracked/resident"]
    print(tabulate.tabulate(cells, head, disable_numparse=True))
    return rows


def presets_table() -> list[dict[str, Any]]:
    rows = [row for s in STRATEGIES for row in apart("fake", "Transformer-2D 720M", "training", ["8"], s)]
    cells = [
        [row["strategy"], row["failed"]]
        if "failed" in row
        else [row["strategy"], *map(gib, (row["at_peak"]["activations"], row["tracked"], row["base"])), row["at"]]
        for row in rows
    ]
    head = ["strategy", "activations GiB", "all at the peak", "parameters and inputs", "peak at"]
    print(tabulate.tabulate(cells, head, disable_numparse=True))
    return rows


if __name__ == "__main__":
    main()
