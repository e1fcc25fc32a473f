"""The `edgeserve` command: demo, run, doctor, topic."""

from edgeserve.cli.entry import main

__all__ = ("main",)
