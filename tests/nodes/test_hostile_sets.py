"""What strangers send to the topic on which replicas share sets: none of it is run, each is put aside by name, and the join goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tests.nodes.conftest import fresh, running
from tests.nodes.test_replicas import replica, send
from tests.waiting import until

from edgeserve.core.codec import encode_frame
from edgeserve.core.message import Header, Kind
from edgeserve.core.payload import encode_sized
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.transport import Transport

node = pytest.fixture(params=["local", "nats"], name="node")(fresh)


def frame(payload: bytes, number: int, **fields: Any) -> bytes:
    """A whole frame, of a set unless `fields` say otherwise."""
    header = Header(number.to_bytes(16, "big"), "sets", "stranger", number, 0, 0, size=len(payload), kind=int(Kind.SET))
    found = encode_frame(msgspec.structs.replace(header, **fields), payload)
    return found if isinstance(found, bytes) else b"".join(found)


def set_of(*members: tuple[Any, ...], body: bytes = b"") -> bytes:
    """A set that says to have such members, and what stands in their place."""
    head = msgspec.msgpack.encode(members)
    return len(head).to_bytes(4, "little") + head + body


def nested(depth: int) -> bytes:
    """A member with one field too many, which is a list in a list in a list."""
    head = b"\x91\x95\xa1a\x00\x00\xc0" + b"\x91" * depth + b"\xc0"
    return len(head).to_bytes(4, "little") + head


SCHEMA, _, _ = encode_sized(1)
INPUT = frame(b"\x01", 1, source_id="a", kind=int(Kind.DATA), schema=SCHEMA)
# Why each is put aside, and what it is.
HOSTILE = [
    ("foreign", bytes(range(7, 250, 3))),
    ("truncated", b""),
    ("truncated", frame(set_of(("a", len(INPUT), 0), body=INPUT), 2)[:-5]),
    ("corrupt", frame(b"\x01", 3, kind=int(Kind.DATA), schema=SCHEMA)),
    ("unknown_source", frame(set_of(("a", len(INPUT), 0), body=INPUT), 4, source_id="stranger")),
    ("corrupt", frame(b"\xff" * 40, 5)),
    ("corrupt", frame(b"", 6)),
    ("corrupt", frame(set_of(), 7)),
    ("corrupt", frame(set_of(("zzz", len(INPUT), 0), body=INPUT), 8)),
    ("corrupt", frame(set_of(("a", len(INPUT), 0), ("zzz", len(INPUT), 0), body=INPUT + INPUT), 9)),
    ("truncated", frame(set_of(("a", len(INPUT), 0)), 10)),
    ("truncated", frame(set_of(("a", -len(INPUT), 0), body=INPUT), 11)),
    ("corrupt", frame(nested(100_000), 12)),
]


def test_what_is_no_set_is_put_aside(
    node: str, transport: Transport, results: Callable[..., list[Any]], dead_letters: Callable[[str], list[DeadLetter]]
) -> None:
    ran: list[tuple[int, int]] = []

    def task(a: int, b: int) -> int:
        ran.append((a, b))
        return a

    replicas = [replica(node, task, n, retries=1, retry_backoff_ms=1) for n in range(2)]
    with running(*replicas):
        until(lambda: all(each.explain()["shares_sets"] for each in replicas))
        publisher = transport.publisher("in.g.work")
        for _, hostile in HOSTILE:
            publisher.publish([hostile])
        publisher.flush()
        publisher.close()
        send(node, 20)
    assert sorted(ran) == [(n, n) for n in range(20)] and sorted(results(topic="out")) == list(range(20))
    letters = dead_letters("in.g.work.g.dead-letters")
    assert sorted((letter.reason, letter.frames[0]) for letter in letters) == sorted(HOSTILE)
    assert any("a set has ['zzz'], and the task takes a, b" in letter.error for letter in letters)
