"""Opening and closing a `local://` store: who else has it open, whether it was closed well, what to repair."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from edgeserve.core.errors import ConfigurationError, DiskFull, EdgeServeError, TransportError
from edgeserve.core.settings import state_directory
from edgeserve.transport import records
from edgeserve.transport.base import Capabilities, Transport
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.kv import Space
from edgeserve.transport.local import recovery
from edgeserve.transport.local.lmdbkv import WRITER, LmdbKV
from edgeserve.transport.url import NodeURL
from edgeserve.transport.wake import SocketSwitchboard

_log = logging.getLogger(__name__)
_NETWORK_FILESYSTEMS = frozenset(
    (
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "ceph",
        "glusterfs",
        "lustre",
        "afs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "beegfs",
        "gfs2",
        "ocfs2",
    )
)
_MAP_BYTES = 64 << 30
_stores: dict[Path, _Store] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    """A child of fork must not keep the parent's locks alive; the store is opened anew there."""
    global _lock
    _lock = threading.RLock()
    for store in _stores.values():
        store.users.close()
    _stores.clear()


os.register_at_fork(after_in_child=_after_fork)


@dataclass
class _Store:
    """What the connections of one process to one store share: LMDB must not be opened twice in a process."""

    kv: LmdbKV
    board: SocketSwitchboard
    users: BufferedRandom
    durable: bool
    identity: str
    connections: int = 0


class LocalEngine(LogEngine):
    """The log engine on LMDB, with the lock that counts who has the store open."""

    def __init__(self, url: NodeURL, root: Path, store: _Store, limits: records.Limits) -> None:
        self.root, self._store = root, store
        capabilities = Capabilities(durable=True, disk_durability=True, tells_positions=True, max_frame_bytes=limits.largest_frame_bytes)
        super().__init__(url.text, store.kv, store.board, capabilities, limits, store.identity)

    def release(self) -> None:
        """Lets go; the last process to do so seals the store, so that the next start need not look through it."""
        with _lock:
            self._store.connections -= 1
            if self._store.connections == 0:
                assert self.root is not None
                _stores.pop(self.root, None)
                _close(self.root, self._store)


def connect(url: NodeURL) -> Transport:
    """Opens the store; the first process to open one that was not closed well rebuilds it from what is intact."""
    url.only("durability", "size_mb", "retention_mb", "retention_s")
    durability = url.parameters.get("durability", "process")
    if durability not in ("process", "disk"):
        raise ConfigurationError(f"{url.shown}: durability= is 'process' or 'disk', not {durability!r}")
    limits = records.limits_from(url)
    root = _directory(url)
    with _lock:
        store = _stores.get(root)
        if store is None:
            store = _stores[root] = _open(root, limits, durable=durability == "disk")
        elif store.durable != (durability == "disk"):
            raise ConfigurationError(f"{url.shown}: this process has the store open with another durability=")
        store.connections += 1
        return LocalEngine(url, root, store, limits)


def _open(root: Path, limits: records.Limits, *, durable: bool) -> _Store:
    with _named(root), _opening(root):
        users = open(root / "users.lock", "a+b")  # held for as long as the store is open
        try:
            if _only_user(users):
                recovery.make_ready(root)
                (root / WRITER).unlink(missing_ok=True)
            fcntl.flock(users, fcntl.LOCK_SH)
            recovery.note_opened(root, durable=durable)
            identity = recovery.identity(root)
            # The map is as large for everybody: a process with a smaller one could not read what another has written.
            kv = LmdbKV(root, max(_MAP_BYTES, limits.store_bytes * 2), durable=durable)
            store = _Store(kv, SocketSwitchboard(root / "wake"), users, durable, identity)
            try:
                _check_version(kv, root)
            except BaseException:
                _close_files(store)
                raise
            return store
        except BaseException:
            users.close()
            raise


def _close(root: Path, store: _Store) -> None:
    try:
        with _opening(root):
            _close_files(store)
            if _only_user(store.users):
                recovery.seal(root)
    except OSError as exc:
        # Everything is in the store already; unsealed it is looked through by the next start.
        _log.warning("the store in %s was not sealed: %s", root, exc)
    finally:
        _close_files(store)
        store.users.close()


def _close_files(store: _Store) -> None:
    store.board.close()
    store.kv.close()


@contextmanager
def _named(root: Path) -> Iterator[None]:
    """Errors of the filesystem in our words."""
    try:
        yield
    except OSError as exc:
        if isinstance(exc, EdgeServeError):
            raise
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left on the filesystem of {root}: free some and start again") from exc
        raise TransportError(f"cannot open the store in {root}: {exc}") from exc


def directory_of(url: NodeURL) -> Path:
    """Where a URL's store is or would be. Nothing is made."""
    if url.path and not url.path.startswith("/"):
        raise ConfigurationError(f"{url.shown}: a store is named by an absolute path, as in local:///{url.path.rpartition('@')[2]}")
    return Path(os.path.abspath(url.path)) if url.path.strip("/") else state_directory() / "local"


def _directory(url: NodeURL) -> Path:
    root = directory_of(url)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left on the filesystem of {root}: free some and start again") from exc
        in_the_way = next((path for path in (root, *root.parents) if os.path.lexists(path)), root)
        if not in_the_way.is_dir():
            what = "a file" if in_the_way.exists() else "a link to nothing"
            raise ConfigurationError(
                f"{url.shown}: {in_the_way} is {what}, and a store is a directory of its own: name another path, or move it away"
            ) from exc
        raise ConfigurationError(f"{url.shown}: cannot make the directory {root}: {exc.strerror}") from exc
    root = root.resolve()
    try:
        kind = filesystem_of(root, Path("/proc/self/mounts").read_text(errors="replace"))
    except OSError:
        kind = ""  # a system that does not tell
    if kind in _NETWORK_FILESYSTEMS:
        raise ConfigurationError(
            f"{url.shown}: {root} is on a network filesystem ({kind}), where processes cannot share memory: use a local disk"
        )
    return root


def filesystem_of(path: Path, mounts: str) -> str:
    """The filesystem type of the last and longest mount point above the path, by a text in the format of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        if len(point) >= len(best) and path.is_relative_to(point):
            best, kind = point, fields[2]
    return kind


@contextmanager
def _opening(root: Path) -> Iterator[None]:
    """One process at a time opens or closes the store."""
    with open(root / "opening.lock", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _only_user(users: BufferedRandom) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_version(kv: LmdbKV, root: Path) -> None:
    with kv.read() as txn:
        raw = txn.get(Space.STATE, records.VERSION_KEY)
        version = records.DISK_FORMAT if raw is None else records.read_version(raw)
    if raw is None:
        with kv.write() as txn:
            txn.put(Space.STATE, records.VERSION_KEY, records.version_record())
    if version != records.DISK_FORMAT:
        raise recovery.wrong_version(root, version)


__all__ = ("LocalEngine", "connect", "directory_of", "filesystem_of")
