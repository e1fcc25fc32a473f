"""Payloads of other hosts: each is fetched once for all processes of this one, and lies in shared memory for them to map."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from edgeserve.core.errors import ClosedError, FetchError, UsedAfterFork
from edgeserve.payload.absence import Absences
from edgeserve.payload.origins import Origins
from edgeserve.payload.pull import Connections, Origin, Pull
from edgeserve.payload.reference import Reference
from edgeserve.payload.shelf import Shelf

BUDGET_BYTES = 256 << 20
"""How much a host keeps of what it has fetched."""

_THREADS = 4
_PAUSE_S = (0.0002, 0.005)


class Fetcher:
    """Fetches payloads into a directory that all processes of this user and host share. Thread-safe; bound to the process that made it.

    Of several that want the same payload at the same time one fetches it, the others wait. What was fetched stays for who comes later,
    until there is too much, or until the last fetcher of the directory is closed. Views stay good for as long as they are held.

    Args:
        directory: best in shared memory; made with access for this user only.
        deadline_s: how long one payload may take in all, with everything that has to be tried again.
        budget_bytes: how much may lie there; the files that were used longest ago go first. A larger payload is not fetched. What is still
            looked at takes up memory beyond that.
        cafile: whose certificates are trusted, a file in PEM; None: the system's.
        gone_after_s: an origin that has not answered for so long is taken to be gone: it is asked again now and then, and not for each
            payload until its deadline.
        origins: which hosts are asked, and told a token; None: all.

    Attributes:
        fetched: how many payloads this one has brought to this host.

    Raises:
        ConfigurationError: the directory belongs to somebody else, is open to others, or cannot be made, or `cafile` cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        deadline_s: float = 10.0,
        budget_bytes: int = BUDGET_BYTES,
        cafile: str | None = None,
        gone_after_s: float = 60.0,
        origins: Origins | None = None,
    ) -> None:
        self._directory, self._deadline_s, self._budget_bytes = directory, deadline_s, budget_bytes
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._origins = origins
        self._absences = Absences(gone_after_s, time.monotonic)
        self._connections = Connections(cafile, origins)
        self._threads: ThreadPoolExecutor | None = None
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        self.fetched = 0
        self._shelf = Shelf(directory, budget_bytes)

    def fetch(self, reference: Reference) -> memoryview:
        """The payload, uint8 and read-only, of `reference.size` bytes.

        Raises:
            PayloadGone: its origin has it no more.
            CorruptMessage: what came, twice, does not match its checksum, or has another length.
            NotAllowed: its origin is none of those that are allowed.
            FetchError: it did not come in time, or is not given, or there is no room for it here.
            ClosedError, UsedAfterFork: this fetcher cannot be used any more, or not here.
        """
        self._check()
        ends = time.monotonic() + self._deadline_s
        origin = Origin.of(reference.origin)
        if self._origins is not None:
            self._origins.check(origin.host)
        if reference.size > self._budget_bytes:
            raise FetchError(
                f"a payload of {reference.size} bytes from {origin} is larger than all that may be kept, {self._budget_bytes} bytes"
            )
        if not reference.size:
            return memoryview(b"")
        with self._lock:
            self._check()
            self._busy += 1
        try:
            return self._found_or_brought(reference, origin, ends)
        except FetchError:
            raise
        except OSError as exc:
            raise FetchError(f"a payload of {reference.size} bytes from {origin} cannot be kept in {self._directory}: {exc}") from exc
        finally:
            with self._lock:
                self._busy -= 1
                self._idle.notify_all()

    def _found_or_brought(self, reference: Reference, origin: Origin, ends: float) -> memoryview:
        name, pause_s = reference.name, _PAUSE_S[0]
        while (view := self._shelf.look(name, reference)) is None:
            claim = self._shelf.claim(name)
            if claim is not None:
                try:
                    view = self._shelf.look(name, reference)  # whoever had it may have brought it
                    return self._brought(reference, origin, name, ends) if view is None else view
                finally:
                    self._shelf.let_go(name, claim)
            if time.monotonic() >= ends:
                raise FetchError(f"a payload of {reference.size} bytes from {origin} did not come in time: another process fetches it")
            self._closing.wait(pause_s)
            self._check()
            pause_s = min(2 * pause_s, _PAUSE_S[1])
        return view

    def _brought(self, reference: Reference, origin: Origin, name: str, ends: float) -> memoryview:
        began = time.monotonic()
        ends = min(ends, began + self._absences.patience(reference.origin, self._deadline_s))
        part = self._shelf.begin(name, reference.size)
        pull = Pull(self._connections, origin, reference.token, reference, partial(self._shelf.map, part), ends, self._closing)
        try:
            pull.run()
        except BaseException as exc:
            self._shelf.drop(part)
            if pull.answered or isinstance(exc, FetchError):
                self._absences.ended(reference.origin, began, None if pull.answered else exc)
            raise
        self._absences.ended(reference.origin, began, None)
        view = self._shelf.publish(part)
        with self._lock:
            self.fetched += 1
        return view

    def prefetch(self, references: Iterable[Reference]) -> list[Future[memoryview]]:
        """Fetches several at a time, in threads of its own; each result is as that of `fetch`, with a deadline from when it begins."""
        self._check()
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
            threads = self._threads
        try:
            return [threads.submit(self.fetch, reference) for reference in references]
        except RuntimeError:
            self._check()
            raise

    def close(self) -> None:
        """Ends what is under way, and waits for it; the last one of the directory removes what was fetched. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        self._connections.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        with self._lock:
            while self._busy:
                self._idle.wait()
        self._shelf.close()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork(f"a fetcher was made by process {self._pid} and used by {os.getpid()}: make one after the fork")
        if self._closing.is_set():
            raise ClosedError(f"the fetcher of {self._directory} is closed")


__all__ = ("BUDGET_BYTES", "Fetcher")
