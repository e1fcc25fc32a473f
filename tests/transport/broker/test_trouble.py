"""What is said while a broker is away, or there and silent: each once, and when it is over."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.waiting import until

from edgeserve.transport.broker import trouble as module
from edgeserve.transport.broker.driver import Driver
from edgeserve.transport.broker.trouble import FOR_EVER, Silence, Trouble


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> _Clock:
    caplog.set_level(logging.WARNING, "edgeserve")
    made = _Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def _driver(away: str | None) -> Any:
    # A broker that is away or silent at will: only what it says of itself matters here.
    made = SimpleNamespace(what="NATS", away=away, deadline_s=None)
    made.trouble = lambda: made.away
    made.answers = str
    return made


def test_a_silent_broker_is_named_every_five_seconds_and_once_when_it_confirms_again(
    clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    driver = cast(Driver, _driver(None))
    silence = Silence(driver, Trouble(driver), "in")
    for _ in range(12):
        clock.now += 1
        silence.say(3)
    said = [r.message for r in caplog.records]
    assert len(said) == 2 and all("NATS has not confirmed 3 messages for topic 'in'" in m for m in said)
    assert "for 5 s" in said[0] and "for 10 s" in said[1]
    silence.heard()
    silence.heard()
    assert [r.message for r in caplog.records[2:]] == ["NATS confirms again what is sent to topic 'in'"]


def test_a_broker_that_is_away_is_said_once_for_all_who_wait(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    driver = _driver("no connection to nats://x")
    away = Trouble(driver)
    waiting = [Silence(driver, away, topic) for topic in ("in", "out")]
    for _ in range(8):
        clock.now += 1
        for silence in waiting:
            silence.say(1)
    driver.away = None
    for silence in waiting:
        silence.heard()
    assert [r.message for r in caplog.records] == [
        f"NATS has been away for 1 s, waiting{FOR_EVER}: no connection to nats://x",
        "NATS has been away for 6 s, waiting: no connection to nats://x",
        "NATS is back after 7 s",
    ]


def test_what_is_known_of_a_broker_that_is_there_and_gives_no_connection_is_told(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever says that it is away does not wait for the answer: that may take its time."""
    driver = _driver("no connection to pulsar://x")
    may_answer = threading.Event()
    driver.answers = lambda: "it is there" if may_answer.wait(60) else ""
    away = Trouble(driver)
    for _ in range(2):
        away.say(clock.now)
        clock.now += 1
    may_answer.set()
    until(lambda: away._there)
    clock.now += 5
    away.say(clock.now)
    assert [record.message for record in caplog.records] == [
        f"NATS has been away for 1 s, waiting{FOR_EVER}: no connection to pulsar://x",
        "NATS has been away for 7 s, waiting: no connection to pulsar://x; it is there",
    ]
