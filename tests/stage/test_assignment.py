"""Which key is in which partition, and which member holds which."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.message import Header
from edgeserve.stage.assignment import assign, partition_group, partition_of, whole_of


def header(key: Any, number: int = 0) -> Header:
    return Header(number.to_bytes(16, "big"), "a", "p", 0, 0, 0, key=key)


NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


@given(start=NAMES, changes=st.lists(NAMES, max_size=5), partitions=st.integers(1, 20))
def test_members_hold_as_many_each_and_no_more_move_than_must(start: list[str], changes: list[list[str]], partitions: int) -> None:
    before = assign([], start, partitions)
    for members in changes:
        after = assign(before, members, partitions)
        loads = [after.count(member) for member in members]
        assert sum(loads) == partitions and max(loads) - min(loads) <= 1
        moved = sum(old != new for old, new in zip(before, after, strict=True))
        # Those of members that are gone must move, and so must what is above everybody's share, of which some members may have one more.
        orphans = sum(holder not in members for holder in before)
        least, more = divmod(partitions, len(members))
        kept = sorted((before.count(member) for member in members), reverse=True)
        above = sum(max(0, count - least - (rank < more)) for rank, count in enumerate(kept))
        assert moved == orphans + above
        before = after


def test_only_what_a_dead_member_held_goes_to_others() -> None:
    before = assign([], ["a", "b", "c", "d"], 8)
    after = assign(before, ["a", "c", "d"], 8)
    assert all(new == old for old, new in zip(before, after, strict=True) if old != "b")


def test_without_members_nobody_holds_anything() -> None:
    assert assign(["a", "b"], [], 2) == ["", ""]


@pytest.mark.parametrize("make", [str, int, lambda n: b"%d" % n], ids=["str", "int", "bytes"])
def test_keys_spread_evenly(make: Any) -> None:
    counts = [0] * 8
    for n in range(8_000):
        counts[partition_of(header(make(n)), 8)] += 1
    assert 850 < min(counts) and max(counts) < 1_150


def test_messages_without_key_spread_by_their_id() -> None:
    assert {partition_of(header(None, n), 8) for n in range(100)} == set(range(8))


def test_the_partition_of_a_key_never_changes() -> None:
    # What is stored of a group counts on it.
    found = [partition_of(header(key), 1_000) for key in ("room", b"room", "", 0, -1, 2**63 - 1, "1", 1, b"1")]
    assert found == [669, 455, 619, 452, 281, 678, 849, 726, 250]


@pytest.mark.parametrize("group", ["g", "in->out", "g#1of2", "a\nb"])
def test_the_group_of_a_partition_says_whose_it_is(group: str) -> None:
    assert whole_of(partition_group(group, 0, 12)) == (group, 12)
    assert whole_of("g") == ("g", 1) and whole_of("g#of3") == ("g#of3", 1)
