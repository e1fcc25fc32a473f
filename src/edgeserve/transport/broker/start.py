"""At which entry a group begins that begins at a time.

It is found out once, when the group is made, and written to its log. From then on entries are compared and no clocks: a sender whose clock
is slow would seem to send what is older than the group for ever.
"""

from __future__ import annotations

from edgeserve.core.errors import MessageError
from edgeserve.transport.broker.driver import Driver, Entry
from edgeserve.transport.broker.envelope import unwrap

# A message is stored later than it was sent, and the broker has a clock of its own.
_SLACK_NS = 2 * 10**9


def entry_since(driver: Driver, topic: str, start_ns: int) -> int:
    """The first entry of a topic that was sent at a time or later; whatever comes from now on is."""
    last = driver.last(topic)
    if last is None:
        return 0
    for entry in driver.scan(topic, since_ns=start_ns):
        if entry.at > last or _sent_ns(entry) >= start_ns or entry.stored_ns >= start_ns + _SLACK_NS:
            return entry.at
    return last + 1


def _sent_ns(entry: Entry) -> int:
    try:
        return unwrap(entry.data, entry.stored_ns)[0]
    except MessageError:
        return entry.stored_ns


__all__ = ("entry_since",)
