"""Opening and closing a `local://` store: who else has it open, whether it was closed well, what to repair."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from edgeserve.core.errors import ConfigurationError, StoreVersion
from edgeserve.core.settings import state_directory
from edgeserve.transport import log
from edgeserve.transport.base import Capabilities, Transport
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.kv import Space
from edgeserve.transport.local import recovery
from edgeserve.transport.local.lmdbkv import LmdbKV
from edgeserve.transport.url import NodeURL
from edgeserve.transport.wake import SocketSwitchboard

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
_inherited: weakref.WeakSet[BufferedRandom] = weakref.WeakSet()


def _after_fork() -> None:
    """A child of fork must not keep the parent's locks alive."""
    for file in list(_inherited):
        file.close()


os.register_at_fork(after_in_child=_after_fork)


class LocalEngine(LogEngine):
    """The log engine on LMDB, with the lock that counts who has the store open."""

    def __init__(self, url: NodeURL, root: Path, users: BufferedRandom, limits: log.Limits, *, durable: bool) -> None:
        self._root, self._users = root, users
        capabilities = Capabilities(durable=True, disk_durability=True)
        kv = LmdbKV(root, limits.store_bytes * 2 + (256 << 20), durable=durable)
        super().__init__(url.text, kv, SocketSwitchboard(root / "wake"), capabilities, limits)

    def close(self) -> None:
        """Lets go; the last process to do so seals the store, so that the next start need not look through it."""
        if self._closed or self.pid != os.getpid():
            return
        with _opening(self._root):
            super().close()
            if _only_user(self._users):
                recovery.seal(self._root)
            self._users.close()


def connect(url: NodeURL) -> Transport:
    """Opens the store; the first process to open one that was not closed well rebuilds it from what is intact."""
    url.only("durability", "size_mb", "retention_mb", "retention_s")
    durability = url.parameters.get("durability", "process")
    if durability not in ("process", "disk"):
        raise ConfigurationError(f"{url.text}: durability= is 'process' or 'disk', not {durability!r}")
    limits = log.limits_from(url)
    root = _directory(url)
    with _opening(root):
        users = open(root / "users.lock", "a+b")  # noqa: SIM115 - held for as long as the store is open
        _inherited.add(users)
        try:
            if _only_user(users):
                recovery.make_ready(root)
            fcntl.flock(users, fcntl.LOCK_SH)
            engine = LocalEngine(url, root, users, limits, durable=durability == "disk")
        except BaseException:
            users.close()
            raise
    _check_version(engine, root)
    return engine


def _directory(url: NodeURL) -> Path:
    if url.path and not url.path.startswith("/"):
        raise ConfigurationError(f"{url.text}: a store is named by an absolute path, as in local:///{url.path}")
    root = Path(url.path) if url.path.strip("/") else state_directory() / "local"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"{url.text}: cannot make the directory {root}: {exc.strerror}") from exc
    kind = _filesystem(root)
    if kind in _NETWORK_FILESYSTEMS:
        raise ConfigurationError(
            f"{url.text}: {root} is on a network filesystem ({kind}), where processes cannot share memory: use a local disk"
        )
    return root


def _filesystem(path: Path) -> str:
    """The filesystem type of the longest mount point above the path, or "" where the system does not tell."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""
    resolved = str(path.resolve())
    for line in mounts.splitlines():
        _, point, filesystem, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if len(point) >= len(best) and (resolved == point or resolved.startswith(point.rstrip("/") + "/")):
            best, kind = point, filesystem
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


def _check_version(engine: LocalEngine, root: Path) -> None:
    with engine.write() as txn:
        raw = txn.get(Space.STATE, b"v")
        version = log.DISK_FORMAT if raw is None else int.from_bytes(raw, "big")
        if raw is None:
            txn.put(Space.STATE, b"v", log.DISK_FORMAT.to_bytes(2, "big"))
    if version != log.DISK_FORMAT:
        engine.close()
        raise StoreVersion(
            f"the store in {root} has disk format {version}, this edgeserve reads format {log.DISK_FORMAT}: install the edgeserve that wrote it, "
            "or name another directory in the URL"
        )


__all__ = ("LocalEngine", "connect")
