"""What file sinks share: opening and closing as a task of `Materialize` and alone, and the ids of the messages in hand."""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgeserve.core.errors import ClosedError, ConfigurationError, DiskFull, EdgeServeError, UsedAfterFork
from edgeserve.core.message import Header
from edgeserve.stage.context import CURRENT

_ID_BYTES = 16
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class FileSink(ABC):
    """A callable that appends what it is given to files.

    `Materialize` opens it (`setup`) and closes it when the node ends; then each message is written once, known by its id. Alone it is a
    context manager, and writes whatever it is given. It may be used by several nodes of one process at once, and is closed by the last.

    Attributes:
        path: the file or directory, absolute.
        written: how many values were written since it was made.
        duplicates: how many were not, because they had been written before.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        what = type(self).__name__
        if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str) or not os.fspath(path):
            raise ConfigurationError(f"{what} got {path!r}: it takes a path, a str or os.PathLike")
        self.path = Path(path).absolute()
        self.written = self.duplicates = 0
        self._lock = threading.RLock()
        self._users = self._pid = 0
        self._in_stage = False

    def setup(self) -> None:
        """Opens it for a node: from now on a call takes the id of the node's message.

        Raises:
            FileBusy: another sink writes there.
            DiskFull: there is no room for it.
            ConfigurationError: the path cannot be written to.
        """
        self._begin()
        self._in_stage = True

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, value: Any) -> None:
        """Writes the message in hand, once. Raises as `write` does."""
        self.write(value, id_=_id_in_hand() if self._in_stage else None)

    def write(self, value: Any, *, id_: bytes | None = None) -> None:
        """Writes a value; when it returns, kill -9 does not undo it.

        Args:
            value: see the class.
            id_: 16 bytes by which it is known, as `edgeserve.context().join_id` is: what was written under the same id before is not
                written again. None: it is written.

        Raises:
            ClosedError: the sink is not open.
            DiskFull: there is no room. Nothing of it was written: try again.
            UnsupportedType: the files cannot hold a value of this type; the message says which one.
        """
        if self._pid != os.getpid() and self._users:
            raise UsedAfterFork(f"{self._shown} was opened by process {self._pid} and used by {os.getpid()}: open it where it is used")
        if id_ is not None and len(id_) != _ID_BYTES:
            raise ConfigurationError(f"{self._shown}: id_ is {_ID_BYTES} bytes, not {len(id_)}: hash what is longer or shorter")
        with self._lock:
            if not self._users:
                raise ClosedError(f"{self._shown} is not open: hand it to Materialize, or use it in a with statement")
            if id_ is not None and self._knows(id_):
                self.duplicates += 1
                return
            try:
                self._write(value, id_)
            except OSError as exc:
                raise self._named(exc) from exc
            self.written += 1

    def flush(self) -> None:
        """Returns when all that was written is on the disk, where readers find it.

        Raises:
            OSError: it could not be.
        """
        with self._lock:
            if self._users and self._pid == os.getpid():
                try:
                    self._flush()
                except OSError as exc:
                    raise self._named(exc) from exc

    def close(self) -> None:
        """Ends one use of it; the last one closes the files. Raises as `flush` does."""
        with self._lock:
            if not self._users or self._pid != os.getpid():
                return  # a parent's files are the parent's
            self._users -= 1
            if not self._users:
                self._in_stage = False
                try:
                    self._close()
                except OSError as exc:
                    raise self._named(exc) from exc

    @property
    def _shown(self) -> str:
        return f"{type(self).__name__} {str(self.path)!r}"

    def _named(self, error: OSError) -> OSError:
        """`DiskFull` where that is what an error of the system means, else the error as it is."""
        if error.errno not in _NO_SPACE:
            return error
        return DiskFull(f"no space left for {self._shown}: nothing is half written and nothing is lost; free some, and it goes on")

    def _begin(self) -> None:
        with self._lock:
            if self._users and self._pid != os.getpid():
                raise UsedAfterFork(f"{self._shown} was opened by process {self._pid} before it forked: make another one in the child")
            if not self._users:
                try:
                    self._open()
                except EdgeServeError:
                    raise
                except OSError as exc:
                    if exc.errno in _NO_SPACE:
                        raise self._named(exc) from exc
                    raise ConfigurationError(f"{self._shown} cannot be opened: {exc}") from exc
                self._pid = os.getpid()
            self._users += 1

    # --- for subclasses, with the lock held -----------------------------------------------------------------------

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _knows(self, id_: bytes) -> bool:
        """Whether what has this id was written."""

    @abstractmethod
    def _write(self, value: Any, id_: bytes | None) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


def _id_in_hand() -> bytes | None:
    """Of the message or set that this thread's stage works on; what `context().join_id` says, for less."""
    current = CURRENT.get(None)
    if current is None:
        return None
    headers = (current.headers,) if isinstance(current.headers, Header) else current.headers
    return current.join_id or (headers[0].id if headers else None)


__all__ = ("FileSink",)
