"""A join that is cut off at any moment makes the sets that it makes undisturbed."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.nodes.conftest import crash, drain

from edgeserve import Compute, DataSource, Materialize

MESSAGES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12)), max_size=25)
LIVES = st.lists(st.integers(0, 8), max_size=6)


def send(node: str, messages: list[tuple[str, int]]) -> None:
    """Each message with its event time and an id of its own, repeats included: the same message twice is a duplicate."""
    options: dict[str, Any] = {"topic": "in", "event_time": lambda m: m[1], "message_id": lambda m: m[1]}
    for source, stamp in messages:
        with DataSource([(source, stamp)], node, source_id=source, **options) as ds:
            next(ds)


def compute(node: str, out: str, options: dict[str, Any]) -> Compute:
    return Compute(lambda a, b: (a[1], b[1]), node, topic_in="in", topic_out=out, timeout_ms=0, **options)


def results(node: str, topic: str) -> list[Any]:
    found: list[Any] = []
    with Materialize(found.append, node, topic=topic, timeout_ms=0) as sink:
        drain(sink)
        assert "duplicate" not in sink.counters
    return found


@pytest.mark.filterwarnings("ignore::edgeserve.core.errors.SkewWarning")
@pytest.mark.parametrize(
    "options",
    [{"join": "exact"}, {"join": "latest"}, {"join": "latest", "no_overlap": True}, {"join": "latest", "max_time_diff_ms": 3e-6}],
    ids=str,
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, more=MESSAGES, lives=LIVES)
def test_the_sets_do_not_depend_on_crashes(
    options: dict[str, Any], messages: list[tuple[str, int]], more: list[tuple[str, int]], lives: list[int]
) -> None:
    node = f"memory://{uuid.uuid4().hex}"
    send(node, messages)
    for number, steps in enumerate(lives):
        crash(compute(node, "cut", options), steps)
        if number == len(lives) // 2:
            send(node, more)
    if not lives:
        send(node, more)
    with compute(node, "cut", options) as last:
        drain(last)
    with compute(node, "whole", options) as undisturbed:
        drain(undisturbed)
    assert results(node, "cut") == results(node, "whole")
