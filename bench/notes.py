"""What processes of a bench leave behind for its judge: files of JSON lines, appended to by plain functions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def note(path: Path, value: object) -> None:
    """Appends a line; a line is whole or not there."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, (json.dumps(value) + "\n").encode())
    finally:
        os.close(fd)


def lines(path: Path) -> list[Any]:
    """What was noted."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


__all__ = ("lines", "note")
