"""Track: the bytes of memory that a step of one rank's program takes, from running it on fake tensors.

Nothing is modelled: the program runs as it would, backward too, and every storage that an op makes counts from then on until
the last tensor over it is gone. Not in it: what is on the host, beside a model on accelerators; what a kernel takes for itself
while it runs, an allocator's rounding, and the 5 kB of the random numbers' state that a checkpoint keeps. The loss is the
user's: the gradients of the outputs appear as backward begins, and the outputs are held until its end.

Two things differ between fake tensors and real ones, and are counted as they are on real ones. `wait_tensor` makes no tensor.
And autograd adds a gradient in place to one that came before, where nobody else holds that one, but not under a mode that
follows every op, as here. Whether somebody holds it shows right after the addition: then what it was added to is still there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .passes.capture import Program, positions_of
from .passes.checkpointing import local_module
from .passes.nodes import module_path, node_values, on_the_host
from .predict import fake_input, requires_grad_flags

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
BASE, ACTIVATIONS, GRADIENTS, OPTIMIZER = "base", "activations", "gradients", "optimizer"

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Moment(NamedTuple):
    """While one node of the program ran, or its gradient. where: module path, or the node's name where it has none.

    nbytes: what is there afterwards; high: the most that was there meanwhile.
    """

    phase: str
    where: str
    nbytes: int
    high: int


@dataclass(frozen=True)
class Tracked:
    """Bytes on one device in a step. base_bytes: parameters, buffers, constants and inputs, which are there all the time.

    at_peak: of what the peak is made: "base", "gradients" (of leaves), "optimizer", and "activations", which is the rest.
    forward_peak, backward_peak, step_peak: the most in each phase; 0 for a phase that there is not.
    """

    peak_bytes: int
    base_bytes: int
    forward_peak: int
    backward_peak: int
    step_peak: int
    at_peak: Mapping[str, int]
    curve: tuple[Moment, ...]


def track(program: Program, graph: fx.Graph, optimizer: Optimizer | None = None) -> Tracked:
    """The memory of a step of the device whose local program `planner.finish` gave: forward and backward, or the forward alone
    where nothing requires a gradient.

    optimizer: makes one from a list of parameters, such as `torch.optim.AdamW`. Then the step of the optimizer is in it, and
        its state, which is there from the beginning as after a first step.
    """
    entries = program.inputs
    names = {entry.name: n for n, entry in enumerate(entries) if entry.kind in ("parameter", "buffer")}
    changed = positions_of(entries)
    return track_module(
        local_module(graph, program.module),
        requires_grad_flags(program),
        changed=[changed[key] for key in program.mutated],
        parameters=[n for n, entry in enumerate(entries) if entry.kind == "parameter" and entry.same_as is None],
        same_as={n: names[entry.same_as] for n, entry in enumerate(entries) if entry.same_as is not None},
        optimizer=optimizer,
    )


def track_module(
    module: fx.GraphModule,
    requires_grad: Sequence[bool],
    *,
    changed: Sequence[int] = (),
    parameters: Sequence[int] = (),
    same_as: Mapping[int, int] | None = None,
    optimizer: Optimizer | None = None,
) -> Tracked:
    """`track`, of a module whose placeholders carry what they take in `meta["val"]`.

    requires_grad: which placeholders do. changed: those that the model changes: the program runs on copies of them, and what
    is to be written back are its first results. parameters: those that the optimizer steps.
    same_as: placeholders that take the same tensor as another one.
    """
    given = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [fake_input(value, wanted) for value, wanted in zip(given, requires_grad, strict=True)]
        for n, other in (same_as or {}).items():
            inputs[n] = inputs[other]
        tensors = [x for node in module.graph.nodes for x in node_values(node) if isinstance(x, Tensor)]
        memory = _Memory(on_the_host(tensors))
        step = _Step(module, inputs, changed, memory, mode)
        stepped = optimizer([inputs[n] for n in parameters if inputs[n].requires_grad]) if optimizer else None
        if stepped is not None:
            step.leave_state(stepped)
        with memory:
            step.run()
            if stepped is not None:
                memory.enter(STEP, "optimizer")
                stepped.step()
    return memory.found()


@dataclass(eq=False)
class _Storage:
    """One storage that is there; `ref` is what tells of its end."""

    nbytes: int
    kind: str
    ref: weakref.ref | None = None


class _Memory(TorchDispatchMode):
    """Follows the storages of what ops give, each from the op that makes it on."""

    def __init__(self, on_host: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.on_host = on_host
        self.storages: dict[int, _Storage] = {}  # by id of the storage, which is one object as long as it lives
        self.bytes = dict.fromkeys((BASE, ACTIVATIONS, GRADIENTS, OPTIMIZER), 0)
        self.at_peak = dict(self.bytes)
        self.peak = self.high = 0
        self.phase, self.where, self.in_node = "", "", False
        self.curve: list[Moment] = []
        # A storage that a gradient was added to out of place, and the bytes that count unless it was so in name only.
        self.added: tuple[weakref.ref, int, dict[str, int]] | None = None

    @property
    def now(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._settle()
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        result = func(*args, **(kwargs or {}))
        made = [self.see(x, ACTIVATIONS) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if any(made):
            if self.phase == BACKWARD and not self.in_node and _may_be_in_place(func, args):
                self.added = weakref.ref(args[0].untyped_storage()), self.now, dict(self.bytes)
            else:
                self._raise(self.now, self.bytes)
        return result

    def see(self, x: Tensor, kind: str) -> bool:
        """Counts a tensor's storage. Returns whether it is a new one."""
        storage = x.untyped_storage()
        nbytes = 0 if self.on_host(x) else storage.nbytes()
        known = self.storages.get(id(storage))
        if known is not None:
            self.bytes[known.kind] += nbytes - known.nbytes  # it may have been resized
            known.nbytes = nbytes
            return False
        key = id(storage)
        own = self.storages[key] = _Storage(nbytes, kind)
        own.ref = weakref.ref(storage, lambda _: self._forget(key))
        self.bytes[kind] += own.nbytes
        return True

    def is_now(self, x: Tensor, kind: str) -> None:
        """What was an activation is something else from now on."""
        own = self.storages[id(x.untyped_storage())]
        self.bytes[own.kind] -= own.nbytes
        self.bytes[kind] += own.nbytes
        own.kind = kind

    def enter(self, phase: str, where: str) -> None:
        """From now on that is what runs."""
        self._settle()
        if self.phase:
            self.curve.append(Moment(self.phase, self.where, self.now, self.high))
        self.phase, self.where, self.high = phase, where, 0
        self._raise(self.now, self.bytes)

    def found(self) -> Tracked:
        self.enter("", "")

        def top(phase: str) -> int:
            return max((m.high for m in self.curve if m.phase == phase), default=0)

        tops = {"forward_peak": top(FORWARD), "backward_peak": top(BACKWARD), "step_peak": top(STEP)}
        return Tracked(self.peak, self.bytes[BASE], at_peak=self.at_peak, curve=tuple(self.curve), **tops)

    def _forget(self, key: int) -> None:
        own = self.storages.pop(key)
        self.bytes[own.kind] -= own.nbytes

    def _raise(self, nbytes: int, made_of: Mapping[str, int]) -> None:
        self.high = max(self.high, nbytes)
        if nbytes > self.peak:
            self.peak, self.at_peak = nbytes, dict(made_of)

    def _settle(self) -> None:
        if self.added is not None:
            target, nbytes, made_of = self.added
            self.added = None
            if target() is not None:  # somebody else holds it, so it stayed as it was
                self._raise(nbytes, made_of)


class _Step:
    """One step of a program: it runs, and what it gives goes backward."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        changed: Sequence[int],
        memory: _Memory,
        mode: FakeTensorMode,
    ) -> None:
        self.inputs, self.changed, self.memory = inputs, changed, memory
        self.program = _Program(module, memory, mode)
        for x in (*inputs, *self.program.held()):
            if isinstance(x, Tensor):
                memory.see(x, BASE)
                if x.requires_grad:
                    x.register_post_accumulate_grad_hook(lambda leaf: memory.is_now(leaf.grad, GRADIENTS))

    def run(self) -> None:
        memory = self.memory
        training = any(isinstance(x, Tensor) and x.requires_grad for x in self.inputs)
        memory.enter(FORWARD, "inputs")
        with torch.set_grad_enabled(training):
            results = self._forward()
            made = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
            if made:
                # Without elements, and so without bytes.
                loss, seed = _Loss.apply(*made), made[0].new_empty(0)
        if made:
            memory.enter(BACKWARD, "loss")
            torch.autograd.backward(loss, seed)
        memory.enter(memory.phase, "outputs")

    def _forward(self) -> list[Any]:
        copies = {n: self.inputs[n].clone() for n in self.changed}
        results = self.program.run(*(copies.get(n, x) for n, x in enumerate(self.inputs)))
        return pytree.tree_leaves(results[len(self.changed) :])

    def leave_state(self, optimizer: torch.optim.Optimizer) -> None:
        """What a first step leaves: the optimizer's state."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for x in pytree.tree_leaves(list(optimizer.state.values())):
            if isinstance(x, Tensor):
                self.memory.see(x, OPTIMIZER)


class _Loss(torch.autograd.Function):
    """Any loss of some tensors: their gradients are there as backward begins."""

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> Tensor:
        ctx.save_for_backward(*results)
        return results[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class _Program(fx.Interpreter):
    """Runs a program, those of its checkpoints too, and tells `memory` which node runs, and whose gradient."""

    def __init__(self, module: fx.GraphModule, memory: _Memory, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.memory = memory
        self.attributes: dict[str, Any] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = self.fetch_attr(node.target)
                if isinstance(value, fx.GraphModule):
                    value = _Program(value, memory, mode)
                elif isinstance(value, Tensor):
                    value = mode.from_tensor(value)
                self.attributes[node.target] = value

    def held(self) -> list[Tensor]:
        """The tensors that are neither inputs nor made."""
        own = self.attributes.values()
        return [x for value in own for x in (value.held() if isinstance(value, _Program) else [value])]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            self.env: dict[fx.Node, Any] = {}  # which holds arguments and results, as `args_iter` does
            self.args_iter = iter(())

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        value = self.attributes[target]
        return value.run if isinstance(value, _Program) else value

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        where = module_path(node) or node.name
        self.memory.enter(self.memory.phase, where)
        result = super().run_node(node)
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                self._label(x.grad_fn, where)
        # A module's code forgets at once what nobody uses.
        return result if node.users else None

    def _label(self, made_by: Node, where: str) -> None:
        """The steps of backward that are new."""
        memory, waiting = self.memory, [made_by]

        def begins(_: Any) -> None:
            memory.enter(BACKWARD, where)
            memory.in_node = True

        def ends(*_: Any) -> None:
            memory.in_node = False

        while waiting:
            step = waiting.pop()
            metadata: Any = step.metadata  # a dict, which torch's hints take for a method
            # What only keeps a gradient may be handed one that nobody else holds, which a hook would.
            if _LABEL in metadata or step.name().endswith("AccumulateGrad"):
                continue
            metadata[_LABEL] = where
            step.register_prehook(begins)
            step.register_hook(ends)
            waiting += [other for other, _ in step.next_functions if other is not None]


_LABEL = "dsp_auto.where"


def _may_be_in_place(func: Any, args: tuple) -> bool:
    """Whether autograd, when it adds two gradients, may take the memory of the first."""
    if func is not torch.ops.aten.add.Tensor or not all(isinstance(x, Tensor) for x in args):
        return False
    first, second = args
    return _is_dense(first) and first.untyped_storage() is not second.untyped_storage()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements lie side by side, in any order of dims."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
