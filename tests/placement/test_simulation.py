"""The simulator agrees with the formulas where these are exact."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from tests.placement.instances import cluster
from tests.placement.test_evaluation import line, pair, switched

from edgeserve.placement import BadValue, Link, Node, Problem, Sink, Source, Task, evaluate, simulate, solve


def single(rate_hz: float, cores: int = 1) -> Problem:
    """A source, a task and a sink on one node, so that only the node's queue counts."""
    return Problem(
        nodes=(Node(name="n", cores=cores, max_utilisation=0.95),),
        broker="n",
        sources=(Source(name="s", node="n", rate_hz=rate_hz, bytes=1),),
        tasks=(Task(name="t", inputs=("s",), cpu_s=0.01),),
        sinks=(Sink(name="out", input="t", node="n"),),
    )


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_core_waits_as_theory_says(load: float) -> None:
    problem = single(100 * load)
    found = simulate(problem, {"t": "n"}, duration_s=3000, seed=1)
    assert found.mean_ms["out"] == pytest.approx(evaluate(problem, {"t": "n"}).latency_ms["out"], rel=0.04)
    assert found.utilisation["n"] == pytest.approx(load, rel=0.02)


def test_several_cores_wait_about_as_much() -> None:
    problem = single(320, cores=4)
    found = simulate(problem, {"t": "n"}, duration_s=1000, seed=1)
    assert found.mean_ms["out"] - 10 == pytest.approx(evaluate(problem, {"t": "n"}).latency_ms["out"] - 10, rel=0.15)


def test_one_link_waits_as_theory_says() -> None:
    problem = Problem(
        nodes=(Node(name="a"), Node(name="b")),
        links=(Link(name="l", ends=("a", "b"), bandwidth_bytes_s=1e6, latency_ms=3),),
        broker="b",
        sources=(Source(name="s", node="a", rate_hz=60, bytes=9_800),),
        tasks=(Task(name="t", inputs=("s",), cpu_s=0.0),),
        sinks=(Sink(name="out", input="t", node="b"),),
    )
    found = simulate(problem, {"t": "b"}, "eager", duration_s=2000, seed=1)
    expected = evaluate(problem, {"t": "b"}, "eager")
    assert found.mean_ms["out"] == pytest.approx(expected.latency_ms["out"], rel=0.04)
    assert found.link_bytes_s["l"] == pytest.approx(expected.link_bytes_s["l"], rel=0.02)


@pytest.mark.parametrize("routing", ["eager", "lazy"])
@pytest.mark.parametrize("node", ["sensor", "gate", "server"])
def test_without_load_it_is_exact(node: str, routing: Any) -> None:
    problem = line(sources=(Source(name="s", node="sensor", rate_hz=1, bytes=9_800),))
    found = simulate(problem, {"t": node}, routing, duration_s=50, warmup_s=0, arrivals="periodic")
    expected = evaluate(problem, {"t": node}, routing).unloaded_ms["out"]
    assert list(found.latency_ms["out"].values()) == pytest.approx([expected] * 3)


@pytest.mark.parametrize("bandwidths", [(1e6, 1e6), (1e6, 2e6, 4e6), (4e6, 1e6, 2e6), (2e6, 4e6, 1e6)])
def test_without_load_it_is_exact_over_several_links(bandwidths: tuple[float, ...]) -> None:
    problem, last = switched(bandwidths, rate_hz=1, duplex=True), f"n{len(bandwidths)}"
    found = simulate(problem, {"t": last}, "eager", duration_s=50, warmup_s=0, arrivals="periodic")
    expected = evaluate(problem, {"t": last}, "eager").unloaded_ms
    for sink, ms in expected.items():
        assert list(found.latency_ms[sink].values()) == pytest.approx([ms] * 3)


@pytest.mark.parametrize("bandwidths", [(1e6, 1e6), (2e6, 1e6), (1e6, 2e6)])
def test_links_in_a_row_wait_as_the_slowest_does(bandwidths: tuple[float, ...]) -> None:
    problem = switched(bandwidths, duplex=True)
    found = simulate(problem, {"t": "n2"}, "eager", duration_s=2000, seed=1)
    assert found.mean_ms["out"] == pytest.approx(evaluate(problem, {"t": "n2"}, "eager").latency_ms["out"], rel=0.04)


@pytest.mark.parametrize("routing", ["eager", "lazy"])
def test_sets_of_a_join_go_to_its_replicas_as_the_formulas_say(routing: Any) -> None:
    problem = pair()
    found = simulate(problem, {"t": ("gate", "server")}, routing, duration_s=200, warmup_s=0, arrivals="periodic")
    expected = evaluate(problem, {"t": ("gate", "server")}, routing)
    for link, rate in expected.link_bytes_s.items():
        assert found.link_bytes_s[link] == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("trigger", ["any", "all", "s"])
def test_joins_by_every_trigger(trigger: str) -> None:
    sources = (Source(name="s", node="sensor", rate_hz=2, bytes=800), Source(name="r", node="gate", rate_hz=2, bytes=800))
    problem = line(sources=sources, tasks=(Task(name="t", inputs=("s", "r"), cpu_s=0.0, trigger=trigger),))
    found = simulate(problem, {"t": "gate"}, "eager", duration_s=2000, seed=3)
    assert found.mean_ms["out"] == pytest.approx(evaluate(problem, {"t": "gate"}, "eager").unloaded_ms["out"], rel=0.03)
    assert found.results["out"] == pytest.approx(1800 * {"any": 4, "all": 2, "s": 2}[trigger], rel=0.1)


def test_a_rate_limit_throttles_and_saves_bytes() -> None:
    problem = line(tasks=(Task(name="t", inputs=("s",), cpu_s=0.001, output_bytes=800, min_interval_ms=500),))
    found = simulate(problem, {"t": "server"}, "lazy", duration_s=500, arrivals="periodic")
    expected = evaluate(problem, {"t": "server"}, "lazy")
    assert found.link_bytes_s["wire"] == pytest.approx(expected.link_bytes_s["wire"], rel=0.02)
    assert found.throttled["t"] == pytest.approx(450 * 8, rel=0.02)


@pytest.mark.parametrize("rate_hz", [4.0, 40.0])
def test_a_run_that_was_held_back_takes_the_newest_that_there_is(rate_hz: float) -> None:
    """Sources by chance, their messages are there at once: the age of the newest one is all that a result is late by."""
    sources = tuple(Source(name=name, node="gate", rate_hz=rate_hz / 2, bytes=8) for name in "sr")
    task = Task(name="t", inputs=("s", "r"), cpu_s=0.0, min_interval_ms=500)
    problem = line(sources=sources, tasks=(task,), sinks=(Sink(name="out", input="t", node="gate"),), broker="gate")
    found = simulate(problem, {"t": "gate"}, "eager", duration_s=4000, seed=2)
    expected = evaluate(problem, {"t": "gate"}, "eager")
    assert found.mean_ms["out"] == pytest.approx(expected.latency_ms["out"], rel=0.25)
    assert found.results["out"] == pytest.approx(3600 * min(2.0, rate_hz), rel=0.25)


def test_sources_of_a_known_phase_keep_their_pace() -> None:
    """Three are due at the same time, and their messages share a link: a second and a third one wait, all the more the larger they are."""
    sources = tuple(Source(name=name, node="sensor", rate_hz=2, bytes=1e5, phase_ms=100) for name in "sru")
    task = Task(name="t", inputs=("s", "r", "u"), cpu_s=0.0)
    problem = line(sources=sources, tasks=(task,))
    together = simulate(problem, {"t": "server"}, "eager", duration_s=100).latency_ms["out"]
    apart = tuple(msgspec.structs.replace(source, phase_ms=100.0 + 160 * n) for n, source in enumerate(sources))
    alone = simulate(msgspec.structs.replace(problem, sources=apart), {"t": "server"}, "eager", duration_s=100).latency_ms["out"]
    assert alone[0.5] == pytest.approx(alone[0.99]) and together[0.99] == pytest.approx(
        simulate(problem, {"t": "server"}, "eager", seed=5, duration_s=100).latency_ms["out"][0.99]
    )
    assert together[0.99] > 2 * alone[0.99]


def test_a_plan_of_a_cluster_is_predicted() -> None:
    problem = cluster(4, nodes=60, tasks=16)
    # What a limit of rate, or an input that starts no run, does to latency is in no formula.
    tasks = tuple(msgspec.structs.replace(task, trigger="any", min_interval_ms=0.0) for task in problem.tasks)
    problem = msgspec.structs.replace(problem, tasks=tasks)
    plan = solve(problem, time_limit_s=5)
    found = simulate(problem, plan.assignment, plan.routing, duration_s=300, seed=1)
    for link, rate in plan.evaluation.link_bytes_s.items():
        if rate > 1e3:
            assert found.link_bytes_s[link] == pytest.approx(rate, rel=0.1), link
    close = [abs(found.mean_ms[sink] / ms - 1) < 0.25 for sink, ms in plan.evaluation.latency_ms.items()]
    assert sum(close) >= 0.8 * len(close)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [simulate(single(50), {"t": "n"}, duration_s=20, seed=seed).mean_ms["out"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"duration_s": 5, "warmup_s": 5}, "warmup_s"),
        ({"duration_s": 0}, "warmup_s"),
        ({"duration_s": "5"}, "duration_s is '5'"),
        ({"duration_s": math.nan}, "duration_s is nan"),
        ({"duration_s": math.inf}, "duration_s is inf"),
        ({"duration_s": True}, "duration_s is True"),
        ({"warmup_s": -1}, "warmup_s is -1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": None}, "seed is None"),
        ({"arrivals": []}, "'poisson' or 'periodic'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadValue, match=says):
        simulate(single(50), {"t": "n"}, **options)


def test_overload_is_said_and_nothing_is_nan() -> None:
    found = simulate(single(500), {"t": "n"}, duration_s=10)
    assert [str(v) for v in found.violations] == ["cpu of n: 5 of 0.95 cores, by t"]
    assert 3_000 < found.mean_ms["out"] < 10_000
    assert found.utilisation["n"] == pytest.approx(1)


def test_no_more_is_sent_over_a_link_than_goes() -> None:
    busy = line(sources=(Source(name="s", node="sensor", rate_hz=1000, bytes=9_800),))
    found = simulate(busy, {"t": "server"}, "eager", duration_s=5)
    assert found.link_bytes_s["radio"] == pytest.approx(1e6, rel=1e-3)
    assert {v.name for v in found.violations} == {"cpu", "link"}


def test_a_run_longer_than_the_simulation_counts_as_far_as_it_goes() -> None:
    problem = line(tasks=(Task(name="t", inputs=("s",), cpu_s=100),))
    found = simulate(problem, {"t": "gate"}, duration_s=10, warmup_s=5)
    assert found.utilisation["gate"] == pytest.approx(1) and found.results["out"] == 0


@pytest.mark.parametrize("problem", [single(1e-6), line(nodes=(Node(name="sensor"), Node(name="gate", cores=0), Node(name="server")))])
def test_where_no_result_comes_latency_is_infinite(problem: Problem) -> None:
    node = "n" if len(problem.nodes) == 1 else "gate"
    found = simulate(problem, {"t": node}, duration_s=5)
    assert found.results["out"] == 0
    assert {found.mean_ms["out"], *found.latency_ms["out"].values()} == {math.inf}
    assert bool(found.violations) == (node == "gate")
