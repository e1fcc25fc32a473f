"""The send window: a sender waits while live groups have too much of what it sent before them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from edgeserve.core.errors import DiskFull, StoreFull, TransportError
from edgeserve.transport import records
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.wake import Waker

_log = logging.getLogger(__name__)
_STALL_S = 1.0
_SLICES = 10


class Window:
    """Holds a sender back while live groups have not settled enough of what it sent: so long as they move, and for a second at most when
    they don't.

    Only the sender's own messages count, and only those not settled, wherever they stand: one which is ahead waits for the others and
    never the other way round. In a join the messages of the one ahead stay unsettled until those of the other have come.
    """

    def __init__(self, engine: LogEngine, topic: str, size: int) -> None:
        self._engine, self._topic, self._size = engine, topic, size
        self._cache = records.StateCache()
        self._stalled: dict[str, int] = {}
        self._waker: Waker | None = None
        # (first, last + 1) of what was sent and may not be settled yet, and how many that is.
        self._sent: deque[tuple[int, int]] = deque()
        self._own = self._unchecked = 0
        self._troubled = False

    def wait(self, head: records.Head, sent: int, stopping: Callable[[], bool] | None) -> None:
        """Notes that messages were sent; returns when no live, moving group has more than the window of them left, or it is to stop.

        What was sent is stored: nothing that goes wrong here is an error of the send.
        """
        self._sent.append((head.next - sent, head.next))
        self._own += sent
        self._unchecked += sent
        while self._own - sent > 2 * self._size:
            # A group that stands this far back is too far back whatever the exact number; it may never move again.
            self._forget_oldest()
        if self._own <= self._size or self._unchecked < self._size >> 3:
            return
        self._unchecked = 0
        try:
            floors = [self._hold_back(group, stopping) for group in head.groups] if head.listeners else []
        except (TransportError, OSError) as exc:
            if not self._troubled:
                _log.warning("the send window of topic %r is not kept: %s", self._topic, exc)
            self._troubled = True
            return
        self._troubled = False
        floor = min(floors, default=head.next)
        while self._sent and self._sent[0][1] <= floor:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        lo, hi = self._sent.popleft()
        self._own -= hi - lo

    def _hold_back(self, group: str, stopping: Callable[[], bool] | None) -> int:
        """Waits for one group; returns the position below which it has settled everything."""
        while True:
            floor, settled, behind = self._look(group, register=False)
            if not behind or self._stalled.get(group) == settled or (stopping is not None and stopping()):
                return floor
            try:
                if self._waker is None:
                    self._waker = self._engine.board.waker()
                while self._waker.drain():
                    pass  # wake-ups that came too late for an earlier wait
                floor, before, behind = self._look(group, register=True)
            except (StoreFull, DiskFull):
                return floor  # no room to ask to be woken
            if not behind:
                return floor
            for _ in range(_SLICES):  # a signal's handler cannot wake it
                self._waker.wait(_STALL_S / _SLICES)
                if stopping is not None and stopping():
                    return floor
                if self._waker.drain():
                    break
            self._engine.check()
            floor, settled, behind = self._look(group, register=False)
            if settled == before and behind:
                self._stalled[group] = settled

    def _look(self, group: str, *, register: bool) -> tuple[int, int, bool]:
        """(floor, count of settled messages, whether the sender has to wait) of a group."""
        engine, size = self._engine, self._size
        with engine.kv.write(self._cache.forget) if register else engine.kv.read() as txn:
            head, state = records.find_head(txn, self._topic), self._cache.find(txn, self._topic, group)
            if head is None or state is None:
                return self._sent[-1][1], 0, False
            floor = state.floor()
            own = state.unsettled(self._sent)
            behind = own > size < state.backlog(head.next)
            if behind and register and self._waker is not None:
                # Not sooner than after an eighth of the window: the settled ones may be others'.
                state.blocked[self._waker.address] = (state.settled + max(own - size * 3 // 4, size >> 3), size * 3 // 4)
                self._cache.save(txn, self._topic, group, state)
            addresses = [m.address for m in state.members.values() if m.holds_senders]
        return floor, state.settled, behind and any(engine.board.alive(a) for a in addresses)

    def close(self) -> None:
        """Gives the waiting place up."""
        if self._waker is not None:
            self._waker.close()


__all__ = ("Window",)
