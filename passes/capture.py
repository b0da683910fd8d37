"""Capture: an unmodified `nn.Module` and example arguments become a functional graph of whole ATen ops.

`torch.export.export(strict=False)` gives pre-dispatch ATen, in which `linear`, `layer_norm` and attention stay whole and
autograd works. Only where the graph mutates or holds autocast regions is it made functional, which costs as much again.
The graph is then run once on fake tensors, which gives every value's `requires_grad`, what autograd saves for backward
(counted by storage, not guessed per op), and a check that no gradient of the model was lost on the way.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from dsp_auto.errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True)
class GraphInput:
    """One placeholder: a `parameter` or `buffer` (`name` is its state_dict path), a `constant`, or a user `input`."""

    kind: str
    name: str
    value: Any = None  # the tensor of a constant


@dataclass(frozen=True)
class Saved:
    """Memory that autograd keeps for backward from the execution of one op.

    `values` are the graph values (node name, index) it keeps; `internal_bytes` is what only the op knows (the
    statistics of a norm, the log-sum-exp of attention).
    """

    values: tuple[tuple[str, int], ...] = ()
    internal_bytes: int = 0


@dataclass(frozen=True)
class Program:
    """A captured model: `graph` takes `inputs` in order and returns outputs, those of `mutated` first."""

    module: fx.GraphModule
    inputs: tuple[GraphInput, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    mutated: tuple[tuple[str, str], ...]  # (kind, name) written back from the first outputs
    training: bool  # gradients will be asked for
    saved: Mapping[str, Saved]  # per op node
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def __str__(self) -> str:
        return str(self.graph)


def capture(model: nn.Module, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture `model(*args, **kwargs)`.

    The model and its tensors may be real, fake or on `meta`; nothing is computed and nothing in it changes. Whether
    gradients are wanted is read off `torch.is_grad_enabled()` and the tensors' `requires_grad`.

    Raises CaptureError where the model does not export, with export's own reason and the submodule it happened in, and
    where the captured graph would lose or change a gradient that the model has.
    """
    kwargs = dict(kwargs or {})
    started = time.perf_counter()
    fake, args, kwargs = _without_meta(model, tuple(args), kwargs)
    exported = _export(fake, args, kwargs)
    exported_at = time.perf_counter()
    _inline_no_grad(exported.graph_module)
    if _needs_functionalization(exported.graph_module):
        exported = exported.run_decompositions({aten.copy.default: _copy})
    module = exported.graph_module
    inputs = _inputs(exported)
    mutated = _mutated(exported)
    _drop_assertions(module.graph)
    grads = _grad_flags(fake, inputs, args, kwargs, exported)
    training, saved, leaves = propagate(module, grads)
    if any(grads):
        _check_gradients(fake, args, kwargs, module, inputs, leaves, len(mutated))
    return Program(
        module=module,
        inputs=inputs,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        mutated=mutated,
        training=training,
        saved=saved,
        seconds={"export": exported_at - started, "capture": time.perf_counter() - started},
    )


def _without_meta(model: nn.Module, args: tuple, kwargs: dict) -> tuple[nn.Module, tuple, dict]:
    """Meta tensors become fake CPU tensors: on `meta` attention takes its math path, whose shapes are not the real ones."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    if not any(isinstance(t, torch.Tensor) and t.is_meta and not isinstance(t, FakeTensor) for t in tensors):
        return model, args, kwargs
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def to_fake(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or isinstance(t, FakeTensor):
            return t
        with mode:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.is_meta else t.device)
        return made.requires_grad_(t.requires_grad) if t.is_leaf else made

    model = copy.deepcopy(model) if not any(isinstance(t, FakeTensor) for t in tensors) else model
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = memo.get(id(parameter)) or nn.Parameter(to_fake(parameter.data), parameter.requires_grad)
                memo[id(parameter)] = module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_fake(buffer)
    return model, *pytree.tree_map(to_fake, (args, kwargs))


def _export(model: nn.Module, args: tuple, kwargs: dict) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        reason = _first_lines(error)
        where = _failing_module(model, args, kwargs)
        raise CaptureError(
            asked=f"cannot capture {type(model).__name__} with torch.export",
            found=reason,
            where=where or None,
            remedy="make torch.export.export(model, args, kwargs, strict=False) succeed: the usual causes are control flow "
            "that depends on tensor values and .item()",
        ) from error


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[:limit] + " …"


def _failing_module(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """The innermost submodule that runs when export fails, found by exporting once more with hooks on."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, a: stack.append(names.get(id(m), ""))),
        nn.modules.module.register_module_forward_hook(lambda m, a, out: stack.pop() and None),
    ]
    try:
        torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        return next((name for name in reversed(stack) if name), "")
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def _inline_no_grad(module: fx.GraphModule) -> None:
    """A region under `no_grad` becomes its ops and a `detach` of what leaves it."""
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not region:
            continue
        enabled, body, *operands = node.args
        inner = getattr(module, body.target)
        _inline_no_grad(inner)
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        env = dict(zip(placeholders, operands, strict=True))
        for attribute in [n for n in inner.graph.nodes if n.op == "get_attr"]:
            name = f"{node.name}_{attribute.target}".replace(".", "_")
            setattr(module, name, getattr(inner, attribute.target))
            with graph.inserting_before(node):
                env[attribute] = graph.get_attr(name)
        with graph.inserting_before(node):
            for n in inner.graph.nodes:
                if n.op == "call_function":
                    env[n] = graph.node_copy(n, env.__getitem__)
            results = []
            for result in inner.graph.output_node().args[0]:
                new = env[result] if isinstance(result, fx.Node) else result
                if not enabled and isinstance(new, fx.Node):
                    value = new.meta.get("val")
                    new = graph.call_function(aten.detach.default, (new,))
                    new.meta["val"] = value
                results.append(new)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


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


def _mutated(exported: torch.export.ExportedProgram) -> tuple[tuple[str, str], ...]:
    found = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            found.append(("buffer", spec.target))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            found.append(("input", spec.target))
        elif spec.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(f"cannot capture the model: its graph returns {spec.arg.name} ({spec.kind.name}).")
    return tuple(found)


def _drop_assertions(graph: fx.Graph) -> None:
    """Export's own checks of metadata hold on one device's shapes; the plan has its own."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _grad_flags(model: nn.Module, inputs, args, kwargs, exported) -> list[bool]:
    """Whether each placeholder of the graph requires grad."""
    if not torch.is_grad_enabled():
        return [False] * len(inputs)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    leaves = iter(pytree.tree_leaves((args, ordered_kwargs(kwargs, exported.call_spec.in_spec))))
    flags = []
    for entry in inputs:
        if entry.kind == "input":
            leaf = next(leaves)
            flags.append(isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        else:
            flags.append(entry.kind == "parameter" and parameters[entry.name].requires_grad)
    return flags


def ordered_kwargs(kwargs: Mapping[str, Any], in_spec: pytree.TreeSpec) -> dict[str, Any]:
    """`kwargs` in the order in which the exported program flattens them."""
    _, ordered = pytree.tree_unflatten([None] * in_spec.num_leaves, in_spec)
    return {name: kwargs[name] for name in ordered}


def node_values(node: fx.Node) -> tuple[Any, ...]:
    """The fake values that a node produces, one per result."""
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def module_path(node: fx.Node) -> str:
    """Where in the user's model the op stands: `blocks.3.attn`, empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else ""


def propagate(module: fx.GraphModule, grads: Sequence[bool]) -> tuple[bool, dict[str, Saved], list[Any]]:
    """Run the graph node by node on fake tensors that require grad as the model's do.

    grads: which placeholders require grad. Sets every node's `meta["val"]` and returns whether any result requires grad,
    what each op saves, and the placeholders' fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    owner: dict[int, tuple[str, int]] = {}
    keep = []  # storages stay alive, so that no address is met twice
    saved: dict[str, Saved] = {}
    env: dict[fx.Node, Any] = {}
    flags = iter(grads)
    leaves = []
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with mode, torch.set_grad_enabled(any(grads)), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value, flag = node.meta.get("val"), next(flags)
                if isinstance(value, torch.Tensor):
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                    value.requires_grad_(flag)
                leaves.append(value)
            elif node.op == "get_attr":
                value = getattr(module, node.target)
                if isinstance(value, torch.Tensor):
                    value = mode.from_tensor(value)
            elif node.op == "output":
                break
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                packed.clear()
                try:
                    value = node.target(*args, **kwargs)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise CaptureError(
                        asked=f"cannot plan {node.target}",
                        found="its result depends on the values of tensors, in size or as a number in Python",
                        where=module_path(node) or None,
                        remedy="write it with masks of fixed size, or keep it out of the model",
                    ) from error
            env[node] = value
            node.meta["val"] = value
            for index, result in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                if isinstance(result, torch.Tensor):
                    storage = result.untyped_storage()
                    keep.append(storage)
                    owner.setdefault(storage._cdata, (node.name, index))
            if packed and node.op == "call_function":
                saved[node.name] = _saved(packed, owner, keep)
    results = pytree.tree_leaves(fx.map_arg(module.graph.output_node().args, env.__getitem__))
    training = any(isinstance(r, torch.Tensor) and r.requires_grad for r in results)
    return training, saved, leaves


def _saved(packed: list[torch.Tensor], owner: Mapping[int, tuple[str, int]], keep: list) -> Saved:
    values: dict[tuple[str, int], None] = {}
    internal: dict[int, int] = {}
    for tensor in packed:
        storage = tensor.untyped_storage()
        keep.append(storage)
        if storage._cdata in owner:
            values[owner[storage._cdata]] = None
        else:
            internal[storage._cdata] = storage.nbytes()
    return Saved(tuple(values), sum(internal.values()))


def _graph_leaves(outputs: list[Any]) -> tuple[set[int], set[str]]:
    """Ids of the leaves that gradients reach from `outputs`, and the names of custom autograd functions on the way."""
    todo = [o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    seen, leaves, custom = set(todo), set(), set()
    leaves |= {id(o) for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad and o.grad_fn is None}
    while todo:
        function = todo.pop()
        if hasattr(function, "variable"):
            leaves.add(id(function.variable))
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            custom.add(type(function).__name__.removesuffix("Backward"))
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return leaves, custom


# Their backward is the gradient of their forward, so tracing through the forward changes nothing.
_FAITHFUL_FUNCTIONS = {"CheckpointFunction"}


@contextmanager
def _on_fakes(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, `model` holds fake tensors for its own (yields the parameters by name); after, its own again.

    Not `torch.func.functional_call`: where a module stands at two paths that leaves fake tensors behind (torch 2.13).
    """
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in fakes:
                            made = _like(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)
                            fakes[id(tensor)] = nn.Parameter(made, made.requires_grad) if id(tensor) in names else made
                        swapped.append((held, name, tensor))
                        held[name] = fakes[id(tensor)]
                        if id(tensor) in names:
                            found[names[id(tensor)]] = fakes[id(tensor)]
            yield found
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _check_gradients(model, args, kwargs, module, inputs, leaves, mutated: int) -> None:
    """Every parameter, input and output that has a gradient path in the model has one in the graph, by the same functions."""
    names = {id(leaf): entry for leaf, entry in zip(leaves, inputs, strict=True)}
    outputs = pytree.tree_leaves([n.meta["val"] for n in module.graph.output_node().args[0] if isinstance(n, fx.Node)])
    reached, _ = _graph_leaves(outputs)
    kept = {names[leaf].name for leaf in reached if leaf in names}
    with _on_fakes(model) as parameters, torch.enable_grad():
        call = pytree.tree_map_only(torch.Tensor, lambda t: _like(t).requires_grad_(t.requires_grad), (args, kwargs))
        try:
            result = model(*call[0], **call[1])
        except Exception as error:
            raise CaptureError(
                asked="cannot check that the captured graph keeps the model's gradients",
                found=f"the model does not run on fake tensors: {_first_lines(error)}",
                remedy="keep values of tensors out of Python code in forward()",
            ) from error
    model_leaves, custom = _graph_leaves(pytree.tree_leaves(result))
    custom -= _FAITHFUL_FUNCTIONS
    if custom:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"it uses custom autograd functions ({', '.join(sorted(custom))}), and torch.export follows their forward "
            "and forgets their backward",
            where=_module_of_function(model, custom) or None,
            remedy="make them torch.library.custom_op with register_autograd, or run under torch.no_grad()",
        )
    lost = [name for name, p in parameters.items() if id(p) in model_leaves and name not in kept]
    tied = _tied(model)
    lost = [name for name in lost if not tied.get(name, set()) & kept]
    flat_in = pytree.tree_leaves((call[0], call[1]))
    flat_names = [entry.name for entry in inputs if entry.kind == "input"]
    if len(flat_in) == len(flat_names):
        lost += [n for n, t in zip(flat_names, flat_in, strict=True) if id(t) in model_leaves and n not in kept]
    if lost:
        raise CaptureError(
            asked="cannot capture the model for training",
            found=f"the captured graph has no gradient for {_some(lost)}, and the model has",
            where=lost[0].rpartition(".")[0] or None,
            remedy="look for .detach(), .data, torch.no_grad() or torch.autograd.grad between this module and the output",
        )


def _tied(model: nn.Module) -> dict[str, set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() for name in group}


def _module_of_function(model: nn.Module, functions: set[str]) -> str:
    """The first submodule whose class's module or forward names one of the functions."""
    for name, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and functions & set(code.co_names):
            return name
    return ""


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
