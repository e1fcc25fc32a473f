"""Schedules of the simulated world that `make test` has time for; `bench/simulate.py` runs a hundred thousand."""

from __future__ import annotations

from itertools import chain

import pytest

pytest.importorskip("greenlet")

from tests.simulation.planted import PLANTED
from tests.simulation.scenario import Verdict, run

FOUND_SOON: dict[str, int] = {}
"""A schedule in which the planted bug showed when this was written. Where it does not any more, others are tried."""


def test_no_schedule_breaks_a_promise():
    failed = run(range(500))
    assert not failed, failed[0]


def test_a_seed_says_all():
    first, second = list[Verdict](), list[Verdict]()
    run([7, 8, 9], each=first.append)
    run([7, 8, 9], each=second.append)
    assert [v.switches for v in first] == [v.switches for v in second]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str):
    class FoundError(Exception):
        pass

    def look(verdict: Verdict) -> None:
        if verdict.wrong:
            raise FoundError

    with pytest.raises(FoundError):
        run(chain([FOUND_SOON[bug]] if bug in FOUND_SOON else [], range(10_000)), PLANTED[bug], look)
