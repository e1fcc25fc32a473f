"""Looking at what a topic holds when a reader says that there is more and does not give it.

A Pulsar does that now and then of what was trimmed meanwhile, and cannot be made to: the readers here are made up.
"""

from __future__ import annotations

from typing import Any

import pulsar
import pytest

from edgeserve.transport.pulsar.look import Look


class Vain:
    """Says for so many waits that there is more."""

    def __init__(self, waits: float) -> None:
        self.waits, self.closed = waits, False

    def has_message_available(self) -> bool:
        return self.waits > 0

    def read_next(self, timeout_ms: int) -> Any:
        self.waits -= 1
        raise pulsar.Timeout("nothing came")

    def is_connected(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def test_a_reader_that_never_gives_what_it_says_is_there_makes_way_for_another() -> None:
    readers = [Vain(float("inf")), Vain(float("inf")), Vain(0)]
    made = iter(readers)
    look, waits = Look(lambda start: next(made), pulsar.MessageId.latest), 0
    while True:
        try:
            assert look.next() is None
        except pulsar.Timeout:
            waits += 1
        else:
            break
    assert waits == 10 + 20  # the second one is waited for twice as long
    assert [reader.closed for reader in readers] == [True, True, False]


def test_a_slow_entry_is_waited_for_with_one_reader() -> None:
    slow = Vain(9)
    look = Look(lambda start: slow, pulsar.MessageId.latest)
    for _ in range(9):
        with pytest.raises(pulsar.Timeout):
            look.next()
    assert look.next() is None and not slow.closed
