"""Whether processes of this machine live, known the moment they die: a broker hands on what a killed member held before its silence says
anything."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from pathlib import Path

from edgeserve.core.process import hidden

_DYING_MS = 1_000
_EXITING = 4


def _ends(pid: int) -> bool:
    """Whether a process has begun to end."""
    try:
        return bool(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & _EXITING)
    except (OSError, IndexError, ValueError):
        return not hidden(pid)


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

    def someone_died(self, *, thorough: bool = False) -> bool:
        """Whether one of them is dead, which takes a microsecond. `thorough`: or is about to be. The connections of a process end before
        it does; to know that takes 20 microseconds for each."""
        if not self._ends:
            return False
        if self._poll.poll(0):
            return True
        return thorough and any(map(_ends, self._ends)) and bool(self._poll.poll(_DYING_MS))

    def close(self) -> None:
        """Ends it. Idempotent."""
        self.only(())


__all__ = ("Watch",)
