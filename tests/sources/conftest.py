"""Sources under test: a clock that only moves while somebody waits, and who does things meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edgeserve.sources import Source


class FakeTimer:
    """Time passes while somebody waits. Each wait first does the next of `meanwhile`; without one it may not come to a wait.

    Attributes:
        waits: how long each wait was, seconds.
        patient: whether waits are allowed when nothing happens meanwhile.
    """

    def __init__(self, *meanwhile: Callable[[], object], patient: bool = False) -> None:
        self.now_ns = 10**15
        self.waits: list[float] = []
        self.meanwhile = deque(meanwhile)
        self.patient = patient
        self._woken = False

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        assert self.meanwhile or self.patient, "it waits for ever"
        if self.meanwhile:
            self.meanwhile.popleft()()
        woken, self._woken = self._woken, False
        if not woken:
            self.waits.append(seconds)
            self.now_ns += round(seconds * 1e9)
        return woken

    def wake(self) -> None:
        self._woken = True


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """`closing(source)` closes it when the test ends."""
    with ExitStack() as stack:

        def _closing(source: Source) -> Source:
            return stack.enter_context(source)

        yield _closing
