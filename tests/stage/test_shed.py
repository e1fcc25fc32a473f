"""What a shelf keeps of the messages that wait."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.codec import encode_frame
from edgeserve.core.message import Header, Kind, message_id
from edgeserve.stage.shed import MOST_WAITING, Keep, Shelf
from edgeserve.transport import Delivery

MESSAGES = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, 1, "1"]), st.booleans()), max_size=60)


def delivery(
    position: int, source: str = "a", key: Any = None, *, kind: Kind = Kind.DATA, id_: int | None = None, size: int = 1
) -> Delivery:
    of = message_id(b"12345678", position if id_ is None else id_)
    frame = encode_frame(Header(of, source, "p", position, 0, 0, size=size, key=key, kind=int(kind)), bytes(size))
    return (frame if isinstance(frame, bytes) else b"".join(frame), position, 0, 0, "in")


def never(_: bytes) -> bool:
    return False


@given(messages=MESSAGES, most=st.integers(1, 5), per_key=st.booleans(), batch=st.integers(1, 7), order=st.randoms(use_true_random=False))
def test_the_newest_of_each_stay_in_order_and_nothing_is_lost(messages: Any, most: int, per_key: bool, batch: int, order: Any) -> None:
    shelf = Shelf(Keep(most, per_key), None, never)
    made = [(n, delivery(n, source, key, kind=Kind.END if end else Kind.DATA)) for n, (source, key, end) in enumerate(messages)]
    order.shuffle(made)  # as redeliveries come
    gone: list[int] = []
    for at in range(0, len(made), batch):
        gone += [one.position for one in shelf.put([one for _, one in made[at : at + batch]], 0.0)]
    count = len(shelf)
    kept = [one.position for one in shelf.take(1_000)]
    assert len(kept) == count and len(shelf) == 0
    assert kept == sorted(kept) and sorted([*kept, *gone]) == [*range(len(messages))]
    newest: dict[Any, list[int]] = {}
    for n, (source, key, end) in enumerate(messages):
        if not end:
            newest.setdefault((source, type(key), key) if per_key else source, []).append(n)
    ends = [n for n, (_, _, end) in enumerate(messages) if end]
    assert kept == sorted([*ends, *(n for found in newest.values() for n in found[-most:])])


def test_what_comes_again_takes_no_place() -> None:
    settled = message_id(b"12345678", 100)
    shelf = Shelf(Keep(1, True), "a", lambda id_: id_ == settled)
    shelf.put([delivery(0)], 0.0)
    assert [one.position for one in shelf.take(1)] == [0]  # it is in the task's hands
    gone = shelf.put([delivery(1), delivery(2, id_=0), delivery(3, id_=1), delivery(4, id_=100), delivery(5, "stranger")], 0.0)
    assert gone == [] and shelf.unread == 4
    assert [one.position for one in shelf.put([delivery(6)], 0.0)] == [1]
    assert [one.position for one in shelf.take(9)] == [2, 3, 4, 5, 6]


def test_what_comes_again_at_its_place_is_the_same_message() -> None:
    shelf = Shelf(Keep(2, False), None, never)
    shelf.put([delivery(0), delivery(1)], 0.0)
    assert shelf.put([delivery(1), delivery(0)], 5.0) == [] and len(shelf) == 2
    assert [(one.position, one.since) for one in shelf.take(9)] == [(0, 5.0), (1, 5.0)]


def test_there_is_a_bound_whatever_the_keys_and_sizes() -> None:
    shelf = Shelf(Keep(1, True), None, never)
    gone = shelf.put([delivery(n, key=n) for n in range(MOST_WAITING + 5)], 0.0)
    assert [one.position for one in gone] == [0, 1, 2, 3, 4] and len(shelf) == MOST_WAITING
    large = Shelf(Keep(10, False), None, never)
    gone = large.put([delivery(n, size=30 << 20) for n in range(4)], 0.0)
    assert [one.position for one in gone] == [0, 1]
    assert all(one.delivery is None for one in gone)  # and takes up no room
