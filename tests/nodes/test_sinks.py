"""Effects of sinks: once, or flagged, whoever shares the topic and whatever the functions do."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import edgeserve
from edgeserve import DataSource, Materialize
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.stage.journal import Journal
from edgeserve.transport import connect, disconnect


def send(url: str, *items: int) -> None:
    with DataSource(items, url, source_id="a", topic="t", message_id=lambda i: i) as source:
        for _ in items:
            next(source)


@pytest.mark.parametrize("done", [False, True])
def test_the_same_message_in_two_sinks_is_flagged_or_dropped(embedded: str, done: bool, quiet_ms: int) -> None:
    ran: list[tuple[str, int, bool]] = []
    in_hand, go_on = threading.Event(), threading.Event()

    def one(i: int) -> None:
        ran.append(("one", i, edgeserve.context().redelivered))
        if i == 2:
            in_hand.set()
            assert go_on.wait(20)

    def two(i: int) -> None:
        ran.append(("two", i, edgeserve.context().redelivered))

    # What is only done, and not settled, the group does not know: the journal does.
    first, second = (Materialize(f, embedded, topic="t", timeout_ms=quiet_ms) for f in (one, two))
    with second, first:
        send(embedded, 1, 2)
        thread = threading.Thread(target=first.run)
        thread.start()
        assert in_hand.wait(20)
        send(embedded, 1 if done else 2)
        with pytest.raises((ReceiveTimeout, StopIteration)):
            while True:
                next(second)
        go_on.set()
        first.close()
        thread.join(20)
        assert second.counters.get("duplicate", 0) == (1 if done else 0)
    expected = [("one", 1, False), ("one", 2, False)]
    assert ran == (expected if done else [*expected, ("two", 2, True)])


def test_what_another_host_may_have_done_is_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = f"local://{tmp_path / 'store'}"
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "this-host"))
    send(node, 1, 2)
    flags: list[bool] = []
    with Materialize(flags.append, node, topic="t"):
        pass  # the group is there
    sink = Materialize(lambda _: flags.append(edgeserve.context().redelivered), node, topic="t", timeout_ms=2000)
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "another-host"))
    o, transport = sink._stage.options, connect(node)
    killed = transport.subscribe(o.topics, o.group, kind=o.kind, signature=o.signature)
    killed.nack("t", [d[1] for d in killed.receive(1, 1000)])
    killed.close()
    disconnect(transport)
    with sink:
        next(sink)
        next(sink)
    assert flags == [True, False]


def test_a_sink_that_steps_itself_keeps_both_messages_in_hand(embedded: str, quiet_ms: int) -> None:
    send(embedded, 1, 2, 3)
    told: list[tuple[int, int]] = []
    flags: list[tuple[int, bool]] = []

    def look() -> tuple[int, int]:
        with_look = Journal(sink._stage._journal._directory)
        found = len(with_look.done), len(with_look.in_hand)
        with_look.close()
        return found

    def take(i: int) -> None:
        flags.append((i, edgeserve.context().redelivered))
        if i == 1:
            told.append(look())
            next(sink)
            told.append(look())
        else:
            told.append(look())

    with Materialize(take, embedded, topic="t", timeout_ms=quiet_ms) as sink:
        next(sink)
        next(sink)
        with pytest.raises(ReceiveTimeout):
            next(sink)
        told.append(look())
    # Before and in the inner step, after it, in the third message, at the end.
    assert told == [(0, 1), (0, 2), (1, 1), (2, 1), (3, 0)]
    assert flags == [(1, False), (2, False), (3, False)]
