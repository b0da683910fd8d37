"""Collectives are issued while other work of the model is still to run, on every rank in one order, for no more memory."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dsp_auto
from dsp_auto.decision import check_same, restore
from dsp_auto.mesh import as_mesh
from dsp_auto.passes.capture import capture
from dsp_auto.planner import Options, decide, finish, prepare
from dsp_auto.predict import predict
from dsp_auto.rehearse import rehearse
from dsp_auto.track import track
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, compare
from tests.run_order import RunOrder


class Attention(nn.Module):
    """Queries, keys and values each of a product of its own, so that the first can travel while the others are computed."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x):
        own = self.norm(x)
        q, k, v = (f(own).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, blocks: int = 2, hidden: int = 24, heads: int = 6, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(hidden, heads) for _ in range(blocks))
        self.wide = nn.Linear(hidden, 8 * hidden)
        self.back = nn.Linear(8 * hidden, hidden)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x + self.back(self.wide(x).sin())


def _inputs(length: int = 11, hidden: int = 24) -> tuple[torch.Tensor]:
    return (torch.randn(1, length, hidden, generator=torch.Generator().manual_seed(0)),)


def _programs(model, args, mesh="2", **options):
    """Of every rank, the plan and its program."""
    prepared = prepare(capture(model, args, {}), as_mesh(mesh), Options.of(**options))
    solution = decide(prepared)
    return prepared, [finish(prepared, solution, rank) for rank in range(as_mesh(mesh).ranks)]


def _targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


ULYSSES = {"strategy": "ulysses"}
ON_GPUS = {**ULYSSES, "hardware": "h100"}


def test_a_switch_is_issued_before_work_that_does_not_need_it_and_awaited_where_it_is_wanted():
    torch.manual_seed(0)
    _, [(plan, graph), _] = _programs(Model(1), _inputs(), **ULYSSES)
    targets = _targets(graph)
    first = targets.index("dsp.start_switch.default")
    wait = targets.index("dsp.wait_switch.default")
    assert "aten.linear.default" in targets[first:wait]
    assert targets.index("aten.scaled_dot_product_attention.default") > wait
    assert plan.communication["early"]["count"] == targets.count("dsp.start_switch.default") >= 1
    assert plan.communication["early"]["hidden_seconds"] > 0
    assert "issued early" in str(plan)


def test_overlap_false_issues_each_collective_where_it_is_wanted():
    torch.manual_seed(0)
    _, [(plan, graph), _] = _programs(Model(1), _inputs(), overlap=False, **ULYSSES)
    assert not any("start_" in target for target in _targets(graph))
    assert plan.communication["early"] == {"count": 0, "hidden_seconds": 0}
    with pytest.raises(dsp_auto.StrategyError, match="overlap='yes'"):
        dsp_auto.plan(Model(1), "2", _inputs(), overlap="yes")


@pytest.mark.parametrize("mesh", ["2", "3", "4", "2x2"])
@pytest.mark.parametrize("strategy", ["ulysses", "megatron-sp", "auto"])
def test_results_gradients_and_bytes_are_those_of_one_device(mesh, strategy):
    torch.manual_seed(0)
    model, args = Model(), _inputs()
    options = {"strategy": strategy, "shard_parameters": True if strategy == "auto" else None}
    options |= {"capacity": 400_000} if strategy == "auto" else {}
    try:
        found = rehearse(model, mesh, args, **options)
    except dsp_auto.InfeasibleError as error:
        pytest.fail(str(error))
    assert found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE
    assert all(own.agrees for own in found.traffic)


@pytest.mark.parametrize("length", [11, 12])
def test_all_ranks_issue_the_same_collectives_in_one_order(length):
    torch.manual_seed(0)
    _, programs = _programs(Model(), _inputs(length), mesh="4", **ULYSSES)
    orders = [
        [
            (str(node.target), node.kwargs.get("where"))
            for node in graph.nodes
            if getattr(node.target, "namespace", "") == "dsp"
        ]
        for _, graph in programs
    ]
    assert any("start_" in target for target, _ in orders[0])
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_under_way_never_raises_the_peak_of_memory(training):
    torch.manual_seed(0)
    model, args = Model(3), _inputs(24)
    peaks = {}
    with torch.set_grad_enabled(training):
        for overlap in (True, False):
            prepared, [(plan, graph), _] = _programs(model, args, overlap=overlap, optimizer="none", **ULYSSES)
            assert (plan.communication["early"]["count"] > 0) == overlap
            peaks[overlap] = plan.memory["peak_bytes"], track(prepared.program, graph).peak_bytes
    assert peaks[True][0] == peaks[False][0]
    assert peaks[True][1] <= peaks[False][1]


def test_a_plan_of_a_time_when_kernels_took_longer_is_the_same_plan(tmp_path):
    torch.manual_seed(0)
    model, args = Model(1), _inputs()
    plan = dsp_auto.plan(model, "2", args, **ULYSSES)
    assert plan.communication["early"]["count"]
    data = plan.to_dict()
    data["communication"]["early"] = {"count": 0, "hidden_seconds": 0.0}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    old = dsp_auto.Plan.load(path)
    prepared = prepare(capture(model, args, {}), as_mesh("2"), Options.of_plan(old))
    check_same(old, finish(prepared, restore(prepared, old))[0])


def test_a_collective_of_a_checkpoint_stays_in_it():
    torch.manual_seed(0)
    model, args = Model(checkpointed=True), _inputs()
    _, [(plan, graph), _] = _programs(model, args, **ULYSSES)
    assert plan.communication["early"]["count"] > 0
    for node in graph.nodes:
        if "start_" in str(node.target):
            wait = next(user for half in node.users for user in half.users)
            assert node.meta["region"] == wait.meta["region"]
    found = rehearse(model, "2", args, **ULYSSES)
    assert found.output[0] <= OUTPUT_TOLERANCE and found.gradient[0] <= GRADIENT_TOLERANCE
    assert all(own.agrees for own in found.traffic)


def test_a_prediction_hides_what_runs_beside_other_work():
    torch.manual_seed(0)
    model, args = Model(1), _inputs()
    beside, one_by_one = (predict(model, "2", args, overlap=overlap, **ULYSSES) for overlap in (True, False))
    assert one_by_one.hidden == pytest.approx(0, abs=1e-12)
    assert beside.hidden > 0.1 * beside.communication
    assert beside.communication == pytest.approx(one_by_one.communication)
    assert beside.hidden < beside.communication


def test_a_collective_of_which_next_to_nothing_would_be_hidden_is_issued_where_it_is_wanted():
    torch.manual_seed(0)
    # Processes on one computer take a quarter of a millisecond for any collective, and microseconds for products this small.
    plan = dsp_auto.plan(Model(1), "2", _inputs(), hardware="cpu-gloo", **ULYSSES)
    assert plan.communication["early"]["count"] == 0


def _by_default(rank, ranks):
    torch.manual_seed(0)
    mesh, counts = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)), []
    for options in (ULYSSES, ON_GPUS):
        parallel = dsp_auto.parallelize(Model(1), mesh, _inputs(), **options)
        counts.append(parallel.plan.communication["early"]["count"])
    return counts


def test_processes_on_cpus_are_not_taken_for_gpus(world):
    assert all(usual == 0 < named for usual, named in world(2).run(_by_default))


def _under_a_checkpoint(rank, ranks):
    """What is issued and what is waited for where the user runs a parallel module in a checkpoint of his own."""
    torch.manual_seed(0)
    model, (x,) = Model(), _inputs()
    parallel = dsp_auto.parallelize(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)), **ON_GPUS)
    parallel(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with RunOrder() as order:
        torch.utils.checkpoint.checkpoint(parallel, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))
    issued = sum(name.startswith(("all_to_all", "all_gather", "all_reduce", "reduce_scatter")) for name in order.ran)
    return issued, order.ran.count("wait_tensor")


def test_what_is_issued_is_waited_for_where_a_checkpoint_runs_a_module_again(world):
    for issued, waited in world(2).run(_under_a_checkpoint):
        assert issued == waited


def _issued_last(rank, ranks):
    """The same of a checkpoint in which nothing is saved after what is issued."""
    arguments = (1, 8, 2, ranks, rank, torch.distributed.group.WORLD.group_name)
    x = torch.randn(2, 8 // ranks, 6, requires_grad=True)

    def run(x):
        coming, flight = torch.ops.dsp.start_switch(x.sin(), *arguments)
        return torch.ops.dsp.wait_switch(coming, flight, *arguments) * 2.0

    with RunOrder() as order:
        torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    return order.ran.count("all_to_all_single"), order.ran.count("wait_tensor"), order.ran.count("zeros")


def test_a_checkpoint_that_stops_early_leaves_nothing_under_way(world):
    assert world(2).run(_issued_last) == [(3, 3, 0)] * 2


def _build():
    return Model(), _inputs(), {}


def _on_processes(rank, ranks):
    with RunOrder() as order:
        found = compare(rank, ranks, _build, {}, options=ON_GPUS)
    return found, _beside(order.ran)


def _beside(ran):
    """How many products run while a collective is under way."""
    under_way = products = 0
    for name in ran:
        under_way += (name == "all_to_all_single") - (name == "wait_tensor" and under_way > 0)
        products += under_way > 0 and name in ("mm", "addmm")
    return products


def test_on_processes_products_run_while_switches_are_under_way_forward_and_backward(world):
    for found, beside in world(2).run(_on_processes):
        assert found["output"] <= OUTPUT_TOLERANCE and found["gradient"] <= GRADIENT_TOLERANCE
        # In each of two blocks at least the values are computed meanwhile, and two products for their gradients.
        assert beside >= 2 * (1 + 2)


def _with_fsdp(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    torch.manual_seed(0)
    model, (x,) = Model(), _inputs()
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parallel = dsp_auto.parallelize(model, mesh["sp"], **ON_GPUS)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(parallel, mesh=mesh["dp"])
    with RunOrder() as order:
        parallel(x).square().mean().backward()
    for name, p in parallel.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
    return _beside(order.ran)


def test_modules_that_fsdp_enters_overlap_inside(world):
    assert min(world(4).run(_with_fsdp)) >= 4
