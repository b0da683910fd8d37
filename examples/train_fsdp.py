"""Sequence parallelism inside, FSDP2 outside: torchrun --nproc-per-node 4 -m dsp_auto.examples.train_fsdp --sp 2

The ranks along `sp` share one video, each with a part of its activations; FSDP shards parameters, gradients and optimizer state
over `dp`. Gradients are those of the mean loss over all videos.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop, tell


def main(argv=None):
    """The mean loss of every step."""
    chosen, sizes = options(argv, precision="bfloat16")
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size() // chosen.sp, chosen.sp), mesh_dim_names=("dp", "sp"))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, chosen.precision), reduce_dtype=torch.float32)
    whole = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, output_dtype=torch.float32)

    model = model_on(kind, sizes)
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(parallel, mesh=mesh["dp"], mp_policy=whole)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    losses = []
    for step in range(chosen.steps):
        video = batch(kind, sizes, step, replica=mesh["dp"].get_local_rank())
        loss = (parallel(video) - video).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(tell(step, loss, mesh["dp"].get_group()))
    return losses


if __name__ == "__main__":
    main()
    stop()
