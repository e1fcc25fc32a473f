"""Says that a broker is away, every few seconds, and when it is back."""

from __future__ import annotations

import logging

from edgeserve.transport.broker.driver import Driver

_log = logging.getLogger("edgeserve")

_SAY_EVERY_S = 5.0


class Trouble:
    """What keeps a broker from answering."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._since = self._said = 0.0

    def say(self, now: float) -> None:
        """To be called about every second."""
        trouble = self._driver.trouble()
        if trouble is None:
            if self._since:
                _log.warning("%s is back after %.0f s", self._driver.what, now - self._since)
            self._since = self._said = 0.0
            return
        self._since = self._since or now
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            _log.warning("%s has been away for %.0f s, waiting: %s", self._driver.what, now - self._since, trouble)


__all__ = ("Trouble",)
