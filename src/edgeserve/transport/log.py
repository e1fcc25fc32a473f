"""Topics and groups over a transactional key-value store: the layout, and what is done inside one transaction.

One value holds a batch of frames; its key is the topic's number and the batch's last position, so that a reader finds the batch of any
position by one seek. Each value carries a checksum seeded with its key, so that neither a flipped bit nor a misplaced value is taken
for a message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

import msgspec
import xxhash

from edgeserve.core.errors import ConfigurationError, StoreDamaged, StoreFull
from edgeserve.transport.base import Frame
from edgeserve.transport.groups import GroupState
from edgeserve.transport.kv import Space, Txn
from edgeserve.transport.url import NodeURL

DISK_FORMAT = 1
IDS_KEPT = 131_072
MAX_NAME_BYTES = 200
VERSION_KEY = b"v"
_CHECK_ROOM_BYTES = 1 << 20
_KEY = struct.Struct(">IQ")
_IDS_KEY = struct.Struct(">IQQ")
_BATCH = struct.Struct("<QQQI")
_CHUNK = struct.Struct("<QQ")
KEY_BYTES = _KEY.size
BATCH_BYTES = _BATCH.size
_CHECK = struct.Struct("<Q")
_encode = msgspec.msgpack.Encoder().encode
_encode_into = msgspec.msgpack.Encoder().encode_into
_decode_frames = msgspec.msgpack.Decoder(list[bytes]).decode
_decode_views = msgspec.msgpack.Decoder(list[memoryview]).decode
_LARGE_FRAME_BYTES = 4096
_BATCH_BYTES = 4 << 20
_BATCH_FRAMES = 4096


class Head(msgspec.Struct, array_like=True):
    """A topic: positions [first, next) are stored; fields are only ever appended."""

    number: int
    first: int = 0
    next: int = 0
    stored_bytes: int = 0
    groups: list[str] = []
    listeners: dict[str, str] = {}
    fence_epoch: int = 0
    fence_holder: str = ""


class Limits(msgspec.Struct, frozen=True):
    """How much is kept. Messages that a group has not settled are kept whatever the retention says."""

    store_bytes: int = 4 << 30
    retention_bytes: int = 64 << 20
    retention_ns: int = 24 * 3600 * 10**9


def limits_from(url: NodeURL) -> Limits:
    """The limits that a URL's parameters ask for."""
    default = Limits()
    return Limits(
        int(url.number("size_mb", default.store_bytes / 2**20) * 2**20),
        int(url.number("retention_mb", default.retention_bytes / 2**20) * 2**20),
        int(url.number("retention_s", default.retention_ns / 1e9) * 1e9),
    )


class Batch(msgspec.Struct, gc=False):
    """A stored batch as it was read: decoded outside the transaction by `frames()`."""

    topic_number: int
    last: int
    base: int
    publish_ns: int
    raw: bytes

    def frames(self) -> Sequence[bytes | memoryview] | None:
        """The frames, or None when the value is damaged."""
        raw = memoryview(self.raw)
        if len(raw) < _BATCH.size:
            return None
        checksum, base, _, count = _BATCH.unpack_from(raw)
        if checksum != xxhash.xxh3_64_intdigest(raw[8:], self.topic_number << 40 ^ self.last) or base + count != self.last + 1:
            return None
        large = len(raw) > count * _LARGE_FRAME_BYTES
        frames: Sequence[bytes | memoryview] = _decode_views(raw[_BATCH.size :]) if large else _decode_frames(raw[_BATCH.size :])
        return frames


_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_state = msgspec.msgpack.Decoder(GroupState).decode


def check_name(what: str, name: str) -> None:
    """Refuses names that cannot be stored."""
    if not isinstance(name, str) or not name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigurationError(f"{what} must be 1 to {MAX_NAME_BYTES} bytes of UTF-8 without NUL, not {name!r}")


_seed = lru_cache(4096)(xxhash.xxh3_64_intdigest)


def _checked(key: bytes, body: bytes) -> bytes:
    return _CHECK.pack(xxhash.xxh3_64_intdigest(body, _seed(key))) + body


def intact(key: bytes, raw: bytes | memoryview) -> bool:
    """Whether a value of STATE or IDS belongs under this key as it is."""
    return len(raw) >= 8 and bool(_CHECK.unpack_from(raw)[0] == xxhash.xxh3_64_intdigest(raw[8:], _seed(key)))


def _unchecked(what: str, key: bytes, raw: bytes | memoryview) -> memoryview:
    if not intact(key, raw):
        raise StoreDamaged(f"{what} is damaged: stop every process that uses the store, and the next start repairs it")
    return memoryview(raw)[8:]


@lru_cache(4096)
def head_key(topic: str) -> bytes:
    """The key of a topic's head."""
    return b"h" + topic.encode()


@lru_cache(4096)
def group_key(topic: str, group: str) -> bytes:
    """The key of a group's state."""
    return b"g%b\0%b" % (topic.encode(), group.encode())


def name_key(number: int) -> bytes:
    """The key of a topic's name by number: what a lost head is found again by."""
    return b"m" + number.to_bytes(4, "big")


def find_head(txn: Txn, topic: str) -> Head | None:
    """The topic's head, or None."""
    # The two keys read in every transaction are checked in place: a call costs more than the check.
    key = head_key(topic)
    raw = txn.get(Space.STATE, key)
    if raw is None:
        return None
    body = raw[8:]
    if len(raw) < 8 or _CHECK.unpack_from(raw)[0] != xxhash.xxh3_64_intdigest(body, _seed(key)):
        _unchecked(f"the head of topic {topic!r}", key, raw)
    return _decode_head(body)


def save_head(txn: Txn, topic: str, head: Head) -> None:
    """Writes the head."""
    key = head_key(topic)
    txn.put(Space.STATE, key, _checked(key, _encode(head)))


def make_head(txn: Txn, topic: str) -> Head:
    """The topic's head; the topic is made if it does not exist."""
    head = find_head(txn, topic)
    if head is None:
        number = max((int.from_bytes(key[1:], "big") for key, _ in txn.scan(Space.STATE, b"m", b"n")), default=0) + 1
        save_name(txn, number, topic)
        head = Head(number)
    return head


def save_name(txn: Txn, number: int, topic: str) -> None:
    """Writes what a lost head is found again by."""
    key = name_key(number)
    txn.put(Space.STATE, key, _checked(key, topic.encode()))


def version_record() -> bytes:
    """The value under `VERSION_KEY`; its form is the same in all formats."""
    return _checked(VERSION_KEY, DISK_FORMAT.to_bytes(4, "big"))


def read_version(raw: bytes | memoryview) -> int:
    """The disk format that a `version_record` names."""
    return int.from_bytes(_unchecked("the store's version", VERSION_KEY, raw), "big")


def age(key: bytes, raw: bytes) -> tuple[int, ...]:
    """Tells of two intact values of STATE under one key which is the newer."""
    if key.startswith(b"h"):
        head = _decode_head(raw[8:])
        return (head.next, head.fence_epoch, head.first)
    if key.startswith(b"g"):
        state = _decode_state(raw[8:])
        return (state.settled, state.ids_next, state.epoch, state.cursor)
    return ()


class StateCache:
    """Group states by key: what was decoded last is used again while the stored bytes are the same."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[bytes, GroupState]] = {}

    def find(self, txn: Txn, topic: str, group: str) -> GroupState | None:
        """The group's state, or None."""
        key = group_key(topic, group)
        raw = txn.get(Space.STATE, key)
        if raw is None:
            return None
        known = self._known.get(key)
        if known is not None and known[0] == raw:
            return known[1]
        stored = bytes(raw)
        state = _decode_state(_unchecked(f"group {group!r} of topic {topic!r}", key, stored))
        self._known[key] = (stored, state)
        return state

    def save(self, txn: Txn, topic: str, group: str, state: GroupState) -> None:
        """Writes the state."""
        key = group_key(topic, group)
        raw = _checked(key, _encode(state))
        txn.put(Space.STATE, key, raw)
        self._known[key] = (raw, state)

    def forget(self) -> None:
        """After a transaction that did not commit: its objects may have been changed."""
        self._known.clear()


def append(
    txn: Txn, topic: str, frames: Sequence[Frame], now_ns: int, limits: Limits, scratch: bytearray, *, works_off: bool = False
) -> Head:
    """Appends a batch, trims what retention lets go, and returns the topic's new head.

    What works off a full store must have room for its results, or it could never be emptied: `works_off` may fill it twice over.
    """
    gathered = [f if isinstance(f, bytes) else b"".join(f) for f in frames]
    _encode_into(gathered, scratch, _BATCH.size)
    if len(frames) > 1 and (len(scratch) > _BATCH_BYTES or len(frames) > _BATCH_FRAMES):
        # A reader takes up whole batches, however little it asks for.
        half = len(frames) // 2
        append(txn, topic, gathered[:half], now_ns, limits, scratch, works_off=works_off)
        return append(txn, topic, gathered[half:], now_ns, limits, scratch, works_off=works_off)
    head = make_head(txn, topic)
    base, last = head.next, head.next + len(frames) - 1
    _BATCH.pack_into(scratch, 0, 0, base, now_ns, len(frames))
    view = memoryview(scratch)
    checksum = xxhash.xxh3_64_intdigest(view[8:], head.number << 40 ^ last)
    view.release()
    _CHECK.pack_into(scratch, 0, checksum)
    step = min(_CHECK_ROOM_BYTES, limits.store_bytes >> 6)
    room = limits.store_bytes << works_off
    if (head.stored_bytes + len(scratch)) // step != head.stored_bytes // step and stored(txn) + len(scratch) > room:
        _trim_all(txn, now_ns, limits)
        head = make_head(txn, topic)
        if stored(txn) + len(scratch) > room:
            raise StoreFull(_full_message(txn, limits))
    txn.put(Space.LOG, _KEY.pack(head.number, last), scratch)
    head.next = last + 1
    head.stored_bytes += len(scratch)
    if head.stored_bytes > limits.retention_bytes or head.next >> 8 != base >> 8:
        trim(txn, topic, head, limits.retention_bytes, now_ns - limits.retention_ns, most=16)
    save_head(txn, topic, head)
    return head


def stored(txn: Txn) -> int:
    """The bytes of all topics' messages."""
    return sum(_decode_head(_unchecked("a topic's head", key, raw)).stored_bytes for key, raw in txn.scan(Space.STATE, b"h", b"i"))


def trim(txn: Txn, topic: str, head: Head, keep_bytes: int, older_than_ns: int, most: int) -> int:
    """Deletes up to `most` of the oldest batches that are settled by every group; returns the bytes freed. The caller saves the head."""
    floor = head.next
    for group in head.groups:
        key = group_key(topic, group)
        raw = txn.get(Space.STATE, key)
        if raw is not None:
            floor = min(floor, _decode_state(_unchecked(f"group {group!r} of topic {topic!r}", key, raw)).floor())
    doomed: list[tuple[bytes, int, int]] = []
    freed = 0
    for key, value in txn.scan(Space.LOG, _KEY.pack(head.number, 0), _KEY.pack(head.number, floor)):
        over = head.stored_bytes - freed > keep_bytes
        if len(doomed) >= most or not (over or (len(value) >= _BATCH.size and _BATCH.unpack_from(value)[2] < older_than_ns)):
            break
        doomed.append((bytes(key), _KEY.unpack(key)[1], len(value)))
        freed += len(value)
    for key, last, _ in doomed:
        txn.delete(Space.LOG, key)
        head.first = last + 1
    head.stored_bytes -= freed
    return freed


def _trim_all(txn: Txn, now_ns: int, limits: Limits) -> int:
    """The store is full: lets go of everything settled, of every topic; of topics without groups, of what retention does not ask for."""
    freed = 0
    for key, _ in list(txn.scan(Space.STATE, b"h", b"i")):
        topic = bytes(key[1:]).decode()
        head = make_head(txn, topic)
        keep_bytes, older_than_ns = (0, now_ns) if head.groups else (limits.retention_bytes, now_ns - limits.retention_ns)
        freed += trim(txn, topic, head, keep_bytes, older_than_ns, most=1_000)
        save_head(txn, topic, head)
    return freed


def _full_message(txn: Txn, limits: Limits) -> str:
    held = []
    for key, value in txn.scan(Space.STATE, b"g", b"h"):
        topic, _, group = bytes(key[1:]).partition(b"\0")
        head, state = find_head(txn, topic.decode()), _decode_state(_unchecked("a group", bytes(key), value))
        if head and state.backlog(head.next):
            held.append((state.backlog(head.next), f"{group.decode()!r} on {topic.decode()!r} ({state.backlog(head.next)} messages)"))
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


def batch_of(number: int, last: int, raw: bytes) -> Batch:
    """A batch from its stored value, not checked yet."""
    _, base, publish_ns, _ = _BATCH.unpack_from(raw)
    return Batch(number, last, base, publish_ns, raw)


def batches(txn: Txn, number: int) -> Iterator[tuple[Batch, int]]:
    """All batches of a topic without their frames, each with its size in bytes."""
    for key, value in txn.scan(Space.LOG, _KEY.pack(number, 0), _KEY.pack(number + 1, 0)):
        _, base, publish_ns, _ = _BATCH.unpack_from(value)
        yield Batch(number, unpack_key(key)[1], base, publish_ns, b""), len(value)


def position_at(txn: Txn, head: Head, start_ns: int) -> int:
    """The first position published at or after a time."""
    for key, value in txn.scan(Space.LOG, _KEY.pack(head.number, 0), _KEY.pack(head.number + 1, 0)):
        if len(value) >= _BATCH.size and _BATCH.unpack_from(value)[2] >= start_ns:
            return int(_BATCH.unpack_from(value)[1]) if _KEY.unpack(key)[1] >= head.first else head.first
    return head.next


def keep_ids(txn: Txn, number: int, group: str, state: GroupState, ids: Sequence[bytes]) -> None:
    """Appends settled ids; lets old ones go that no unsettled message can be a duplicate of."""
    tag = xxhash.xxh3_64_intdigest(group.encode())
    body = _CHUNK.pack(state.cursor, len(ids)) + b"".join(ids)
    at = _IDS_KEY.pack(number, tag, state.ids_next)
    txn.put(Space.IDS, at, _checked(at, body))
    state.ids_next += 1
    state.ids_kept += len(ids)
    if state.ids_next % 64 or state.ids_kept <= IDS_KEPT:
        return
    floor, doomed = state.floor(), []
    for key, value in txn.scan(Space.IDS, _IDS_KEY.pack(number, tag, 0), _IDS_KEY.pack(number, tag, state.ids_next)):
        cursor, count = _CHUNK.unpack_from(value, 8)
        if state.ids_kept - count < IDS_KEPT or cursor > floor:
            break
        doomed.append(bytes(key))
        state.ids_kept -= count
    for key in doomed:
        txn.delete(Space.IDS, key)


def read_ids(txn: Txn, head: Head, group: str, first: int, stop: int) -> list[bytes]:
    """Settled ids in chunks [first, stop), oldest first."""
    tag = xxhash.xxh3_64_intdigest(group.encode())
    ids: list[bytes] = []
    for key, value in txn.scan(Space.IDS, _IDS_KEY.pack(head.number, tag, first), _IDS_KEY.pack(head.number, tag, stop)):
        body = bytes(_unchecked(f"the settled ids of group {group!r}", bytes(key), value))[_CHUNK.size :]
        ids.extend(body[at : at + 16] for at in range(0, len(body), 16))
    return ids


def forget_group(txn: Txn, topic: str, head: Head, group: str) -> None:
    """Deletes all that is kept for a group. The caller saves the head."""
    head.groups.remove(group)
    head.listeners = {a: g for a, g in head.listeners.items() if g != group}
    txn.delete(Space.STATE, group_key(topic, group))
    tag = xxhash.xxh3_64_intdigest(group.encode())
    for key, _ in list(txn.scan(Space.IDS, _IDS_KEY.pack(head.number, tag, 0), _IDS_KEY.pack(head.number, tag, 2**63))):
        txn.delete(Space.IDS, bytes(key))


__all__ = (
    "BATCH_BYTES",
    "DISK_FORMAT",
    "KEY_BYTES",
    "VERSION_KEY",
    "Batch",
    "Head",
    "Limits",
    "StateCache",
    "age",
    "append",
    "batch_key",
    "batch_of",
    "batches",
    "check_name",
    "find_head",
    "forget_group",
    "group_key",
    "head_key",
    "intact",
    "keep_ids",
    "limits_from",
    "make_head",
    "name_key",
    "position_at",
    "read",
    "read_ids",
    "read_version",
    "save_head",
    "save_name",
    "stored",
    "trim",
    "unpack_key",
    "version_record",
)
