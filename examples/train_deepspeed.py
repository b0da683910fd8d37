"""Sequence parallelism inside, DeepSpeed outside: torchrun --nproc-per-node 4 -m dsp_auto.examples.train_deepspeed --sp 2

ZeRO is told nothing of `sp`: it averages gradients over all ranks, which is the mean over `dp`, as they are equal along `sp`,
and cuts the optimizer's state (stage 1) and gradients (stage 2) over all ranks.
"""

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop, tell


def main(argv=None):
    """The mean loss of every step."""
    chosen, sizes = options(argv, stage=2)
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size() // chosen.sp, chosen.sp), mesh_dim_names=("dp", "sp"))
    config = {
        # Not `train_batch_size`, which counts a batch for every rank, and not `sequence_parallel_size`: DeepSpeed's own
        # sequence parallelism leaves it to DeepSpeed to add gradients up along `sp`.
        "train_micro_batch_size_per_gpu": sizes["batch"],
        "zero_optimization": {"stage": chosen.stage},
        "gradient_clipping": 1.0,
    }
    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh["sp"])
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=parallel, optimizer=optimizer, config=config)

    losses = []
    for step in range(chosen.steps):
        video = batch(kind, sizes, step, replica=mesh["dp"].get_local_rank())
        loss = (engine(video) - video).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(tell(step, loss, mesh["dp"].get_group()))
    return losses


if __name__ == "__main__":
    main()
    stop()
