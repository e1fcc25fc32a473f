"""How a batch of frames travels as one entry of a broker, and where its frames stand.

Layout, little endian::

    2  magic b"\xedB"
    1  format version
    1  flags: bit 0 set: some frames are references to parts
    4  count of frames
    8  publish time, ns
    8  xxh3_64 of all that follows, seeded with the count and the publish time
    .  msgpack: an array of the frames

What another program has put on the topic is one frame as it is: the stage says by name what it thinks of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from edgeserve.core.errors import CorruptMessage, NewerFormat
from edgeserve.transport.base import Frame

VERSION = 1
MOST_FRAMES = 4096
INDEX_BITS = 12
INDEX_MASK = MOST_FRAMES - 1
_HEAD = struct.Struct("<2sBBIQQ")
_MAGIC = b"\xedB"
STAMP_MAGIC = b"\xedF"
"""Begins what a fence puts before an entry: these two bytes, its length in two more, and so many more."""
_PARTS = 1
PARTS = ".parts"
_LARGE_FRAME_BYTES = 4096
_MASK = 2**64 - 1
# Of msgpack: an array of one, and bytes whose length takes so many bits.
_ARRAY_OF_ONE, _BIN_8, _BIN_16 = 0x91, 0xC4, 0xC5
_encode = msgspec.msgpack.Encoder().encode
_decode_frames = msgspec.msgpack.Decoder(list[bytes]).decode
_decode_views = msgspec.msgpack.Decoder(list[memoryview]).decode
_decode_mixed = msgspec.msgpack.Decoder(list[bytes | tuple[int, bytes, list[int]]]).decode
HEAD_BYTES = _HEAD.size
_unpack_head = _HEAD.unpack_from
# Of an entry with one frame that is short.
_LEAST_BYTES, _SHORT_BYTES = HEAD_BYTES + 3, 2048
FRAME_OVERHEAD_BYTES = 5


class Reference(msgspec.Struct, frozen=True, array_like=True):
    """A frame too large for one entry: its size, its hash, and at which entries of `<topic>.parts` it lies, in order."""

    size: int
    digest: bytes
    parts: list[int]

    def check(self, frame: bytes) -> bool:
        """Whether this is the frame."""
        return len(frame) == self.size and xxh3_128_digest(frame) == self.digest


Item: TypeAlias = "bytes | memoryview | Reference"


def parts_topic(topic: str) -> str:
    """Where the parts of a topic's largest frames lie."""
    return topic + PARTS


def position(at: int, index: int) -> int:
    """The position of a frame: of entry `at`, the frame number `index`."""
    return at << INDEX_BITS | index


def whole(frame: Frame) -> bytes:
    """The frame in one piece."""
    return frame if isinstance(frame, bytes) else b"".join(frame)


def wrap(frames: Sequence[bytes | Reference], publish_ns: int) -> bytes:
    """The entry of a batch."""
    mixed = Reference in map(type, frames)
    body = _encode(frames)
    seed = (len(frames) << 48 ^ publish_ns) & _MASK
    return _HEAD.pack(_MAGIC, VERSION, _PARTS if mixed else 0, len(frames), publish_ns, xxh3_64_intdigest(body, seed)) + body


def unwrap(data: bytes, otherwise_ns: int) -> tuple[int, Sequence[Item]]:
    """(publish time, frames) of an entry, with or without a stamp.

    Raises:
        NewerFormat, CorruptMessage: it is one of ours and cannot be read.
    """
    if _LEAST_BYTES < len(data) <= _SHORT_BYTES:
        # One short frame, as it comes where traffic is slow and each step is waited for: cut out, not decoded.
        magic, version, flags, count, publish_ns, checksum = _unpack_head(data)
        if count == 1 and version == VERSION and magic == _MAGIC and not flags:
            body = data[HEAD_BYTES:]
            if xxh3_64_intdigest(body, 1 << 48 ^ publish_ns) == checksum and body[0] == _ARRAY_OF_ONE:
                if body[1] == _BIN_8 and len(body) == 3 + body[2]:
                    return publish_ns, [body[3:]]
                if body[1] == _BIN_16 and len(body) == 4 + (body[2] << 8 | body[3]):
                    return publish_ns, [body[4:]]
    if data[:2] == STAMP_MAGIC:
        stamped = data[4 + int.from_bytes(data[2:4], "little") :]
        data = stamped if stamped[:2] == _MAGIC else data
    if data[:2] != _MAGIC or len(data) < HEAD_BYTES:
        return otherwise_ns, [data]
    _, version, flags, count, publish_ns, checksum = _unpack_head(data)
    if version > VERSION or flags & ~_PARTS:
        raise NewerFormat(f"a batch of format version {version}, flags {flags:#x}: upgrade edgeserve-streams on this node")
    if version < 1:
        raise CorruptMessage("a batch states format version 0, which there never was")
    rest = memoryview(data)[HEAD_BYTES:]
    if count > MOST_FRAMES:
        raise CorruptMessage(f"a batch states {count} frames, more than the {MOST_FRAMES} there may be")
    if xxh3_64_intdigest(rest, (count << 48 ^ publish_ns) & _MASK) != checksum:
        raise CorruptMessage(f"a batch of {len(data)} bytes does not match its checksum")
    frames: Sequence[Item]
    try:
        if flags & _PARTS:
            frames = [f if isinstance(f, bytes) else Reference(*f) for f in _decode_mixed(rest)]
        elif len(rest) > count * _LARGE_FRAME_BYTES:
            frames = _decode_views(rest)
        else:
            frames = _decode_frames(rest)
    except msgspec.DecodeError as exc:
        raise CorruptMessage(f"a batch of {len(data)} bytes holds no frames: {exc}") from exc
    if len(frames) != count:
        raise CorruptMessage(f"a batch states {count} frames and has {len(frames)}")
    return publish_ns, frames


__all__ = (
    "FRAME_OVERHEAD_BYTES",
    "HEAD_BYTES",
    "INDEX_BITS",
    "INDEX_MASK",
    "MOST_FRAMES",
    "PARTS",
    "STAMP_MAGIC",
    "Item",
    "Reference",
    "parts_topic",
    "position",
    "unwrap",
    "whole",
    "wrap",
)
