"""What writers left behind, closed or killed, goes when nobody will ask for it any more."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from edgeserve.core.errors import CorruptMessage
from edgeserve.payload.leases import LEASES, key_of, leased
from edgeserve.payload.locks import is_left
from edgeserve.payload.place import ORIGIN
from edgeserve.payload.segment import Entry, Segment, is_name
from edgeserve.payload.writer import End, Ranges, Settled, is_settled

_LEASES_OR_ORIGIN = re.compile(rf"[0-9a-f]{{16}}|{ORIGIN}(\.[0-9a-f]{{16}})?")


class Sweep:
    """Looks now and then; one for a process and a directory.

    Args:
        directory: see `make_payload_directory`; it need not be there.
        settled, end: see `Settled`, `End`.
    """

    def __init__(self, directory: Path, settled: Settled, end: End) -> None:
        self._directory, self._settled, self._end = directory, settled, end
        # Where a topic ended when a segment was first seen that was left with a payload whose message is not known to be stored.
        self._ends: dict[str, int] = {}

    def look(self) -> int:
        """Removes the segments that nobody writes to any more, of which every message is settled, and that nobody looks at; returns how
        many."""
        removed = 0
        for path in _files(self._directory):
            if is_left(path) and (self._is_over(path) if is_name(path.name) else path.name.endswith(".new")):
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _is_over(self, path: Path) -> bool:
        try:
            segment = Segment.open(path, table_only=True)
        except FileNotFoundError:
            return False
        except CorruptMessage:
            return True  # half made
        entries = _entries(segment)
        if self._wanted(segment, entries):
            return False
        held = leased(self._directory)
        return not any(key_of(path.name, slot, entry.generation) in held for slot, entry in entries)

    def left(self, topics: Container[str]) -> Counter[str]:
        """How many payloads lie in segments that nobody writes to any more and are not settled, by topic; of these topics."""
        found = Counter[str]()
        for path in _files(self._directory):
            if is_name(path.name) and is_left(path):
                with contextlib.suppress(FileNotFoundError, CorruptMessage):  # somebody removes it, and rightly
                    segment = Segment.open(path, table_only=True)
                    if segment.topic in topics:
                        found[segment.topic] += self._wanted(segment, _entries(segment))
        return +found

    def _wanted(self, segment: Segment, entries: Sequence[tuple[int, Entry]]) -> int:
        """How many of these are not settled."""
        name, topic = segment.path.name, segment.topic
        ranges = self._settled(topic) if entries else ()
        return sum(not self._is_done(name, topic, entry, ranges) for _, entry in entries)

    def _is_done(self, name: str, topic: str, entry: Entry, ranges: Ranges) -> bool:
        if entry.position >= 0:
            return is_settled(entry.position, ranges, whole=entry.whole)
        end = self._ends.get(name, -1)
        if end < 0:
            end = self._ends[name] = self._end(topic)
        return end == 0 or (end > 0 and is_settled(end - 1, ranges, whole=True))


def _entries(segment: Segment) -> list[tuple[int, Entry]]:
    """The slots that something is in."""
    return [(slot, entry) for slot in range(segment.count) if (entry := segment.entry(slot)).generation]


def remove_orphans(base: Path, is_gone: Callable[[Path], bool]) -> None:
    """Removes the directories of stores that are gone, as `is_gone` says, unless something in them is locked. Only what is ours: the user
    names the place, and may have put something there."""
    for directory in _files(base):
        if not directory.is_dir() or directory.is_symlink() or not is_gone(directory):
            continue
        folders = directory / LEASES, directory
        files = [path for folder in folders for path in _files(folder) if path.is_file()]
        if all(map(is_left, files)):
            removals: list[Callable[[], None]] = [path.unlink for path in files if _is_ours(path.name)]
            for remove in (*removals, *(folder.rmdir for folder in folders)):
                with contextlib.suppress(OSError):
                    remove()


def _is_ours(name: str) -> bool:
    name = name.removesuffix(".new")
    return is_name(name) or _LEASES_OR_ORIGIN.fullmatch(name) is not None


def _files(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in os.listdir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []


__all__ = ("Sweep", "remove_orphans")
