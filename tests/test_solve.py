"""The plan is optimal: the integer program finds what trying every assignment finds, under any capacity."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsp_auto.cost_models.hardware import as_hardware
from dsp_auto.errors import InfeasibleError, MeshError, NoShardableFactorError
from dsp_auto.mesh import as_mesh
from dsp_auto.passes import model as model_file
from dsp_auto.passes import solve as solve_file
from dsp_auto.passes.capture import capture
from dsp_auto.passes.layout import P, R, Shard, V, moves, ways
from dsp_auto.passes.solve import solve
from dsp_auto.planner import Options, decide, finish, prepare
from tests.graphs import Builder, aten, problem_of, random_program

GRAPHS = 240
# Seconds, in which what runs again costs something.
TIMED = {
    "objective": "time",
    "hardware": as_hardware("h100").on({"r": 4}),
    "compute_seconds": lambda stage, strategy, again: (1 if again else 3) * (1 + stage % 3) / (1 + strategy) * 1e-6,
}
LIMIT = 3000  # assignments of one graph


def subsets(items):
    return [own for n in range(len(items) + 1) for own in itertools.combinations(items, n)]


def every_recomputed(problem):
    """Every set of regions that may be recomputed, with everything that they may keep."""
    for regions in subsets([region.number for region in problem.regions if not region.forced]):
        for kept in subsets([own for region in regions for own in problem.keeps[region]]):
            yield frozenset(regions + kept)


def every_choice(problem):
    """(cost, peak) of every assignment that is possible, with everything that may be recomputed."""
    sets = list(every_recomputed(problem))
    for choice in itertools.product(*(range(len(stage.strategies)) for stage in problem.graph.stages)):
        if problem.reshardings(choice) is not None:
            for recomputed in sets:
                yield problem.cost(choice, recomputed), problem.peak(choice, recomputed)[0]


def assignments(problem) -> int:
    return math.prod(len(stage.strategies) for stage in problem.graph.stages) * len(list(every_recomputed(problem)))


def random_problem(seed: int, meshes=("2", "3"), strategies=("dsp",), most_ops=7):
    """A small problem of which every assignment can be tried."""
    draw = random.Random(seed)
    for attempt in itertools.count():
        training = draw.random() < 0.5
        program = random_program(seed * 1000 + attempt, draw.randint(3, most_ops), training)
        try:
            problem = problem_of(program, draw.choice(meshes), strategy=draw.choice(strategies))
        except (MeshError, NoShardableFactorError):  # no sequence or hidden dim that is long enough
            continue
        if 1 < assignments(problem) <= LIMIT:
            return problem


def check_against_every_choice(problem, seed: int, found=None) -> set[str]:
    """The solver against trying everything, under several capacities; what it met."""
    kinds = set()
    found = found or list(every_choice(problem))
    least = min(peak for _, peak in found)
    peaks = sorted({peak for _, peak in found})
    draw = random.Random(seed)
    for capacity in (None, least, least - 1, draw.choice(peaks), peaks[-1]):
        allowed = solve(problem, use_folding=False).capacity_bytes if capacity is None else capacity
        assert capacity is not None or allowed >= least
        fitting = [cost for cost, peak in found if peak <= allowed]
        kinds.add("fits" if fitting else "infeasible")
        if not fitting:
            with pytest.raises(InfeasibleError) as error:
                solve(problem, capacity, use_folding=False)
            assert error.value.least_bytes == least
            continue
        solution = solve(problem, capacity, use_folding=False)
        assert solution.objective == pytest.approx(min(fitting), abs=1e-6), seed
        assert solution.peak_bytes <= allowed
        assert solution.gap == 0
    return kinds


@pytest.mark.parametrize("start", range(0, GRAPHS, 40))
def test_the_ilp_finds_what_trying_every_assignment_finds_under_any_capacity(start):
    kinds = set()
    for seed in range(start, start + 40):
        kinds |= check_against_every_choice(random_problem(seed), seed)
    assert kinds == {"fits", "infeasible"}


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_the_same_on_two_mesh_dims_and_on_split_ones(start):
    """2x2, 2x3 and 3x2, where two mesh dims may cut one factor; and 8 and 9 ranks, longer than any factor, which are split."""
    split, shared = 0, 0
    for seed in range(start, start + 20):
        problem = random_problem(seed, ("2x2", "2x3", "3x2", "8", "9"), ("dsp", "auto", "megatron-sp"), most_ops=4)
        check_against_every_choice(problem, seed)
        mesh = problem.graph.mesh
        split += mesh.names != mesh.part_of
        cuts = [strategy.cuts for stage in problem.graph.stages for strategy in stage.strategies]
        shared += any(own[0] and own[0] == own[1] for own in cuts)
    assert split > 2 and shared > 2


TWO_DIMS = ("2x2", "2x3", "3x2", "8", "9")


def test_a_plan_that_is_found_one_mesh_dim_after_another_fits_and_is_where_the_solver_begins(monkeypatch):
    monkeypatch.setattr(solve_file, "MANY_PAIRS", -1)
    for seed in range(20):
        check_against_every_choice(random_problem(seed, TWO_DIMS, ("dsp", "auto", "megatron-sp"), most_ops=4), seed)


def test_a_problem_too_large_to_be_solved_whole_gets_a_plan_that_fits_and_says_that_no_bound_is_known(monkeypatch):
    best = found = 0
    for seed in range(40):
        problem = random_problem(seed, TWO_DIMS, ("dsp", "auto"), most_ops=4)
        peak = solve(problem).capacity_bytes
        least = solve(problem, peak).objective
        with monkeypatch.context() as patched:
            patched.setattr(solve_file, "TOO_MANY_PAIRS", -1)
            solution = solve(problem, peak)
        assert solution.peak_bytes <= peak == solution.capacity_bytes
        assert solution.objective == pytest.approx(problem.cost(solution.choice, solution.recomputed))
        assert solution.objective >= least - 1e-6
        if solution.status == "Feasible":  # it was found by dims
            found += 1
            assert solution.bound == 0
            best += solution.objective <= least + 1e-6
    assert found > 20 and best > found / 2


def chain(seed: int):
    """Ops one after the other that save what they read, over a T that can be cut and an S that cannot: recomputing helps."""
    draw = random.Random(seed)
    builder = Builder()
    weight = builder.parameter("w", 2, 2)
    x = builder.op(aten.linear.default, builder.input("x", draw.choice([4, 6, 7]), 3, 2), weight)
    before = [x]
    for _ in range(draw.randint(4, 5)):
        if draw.random() < 0.25:
            x = builder.op(aten.softmax.int, x, 0)
        elif draw.random() < 0.25:
            x = builder.op(aten.add.Tensor, x, draw.choice(before))
        elif draw.random() < 0.4:
            x = builder.op(aten.linear.default, x, weight)
        else:
            x = builder.op(draw.choice([aten.sin.default, aten.gelu.default, aten.exp.default]), x)
        before.append(x)
    return builder.program(builder.op(aten.softmax.int, x, 0))


@pytest.mark.parametrize("start", range(0, 45, 15))
def test_the_same_where_blocks_may_be_recomputed_and_everything_on_a_device_counts(start):
    chosen, may_keep = 0, 0
    for seed in range(start, start + 15):
        draw = random.Random(seed)
        objective, whole = draw.choice([{}, TIMED]), draw.random() < 0.5
        problem = problem_of(chain(seed), "4", recompute=True, whole=whole, **objective)
        if assignments(problem) > 4 * LIMIT:
            continue
        found = list(every_choice(problem))
        check_against_every_choice(problem, seed, found)
        peaks = sorted({peak for _, peak in found})
        recomputed = [solve(problem, int(peaks[0] * more), use_folding=False).recomputed for more in (1, 1.1, 1.3)]
        chosen += any(recomputed)
        may_keep += sum(map(len, problem.keeps.values()))
    assert chosen > 1 and may_keep > 5


def test_contracting_views_never_costs_and_a_view_with_one_use_changes_nothing():
    """Every view as a stage of its own, against views as part of their storage; inputs and outputs cut differently, so
    that there is something to send."""

    def uncontracted(factors):
        ops = tuple(replace(op, rule=op.rule and replace(op.rule, is_view=False)) for op in factors.ops)
        return replace(factors, ops=ops)

    compared = 0
    for seed in range(80):
        program = random_program(seed, 4, training=seed % 2 == 0)
        ends = {"in_layouts": {"x": (Shard(0),)}, "out_layouts": {0: (Shard(1),)}}
        plain, whole = problem_of(program, "2", **ends), problem_of(program, "2", uncontracted, **ends)
        if assignments(whole) > 3000:
            continue
        best, best_whole = (min(cost for cost, _ in every_choice(p)) for p in (plain, whole))
        views = [op for op in plain.graph.factors.ops if op.is_view]
        single = all(len(op.node.users) == 1 and len(op.node.args[0].users) == 1 for op in views)
        assert best <= best_whole
        if single:
            assert best == best_whole
            compared += 1
        assert solve(plain, capacity=10**9, use_folding=False).objective == pytest.approx(best, abs=1e-6)
        assert solve(whole, capacity=10**9, use_folding=False).objective == pytest.approx(best_whole, abs=1e-6)
    assert compared >= 10


def layered(layers: int, training: bool = True):
    """Attention-like work over T, then S, `layers` times."""
    builder = Builder(training)
    x = builder.input("x", 8, 6, 4)
    weight = builder.parameter("embed", 4, 4)
    x = builder.op(aten.linear.default, x, weight)
    for layer in range(layers):
        for dim in (0, 1):
            inner = builder.op(aten.linear.default, x, builder.parameter(f"w{layer}{dim}", 4, 4))
            inner = builder.op(aten.softmax.int, inner, dim)
            x = builder.op(aten.add.Tensor, x, inner)
    return builder.program(x)


@pytest.mark.parametrize("ranks", ["2", "3"])
@pytest.mark.parametrize("training", [True, False])
def test_the_bound_of_a_folded_plan_is_a_lower_bound_of_the_optimum(ranks, training):
    for layers in (2, 3, 5):
        problem = problem_of(layered(layers, training), ranks)
        folded = solve(problem, gap=1.0)  # as folding finds it, however far from its bound
        exact = solve(problem, folded.capacity_bytes, use_folding=False)
        assert folded.folded and not exact.folded
        assert folded.bound <= exact.objective + 1e-6 <= folded.objective + 2e-6
        assert folded.variables < exact.variables or layers == 2


def test_under_a_given_capacity_a_folded_plan_far_from_its_bound_is_solved_again_without_folding():
    problem = problem_of(layered(4), "2")
    least = solve(problem)
    for share in (1.0, 1.3, 1.7):
        capacity = int(least.peak_bytes * share)
        found = solve(problem, capacity, gap=0.0)
        assert found.objective == pytest.approx(solve(problem, capacity, use_folding=False).objective)


class Dilated(nn.Module):
    """Convolutions that differ in nothing but how far they reach."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(4, 4, 7, dilation=dilation, padding=3 * dilation) for dilation in (1, 3, 9)
        )

    def forward(self, x):
        for convolution in self.convolutions:
            x = x + convolution(x.sin()).relu()
        return x


def test_ops_that_reach_differently_far_are_counted_each_by_itself():
    with torch.no_grad():
        prepared = prepare(capture(Dilated(), (torch.randn(1, 4, 136),)), as_mesh("2"), Options.of())
    solution = decide(prepared)
    memory = finish(prepared, solution)[0].memory
    # As another process counts it, which was only told what was decided.
    again = prepare(prepared.program, as_mesh("2"), prepared.options)
    assert finish(again, solution)[0].memory == memory


def test_less_capacity_never_costs_less():
    problem = problem_of(layered(2), "2")
    least = solve(problem).peak_bytes
    costs = [solve(problem, int(least * share), use_folding=False).objective for share in (1, 1.1, 1.3, 1.6, 2, 3)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_a_plan_is_the_same_every_time():
    problem = problem_of(layered(3), "2")
    assert solve(problem).choice == solve(problem_of(layered(3), "2")).choice


def test_cbc_finds_the_same_cost_where_highs_is_missing(monkeypatch):
    problem = problem_of(layered(2), "2")
    by_highs = solve(problem, use_folding=False)
    monkeypatch.setattr(model_file.pulp.HiGHS, "available", lambda self: False)
    # Of plans that make equally few bytes, which bound the default, each solver may find another one.
    by_cbc = solve(problem, by_highs.capacity_bytes, use_folding=False)
    assert (by_highs.solver, by_cbc.solver) == ("HiGHS", "CBC")
    assert by_cbc.objective == pytest.approx(by_highs.objective)


def test_an_infeasible_problem_is_answered_in_words():
    problem = problem_of(layered(2), "2")
    capacity = solve(problem).peak_bytes // 2
    with pytest.raises(InfeasibleError) as error:
        solve(problem, capacity)
    message, least = str(error.value), error.value.least_bytes
    assert error.value.capacity_bytes == capacity < least == solve(problem, least).peak_bytes
    assert error.value.point.split(",")[0].split(" of ")[0] in ("forward", "backward") and error.value.point in message
    assert "Infeasible" not in message and "status" not in message


PLACEMENTS = (R, V, Shard(0), Shard(1), Shard(2))


def paths(source, target, placements=PLACEMENTS):
    """The cheapest steps where every primitive costs as much as any."""
    return ways(source, placements, lambda step: 1.0).get(target)


def test_primitives_lead_from_every_layout_to_every_other_that_exists():
    expected = {
        (Shard(0), Shard(1)): ["switch"],
        (Shard(0), R): ["gather"],
        (Shard(0), V): ["gather"],
        (R, Shard(0)): ["split"],
        (V, Shard(0)): ["split"],
        (R, V): ["replicate"],
        (P, R): ["reduce"],
        (P, V): ["reduce"],
        (P, Shard(1)): ["reduce_scatter"],
        (R, P): None,
    }
    for (source, target), primitives in expected.items():
        found = paths((source,), (target,))
        assert (None if found is None else [step.primitive for step in found]) == primitives
    assert paths((V,), (R,), (V, R)) is None


@pytest.mark.parametrize("dims", [2, 3])
def test_every_step_between_layouts_of_several_mesh_dims_leaves_every_shard_a_range(dims):
    """Mesh dims that cut one place cut it in their order: the innermost come last and go first."""
    placements = (R, Shard(0), Shard(1))
    for layout in itertools.product(placements, repeat=dims):
        for step in moves(layout, placements):
            for place in (0, 1):
                before, after = ([m for m in range(dims) if x[m] == Shard(place)] for x in (step.before, step.after))
                stay = [m for m in before if m in after]
                assert before[: len(stay)] == stay == after[: len(stay)]
            changed = [m for m in range(dims) if step.before[m] != step.after[m]]
            assert tuple(changed) == step.mesh_dims


def test_mesh_dims_that_do_the_same_go_in_one_collective():
    both = paths((Shard(0), Shard(0)), (Shard(1), Shard(1)))
    assert [(step.primitive, step.mesh_dims) for step in both] == [("switch", (0, 1))]
    assert [step.mesh_dims for step in paths((R, R), (V, V))] == [(0, 1)]

def test_an_inner_mesh_dim_leaves_a_place_before_an_outer_one():
    found = paths((Shard(0), Shard(0)), (Shard(1), Shard(0)))
    # Rows that the inner mesh dim cuts further cannot leave from between: both go, and the inner one comes back.
    assert [(step.primitive, step.mesh_dims) for step in found] in (
        [("switch", (0, 1)), ("switch", (1,))],
        [("gather", (1,)), ("switch", (0,)), ("split", (1,))],
    )
