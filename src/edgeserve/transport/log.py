"""Topics as logs over a transactional key-value store: what is done inside one transaction.

One value holds a batch of frames; its key is the topic's number and the batch's last position, so that a reader finds the batch of any
position by one seek. Where settled batches were let go between others that are not, a value without frames stands for them: a gap. Each
value carries a checksum seeded with its key, so that neither a flipped bit nor a misplaced value is taken for a message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import StoreFull
from edgeserve.transport.base import Frame
from edgeserve.transport.groups import settled_by_all
from edgeserve.transport.kv import Space, Txn
from edgeserve.transport.records import Head, Limits, find_head, forget_head, group_state, groups, make_head, save_head, topics
from edgeserve.transport.wake import WAKE

_CHECK_ROOM_BYTES = 1 << 20
_KEY = struct.Struct(">IQ")
_BATCH = struct.Struct("<QQQI")
_CHECK = struct.Struct("<Q")
_encode_into = msgspec.msgpack.Encoder().encode_into
_decode_frames = msgspec.msgpack.Decoder(list[bytes]).decode
_decode_views = msgspec.msgpack.Decoder(list[memoryview]).decode
_LARGE_FRAME_BYTES = 4096
_BATCH_BYTES = 4 << 20
_BATCH_FRAMES = 4096
_PACKET_BYTES = 4096
_WHOLE = frozenset((bytes,))
_NO_FRAMES = msgspec.msgpack.encode([])
GAP_BYTES = _BATCH.size + len(_NO_FRAMES)
"""The size of a gap; a batch is larger."""


class Batch(msgspec.Struct, gc=False):
    """A stored batch as it was read: decoded outside the transaction by `frames()`."""

    topic_number: int
    last: int
    base: int
    publish_ns: int
    raw: bytes

    def frames(self) -> Sequence[bytes | memoryview] | None:
        """The frames, none of a gap, or None when the value is damaged."""
        raw = memoryview(self.raw)
        if len(raw) < _BATCH.size:
            return None
        checksum, base, _, count = _BATCH.unpack_from(raw)
        if checksum != xxh3_64_intdigest(raw[8:], self.topic_number << 40 ^ self.last) or (count and base + count != self.last + 1):
            return None
        large = len(raw) > count * _LARGE_FRAME_BYTES
        frames: Sequence[bytes | memoryview] = _decode_views(raw[_BATCH.size :]) if large else _decode_frames(raw[_BATCH.size :])
        return frames


def append(
    txn: Txn, topic: str, frames: Sequence[Frame], now_ns: int, limits: Limits, scratch: bytearray, *, works_off: bool = False
) -> Head:
    """Appends a batch, trims what retention lets go, and returns the topic's new head.

    What works off a full store must have room for its results, or it could never be emptied: `works_off` may fill it twice over.
    """
    gathered = frames if _WHOLE.issuperset(map(type, frames)) else [f if isinstance(f, bytes) else b"".join(f) for f in frames]
    _encode_into(gathered, scratch, _BATCH.size)
    if len(frames) > 1 and (len(scratch) > _BATCH_BYTES or len(frames) > _BATCH_FRAMES):
        # A reader takes up whole batches, however little it asks for.
        half = len(frames) // 2
        append(txn, topic, gathered[:half], now_ns, limits, scratch, works_off=works_off)
        return append(txn, topic, gathered[half:], now_ns, limits, scratch, works_off=works_off)
    head = find_head(txn, topic) or make_head(txn, topic)
    base, last = head.next, head.next + len(frames) - 1
    _BATCH.pack_into(scratch, 0, 0, base, now_ns, len(frames))
    view = memoryview(scratch)
    checksum = xxh3_64_intdigest(view[8:], head.number << 40 ^ last)
    view.release()
    _CHECK.pack_into(scratch, 0, checksum)
    step = min(_CHECK_ROOM_BYTES, limits.store_bytes >> 6)
    room = limits.store_bytes << works_off
    if (head.stored_bytes + len(scratch)) // step != head.stored_bytes // step and stored(txn) + len(scratch) > room:
        _trim_all(txn, now_ns, limits)
        # A topic that is new has no record yet: its number went into the checksum above.
        head = find_head(txn, topic) or head
        if stored(txn) + len(scratch) > room:
            raise StoreFull(_full_message(txn, limits))
    txn.put(Space.LOG, _KEY.pack(head.number, last), scratch)
    head.next = last + 1
    head.stored_bytes += len(scratch)
    if head.stored_bytes > limits.retention_bytes or head.next >> 8 != base >> 8:
        # What one held message keeps it from is looked for now and then.
        far = head.stored_bytes > limits.retention_bytes and head.next >> 10 != base >> 10
        trim(txn, topic, head, limits.retention_bytes, now_ns - limits.retention_ns, most=256 if far else 16, above_floor=far)
    save_head(txn, topic, head)
    return head


def stored(txn: Txn) -> int:
    """The bytes of all topics' messages."""
    heads = (find_head(txn, topic) for topic in topics(txn))
    return sum(head.stored_bytes for head in heads if head is not None)


def trim(txn: Txn, topic: str, head: Head, keep_bytes: int, older_than_ns: int, most: int, *, above_floor: bool = False) -> int:
    """Deletes up to `most` of the oldest batches that are settled by every group; returns the bytes freed. The caller saves the head.

    `above_floor`: also those that lie above one that is not settled. Gaps stand for them.
    """
    states = [state for group in head.groups if (state := group_state(txn, topic, group)) is not None]
    floor = min([head.next, *(state.floor() for state in states)])
    freed = 0
    for lo, hi in [(0, floor), *(settled_by_all(states, floor, head.next) if above_floor else ())]:
        doomed: list[tuple[bytes, Batch, int]] = []
        enough = False
        for batch, size in batches(txn, head.number, lo, hi):
            if batch.base < lo:
                continue  # a part of it is not settled
            over = head.stored_bytes - freed > keep_bytes
            # The newest record of a log that has a holder is the holder's memory.
            enough = (
                len(doomed) >= most
                or not (over or batch.publish_ns < older_than_ns)
                or bool(head.fence_epoch and batch.last + 1 >= head.next)
            )
            if enough:
                break
            doomed.append((batch_key(head.number, batch.last), batch, size))
            freed += size
        if lo:
            freed -= _leave_gap(txn, head.number, doomed)
        else:
            for key, batch, _ in doomed:
                txn.delete(Space.LOG, key)
                head.first = batch.last + 1
        most -= len(doomed)
        if enough:
            break
    head.stored_bytes -= freed
    return freed


def delete(txn: Txn, topic: str, head: Head) -> None:
    """Deletes a topic that has no groups left."""
    for key in [batch_key(head.number, batch.last) for batch, _ in batches(txn, head.number)]:
        txn.delete(Space.LOG, key)
    forget_head(txn, topic, head)


def _leave_gap(txn: Txn, number: int, doomed: Sequence[tuple[bytes, Batch, int]]) -> int:
    """Puts a gap in the place of adjoining batches; returns its size, or that of what stays."""
    if all(size == GAP_BYTES for _, _, size in doomed):
        return GAP_BYTES * len(doomed)
    for key, _, _ in doomed[:-1]:
        txn.delete(Space.LOG, key)
    key, newest, _ = doomed[-1]
    body = _BATCH.pack(0, doomed[0][1].base, newest.publish_ns, 0)[_CHECK.size :] + _NO_FRAMES
    txn.put(Space.LOG, key, _CHECK.pack(xxh3_64_intdigest(body, number << 40 ^ newest.last)) + body)
    return GAP_BYTES


def _trim_all(txn: Txn, now_ns: int, limits: Limits) -> int:
    """The store is full: lets go of everything settled, of every topic; of topics without groups, of what retention does not ask for."""
    freed = 0
    for topic in topics(txn):
        head = make_head(txn, topic)
        keep_bytes, older_than_ns = (0, now_ns) if head.groups else (limits.retention_bytes, now_ns - limits.retention_ns)
        freed += trim(txn, topic, head, keep_bytes, older_than_ns, most=1_000, above_floor=True)
        save_head(txn, topic, head)
    return freed


def _full_message(txn: Txn, limits: Limits) -> str:
    held = []
    for topic, group in groups(txn):
        head, state = find_head(txn, topic), group_state(txn, topic, group)
        if head and state and (backlog := state.backlog(head.next)):
            held.append((backlog, f"{group!r} on {topic!r} ({backlog} messages)"))
    full = f"the store is full: {limits.store_bytes >> 20} MiB (size_mb= in the URL). Nothing of this batch was written. "
    if not held:
        return full + "No group waits for what it holds: give it a larger size_mb=, or a smaller retention_mb="
    who = ", ".join(text for _, text in sorted(held, reverse=True)[:3])
    return full + f"Not yet settled by: {who}. Run their consumers, or forget a group: edgeserve topic forget TOPIC GROUP"


def read(txn: Txn, number: int, lo: int, hi: int, max_bytes: int) -> list[Batch]:
    """The batches that overlap [lo, hi), at least one if there is one, up to about `max_bytes`."""
    found: list[Batch] = []
    size = 0
    for key, value in txn.scan(Space.LOG, _KEY.pack(number, lo), _KEY.pack(number + 1, 0)):
        last = _KEY.unpack(key)[1]
        raw = bytes(value)
        _, base, publish_ns, _ = _BATCH.unpack_from(raw) if len(raw) >= _BATCH.size else (0, last, 0, 0)
        if base >= hi or (found and size + len(raw) > max_bytes):
            break
        found.append(Batch(number, last, base, publish_ns, raw))
        size += len(raw)
        if last + 1 >= hi:
            break
    return found


def batch_key(number: int, last: int) -> bytes:
    """The key of LOG that `unpack_key` reads."""
    return _KEY.pack(number, last)


def unpack_key(key: bytes) -> tuple[int, int]:
    """(topic number, last position) of a key of LOG."""
    number, last = _KEY.unpack(key)
    return number, last


def packet(head: Head, scratch: bytearray) -> bytes:
    """What the listeners of a topic are woken with: the batch just appended if it is small, so that they need not read the store for it.

    Not where a group has several: one that does not know yet that it is no longer alone would take what another may claim.
    """
    listeners = head.listeners
    if len(scratch) > _PACKET_BYTES or (len(listeners) > 1 and len(set(listeners.values())) < len(listeners)):
        return WAKE
    return _KEY.pack(head.number, head.next - 1) + scratch


def topic_of(packet: bytes) -> int:
    """The number of the topic that a packet carries a batch of; -1 where it carries none."""
    return _KEY.unpack_from(packet)[0] if len(packet) >= _KEY.size + _BATCH.size else -1


def unpacked(packet: bytes) -> tuple[int, int, int, Sequence[bytes]] | None:
    """(base, last, publish time in ns, frames) of the batch in a packet, or None when it is damaged."""
    number, last = _KEY.unpack_from(packet)
    checksum, base, publish_ns, count = _BATCH.unpack_from(packet, _KEY.size)
    if base + count != last + 1 or checksum != xxh3_64_intdigest(packet[_KEY.size + 8 :], number << 40 ^ last):
        return None
    return base, last, publish_ns, _decode_frames(packet[_KEY.size + _BATCH.size :])


def batches(txn: Txn, number: int, lo: int = 0, hi: int = 2**63) -> Iterator[tuple[Batch, int]]:
    """The batches of a topic that end in [lo, hi), without their frames, each with its size in bytes."""
    for key, value in txn.scan(Space.LOG, _KEY.pack(number, lo), _KEY.pack(number, hi)):
        last = _KEY.unpack(key)[1]
        _, base, publish_ns, _ = _BATCH.unpack_from(value) if len(value) >= _BATCH.size else (0, last, 0, 0)
        yield Batch(number, last, base, publish_ns, b""), len(value)


def position_at(txn: Txn, head: Head, start_ns: int) -> int:
    """The first position published at or after a time."""
    for key, value in txn.scan(Space.LOG, _KEY.pack(head.number, 0), _KEY.pack(head.number + 1, 0)):
        if len(value) >= _BATCH.size and _BATCH.unpack_from(value)[2] >= start_ns:
            return int(_BATCH.unpack_from(value)[1]) if _KEY.unpack(key)[1] >= head.first else head.first
    return head.next


__all__ = (
    "GAP_BYTES",
    "Batch",
    "append",
    "batch_key",
    "batches",
    "delete",
    "packet",
    "position_at",
    "read",
    "stored",
    "topic_of",
    "trim",
    "unpack_key",
    "unpacked",
)
