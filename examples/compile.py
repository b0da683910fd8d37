"""A parallel module under torch.compile: torchrun --nproc-per-node 2 -m dsp_auto.examples.compile

One graph of this rank's ops and collectives, which the compiler may fuse and move apart. On a CPU the default backend needs a
C++ compiler; `--backend aot_eager` does not.
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop


def main(argv=None):
    """The loss of every step."""
    chosen, sizes = options(argv, backend="inductor")
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("sp",))
    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh)
    compiled = torch.compile(parallel, backend=chosen.backend, fullgraph=True)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    losses = []
    for step in range(chosen.steps):
        started = time.perf_counter()
        video = batch(kind, sizes, step)
        loss = (compiled(video) - video).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.4f}, {time.perf_counter() - started:.3f} s")
    return losses


if __name__ == "__main__":
    main()
    stop()
