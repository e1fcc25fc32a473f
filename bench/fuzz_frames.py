"""Throws damaged and crafted frames and payloads at the decoders: nothing may crash, and nothing wrong may be taken for right.

    python bench/fuzz_frames.py --frames 100000

Prints how each was refused and exits with status 1 at the first that was not, with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import random
import resource
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import xxhash

from edgeserve.core import Header, Kind, decode_frame, decode_value, encode_frame, encode_value
from edgeserve.core.errors import MessageError

PREFIX = struct.Struct("<QQQ")


class Unsafe(Exception):
    """A decoder took wrong bytes for right, or raised what it must not."""


def header(rng: random.Random) -> Header:
    """A header with any of its optional fields."""
    return Header(
        id=rng.randbytes(16),
        source_id=rng.choice(("tap-1", "Kamera Küche", "传感器", "s" * 255)),
        producer="node/1",
        sequence=rng.getrandbits(40),
        event_ns=rng.getrandbits(62),
        sent_ns=rng.getrandbits(62),
        schema=rng.choice(("b", "s", "m", "n:C:2:<f8")),
        size=rng.getrandbits(20),
        watermark_ns=rng.choice((None, rng.getrandbits(62))),
        key=rng.choice((None, "10.0.0.1", b"\x00\x01", 7)),
        kind=rng.choice(list(Kind)),
    )


def seal(head: bytes, payload: bytes, word: int = 0x0001_53ED) -> bytes:
    """A frame whose checksum is right, whatever its header: what a hostile producer can send."""
    word |= len(head) << 32
    return PREFIX.pack(word, len(payload), xxhash.xxh3_64_intdigest(head + payload, word)) + head + payload


def flip(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to three bits flipped."""
    damaged = bytearray(data)
    for bit in rng.sample(range(len(data) * 8), min(rng.randint(1, 3), len(data) * 8)):
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damage(rng: random.Random, frame: bytes) -> bytes:
    """A frame that is not `frame`, in one of the ways that disks, networks and other programs have."""
    way = rng.randrange(8)
    if way == 0:
        return rng.randbytes(rng.randrange(200))
    if way == 1:
        return frame[: rng.randrange(len(frame))]
    if way == 2:
        return frame + rng.randbytes(rng.randint(1, 64))
    if way == 3:
        start, size = rng.choice(((4, 4), (8, 8), (16, 8), (0, 8)))
        return frame[:start] + rng.choice((b"\xff" * size, b"\0" * size, rng.randbytes(size))) + frame[start + size :]
    if way == 4:
        at = rng.randrange(len(frame))
        return frame[:at] + rng.randbytes(rng.randint(1, 16)) + frame[at:]
    if way == 5:
        at, size = rng.randrange(len(frame)), rng.randint(1, 64)
        return frame[:at] + bytes(len(frame[at : at + size])) + frame[at + size :]
    if way == 6:
        return frame[:2] + rng.randbytes(len(frame) - 2)
    return flip(rng, frame)


def crafted_header(rng: random.Random) -> bytes:
    """Header bytes for a frame with a right checksum."""
    good = msgspec.msgpack.encode(header(rng))
    fields: list[Any] = msgspec.msgpack.decode(good)
    way = rng.randrange(6)
    if way == 0:
        return rng.randbytes(rng.randrange(100))
    if way == 1:
        fields[rng.randrange(len(fields))] = rng.choice(
            (None, "", b"", "x" * 300, "ü" * 200, [], {}, 1.5, 2**64 - 1, -1, True, [1], b"x" * 15)
        )
        return msgspec.msgpack.encode(fields)
    if way == 2:
        return msgspec.msgpack.encode(fields[: rng.randrange(len(fields))])
    if way == 3:
        return rng.choice((b"\x91", b"\x81", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")) * rng.randint(1, 3000)
    if way == 4:
        return good + rng.randbytes(rng.randint(1, 8))
    return flip(rng, good)


def refused(decode: Callable[[], Any]) -> str:
    """The name of the `MessageError` that `decode` raises, or "accepted"."""
    try:
        decode()
    except MessageError as exc:
        return type(exc).__name__
    return "accepted"


def one_frame(rng: random.Random) -> str:
    """One damaged or crafted frame."""
    if rng.random() < 0.3:
        return "crafted, " + refused(lambda: decode_frame(seal(crafted_header(rng), rng.randbytes(rng.randrange(50)))))
    size = 40_000 if rng.random() < 0.02 else rng.randrange(300)
    encoded = encode_frame(header(rng), rng.randbytes(size))
    frame = encoded if isinstance(encoded, bytes) else b"".join(encoded)
    damaged = damage(rng, frame)
    if damaged == frame:
        return "left as it was"
    outcome = refused(lambda: decode_frame(damaged))
    if outcome == "accepted":
        raise Unsafe(f"a damaged frame was decoded: {damaged[:64]!r}")
    return "damaged, " + outcome


def sample_values() -> list[Any]:
    """Values of every layout."""
    structured = np.zeros(3, [("a", "<i4"), ("b", "<M8[ns]", (2,))])
    values: list[Any] = [
        "Grüße",
        {"a": 1, "b": [1.5, None, b"x"], "t": (1, (2, 3)), 5: {"n": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}},
        [Decimal("1.5"), 2**80, dt.timedelta(1), {1, 2}, {(1, 2): 3}],
        np.arange(24, dtype="<f4").reshape(2, 3, 4),
        structured,
        {"small": np.arange(3), "large": np.zeros(1000), "more": [np.ones((30, 40), order="F"), structured, np.float64(2)]},
    ]
    if importlib.util.find_spec("pyarrow"):
        import pyarrow as pa

        table = pa.table(
            {"a": [1, 2, None], "b": ["x", "yy", "zzz"], "c": pa.array(["u", "v", "u"]).dictionary_encode(), "d": [[1], [], [2, 3]]}
        )
        values += [table, {"table": table, "array": np.zeros(500)}]
    return values


def one_payload(rng: random.Random, samples: list[tuple[str, bytes]]) -> str:
    """One damaged payload or schema tag. What decodes may be anything, because the frame's checksum is what finds damage."""
    schema, payload = rng.choice(samples)
    way = rng.randrange(6)
    if way == 0:
        schema = rng.choice(samples)[0]
    elif way == 1:
        schema = schema[: rng.randrange(len(schema) + 1)] + rng.choice(("", ":", "9" * 30, "-1", "O", "|O8", "x", "\0", "{", "é"))
    elif way == 2:
        payload = payload[: rng.randrange(len(payload) + 1)]
    elif way == 3:
        payload = rng.choice((b"\xc9\xff\xff\xff\xff\x01", b"\x91", b"\xdd\x0f\xff\xff\xff", b"\xc7\xff\x01")) * rng.randint(1, 2000)
    else:
        payload = flip(rng, payload)
    return "payload, " + refused(lambda: decode_value(schema, memoryview(payload)))


def fuzz(frames: int, payloads: int, seed: int) -> Counter[str]:
    """Runs all; raises `Unsafe` at the first failure. Every case has its own seed, so that it can be repeated alone."""
    samples = []
    for value in sample_values():
        schema, buffers = encode_value(value)
        samples.append((schema, b"".join(buffers)))
    outcomes: Counter[str] = Counter()
    for number in range(frames + payloads):
        rng = random.Random(f"{seed}/{number}")
        try:
            outcomes[one_frame(rng) if number < frames else one_payload(rng, samples)] += 1
        except Exception as exc:
            raise Unsafe(f"case {number} of seed {seed}: {type(exc).__name__}: {exc}") from exc
    return outcomes


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--payloads", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        outcomes = fuzz(options.frames, options.payloads, options.seed)
    except Unsafe:
        traceback.print_exc()
        return 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": round(peak_mb),
        **sorted_dict(outcomes),
    }
    print(json.dumps(report, indent=2))
    return 0 if peak_mb < 1024 else 1


def sorted_dict(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
