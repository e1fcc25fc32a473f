"""`solve` finds the best there is, proves it, and says what is short when there is none."""

from __future__ import annotations

from typing import Any

import pytest
from tests.placement.instances import brute_force, cluster, small
from tests.placement.test_evaluation import line

from edgeserve.placement import Node, Problem, Sink, Task, Unplaceable, evaluate, greedy, local_search, milp, solve

FUNCTIONS = [solve, greedy, local_search, milp]


@pytest.mark.parametrize("seed", range(40))
def test_it_equals_trying_everything(seed: int) -> None:
    problem = small(seed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(Unplaceable) as caught:
            solve(problem, time_limit_s=30)
        assert caught.value.short_by > 0
        return
    plan = solve(problem, time_limit_s=30)
    assert plan.objective == pytest.approx(best.cost, rel=1e-9)
    assert plan.lower_bound <= plan.objective and plan.gap <= 1e-6
    found = evaluate(problem, plan.assignment, plan.routing)
    assert found.feasible and found.objective == pytest.approx(plan.objective, rel=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_give_feasible_plans_with_a_true_bound(function: Any) -> None:
    problem = cluster(3, nodes=40, tasks=8)
    best = solve(problem, time_limit_s=20)
    plan = function(problem, time_limit_s=20)
    assert evaluate(problem, plan.assignment, plan.routing).feasible
    assert plan.objective >= best.lower_bound * (1 - 1e-9)
    assert plan.lower_bound <= best.objective * (1 + 1e-9)


def test_the_same_seed_gives_the_same_plan() -> None:
    problem = cluster(5, nodes=60, tasks=16)
    one, two = (solve(problem, time_limit_s=60, seed=7) for _ in range(2))
    assert (one.assignment, one.routing, one.objective, one.lower_bound) == (two.assignment, two.routing, two.objective, two.lower_bound)


def test_it_stops_when_the_time_is_over() -> None:
    ticks = iter(range(1_000_000))
    plan = solve(cluster(5, nodes=60, tasks=16), time_limit_s=5, clock=lambda: float(next(ticks)))
    assert plan.lower_bound <= plan.objective and plan.elapsed_s < 60


def test_a_heuristic_of_your_own_competes() -> None:
    def all_at_the_server(problem: Problem) -> dict[str, str]:
        return {task.name: "server" for task in problem.tasks}

    plan = solve(line(), heuristics=[all_at_the_server])
    assert plan.objective == pytest.approx(solve(line()).objective)


def test_it_says_why() -> None:
    plan = solve(line())
    reason = plan.why["t"]
    assert reason.nodes == plan.assignment["t"] and reason.next_best is not None and reason.extra > 0
    other = evaluate(line(), {"t": reason.next_best}, plan.routing)
    assert other.objective >= plan.objective + reason.extra - 1e-9


def full(memory: float, **changes: Any) -> Problem:
    nodes = (Node(name="sensor"), Node(name="gate", memory_bytes=memory), Node(name="server", memory_bytes=memory))
    tasks = tuple(Task(name=name, inputs=("s",), cpu_s=0.001, memory_bytes=600) for name in ("t", "u", "v"))
    return line(nodes=nodes, tasks=tasks, sinks=tuple(Sink(name=f"o{k}", input=k, node="server") for k in "tuv"), **changes)


@pytest.mark.parametrize(
    ("problem", "capacity", "short_by"),
    [
        (full(500), "memory of gate", 100),
        (full(800), "memory of all nodes", 200),
        (full(1000, pins={"t": ("sensor",)}), "memory of sensor", 600),
        (line(tasks=(Task(name="t", inputs=("s",), cpu_s=0.4),)), "cpu of server", 2.0 - 1.6),
        (line(tasks=(Task(name="t", inputs=("s",), cpu_s=0.4, replicas_min=2, replicas_max=2),)), "cpu of gate", 2.0 - 0.8),
    ],
)
def test_what_cannot_be_placed_says_which_capacity_and_by_how_much(problem: Problem, capacity: str, short_by: float) -> None:
    with pytest.raises(Unplaceable) as caught:
        solve(problem)
    assert (caught.value.capacity, caught.value.proven) == (capacity, True)
    assert caught.value.short_by == pytest.approx(short_by)


def test_what_only_a_search_finds_to_be_impossible() -> None:
    with pytest.raises(Unplaceable, match="memory of") as caught:
        solve(full(1000), time_limit_s=20)
    assert caught.value.proven and caught.value.short_by == pytest.approx(200)


def without(problem: Problem, lost: str) -> Problem:
    fields = {name: getattr(problem, name) for name in problem.__struct_fields__}
    fields["nodes"] = tuple(Node(name=node.name, cores=0) if node.name == lost else node for node in problem.nodes)
    return Problem(**fields)


def test_after_the_loss_of_a_node_only_what_must_moves() -> None:
    problem = cluster(2, nodes=60, tasks=16)
    before = solve(problem, time_limit_s=5)
    lost = max(problem.nodes, key=lambda node: sum(site == (node.name,) for site in before.assignment.values())).name
    had = [task for task, site in before.assignment.items() if lost in site]
    after = solve(without(problem, lost), previous=before, move_cost=1e3, time_limit_s=5)
    assert lost not in {node for site in after.assignment.values() for node in site}
    assert set(had) <= set(after.moved) and len(after.moved) <= 2 * len(had)


def test_moves_have_to_pay() -> None:
    problem = line()
    best = solve(problem)
    elsewhere = next(node.name for node in problem.nodes if (node.name,) != best.assignment["t"])
    stays = solve(problem, previous={"t": elsewhere}, move_cost=1e3)
    assert stays.assignment["t"] == (elsewhere,) and not stays.moved
    moves = solve(problem, previous={"t": elsewhere}, move_cost=1e-6)
    assert moves.assignment == best.assignment and moves.moved == ("t",)
    assert moves.objective == pytest.approx(best.objective + 1e-6)
