"""Where payloads lie: in shared memory, or in a directory that the user names."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from edgeserve.core.errors import ConfigurationError
from edgeserve.core.process import boot
from edgeserve.core.settings import state_directory

ORIGIN = "origin"
"""The file that says which store a directory is of."""

BROKER = "broker-"
"""Begins the name of a broker's store."""

_SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"(?P<identity>[0-9a-f]{32})-(?P<device>[0-9a-f]+)-[0-9a-f]+")


def payload_base() -> Path:
    """Below it each store has a directory: `$EDGESERVE_PAYLOAD_DIR`, else `/dev/shm/edgeserve-<user id>`, else in the state directory.

    Raises:
        ConfigurationError: the variable names no absolute path: each process would look elsewhere.
    """
    given = os.environ.get("EDGESERVE_PAYLOAD_DIR")
    if given:
        if not os.path.isabs(given):
            raise ConfigurationError(f"EDGESERVE_PAYLOAD_DIR={given!r} is no absolute path: every process would look somewhere else")
        return Path(given)
    if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return _SHARED_MEMORY / f"edgeserve-{os.getuid()}"
    return state_directory() / "payloads"


def store_name(identity: str, root: Path) -> str:
    """Names a store by its identity and by where it is: a copy of it elsewhere is another, whose groups are others."""
    found = os.stat(root)
    return f"{identity}-{found.st_dev:x}-{found.st_ino:x}"


def broker_name(shown: str) -> str:
    """Names a broker by its URL as it is shown, without parameters: the store of this host's payloads for it."""
    return BROKER + xxh3_64_hexdigest(shown.partition("?")[0].encode())


def memory_name() -> str:
    """Names the memory where this host's payloads lie: processes with the same one read each other's in place. "": there is none."""
    try:
        found = os.stat(payload_base())
    except (OSError, ConfigurationError):
        return ""
    return xxh3_64_hexdigest(f"{boot()} {found.st_dev:x} {found.st_ino:x}".encode())


def make_payload_directory(store: str, root: Path | None) -> Path:
    """Makes the directory for the payloads of the store at `root` (None: of a broker), with access for this user only.

    Raises:
        ConfigurationError: it belongs to somebody else, or is open to others.
        OSError: it cannot be made.
    """
    base = payload_base()
    directory = base / store
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    for each in (base, directory):
        found = os.lstat(each)
        given = each == base and "EDGESERVE_PAYLOAD_DIR" in os.environ
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or (found.st_mode & 0o022 and not given):
            raise ConfigurationError(
                f"{each} is not a directory that only user {os.getuid()} may write to, so payloads are not put there: "
                "remove it, or name another place with EDGESERVE_PAYLOAD_DIR"
            )
    if root is not None:
        _note_origin(directory / ORIGIN, _here() + b"\n" + os.fsencode(root))
    return directory


def _note_origin(path: Path, origin: bytes) -> None:
    """At once, and only if it is another: who reads it meanwhile must not find half of it."""
    try:
        if path.read_bytes() == origin:
            return
    except FileNotFoundError:
        pass
    new = path.with_name(f"{ORIGIN}.{os.urandom(8).hex()}.new")
    try:
        new.write_bytes(origin)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _here() -> bytes:
    """Where a path means what it means to this process: the form of this note, the boot, the mount namespace; b"" where nobody tells."""
    try:
        return f"1 {now} {os.readlink('/proc/self/ns/mnt')}".encode() if (now := boot()) else b""
    except OSError:
        return b""


def is_gone(directory: Path, store: str, root: Path) -> bool:
    """Whether the store whose payloads lie here is not there any more. `store`, `root`: one that is, and may have taken its place.

    False where that is not known: to a container the store of another one may look as if it were gone, and so does one whose disk is not
    mounted now.
    """
    named, here = _NAME.fullmatch(directory.name), _here()
    if named is None or not here:
        return False
    try:
        noted, _, name = (directory / ORIGIN).read_bytes().partition(b"\n")
        origin = Path(os.fsdecode(name))
        if noted != here or not origin.is_absolute():
            return False
        nearest = next(path for path in (origin, *origin.parents) if path.exists())
        if f"{os.stat(nearest).st_dev:x}" != named["device"]:
            return False
        return nearest != origin or directory.name != (store if origin == root else store_name(named["identity"], origin))
    except OSError:
        return False


__all__ = ("BROKER", "ORIGIN", "broker_name", "is_gone", "make_payload_directory", "memory_name", "payload_base", "store_name")
