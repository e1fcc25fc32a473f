"""Where edgeserve keeps what outlives a process."""

from __future__ import annotations

import os
from pathlib import Path


def state_directory() -> Path:
    """`$EDGESERVE_STATE_DIR`, else `$XDG_STATE_HOME/edgeserve`, else `~/.local/state/edgeserve`. Not created here."""
    given = os.environ.get("EDGESERVE_STATE_DIR")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "edgeserve"


__all__ = ("state_directory",)
