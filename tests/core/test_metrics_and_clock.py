"""Counters, the clock, and that every error is counted under a reason that exists."""

from __future__ import annotations

import doctest
import threading
import time

import edgeserve.core.metrics as metrics_module
import edgeserve.core.payload as payload_module
from edgeserve.core import Clock, Counters, Reason, SystemClock, errors


def test_counts_are_kept_by_edge_and_summed_over_edges() -> None:
    drops = Counters()
    drops.count(Reason.LATE, edge="cam")
    drops.count("late", 2, edge="mic")
    drops.count(Reason.GATE)
    assert drops.snapshot() == {"late": 3, "gate": 1}
    assert drops.snapshot("cam") == {"late": 1}
    assert drops.snapshot("nobody") == {}
    assert drops.edges() == {"": {"gate": 1}, "cam": {"late": 1}, "mic": {"late": 2}}
    assert all(type(reason) is str for reason in drops.snapshot())


def test_no_count_is_lost_between_threads() -> None:
    drops = Counters()
    threads = [threading.Thread(target=lambda: [drops.count(Reason.LATE) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drops.snapshot() == {"late": 20_000}


def test_every_message_error_is_counted_under_a_known_reason() -> None:
    kinds = [kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), errors.MessageError)]
    assert len(kinds) > 5
    assert {kind.reason for kind in kinds} <= set(Reason)


def test_the_system_clock_tells_the_time() -> None:
    clock: Clock = SystemClock()
    before = time.time_ns()
    assert before <= clock.now_ns() <= time.time_ns()
    assert clock.monotonic_ns() <= clock.monotonic_ns()


def test_the_examples_in_the_documentation_hold() -> None:
    for module in (metrics_module, payload_module):
        results = doctest.testmod(module)
        assert results.attempted > 0
        assert results.failed == 0
