"""Whether processes of this machine live, known the moment they die: a broker hands on what a killed member held before its silence says
anything."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable

from edgeserve.core.process import hidden

_DYING_MS = 1_000
_EXITING = 4


def _is_ending(stat: int, pid: int) -> bool:
    """Whether a process has begun to end. `stat`: its open file of that name; -1: that cannot be seen."""
    if stat < 0:
        return False
    try:
        return bool(int(os.pread(stat, 1024, 0).rpartition(b")")[2].split()[6]) & _EXITING)
    except (OSError, IndexError, ValueError):
        return not hidden(pid)


class Watch:
    """Watches processes; where the system has no means to, it never says anything."""

    def __init__(self) -> None:
        # By process: what becomes readable when it has ended, and its open `stat` (-1: it cannot be read).
        self._ends: dict[int, tuple[int, int]] = {}
        self._poll = select.poll()

    def only(self, pids: Iterable[int]) -> None:
        """Watches these, and no others."""
        wanted = set(pids) - {os.getpid()}
        for pid in self._ends.keys() - wanted:
            end, stat = self._ends.pop(pid)
            self._poll.unregister(end)
            os.close(end)
            if stat >= 0:
                os.close(stat)
        for pid in wanted - self._ends.keys():
            try:
                end = os.pidfd_open(pid)
            except (OSError, AttributeError):
                continue  # dead already, which whoever looks around finds out, or a system without it
            try:
                stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                stat = -1
            self._ends[pid] = end, stat
            self._poll.register(end, select.POLLIN)

    def someone_died(self, *, thorough: bool = False) -> bool:
        """Whether one of them is dead, which takes a microsecond. `thorough`: or is about to be. The connections of a process end before
        it does; to know that takes some microseconds for each."""
        if not self._ends:
            return False
        if self._poll.poll(0):
            return True
        return thorough and any(_is_ending(stat, pid) for pid, (_, stat) in self._ends.items()) and bool(self._poll.poll(_DYING_MS))

    def close(self) -> None:
        """Ends it. Idempotent."""
        self.only(())


__all__ = ("Watch",)
