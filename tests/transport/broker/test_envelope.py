"""A batch as one entry: it comes out as it went in, and nothing else is taken for one."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from edgeserve.core.errors import CorruptMessage, MessageError, NewerFormat
from edgeserve.transport.broker.envelope import HEAD_BYTES, MOST_FRAMES, Reference, position, unwrap, whole, wrap

FRAMES = st.lists(st.binary(max_size=200), max_size=20)
TIMES = st.integers(0, 2**63)
REFERENCES = st.builds(Reference, st.integers(0, 2**40), st.binary(min_size=16, max_size=16), st.lists(st.integers(0, 2**52), max_size=5))


@given(FRAMES, TIMES)
def test_a_batch_comes_out_as_it_went_in(frames: list[bytes], publish_ns: int) -> None:
    assert unwrap(wrap(frames, publish_ns), 7) == (publish_ns, frames)


@pytest.mark.parametrize("size", [0, 1, 200, 255, 256, 257, 1_900, 2_020, 2_021, 70_000])
def test_a_lone_frame_comes_out_as_it_went_in(size: int) -> None:
    frame = bytes(n % 251 for n in range(size))
    publish_ns, found = unwrap(wrap([frame], 1_700_000_000_000_000_000), 0)
    assert (publish_ns, [bytes(f) for f in found if not isinstance(f, Reference)]) == (1_700_000_000_000_000_000, [frame])


@given(st.binary(max_size=60), st.data())
def test_a_damaged_lone_frame_is_refused(frame: bytes, data: st.DataObject) -> None:
    entry = bytearray(wrap([frame], 5))
    at = data.draw(st.integers(2, len(entry) - 1))
    entry[at] ^= data.draw(st.integers(1, 255))
    try:
        found = unwrap(bytes(entry), 0)
    except MessageError:
        return
    # That some frames are references is not under the checksum: none is.
    assert at == 3 and found == (5, [frame])


def test_large_frames_are_views_of_the_entry() -> None:
    frames = [b"x" * 100_000, b"", b"y" * 50_000]
    _, found = unwrap(wrap(frames, 1), 0)
    assert [bytes(f) for f in found if not isinstance(f, Reference)] == frames
    assert isinstance(found[0], memoryview)


@given(st.lists(st.one_of(st.binary(max_size=50), REFERENCES), max_size=9), TIMES)
def test_references_to_parts_stand_where_their_frames_would(items: list[bytes | Reference], publish_ns: int) -> None:
    assert unwrap(wrap(items, publish_ns), 7) == (publish_ns, items)


def test_a_reference_knows_its_frame() -> None:
    frame = b"payload" * 1_000
    reference = Reference(len(frame), xxh3_128_digest(frame), [1, 2])
    assert reference.check(frame)
    assert not reference.check(frame[:-1]) and not reference.check(frame[:-1] + b"X")


@given(st.binary(max_size=200))
@example(b"\xedF")
@example(b"\xedF\x01\x00xy")
def test_what_others_wrote_is_one_frame_as_it_is(data: bytes) -> None:
    if data[:2] != b"\xedB":
        assert unwrap(data, 7) == (7, [data])


def test_a_piece_of_a_head_is_foreign() -> None:
    short = wrap([b"x"], 1)[: HEAD_BYTES - 1]
    assert unwrap(short, 7) == (7, [short])


@given(FRAMES, TIMES, st.data())
def test_a_flipped_bit_is_found(frames: list[bytes], publish_ns: int, data: st.DataObject) -> None:
    entry = bytearray(wrap(frames, publish_ns))
    bit = data.draw(st.integers(16, len(entry) * 8 - 1))
    entry[bit // 8] ^= 1 << bit % 8
    try:
        found = unwrap(bytes(entry), 0)
    except MessageError:
        return
    assert found == (publish_ns, frames)  # the flag that there may be references, of a batch that has none


@given(FRAMES, st.data())
def test_what_is_cut_off_is_found(frames: list[bytes], data: st.DataObject) -> None:
    entry = wrap([*frames, b"end"], 1)
    with pytest.raises(CorruptMessage):
        unwrap(entry[: data.draw(st.integers(HEAD_BYTES, len(entry) - 1))], 0)


@pytest.mark.parametrize(("version", "flags"), [(2, 0), (255, 0), (1, 2), (1, 129)])
def test_a_newer_format_is_named(version: int, flags: int) -> None:
    entry = bytearray(wrap([b"x"], 1))
    entry[2:4] = bytes([version, flags])
    with pytest.raises(NewerFormat, match="upgrade"):
        unwrap(bytes(entry), 0)


def _entry(count: int, body: bytes, flags: int = 0) -> bytes:
    """An entry with a checksum that is right, whatever is in it."""
    return struct.pack("<2sBBIQQ", b"\xedB", 1, flags, count, 5, xxh3_64_intdigest(body, count << 48 & 2**64 - 1 ^ 5)) + body


@given(st.integers(0, MOST_FRAMES), st.one_of(st.binary(max_size=60), st.from_type(type(None)).map(msgspec.msgpack.encode)), st.booleans())
def test_hostile_bytes_with_a_right_checksum_raise_what_is_expected(count: int, body: bytes, parts: bool) -> None:
    try:
        _, frames = unwrap(_entry(count, body, int(parts)), 0)
    except MessageError:
        return
    assert len(frames) == count


@pytest.mark.parametrize("count", [MOST_FRAMES + 1, 2**32 - 1])
def test_more_frames_than_positions_are_refused(count: int) -> None:
    with pytest.raises(CorruptMessage, match="frames"):
        unwrap(_entry(count, msgspec.msgpack.encode([b""] * min(count, MOST_FRAMES + 1))), 0)


def test_a_wrong_count_is_refused() -> None:
    with pytest.raises(CorruptMessage, match="states 3 frames and has 2"):
        unwrap(_entry(3, msgspec.msgpack.encode([b"a", b"b"])), 0)


@given(st.lists(st.tuples(st.integers(0, 2**51), st.integers(0, MOST_FRAMES - 1)), min_size=2, max_size=2))
def test_positions_are_in_stored_order(pair: list[tuple[int, int]]) -> None:
    one, two = pair
    assert (position(*one) < position(*two)) == (one < two)


def test_a_frame_of_buffers_is_one() -> None:
    assert whole([b"a", memoryview(b"xbx")[1:2], bytearray(b"c")]) == b"abc"
    assert whole(b"abc") == b"abc"
