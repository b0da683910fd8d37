"""What runs below autograd, in order."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class RunOrder(TorchDispatchMode):
    """`ran`: names of ops, `mm`, `all_to_all_single`, `wait_tensor`, as they run inside; backward's too."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.name().removeprefix("aten::").removeprefix("_c10d_functional::").partition(".")[0])
        return func(*args, **(kwargs or {}))
