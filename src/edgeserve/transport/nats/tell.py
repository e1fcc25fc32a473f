"""Telling others from a thread of its own: whatever they wait for then, the loop goes on, which may be what they wait for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

_log = logging.getLogger("edgeserve")


class Teller:
    """Calls what it is given, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="edgeserve-nats-done", daemon=True)
        self._thread.start()

    def tell(self, call: Callable[[], object]) -> None:
        """Has something called. Any thread; does not wait."""
        self._queue.put(call)

    def close(self, seconds: float) -> None:
        """Ends when everything was called."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                _log.exception("the answer to something that was sent could not be taken")


__all__ = ("Teller",)
