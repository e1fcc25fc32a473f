"""Whether processes of this machine live, known the moment they die: a broker hands on what a killed member held before its silence says
anything."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable


class Watch:
    """Watches processes; where the system has no means to, it never says anything."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._poll = select.poll()

    def only(self, pids: Iterable[int]) -> None:
        """Watches these, and no others."""
        wanted = set(pids) - {os.getpid()}
        for pid in self._ends.keys() - wanted:
            end = self._ends.pop(pid)
            self._poll.unregister(end)
            os.close(end)
        for pid in wanted - self._ends.keys():
            try:
                end = os.pidfd_open(pid)
            except (OSError, AttributeError):
                continue  # dead already, which whoever looks around finds out, or a system without it
            self._ends[pid] = end
            self._poll.register(end, select.POLLIN)

    def someone_died(self) -> bool:
        """Whether one of them is dead. Takes a microsecond."""
        return bool(self._ends) and bool(self._poll.poll(0))

    def close(self) -> None:
        """Ends it. Idempotent."""
        self.only(())


__all__ = ("Watch",)
