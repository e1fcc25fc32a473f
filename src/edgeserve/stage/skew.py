"""Notices that two sources' event times lie too far apart for a join to ever fire, and says so."""

from __future__ import annotations

import logging
import time
import warnings

from edgeserve.align import Policy
from edgeserve.core.errors import SkewWarning

log = logging.getLogger("edgeserve")

_REFUSALS = 3
_EVERY_S = 10.0


class SkewWatch:
    """Counts the sets that a policy refuses for their spread."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy, self._name = policy, name
        self._refusals = 0
        self._warned = -_EVERY_S

    def look(self) -> Warning | None:
        """To be called after a push that has made no set, where the policy has refused one.

        Returns the warning where warnings are errors: whoever calls this is in the midst of something.
        """
        refused = self._policy.spread_refused()
        if refused is None:
            return None
        self._refusals += 1
        now = time.monotonic()
        if self._refusals < _REFUSALS or now - self._warned < _EVERY_S:
            return None
        self._warned, self._refusals = now, 0
        tolerance_ns = getattr(self._policy, "max_interval_ns", None)
        allowed = "" if tolerance_ns is None else f", {_time(tolerance_ns)} are tolerated (max_time_diff_ms)"
        message = (
            f"Compute {self._name!r}: the event times of {refused.newest!r} are {_time(refused.spread_ns)} ahead of those of "
            f"{refused.oldest!r}{allowed}, so no set forms: check the clocks of the two nodes"
        )
        log.warning("%s", message)
        try:
            warnings.warn(message, SkewWarning, stacklevel=2)
        except Warning as exc:
            return exc
        return None


def _time(ns: int) -> str:
    """A span in the unit that people would use."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.3f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{ns} ns"


__all__ = ("SkewWatch",)
