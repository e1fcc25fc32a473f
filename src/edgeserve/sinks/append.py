"""A file that grows by whole pieces: what a full disk or an error cuts off is taken back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from edgeserve.core.errors import ConfigurationError, FileBusy

_BLOCK_BYTES = 65_536


def lock(fd: int, of: Path) -> None:
    """Makes this process the only writer. The kernel lets go of the lock however the process ends.

    Raises:
        FileBusy: there is another one; `of` is what it says is taken.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise FileBusy(f"{of} is being written to by another sink: give each one, in whatever process, a path of its own") from exc


def sync_directory(directory: Path) -> None:
    """Makes durable which names there are in a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class AppendFile:
    """A locked file at whose end whole pieces are written, or none.

    Args:
        path: made if it is not there.
        fsync: whether a piece is on the disk, and not only in the system's memory, when `append` returns.

    Attributes:
        end: where the last whole piece ends, in bytes. A piece is written when this has moved.

    Raises:
        FileBusy: another process has it.
        ConfigurationError: it is no regular file.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, *, fsync: bool) -> None:
        self.path, self._fsync = path, fsync
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            lock(self._fd, path)
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigurationError(f"{path} is not a regular file: a sink has to be able to take back what was half written")
            self.end = found.st_size
            if fsync:
                sync_directory(path.parent)
        except BaseException:
            os.close(self._fd)
            raise
        self._torn = False

    def append(self, piece: bytes) -> None:
        """Writes a piece at the end.

        Raises:
            OSError: there is no room for it, for example; the file is as it was.
        """
        if self._torn:
            self._take_back()
        end = self.end + len(piece)
        self._torn = True
        try:
            written = os.write(self._fd, piece)
            while written < len(piece):
                written += os.write(self._fd, memoryview(piece)[written:])
            if self._fsync:
                os.fdatasync(self._fd)
            self.end = end
            self._torn = False
        except BaseException:
            with contextlib.suppress(OSError):  # the next one tries again
                self._take_back()
            raise

    def is_deleted(self) -> bool:
        """Whether it has no name any more, so that nobody finds what is written to it."""
        return os.fstat(self._fd).st_nlink == 0

    def ends_with(self, last: bytes) -> bool:
        """Whether these are its last bytes."""
        return self.end >= len(last) and os.pread(self._fd, len(last), self.end - len(last)) == last

    def cut_line(self) -> int:
        """Cuts off what stands after the last newline; how many bytes that was."""
        keep, at = 0, self.end
        while at > 0 and not keep:
            start = max(0, at - _BLOCK_BYTES)
            found = os.pread(self._fd, at - start, start).rfind(b"\n")
            keep = 0 if found < 0 else start + found + 1
            at = start
        cut, self.end = self.end - keep, keep
        self._take_back()
        return cut

    def sync(self) -> None:
        """Returns when all of it is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Lets go of the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _take_back(self) -> None:
        if os.fstat(self._fd).st_size > self.end:  # never longer: somebody else may have emptied it
            os.ftruncate(self._fd, self.end)
        self._torn = False


__all__ = ("AppendFile", "lock", "sync_directory")
