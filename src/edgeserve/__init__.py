"""Streams from many nodes, aligned in time, joined, and served."""

__version__ = "0.1.0"

__all__ = ("__version__",)
