"""The `edgeserve` command: demo, run, doctor, topic and so on."""

from edgeserve.cli.entry import main

__all__ = ("main",)
