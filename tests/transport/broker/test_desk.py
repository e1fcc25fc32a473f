"""One member's entries: whatever is settled, given back or brought again in whatever order, each message is settled once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.transport.base import ClaimLost, Delivery
from edgeserve.transport.broker.desk import Desk, Open
from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.broker.envelope import position


def opened(at: int, count: int, *, done: tuple[int, ...] = (), again: int = 0) -> Open:
    one = Open(Entry(at, b"", again), 1_000 + at, [f"{at}.{n}".encode() for n in range(count)], count, count, again)
    if done:
        one.learn(done)
    return one


def desk(*entries: Open) -> Desk:
    made = Desk("a")
    for entry in entries:
        assert made.add(entry)
    return made


def at_of(deliveries: list[Delivery]) -> list[int]:
    return [d[1] for d in deliveries]


def test_messages_are_handed_over_in_stored_order() -> None:
    one = desk(opened(5, 3), opened(9, 1))
    assert one.take(2, 0.0) == [(b"5.0", position(5, 0), 1_005, 0, "a"), (b"5.1", position(5, 1), 1_005, 0, "a")]
    assert at_of(one.take(10, 0.0)) == [position(5, 2), position(9, 0)]
    assert one.take(1, 0.0) == [] and one.ready == 0 and one.last == 9


def test_what_others_have_settled_of_an_entry_is_left_out() -> None:
    one = desk(opened(5, 4, done=(0, 2)))
    assert at_of(one.take(9, 0.0)) == [position(5, 1), position(5, 3)]
    complete, some = one.settle([position(5, 1)])
    assert (complete, some[0].done) == ([], {0, 1, 2})
    assert [o.entry.at for o in one.settle([position(5, 3)])[0]] == [5]


def test_an_entry_that_is_done_is_acknowledged_at_once() -> None:
    one = Desk("a")
    assert not one.add(opened(5, 2, done=(0, 1)))
    assert not one.add(opened(6, 0))
    assert one.floor() == position(7, 0)


def test_what_the_broker_brings_again_is_not_handed_over_again() -> None:
    one = desk(opened(5, 2))
    one.take(1, 0.0)
    again = opened(5, 2, again=1)
    assert one.add(again)
    assert at_of(one.take(5, 0.0)) == [position(5, 1)]
    complete, _ = one.settle([position(5, 0), position(5, 1)])
    assert complete[0].entry is again.entry  # the newest one's token is what the broker takes
    newest = opened(5, 2, again=2)
    assert one.add(newest)  # not acknowledged before its settlement counts
    assert complete[0].entry is newest.entry
    one.finish(complete[0])
    assert not one.add(opened(5, 2, again=3))
    assert one.take(5, 0.0) == []


def test_only_what_is_in_hand_can_be_settled() -> None:
    one = desk(opened(5, 4))
    one.take(3, 0.0)
    one.settle([position(5, 1)])
    one.give_back([position(5, 2)], due=10.0)
    for wrong in (position(5, 1), position(5, 2), position(5, 3), position(6, 0)):
        with pytest.raises(ClaimLost) as lost:
            one.check([position(5, 0), wrong])
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset([wrong]))
    one.check([position(5, 0)])


def test_what_is_given_back_comes_again_when_it_is_due() -> None:
    one = desk(opened(5, 3), opened(6, 1))
    one.take(3, 0.0)
    assert one.give_back([position(5, 2)], due=2.0) == one.give_back([position(5, 0)], due=1.0) == []
    assert one.next_due() == 1.0
    assert at_of(one.take(9, 0.5)) == [position(6, 0)]
    assert [(d[1], d[3]) for d in one.take(9, 1.0)] == [(position(5, 0), 1)]
    assert [(d[1], d[3]) for d in one.take(9, 2.0)] == [(position(5, 2), 1)]
    assert one.next_due() is None
    one.give_back([position(5, 0), position(5, 2)], due=3.0)
    assert [(d[1], d[3]) for d in one.take(9, 3.0)] == [(position(5, 0), 2), (position(5, 2), 2)]


def test_redelivered_messages_come_before_new_ones() -> None:
    one = desk(opened(5, 3), opened(6, 2))
    one.take(3, 0.0)
    one.give_back([position(5, 1)], due=0.0)
    assert at_of(one.take(2, 0.0)) == [position(5, 1), position(6, 0)]


def test_older_entries_that_come_later_are_handed_over_before_newer_ones() -> None:
    one = desk(opened(5, 2))
    one.take(1, 0.0)
    for at in (9, 4, 7):
        one.add(opened(at, 1))
    assert at_of(one.take(9, 0.0)) == [position(5, 1), position(4, 0), position(7, 0), position(9, 0)]


def test_an_entry_of_which_nothing_else_is_in_hand_goes_back_whole() -> None:
    one = desk(opened(5, 3), opened(6, 1))
    one.take(9, 0.0)
    one.settle([position(5, 0)])
    assert one.give_back([position(5, 1)], due=0.0) == []
    assert [o.entry.at for o in one.give_back([position(6, 0)], due=0.0)] == [6]
    with pytest.raises(ClaimLost):
        one.check([position(6, 0)])
    assert one.add(opened(6, 1, again=1))
    assert [(d[1], d[3]) for d in one.take(9, 0.0)] == [(position(5, 1), 1), (position(6, 0), 1)]


def test_what_was_not_settled_in_time_can_be_dropped() -> None:
    one = desk(opened(5, 2), opened(6, 2), opened(7, 1))
    one.stamp(one.take(3, 0.0), 1.0)
    assert one.overdue(0.9) == [] and one.overdue(1.0) == [5, 6]
    one.settle([position(6, 0)])
    assert one.overdue(1.0) == [5]  # of 6 nothing is in hand that could be late
    one.drop(5)
    assert at_of(one.take(9, 1.0)) == [position(6, 1), position(7, 0)]
    one.stamp_unstamped(2.0)
    assert one.overdue(2.0) == [6, 7]


def test_the_floor_is_below_what_is_in_hand_and_what_went_back() -> None:
    one = desk(opened(5, 2), opened(6, 1), opened(8, 1))
    assert one.floor() == position(5, 0)
    one.take(9, 0.0)
    one.settle([position(5, 0)])
    assert one.floor() == position(5, 1)
    one.settle([position(5, 1), position(8, 0)])
    assert one.floor() == position(6, 0)
    one.give_back([position(6, 0)], due=0.0)
    assert one.floor() == position(6, 0)
    assert one.add(opened(6, 1, again=1))
    one.take(9, 0.0)
    one.settle([position(6, 0)])
    assert one.floor() == position(9, 0)
    one.add(opened(10, 1))
    one.drop(10)
    one.forget_below(11)
    assert one.floor() == position(11, 0)


def test_the_floor_within_an_entry_is_what_the_log_says_of_it() -> None:
    assert Desk("a").floor_of(5) == position(5, 0)
    assert Desk("a").floor_of(5, (0, 1, 3)) == position(5, 2)


def test_what_others_say_counts_for_what_is_untouched() -> None:
    one = desk(opened(5, 3), opened(6, 3))
    one.take(1, 0.0)
    one.learn({5: [1], 6: [0], 7: [0]}, [5, 6, 7])
    assert [(d[1], d[3]) for d in one.take(9, 0.0)] == [
        (position(5, 1), 0),
        (position(5, 2), 0),
        (position(6, 1), 1),
        (position(6, 2), 1),
    ]


def test_a_topic_that_was_made_again_has_other_messages_under_the_old_numbers() -> None:
    one = Desk("a")
    assert not one.begin_anew("first")
    one.add(opened(1, 1))
    one.add(opened(2, 2))
    one.take(3, 0.0)
    one.settle([position(1, 0), position(2, 1)])
    assert one.begin_anew("second") and not one.begin_anew("second")
    assert one.floor() == position(0, 0)
    assert one.add(opened(1, 1)) and one.add(opened(2, 1))
    assert at_of(one.take(9, 0.0)) == [position(1, 0), position(2, 0)]
    with pytest.raises(ClaimLost) as lost:
        one.check([position(1, 0), position(2, 0)])  # of two messages in hand under this number the first is not to be had any more
    assert lost.value.positions == {position(2, 0)}
    one.check([position(1, 0), position(2, 0)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**32))
def test_each_message_is_settled_once_in_whatever_order(counts: list[int], seed: int) -> None:
    choose = random.Random(seed)
    one, waiting, done = Desk("a"), [opened(at, count) for at, count in enumerate(counts)], set[int]()
    everything = {position(at, n) for at, count in enumerate(counts) for n in range(count)}
    held, acknowledged, partly, times = set[int](), set[int](), dict[int, set[int]](), dict[int, int]()
    for now in range(10_000):
        if done == everything:
            break
        step = choose.random()
        if waiting and step < 0.3:
            entry = waiting.pop(choose.randrange(len(waiting)))
            assert one.add(entry) or entry.entry.at in acknowledged
        elif step < 0.6:
            for _, at, _, again, _ in one.take(choose.randint(1, 4), float(now)):
                assert at not in held | done
                assert again >= times.get(at, 0)
                held.add(at)
        elif held and step < 0.85:
            some = choose.sample(sorted(held), choose.randint(1, len(held)))
            one.check(some)
            complete, rest = one.settle(some)
            held -= set(some)
            done |= set(some)
            for o in complete:
                assert o.entry.at not in acknowledged
                acknowledged.add(o.entry.at)
            partly |= {o.entry.at: o.done for o in rest}
        elif held:
            some = choose.sample(sorted(held), choose.randint(1, len(held)))
            for at in some:
                times[at] = times.get(at, 0) + 1
            held -= set(some)
            gone = one.give_back(some, float(now + choose.randint(0, 9)))
            # Whoever gets it next is told what of it is settled.
            most = max(times.values())
            waiting += [opened(o.entry.at, o.count, done=tuple(partly.get(o.entry.at, ())), again=most) for o in gone]
        if choose.random() < 0.1:
            at = choose.randrange(len(counts))
            if at in one.open or at in acknowledged:
                one.add(opened(at, counts[at], again=9))  # the broker brings one again
        if not waiting:
            assert all(at < one.floor() for at in done) or one.floor() <= min(everything - done)
    assert done == everything
    assert acknowledged == set(range(len(counts)))
    assert one.take(99, 1e9) == [] and one.open == {}
