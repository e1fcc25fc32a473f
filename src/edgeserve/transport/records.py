"""The small records of a store: topics' heads, groups' states, names. Each carries a checksum seeded with its key, so that neither a
flipped bit nor a misplaced value is taken for one."""

from __future__ import annotations

import struct
from functools import lru_cache

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import StoreDamaged
from edgeserve.transport.groups import GroupState
from edgeserve.transport.kv import Space, Txn
from edgeserve.transport.url import NodeURL

DISK_FORMAT = 2
VERSION_KEY = b"v"
_CHECK = struct.Struct("<Q")
_encode = msgspec.msgpack.Encoder().encode


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

    @property
    def largest_frame_bytes(self) -> int:
        """What fits into an empty store, with what is stored around it."""
        return self.store_bytes - 64


def limits_from(url: NodeURL) -> Limits:
    """The limits that a URL's parameters ask for."""
    default = Limits()
    return Limits(
        int(url.number("size_mb", default.store_bytes / 2**20) * 2**20),
        int(url.number("retention_mb", default.retention_bytes / 2**20) * 2**20),
        int(url.number("retention_s", default.retention_ns / 1e9) * 1e9),
    )


_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_state = msgspec.msgpack.Decoder(GroupState).decode


_seed = lru_cache(4096)(xxh3_64_intdigest)


def checked(key: bytes, body: bytes) -> bytes:
    """A value of STATE or IDS: its checksum and its content."""
    return _CHECK.pack(xxh3_64_intdigest(body, _seed(key))) + body


def intact(key: bytes, raw: bytes | memoryview) -> bool:
    """Whether a value of STATE or IDS belongs under this key as it is."""
    return len(raw) >= 8 and bool(_CHECK.unpack_from(raw)[0] == xxh3_64_intdigest(raw[8:], _seed(key)))


def unchecked(what: str, key: bytes, raw: bytes | memoryview) -> memoryview:
    """The content of a value that `checked` made, or `StoreDamaged`."""
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
    # The records of every transaction are checked in place: a call costs more than the check.
    key = head_key(topic)
    raw = txn.get(Space.STATE, key)
    if raw is None:
        return None
    body = raw[8:]
    if len(raw) < 8 or _CHECK.unpack_from(raw)[0] != xxh3_64_intdigest(body, _seed(key)):
        unchecked(f"the head of topic {topic!r}", key, raw)
    return _decode_head(body)


def save_head(txn: Txn, topic: str, head: Head) -> None:
    """Writes the head."""
    key, body = head_key(topic), _encode(head)
    txn.put(Space.STATE, key, _CHECK.pack(xxh3_64_intdigest(body, _seed(key))) + body)


def forget_head(txn: Txn, topic: str, head: Head) -> None:
    """Deletes the head. Its number is never given out again: pages of the file keep what was deleted, and a search for what is left of
    a damaged store would take it for messages of the next topic with that number."""
    txn.delete(Space.STATE, head_key(topic))
    save_name(txn, head.number, "")


def make_head(txn: Txn, topic: str) -> Head:
    """The topic's head; the topic is made if it does not exist."""
    head = find_head(txn, topic)
    if head is None:
        number = max((int.from_bytes(key[1:], "big") for key, _ in txn.scan(Space.STATE, b"m", b"n")), default=0) + 1
        save_name(txn, number, topic)
        head = Head(number)
    return head


def topics(txn: Txn) -> list[str]:
    """The names of all topics, sorted."""
    return [bytes(key[1:]).decode() for key, _ in txn.scan(Space.STATE, b"h", b"i")]


def groups(txn: Txn) -> list[tuple[str, str]]:
    """(topic, group) of all groups."""
    keys = [bytes(key[1:]).decode() for key, _ in txn.scan(Space.STATE, b"g", b"h")]
    return [(topic, group) for topic, _, group in (key.partition("\0") for key in keys)]


def group_state(txn: Txn, topic: str, group: str) -> GroupState | None:
    """A group's state, or None."""
    key = group_key(topic, group)
    raw = txn.get(Space.STATE, key)
    return None if raw is None else decode_state(topic, group, bytes(raw))


def save_name(txn: Txn, number: int, topic: str) -> None:
    """Writes what a lost head is found again by."""
    key = name_key(number)
    txn.put(Space.STATE, key, checked(key, topic.encode()))


def version_record() -> bytes:
    """The value under `VERSION_KEY`; its form is the same in all formats."""
    return checked(VERSION_KEY, DISK_FORMAT.to_bytes(4, "big"))


def read_version(raw: bytes | memoryview) -> int:
    """The disk format that a `version_record` names."""
    return int.from_bytes(unchecked("the store's version", VERSION_KEY, raw), "big")


def age(key: bytes, raw: bytes) -> tuple[int, ...]:
    """Tells of two intact values of STATE under one key which is the newer."""
    if key.startswith(b"h"):
        head = _decode_head(raw[8:])
        return (head.number, head.next, head.fence_epoch, head.first)
    if key.startswith(b"g"):
        state = _decode_state(raw[8:])
        return (state.settled, state.ids_next, len(state.recent_ids), state.epoch, state.cursor)
    if key.startswith(b"m"):
        return (len(raw) == _CHECK.size,)  # the topic was deleted later than it was made
    return ()


def decode_state(topic: str, group: str, raw: bytes) -> GroupState:
    """A group's state from what is stored."""
    return _decode_state(unchecked(f"group {group!r} of topic {topic!r}", group_key(topic, group), raw))


def encode_state(key: bytes, state: GroupState) -> bytes:
    """What is stored of a group's state."""
    body = _encode(state)
    return _CHECK.pack(xxh3_64_intdigest(body, _seed(key))) + body


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
        state = decode_state(topic, group, stored)
        self._known[key] = (stored, state)
        return state

    def save(self, txn: Txn, topic: str, group: str, state: GroupState) -> None:
        """Writes the state."""
        key = group_key(topic, group)
        raw = encode_state(key, state)
        txn.put(Space.STATE, key, raw)
        self._known[key] = (raw, state)

    def forget(self) -> None:
        """After a transaction that did not commit: its objects may have been changed."""
        self._known.clear()


__all__ = (
    "DISK_FORMAT",
    "VERSION_KEY",
    "Head",
    "Limits",
    "StateCache",
    "age",
    "checked",
    "decode_state",
    "encode_state",
    "find_head",
    "forget_head",
    "group_key",
    "group_state",
    "groups",
    "head_key",
    "intact",
    "limits_from",
    "make_head",
    "name_key",
    "read_version",
    "save_head",
    "save_name",
    "topics",
    "unchecked",
    "version_record",
)
