"""Files that a living process keeps locked: the kernel lets go of the lock however the process ends, in whatever container it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

_NEW = ".new"
_HALF_MADE_S = 60.0


def make_locked(path: Path, size: int) -> int:
    """Makes a file of `size` bytes, which appears locked and whole; its descriptor, which holds the lock.

    Raises:
        OSError: there is no room for it (ENOSPC), with nothing left behind.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(path.name + _NEW)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, size)
        os.rename(new, path)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise
    return fd


def is_left(path: Path) -> bool:
    """Whether nobody keeps a file locked any more. Not of one that is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return not path.name.endswith(_NEW) or time.time() - path.stat().st_mtime > _HALF_MADE_S


__all__ = ("is_left", "make_locked")
