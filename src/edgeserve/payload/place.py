"""Where payloads lie: in shared memory, or in a directory that the user names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgeserve.core.errors import ConfigurationError
from edgeserve.core.settings import state_directory

_SHARED_MEMORY = Path("/dev/shm")
_ORIGIN = "origin"


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


def make_payload_directory(store: str, root: Path) -> Path:
    """Makes the directory for the payloads of the store at `root`, with access for this user only.

    Raises:
        ConfigurationError: it belongs to somebody else, or is open to others.
    """
    base = payload_base()
    directory = base / store
    try:
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
        (directory / _ORIGIN).write_text(str(root))
    except OSError as exc:
        raise ConfigurationError(f"payloads cannot be kept in {base}: {exc}; name another place with EDGESERVE_PAYLOAD_DIR") from exc
    return directory


def is_gone(directory: Path, store: str, root: Path) -> bool:
    """Whether the store whose payloads lie here is not there any more. `store`, `root`: one that is, and may have taken its place."""
    try:
        origin = Path((directory / _ORIGIN).read_text())
        return directory.name != (store if origin == root else store_name(directory.name.partition("-")[0], origin))
    except FileNotFoundError:
        return (directory / _ORIGIN).exists()
    except OSError:
        return False


__all__ = ("is_gone", "make_payload_directory", "payload_base", "store_name")
