"""What is fetched before it is asked for, and when: decided without a network."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from tests.payload.origins import MB

from edgeserve.payload.ahead import Ahead
from edgeserve.payload.reference import Reference


class Begun:
    """What was begun, in order."""

    def __init__(self, most_bytes: int = 64 * MB) -> None:
        self.futures: dict[int, Future[memoryview]] = {}
        self.ahead = Ahead(self._begin, most_bytes)

    def _begin(self, reference: Reference) -> Future[memoryview]:
        assert reference.slot not in self.futures, "it was begun before"
        future = self.futures[reference.slot] = Future()
        return future

    def comes(self, *numbers: int) -> None:
        for n in numbers:
            self.futures[n].set_result(memoryview(b""))

    def ask(self, n: int, size: int = MB) -> Future[memoryview] | None:
        """As somebody who has it at once, or whose own fetch ends at once."""
        found = self.ahead.take(one(n, size))
        self.ahead.taken(one(n, size))
        return found

    @property
    def numbers(self) -> list[int]:
        return list(self.futures)


def one(n: int, size: int = MB) -> Reference:
    return Reference("store", "segment", n, 1, size, n, "http://127.0.0.1:1", "token")


def several(*numbers: int, size: int = MB) -> list[Reference]:
    return [one(n, size) for n in numbers]


@pytest.fixture
def begun() -> Begun:
    return Begun()


def test_what_is_needed_now_comes_first_and_together(begun: Begun) -> None:
    begun.ahead.want("a", several(1, 2, 3), several(4, 5))
    # Who wants it fetches the first one itself, and asks at once.
    assert begun.numbers == [2, 3]
    assert begun.ahead.take(one(1)) is None
    begun.comes(2, 3)
    assert begun.numbers == [2, 3]
    begun.ahead.taken(one(1))
    assert begun.numbers == [2, 3, 4, 5]
    assert [begun.ask(n) for n in (2, 3, 4, 5)] == list(begun.futures.values())


def test_while_somebody_waits_nothing_else_is_begun(begun: Begun) -> None:
    assert begun.ahead.take(one(9)) is None
    begun.ahead.want("a", [], several(1))
    assert begun.numbers == []
    begun.ahead.want("b", several(2, 3), [])
    assert begun.numbers == [3]
    begun.ahead.taken(one(9))
    assert begun.numbers == [3, 2]  # nobody has asked for it yet, and now it is begun
    begun.comes(2, 3)
    assert begun.numbers == [3, 2, 1]


def test_bounds_on_what_is_on_its_way(begun: Begun) -> None:
    begun.ahead.want("a", [], several(*range(8)))
    assert begun.numbers == [0, 1, 2, 3]
    begun.comes(1)
    assert begun.numbers == [0, 1, 2, 3, 4]
    large = Begun()
    large.ahead.want("a", [], several(1, 2, 3, size=9 * MB))
    assert large.numbers == [1]
    large.comes(1)
    assert large.numbers == [1, 2]
    huge = Begun()
    huge.ahead.want("a", several(1, 2, 3, size=100 * MB), [])
    assert huge.numbers == []
    huge.ask(1, 100 * MB)
    assert huge.numbers == [2]  # what is needed now comes whatever its size, one after the other


def test_bounds_on_what_has_come_and_was_not_asked_for() -> None:
    begun = Begun(most_bytes=3 * MB)
    begun.ahead.want("a", [], several(*range(8)))
    begun.comes(0, 1, 2)
    assert begun.numbers == [0, 1, 2]
    assert begun.ask(0) is begun.futures[0]
    assert begun.numbers == [0, 1, 2, 3]
    many = Begun(most_bytes=1 << 40)
    many.ahead.want("a", [], several(*range(40)))
    for n in range(16):
        many.comes(n)
    assert many.numbers == list(range(16))


def test_what_is_not_wanted_any_more_is_not_begun_and_what_still_is_not_begun_twice(begun: Begun) -> None:
    begun.ahead.want("a", [], several(*range(6)))
    begun.ahead.want("b", [], several(10))
    begun.ahead.want("a", several(0), several(1, 7))
    begun.comes(0, 1, 2, 3)
    assert begun.numbers == [0, 1, 2, 3, 10, 7]
    assert begun.ask(2) is None  # it came for all who look for it, and nobody holds it here
    assert begun.ask(0) is begun.futures[0] and begun.ask(1) is begun.futures[1]
    begun.ahead.want("a", [], [])
    assert begun.ask(7) is None and begun.ask(10) is begun.futures[10]


def test_after_the_end_nothing_is_begun(begun: Begun) -> None:
    begun.ahead.want("a", [], several(*range(6)))
    begun.ahead.close()
    begun.comes(0, 1)
    begun.futures[2].cancel()
    begun.ahead.want("a", several(7, 8), several(9))
    assert begun.numbers == [0, 1, 2, 3]
