"""What the sources that read a file share: stepping, waking and closing, ids and times of what was handed out, the position."""

from __future__ import annotations

import io
import os
import stat
from abc import abstractmethod
from typing import Any, NamedTuple

from edgeserve.core.errors import ConfigurationError
from edgeserve.sources.base import Source
from edgeserve.sources.position import PositionFile
from edgeserve.sources.timer import SystemTimer, Timer

COMMIT_WAIT_S = 1.0
"""A wait that comes after items that are not committed is no longer than this: what it waits for may be long in coming."""


class Step(NamedTuple):
    """An item that is ready to be handed out: its event time, what its id is made of, and the place behind it."""

    item: Any
    event_ns: int | None
    mark: Any
    after: Any


class Cursor:
    """Where a source is, behind what it has handed out."""

    __slots__ = ("place",)

    def __init__(self, place: Any) -> None:
        self.place = place


class FileSource(Source):
    """A source that reads a file.

    Whatever interrupts a `next()` (a signal ends a `DataSource` by an exception in the midst of it), the next one goes on as if it had not
    been called: `_ready` may be repeated, and what it returns is handed out by assignments alone.

    Attributes:
        path: the file, as it was given.
    """

    _kind = "FileSource"

    def __init__(
        self, path: str | os.PathLike[str], *, start: Any, position: str | os.PathLike[str] | None = None, timer: Timer | None = None
    ) -> None:
        self.path = _text(self._kind, path)
        self._path = os.path.abspath(self.path)
        self._cursor = Cursor(start)
        self._timer: Timer = SystemTimer() if timer is None else timer
        self._position = None if position is None else PositionFile(position, self._kind, self._path)
        self.resumable = position is not None
        self._handed: Step | None = None
        self._held: Step | None = None
        self._saved: Any = None
        self._uncommitted = False
        self._waits_since_ns: int | None = None
        self._begun = self._closed = self._busy = False

    # --- the stream ---------------------------------------------------------------------------------------------

    def __next__(self) -> Any:
        step = self._next_step()
        if step is None:
            return None
        # No call from here on: what is behind the cursor has been returned.
        self._handed, self._cursor.place, self._held = step, step.after, None
        self._uncommitted, self._waits_since_ns = True, None
        return step.item

    def _next_step(self) -> Step | None:
        self._busy = True
        try:
            if self._closed:
                raise StopIteration
            if not self._begun:
                self._begin()
            return self._ready()
        except OSError as exc:
            if exc.filename is None:  # of a file that is open the system does not say which one it is
                exc.filename = self.path
            raise
        finally:
            self._busy = False
            if self._closed:
                self._release()

    def _begin(self) -> None:
        saved = None if self._position is None else self._position.load(type(self._cursor.place))
        self._open(saved)
        self._begun = True
        if saved is None:
            self.commit()

    def _wait(self, seconds: float) -> bool:
        """Waits; returns whether None is to be handed out: it was woken, or it is time to commit what was handed out before."""
        if self._position is not None and self._uncommitted:
            now_ns = self._timer.monotonic_ns()
            if self._waits_since_ns is None:
                self._waits_since_ns = now_ns
            left = COMMIT_WAIT_S - (now_ns - self._waits_since_ns) / 1e9
            if left <= 0:
                self._waits_since_ns = None
                return True
            seconds = min(seconds, left)
        if not self._timer.wait(seconds):
            return False
        if self._closed:
            raise StopIteration
        return True

    # --- what a DataSource asks ---------------------------------------------------------------------------------

    def event_time(self, item: Any) -> int:
        """The event time of the item that was handed out last, ns since the epoch: for `DataSource(event_time=...)`.

        Raises:
            ConfigurationError: it is another item.
        """
        event_ns = self._last(item).event_ns
        if event_ns is None:
            raise ConfigurationError(f"{self._kind} of {self.path}: event_time needs the name of the field that has the time: time='ts'")
        return event_ns

    def message_id(self, item: Any) -> bytes:
        """An id of the item that was handed out last, the same after every restart: for `DataSource(message_id=...)`.

        Raises:
            ConfigurationError: it is another item.
        """
        return os.fsencode(self._path) + b":" + self._id(self._last(item).mark)

    def _last(self, item: Any) -> Step:
        step = self._handed
        if step is None or step.item is not item:
            raise ConfigurationError(
                f"{self._kind} of {self.path} was asked for the time or the id of an item that is not its last one: give DataSource the "
                f"{self._kind} itself as its stream, and change its items in gate="
            )
        return step

    def wake(self) -> None:
        """Makes a `next()` that waits in another thread, or else the next one that would wait, return None at once."""
        self._timer.wake()

    def commit(self) -> None:
        """All items so far are safe where they went: with `position=`, a new start goes on behind them. A `DataSource` calls this."""
        place = self._cursor.place
        if self._position is not None and self._begun and place is not self._saved:
            self._position.save(*self._saving(place))
            self._saved = place
        self._uncommitted, self._waits_since_ns = False, None

    def close(self) -> None:
        """Ends the stream, from any thread: a `next()` that waits raises StopIteration, and so do later ones. Idempotent."""
        self._closed = True
        self._timer.wake()
        if not self._busy:
            self._release()

    # --- for subclasses -----------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self, saved: tuple[Any, str] | None) -> None:
        """Opens the file, and moves the cursor to the place that was saved if it is still there."""

    @abstractmethod
    def _ready(self) -> Step | None:
        """The next item; waits for it. None: it was woken. StopIteration: there is none."""

    @abstractmethod
    def _id(self, mark: Any) -> bytes: ...

    @abstractmethod
    def _saving(self, place: Any) -> tuple[Any, str]:
        """What is saved of a place, and by what it can be told to be the same when it is read again."""

    @abstractmethod
    def _release(self) -> None:
        """Closes the file. Idempotent."""


def open_file(kind: str, path: str) -> io.FileIO:
    """Opens a regular file, unbuffered.

    Raises:
        FileNotFoundError: it is not there.
        ConfigurationError: it is something else, or may not be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigurationError(f"{kind}: {path!r} is no regular file: name one")
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{kind}: {path!r} cannot be read: {exc}") from exc


def _text(kind: str, path: Any) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise ConfigurationError(f"{kind}: {path!r}: the path of a file is wanted, a str or os.PathLike")
    return text


__all__ = ("COMMIT_WAIT_S", "Cursor", "FileSource", "Step", "open_file")
