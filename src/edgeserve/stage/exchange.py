"""Where the threads of partitions hand their sets to the one thread that runs the task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from edgeserve.stage.base import CONTROL
from edgeserve.stage.control import SLICE_MS
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.runset import Outcome
from edgeserve.stage.settle import owned

_SLICE_S = SLICE_MS / 1000


class Offer:
    """A set that waits for the thread that runs the task. `changed`: it was run, or its partition is to look around; of the partition's one
    after the other, since it waits for each."""

    __slots__ = ("call", "changed", "outcome", "settled", "taken")

    def __init__(self, call: Callable[[], Outcome], settled: threading.Event, changed: threading.Event) -> None:
        self.call, self.settled, self.changed = call, settled, changed
        self.outcome: Outcome | None = None
        self.taken = False


class Exchange:
    """Where the threads of partitions offer sets, and whoever steps the node runs them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offers: list[Offer] = []
        self._woken = False

    def offer(self, offer: Offer, look: Callable[[], bool]) -> Outcome:
        """Returns what became of a set when it has been run. `look`: called meanwhile, says whether to wait no longer.

        Raises:
            GoesBack: nobody has begun with it, and the partition is to end.
        """
        with self._changed:
            self._offers.append(offer)
            self._changed.notify()
        while True:
            offer.changed.wait(_SLICE_S)
            offer.changed.clear()
            if offer.outcome is not None:
                break
            if look():
                with self._changed:
                    if not offer.taken:
                        self._offers.remove(offer)
                        raise GoesBack("the partition ends before its set was run")
        with self._changed:
            self._offers.remove(offer)
        return offer.outcome

    def step(self, seconds: float) -> Any:
        """Runs the set that was offered first; returns the task's result, or `Raised`. CONTROL: there was none in time, or `wake` was
        called. What is interrupted stays on offer."""
        offer: Offer | None = None
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._woken or self._first() is not None, seconds)
                self._woken = False
                offer = self._first()
                if offer is None:
                    return CONTROL
                offer.taken = True
            result, of, members, frames, aside = offer.call()
            offer.settled.clear()
            # An error is raised here, and not once more by the partition. The task's own buffers may be written to by the next set.
            offer.outcome = None, of, members, owned(frames), aside
            return result
        finally:
            if offer is not None:
                offer.taken = offer.outcome is not None
                offer.changed.set()

    def _first(self) -> Offer | None:
        return next((offer for offer in self._offers if not offer.taken), None)

    def wake(self) -> None:
        """Makes `step` return. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()


__all__ = ("Exchange", "Offer")
