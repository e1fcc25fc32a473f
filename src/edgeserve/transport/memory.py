"""`memory://NAME`: topics in this process's memory, for tests. The same name is the same store until the process ends."""

from __future__ import annotations

import uuid

from edgeserve.transport import records
from edgeserve.transport.base import Capabilities, Transport
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.kv import MemoryKV
from edgeserve.transport.url import NodeURL
from edgeserve.transport.wake import ThreadSwitchboard

_stores: dict[str, tuple[MemoryKV, ThreadSwitchboard, str]] = {}


def connect(url: NodeURL) -> Transport:
    """Opens the store of that name."""
    url.only("size_mb", "retention_mb", "retention_s")
    kv, board, identity = _stores.setdefault(url.path, (MemoryKV(), ThreadSwitchboard(), uuid.uuid4().hex))
    limits = records.limits_from(url)
    return LogEngine(
        url.text, kv, board, Capabilities(durable=False, tells_positions=True, max_frame_bytes=limits.largest_frame_bytes), limits, identity
    )


__all__ = ("connect",)
