"""Save on some ranks, go on with others: torchrun --nproc-per-node 2 -m dsp_auto.examples.checkpoint --folder /tmp/run

Goes on where `folder` holds a checkpoint, whatever strategy and number of ranks wrote it; the plain model loads it as well.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop, tell


def main(argv=None):
    """The loss of every step."""
    chosen, sizes = options(argv, folder="checkpoint", strategy="dsp")
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("sp",))
    # Planned at once: where the plan holds parameters in parts, they are so before the optimizer is made.
    video = batch(kind, sizes, 0)
    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh, (video,), strategy=chosen.strategy)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    first = 0
    if os.path.isdir(chosen.folder):
        model_state, optimizer_state = get_state_dict(parallel, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "steps": 0}
        dcp.load(state, checkpoint_id=chosen.folder)
        set_state_dict(
            parallel, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        first = state["steps"]
    losses = []
    for step in range(first, first + chosen.steps):
        video = batch(kind, sizes, step)
        loss = (parallel(video) - video).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(tell(step, loss))
    model_state, optimizer_state = get_state_dict(parallel, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "steps": first + chosen.steps}
    dcp.save(state, checkpoint_id=chosen.folder)
    return losses


if __name__ == "__main__":
    main()
    stop()
