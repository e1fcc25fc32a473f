"""The sending side of a data source: frames gathered into batches, at once when traffic is slow, some hundreds at a time when it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic_ns

from edgeserve.core.errors import SendError, TooLarge
from edgeserve.stage.control import Control
from edgeserve.stage.linger import LINGER_NS, NO_ROOM, Linger, Patience
from edgeserve.stage.payloads import Payloads
from edgeserve.transport import Frame, Publisher

BATCH_FRAMES = 512
BATCH_BYTES = 512 * 1024
_OLDEST_NS = 2_000_000


def too_large(who: str, size: int, limit: int) -> TooLarge:
    """The error of a message that does not fit whatever room is made."""
    return TooLarge(
        f"a message of {size} bytes exceeds the {limit} that the node takes, so {who} did not send it: "
        "send it in parts, or give the store more room (size_mb= in the node URL)"
    )


class Sender:
    """Gathers frames and publishes them. What could not be published stays, and is tried again by the next call.

    The owner appends; whoever publishes, the owner or the thread that sends a tail, takes from the front what is there.

    Attributes:
        error: of an earlier send; `check` raises it.
        full: the store had no room; `check` tries again.
        published: how many frames were.
    """

    def __init__(self, publisher: Publisher, name: str, control: Control, max_frame_bytes: int | None, payloads: Payloads) -> None:
        self._publisher = publisher
        publisher.stopping, publisher.giving_up, publisher.stored = control.stopping, control.giving_up, self._note_stored
        self._name, self._payloads = name, payloads
        self._max_frame_bytes = max_frame_bytes
        self._lock = threading.Lock()
        self._pending: list[Frame] = []
        # Each has one writer: the owner the first, who holds the lock the second.
        self._bytes_in = self._bytes_out = 0
        self._since_ns = 0
        self._published_ns = 0
        self._retry_ns = 0
        self.error: Exception | None = None
        self.full = False
        self._linger = Linger(f"edgeserve-send-{name}", self._write_tail)
        self._patience = Patience(f"source {name!r}", control)
        self.published = 0
        self._ended = self._stored = False
        # Who publishes: a broker tells what is stored in another thread, and it may be of an earlier batch.
        self._publishing = 0

    def append(self) -> Callable[[Frame], None]:
        """The function that takes a frame: a closure, because it runs once per message."""
        lock, publish, linger, pending, now_ns = self._lock, self._publish, self._linger, self._pending, monotonic_ns
        limit, keep = self._max_frame_bytes, self._pending.append

        def append(frame: Frame) -> None:
            if type(frame) is bytes:
                whole, size = True, len(frame)
            else:
                whole, size = False, sum([len(part) for part in frame])  # type: ignore[misc, arg-type]  # a list of buffers
            if limit is not None and size > limit:
                raise too_large(f"source {self._name!r}", size, limit)
            self._bytes_in = bytes_in = self._bytes_in + size
            keep(frame)
            # Buffers of large frames are the caller's own: they go before the caller may write to them again.
            if whole:
                count = len(pending)
                if count == 1:
                    self._since_ns = now = now_ns()
                    if now - self._published_ns < LINGER_NS:
                        if linger.asleep:
                            linger.nudge()
                        return
                elif count < BATCH_FRAMES and bytes_in - self._bytes_out < BATCH_BYTES and now_ns() - self._since_ns < _OLDEST_NS:
                    return
            with lock:
                publish()

        return append

    def check(self) -> None:
        """Raises the error of an earlier send, or of trying it again now."""
        if self.error is not None:
            error, self.error = self.error, None
            self._linger.nudge()
            raise SendError(f"an earlier send of source {self._name!r} failed, its messages are kept and sent again: {error}") from error
        if self.full:
            with self._lock:
                self._publish()

    def flush(self) -> None:
        """Publishes what is pending; durable when it returns."""
        self.check()
        with self._lock:
            self._publish()
            self._publisher.flush()

    def flush_patiently(self) -> None:
        """`flush`, but a store without room is waited for, until the node is closed."""
        while True:
            try:
                self.flush()
                self._patience.over()
                return
            except NO_ROOM as exc:
                if not self._patience.wait(exc):
                    raise

    def end(self, frame: Frame) -> None:
        """Publishes what is pending and a last frame, which says that nothing follows."""
        self._ended = True
        try:
            self.append()(frame)
        except NO_ROOM:
            self.flush_patiently()
        self.flush_patiently()

    @property
    def sent(self) -> int:
        """How many messages were published; the end is none."""
        return self.published - (self._ended and not self._pending)

    def close(self) -> None:
        """Ends the thread, flushes, closes the publisher."""
        self._linger.close()
        # An earlier error has no say here: what it kept is sent now, or the error of that is raised.
        self.error = None
        try:
            self.flush()
        finally:
            self._publisher.close()

    def _publish(self) -> None:
        """Called with the lock held."""
        frames, bytes_in = self._pending[:], self._bytes_in
        n = len(frames)
        if not n:
            return
        self._stored, self._publishing = False, get_ident()
        try:
            self._publisher.publish(frames)
        except BaseException as exc:
            self.full = isinstance(exc, NO_ROOM)
            if self._stored:  # interrupted while it waited for its window: all is done
                self._done(n, bytes_in)
                raise
            if not self.full:
                self._payloads.doubt(frames)
            # Whoever handed these buffers over may write to them once this call has returned.
            self._pending[:n] = [f if isinstance(f, bytes) else b"".join(f) for f in frames]
            raise
        self.full = False
        self._done(n, bytes_in)

    def _note_stored(self, frames: Sequence[Frame], first: int) -> None:
        self._stored = self._stored or get_ident() == self._publishing
        self._payloads.placed(frames, first)

    def _done(self, n: int, bytes_in: int) -> None:
        self.published += n
        del self._pending[:n]
        self._bytes_out = bytes_in
        self._published_ns = monotonic_ns()

    def _write_tail(self) -> bool:
        """In the linger thread: publishes what has waited long enough."""
        if not self._pending or self.error is not None:
            return False
        with self._lock:
            now = monotonic_ns()
            if self._pending and now - self._since_ns >= _OLDEST_NS and now >= self._retry_ns:
                try:
                    self._publish()
                except NO_ROOM as exc:
                    self._retry_ns = now + int(self._patience.met(exc) * 1e9)
                except Exception as exc:
                    self.error = exc
        return bool(self._pending) and self.error is None


__all__ = ("BATCH_BYTES", "BATCH_FRAMES", "Sender", "too_large")
