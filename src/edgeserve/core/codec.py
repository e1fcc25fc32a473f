"""The frame: how a header and its payload travel as bytes, and how anything else is refused by name.

Layout, little endian::

    2  magic b"\\xedS"
    1  format version
    1  flags: bit 0 set: the payload starts at a multiple of 64 bytes, zeros before it
    4  header length
    8  payload length
    8  xxh3_64 of all that follows, seeded with the first 8 bytes
    .  header, msgpack
    .  payload

The checksum finds damage; it is no proof of who wrote the frame, so the header is still checked field by field.
"""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Sequence
from struct import Struct
from struct import error as StructError
from typing import Any, NoReturn, TypeAlias

from msgspec.msgpack import Decoder, Encoder
from xxhash import xxh3_64, xxh3_64_intdigest

from edgeserve.core.errors import ConfigurationError, CorruptMessage, ForeignMessage, MessageError, NewerFormat, TruncatedMessage
from edgeserve.core.message import SOURCE_ID_MAX_BYTES, Header

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT_VERSION = 1
"""The frame format that this installation writes, and the newest that it reads."""

SMALL_FRAME_BYTES = 32 * 1024
"""Up to this size a frame is one `bytes`; above it a list of buffers, so that a payload is not copied."""

_MAGIC = b"\xedS"
_COPIED_BYTES = 1024
_ALIGNED = 1
_ALIGNMENT = 64
_PREFIX = Struct("<QQQ")
_PREFIX_BYTES = _PREFIX.size
_PLAIN_WORD = int.from_bytes(_MAGIC, "little") | FORMAT_VERSION << 16
_ALIGNED_WORD = _PLAIN_WORD | _ALIGNED << 24
# A character takes at most 4 bytes of UTF-8, so a shorter source id needs no encoding to be measured.
_SURELY_SHORT = SOURCE_ID_MAX_BYTES // 4
_KEY_TYPES = frozenset((str, int, bytes))

# What msgpack has room for.
_LEAST_INT, _LARGEST_INT = -(2**63), 2**64 - 1

_pack = _PREFIX.pack
_unpack = _PREFIX.unpack_from
_encode_header = Encoder().encode
_decode_header = Decoder(Header).decode


def as_parameter(source_id: str) -> str:
    """The source id as Python would write it as a parameter: identifiers are compared in the form NFKC, so a task cannot name any other."""
    normal = unicodedata.normalize("NFKC", source_id)
    return normal if normal.isidentifier() else source_id


def check_source_id(source_id: str) -> None:
    """Raises `ConfigurationError` unless `source_id` is a non-empty str of at most `SOURCE_ID_MAX_BYTES` bytes of UTF-8."""
    if not isinstance(source_id, str) or not source_id:
        raise ConfigurationError(f"source_id must be a non-empty str, not {source_id!r}")
    if "\0" in source_id:
        raise ConfigurationError(f"source_id {source_id!r} has the character NUL in it: leave it out")
    try:
        size = len(source_id.encode())
    except UnicodeEncodeError as exc:
        raise ConfigurationError(f"source_id {source_id!r} is not valid Unicode: {exc.reason}") from exc
    if size > SOURCE_ID_MAX_BYTES:
        raise ConfigurationError(f"source_id {source_id[:20]!r}... takes {size} bytes of UTF-8; at most {SOURCE_ID_MAX_BYTES} fit")


def check_key(key: Any, what: str) -> None:
    """Raises `ConfigurationError` unless `key`, which `what` has returned, is a str, int or bytes that fits a header."""
    if type(key) not in _KEY_TYPES:
        shown = f"{reprlib.repr(key)} ({type(key).__name__})"
        raise ConfigurationError(f"{what} returned {shown}: a key is a str, int or bytes; convert it there")
    if type(key) is int and not _LEAST_INT <= key <= _LARGEST_INT:
        raise ConfigurationError(f"{what} returned an int of {key.bit_length()} bits, and a key has at most 64: return a str, str(key)")
    if type(key) is str and not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError as exc:
            raise ConfigurationError(f"{what} returned {reprlib.repr(key)}, which is not valid Unicode: {exc.reason}") from exc


def encode_frame(header: Header, payload: bytes | Sequence[Buffer]) -> bytes | list[Buffer]:
    """The frame of one message.

    Args:
        header: checked as far as a reader would refuse it.
        payload: the payload's bytes, or the buffers that make it up in order.

    Returns:
        One `bytes` up to `SMALL_FRAME_BYTES`. Above that a list: the prefix and header, then the caller's own buffers, not copied:
        whoever sends them gathers them before the caller may write to them again, because the checksum is already taken.

    Raises:
        ConfigurationError: a header field that cannot travel.
    """
    try:
        head = _encode_header(header)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ConfigurationError(_why_not(header, exc)) from exc
    # A reader would refuse these; asked here in place, because a call costs more than the questions.
    source_id, key = header.source_id, header.key
    if len(header.id) != 16 or not 0 < len(source_id) <= _SURELY_SHORT or (key is not None and type(key) not in _KEY_TYPES):
        _check_header(header)
    if type(payload) is not bytes:
        if len(payload) == 1 and type(payload[0]) is bytes:
            payload = payload[0]
        else:
            parts = [payload] if isinstance(payload, (bytes, bytearray, memoryview)) else payload
            views = [memoryview(part).cast("B") for part in parts]
            if len(head) + sum(map(len, views)) > SMALL_FRAME_BYTES:
                return _scatter(head, views)
            payload = b"".join(views)
    size = len(payload)
    if len(head) + size > SMALL_FRAME_BYTES:
        return _scatter(head, [payload])
    word = len(head) << 32 | _PLAIN_WORD
    body = head + payload
    return _pack(word, size, xxh3_64_intdigest(body, word)) + body


def decode_frame(frame: Buffer) -> tuple[Header, bytes | memoryview]:
    """The header and the payload: a read-only view into `frame`, or bytes where it is so short that a copy costs less.

    Raises:
        ForeignMessage: another program wrote it.
        NewerFormat: a newer edgeserve wrote it.
        TruncatedMessage: its end is missing.
        CorruptMessage: it is damaged, or its header is not one.
    """
    # The frames that come by the hundred thousand: small copies cost less than views of them. What is unusual is looked at more closely.
    if type(frame) is bytes and _PREFIX_BYTES <= len(frame) <= SMALL_FRAME_BYTES:
        word, size, checksum = _unpack(frame)
        end, body = word >> 32, frame[_PREFIX_BYTES:]
        if word & 0xFFFFFFFF == _PLAIN_WORD and len(body) == end + size and xxh3_64_intdigest(body, word) == checksum:
            try:
                header = _decode_header(body[:end])
            except Exception:  # named by whoever looks closer
                return _decode_any(frame)
            if len(header.source_id) <= _SURELY_SHORT and (header.key is None or type(header.key) in _KEY_TYPES):
                return header, body[end:] if size <= _COPIED_BYTES else memoryview(body)[end:]
    return _decode_any(frame)


def _decode_any(frame: Buffer) -> tuple[Header, memoryview]:
    view = memoryview(frame)
    if type(frame) is not bytes:
        view = view.cast("B").toreadonly()
    try:
        word, size, checksum = _unpack(view)
    except StructError:
        _refuse(view)
    kind = word & 0xFFFFFFFF
    end = word >> 32
    if kind == _PLAIN_WORD:
        start = end
    elif kind == _ALIGNED_WORD:
        start = _aligned(_PREFIX_BYTES + end) - _PREFIX_BYTES
    else:
        _refuse(view)
    body = view[_PREFIX_BYTES:]
    if len(body) != start + size:
        _refuse_length(len(body), start + size)
    if xxh3_64_intdigest(body, word) != checksum:
        raise CorruptMessage(f"a frame of {len(view)} bytes does not match its checksum: damaged on the way or on disk")
    try:
        header = _decode_header(body[:end].tobytes())  # faster than from a view
    except Exception as exc:  # a crafted header also reaches UnicodeDecodeError, RecursionError, MemoryError
        raise CorruptMessage(f"a frame of {len(view)} bytes has no readable header: {exc}") from exc
    if len(header.source_id.encode()) > SOURCE_ID_MAX_BYTES or not (header.key is None or type(header.key) in _KEY_TYPES):
        raise CorruptMessage(f"a header is not valid: source id {header.source_id[:64]!r}, key of type {type(header.key).__name__}")
    return header, body[start:]


def _why_not(header: Header, error: Exception) -> str:
    key = header.key
    if isinstance(key, int) and not _LEAST_INT <= key <= _LARGEST_INT:
        shown = key if key.bit_length() < 256 else f"(an int of {key.bit_length()} bits)"
        return f"key {shown} of source {header.source_id!r} does not fit into 64 bits: return a smaller one from key=, or a str: str(key)"
    return f"the header of source {header.source_id!r} cannot be encoded: {error}"


def _check_header(header: Header) -> None:
    check_source_id(header.source_id)
    if len(header.id) != 16:
        raise ConfigurationError(f"a message id is 16 bytes, not {len(header.id)}")
    if header.key is not None and type(header.key) not in _KEY_TYPES:
        raise ConfigurationError(f"the key of a message is a str, int or bytes, not {type(header.key).__name__}; convert it in key=")


def _aligned(position: int) -> int:
    return (position + _ALIGNMENT - 1) & -_ALIGNMENT


def _scatter(head: bytes, parts: Sequence[Buffer]) -> list[Buffer]:
    word = len(head) << 32 | _ALIGNED_WORD
    start = _PREFIX_BYTES + len(head)
    padded = head + bytes(_aligned(start) - start)
    checksum = xxh3_64(padded, seed=word)
    size = 0
    for part in parts:
        checksum.update(part)
        size += len(part)
    return [_pack(word, size, checksum.intdigest()) + padded, *parts]


def _refuse(view: memoryview) -> NoReturn:
    """Names what is wrong with the first bytes of a frame."""
    start = view[:4].tobytes()
    error: MessageError
    if start[:2] != _MAGIC[: len(start)]:
        error = ForeignMessage(f"not an edgeserve frame: it starts with {start!r}; does another program write to this topic?")
    elif len(start) > 2 and start[2] > FORMAT_VERSION:
        error = NewerFormat(
            f"a frame of format version {start[2]}; this edgeserve reads up to {FORMAT_VERSION}: upgrade edgeserve-streams on this node"
        )
    elif len(view) < _PREFIX_BYTES:
        error = TruncatedMessage(f"a frame of {len(view)} bytes is shorter than the {_PREFIX_BYTES} that every frame starts with")
    elif start[2] < 1:
        error = CorruptMessage("a frame of format version 0, which never existed")
    else:
        error = NewerFormat(f"a frame with unknown flags {start[3]:#04x}: upgrade edgeserve-streams on this node")
    raise error


def _refuse_length(found: int, stated: int) -> NoReturn:
    if found < stated:
        raise TruncatedMessage(f"a frame ends after {found} of {stated} bytes")
    raise CorruptMessage(f"a frame has {found - stated} bytes more than it states")


__all__ = ("FORMAT_VERSION", "SMALL_FRAME_BYTES", "Buffer", "as_parameter", "check_key", "check_source_id", "decode_frame", "encode_frame")
