"""What a node drops is said in its log: when it begins, and how much it was in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from edgeserve import Compute, DataSource, Materialize

Send = Callable[..., None]


@pytest.fixture
def node(embedded: str) -> str:
    return embedded


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[int, str]]]:
    caplog.set_level(logging.INFO, "edgeserve")
    return lambda: [(r.levelno, r.getMessage()) for r in caplog.records if " drop" in r.getMessage()]


def test_a_join_that_overflows_says_so_once_and_sums_up(node: str, send: Send, said: Callable[[], list[tuple[int, str]]]) -> None:
    send("cam", range(1_203))
    with Compute(lambda cam, lidar: cam, node, worker_id="joint", join="exact", max_held=3) as compute:
        for _ in range(1_203):
            next(compute)
        overflow = "as many of this source wait as max_held (of a join, where no partners come for them) or max_backlog lets"
        begins = (logging.WARNING, f"Compute 'joint' drops messages of 'cam' (overflow): {overflow}")
        assert said() == [begins]
    assert said()[1:] == [(logging.WARNING, "Compute 'joint' dropped 1,200 messages: overflow 1,200 (of 'cam'); see explain()")]


def test_each_reason_is_said_and_whose_messages_they_were(node: str, send: Send, said: Callable[[], list[tuple[int, str]]]) -> None:
    for source, count in (("a", 4), ("b", 2)):
        send(source, [b"x"] * count)
    with Materialize(print, node, topic="src", gate=lambda _: None) as sink:
        for _ in range(6):
            next(sink)
    begins, total = said()
    # Whoever filters has asked for it.
    assert begins == (logging.INFO, "Materialize 'src' drops messages of 'a' (gate): a gate returns None for them")
    assert total == (logging.INFO, "Materialize 'src' dropped 6 messages: gate 6 (4 of 'a', 2 of 'b'); see counters")


def test_who_drops_nothing_says_nothing(node: str, send: Send, said: Callable[[], list[tuple[int, str]]]) -> None:
    with DataSource([1, 1], node, source_id="a", message_id=str) as source:
        source.run()
    with Compute(lambda a: a, node) as compute:
        compute.run(until="end")
        assert compute.counters["duplicate"] == 1
    assert said() == []
