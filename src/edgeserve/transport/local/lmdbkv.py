"""The store under `local://`: an LMDB environment, its errors in our words.

The map is not writable memory (no MDB_WRITEMAP): a stray pointer cannot reach the data, and a full disk is an error of `commit` with the
transaction undone, not a signal. What LMDB does write through memory, its lock file, is given its disk space beforehand.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
from xxhash import xxh3_64_digest

from edgeserve.core.errors import ClosedError, DiskFull, StoreDamaged, StoreFull, TransportError
from edgeserve.transport.kv import KV, Space

_log = logging.getLogger(__name__)
DATA = "data"
MARK = "mark"
WRITER = "writer"
CENSUS = b"c"
_MAX_READERS = 1024
_LOCK_BYTES = 128 + 64 * _MAX_READERS + 4096
_CENSUS_BYTES = 24
_PAIR = struct.Struct("<QQ")
_WORD = struct.Struct("<Q")
_CHECK_READERS_EVERY = 256
_GATE_S = 1.0
_LOW_BYTES = 16 << 20
_WATCH_S = 2.0
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for the disk"}
_kvs: weakref.WeakSet[LmdbKV] = weakref.WeakSet()
_paused: list[tuple[LmdbKV, AbstractContextManager[bool]]] = []


def open_environment(path: Path, map_bytes: int, *, durable: bool, readonly: bool = False, alone: bool = False) -> tuple[Any, list[Any]]:
    """An LMDB environment and its spaces. The map is address space, not memory or disk. `alone`: nobody else has it open, ever."""
    env = lmdb.open(
        str(path),
        map_size=map_bytes,
        max_dbs=len(Space),
        max_readers=_MAX_READERS,
        sync=durable,
        metasync=durable,
        meminit=False,
        max_spare_txns=0,
        readonly=readonly,
        lock=not (readonly or alone),
        create=not readonly,
        readahead=False,
    )
    try:
        return env, [env.open_db(space.name.lower().encode(), create=not readonly) for space in Space]
    except lmdb.NotFoundError:
        # Only read, and its maker was killed before it made the spaces.
        if env.info()["last_txnid"] <= len(Space):
            return env, []
        env.close()
        raise lmdb.CorruptedError("a space is missing") from None
    except BaseException:
        env.close()
        raise


def reserve_lock_file(path: Path) -> None:
    """Gives the lock file its disk blocks: LMDB writes to it through memory, where a full disk is a signal. Not while it is open here."""
    path.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, _LOCK_BYTES)
    finally:
        os.close(fd)


class LmdbTxn:
    """A `Txn` on LMDB. `census` gathers how the sum over the first words of all values of STATE changes."""

    __slots__ = ("_dbs", "_txn", "census", "changed")

    def __init__(self, txn: Any, dbs: list[Any]) -> None:
        self._txn, self._dbs = txn, dbs
        self.census, self.changed = 0, False

    def get(self, space: Space, key: bytes) -> memoryview | None:
        value: memoryview | None = self._txn.get(key, db=self._dbs[space])
        return value

    def put(self, space: Space, key: bytes, value: bytes | bytearray | memoryview) -> None:
        self.changed = True
        if space:
            self._txn.put(key, value, db=self._dbs[space])
            return
        old = self._txn.replace(key, value, db=self._dbs[0])
        self.census ^= _WORD.unpack_from(value)[0]
        if old is not None:
            self.census ^= _WORD.unpack_from(old)[0]

    def delete(self, space: Space, key: bytes) -> None:
        self.changed = True
        if space:
            self._txn.delete(key, db=self._dbs[space])
            return
        old = self._txn.pop(key, db=self._dbs[0])
        if old is not None:
            self.census ^= _WORD.unpack_from(old)[0]

    def scan(self, space: Space, start: bytes, stop: bytes) -> Iterator[tuple[bytes, memoryview]]:
        with self._txn.cursor(db=self._dbs[space]) as cursor:
            if cursor.set_range(start):
                for key, value in cursor:
                    if bytes(key) >= stop:
                        return
                    yield bytes(key), value

    def seal(self) -> int:
        """Before the commit: notes the sum and the commit's number; returns the number. A page that fell back shows by them."""
        db, number, known = self._dbs[0], self._txn.id(), self._txn.get(CENSUS, db=self._dbs[0])
        if known is None:
            body = _PAIR.pack(self.census, number)
        elif len(known) == _CENSUS_BYTES and xxh3_64_digest(known[:16]) == known[16:]:
            body = _PAIR.pack(self.census ^ _WORD.unpack_from(known)[0], number)
        else:
            body = _PAIR.pack(0, 0)  # a damaged record stays one: it must not be made good by the change of one commit
        self._txn.put(CENSUS, body + xxh3_64_digest(body), db=db)
        return int(number)


def read_mark(path: Path) -> int | None:
    """The number of the last commit; 0 when there was none yet, None when the mark is damaged."""
    raw = path.read_bytes() if path.exists() else b""
    if not raw:
        return 0
    number = int.from_bytes(raw[:6], "little")
    return number if raw == _mark(number) else None


def _open_word(path: Path, initial: bytes) -> mmap.mmap:
    """A word that processes share, as memory: its disk space is there before, so that writing to it cannot fail."""
    with open(path, "a+b") as file:
        if os.fstat(file.fileno()).st_size != _WORD.size:
            file.truncate(0)
            file.write(initial)
            file.flush()
        return mmap.mmap(file.fileno(), _WORD.size)


def _mark(number: int) -> bytes:
    # One word, so that processes which commit one after the other cannot mix theirs: 48 bits, and 16 that check them.
    return _WORD.pack(number | ((number ^ number >> 16 ^ number >> 32 ^ 0xFFFF) & 0xFFFF) << 48)


def read_census(raw: bytes | memoryview | None) -> tuple[int, int] | None:
    """(sum, number of the last commit), or None when the record is missing or damaged."""
    if raw is None or len(raw) != _CENSUS_BYTES or xxh3_64_digest(raw[:16]) != raw[16:]:
        return None
    census, number = _PAIR.unpack_from(raw)
    return (census, number) if number else None


class _Transaction(LmdbTxn):
    """A transaction as a context. A class and not a generator: it is on the way of every message, and calls are what that costs."""

    __slots__ = ("_kv",)
    _writes = False

    def __init__(self, kv: LmdbKV) -> None:
        self._kv = kv

    def __enter__(self) -> LmdbTxn:
        kv, writes = self._kv, self._writes
        kv.live.add(self)
        if writes and kv.writer[:] != kv.own:
            kv.watch()
        if kv.gate is not None or kv.env is None:
            kv.enter(self)
        try:
            self._txn = kv.env.begin(write=writes, buffers=True)
        except lmdb.Error as exc:
            self._txn = kv.begin_again(exc, self, write=writes)
        if writes:
            kv.writer[:] = kv.own
        self._dbs = kv.dbs
        self.census, self.changed = 0, False
        return self


class _Read(_Transaction):
    __slots__ = ()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._txn.abort()
        self._kv.live.discard(self)
        if isinstance(error, lmdb.Error):
            raise self._kv.named(error) from error


class _Write(_Transaction):
    __slots__ = ("_undo",)
    _writes = True

    def __init__(self, kv: LmdbKV, undo: Callable[[], None] | None) -> None:
        self._kv, self._undo = kv, undo

    @property
    def waits(self) -> bool:
        """Whether it has not begun yet."""
        return not hasattr(self, "_txn")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        kv = self._kv
        if kind is None:
            try:
                if not self.changed:
                    self._txn.abort()  # such a transaction takes no number
                    kv.live.discard(self)
                    return
                number = self.seal()
                self._txn.commit()
            except BaseException as exc:
                error = exc
            else:
                try:
                    kv.note(number)
                finally:
                    kv.live.discard(self)
                return
        with suppress(lmdb.Error):
            self._txn.abort()
        kv.live.discard(self)
        if self._undo is not None:
            self._undo()
        if isinstance(error, lmdb.Error):
            raise kv.named(error) from error
        if kind is None and error is not None:
            raise error


class LmdbKV(KV):
    """Transactions on LMDB. `mark` keeps the number of the last commit beside the data, so that a later start can tell when the newest
    commits are missing."""

    def __init__(self, root: Path, map_bytes: int, *, durable: bool) -> None:
        # Who wrote last, or does now; and this process as such.
        self.writer: mmap.mmap
        self.own = _WORD.pack(os.getpid())
        self._watcher: threading.Thread | None = None
        self._ended = threading.Event()
        self._root, self._map_bytes, self._durable = root, map_bytes, durable
        self._pid = os.getpid()
        self.env: Any = None
        self.dbs: list[Any] = []
        self.live: set[object] = set()
        self.gate: threading.Event | None = None
        self._gate_lock = threading.RLock()
        self._closed = False
        self._mark: mmap.mmap | None = None
        try:
            reserve_lock_file(root / DATA)
            self.env, self.dbs = open_environment(root / DATA, map_bytes, durable=durable)
            self.env.reader_check()
            self._mark = _open_word(root / MARK, _mark(0))
            self.writer = _open_word(root / WRITER, self.own)
        except (lmdb.Error, OSError) as exc:
            if self.env is not None:
                self.env.close()
            raise self.named(exc) from exc
        _kvs.add(self)

    def write(self, undo: Callable[[], None] | None = None) -> _Write:
        return _Write(self, undo)

    def read(self) -> _Read:
        return _Read(self)

    def enter(self, token: object) -> None:
        """Marks a transaction as open, when the environment is being replaced or the process forks: waits for that to be over."""
        while True:
            self.live.add(token)
            gate = self.gate
            if gate is None:
                break
            self.live.discard(token)
            gate.wait(_GATE_S)
        if self.env is None:
            self.live.discard(token)
            if self._closed:
                raise ClosedError(f"the store in {self._root} is closed")
            self._open_anew(None)
            self.enter(token)

    def begin_again(self, exc: lmdb.Error, token: object, *, write: bool) -> Any:
        """A transaction could not begin. After a commit that failed half-way LMDB refuses the environment: then it is opened anew."""
        broken = self.env
        self.live.discard(token)
        if not isinstance(exc, lmdb.PanicError):
            raise self.named(exc) from exc
        self._open_anew(broken)
        self.enter(token)
        try:
            return self.env.begin(write=write, buffers=True)
        except lmdb.Error as again:
            self.live.discard(token)
            raise self.named(again) from again

    def note(self, number: int) -> None:
        """After a commit."""
        if self._mark is not None:
            self._mark[:] = _mark(number)
        if number % _CHECK_READERS_EVERY == 0:
            self.env.reader_check()

    def watch(self) -> None:
        """Others write too: one that stands still inside a transaction stops them all, and LMDB waits in silence."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="edgeserve-store-watch", daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        known, looks = set[_Write](), 0
        word = b""
        while not self._ended.wait(_WATCH_S) and self._mark is not None:
            waiting = {one for one in tuple(self.live) if type(one) is _Write and one.waits}
            before, word = word, self._mark[:] + self.writer[:]
            looks = looks + 1 if waiting & known and word == before else 0
            known = waiting
            if looks == 2:
                pid = _WORD.unpack(self.writer[:])[0]
                _log.warning(
                    "the store in %s stands still: process %d (%s) has kept it from being written to for %.0f s. Continue that process, or "
                    "kill it; nothing is lost by either",
                    self._root,
                    pid,
                    _state_of(pid),
                    looks * _WATCH_S,
                )

    @contextmanager
    def closed_gate(self) -> Iterator[bool]:
        """Lets no transaction begin, and waits for those that are open; False when one of them does not end."""
        with self._gate_lock:
            outer = self.gate
            gate = self.gate = outer or threading.Event()
            deadline = time.monotonic() + _GATE_S
            try:
                while self.live and time.monotonic() < deadline:
                    time.sleep(0.0001)
                yield not self.live
            finally:
                self.gate = outer
                if outer is None:
                    gate.set()

    def _open_anew(self, broken: Any) -> None:
        with self.closed_gate() as quiet:
            if not quiet or self.env is not broken or self._closed:
                return
            if broken is not None:
                self.env = None
                broken.close()
            try:
                self.env, self.dbs = open_environment(self._root / DATA, self._map_bytes, durable=self._durable)
            except lmdb.Error as exc:
                raise self.named(exc) from exc

    def named(self, exc: lmdb.Error | OSError) -> TransportError:
        """The error in our words."""
        where = f"the store in {self._root}"
        if isinstance(exc, lmdb.MapFullError):
            freed = self.env.reader_check()
            return StoreFull(
                f"{where} reached its map of {self._map_bytes >> 20} MiB ({freed} dead readers cleared); nothing of this was written"
            )
        if _no_space(exc) or (_cut_short(exc) and _low(self._root)):
            return DiskFull(f"no space left on the filesystem of {self._root}; nothing of this was written: free some and go on ({exc})")
        if isinstance(exc, lmdb.MapResizedError):
            return TransportError(f"{where} is open elsewhere with a larger size_mb= than here: use the same in all processes")
        if isinstance(exc, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError):
            return StoreDamaged(f"{where} is damaged ({exc}): stop every process that uses it, the next start repairs what can be repaired")
        return TransportError(f"{where}: {exc}")

    def leave_to_parent(self) -> None:
        """In the child of a fork: lets go of what is the parent's, so that the store can be opened anew here."""
        if not self.live and self.env is not None:
            self.env.close()
        self.env, self.dbs, self._mark, self._closed = None, [], None, True

    def close(self) -> None:
        if self._closed or self._pid != os.getpid():
            return
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        with self.closed_gate():
            self._closed = True
            if self.env is not None:
                self.env.close()
                self.env = None
            if self._mark is not None:
                self._mark.close()
                self._mark = None
        _kvs.discard(self)


def _state_of(pid: int) -> str:
    """What the system says of a process."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "not to be seen from here"
    return _STATES.get(letter, "running")


def _before_fork() -> None:
    for kv in list(_kvs):
        gate = kv.closed_gate()
        gate.__enter__()
        _paused.append((kv, gate))


def _after_fork_here() -> None:
    while _paused:
        _paused.pop()[1].__exit__(None, None, None)


def _after_fork_in_child() -> None:
    inherited = [kv for kv, _ in _paused]
    _after_fork_here()
    for kv in inherited:
        kv.leave_to_parent()


# No transaction may be open while the process forks: the child lets go of the environment, and would end the parent's transaction.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_here, after_in_child=_after_fork_in_child)


def _no_space(exc: Exception) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in (errno.ENOSPC, errno.EDQUOT)
    return os.strerror(errno.ENOSPC) in str(exc) or os.strerror(errno.EDQUOT) in str(exc)


def _cut_short(exc: Exception) -> bool:
    """Whether a write may have ended early: LMDB has no error of its own for that."""
    return isinstance(exc, OSError | lmdb.DiskError | lmdb.PanicError) or os.strerror(errno.EIO) in str(exc)


def _low(root: Path) -> bool:
    """Whether the filesystem is as good as full: a short write is then told as such. A filesystem that was full a moment ago may have found
    a few MiB again, of what it had set aside for writes that it has done meanwhile."""
    stat = os.statvfs(root)
    return stat.f_bavail * stat.f_frsize < _LOW_BYTES


__all__ = ("CENSUS", "DATA", "MARK", "WRITER", "LmdbKV", "LmdbTxn", "open_environment", "read_census", "read_mark", "reserve_lock_file")
