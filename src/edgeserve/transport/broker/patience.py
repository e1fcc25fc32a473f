"""Waiting for a broker: what one without room refuses is kept; one that is silent is waited for no longer than a stop allows."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import TypeAlias

from edgeserve.core.errors import SendError, StoreFull
from edgeserve.transport.broker.driver import Done, Outlet
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.trouble import Silence

GRACE_S = 10.0
"""For how long a broker that confirms nothing is waited for by who was told to stop."""

_PAUSES_S = (0.05, 1.0)
_SAY_EVERY_S = 1.0
_CLOSE_S = 3.0


class Grace:
    """One wait of somebody who may be told to stop. `stopping`: says whether."""

    def __init__(self, stopping: Callable[[], bool] | None) -> None:
        self._stopping, self._since = stopping, 0.0

    @property
    def over(self) -> bool:
        """Whether to wait no longer. To be asked about every second."""
        if self._stopping is None or not self._stopping():
            return False
        now = time.monotonic()
        self._since = self._since or now
        return now - self._since > GRACE_S

    def begin_again(self) -> None:
        """The broker has confirmed something: it is not silent."""
        self._since = 0.0


_Kept: TypeAlias = tuple[int, bytes, Done]
"""An entry: the how manieth it is, its bytes, who is told when it is durable."""


class PatientOutlet(Outlet):
    """An outlet to a broker that may have no room (`StoreFull`): what it refuses is kept, with all that comes behind it, and sent again in
    order until there is room. What was on its way behind a refused entry and was taken, because it is smaller, stays where it is.

    Args:
        outlet: the driver's.
        silence: says what is the matter.
        deadline_s: for how long; None: for ever. Then what is kept fails, with a `SendError`.
    """

    def __init__(self, outlet: Outlet, silence: Silence, deadline_s: float | None) -> None:
        self._outlet, self._silence, self._deadline_s = outlet, silence, deadline_s
        self._guard = Guard()
        # In the order in which they were handed over.
        self._kept: list[_Kept] = []
        self._count = self._unanswered = self._refusals = 0
        self._since = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def keeps(self) -> bool:
        """Whether the broker has no room."""
        return self._thread is not None

    def send(self, data: bytes, done: Done) -> None:
        with self._guard.mutex:
            self._count += 1
            item = (self._count, data, done)
            if self._thread is not None:
                self._kept.append(item)
                return
            self._unanswered += 1
        try:
            self._outlet.send(data, partial(self._answered, item))
        except BaseException:
            self._not_sent()
            raise

    def close(self) -> None:
        with self._guard.mutex:
            self._closed = True
            thread = self._thread
            self._guard.changed.notify_all()
        self._outlet.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)

    def _not_sent(self) -> None:
        with self._guard.mutex:
            self._unanswered -= 1
            self._guard.changed.notify_all()

    def _answered(self, item: _Kept, at: int | None, error: Exception | None) -> None:
        refused = isinstance(error, StoreFull)
        with self._guard.mutex:
            self._unanswered -= 1
            if refused:
                self._keep(item)
            if self._thread is not None:
                self._guard.changed.notify_all()
        if refused:
            self._silence.why = str(error)
            return
        if error is None:
            self._silence.heard()
        item[2](at, error)

    def _keep(self, item: _Kept) -> None:
        self._refusals += 1
        insort(self._kept, item, key=itemgetter(0))
        if self._thread is None and not self._closed:
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._send_again, name="edgeserve-no-room", daemon=True)
            self._thread.start()

    # --- the thread, as long as there is no room ----------------------------------------------------------------

    def _send_again(self) -> None:
        """One goes ahead, after a pause; when it was taken, the others follow."""
        pause_s = _PAUSES_S[0]
        while self._wait() and self._some_kept():
            self._fail_if_too_late()
            self._pause(pause_s)
            before = self._refusals
            if not self._send_first() or not self._wait():
                continue
            if self._refusals == before:
                self._since, pause_s = time.monotonic(), _PAUSES_S[0]
                while self._refusals == before and self._send_first():
                    pass
            else:
                pause_s = min(2 * pause_s, _PAUSES_S[1])

    def _wait(self) -> bool:
        """Until the broker has answered to all that it has: what it refuses comes before the rest. False: closed."""
        with self._guard.mutex:
            while self._unanswered and not self._closed:
                self._guard.changed.wait(_SAY_EVERY_S)
                self._silence.say(len(self._kept) + self._unanswered, "batches")
            return not self._closed

    def _some_kept(self) -> bool:
        """Whether there is something; otherwise the thread ends, and who sends does it himself."""
        with self._guard.mutex:
            if not self._kept:
                self._thread = None
            return self._thread is not None

    def _pause(self, seconds: float) -> None:
        with self._guard.mutex:
            self._guard.changed.wait_for(lambda: self._closed, seconds)
        self._silence.say(len(self._kept), "batches")

    def _send_first(self) -> bool:
        with self._guard.mutex:
            if not self._kept or self._closed:
                return False
            item = self._kept.pop(0)
            self._unanswered += 1
        try:
            self._outlet.send(item[1], partial(self._answered, item))
        except Exception as exc:
            self._not_sent()
            item[2](None, exc)
        return True

    def _fail_if_too_late(self) -> None:
        waited = time.monotonic() - self._since
        if self._deadline_s is None or waited <= self._deadline_s:
            return
        with self._guard.mutex:
            failed, self._kept = self._kept, []
        error = SendError(f"no room for {len(failed)} batches for {waited:.0f} s (deadline_s=): {self._silence.why}")
        for _, _, done in failed:
            done(None, error)


__all__ = ("GRACE_S", "Grace", "PatientOutlet")
