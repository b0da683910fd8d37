"""FSDP2: what `torch.distributed.fsdp.fully_shard` has made of a model's modules and parameters.

Torch has no public way to ask for a module's `MixedPrecisionPolicy`, nor which parameters it shards for a module and where else
they are registered. The private names that tell stand here alone, see `test_what_fully_shard_keeps_can_be_read`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Managed(NamedTuple):
    """A parameter that FSDP shards."""

    sharded: nn.Parameter  # a DTensor over FSDP's mesh; registered while nobody computes
    dtype: torch.dtype  # in which modules compute with it
    owners: tuple[tuple[nn.Module, str], ...]  # where it is registered, several where it is tied
    in_parts: bool  # it was a DTensor before


class Casts(NamedTuple):
    """The dtypes that FSDP gives what a module takes and returns, None: as they are."""

    inputs: torch.dtype | None
    outputs: torch.dtype | None


def managed(
    modules: Iterable[nn.Module], instead: Mapping[int, nn.Module] = MappingProxyType({})
) -> dict[tuple[int, str], Managed]:
    """The parameters that FSDP shards for these modules, by id of the module and name that each is registered under.

    instead: by id of a module, the one that shares its parameters and is meant.
    """
    found = {}
    for module in modules:
        if not isinstance(module, FSDPModule):
            continue
        for group in _groups(module):
            for own in group.fsdp_params:
                info, dtype = own._module_info, own.sharded_param.dtype
                if own.mp_policy.param_dtype is not None and own.sharded_param.is_floating_point():
                    dtype = own.mp_policy.param_dtype
                registered = [
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names, strict=True),
                ]
                owners = tuple((instead.get(id(owner), owner), name) for owner, name in registered)
                one = Managed(own.sharded_param, dtype, owners, bool(own.is_dtensor))
                found.update({(id(owner), name): one for owner, name in owners})
    return found


def _groups(module: FSDPModule) -> list[Any]:
    """What is gathered together; torch 2.11 knows one for each module, or none."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in [state._fsdp_param_group] if group is not None]


def casts(module: FSDPModule) -> Casts:
    """What `module`'s policy casts around its forward."""
    policy = module._get_fsdp_state()._mp_policy
    return Casts(policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype)


def is_hook(hook: Any) -> bool:
    """Whether a module's hook is one of FSDP's own."""
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")
