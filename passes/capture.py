"""Capture: an unmodified `nn.Module` and example arguments become a functional graph of whole ATen ops.

`torch.export.export(strict=False)` gives pre-dispatch ATen, in which `linear`, `layer_norm` and attention stay whole and
autograd works. Only where the graph mutates or holds autocast regions is it made functional, which costs as much again.
The graph is then propagated (see `propagate`), and no gradient of the model may be lost on the way (`check_gradients`).
"""

from __future__ import annotations

import copy
import inspect
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import traceback as fx_traceback
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError, first_lines
from dsp_auto.pipelined import called_by_stage

from .check_gradients import check_gradients, unchanged
from .checkpointing import marking
from .hooks import Hooks, traced
from .inline_no_grad import inline_no_grad
from .normalize import compose, drop_assertions, drop_empty_parts, write_out_shapes
from .propagate import Saved, propagate
from .quiet import quiet

aten = torch.ops.aten


@dataclass(frozen=True)
class GraphInput:
    """One placeholder: a `parameter` or `buffer` (`name` is its state_dict path), a `constant`, or a user `input`.

    same_as: of a parameter or buffer that the model has under several names, the one whose placeholder counts, if not its own.
    """

    kind: str
    name: str
    value: Any = None  # the tensor of a constant
    same_as: str | None = None


# PyTorch keeps for ever what ops gave on fake tensors, 2 KB a call: many signatures would fill the memory.
MOST_FAKE_RESULTS = 20_000


@dataclass(frozen=True)
class Program:
    """A captured model: `graph` takes `inputs` in order and returns outputs, those of `mutated` first."""

    module: fx.GraphModule
    inputs: tuple[GraphInput, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    mutated: tuple[tuple[str, str], ...]  # (kind, name) written back from the first outputs
    training: bool  # gradients will be asked for
    saved: Mapping[str, Saved]  # per op node, what is kept for backward, or in a checkpoint made again for it
    seconds: Mapping[str, float] = field(default_factory=dict)
    staged: bool = False  # a stage of a pipeline calls it

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def __str__(self) -> str:
        return str(self.graph)


def positions_of(inputs: Sequence[GraphInput]) -> dict[tuple[str, str], int]:
    """Where each of some inputs stands, by kind and name."""
    return {(entry.kind, entry.name): n for n, entry in enumerate(inputs)}


def capture(
    model: nn.Module,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    hooks: Hooks | None = None,
) -> Program:
    """Capture `model(*args, **kwargs)`.

    The model and its tensors may be real, fake or on `meta`; nothing is computed and nothing in it changes. Whether
    gradients are wanted is read off `torch.is_grad_enabled()` and the tensors' `requires_grad`. hooks: those of the model that
    are known to run at every call; None: they are found.

    Raises CaptureError where the arguments are not those of `forward`, where the model does not export, with export's own
    reason and the submodule it happened in, and where the captured graph would lose or change a gradient that the model
    has.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    _check_call(model, args, kwargs)
    _check_whole(model)
    check_not_zero_3(model)
    if FakeTensorMode.cache_info().size > MOST_FAKE_RESULTS:
        FakeTensorMode.cache_clear()
    fake, args, kwargs = _without_meta(model, args, kwargs)
    with unchanged(fake), traced(fake, args, kwargs, hooks):
        return _capture(fake, args, kwargs)


def _capture(fake: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Program:
    started = time.perf_counter()
    exported = _export(fake, args, kwargs)
    exported_at = time.perf_counter()
    grads = _grad_flags(fake, _inputs(exported), args, kwargs, exported)
    inline_no_grad(exported.graph_module, grads)
    if _needs_functionalization(exported.graph_module):
        exported = _functional(exported, fake)
        compose(exported.graph_module.graph)
        for node in exported.graph_module.graph.nodes:
            if node.target is aten.view.default:  # strides in this trace are not those of a run that keeps gradients
                node.target = aten.reshape.default
    module = exported.graph_module
    write_out_shapes(module.graph)
    drop_empty_parts(module.graph)
    inputs = _with_same(_inputs(exported), fake, module.graph)
    mutated = _mutated(exported)
    drop_assertions(module.graph)
    training, saved, leaves = propagate(module, grads)
    if any(grads):
        kwargs = ordered_kwargs(kwargs, exported.call_spec.in_spec)
        check_gradients(fake, args, kwargs, module, [(entry.kind, entry.name) for entry in inputs], leaves)
    return Program(
        module=module,
        inputs=inputs,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        mutated=mutated,
        training=training,
        saved=saved,
        seconds={"export": exported_at - started, "capture": time.perf_counter() - started},
        staged=called_by_stage(),
    )


def _check_call(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    if model._forward_pre_hooks:
        return  # they may give forward other arguments
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # nothing that Python can tell
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            asked=f"cannot call {type(model).__name__}.forward{signature} with the arguments given",
            found=str(error),
            remedy=f"pass what forward takes; given are {len(args)} by position"
            + (f" and {', '.join(kwargs)} by name" if kwargs else ""),
        ) from error


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise CaptureError(
                asked=f"cannot capture {type(model).__name__}",
                found=f"{name} is a DTensor over {parameter.device_mesh}, placed as {parameter.placements}",
                where=name.rpartition(".")[0] or None,
                remedy="plan with the model as it is before fully_shard or distribute_module; `parallelize` takes what "
                "fully_shard has sharded, and what it holds in parts itself over the mesh that it is given",
            )


def check_not_zero_3(model: nn.Module) -> None:
    """Raises CaptureError for parameters that DeepSpeed's ZeRO-3 has cut: its hooks cannot run on fake tensors."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):  # by which DeepSpeed itself tells them
            raise CaptureError(
                asked=f"cannot capture {type(model).__name__}",
                found=f"{name} belongs to DeepSpeed's ZeRO-3, whose hooks bring it together while modules run",
                where=name.rpartition(".")[0] or None,
                remedy="in place of ZeRO-3 use fully_shard, which shards parameters too, or DeepSpeed with stage 1 or 2",
            )


def _without_meta(model: nn.Module, args: tuple, kwargs: dict) -> tuple[nn.Module, tuple, dict]:
    """Meta tensors become fake CPU tensors: on `meta` attention takes its math path, whose shapes are not the real ones.

    In a copy of the model. What is one tensor in two places stays one.
    """
    held = [*model.parameters(), *model.buffers()]
    tensors = [t for t in (*held, *pytree.tree_leaves((args, kwargs))) if isinstance(t, torch.Tensor)]
    if not any(t.is_meta and not isinstance(t, FakeTensor) for t in tensors):
        return model, args, kwargs
    modes = [t.fake_mode for t in tensors if isinstance(t, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def to_fake(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or isinstance(t, FakeTensor):
            return t
        if id(t) not in made:
            with mode:
                fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.is_meta else t.device)
            is_parameter = isinstance(t, nn.Parameter)
            made[id(t)] = nn.Parameter(fake, t.requires_grad) if is_parameter else fake.requires_grad_(t.requires_grad)
        return made[id(t)]

    copied = copy.deepcopy(model, {id(t): to_fake(t) for t in held})
    return copied, *pytree.tree_map(to_fake, (args, kwargs))


def _export(model: nn.Module, args: tuple, kwargs: dict) -> torch.export.ExportedProgram:
    try:
        with marking() as marks, quiet():
            exported = torch.export.export(model, args, kwargs, strict=False)
            if marks.count and torch.is_grad_enabled():
                with fx_traceback.preserve_node_meta():  # which keeps the marks, and takes a little longer
                    exported = torch.export.export(model, args, kwargs, strict=False)
        return exported
    except Exception as error:
        by_value = "data-dependent" in str(error)
        reason = "the value of a tensor decides what runs" if by_value else first_lines(error)
        reason += _place(error)
        where = _failing_module(model, args, kwargs)
        raise CaptureError(
            asked=f"cannot capture {type(model).__name__} with torch.export",
            found=reason,
            where=where or None,
            remedy="make torch.export.export(model, args, kwargs, strict=False) succeed: the usual causes are control flow "
            "that depends on tensor values and .item()",
        ) from error


def _place(error: BaseException) -> str:
    """Where in the user's code an error came from."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    if not frames:
        return ""
    shown = frames[-1].filename.rpartition(f"site-packages{os.sep}")[2]  # of a library, from its name on
    return f" ({shown}:{frames[-1].lineno} in {frames[-1].name})"


def _functional(exported: torch.export.ExportedProgram, model: nn.Module) -> torch.export.ExportedProgram:
    try:
        return exported.run_decompositions({aten.copy.default: _copy})
    except Exception as error:
        raise CaptureError(
            asked=f"cannot make the captured {type(model).__name__} functional",
            found=first_lines(error) + _place(error),
            remedy="keep numbers that are read from tensors (.item(), .tolist()) out of forward()",
        ) from error


def _failing_module(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """The innermost submodule that runs when export fails, found by exporting once more with hooks on."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, a: stack.append(names.get(id(m), ""))),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with quiet():
            torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        return next((name for name in reversed(stack) if name), "")
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def _copy(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `aten.copy` (an assignment made functional) gives, by ops that have a derivative."""
    return source.to(destination).expand(destination.shape)


def _needs_functionalization(module: fx.GraphModule) -> bool:
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return True
    return False


_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


def _inputs(exported: torch.export.ExportedProgram) -> tuple[GraphInput, ...]:
    found = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in _KINDS:
            raise CaptureError(
                asked="cannot capture the model",
                found=f"its graph takes {spec.arg.name} ({spec.kind.name}), which has no layout",
                remedy="keep tokens and custom objects out of forward()",
            )
        kind = _KINDS[spec.kind]
        name = spec.target if kind != "input" else spec.arg.name
        value = exported.constants[spec.target] if kind == "constant" else None
        found.append(GraphInput(kind, name, value))
    return tuple(found)


def _with_same(inputs: tuple[GraphInput, ...], model: nn.Module, graph: fx.Graph) -> tuple[GraphInput, ...]:
    held = _held(model)
    chosen: dict[int, str] = {}
    tensors = [id(held[entry.name]) if entry.kind in ("parameter", "buffer") else None for entry in inputs]
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    # Export takes all uses from one of the names, not always the first.
    for is_used in (True, False):
        for entry, tensor, node in zip(inputs, tensors, nodes, strict=True):
            if tensor is not None and bool(node.users) == is_used:
                chosen.setdefault(tensor, entry.name)
    others = [chosen[tensor] if tensor is not None else entry.name for entry, tensor in zip(inputs, tensors)]
    return tuple(
        replace(entry, same_as=other) if other != entry.name else entry for entry, other in zip(inputs, others)
    )


def _held(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _mutated(exported: torch.export.ExportedProgram) -> tuple[tuple[str, str], ...]:
    found = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            found.append(("buffer", spec.target))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            found.append(("input", spec.target))
        elif spec.kind != OutputKind.USER_OUTPUT:
            name = getattr(spec, "target", None) or spec.arg.name
            raise CaptureError(
                asked="cannot capture the model",
                found=f"forward() changes {name} in place ({spec.kind.name.lower().replace('_', ' ')})",
                where=name.rpartition(".")[0] or None,
                remedy="change parameters before: in the constructor, or by one forward pass if it does so only once",
            )
    return tuple(found)


def _grad_flags(
    model: nn.Module, inputs: Sequence[GraphInput], args: tuple, kwargs: dict[str, Any], exported: torch.export.ExportedProgram
) -> list[bool]:
    """Whether each placeholder of the graph requires grad, which buffers and constants may do as well."""
    if not torch.is_grad_enabled():
        return [False] * len(inputs)
    held = _held(model)
    leaves = iter(pytree.tree_leaves((args, ordered_kwargs(kwargs, exported.call_spec.in_spec))))
    flags = []
    for entry in inputs:
        if entry.kind == "input":
            leaf = next(leaves)
            flags.append(isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        else:
            flags.append((entry.value if entry.kind == "constant" else held[entry.name]).requires_grad)
    return flags


def ordered_kwargs(kwargs: Mapping[str, Any], in_spec: pytree.TreeSpec) -> dict[str, Any]:
    """`kwargs` in the order in which the exported program flattens them."""
    _, ordered = pytree.tree_unflatten([None] * in_spec.num_leaves, in_spec)
    return {name: kwargs[name] for name in ordered}
