"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file; an older one of that name is replaced when the new one is on disk.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


__all__ = ("write_whole",)
