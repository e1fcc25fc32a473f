"""The child that copies what is intact from one LMDB environment into another: `python -m ... SOURCE TARGET forward|backward|report`.

It may die on the way, by a signal: the target then holds what was copied so far. `report` looks only at the target.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from edgeserve.transport import log
from edgeserve.transport.groups import GroupState
from edgeserve.transport.kv import Space
from edgeserve.transport.local.lmdbkv import LmdbTxn, open_environment
from edgeserve.transport.local.recovery import Report

_COMMIT_EVERY = 2_000
_COMMIT_BYTES = 32 << 20


def _intact(space: Space, key: bytes, value: bytes) -> bool:
    if space is Space.LOG:
        if len(key) != 12:
            return False
        number, last = log.unpack_key(key)
        return log.Batch(number, last, 0, 0, value).frames() is not None
    if space is Space.STATE and key[:1] in (b"t", b"v"):
        return len(value) <= 8
    return log.intact(key, value)


def _entries(source: Any, db: Any, *, backward: bool) -> Iterator[tuple[bytes, bytes]]:
    with source.begin(buffers=False) as txn, txn.cursor(db=db) as cursor:
        at = cursor.iterprev() if backward else cursor.iternext()
        yield from at


def copy(source_path: Path, target_path: Path, *, backward: bool) -> Report:
    """Copies every intact value that the target does not have yet."""
    size = (source_path / "data.mdb").stat().st_size
    source, source_dbs = open_environment(source_path, max(size * 2, 1 << 20), durable=False, readonly=True)
    target, target_dbs = open_environment(target_path, size * 4 + (64 << 20), durable=False)
    damaged = pending = count = 0
    txn = target.begin(write=True)
    for space in Space:
        for key, value in _entries(source, source_dbs[space], backward=backward):
            if not _intact(space, key, value):
                damaged += 1
                continue
            if not txn.put(key, value, db=target_dbs[space], overwrite=False):
                if backward:
                    break
                raise lmdb.CorruptedError("a key came twice")
            pending += len(value)
            count += 1
            if pending > _COMMIT_BYTES or count % _COMMIT_EVERY == 0:
                txn.commit()
                pending, txn = 0, target.begin(write=True)
    txn.commit()
    target.sync(True)
    return Report(damaged, source.info()["last_txnid"], [])


def report(target_path: Path) -> Report:
    """Makes the target consistent (a lost head is found again by its name) and says what is missing in it."""
    size = (target_path / "data.mdb").stat().st_size if target_path.exists() else 0
    target, dbs = open_environment(target_path, size * 4 + (64 << 20), durable=False)
    missing: list[str] = []
    with target.begin(write=True, buffers=True) as raw:
        txn = LmdbTxn(raw, dbs)
        stored_total = 0
        names = {bytes(v[8:]).decode(): int.from_bytes(k[1:], "big") for k, v in txn.scan(Space.STATE, b"m", b"n")}
        heads = {bytes(k[1:]).decode() for k, _ in txn.scan(Space.STATE, b"h", b"i")}
        numbers = set()
        for topic in sorted(heads | set(names)):
            number, stored = _check_topic(txn, topic, names.get(topic), missing)
            numbers.add(number)
            stored_total += stored
        _drop_orphans(txn, numbers, missing)
        txn.put(Space.STATE, b"t", stored_total.to_bytes(8, "big"))
    target.sync(True)
    target.close()
    return Report(0, 0, missing)


def _check_topic(txn: Any, topic: str, number: int | None, missing: list[str]) -> tuple[int, int]:
    head = log.find_head(txn, topic)
    if head is None:
        missing.append(f"the head of topic {topic!r}")
        head = log.Head(number or 0)
        prefix = log.group_key(topic, "")
        head.groups = [bytes(k[len(prefix) :]).decode() for k, _ in txn.scan(Space.STATE, prefix, prefix + b"\xff")]
    expected, stored = head.first, 0
    for batch, length in log.batches(txn, head.number):
        if batch.base > expected:
            missing.append(f"positions {expected} to {batch.base - 1} of topic {topic!r}")
        expected, stored = batch.last + 1, stored + length
    if expected < head.next:
        missing.append(f"positions {expected} to {head.next - 1} of topic {topic!r}")
    head.next, head.stored_bytes, head.listeners = max(head.next, expected), stored, {}
    cache = log.StateCache()
    for group in list(head.groups):
        state: GroupState | None = cache.find(txn, topic, group)
        if state is None:
            missing.append(f"the state of group {group!r} on topic {topic!r}")
            head.groups.remove(group)
    log.save_head(txn, topic, head)
    return head.number, stored


def _drop_orphans(txn: Any, numbers: set[int], missing: list[str]) -> None:
    """Messages of a topic whose name is lost must not turn up in the next topic that gets its number."""
    for space in (Space.LOG, Space.IDS):
        lost = [key for key, _ in txn.scan(space, b"", b"\xff" * 20) if int.from_bytes(key[:4], "big") not in numbers]
        for key in lost:
            txn.delete(space, key)
        if lost and space is Space.LOG:
            missing.append(f"{len(lost)} batches of topics whose names are lost")


def main(arguments: list[str]) -> None:
    """Runs one step and prints its report as JSON."""
    source, target, step = Path(arguments[0]), Path(arguments[1]), arguments[2]
    done = report(target) if step == "report" else copy(source, target, backward=step == "backward")
    sys.stdout.buffer.write(msgspec.json.encode(done))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (lmdb.Error, OSError, ValueError, msgspec.MsgspecError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
