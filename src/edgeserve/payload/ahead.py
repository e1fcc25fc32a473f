"""Payloads that will be asked for: they are fetched before that, as far as bounds allow, and behind those that somebody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import msgspec

from edgeserve.payload.reference import Reference

AT_A_TIME = 4
"""So many are on their way at most."""

_TOGETHER_BYTES = 16 << 20
"""More than that is not on its way together: each has a deadline, and they share a link."""

_MOST_AHEAD = 16


class _Wanted(msgspec.Struct, eq=False):
    """One that will be asked for. `urgent`: at once. `future`: None until it is begun."""

    reference: Reference
    owner: object
    urgent: bool
    future: Future[memoryview] | None = None

    @property
    def on_its_way(self) -> bool:
        return self.future is not None and not self.future.done()


class Ahead:
    """Decides what is fetched when. Thread-safe.

    Args:
        begin: begins to fetch one in another thread.
        most_bytes: how much may have come, or be on its way, before it is asked for.
    """

    def __init__(self, begin: Callable[[Reference], Future[memoryview]], most_bytes: int) -> None:
        self._begin, self._most_bytes = begin, most_bytes
        self._lock = threading.RLock()
        self._wanted: dict[str, _Wanted] = {}
        # How many are asked for just now, and their bytes.
        self._asking = self._asking_bytes = 0
        self._closed = False

    def want(self, owner: object, now: Sequence[Reference], later: Iterable[Reference]) -> None:
        """All that somebody will ask for: `now`, in this order and beginning at once, then `later`, the nearest first. What it has said
        before, and does not say now, is not wanted any more."""
        with self._lock:
            before = {name: wanted for name, wanted in self._wanted.items() if wanted.owner is owner}
            for name in before:
                del self._wanted[name]
            for urgent, references in ((True, now), (False, later)):
                for reference in references:
                    name = reference.name
                    if name not in self._wanted:
                        wanted = before.get(name) or _Wanted(reference, owner, urgent)
                        wanted.urgent = urgent
                        self._wanted[name] = wanted
            self._go_on(now[0] if now else None)

    def take(self, reference: Reference) -> Future[memoryview] | None:
        """Somebody asks for it now: what was begun, if it was. To be followed by `taken`."""
        with self._lock:
            self._asking, self._asking_bytes = self._asking + 1, self._asking_bytes + reference.size
            wanted = self._wanted.pop(reference.name, None) if self._wanted else None
            return None if wanted is None else wanted.future

    def taken(self, reference: Reference) -> None:
        """Who asked for it has it, or never will."""
        with self._lock:
            self._asking, self._asking_bytes = self._asking - 1, self._asking_bytes - reference.size
            self._go_on()

    def _go_on(self, first: Reference | None = None) -> None:
        """Begins what can be. `first`: who wants it is about to ask for it, and fetches it itself if it was not begun."""
        on_its_way = [wanted for wanted in self._wanted.values() if wanted.on_its_way]
        count, together = self._asking + len(on_its_way), self._asking_bytes + sum(wanted.reference.size for wanted in on_its_way)
        left_out = None if first is None else self._wanted[first.name]
        if left_out is not None and left_out.future is None:
            count, together = count + 1, together + left_out.reference.size
        ahead = [wanted.reference.size for wanted in self._wanted.values() if wanted.future is not None]
        waited_for = self._asking > 0
        for urgent in (True, False):
            for wanted in list(self._wanted.values()):
                if wanted.urgent is not urgent:
                    continue
                waited_for = waited_for or (urgent and (wanted.future is None or wanted.on_its_way))
                size = wanted.reference.size
                if wanted.future is not None or wanted is left_out:
                    continue
                if self._closed or count >= AT_A_TIME or (count and together + size > _TOGETHER_BYTES):
                    return
                if not urgent and (waited_for or len(ahead) >= _MOST_AHEAD or sum(ahead) + size > self._most_bytes):
                    return
                wanted.future = self._begin(wanted.reference)
                count, together = count + 1, together + size
                ahead.append(size)
                wanted.future.add_done_callback(self._ended)

    def _ended(self, _: Future[memoryview]) -> None:
        with self._lock:
            self._go_on()

    def close(self) -> None:
        """Begins nothing any more, and lets go of what has come."""
        with self._lock:
            self._closed = True
            self._wanted.clear()


__all__ = ("AT_A_TIME", "Ahead")
