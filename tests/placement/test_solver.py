"""`solve` finds the best there is, proves it, and says what is short when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.placement.instances import brute_force, cluster, small
from tests.placement.test_evaluation import line

from edgeserve.placement import (
    BadValue,
    InvalidPlan,
    Link,
    Node,
    Problem,
    Sink,
    Source,
    Task,
    Unplaceable,
    evaluate,
    greedy,
    local_search,
    milp,
    solve,
)

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


GPU = {"gpu": 1}
ZONED = (
    Node(name="sensor", zone="eu", accelerators={"gpu": 0}),
    Node(name="gate", zone="us", cores=0, speed=100),
    Node(name="server", zone="us", accelerators=GPU),
)
HOME = (Source(name="s", node="sensor", rate_hz=10, bytes=9_800, stays_in="eu"),)
THIN = (
    Link(name="radio", ends=("sensor", "gate"), bandwidth_bytes_s=1e4),
    Link(name="wire", ends=("gate", "server"), bandwidth_bytes_s=1e7),
)


def one(**changes: Any) -> tuple[Task, ...]:
    return (Task(**{"name": "t", "inputs": ("s",), "cpu_s": 0.02, **changes}),)


UNPLACEABLE: list[tuple[Problem, str, float, str]] = [
    (full(500), "memory of gate", 100, r"t: fits on 0 of the 3 nodes .* gate, is short of memory by 100 bytes \(600 needed, 500 there\)"),
    (
        full(8e9, pins={"t": ("sensor",)}),
        "memory of sensor",
        600,
        "0 of the 1 nodes .* sensor, is short of memory by 600 bytes .* or loosen its pins",
    ),
    (line(tasks=one(cpu_s=0.4)), "cpu of server", 0.4, r"t: .* server, is short of cpu by 0.4 cores of speed 2 \(2 needed, 1.6 there\)"),
    (
        line(nodes=ZONED, tasks=one(accelerators=GPU), pins={"t": ("sensor",)}),
        "accelerator gpu of sensor",
        1,
        "t: .* sensor, is short of accelerator gpu by 1",
    ),
    (line(nodes=ZONED, tasks=one(), pins={"t": ("gate",)}), "cpu of gate", 0.002, "gate, is short of cpu, as it has no core"),
    (line(nodes=ZONED, tasks=one(cpu_s=0), pins={"t": ("gate",)}), "cpu of gate", 1, "gate, is short of cpu, as it has no core"),
    (line(nodes=ZONED, tasks=one(cpu_s=0.5)), "cpu of sensor", 4.2, "sensor, is short of cpu by 4.2 cores"),
    (
        line(nodes=ZONED, sources=HOME, pins={"t": ("server",)}),
        "nodes for t",
        1,
        r"t: may use 0 of 3 nodes and needs 1 \(`pins` let t run on server; s stays in zone 'eu', which has sensor\): loosen",
    ),
    (
        line(tasks=one(replicas_min=5, replicas_max=5)),
        "nodes for t",
        2,
        "t: may use 3 of 3 nodes, .* and needs 5: add nodes, or lower `replicas_min`",
    ),
    (
        line(tasks=tuple(Task(name=name, inputs=("s",), cpu_s=0.2) for name in "tuv")),
        "cpu of all nodes",
        6 - 0.8 * (0.5 + 1 + 2 * 2),
        r"need 6 cores of speed 1 \(the most: t 2, u 2, v 2\), and all nodes that run tasks may give 4.4: add 1.6",
    ),
    (
        line(nodes=ZONED, tasks=(*one(accelerators=GPU), Task(name="u", inputs=("t",), cpu_s=0.01, accelerators=GPU))),
        "accelerator gpu of all nodes",
        1,
        r"need 2 of accelerator gpu \(the most: t 1, u 1\)",
    ),
    (full(1000), "memory of gate", 200, "memory of gate: 1200 of 1000 bytes, by t, .* is short by 200 bytes"),
    (
        line(links=THIN, pins={"t": ("server",)}),
        "link of radio",
        10 * (9_800 + 200 + 800 + 200) - 8_000,
        "no placement keeps within .* link of radio: 110,000 of 8000 bytes/s, by s, t.* is short by 102,000 bytes/s",
    ),
]


@pytest.mark.parametrize(("problem", "capacity", "short_by", "says"), UNPLACEABLE, ids=[f"{c}-{s:g}" for _, c, s, _ in UNPLACEABLE])
def test_what_is_short_is_said_with_the_task_the_node_and_the_amount(problem: Problem, capacity: str, short_by: float, says: str) -> None:
    with pytest.raises(Unplaceable, match=says) as caught:
        solve(problem, time_limit_s=20)
    assert (caught.value.capacity, caught.value.proven) == (capacity, True)
    assert caught.value.short_by == pytest.approx(short_by)


def test_a_wish_that_cannot_be_kept_is_no_capacity() -> None:
    tasks = (*one(cpu_s=0.001), Task(name="u", inputs=("s",), cpu_s=0.001))
    with pytest.raises(Unplaceable, match="separation of t and u on gate is a wish: loosen it, or add nodes") as caught:
        solve(line(tasks=tasks, pins={"t": ("gate",), "u": ("gate",)}, separate=(("t", "u"),)))
    assert caught.value.proven and caught.value.short_by == 1


def test_what_greed_does_not_find_may_still_be_there() -> None:
    with pytest.raises(Unplaceable, match="does not prove that there is none") as caught:
        greedy(full(1000), time_limit_s=600)
    assert not caught.value.proven and "600 s" not in str(caught.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"time_limit_s": -1}, "time_limit_s is -1"),
        ({"time_limit_s": NAN}, "time_limit_s is nan"),
        ({"time_limit_s": "5"}, "time_limit_s is '5'"),
        ({"time_limit_s": True}, "time_limit_s is True"),
        ({"move_cost": -1}, "move_cost is -1"),
        ({"move_cost": NAN}, "move_cost is nan"),
        ({"move_cost": INF}, "move_cost is inf"),
        ({"move_cost": "1"}, "move_cost is '1'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": True}, "seed is True"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(function: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadValue, match=says):
        function(line(), **options)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"gap": -0.1}, BadValue, "gap is -0.1: give a number from 0 to 1"),
        ({"gap": 5}, BadValue, "gap is 5"),
        ({"gap": NAN}, BadValue, "gap is nan"),
        ({"gap": "x"}, BadValue, "gap is 'x'"),
        ({"gap": True}, BadValue, "gap is True"),
        ({"heuristics": len}, BadValue, "heuristics is .*list of functions"),
        ({"heuristics": [lambda _: 5]}, InvalidPlan, "a heuristic's assignment is 5"),
        ({"incumbent": "server"}, InvalidPlan, "incumbent is 'server'"),
        ({"incumbent": {"t": 5}}, InvalidPlan, r"incumbent\['t'\] is 5"),
        ({"previous": "server"}, InvalidPlan, "previous is 'server': give a Plan"),
        ({"previous": {"t": 5}}, InvalidPlan, r"previous\['t'\] is 5"),
    ],
)
def test_what_only_solve_takes_is_checked_too(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        solve(line(), **options)


def test_numbers_of_numpy_and_no_limit_at_all_are_fine() -> None:
    plan = solve(line(), time_limit_s=INF, seed=np.int64(2**40), gap=np.float64(1e-6))  # type: ignore[arg-type]
    assert plan.objective == pytest.approx(solve(line()).objective)
    assert milp(line(), seed=2**40).objective == pytest.approx(plan.objective)


def test_more_replicas_than_nodes_are_as_many_as_nodes() -> None:
    few, many = (solve(line(tasks=one(replicas_max=count)), time_limit_s=5).objective for count in (3, 10**9))
    assert few == pytest.approx(many)


def test_the_other_solver_prints_nothing() -> None:
    program = "from tests.placement.test_evaluation import line; from edgeserve.placement import milp; milp(line())"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    found = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


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
