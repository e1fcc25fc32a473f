"""Placement: is it the best there is, how near to it can be proven in ten seconds, and how fast is a new plan when a node is lost.

    python bench/placement.py                    all parts; exits 1 when a line does not hold
    python bench/placement.py --only exact       500 small problems with all features: `solve` against every placement
    python bench/placement.py --only cluster     20 problems of 1,000 nodes and 100 tasks: gap, then a node's loss
    python bench/placement.py --only huge        one of 5,000 nodes and 500 tasks, as far as it goes in a minute
    python bench/placement.py --json FILE        figures, too
    python bench/placement.py --cpu              limits and times are of the processor, for a machine that has other things to do

On one core. A problem of the clusters counts only if greed is at least 10 % off the plan, and at least half of those that count must have a
link that several streams share and that is used to its limit. What is lost is the node that runs the most tasks; it still forwards. No plan
moves less than what ran there, so that is taken for the fewest moves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))  # before NumPy is loaded

from tests.placement.instances import brute_force, cluster, small

from edgeserve.placement import Node, Plan, Problem, Unplaceable, greedy, local_search, milp, solve

GAP, OFF, REPLAN_S, SEARCH_S, HUGE_S, MOVE_COST = 0.01, 1.10, 0.5, 10.0, 60.0, 1.0
FULL = 0.95
"""A link is used to its limit above this part of it: the next stream would not fit."""

clock: Callable[[], float] = time.perf_counter


def exact(count: int) -> dict[str, Any]:
    """`solve` against brute force."""
    wrong, impossible, unproven, took = [], 0, 0, []
    for seed in range(count):
        problem = small(seed)
        best = brute_force(problem)
        began = time.perf_counter()
        try:
            plan = solve(problem, time_limit_s=60)
        except Unplaceable:
            impossible += 1
            if best is not None:
                wrong.append(seed)
            continue
        took.append(time.perf_counter() - began)
        unproven += plan.gap > 1e-6
        if best is None or abs(plan.objective - best.cost) > 1e-9 * max(abs(best.cost), 1.0):
            wrong.append(seed)
    print(
        f"small: {count - len(wrong)} of {count} equal brute force ({impossible} impossible, {unproven} not proven to be the best); ",
        end="",
    )
    print(f"median {1e3 * statistics.median(took):.0f} ms, at most {max(took):.1f} s; wrong: {wrong}")
    return {"count": count, "wrong": wrong, "impossible": impossible, "unproven": unproven, "median_s": statistics.median(took)}


def timed(function: Callable[..., Plan], problem: Problem, **options: Any) -> tuple[Plan | None, float, str]:
    """The plan, or none and why."""
    began = clock()
    try:
        plan: Plan | None = function(problem, clock=clock, **options)
        said = ""
    except (Unplaceable, MemoryError) as exc:
        plan, said = None, type(exc).__name__
    return plan, clock() - began, said


def shared_full(problem: Problem, plan: Plan) -> int:
    """Links that carry streams of several nodes, and no more than they do."""
    ends = {node.name for node in problem.nodes if node.name.startswith("dev")}
    limit = {link.name: link.max_utilisation for link in problem.links if not set(link.ends) & ends}
    return sum(plan.evaluation.link_utilisation[name] >= FULL * most for name, most in limit.items())


def lose(problem: Problem, plan: Plan) -> dict[str, Any]:
    """A node is lost: how long a new plan takes, and how much it moves."""
    counts: dict[str, int] = {}
    for site in plan.assignment.values():
        for node in site:
            counts[node] = counts.get(node, 0) + 1
    order = sorted(counts, key=lambda name: (-counts[name], name))
    for lost in order:
        fields = {name: getattr(problem, name) for name in problem.__struct_fields__}
        fields["nodes"] = tuple(Node(name=node.name, cores=0) if node.name == lost else node for node in problem.nodes)
        reduced = Problem(**fields)
        again, took, said = timed(solve, reduced, previous=plan, move_cost=MOVE_COST, time_limit_s=0.3 * REPLAN_S / 0.5)
        if again is not None:
            return {"lost": lost, "fewest": counts[lost], "moved": len(again.moved), "replan_s": took, "replan_gap": again.gap}
        print(f"  without {lost}: {said}")
    return {"lost": "", "fewest": 0, "moved": 0, "replan_s": 0.0, "replan_gap": 0.0}


def one(seed: int, nodes: int, tasks: int, limit_s: float, others: bool) -> dict[str, Any] | None:
    """All methods on one problem; None when it cannot be placed."""
    problem = cluster(seed, nodes=nodes, tasks=tasks)
    plan, took, said = timed(solve, problem, time_limit_s=limit_s)
    if plan is None:
        print(f"  {seed}: {said}")
        return None
    row: dict[str, Any] = {"seed": seed, "objective": plan.objective, "gap": plan.gap, "solve_s": took, "full": shared_full(problem, plan)}
    quick, row["greedy_s"], _ = timed(greedy, problem)
    row["greedy"] = quick.objective / plan.objective if quick else float("inf")
    row["counts"] = row["greedy"] >= OFF
    if others and row["counts"]:
        for name, function in (("local", local_search), ("milp", milp)):
            found, row[f"{name}_s"], said = timed(function, problem, time_limit_s=limit_s)
            row[name] = found.objective / plan.objective if found else None
            row[f"{name}_gap"] = found.gap if found else None
            row[f"{name}_says"] = said or (found.method if found else "")
        row.update(lose(problem, plan))
    return row


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    text = f"  {row['seed']:4d} {row['objective']:9.3f} {100 * row['gap']:6.2f} % {row['solve_s']:5.1f} s  full {row['full']:2d}"
    text += f"  greedy {row['greedy']:6.3f} ({row['greedy_s']:.1f} s)"
    if "local" in row:
        text += "".join(
            f"  {name} " + (f"{row[name]:.3f} ({row[f'{name}_s']:.1f} s)" if row[name] else f"none: {row[f'{name}_says']}")
            for name in ("local", "milp")
        )
        text += f"  loss: {row['replan_s']:.2f} s, {row['moved']} moved for {row['fewest']}"
    print(text if row["counts"] else text + "  does not count", flush=True)


def clusters(count: int) -> dict[str, Any]:
    """Problems of 1,000 nodes and 100 tasks until enough count."""
    print("cluster: seed, objective, proven gap, time, shared links at their limit, then each method's objective over solve's")
    rows: list[dict[str, Any]] = []
    seed = 0
    while sum(row["counts"] for row in rows) < count and seed < 20 * count:
        row = one(seed, 1000, 100, SEARCH_S, others=True)
        if row is not None:
            rows.append(row)
            show(row)
        seed += 1
    counted = [row for row in rows if row["counts"]]

    def middle(key: str) -> float:
        return statistics.median(row[key] for row in counted)

    result = {
        "counted": len(counted),
        "drawn": seed,
        "gap": middle("gap"),
        "solve_s": middle("solve_s"),
        "greedy": middle("greedy"),
        "local": statistics.median(row["local"] or float("inf") for row in counted),
        "full": sum(row["full"] > 0 for row in counted) / len(counted),
        "replan_s": max(row["replan_s"] for row in counted),
        "moves": max(row["moved"] / max(row["fewest"], 1) for row in counted),
        "rows": rows,
    }
    print(f"  median: gap {100 * result['gap']:.2f} %, {result['solve_s']:.1f} s; ", end="")
    print(f"greedy {result['greedy']:.3f}, local search {result['local']:.3f}; ", end="")
    print(f"{100 * result['full']:.0f} % with a full shared link; ", end="")
    print(f"new plan after a loss: at most {result['replan_s']:.2f} s, {result['moves']:.1f} x the fewest moves")
    return result


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["exact", "cluster", "huge"])
    parser.add_argument("--small", type=int, default=500)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.cpu:
        global clock
        clock = time.process_time
    figures: dict[str, Any] = {}
    failed = []
    if arguments.only in (None, "exact"):
        figures["exact"] = exact(arguments.small)
        failed += ["brute force"] if figures["exact"]["wrong"] else []
    if arguments.only in (None, "cluster"):
        found = figures["cluster"] = clusters(arguments.clusters)
        lines = {
            "enough problems that count": found["counted"] == arguments.clusters,
            "gap": found["gap"] <= GAP,
            "time": found["solve_s"] <= SEARCH_S * 1.02,
            "full shared links in half of them": found["full"] >= 0.5,
            "new plan in time": found["replan_s"] < REPLAN_S,
            "moves": found["moves"] <= 2.0,
        }
        failed += [name for name, holds in lines.items() if not holds]
    if arguments.only in (None, "huge"):
        row = one(0, 5000, 500, HUGE_S, others=False)
        figures["huge"] = row
        if row is not None:
            print("5,000 nodes, 500 tasks:")
            show({**row, "counts": True})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    if failed:
        print(f"does not hold: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
