"""Segments: a local program whose ops run inside the modules of the model that they come from.

Hooks of a module (FSDP's, which gather its parameters; a user's, which look at activations) run where the module is called. A
rewritten program calls no module. So where a model has such hooks its program is cut: the ops of each call of such a module
become a body of their own, and the module is entered, with the body for its forward. Entered modules may stand in each other
and in checkpoints, and checkpoints in them. Where the ops of one call cannot stand side by side it is entered more than once.

What FSDP shards is read inside the module, while it is whole there. So gradients of parameters are all-reduced in buckets that
hold parameters of one entered module only.
"""

from __future__ import annotations

import heapq
import operator
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from dsp_auto import fsdp
from dsp_auto.cost_models.state import packed
from dsp_auto.errors import DspError
from dsp_auto.primitives import IN_HALVES, PRIMITIVES

from .checkpointing import draws, keep, recompute
from .nodes import calls, is_getitem, is_tensor

dsp = torch.ops.dsp

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
Scope = tuple  # a call of a module: (its name in nodes' meta, the module's path); a checkpoint: (its number,)


class Home(NamedTuple):
    """The only modules, by path, in which a parameter may be read."""

    parameter: str
    paths: frozenset[str]


class Entrance:
    """One run of a module's ops: `body`, which takes the values of `held`, what is given past the module, and activations."""

    def __init__(
        self, module: nn.Module, path: str, body: Callable[..., tuple], held: Sequence[Any], looking: Collection[int]
    ) -> None:
        self.module, self.path, self.body, self.held = module, path, body, tuple(held)
        self.hooks = {
            name: OrderedDict(
                (id_, hook if fsdp.is_hook(hook) else self._only_looks(hook))
                for id_, hook in vars(module)[name].items()
                if id_ in looking or fsdp.is_hook(hook)
            )
            for name in _HOOKS
        }

    def _only_looks(self, hook: Callable[..., Any]) -> Callable[..., None]:
        def look(*args: Any) -> None:
            if hook(*args) is not None:
                raise DspError(
                    asked="a hook that only looked when the model was captured now returns a value",
                    found=f"{getattr(hook, '__qualname__', type(hook).__name__)}, whose value no op of the program takes",
                    where=self.path or None,
                    remedy="let it return a value at every call, for tensors without data too, or never",
                )

        return look

    def __call__(self, given: Sequence[Any], activations: Sequence[Any]) -> tuple:
        results: tuple = ()

        def forward(*activations: Any) -> Any:
            nonlocal results
            results = self.body(*(source.value for source in self.held), *given, *activations)
            return results[0] if len(results) == 1 else results

        own = vars(self.module)
        before = {name: own[name] for name in _HOOKS}
        kept = {"forward": own["forward"]} if "forward" in own else {}
        own.update(self.hooks, forward=forward)
        try:
            found = self.module(*activations)
        finally:
            del own["forward"]
            own.update(before, **kept)
        return (found,) if len(results) == 1 else found


def enter(entrance: Entrance, given: tuple, *activations: Any) -> tuple:
    """What the ops of a module's call give, run as its forward. Hooks see `activations`, not what is `given`."""
    return entrance(given, activations)


def cut(
    graph: fx.Graph,
    owner: nn.Module,
    sources: Sequence[Any],
    entered: Mapping[str, nn.Module],
    homes: Mapping[str, Home],
    looking: Collection[int],
) -> tuple[fx.GraphModule, list[int]]:
    """A rewritten program that enters modules, and the positions of the placeholders that it still takes.

    owner: the module whose attributes the graph's `get_attr`s are. sources: what a placeholder's value is read from (`value`).
    entered: modules by path, under each of their names. homes: by name of the placeholder, where what may be read inside of
    entered modules only is read. looking: ids of hooks that run.

    Raises DspError where a parameter is used outside of the modules in which it may be read.
    """
    return _Cutter(graph, owner, sources, entered, homes, looking).cut()


class _Cutter:
    def __init__(
        self,
        graph: fx.Graph,
        owner: nn.Module,
        sources: Sequence[Any],
        entered: Mapping[str, nn.Module],
        homes: Mapping[str, Home],
        looking: Collection[int],
    ) -> None:
        self.graph, self.owner, self.entered, self.homes, self.looking = graph, owner, entered, homes, looking
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.sources = dict(zip(placeholders, sources, strict=True))
        # Parameters, and what is made of one without computing: each body makes it for itself. By node, the parameter.
        self.read: dict[fx.Node, fx.Node] = {}
        replicated: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node in self.sources and hasattr(self.sources[node], "value"):
                self.read[node] = node
            elif node.op != "call_function" or not inputs:
                continue
            elif node.target is dsp.replicate.default and all(n in self.read for n in inputs):
                replicated.add(node)
            elif is_getitem(node) and inputs[0] in replicated:
                self.read[node] = self.read[_member(node)]
            elif len(inputs) == 1 and inputs[0] in self.read and _is_view(node) and is_tensor(node):
                self.read[node] = self.read[inputs[0]]
        self.in_buckets = any(len(n.args[0]) > 1 for n in replicated)
        self.ops = [
            n for n in graph.nodes if n.op == "call_function" and n not in self.read and n not in replicated
        ]
        self.at = {node: n for n, node in enumerate(self.ops)}
        self.scopes = self._scopes()
        self._start_inside()
        draw: list[fx.Node] = [node for node in self.ops if draws(node)]
        self.drawn_before = dict(zip(draw[1:], draw))  # random numbers are drawn in the order of the model
        self.root = nn.Module()

    def cut(self) -> tuple[fx.GraphModule, list[int]]:
        output = self.graph.output_node()
        self.scopes[output] = ()
        at_top = {
            self.read[n]
            for user in (*self.ops, output)
            for n in user.all_input_nodes
            if n in self.read and self.home(n, user) == 0
        }
        new, env, taken = fx.Graph(), {}, []
        for position, node in enumerate(self.sources):
            if node in at_top or self.homes.get(node.name) is None:
                env[node] = new.node_copy(node)
                taken.append(position)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                env[node] = new.node_copy(node)
                setattr(self.root, node.target, getattr(self.owner, node.target))
        value = self.level(new, self.ops, (), env, [output])
        new.output(fx.map_arg(output.args[0], value)).meta.update(output.meta)
        return fx.GraphModule(self.root, new), taken

    # --- where ops stand

    def _scopes(self) -> dict[fx.Node, tuple[Scope, ...]]:
        """Of each op the calls of entered modules and the checkpoint that it stands in, outermost first."""
        chains: dict[fx.Node, tuple[Scope, ...]] = {}
        begun: dict[tuple[Scope, ...], int] = {}
        for node in self.ops:
            chain = tuple(call for call in calls(node) if call[1] in self.entered)
            before = next((n for n in node.all_input_nodes if n in chains), None)
            if before is not None and is_getitem(node):
                chain = chains[before]
            elif before is not None and _is_view(node):
                # Of what a module returns a view is taken where it is used, which may be after a resharding in the next one.
                if chains[before][: len(chain)] != chain and begun.get(chain, len(self.ops)) < self.at[before]:
                    chain = chains[before]
            chains[node] = chain
            for depth in range(len(chain)):
                begun.setdefault(chain[: depth + 1], self.at[node])
        for node in reversed(self.ops):
            # What is resharded for ops in several modules comes before them: no module returns what it did not make.
            if _is_resharding(node):
                chains[node] = _common([chains[node], *(chains.get(user, ()) for user in node.users)])
        regions = {node: node.meta["region"] for node in self.ops if "region" in node.meta}
        of_region = Counter(regions.values())
        of_call = Counter(chain[: n + 1] for chain in chains.values() for n in range(len(chain)))
        of_both = Counter(
            (chains[node][: n + 1], number) for node, number in regions.items() for n in range(len(chains[node]))
        )
        found = {}
        for node, chain in chains.items():
            number = regions.get(node)
            if number is not None:
                # A checkpoint stands in a call, unless it holds all of the call and more.
                within = next(
                    (
                        n
                        for n in range(len(chain))
                        if of_both[chain[: n + 1], number] == of_call[chain[: n + 1]] < of_region[number]
                    ),
                    len(chain),
                )
                chain = (*chain[:within], (number,), *chain[within:])
            found[node] = chain
        return found

    def _start_inside(self) -> None:
        """A collective is issued early among the ops that stand where it is waited for, and not before these begin."""
        for start in [node for node in self.ops if node.target in _STARTS]:
            wait = next(user for half in start.users for user in half.users)
            between = self.ops[self.at[start] + 1 : self.at[wait]]
            if any(self.scopes[node] != self.scopes[wait] for node in between):
                moved = [start, *start.users]
                self.ops = [node for node in self.ops if node not in moved]
                at = self.ops.index(wait)
                self.ops[at:at] = moved
                self.at = {node: n for n, node in enumerate(self.ops)}

    def home(self, value: fx.Node, user: fx.Node) -> int:
        """In how many of the scopes of `user` a parameter, or what is made of it, is read: 0 at the start."""
        home = self.homes.get(self.read[value].name)
        if home is None:
            return 0
        for depth, scope in enumerate(self.scopes[user], 1):
            if len(scope) == 2 and scope[1] in home.paths:
                return depth
        told = " or ".join(sorted(home.paths))
        raise DspError(
            asked="cannot run the model with parameters that fully_shard shards",
            found=f"an op ({user.name}) uses {home.parameter} outside of {told}, which alone gathers it",
            where=next((path for _, path in reversed(calls(user))), None),
            remedy=f"do not apply fully_shard to {told} by itself, or call it where its parameters are used (not inside of a "
            "torch.autocast of the model: put autocast around the call of the parallel module)",
        )

    # --- the order

    def runs(self, nodes: Sequence[fx.Node], depth: int) -> list[tuple[Scope | None, list[fx.Node]]]:
        """The nodes of one level in an order in which those of one scope stand side by side, where they can."""
        left = list(nodes)
        found: list[tuple[Scope | None, list[fx.Node]]] = []
        while left:
            done = self._whole_units(left, depth, found)
            left = [node for node in left if node not in done]
            if left:
                # No scope can run as a whole: the first one runs as far as it can.
                unit, waiting, run = self._unit(left[0], depth), set(left), []
                for node in left:
                    if self._unit(node, depth) == unit and not waiting.intersection(self._needs(node)):
                        waiting.discard(node)
                        run.append(node)
                found.append((self._scope(left[0], depth), run))
                left = [node for node in left if node in waiting]
        return found

    def _whole_units(self, nodes: Sequence[fx.Node], depth: int, found: list) -> set[fx.Node]:
        members: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            members[self._unit(node, depth)].append(node)
        of = {node: unit for unit, own in members.items() for node in own}
        before = {
            unit: {of[n] for node in own for n in self._needs(node) if n in of} - {unit} for unit, own in members.items()
        }
        after: dict[Any, list[Any]] = defaultdict(list)
        for unit, own in before.items():
            for other in own:
                after[other].append(unit)
        ready = [(self.at[own[0]], unit) for unit, own in members.items() if not before[unit]]
        heapq.heapify(ready)
        done: set[fx.Node] = set()
        while ready:
            _, unit = heapq.heappop(ready)
            own = members[unit]
            done.update(own)
            found.append((self._scope(own[0], depth), own))
            for other in after[unit]:
                before[other].discard(unit)
                if not before[other]:
                    heapq.heappush(ready, (self.at[members[other][0]], other))
        return done

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        own = node.all_input_nodes
        return [*own, self.drawn_before[node]] if node in self.drawn_before else own

    def _scope(self, node: fx.Node, depth: int) -> Scope | None:
        chain = self.scopes[node]
        return chain[depth] if len(chain) > depth else None

    def _unit(self, node: fx.Node, depth: int) -> Any:
        return self._scope(node, depth) or (self.at[node],) * 3

    # --- bodies

    def level(
        self,
        new: fx.Graph,
        nodes: Sequence[fx.Node],
        prefix: tuple[Scope, ...],
        env: dict[fx.Node, fx.Node],
        ends: Sequence[fx.Node] = (),
    ) -> Callable[[fx.Node], fx.Node]:
        """Writes nodes that stand in the scopes of `prefix`; env: what is there already. Returns what finds a node's copy."""
        depth = len(prefix)
        users = (*nodes, *ends)
        needed = dict.fromkeys(
            n for user in users for n in user.all_input_nodes if n in self.read and self.home(n, user) == depth
        )
        value = _Reads(new, env, needed, self.in_buckets)
        recomputed = any(len(scope) == 1 for scope in prefix)
        for scope, run in self.runs(nodes, depth):
            if scope is None:
                (node,) = run
                kept = recomputed and node.meta.get("kept", False)
                if kept:
                    new.call_function(keep, (True,))
                env[node] = new.node_copy(node, value)
                if kept:
                    new.call_function(keep, (False,))
                continue
            inside = set(run)
            results = [node for node in run if any(user not in inside for user in node.users)]
            call = self._call(new, scope, run, prefix, results, value)
            call.meta["val"] = tuple(node.meta["val"] for node in results)
            for position, node in enumerate(results):
                env[node] = new.call_function(operator.getitem, (call, position))
                env[node].meta = dict(node.meta)
        return value

    def _call(
        self,
        new: fx.Graph,
        scope: Scope,
        run: list[fx.Node],
        prefix: tuple[Scope, ...],
        results: list[fx.Node],
        value: Callable[[fx.Node], fx.Node],
    ) -> fx.Node:
        """The call that runs some nodes in a scope of their own."""
        inside, prefix = set(run), (*prefix, scope)
        held: dict[fx.Node, None] = {}
        given: dict[fx.Node, None] = {}
        activations: dict[fx.Node, None] = {}
        for node in run:
            for n in node.all_input_nodes:
                if n in self.read:
                    home = self.home(n, node)
                    if home == len(prefix):
                        held[self.read[n]] = None
                    elif home < len(prefix):
                        given[n] = None
                elif n not in inside:
                    is_activation = is_tensor(n) and (n.op == "call_function" or self.sources.get(n, n) is None)
                    (activations if is_activation else given)[n] = None
        body, own = fx.Graph(), {}
        for node in (*held, *given, *activations):
            own[node] = body.placeholder(node.name)
            own[node].meta = dict(node.meta)
        found = self.level(body, run, prefix, own)
        body.output(tuple(found(node) for node in results)).meta["val"] = tuple(node.meta["val"] for node in results)
        module = fx.GraphModule(self.root, body)
        if len(scope) == 2:
            path = scope[1]
            entrance = Entrance(
                self.entered[path], path, module.forward, [self.sources[node] for node in held], self.looking
            )
            arguments = (self._attribute(new, "entered", entrance), tuple(map(value, given)), *map(value, activations))
            return new.call_function(enter, arguments)
        selective = any(node.meta.get("kept") for node in run)
        attribute = self._attribute(new, "recomputed", module)
        return new.call_function(recompute, (attribute, selective, *map(value, (*given, *activations))))

    def _attribute(self, new: fx.Graph, name: str, value: Any) -> fx.Node:
        name = f"{name}_{len(vars(self.root)) + len(self.root._modules)}"
        setattr(self.root, name, value)
        return new.get_attr(name)


class _Reads:
    """A node's copy in a body; of parameters, and what is made of them, where it is first asked for."""

    def __init__(
        self, new: fx.Graph, env: dict[fx.Node, fx.Node], needed: Collection[fx.Node], in_buckets: bool
    ) -> None:
        self.new, self.env = new, env
        self.bucket: dict[fx.Node, list[fx.Node]] = {}
        steps: dict[int, dict[fx.Node, None]] = defaultdict(dict)  # by how many replicates come before
        for node in needed:
            chain = [n for n in _ancestors(node) if n not in env and is_getitem(n)]
            for number, step in enumerate(reversed(chain)):
                steps[number][step] = None
        for members in (list(own) for own in steps.values()):
            kinds = [(_replicate(n).args[1:], n.meta["val"].dtype) for n in members]
            for bucket in packed([(kind, n.meta["val"].nbytes) for kind, n in zip(kinds, members, strict=True)], in_buckets):
                own = [members[n] for n in bucket]
                self.bucket.update(dict.fromkeys(own, own))

    def __call__(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            if node in self.bucket:
                self._replicate(self.bucket[node])
            else:
                self.env[node] = self.new.node_copy(node, self)
        return self.env[node]

    def _replicate(self, steps: list[fx.Node]) -> None:
        """One `replicate` of several parameters, each a member of some `replicate` of the program."""
        members = [self(_member(step)) for step in steps]
        call = self.new.call_function(dsp.replicate.default, (members, *_replicate(steps[0]).args[1:]))
        call.meta["val"] = [step.meta["val"] for step in steps]
        for number, step in enumerate(steps):
            self.env[step] = self.new.call_function(operator.getitem, (call, number))
            self.env[step].meta = dict(step.meta)


def _replicate(step: fx.Node) -> fx.Node:
    return step.args[0]


def _member(step: fx.Node) -> fx.Node:
    """What a result of a `replicate` is the same as."""
    return _replicate(step).args[0][step.args[1]]


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """What a parameter went through to become `node`, that first."""
    found = []
    while node.op == "call_function":
        found.append(node)
        node = _member(node) if is_getitem(node) else node.all_input_nodes[0]
    return found


_STARTS = {getattr(dsp, f"start_{name}").default for name in IN_HALVES}
_RESHARDING = {getattr(dsp, name).default for name in (*PRIMITIVES, *(f"wait_{name}" for name in IN_HALVES))} | _STARTS


def _is_resharding(node: fx.Node) -> bool:
    """Whether a node is a primitive, or a view that takes apart for one what it goes over, and puts it together."""
    if node.target in _RESHARDING:
        return True
    around = (*node.all_input_nodes, *node.users)
    return (is_getitem(node) or _is_view(node)) and any(n.target in _RESHARDING for n in around)


def _common(chains: Sequence[tuple[Scope, ...]]) -> tuple[Scope, ...]:
    """What all of them start with."""
    first = chains[0]
    for depth in range(len(first), 0, -1):
        if all(chain[:depth] == first[:depth] for chain in chains):
            return first[:depth]
    return ()


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info for r in schema.returns)
