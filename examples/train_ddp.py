"""Sequence parallelism inside, DDP outside: torchrun --nproc-per-node 4 -m dsp_auto.examples.train_ddp --sp 2

The ranks along `sp` share one video, each with a part of its activations; DDP averages gradients over `dp`, and each of its
ranks keeps a part of the optimizer's state.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop, tell


def main(argv=None):
    """The mean loss of every step."""
    chosen, sizes = options(argv)
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size() // chosen.sp, chosen.sp), mesh_dim_names=("dp", "sp"))
    replicas = mesh["dp"].get_group()

    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh["sp"])
    run = DistributedDataParallel(parallel, process_group=replicas)
    optimizer = ZeroRedundancyOptimizer(run.parameters(), torch.optim.AdamW, process_group=replicas, lr=1e-3)

    losses = []
    for step in range(chosen.steps):
        video = batch(kind, sizes, step, replica=mesh["dp"].get_local_rank())
        loss = (run(video) - video).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(tell(step, loss, replicas))
    return losses


if __name__ == "__main__":
    main()
    stop()
