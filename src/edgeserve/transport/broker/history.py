"""Where to begin in a group's log: with its newest snapshot, as long as all that came after it is there."""

from __future__ import annotations

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Driver, Entry
from edgeserve.transport.broker.grouplog import Snapshot, decode_line


def find_snapshot(driver: Driver, group: str, topic: str) -> tuple[Snapshot, int] | None:
    """A snapshot in a log and where it stands; None: there is none, and the log is whole.

    Raises:
        TransportError: the records before what is left of the log are gone, and no snapshot says what they did.
    """
    newest = driver.newest(topic)
    if newest is None:
        return None
    named = decode_line(group, newest.data).checkpoint
    if named is not None and named.at < newest.at:  # else it is of a log that was deleted since
        entry = driver.get(topic, named.at)
        snapshot = None if entry is None else _snapshot_in(group, entry)
        if snapshot is not None and driver.get(topic, snapshot.upto) is not None:
            return snapshot, named.at
    # The writer of the newest line was behind, and what it names has been trimmed; or it knew of none.
    return _look_for_snapshot(driver, group, topic)


def _look_for_snapshot(driver: Driver, group: str, topic: str) -> tuple[Snapshot, int] | None:
    first: int | None = None
    found: tuple[Snapshot, int] | None = None
    misses = False
    for entry in driver.scan(topic):
        first = entry.at if first is None else first
        named = decode_line(group, entry.data).checkpoint
        misses = misses or (named is not None and named.at < first)
        snapshot = _snapshot_in(group, entry)
        if snapshot is not None and (found is None or snapshot.upto >= found[0].upto):
            found = snapshot, entry.at
    if first is not None and (misses if found is None else first > found[0].upto):
        raise TransportError(
            f"the log of group {group!r} is not whole: what {topic!r} held before entry {first} is gone, and no snapshot stands for it. "
            "Only members of the group may trim it: give it no retention of its own, stop the group and delete that topic"
        )
    return found


def _snapshot_in(group: str, entry: Entry) -> Snapshot | None:
    records = decode_line(group, entry.data).records
    return next((record for record in records if type(record) is Snapshot), None)


__all__ = ("find_snapshot",)
