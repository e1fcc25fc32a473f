"""The header that travels with every message, and the ids by which messages, sets and results are known."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
import xxhash

from edgeserve.core.errors import ConfigurationError

SOURCE_ID_MAX_BYTES = 255
"""The longest source id, counted in bytes of UTF-8."""

WATERMARK_END = 2**63 - 1
"""The watermark of a source that has ended: no event time will follow."""

if TYPE_CHECKING:
    Key: TypeAlias = str | int | bytes | None
else:
    # msgspec decodes no union of str and bytes: the codec checks the type of a key that it read.
    Key = Any


class Kind(IntEnum):
    """What a message is. Control kinds (all but DATA) are never handed to a user's function."""

    DATA = 0
    END = 1
    DEAD_LETTER = 2
    DECISION = 3
    SET = 4


class TimeKind(IntEnum):
    """Where an event time comes from."""

    ARRIVAL = 0
    DEVICE = 1
    COMPUTED = 2


class Header(msgspec.Struct, array_like=True, gc=False):
    """What is known of a message without its payload. Fields are only ever appended: older readers skip new ones.

    `id` is 16 bytes. All times are integer nanoseconds since the Unix epoch (or of the user's own event clock).
    """

    id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    source_id: Annotated[str, msgspec.Meta(min_length=1)]
    producer: str
    sequence: int
    event_ns: int
    sent_ns: int
    schema: str = ""
    size: int = 0
    watermark_ns: int | None = None
    key: Key = None
    kind: int = 0
    time_kind: int = 0
    oldest_ns: int | None = None
    task_version: str = ""
    trace: str = ""
    available_ns: int | None = None


def message_id(producer_prefix: bytes, sequence: int) -> bytes:
    """The id of message number `sequence` of one incarnation of a producer (`producer_prefix`: 8 random bytes)."""
    return producer_prefix + sequence.to_bytes(8, "big")


def replayable_id(source_id: str, given: str | int | bytes) -> bytes:
    """The id of a message whose source names it itself (`message_id=`): the same after every restart.

    Raises:
        ConfigurationError: `given` is no str, int or bytes, or not valid Unicode.
    """
    if not isinstance(given, (str, int, bytes)):
        raise ConfigurationError(
            f"message_id of source {source_id!r} returned {given!r} ({type(given).__name__}): it must be a str, int or bytes that is "
            "the same when the stream starts over"
        )
    try:
        tag = b"i%d" % given if isinstance(given, int) else b"b" + given if isinstance(given, bytes) else b"s" + given.encode()
    except UnicodeEncodeError as exc:
        raise ConfigurationError(f"message_id of source {source_id!r} returned {given!r}, which is not valid Unicode") from exc
    return xxhash.xxh3_128_digest(b"%d:%s:%s" % (len(source_id), source_id.encode(), tag))


def set_id(member_ids: list[bytes]) -> bytes:
    """The id of a join set: a hash of its members' ids, which the caller gives in the order of the parameters."""
    return xxhash.xxh3_128_digest(b"".join(member_ids))


def result_id(group: bytes, of: bytes, index: int) -> bytes:
    """The id of result number `index` of the set or message `of` in `group`: the same whoever computes it, and when."""
    return xxhash.xxh3_128_digest(b"%b%b%d" % (of, group, index))


__all__ = (
    "SOURCE_ID_MAX_BYTES",
    "WATERMARK_END",
    "Header",
    "Key",
    "Kind",
    "TimeKind",
    "message_id",
    "replayable_id",
    "result_id",
    "set_id",
)
