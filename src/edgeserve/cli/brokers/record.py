"""What is known of a broker that was started: a file in its directory, which says which process it is, beyond doubt."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

VERSION = 1


@dataclass(frozen=True)
class Record:
    """A broker that was started.

    Attributes:
        engine: 'pulsar' or 'nats'.
        pid: of the server; of the client that follows the container where it runs in one.
        born: the moment that process started, as the kernel tells it: a process that got the same number later has another.
        since_ns: when it was started, wall clock.
        url: the node URL, without secrets.
        source: what runs: a distribution's directory, a binary, an image.
        container: its name, where it runs in one; else ''.
    """

    engine: str
    pid: int
    born: str
    since_ns: int
    url: str
    port: int
    admin_port: int
    data: str
    log: str
    source: str
    container: str = ""


def resident_bytes(pid: int) -> int | None:
    """The memory that a process holds; None where that cannot be told."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


class Shelf:
    """A broker's directory: its record, its settings, its log, and where it puts its data unless told otherwise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "broker.log"

    def make(self) -> None:
        """Makes the directory; others may not look into it."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While one starts or stops the broker, others wait."""
        self.make()
        with open(self.directory / "lock", "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write(self, name: str, text: str) -> Path:
        """Writes a file that only its owner may read, whole or not at all."""
        path, new = self.directory / name, self.directory / f".{name}.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
        return path

    def put(self, record: Record) -> None:
        """Remembers what was started."""
        self.write("broker.json", json.dumps({"version": VERSION, **asdict(record)}, indent=2))

    def forget(self) -> None:
        """Forgets it; data and log stay."""
        (self.directory / "broker.json").unlink(missing_ok=True)

    def record(self) -> Record | None:
        """What was started last; None where nothing was, or where the file cannot be read."""
        try:
            found = json.loads((self.directory / "broker.json").read_text(encoding="utf-8"))
            return Record(**{field.name: found[field.name] for field in fields(Record)}) if found["version"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def tail(self, lines: int = 12) -> list[str]:
        """The end of the log."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return text.splitlines()[-lines:]


__all__ = ("Record", "Shelf", "resident_bytes")
