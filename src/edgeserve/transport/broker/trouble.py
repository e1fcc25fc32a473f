"""Says what keeps a broker from answering, every few seconds, and when it is over."""

from __future__ import annotations

import logging
import threading
import time

from edgeserve.transport.broker.driver import Driver

_log = logging.getLogger("edgeserve")

_SAY_EVERY_S = 5.0
_SILENT_S = 5.0
_AWAY_S = 1.0
"""A connection that is only being made is no trouble."""
FOR_EVER = " for as long as it takes (deadline_s= in the node URL sets a limit)"


class Trouble:
    """A broker that is away. One for all who use a connection, so that it is said once.

    Attributes:
        said: when it was said last that the broker is away; 0: since then it was that it is back.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._since = self.said = 0.0
        self._there = ""
        self._asking: threading.Thread | None = None

    def say(self, now: float) -> None:
        """To be called about every second. Any thread."""
        with self._lock:
            self._say(now)

    def _say(self, now: float) -> None:
        trouble = self._driver.trouble()
        if trouble is None:
            if self.said:
                _log.warning("%s is back after %.0f s", self._driver.what, now - self._since)
            self._since = self.said = 0.0
            self._there = ""
            return
        self._since = self._since or now
        if now - self._since >= _AWAY_S and now - self.said >= _SAY_EVERY_S:
            limit = "" if self.said or self._driver.deadline_s is not None else FOR_EVER
            self.said = now
            said = f"{trouble}; {self._there}" if self._there else trouble
            _log.warning("%s has been away for %.0f s, waiting%s: %s", self._driver.what, now - self._since, limit, said)
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._ask, name="edgeserve-trouble", daemon=True)
                self._asking.start()

    def _ask(self) -> None:
        """What is told the next time: nobody waits for the answer."""
        self._there = self._driver.answers()


class Silence:
    """A broker that is there, and does not confirm what it was sent: its disk may be full.

    Args:
        driver: the broker.
        trouble: says when it is away; None: others see to that.
        topic: where to things are sent.

    Attributes:
        why: what it says of it itself.
    """

    def __init__(self, driver: Driver, trouble: Trouble | None, topic: str) -> None:
        self._driver, self._trouble, self._topic = driver, trouble, topic
        self._heard = time.monotonic()
        self._said = 0.0
        self.why = ""

    def heard(self) -> None:
        """It has confirmed something, or was sent something when nothing was open."""
        if self._said:
            _log.warning("%s confirms again what is sent to topic %r", self._driver.what, self._topic)
            self._said = 0.0
        self._heard, self.why = time.monotonic(), ""
        if self._trouble is not None and self._trouble.said:
            self._trouble.say(self._heard)

    def say(self, count: int, of: str = "messages") -> None:
        """To be called about every second while `count` messages are not confirmed."""
        now = time.monotonic()
        if now - self._heard < _AWAY_S:
            return  # asked for every batch: to ask the driver would cost more than to send
        if self._trouble is not None:
            self._trouble.say(now)
        if self._driver.trouble() is not None:
            self._heard = now  # away, and that is said already: silent it is only when it is there
            return
        if now - self._heard < _SILENT_S or now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        _log.warning(
            "%s has not confirmed %d %s for topic %r for %.0f s, waiting: it is there, but it stores nothing; %s",
            *(self._driver.what, count, of, self._topic, now - self._heard),
            f"it says: {self.why}" if self.why else "its own log says why (a full disk?)",
        )


__all__ = ("Silence", "Trouble")
