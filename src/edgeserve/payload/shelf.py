"""A directory in shared memory where payloads of other hosts lie for all processes of this one, each in a file of its own.

`<name>.fetched`   a payload, whole; who has it mapped has a shared lock on it
`<name>.part`      one that is fetched just now
`<name>.lock`      locked by who fetches it
`<random>.spare`   one that had to go and that nobody had mapped, locked by who will write another into it: new memory takes longer
`users`            everybody has a shared lock on it

A lock goes with its process, however that ends; what bears the name of one and is not locked was left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
import time
import weakref
from pathlib import Path

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import ConfigurationError
from edgeserve.payload.reference import Reference

_DONE, _PART, _LOCK, _SPARE, _USERS = ".fetched", ".part", ".lock", ".spare", "users"
_ROOM_EVERY_S = 5.0
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
# With a page that is read the kernel maps those around it, with one that is written, or populated, it alone.
_AROUND_BYTES = 64 << 10
_libc = ctypes.CDLL(None, use_errno=True)


class _Spare(msgspec.Struct):
    """A file to be written to; `fd` holds its lock."""

    fd: int
    name: str
    bytes: int

    def fits(self, size: int) -> bool:
        return _fits(self.bytes, size)


class Part(msgspec.Struct):
    """A payload that is fetched just now: the file it will lie in, whether that was written to before, its memory once it is mapped."""

    name: str
    fd: int
    bytes: int
    recycled: bool
    memory: mmap.mmap | None = None


class _File(msgspec.Struct, order=True):
    """A payload that lies there. The one used longest ago is the least."""

    used_ns: int
    name: str
    bytes: int


class Shelf:
    """Thread-safe; bound to the process that made it.

    Args:
        directory: made with access for this user only.
        budget_bytes: how much may lie there; what somebody still looks at takes up memory beyond that.

    Raises:
        ConfigurationError: it belongs to somebody else, is open to others, or cannot be made.
    """

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory, self._prefix, self._budget_bytes = directory, f"{directory}/", budget_bytes
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()
        self._locks: set[int] = set()
        self._spares: list[_Spare] = []
        self._room_bytes, self._room_until = 0, 0.0
        self._users = self._enter()
        _shelves.add(self)
        with self._lock:
            self._look_for_room(0)

    def _enter(self) -> int:
        directory = self._directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(directory)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise ConfigurationError(
                    f"{directory} is not a directory that only user {os.getuid()} may write to, so no payloads are put there"
                )
            fd = _open(self._prefix + _USERS, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
            except BaseException:
                os.close(fd)
                raise
            return fd
        except OSError as exc:
            raise ConfigurationError(f"payloads cannot be kept in {directory}: {exc}") from exc

    def look(self, name: str, reference: Reference) -> memoryview | None:
        """The payload, read-only, if it is there and whole."""
        with self._lock:
            mapped = self._mapped.get(name)
        if mapped is not None:
            return memoryview(mapped).toreadonly()
        path = f"{self._prefix}{name}{_DONE}"
        try:
            fd = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if not _locked(fd, path, fcntl.LOCK_SH):
                return None  # it has just gone
            if os.fstat(fd).st_size == reference.size:
                mapped = mmap.mmap(fd, reference.size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ)
                if xxh3_64_intdigest(mapped) == reference.checksum:
                    os.utime(fd)
                    return self._known(name, mapped)
        finally:
            os.close(fd)
        self._remove(name + _DONE)  # on a disk that lost power
        return None

    def _known(self, name: str, mapped: mmap.mmap) -> memoryview:
        """The map has a descriptor of its own, with the same lock: it lasts as long as some view."""
        with self._lock:
            self._mapped[name] = mapped
        return memoryview(mapped).toreadonly()

    # --- bringing one -------------------------------------------------------------------------------------------

    def claim(self, name: str) -> int | None:
        """Takes the lock for fetching a payload: its descriptor, for `let_go`. None: somebody has it."""
        path = f"{self._prefix}{name}{_LOCK}"
        fd = _open(path, os.O_RDWR | os.O_CREAT)
        self._locks.add(fd)
        try:
            if _locked(fd, path, fcntl.LOCK_EX):
                return fd
        except BaseException:
            self._unlock(fd)
            raise
        self._unlock(fd)
        return None

    def let_go(self, name: str, fd: int) -> None:
        """Ends a claim."""
        self._remove(name + _LOCK)
        self._unlock(fd)

    def _unlock(self, fd: int) -> None:
        self._locks.discard(fd)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that is made this moment still has it
        os.close(fd)

    def begin(self, name: str, size: int) -> Part:
        """Makes the file for a payload, with room for it, for `map`, and `publish` or `drop`. To be called with a claim.

        Raises:
            OSError: there is no room (ENOSPC); nothing is left.
        """
        part = f"{self._prefix}{name}{_PART}"
        with self._lock:
            spare = self._make_room(size)
        fd = -1
        if spare is not None:
            try:
                os.rename(self._prefix + spare.name, part)
                fd = spare.fd
            except OSError:
                os.close(spare.fd)  # somebody has removed it
        try:
            if fd < 0:
                fd = _open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)
            elif os.fstat(fd).st_size < size:
                self._reserve(fd, size)
            return Part(name, fd, size, spare is not None)
        except BaseException:
            self._drop(name, fd)
            raise

    def map(self, part: Part) -> memoryview:
        """The memory of what was begun, to be written to. Raises `OSError` when there is none."""
        part.memory = mmap.mmap(part.fd, part.bytes, flags=mmap.MAP_SHARED)
        # The memory of a new file is cleared when it is touched: best shortly before something is written to it.
        if part.recycled:
            part.memory[::_AROUND_BYTES]
        return memoryview(part.memory)

    def _reserve(self, fd: int, size: int) -> None:
        while True:
            try:
                os.posix_fallocate(fd, 0, size)
                return
            except OSError as exc:
                if exc.errno != errno.ENOSPC or not self._remove_oldest(size):
                    raise

    def publish(self, part: Part) -> memoryview:
        """What was begun, and mapped, is whole and right: it is there for all. The same memory, which nobody can write to any more."""
        assert part.memory is not None
        try:
            _protect(part.memory)
            fcntl.flock(part.fd, fcntl.LOCK_SH)
            view = self._known(part.name, part.memory)
            os.rename(f"{self._prefix}{part.name}{_PART}", f"{self._prefix}{part.name}{_DONE}")
        except BaseException:
            with self._lock:
                self._mapped.pop(part.name, None)
            self.drop(part)
            raise
        os.close(part.fd)
        return view

    def drop(self, part: Part) -> None:
        """What was begun is given up."""
        self._drop(part.name, part.fd)

    def _drop(self, name: str, fd: int) -> None:
        self._remove(name + _PART)
        if fd >= 0:
            os.close(fd)

    # --- room: with the lock held -------------------------------------------------------------------------------

    def _make_room(self, size: int) -> _Spare | None:
        """Sees that there is room; a spare that fits, if there is one."""
        if (spare := self._take_spare(size)) is not None:
            return spare
        if size <= self._room_bytes and time.monotonic() < self._room_until:
            self._room_bytes -= size
            return None
        return self._look_for_room(size)

    def _take_spare(self, size: int) -> _Spare | None:
        for at, spare in enumerate(self._spares):
            if spare.fits(size):
                return self._spares.pop(at)
        return None

    def _look_for_room(self, size: int) -> _Spare | None:
        """The same, with a look at all that lies there; removes what killed processes have left."""
        self._drop_spares()
        files, spares, claimed = self._files()
        for name in claimed:
            self._remove_left(name)
        total = sum(file.bytes for file in files) + spares
        if total + size > self._budget_bytes:
            # Some more, so that not each needs a look.
            most = max(0, self._budget_bytes * 7 // 8 - size)
            for file in files:
                if total <= most:
                    break
                self._remove_or_spare(file, size)
                total -= file.bytes
        spare = self._take_spare(size)
        # Others put something there, too.
        room = self._budget_bytes - total - size - sum(spare.bytes for spare in self._spares)
        self._room_bytes, self._room_until = room // 4, time.monotonic() + _ROOM_EVERY_S
        return spare

    def _remove_or_spare(self, file: _File, size: int) -> None:
        path = self._prefix + file.name
        fd = -1
        try:
            if _fits(file.bytes, size):
                fd = _open(path, os.O_RDWR)
                if _locked(fd, path, fcntl.LOCK_EX):
                    spare = _Spare(fd, f"{os.urandom(8).hex()}{_SPARE}", file.bytes)
                    os.rename(path, self._prefix + spare.name)
                    self._spares.append(spare)
                    return
        except OSError:
            pass  # it is somebody else's, or gone
        if fd >= 0:
            os.close(fd)
        self._remove(file.name)

    def _drop_spares(self) -> None:
        for spare in self._spares:
            self._remove(spare.name)
            os.close(spare.fd)
        self._spares.clear()

    def _files(self) -> tuple[list[_File], int, set[str]]:
        """What was fetched, sorted; the bytes of others' spares; the names of what is fetched just now, or was by those who were killed."""
        files, spares, claimed = [], 0, set()
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(_DONE):
                        found = entry.stat(follow_symlinks=False)
                        files.append(_File(max(found.st_mtime_ns, found.st_ctime_ns), entry.name, found.st_size))
                    elif entry.name.endswith((_PART, _LOCK)):
                        claimed.add(entry.name.rpartition(".")[0])
                    elif entry.name.endswith(_SPARE):
                        spares += self._spare_of_another(entry.name)
        return sorted(files), spares, claimed

    def _spare_of_another(self, name: str) -> int:
        """Its bytes; 0: its process is gone, and it, too."""
        path = self._prefix + name
        fd = _open(path, os.O_RDONLY)
        try:
            if not _locked(fd, path, fcntl.LOCK_EX):
                return os.fstat(fd).st_size
            self._remove(name)
            return 0
        finally:
            os.close(fd)

    def _remove_left(self, name: str) -> None:
        fd = self.claim(name)
        if fd is not None:
            self._remove(name + _PART)
            self.let_go(name, fd)

    def _remove_oldest(self, size: int) -> bool:
        """Removes at least so many bytes, if there are any; whether there were. Without the lock."""
        with self._lock:
            freed = sum(spare.bytes for spare in self._spares)
            self._drop_spares()
            for file in self._files()[0]:
                if freed >= size:
                    break
                self._remove(file.name)
                freed += file.bytes
        return freed > 0

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._prefix + name)

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The last one to close it removes what lies there. To be called once, when nothing is under way."""
        with self._lock:
            users, self._users = self._users, -1
            with contextlib.suppress(OSError):  # others use it, or it is gone
                self._drop_spares()
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in os.listdir(self._directory):
                    if name.endswith((_DONE, _PART, _LOCK, _SPARE)):
                        self._remove(name)
            os.close(users)

    def _forget(self) -> None:
        """In a child of fork: a lock is its parent's, and would outlive it here."""
        for fd in (self._users, *self._locks, *(spare.fd for spare in self._spares)):
            if fd >= 0:
                os.close(fd)
        self._users = -1
        self._locks.clear()
        self._spares.clear()


def _protect(mapped: mmap.mmap) -> None:
    """Forbids to write to it. To map the file once more would take longer."""
    if _libc.mprotect(ctypes.byref(ctypes.c_char.from_buffer(mapped)), ctypes.c_size_t(len(mapped)), mmap.PROT_READ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _fits(file_bytes: int, size: int) -> bool:
    return size * 4 <= file_bytes * 5 <= size * 6


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _locked(fd: int, path: str, how: int) -> bool:
    """Locks a file, if nobody has a lock that forbids it and it still is what its name names."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == os.stat(path, follow_symlinks=False).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


_shelves: weakref.WeakSet[Shelf] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for shelf in list(_shelves):
        shelf._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)

__all__ = ("Shelf",)
