"""Random numbers of sharded work: every shard draws its own, and all ranks' generators stay in step."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def on_shard(target: Any, shard: int, *args: Any, **kwargs: Any) -> Any:
    """`target(*args, **kwargs)`, an op that draws random numbers, as the `shard`-th of the shards of one value.

    Its numbers come from a seed that all ranks draw alike, and the shard's number: other numbers in each shard, the same in
    copies of one shard. Afterwards the default generators stand where they stood on every rank, one seed further.
    """
    seed = torch.randint(2**62, ())
    if isinstance(seed, FakeTensor):
        return target(*args, **kwargs)
    devices = {leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    devices |= {torch.device(kwargs["device"])} if kwargs.get("device") is not None else set()
    own = int(seed) + shard
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    if not accelerators:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own)
            return target(*args, **kwargs)
    kind = accelerators[0].type
    module = torch.get_device_module(kind)
    index = accelerators[0].index if accelerators[0].index is not None else module.current_device()
    with torch.random.fork_rng(devices=[index], device_type=kind):
        torch.default_generator.manual_seed(own)
        module.default_generators[index].manual_seed(own)
        return target(*args, **kwargs)
