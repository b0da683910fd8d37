"""With Hugging Face Accelerate: accelerate launch --num_processes 4 -m dsp_auto.examples.train_accelerate --sp 2

`prepare` wraps the parallel module in DistributedDataParallel over all ranks: the mean over `dp` and `sp` together is the mean
over `dp`, as gradients are equal along `sp`. Only the loader has to know of `dp`, because ranks along `sp` need the same batch.
"""

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, stop


def main(argv=None):
    """The mean loss of every step."""
    chosen, sizes = options(argv, precision="no", accumulate=1)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=chosen.precision,
        gradient_accumulation_steps=chosen.accumulate,
    )
    kind, dp = accelerator.device.type, accelerator.num_processes // chosen.sp
    mesh = init_device_mesh(kind, (dp, chosen.sp), mesh_dim_names=("dp", "sp"))

    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh["sp"])
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    run, optimizer = accelerator.prepare(parallel, optimizer)
    videos = [video for step in range(chosen.steps) for replica in range(dp) for video in batch("cpu", sizes, step, replica)]
    # `accelerator.prepare` would give every rank a batch of its own.
    loader = prepare_data_loader(
        DataLoader(videos, sizes["batch"]),
        accelerator.device,
        num_processes=dp,
        process_index=mesh["dp"].get_local_rank(),
        put_on_device=True,
    )

    losses = []
    for step, video in enumerate(loader):
        with accelerator.accumulate(run):
            loss = (run(video) - video).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
    stop()
