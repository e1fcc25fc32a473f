"""The cyclic garbage collector, while a node runs.

By default it looks through the youngest objects after every 700 new containers, and every so often through all of them: a join holds
thousands of headers, none of which is ever part of a cycle, and spends a fifth of its time on that. In `run()` it looks less often.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNGEST = 50_000
_lock = threading.Lock()
_users = 0
_before = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Raises the first threshold while at least one node of the process runs; a collector that is switched off stays off."""
    global _users, _before
    with _lock:
        if _users == 0:
            _before = gc.get_threshold()
            if 0 < _before[0] < _YOUNGEST:
                gc.set_threshold(_YOUNGEST, *_before[1:])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                gc.set_threshold(*_before)


__all__ = ("rare_collections",)
