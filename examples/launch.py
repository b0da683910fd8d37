"""What every training script does first: one process a GPU with NCCL, or processes of the CPU with gloo."""

import argparse
import os

import torch
import torch.distributed as dist

from dsp_auto.examples.transformer_2d import build


def start():
    """The kind of device this process computes on, "cuda" or "cpu", with the process group up."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return kind


def stop():
    dist.destroy_process_group()


def options(argv=None, **others):
    """Sizes of the model and numbers of ranks and steps, from the command line; others: further options and their defaults."""
    parser = argparse.ArgumentParser()
    sizes = dict(layers=4, hidden=256, heads=8, frames=16, tokens=64, batch=1)
    for name, default in (sizes | dict(sp=2, steps=5) | others).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    found = parser.parse_args(argv)
    return found, {name: getattr(found, name) for name in sizes}


def model_on(kind, sizes):
    """The Transformer-2D, alike on every rank."""
    model, _, _ = build(**sizes)
    return model.to(kind)


def batch(kind, sizes, step, replica=0):
    """The video of a step for one data-parallel replica, alike on its sequence-parallel ranks: [B, T, S, 4]."""
    draw = torch.Generator().manual_seed(1000 * step + replica)
    return torch.randn(sizes["batch"], sizes["frames"], sizes["tokens"], 4, generator=draw).to(kind)


def tell(step, loss, replicas=None):
    """The loss of a step, the mean over the replicas (a process group), printed on the first rank."""
    mean = loss.detach().clone()
    if replicas is not None:
        dist.all_reduce(mean, group=replicas)
        mean /= dist.get_world_size(replicas)
    if dist.get_rank() == 0:
        print(f"step {step}: loss {mean:.4f}")
    return mean.item()
