"""The `edgeserve` command: demo, run, doctor, topic."""

from edgeserve.cli.app import main

__all__ = ("main",)
