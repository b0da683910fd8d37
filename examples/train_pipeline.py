"""Sequence parallelism inside the stages of a pipeline: torchrun --nproc-per-node 4 -m dsp_auto.examples.train_pipeline --sp 2

The ranks along `pp` hold some of the blocks each; those along `sp` share them, each with a part of the activations. A batch
goes through in microbatches of one video; what a stage passes on is whole on all of its ranks.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop


class Part(nn.Module):
    """The `at`-th of some stages of a Transformer-2D: [B, T, S, 4] into the first, [B, T, S, C] between them."""

    def __init__(self, model, at, stages):
        super().__init__()
        count = len(model.blocks)
        self.embed = model.embed if at == 0 else nn.Identity()
        self.blocks = model.blocks[at * count // stages : (at + 1) * count // stages]
        self.head = nn.Sequential(model.norm, model.head) if at == stages - 1 else nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, x.shape[:3])
        return self.head(x)


def main(argv=None):
    """The loss of every step, on the ranks of the last stage; an empty list on the others."""
    chosen, sizes = options(argv, batch=4)
    kind = start()
    stages = dist.get_world_size() // chosen.sp
    mesh = init_device_mesh(kind, (stages, chosen.sp), mesh_dim_names=("pp", "sp"))
    at = mesh["pp"].get_local_rank()

    parallel = dsp_auto.parallelize(Part(model_on(kind, sizes), at, stages), mesh["sp"])
    # Without example inputs it runs one microbatch to see what goes from stage to stage: that is when the plan is made.
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    stage = PipelineStage(parallel, at, stages, device, group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, sizes["batch"], loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    losses = []
    for step in range(chosen.steps):
        video = batch(kind, sizes, step)
        own = []
        schedule.step(*[video] * stage.is_first, target=video if stage.is_last else None, losses=own)
        optimizer.step()
        optimizer.zero_grad()
        if stage.is_last:
            losses.append(torch.stack(own).mean().item())
            if mesh["sp"].get_local_rank() == 0:
                print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
    stop()
