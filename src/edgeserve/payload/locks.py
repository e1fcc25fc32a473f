"""Files that a living process keeps locked: the kernel lets go of the lock however the process ends, in whatever container it was.

A lock is of the open file, which a child of fork has, too, and would keep when its parent is killed. So children close it, and what is
mapped is the file opened once more, since nobody can close what a map holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from pathlib import Path

_NEW = ".new"
_HALF_MADE_S = 60.0

# Descriptors of this process's locks.
_held: set[int] = set()


def _after_fork() -> None:
    for fd in _held:
        os.close(fd)  # to unlock it would take it from the parent
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


def make_locked(path: Path, size: int, flags: int = mmap.MAP_SHARED) -> tuple[int, mmap.mmap]:
    """Makes a file of `size` bytes, which appears locked and whole; the descriptor that holds the lock, for `let_go`, and the file mapped.

    Raises:
        OSError: there is no room for it (ENOSPC), or no descriptor, with nothing left behind.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(path.name + _NEW)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    _held.add(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # somebody may be looking whether it is locked
        os.posix_fallocate(fd, 0, size)
        mapped = _map(new, size, flags)
        os.rename(new, path)
    except BaseException:
        let_go(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise
    return fd, mapped


def _map(path: Path, size: int, flags: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return mmap.mmap(fd, size, flags=flags)
    finally:
        os.close(fd)


def let_go(fd: int) -> None:
    """Lets go of a lock; in a child of fork of none of its parent's."""
    if fd in _held:
        _held.remove(fd)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that is made this moment still has it
        os.close(fd)


def is_left(path: Path) -> bool:
    """Whether nobody keeps a file locked any more. Not of one that is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if path.name.endswith(_NEW) and time.time() - os.fstat(fd).st_mtime <= _HALF_MADE_S:
            return False
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


__all__ = ("is_left", "let_go", "make_locked")
