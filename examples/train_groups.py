"""In process groups that a framework has made: torchrun --nproc-per-node 4 -m dsp_auto.examples.train_groups --sp 2

Frameworks in Megatron's manner hold a group for each kind of parallelism and no mesh. `DeviceMesh.from_group` makes a mesh of
such a group, whatever ranks are in it; the groups of the other kinds stay with those who use them, here DDP.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import dsp_auto
from dsp_auto.examples.launch import batch, model_on, options, start, stop, tell


def groups(sp):
    """This rank's sequence-parallel group, of `sp` neighbours, and its data-parallel one, of every `sp`-th rank."""
    own, ranks = dist.get_rank(), range(dist.get_world_size())
    of_sequences = [ranks[first : first + sp] for first in ranks[::sp]]
    of_replicas = [ranks[first::sp] for first in ranks[:sp]]
    # Every rank makes every group, in one order.
    made = [[(line, dist.new_group(list(line))) for line in lines] for lines in (of_sequences, of_replicas)]
    return [next(group for line, group in kind if own in line) for kind in made]


def main(argv=None):
    """The mean loss of every step."""
    chosen, sizes = options(argv)
    kind = start()
    sequences, replicas = groups(chosen.sp)
    mesh = DeviceMesh.from_group(sequences, kind, mesh_dim_names=("sp",))

    parallel = dsp_auto.parallelize(model_on(kind, sizes), mesh)
    run = DistributedDataParallel(parallel, process_group=replicas)
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-3)

    losses = []
    for step in range(chosen.steps):
        video = batch(kind, sizes, step, replica=dist.get_rank(replicas))
        loss = (run(video) - video).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(tell(step, loss, replicas))
    return losses


if __name__ == "__main__":
    main()
    stop()
