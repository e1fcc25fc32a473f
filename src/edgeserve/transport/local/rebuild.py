"""The child that copies what is intact from one LMDB environment into another: `main([SOURCE, TARGET, "copy" | "search"])`.

`copy` follows the file's structure with LMDB and may die of it, by a signal. `search` takes the file for a heap of pages and adds what is
intact, without LMDB: all that was ever written and not yet overwritten, of which the newest state counts.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from edgeserve.transport import log, records
from edgeserve.transport.kv import Space
from edgeserve.transport.local import pages
from edgeserve.transport.local.lmdbkv import CENSUS, LmdbTxn, open_environment, read_census
from edgeserve.transport.local.recovery import NO_SPACE, OTHER_VERSION, Report

_COMMIT_BYTES = 32 << 20
_TARGET_BYTES = 64 << 30
_BEYOND = 2**63


class _Target:
    """Where intact values go; commits now and then, so that memory stays bounded."""

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        self.env, self._dbs = open_environment(path, _TARGET_BYTES, durable=False, alone=True)
        self._raw = self.env.begin(write=True, buffers=True)
        self.txn = LmdbTxn(self._raw, self._dbs)
        self._pending = 0

    def put(self, space: Space, key: bytes, value: bytes) -> None:
        self.txn.put(space, key, value)
        self._pending += len(value)
        if self._pending > _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        if self.txn.changed:
            self.txn.seal()
        self._raw.commit()
        self._raw = self.env.begin(write=True, buffers=True)
        self.txn = LmdbTxn(self._raw, self._dbs)
        self._pending = 0

    def close(self) -> None:
        self.commit()
        self._raw.abort()
        self.env.sync(True)
        self.env.close()


def _intact(space: Space, key: bytes, value: bytes) -> bool:
    if space is Space.LOG:
        if len(key) != 12:
            return False
        number, last = log.unpack_key(key)
        return log.Batch(number, last, 0, 0, value).frames() is not None
    here = len(key) == 20 if space is Space.IDS else key[:1] in (b"g", b"h", b"m", records.VERSION_KEY)
    return here and records.intact(key, value)


def _entries(source: Any, db: Any) -> Iterator[tuple[bytes, bytes]]:
    before = b""
    with source.begin(buffers=False) as txn, txn.cursor(db=db) as cursor:
        for key, value in cursor:
            if key <= before:
                raise lmdb.CorruptedError("keys are out of order")
            before = key
            yield key, value


def copy(source_path: Path, target: _Target) -> Report:
    """Copies every intact value, and says whether what was found is all and of one age."""
    size = (source_path / "data.mdb").stat().st_size
    source, dbs = open_environment(source_path, max(size * 2, 1 << 20), durable=False, readonly=True)
    if not dbs:
        return Report()
    with source.begin() as txn:
        _refuse_other_versions(txn.get(records.VERSION_KEY, db=dbs[0]))
        expected = [txn.stat(db)["entries"] for db in dbs]
        written = read_census(txn.get(CENSUS, db=dbs[0]))
    report = Report(commit=source.info()["last_txnid"])
    census = 0
    for space in Space:
        count = 0
        for key, value in _entries(source, dbs[space]):
            count += 1
            if space is Space.STATE:
                if key == CENSUS:
                    continue
                census ^= int.from_bytes(value[:8], "little")
            if _intact(space, key, value):
                target.put(space, key, value)
            else:
                report.damaged += 1
        if count != expected[space]:
            report.doubts.append(f"{abs(expected[space] - count)} values of the {space.name.lower()} space")
    if written != (census, report.commit) and any(expected):
        report.doubts.append("some of the newest changes of topics and groups (parts of the file are older than others)")
    return report


def _refuse_other_versions(raw: bytes | None) -> None:
    if raw is not None and records.intact(records.VERSION_KEY, raw) and (version := records.read_version(raw)) != records.DISK_FORMAT:
        sys.stdout.write(str(version))
        sys.stdout.flush()
        sys.exit(OTHER_VERSION)


def search(source_path: Path, target: _Target) -> Report:
    """Finds what is intact in the pages and not copied yet. Of a state that is there more than once, the newest counts."""
    copied = [(key, bytes(value)) for key, value in target.txn.scan(Space.STATE, b"", b"\xff") if key != CENSUS]
    newest: dict[bytes, tuple[Any, bytes]] = {key: (records.age(key, value), value) for key, value in copied}
    with open(source_path / "data.mdb", "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return Report()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for key, value in pages.values(content):
                # The numbers that keys of LOG and IDS begin with are small.
                space = Space.STATE if key[:1] > b"\0" else Space.LOG if len(key) == 12 else Space.IDS
                if not _intact(space, key, value):
                    continue
                if space is not Space.STATE:
                    known = target.txn.get(space, key)
                    if known is None or len(known) != log.GAP_BYTES:  # a gap came after what it stands for
                        target.put(space, key, value)
                elif key not in newest or records.age(key, value) > newest[key][0]:
                    newest[key] = (records.age(key, value), value)
    if records.VERSION_KEY in newest:
        _refuse_other_versions(newest[records.VERSION_KEY][1])
    for key, (_, value) in newest.items():
        target.put(Space.STATE, key, value)
    return Report()


def complete(txn: LmdbTxn) -> list[str]:
    """Makes the copy consistent (a lost head is found again by its name) and says what is missing in it."""
    missing: list[str] = []
    names = {bytes(v[8:]).decode(): int.from_bytes(k[1:], "big") for k, v in txn.scan(Space.STATE, b"m", b"n")}
    names.pop("", None)
    _drop_deleted(txn)
    heads = {bytes(k[1:]).decode() for k, _ in txn.scan(Space.STATE, b"h", b"i")}
    numbers = set()
    for topic in sorted(heads | set(names)):
        numbers.add(_complete_topic(txn, topic, names.get(topic), missing))
    _drop_orphans(txn, numbers, missing)
    return missing


def _drop_deleted(txn: LmdbTxn) -> None:
    """What is left in the pages of topics that were deleted is no loss, and must not come back."""
    deleted = {int.from_bytes(k[1:], "big") for k, v in txn.scan(Space.STATE, b"m", b"n") if len(v) == 8}
    if not deleted:
        return
    for topic in records.topics(txn):
        head = records.find_head(txn, topic)
        if head is not None and head.number in deleted:
            txn.delete(Space.STATE, records.head_key(topic))
            prefix = records.group_key(topic, "")
            for key in [bytes(k) for k, _ in txn.scan(Space.STATE, prefix, prefix + b"\xff")]:
                txn.delete(Space.STATE, key)
    for space in (Space.LOG, Space.IDS):
        for key in [bytes(k) for k, _ in txn.scan(space, b"", b"\xff" * 24) if int.from_bytes(k[:4], "big") in deleted]:
            txn.delete(space, key)


def _complete_topic(txn: LmdbTxn, topic: str, number: int | None, missing: list[str]) -> int:
    head = records.find_head(txn, topic)
    prefix = records.group_key(topic, "")
    groups = {bytes(k[len(prefix) :]).decode() for k, _ in txn.scan(Space.STATE, prefix, prefix + b"\xff")}
    if head is None:
        missing.append(f"the head of topic {topic!r}")
        head = records.Head(number or 0, groups=sorted(groups))
    elif number is None:
        missing.append(f"the number of topic {topic!r}")
        records.save_name(txn, head.number, topic)
    expected, stored, needless = head.first, 0, []
    found = list(log.batches(txn, head.number))
    replaced = _in_gaps(found)
    for batch, length in found:
        if batch.last < head.first or batch.last in replaced:
            needless.append(log.batch_key(head.number, batch.last))
            continue
        if batch.base > expected:
            missing.append(f"positions {expected} to {batch.base - 1} of topic {topic!r}")
            if expected == head.first:
                head.first = batch.base
        elif head.first <= batch.base < expected:
            needless.append(log.batch_key(head.number, batch.last))
            continue
        expected, stored = max(expected, batch.last + 1), stored + length
    for key in needless:
        txn.delete(Space.LOG, key)
    if expected < head.next:
        missing.append(f"positions {expected} to {head.next - 1} of topic {topic!r}")
        if expected == head.first:
            head.first = head.next
    head.next, head.stored_bytes, head.listeners = max(head.next, expected), stored, {}
    for group in list(head.groups):
        if group not in groups:
            missing.append(f"the state of group {group!r} on topic {topic!r}")
            head.groups.remove(group)
    for group in groups.difference(head.groups):
        txn.delete(Space.STATE, records.group_key(topic, group))
    records.save_head(txn, topic, head)
    return head.number


def _in_gaps(found: list[tuple[log.Batch, int]]) -> set[int]:
    """The last positions of batches that a later gap stands for; those of all batches ascend."""
    replaced, gaps_from = set(), _BEYOND
    for batch, length in reversed(found):
        if batch.base >= gaps_from:
            replaced.add(batch.last)
        elif length == log.GAP_BYTES:
            gaps_from = batch.base
    return replaced


def _drop_orphans(txn: LmdbTxn, numbers: set[int], missing: list[str]) -> None:
    """Messages of a topic whose name is lost must not turn up in the next topic that gets its number."""
    for space in (Space.LOG, Space.IDS):
        lost = [key for key, _ in txn.scan(space, b"", b"\xff" * 24) if int.from_bytes(key[:4], "big") not in numbers]
        for key in lost:
            txn.delete(space, key)
        if lost and space is Space.LOG:
            missing.append(f"{len(lost)} batches of topics whose names are lost")


def main(arguments: list[str]) -> None:
    """Runs one step and prints its report as JSON."""
    try:
        target = _Target(Path(arguments[1]))
        report = (copy if arguments[2] == "copy" else search)(Path(arguments[0]), target)
        report.missing.extend(complete(target.txn))
        target.close()
    except (lmdb.Error, OSError, ValueError, msgspec.MsgspecError) as error:
        full = isinstance(error, lmdb.DiskError) or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(error):
            sys.exit(NO_SPACE)
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(report))


__all__ = ("complete", "copy", "main", "search")
