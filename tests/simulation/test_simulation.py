"""Schedules of the simulated world that `make test` has time for; `bench/simulate.py` runs a hundred thousand."""

from __future__ import annotations

import pytest

pytest.importorskip("greenlet")

from tests.simulation.planted import PLANTED
from tests.simulation.scenario import Verdict, run, search

RARE = {
    "an end that comes again is waited for in place of the first",
    "a settlement under a lead that has passed counts",
    "inputs are acknowledged before their settlement is known to count",
    "inputs are acknowledged before their results are durable",
    "a checkpoint misses ids",
    "a partition goes on before the end is published",
    "who takes over does not know what the replicas of a source have sent",
}
"""Show in one schedule of some hundreds or thousands: `bench/simulate.py` looks for them."""


def test_no_schedule_breaks_a_promise():
    seen = list[Verdict]()
    failed = run(range(300), each=seen.append)
    assert not failed, failed[0]
    # Of those that are asked for, none runs as if nothing had happened.
    assert sum(verdict.takeovers > 1 for verdict in seen) > 60
    assert sum(verdict.shared_sets > 0 for verdict in seen) > 60


def test_a_seed_says_all():
    first, second = list[Verdict](), list[Verdict]()
    run([7, 8, 9], each=first.append)
    run([7, 8, 9], each=second.append)
    assert [v.switches for v in first] == [v.switches for v in second]


@pytest.mark.parametrize("bug", sorted(PLANTED.keys() - RARE))
def test_a_planted_bug_is_found(bug: str):
    _, found = search(range(2_000), PLANTED[bug])
    assert found is not None
