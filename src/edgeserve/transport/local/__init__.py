"""`local://[/dir]`: the embedded engine, an LMDB environment that the processes of one machine share."""

from edgeserve.transport.local.engine import connect

__all__ = ("connect",)
