"""Hosts that are gone are not waited for with each message."""

from __future__ import annotations

import pytest

from edgeserve.core.errors import FetchError
from edgeserve.payload.absence import Absences


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_is_away_for_a_while_is_waited_for_and_who_is_gone_is_asked_now_and_then() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    while clock.now < 160.0:
        assert absences.patience("a", 10.0) == 10.0
        clock.now += 10.0
        absences.ended("a", clock.now - 10.0, OSError("no route"))
    assert absences.patience("a", 10.0) == 5.0  # asked once more, for not as long
    with pytest.raises(FetchError, match=r"a has not answered for 60 s, and is asked again in 5\.0 s; the last time: no route"):
        absences.patience("a", 10.0)
    assert absences.patience("b", 10.0) == 10.0
    clock.now += 5.0
    assert absences.patience("a", 10.0) == 5.0
    absences.ended("a", clock.now, None)
    assert absences.patience("a", 10.0) == 10.0


def test_one_answer_among_failures_is_enough() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.ended("a", 0.0, OSError("no route"))
    absences.ended("a", 0.0, None)
    assert absences.patience("a", 10.0) == 10.0


def test_failures_far_apart_are_no_absence() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    for _ in range(5):
        clock.now += 61.0
        assert absences.patience("a", 10.0) == 10.0
        absences.ended("a", clock.now, OSError("no route"))
