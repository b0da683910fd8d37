"""Compiled: a parallel module's program in the form that `torch.compile` traces.

What happens around a program, looking up the plan and agreeing with the other ranks, is Python with side effects. Dynamo does
it once, while it compiles, for the call that it compiles. What it traces is `Compiled.forward`: this rank's ops, collectives,
and the parameters and buffers that they read. Its guards make it compile again for other shapes and modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .parameters import local_value
from .passes.capture import Program, ordered_kwargs, positions_of


class Compiled(nn.Module):
    """The program of one signature. Takes the arguments' leaves in the order of a call, returns what the model returns."""

    model: nn.Module
    module: fx.GraphModule
    owners: list[nn.Module]

    def __init__(
        self, model: nn.Module, program: Program, module: fx.GraphModule, sources: Sequence[Any], call: tuple, leaves: Sequence
    ) -> None:
        super().__init__()
        # Not as submodules, of which these are none.
        self.__dict__.update(model=model, module=module, owners=[])
        self.training = model.training
        # Of each placeholder: where it is read, which is an owner and a name, a leaf, or a constant.
        self.reads: list[tuple[str, Any, str, bool]] = []
        order = iter(pytree.tree_leaves((call[0], ordered_kwargs(call[1], program.in_spec))))
        for entry, source in zip(program.inputs, sources, strict=True):
            path, _, name = entry.name.rpartition(".")
            if entry.kind == "input":
                self.reads.append(("input", next(order), "", False))
            elif entry.kind == "constant":
                self.reads.append(("constant", source, "", False))
            else:
                owner = model.get_submodule(path)
                self.reads.append((entry.kind, len(self.owners), name, source.whole))
                self.owners.append(owner)
        positions = positions_of(program.inputs)
        self.changed = [positions[mutated] for mutated in program.mutated]
        outputs = program.out_spec.num_leaves
        self.result = pytree.tree_unflatten(list(range(outputs)), program.out_spec)
        self.shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]

    def forward(self, *leaves: Any) -> Any:
        # Shapes are those of the plan: what is asked here the compiler makes a guard.
        for leaf, shape in zip(leaves, self.shapes):
            if shape is not None and leaf.shape != shape:
                raise AssertionError(f"compiled for {shape}")
        if self.model.training != self.training:
            raise AssertionError("compiled for another mode")
        values = []
        for kind, where, name, whole in self.reads:
            if kind == "input":
                values.append(leaves[where])
            elif kind == "constant":
                values.append(where)
            else:
                values.append(local_value(getattr(self.owners[where], name), whole))
        given = list(values)
        for n in self.changed:
            given[n] = values[n].clone()
        results = self.module(*given)
        if self.changed:
            with torch.no_grad():
                for n, result in zip(self.changed, results):
                    values[n].copy_(result)
            results = results[len(self.changed) :]
        return pytree.tree_map(lambda n: results[n], self.result)


class Programs:
    """The compiled programs of a parallel module, each an attribute: a guard on one does not see the others."""
