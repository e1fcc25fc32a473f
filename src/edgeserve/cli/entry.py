"""Where the command begins. Nothing is imported before Ctrl-C is an end in order: what is imported takes longer than some commands."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs the `edgeserve` command and ends the process with its exit status."""
    try:
        from edgeserve.cli.app import main as run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ("main",)
