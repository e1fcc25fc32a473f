"""Sums over routes and the cheapest starts, against every route by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.placement import Link, Node, Problem, Sink, Source, Task
from edgeserve.placement.model import Model
from edgeserve.placement.routes import TableRoutes, TreeRoutes


def network(seed: int, more: int) -> Problem:
    """Nodes in a tree, some links duplex, and `more` links between any two."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 12))
    pairs = [(f"n{k}", f"n{rng.integers(0, k)}") for k in range(1, count)]
    pairs += [(f"n{a}", f"n{b}") for a, b in (rng.choice(count, 2, replace=False) for _ in range(more))]
    return Problem(
        nodes=tuple(Node(name=f"n{k}") for k in range(count)),
        links=tuple(
            Link(
                name=f"l{k}",
                ends=pair if rng.random() < 0.5 else pair[::-1],
                bandwidth_bytes_s=float(rng.choice([1.0, 2.0, 5.0])),
                latency_ms=float(rng.random()),
                duplex=bool(rng.random() < 0.5),
            )
            for k, pair in enumerate(pairs)
        ),
        broker=f"n{rng.integers(0, count)}",
        sources=(Source(name="s", node="n0", rate_hz=1, bytes=1),),
        tasks=(Task(name="t", inputs=("s",), cpu_s=0),),
        sinks=(Sink(name="out", input="t", node="n0"),),
    )


@pytest.mark.parametrize(("more", "kind"), [(0, TreeRoutes), (2, TableRoutes)])
@pytest.mark.parametrize("reverse", [False, True])
@given(st.integers(0, 10_000))
def test_they_are_those_of_each_route(more: int, kind: type, reverse: bool, seed: int) -> None:
    model = Model(network(seed, more))
    routes, rng, nodes = model.routes, np.random.default_rng(seed), range(len(model.nodes))
    assert type(routes) is kind
    fields = rng.random((2, len(routes.link_of)))
    sums, parts, slow, first = routes.sums(fields), rng.random((3, 2)), rng.random(3), rng.random((3, len(nodes)))

    def way(k: int, a: int, b: int) -> float:
        path = list(routes.path(b, a) if reverse else routes.path(a, b))
        return float((parts[k] @ fields[:, path]).sum() + slow[k] * model.per_byte[path].max(initial=0.0))

    at = [int(node) for node in rng.integers(0, len(nodes), 3)]
    rows = [[way(k, a, b) for b in nodes] for k, a in enumerate(at)]
    np.testing.assert_allclose(routes.rows(sums, parts, slow, at, reverse), rows)
    least = [[min(first[k, a] + way(k, a, b) for a in nodes) for b in nodes] for k in range(3)]
    np.testing.assert_allclose(routes.spread(first, sums, parts, slow, reverse), least)
    ways = [routes.path(node, model.broker) for node in nodes]
    np.testing.assert_allclose(routes.to_broker(sums), [[row[list(path)].sum() for path in ways] for row in fields])
    np.testing.assert_allclose(routes.slowest_up, [model.per_byte[list(path)].max(initial=0.0) for path in ways])
    there_and_back = routes.rows(routes.round_trip(sums), parts, np.zeros(3), at, reverse)
    wanted = [
        [sum((parts[k] @ fields[:, list(path)]).sum() for path in (routes.path(a, b), routes.path(b, a))) for b in nodes]
        for k, a in enumerate(at)
    ]
    np.testing.assert_allclose(there_and_back, wanted)
