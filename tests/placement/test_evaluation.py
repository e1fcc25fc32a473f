"""What a placement costs: by hand on small ones, and what must hold for all."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.placement.instances import small

from edgeserve.placement import BadValue, InvalidPlan, Link, Node, Problem, Sink, Source, Task, Weights, evaluate, solve
from edgeserve.placement.model import Model
from edgeserve.placement.state import State

MODES: tuple[Any, ...] = ("eager", "lazy")


def line(**changes: object) -> Problem:
    """sensor - gate - server, the broker at the gate."""
    fields: dict[str, object] = {
        "nodes": (Node(name="sensor", speed=0.5), Node(name="gate"), Node(name="server", cores=2, speed=2.0)),
        "links": (
            Link(name="radio", ends=("sensor", "gate"), bandwidth_bytes_s=1e6, latency_ms=2),
            Link(name="wire", ends=("gate", "server"), bandwidth_bytes_s=1e7, latency_ms=5),
        ),
        "broker": "gate",
        "sources": (Source(name="s", node="sensor", rate_hz=10, bytes=9_800),),
        "tasks": (Task(name="t", inputs=("s",), cpu_s=0.02, output_bytes=800),),
        "sinks": (Sink(name="out", input="t", node="sensor"),),
        "header_bytes": 200,
    }
    return Problem(**{**fields, **changes})  # type: ignore[arg-type]


def test_eager_by_hand() -> None:
    found = evaluate(line(), {"t": "server"}, "eager")
    # There: 10,000 bytes over both links; 20 ms at double speed; back: 1,000 bytes.
    assert found.unloaded_ms["out"] == pytest.approx(10 + 2 + 1 + 5 + 10 + 0.1 + 5 + 1 + 2)
    assert found.link_bytes_s == pytest.approx({"radio": 10 * 11_000, "wire": 10 * 11_000})
    assert found.nodes["server"].utilisation == pytest.approx(0.05)
    assert found.feasible and found.objective == pytest.approx(sum(found.terms.values()))
    assert found.terms["latency"] == pytest.approx(10 * 36.1e-3)


def test_lazy_by_hand() -> None:
    found = evaluate(line(), {"t": "server"}, "lazy")
    # The payload is on both links at once; the faster one is a packet behind.
    there = 0.2 + 2 + 0.02 + 5 + (5 + 2) + (9.8 + 2 + 0.15 + 5)
    back = 0.02 + 5 + 0.2 + 2 + (2 + 5) + (0.08 + 5 + 0.8 + 2)
    assert found.unloaded_ms["out"] == pytest.approx(there + 10 + back)
    assert found.link_bytes_s["radio"] == pytest.approx(10 * (200 + 9_800 + 200 + 800))


def test_what_is_not_lazy_goes_along_whatever_is_said() -> None:
    source, task = Source(name="s", node="sensor", rate_hz=10, bytes=9_800, lazy=False), line().tasks[0]
    problem = line(sources=(source,), tasks=(Task(name="t", inputs=("s",), cpu_s=task.cpu_s, output_bytes=800, lazy=False),))
    for node in ("sensor", "server"):
        told, meant = (evaluate(each, {"t": node}, mode) for each, mode in ((problem, "lazy"), (line(), "eager")))
        assert told.link_bytes_s == pytest.approx(meant.link_bytes_s)
        assert told.latency_ms == pytest.approx(meant.latency_ms)
        assert told.objective == pytest.approx(meant.objective)
    assert set(solve(problem).routing.values()) == {"eager"}


def test_each_way_through_the_broker_takes_a_hop() -> None:
    for mode in MODES:
        before, after = (evaluate(line(hop_ms=hop_ms), {"t": "server"}, mode) for hop_ms in (0, 1.5))
        assert after.unloaded_ms["out"] == pytest.approx(before.unloaded_ms["out"] + 2 * 1.5)
        assert after.link_bytes_s == before.link_bytes_s


def test_lazy_to_the_same_node_moves_headers_only() -> None:
    found = evaluate(line(), {"t": "sensor"}, "lazy")
    assert found.link_bytes_s == pytest.approx({"radio": 10 * 4 * 200, "wire": 0})
    assert found.unloaded_ms["out"] == pytest.approx(2 * (0.2 + 2 + 0.2 + 2) + 40)


def test_a_rate_limit_saves_what_lazy_does_not_fetch() -> None:
    slow = (Task(name="t", inputs=("s",), cpu_s=0.02, output_bytes=800, min_interval_ms=1000),)
    lazy = evaluate(line(tasks=slow), {"t": "server"}, "lazy")
    assert lazy.link_bytes_s["wire"] == pytest.approx(10 * 200 + 1 * 9_800 + 1_000)
    assert lazy.nodes["server"].cores == pytest.approx(0.01)
    eager = evaluate(line(tasks=slow), {"t": "server"}, {("s", "t"): "eager", ("t", "out"): "lazy"})
    assert eager.link_bytes_s["wire"] == pytest.approx(10 * 10_000 + 1_000)


def test_a_payload_that_stays_has_a_reference_in_its_header_and_is_asked_for() -> None:
    problem = line(reference_bytes=160, fetch_bytes=500)
    eager, lazy = (evaluate(problem, {"t": "server"}, mode) for mode in MODES)
    assert eager.link_bytes_s == evaluate(line(), {"t": "server"}, "eager").link_bytes_s
    assert lazy.link_bytes_s == pytest.approx(dict.fromkeys(("radio", "wire"), 10 * (2 * 360 + 9_800 + 800 + 2 * 500)))
    before = evaluate(line(), {"t": "server"}, "lazy").unloaded_ms["out"]
    # 160 B twice over each link, and 500 B over both at once, of which the second time within the packet that waits for each link.
    assert lazy.unloaded_ms["out"] == pytest.approx(before + 2 * (0.16 + 0.016) + 0.5 + 0.5 + 0.05)
    assert evaluate(problem, {"t": "sensor"}, "lazy").link_bytes_s["radio"] == pytest.approx(10 * 4 * 360)


def pair(replicas: int = 2, **changes: Any) -> Problem:
    """A join of two sources at the sensor."""
    sources = tuple(Source(name=name, node="sensor", rate_hz=10, bytes=9_800) for name in ("s", "r"))
    fields = {"inputs": ("s", "r"), "cpu_s": 0.01, "output_bytes": 800, "trigger": "all", "replicas_max": replicas}
    return line(sources=sources, tasks=(Task(name="t", **{**fields, **changes}),))


@pytest.mark.parametrize("routing", MODES)
def test_replicas_of_a_join_hand_each_other_sets_through_the_broker(routing: Any) -> None:
    there = {"t": ("gate", "server")}
    shared, apart = (evaluate(pair(shares_sets=each), there, routing) for each in (True, False))
    size = 200 + 2 * (9_800 + 140)
    # Half of the sets are joined at the server, and half of them run there; the other node is the broker's.
    more = {link: shared.link_bytes_s[link] - apart.link_bytes_s[link] for link in shared.link_bytes_s}
    assert more == pytest.approx({"radio": 0, "wire": 10 * size})
    assert shared.unloaded_ms["out"] == pytest.approx(apart.unloaded_ms["out"] + size / 1e4 + 5)
    alone = [evaluate(pair(shares_sets=each), {"t": "server"}, routing) for each in (True, False)]
    assert alone[0] == alone[1]


def test_processes_of_a_node_take_their_memory_each_and_hand_each_other_sets() -> None:
    nodes = (Node(name="sensor"), Node(name="gate", memory_bytes=4e9), Node(name="server", memory_bytes=4e9))
    problem = pair(processes=3, memory_bytes=1.5e9)
    problem = msgspec.structs.replace(problem, nodes=nodes)
    one, both = (evaluate(problem, {"t": site}, "eager") for site in ("server", ("gate", "server")))
    assert [str(each) for each in one.violations] == ["memory of server: 4,500,000,000 of 4,000,000,000 bytes, by t"]
    assert both.feasible and both.nodes["gate"].memory_bytes == 3e9, "the most that one of two has of three"
    # Once to the join, and twice to the broker and back as sets.
    assert one.link_bytes_s["wire"] == pytest.approx(10 * (2 * 10_000 + 2 * (200 + 2 * (9_800 + 140)) + 1_000))
    assert solve(problem).assignment["t"] == ("gate", "server")


def test_two_tasks_of_a_node_fetch_a_payload_once() -> None:
    two = (Task(name="t", inputs=("s",), cpu_s=0.02, output_bytes=800), Task(name="u", inputs=("s",), cpu_s=0.02, min_interval_ms=200))
    together = evaluate(line(tasks=two), {"t": "server", "u": "server"}, "lazy").link_bytes_s["wire"]
    assert together == pytest.approx(10 * (2 * 200 + 9_800) + 10 * 1_000)
    eager = evaluate(line(tasks=two), {"t": "server", "u": "server"}, "eager")
    assert eager.link_bytes_s["radio"] == pytest.approx(10 * 10_000 + 10 * 1_000), "up to the broker once"
    assert eager.link_bytes_s["wire"] == pytest.approx(2 * 10 * 10_000 + 10 * 1_000), "from the broker to each"


def switched(bandwidths: tuple[float, ...], rate_hz: float = 40, duplex: bool = False) -> Problem:
    """Nodes in a row, n0 to the last, which has the broker; a source at the first."""
    nodes = tuple(Node(name=f"n{k}", cores=int(k == len(bandwidths))) for k in range(len(bandwidths) + 1))
    return Problem(
        nodes=nodes,
        links=tuple(
            Link(name=f"l{k}", ends=(f"n{k}", f"n{k + 1}"), bandwidth_bytes_s=bandwidth, latency_ms=1, duplex=duplex)
            for k, bandwidth in enumerate(bandwidths)
        ),
        broker=nodes[-1].name,
        sources=(Source(name="s", node="n0", rate_hz=rate_hz, bytes=14_800),),
        tasks=(Task(name="t", inputs=("s",), cpu_s=0.0, output_bytes=9_800),),
        sinks=(Sink(name="out", input="t", node=nodes[-1].name), Sink(name="back", input="t", node="n0")),
        header_bytes=200,
    )


@pytest.mark.parametrize("bandwidths", [(1e6, 1e6), (1e6, 2e6, 4e6), (4e6, 1e6, 2e6), (2e6, 4e6, 1e6)])
def test_packets_of_a_message_are_on_all_links_of_a_route_at_once(bandwidths: tuple[float, ...]) -> None:
    found = evaluate(switched(bandwidths), {"t": f"n{len(bandwidths)}"}, "eager").unloaded_ms["out"]
    slowest = min(bandwidths)
    others = sum(1e3 * 1_500 / each for each in bandwidths) - 1e3 * 1_500 / slowest
    assert found == pytest.approx(1e3 * 15_000 / slowest + others + len(bandwidths))


def test_what_has_waited_for_a_link_waits_for_the_next_only_behind_what_comes_from_elsewhere() -> None:
    one, two = (evaluate(switched(each, duplex=True), {"t": f"n{len(each)}"}, "eager") for each in ((1e6,), (1e6, 1e6)))
    waits = [found.latency_ms["out"] - found.unloaded_ms["out"] for found in (one, two)]
    assert waits == pytest.approx([15 * 0.6 / (2 * 0.4)] * 2)
    assert two.terms["waiting"] == pytest.approx(2 * one.terms["waiting"]), "each link is counted by itself"


def test_each_direction_of_a_duplex_link_has_its_bandwidth() -> None:
    shared, duplex = (evaluate(switched((1e6,), duplex=each), {"t": "n1"}, "eager") for each in (False, True))
    assert shared.link_bytes_s == duplex.link_bytes_s == pytest.approx({"l0": 40 * 25_000})
    assert shared.link_utilisation == pytest.approx({"l0": 1.0}) and [v.name for v in shared.violations] == ["link"]
    assert duplex.link_utilisation == pytest.approx({"l0": 0.6}) and duplex.feasible
    assert duplex.unloaded_ms == shared.unloaded_ms


def test_a_steady_pace_waits_for_nothing_and_bursts_for_longer() -> None:
    found = [
        evaluate(msgspec.structs.replace(switched((1e6,), 30), variability=variability), {"t": "n1"}, "eager") for variability in (0, 1, 3)
    ]
    waits = [each.latency_ms["out"] - each.unloaded_ms["out"] for each in found]
    assert waits == pytest.approx([0, waits[1], 3 * waits[1]]) and waits[1] > 1
    assert [each.terms["waiting"] for each in found] == pytest.approx([0, found[1].terms["waiting"], 3 * found[1].terms["waiting"]])


def test_waiting_is_that_of_a_queue() -> None:
    busy = line(sources=(Source(name="s", node="sensor", rate_hz=30, bytes=1),))
    found = evaluate(busy, {"t": "gate"}, "lazy")
    load = 30 * 0.02
    assert found.nodes["gate"].waiting == pytest.approx(load**2 / (2 * (1 - load)))
    waits = found.latency_ms["out"] - found.unloaded_ms["out"]
    assert waits == pytest.approx(1e3 * 0.02 * load / (2 * (1 - load)), rel=0.02), "and links hardly wait"


def test_triggers() -> None:
    def join(trigger: str) -> Problem:
        sources = (Source(name="s", node="sensor", rate_hz=10, bytes=800), Source(name="r", node="gate", rate_hz=30, bytes=800))
        return line(sources=sources, tasks=(Task(name="t", inputs=("s", "r"), cpu_s=0.0, trigger=trigger),))

    def at(trigger: str) -> float:
        return evaluate(join(trigger), {"t": "gate"}, "eager").unloaded_ms["out"]

    back = 0.2 + 2
    assert at("s") == pytest.approx(1 + 2 + back) and at("r") == pytest.approx(back)
    assert at("any") == pytest.approx(0.25 * 3 + back) and at("all") == pytest.approx(3 + back)


def test_replicas_share_the_work() -> None:
    both = line(tasks=(Task(name="t", inputs=("s",), cpu_s=0.02, memory_bytes=5, replicas_max=2),))
    found = evaluate(both, {"t": ("gate", "server")}, "eager")
    assert found.nodes["gate"].cores == pytest.approx(0.1) and found.nodes["server"].cores == pytest.approx(0.05)
    assert found.link_bytes_s["wire"] == pytest.approx(10 * (10_000 + 200) / 2)
    assert {str(v).split(":")[0] for v in found.violations} == {"memory of gate", "memory of server"}


def test_violations_have_names() -> None:
    problem = line(
        nodes=(Node(name="sensor", zone="eu"), Node(name="gate", zone="eu"), Node(name="server", zone="us", memory_bytes=10)),
        sources=(Source(name="s", node="sensor", rate_hz=200, bytes=9_800, stays_in="eu"),),
        tasks=(
            Task(name="t", inputs=("s",), cpu_s=0.02, memory_bytes=20, output_bytes=800),
            Task(name="u", inputs=("t",), cpu_s=0, memory_bytes=1),
            Task(name="v", inputs=("t",), cpu_s=0),
        ),
        pins={"u": ("server",)},
        separate=(("t", "v"),),
        colocate=(("t", "u"),),
    )
    found = evaluate(problem, {"t": "server", "u": "gate", "v": "server"}, "eager")
    assert {v.name for v in found.violations} == {"cpu", "memory", "link", "pin", "zone", "separation", "colocation"}
    assert not found.feasible and all(v.used > v.limit for v in found.violations)


@pytest.mark.parametrize(
    ("assignment", "routing", "says"),
    [
        ({}, "lazy", "has no node"),
        ({"t": "gat"}, "lazy", "did you mean 'gate'"),
        ({"t": ("gate", "gate")}, "lazy", "each once"),
        ({"t": ()}, "lazy", "at least one"),
        ({"t": "gate", "x": "gate"}, "lazy", "no task 'x'"),
        ({"t": "gate"}, {("s", "x"): "lazy"}, "no edge"),
        ({"t": "gate"}, {("s", "t"): "fast"}, "use 'eager' or 'lazy'"),
        ({"t": "gate"}, "fast", "use 'eager' or 'lazy'"),
        ({"t": "gate"}, None, "routing is None: give 'eager', 'lazy' or a dict"),
        ({"t": "gate"}, {"st": "lazy"}, "there is no edge 'st'"),
        ({"t": 5}, "lazy", r"assignment\['t'\] is 5: give the name of a node"),
        ({"t": None}, "lazy", r"assignment\['t'\] is None"),
        ({5: "gate"}, "lazy", "there is no task 5"),
        ("t", "lazy", "assignment is 't': give a dict"),
        (None, "lazy", "assignment is None: give a dict"),
    ],
)
def test_a_plan_of_another_problem_is_refused(assignment: Any, routing: Any, says: str) -> None:
    with pytest.raises(InvalidPlan, match=says):
        evaluate(line(), assignment, routing)


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(BadValue, match=r"problem is .*from_json"):
        evaluate({"nodes": []}, {})  # type: ignore[arg-type]


def numbers(found: Any) -> list[float]:
    """All numbers of an evaluation."""
    if isinstance(found, int | float):
        return [float(found)]
    if hasattr(found, "__dataclass_fields__"):
        found = [getattr(found, name) for name in found.__dataclass_fields__]
    each = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [number for value in each for number in numbers(value)]


@pytest.mark.parametrize("routing", ["eager", "lazy"])
@pytest.mark.parametrize("part", ["nodes", "links", "sources", "tasks", "sinks", "weights"])
def test_no_figure_of_the_most_extreme_problem_is_nan(part: str, routing: Any) -> None:
    base = line(tasks=(Task(name="t", inputs=("s",), cpu_s=0.02, output_bytes=800, min_interval_ms=1),), weights=Weights(cost=1, bytes=1))
    last = base.weights if part == "weights" else getattr(base, part)[-1]
    for name in last.__struct_fields__:
        for value in (0, 1e-300, 1e-18, 10**18, 1e308):
            if name == "max_utilisation" or not isinstance(getattr(last, name), int | float):
                continue
            try:
                changed = msgspec.structs.replace(last, **{name: value})
                problem = line(**{part: changed if part == "weights" else (*getattr(base, part)[:-1], changed)})
                found = evaluate(problem, {"t": "server"}, routing)
            except BadValue:
                continue
            assert not any(math.isnan(number) for number in numbers(found)), (name, value)


def test_what_is_overloaded_is_named_with_who_uses_it_and_waits_for_ever() -> None:
    busy = line(sources=(Source(name="s", node="sensor", rate_hz=1000, bytes=9_800),))
    found = evaluate(busy, {"t": "server"}, "eager")
    assert found.latency_ms["out"] == math.inf and math.isfinite(found.objective) and not found.feasible
    said = {v.name: (v.where, v.by, str(v)) for v in found.violations}
    assert said["cpu"] == ("server", ("t",), "cpu of server: 10 of 1.6 cores, by t")
    links = [str(v) for v in found.violations if v.name == "link"]
    assert links[0] == "link of radio: 11,000,000 of 800,000 bytes/s, by s, t"


def test_who_takes_memory_and_accelerators() -> None:
    nodes = (Node(name="sensor", memory_bytes=8e9), Node(name="gate", memory_bytes=8e9, accelerators={"gpu": 1}), Node(name="server"))
    tasks = (
        Task(name="t", inputs=("s",), cpu_s=0.001, memory_bytes=8e9),
        Task(name="u", inputs=("s",), cpu_s=0.001, memory_bytes=100, accelerators={"gpu": 1}),
        Task(name="v", inputs=("s",), cpu_s=0.001, accelerators={"gpu": 1}),
    )
    found = evaluate(line(nodes=nodes, tasks=tasks), dict.fromkeys("tuv", "gate"))
    assert [str(v) for v in found.violations] == [
        "memory of gate: 8,000,000,100 of 8,000,000,000 bytes, by t, u",
        "accelerator of gate (gpu): 2 of 1, by u, v",
    ]


def test_a_run_needs_a_core_even_if_it_takes_no_time() -> None:
    problem = line(
        nodes=(Node(name="sensor"), Node(name="gate", cores=0), Node(name="server")), tasks=(Task(name="t", inputs=("s",), cpu_s=0),)
    )
    found = evaluate(problem, {"t": "gate"})
    assert [str(v) for v in found.violations] == ["cpu of gate: 1 of 0 cores, by t"]
    assert found.latency_ms["out"] == math.inf
    model = Model(problem)
    assert not State(model, [(1,)], [True, True]).feasible


def test_a_pin_and_a_zone_are_told_apart() -> None:
    nodes = (Node(name="sensor", zone="eu"), Node(name="gate", zone="eu"), Node(name="server", zone="us"))
    source = (Source(name="s", node="sensor", rate_hz=1, bytes=1, stays_in="eu"),)
    pinned = evaluate(line(nodes=nodes, pins={"t": ("gate",)}), {"t": "server"}, "lazy")
    assert [v.where for v in pinned.violations] == ["t on server (by `pins`)"]
    bound = evaluate(line(nodes=nodes, sources=source), {"t": "server"}, "lazy")
    assert "t on server (by `stays_in`)" in [v.where for v in bound.violations]


def any_state(problem: Problem, rng: random.Random) -> State:
    model = Model(problem)
    sites = [
        tuple(sorted(rng.sample(range(len(model.nodes)), rng.randint(group.least, min(group.most, len(model.nodes))))))
        for group in model.groups
    ]
    return State(model, sites, [rng.random() < 0.5 for _ in model.edges])


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_a_change_costs_what_the_changed_placement_costs(seed: int, rng: random.Random) -> None:
    state = any_state(small(seed), rng)
    for _ in range(6):
        other = any_state(state.model.problem, rng)
        moved = {g: other.sites[g] for g in range(len(state.sites)) if rng.random() < 0.5}
        turned = {e: other.lazy[e] for e in range(len(state.lazy)) if rng.random() < 0.3}
        state.apply(state.trial(moved, turned))
        fresh = state.copy()
        assert state.cost == pytest.approx(fresh.cost, rel=1e-9, abs=1e-9)
        assert state.excess == pytest.approx(fresh.excess, rel=1e-9, abs=1e-7)


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_what_holds_for_every_placement(seed: int, rng: random.Random) -> None:
    problem = small(seed)
    state = any_state(problem, rng)
    model = state.model
    names = {task.name: tuple(model.nodes[n] for n in state.sites[model.group_of[t]]) for t, task in enumerate(model.tasks)}
    routing = {(model.streams[e.stream].name, e.consumer): "lazy" if state.lazy[e.number] else "eager" for e in model.edges}
    found = evaluate(problem, names, routing)  # type: ignore[arg-type]
    assert found.objective == pytest.approx(state.cost, rel=1e-9)
    assert found.feasible == state.feasible
    assert all(found.latency_ms[sink] >= found.unloaded_ms[sink] - 1e-9 for sink in found.latency_ms)
    assert min(found.link_bytes_s.values()) >= 0
    doubled = Problem.from_json(problem.to_json())
    weights = Weights(**{name: 2 * getattr(problem.weights, name) for name in problem.weights.__struct_fields__})
    doubled = Problem(**{**{name: getattr(problem, name) for name in problem.__struct_fields__}, "weights": weights})
    assert evaluate(doubled, names, routing).objective == pytest.approx(2 * found.objective, rel=1e-9)  # type: ignore[arg-type]
