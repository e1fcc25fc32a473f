"""Frames: what goes in comes out, and nothing else does."""

from __future__ import annotations

import runpy
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core import SOURCE_ID_MAX_BYTES, Header, check_source_id, decode_frame, encode_frame
from edgeserve.core.codec import FORMAT_VERSION, SMALL_FRAME_BYTES
from edgeserve.core.errors import ConfigurationError, CorruptMessage, ForeignMessage, MessageError, NewerFormat, TruncatedMessage

FUZZ = Path(__file__).parents[2] / "bench" / "fuzz_frames.py"

text = st.text(st.characters(codec="utf-8"), max_size=30)
int64 = st.integers(-(2**63), 2**63 - 1)
source_ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300).filter(lambda s: len(s.encode()) <= SOURCE_ID_MAX_BYTES)
headers = st.builds(
    Header,
    id=st.binary(min_size=16, max_size=16),
    source_id=source_ids,
    producer=text,
    sequence=st.integers(0, 2**63 - 1),
    event_ns=int64,
    sent_ns=int64,
    schema=text,
    size=st.integers(0, 2**63 - 1),
    watermark_ns=st.none() | int64,
    key=st.none() | text | int64 | st.binary(max_size=20),
    kind=st.integers(0, 3),
    time_kind=st.integers(0, 2),
    oldest_ns=st.none() | int64,
    task_version=text,
    trace=text,
    available_ns=st.none() | int64,
)


def a_header(source_id: str = "tap-1", **fields: object) -> Header:
    return msgspec.structs.replace(Header(b"0123456789abcdef", source_id, "node/1", 1, 2, 3), **fields)


def joined(frame: object) -> bytes:
    return frame if isinstance(frame, bytes) else b"".join(frame)  # type: ignore[arg-type]


def sealed(header: bytes, payload: bytes = b"") -> bytes:
    """A frame with a right checksum around any header, written from the description of the format."""
    word = int.from_bytes(b"\xedS\x01\x00" + len(header).to_bytes(4, "little"), "little")
    checksum = xxhash.xxh3_64_intdigest(header + payload, word)
    return word.to_bytes(8, "little") + len(payload).to_bytes(8, "little") + checksum.to_bytes(8, "little") + header + payload


@given(headers, st.binary(max_size=300))
def test_a_small_frame_comes_back(header: Header, payload: bytes) -> None:
    frame = encode_frame(header, payload)
    assert isinstance(frame, bytes)
    assert decode_frame(frame) == (header, payload)


@given(headers, st.lists(st.binary(max_size=50), max_size=5), st.booleans())
def test_buffers_come_back_in_order_whether_gathered_or_scattered(header: Header, parts: list[bytes], large: bool) -> None:
    buffers = [*parts, bytes(SMALL_FRAME_BYTES)] if large else parts
    frame = encode_frame(header, buffers)
    assert isinstance(frame, list) == large
    for kind in (bytes, bytearray, memoryview):
        assert decode_frame(kind(joined(frame))) == (header, b"".join(buffers))


def test_a_large_payload_is_not_copied_on_the_way_out_and_a_view_on_the_way_in() -> None:
    array = np.arange(100_000)
    frame = encode_frame(a_header(), [memoryview(array)])
    assert isinstance(frame, list)
    assert np.shares_memory(np.frombuffer(frame[1], np.int64), array)
    arrived = joined(frame)
    _, payload = decode_frame(arrived)
    assert payload.readonly
    assert np.shares_memory(np.frombuffer(payload, np.uint8), np.frombuffer(arrived, np.uint8))
    assert (len(arrived) - len(payload)) % 64 == 0, "an engine that stores frames aligned gives aligned arrays"


def test_the_view_of_a_writable_frame_is_read_only() -> None:
    _, payload = decode_frame(bytearray(joined(encode_frame(a_header(), b"abc"))))
    assert payload.readonly


@pytest.mark.parametrize("payload", [b"x" * 40, b"x" * (SMALL_FRAME_BYTES + 1)], ids=["small", "scattered"])
def test_any_flipped_bit_is_found(payload: bytes) -> None:
    frame = joined(encode_frame(a_header("tap-ü"), payload))
    bits = range(len(frame) * 8) if len(frame) < 1000 else [*range(2000), *range(2000, len(frame) * 8, 4999)]
    for bit in bits:
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageError):
            decode_frame(damaged)


def test_every_truncation_is_named_and_so_is_appended_garbage() -> None:
    frame = joined(encode_frame(a_header(), b"payload"))
    for end in range(len(frame)):
        with pytest.raises(TruncatedMessage):
            decode_frame(frame[:end])
    with pytest.raises(CorruptMessage, match="1 bytes more"):
        decode_frame(frame + b"\0")


@pytest.mark.parametrize("frame", [b"\x00", b"GET / HTTP/1.1\r\n\r\n", b'{"id": 1}' * 10, b"\xedX" + bytes(60)])
def test_what_another_program_wrote_is_foreign(frame: bytes) -> None:
    with pytest.raises(ForeignMessage, match="another program"):
        decode_frame(frame)


def test_a_newer_version_and_an_unknown_flag_ask_for_an_upgrade() -> None:
    frame = joined(encode_frame(a_header(), b"payload"))
    for start in (frame[:2] + bytes([FORMAT_VERSION + 1]), frame[:3] + b"\x02"):
        with pytest.raises(NewerFormat, match="upgrade"):
            decode_frame(start + frame[len(start) :])


def test_a_checksum_does_not_vouch_for_the_split_between_header_and_payload() -> None:
    """The same bytes with another header length have another checksum."""
    header = msgspec.msgpack.encode(a_header())
    frame = bytearray(sealed(header, b"ab"))
    frame[4:8] = (len(header) + 1).to_bytes(4, "little")
    frame[8:16] = (1).to_bytes(8, "little")
    with pytest.raises(CorruptMessage, match="checksum"):
        decode_frame(frame)


@given(headers, st.lists(st.none() | st.integers(0, 9) | text, min_size=1, max_size=3))
def test_a_header_with_more_fields_than_we_know_is_read(header: Header, more: list[object]) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(header))
    assert decode_frame(sealed(msgspec.msgpack.encode(fields + more), b"p")) == (header, b"p")


@given(headers, st.integers(6, len(Header.__struct_fields__)))
def test_a_header_with_fewer_fields_takes_defaults(header: Header, kept: int) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(header))
    expected = msgspec.structs.replace(header, **{name: getattr(a_header(), name) for name in Header.__struct_fields__[kept:]})
    assert decode_frame(sealed(msgspec.msgpack.encode(fields[:kept])))[0] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", b"x" * 15),
        ("id", "x" * 16),
        ("id", None),
        ("source_id", ""),
        ("source_id", "é" * 128),
        ("source_id", "s" * 256),
        ("source_id", b"tap"),
        ("source_id", 5),
        ("sequence", "1"),
        ("event_ns", 1.5),
        ("watermark_ns", "soon"),
        ("key", [1]),
        ("key", 1.5),
        ("key", True),
        ("kind", None),
    ],
)
def test_a_wrong_field_is_corrupt_although_the_checksum_is_right(name: str, value: object) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(a_header()))
    fields[Header.__struct_fields__.index(name)] = value
    with pytest.raises(CorruptMessage, match="header"):
        decode_frame(sealed(msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x90", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x96\xc4\x10" + b"x" * 16 + b"\xa1\xff"]
)
def test_a_header_that_is_none_is_corrupt(header: bytes) -> None:
    with pytest.raises(CorruptMessage, match="header"):
        decode_frame(sealed(header))


def test_a_bomb_in_fields_that_we_do_not_know_is_corrupt() -> None:
    known = msgspec.msgpack.encode(a_header())
    assert known[:3] == b"\xdc\x00\x10", "16 fields"
    for bomb in (b"\x91" * 200_000, b"\x81" * 200_000, b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(CorruptMessage):
            decode_frame(sealed(b"\xdc\x00\x11" + known[3:] + bomb))


@pytest.mark.parametrize("source_id", ["ä" * 127, "传感器" * 28, "🎥" * 63, "x" * 255])
def test_a_source_id_is_measured_in_bytes(source_id: str) -> None:
    check_source_id(source_id)
    assert decode_frame(joined(encode_frame(a_header(source_id), b"")))[0].source_id == source_id


@pytest.mark.parametrize("source_id", ["", "ä" * 128, "🎥" * 64, "x" * 256, "\ud800", None, b"tap"])
def test_a_source_id_that_cannot_travel_is_refused_before_it_does(source_id: str) -> None:
    with pytest.raises(ConfigurationError, match="source_id"):
        check_source_id(source_id)
    if isinstance(source_id, str):
        with pytest.raises(ConfigurationError, match="source"):
            encode_frame(a_header(source_id), b"")


@pytest.mark.parametrize("fields", [{"id": b"short"}, {"key": 1.5}, {"key": 2**70}, {"sequence": 2**64}, {"key": "\ud800"}])
def test_a_header_that_readers_would_refuse_is_not_sent(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        encode_frame(a_header(**fields), b"")


def test_fuzzed_frames_and_payloads_are_refused_by_name() -> None:
    """A short run of bench/fuzz_frames.py, which does a hundred thousand."""
    outcomes = runpy.run_path(str(FUZZ))["fuzz"](3000, 3000, seed=7)
    assert sum(outcomes.values()) == 6000
    assert {"damaged, CorruptMessage", "damaged, TruncatedMessage", "crafted, CorruptMessage", "payload, CorruptMessage"} <= set(outcomes)
