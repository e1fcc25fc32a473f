"""Filling up a disk."""

from __future__ import annotations

from pathlib import Path

BALLAST = "ballast"
"""The file that takes the space."""


def fill_up(folder: Path) -> Path:
    """Takes all the space that is left."""
    ballast = folder / BALLAST
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return ballast
