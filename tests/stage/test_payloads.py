"""Payloads on another host that does not give them, and gives them again. What fetches is a stub here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import FetchError
from edgeserve.core.message import Header
from edgeserve.payload import Reference, lazy_schema
from edgeserve.stage import routes
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.routes import Routes, Uses


class Origin:
    """Gives a payload, or not. `asked`: how often."""

    def __init__(self) -> None:
        self.gives, self.asked = False, 0

    def fetch(self, _: Reference) -> memoryview:
        self.asked += 1
        if not self.gives:
            raise FetchError("not in time")
        return memoryview(b"payload")


@pytest.fixture
def origin() -> Origin:
    return Origin()


@pytest.fixture
def payloads(tmp_path: Path, origin: Origin) -> Payloads:
    made: Any = Payloads("a node", "eager", None)
    made._base, made._fetching = tmp_path, SimpleNamespace(fetch=origin.fetch)
    return made


REFERENCE = Reference("broker-1", "0" * 16 + "." + "0" * 16 + ".payloads", 0, 1, 7, 0, "http://127.0.0.1:1", "a-token")
HEADER = Header(b"i" * 16, "a", "p", 1, 1, 0, lazy_schema("b"), 7)
FRAME = bytes(encode_frame(HEADER, REFERENCE.encode()))  # type: ignore[arg-type]  # it is small: one buffer


def test_a_message_that_is_given_up_is_not_fetched_once_more(payloads: Payloads, origin: Origin) -> None:
    with pytest.raises(FetchError):
        payloads.fetch(HEADER.schema, REFERENCE.encode())
    assert payloads.aside(FRAME) == FRAME
    assert origin.asked == 1


def test_where_a_payload_could_not_be_fetched_from_is_told(payloads: Payloads) -> None:
    payloads._routes = Routes("a node", cast(Any, None), reads=("in", "g"))
    with pytest.raises(FetchError):
        payloads.fetch(HEADER.schema, REFERENCE.encode())
    told = payloads._routes.uses.take(near=True)
    assert told is not None and (told.group, told.unreachable) == ("g", ("http://127.0.0.1:1",))
    assert payloads._routes.uses.take(near=True) is None


def test_what_is_used_counts_once_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_MOST_IDS", 3)
    uses = Uses("g")
    for n in range(4):
        uses.seen("a")
        for _ in range(3):
            uses.used(msgspec.structs.replace(HEADER, id=bytes([n]) * 16))
    uses.used(msgspec.structs.replace(HEADER, id=b"x" * 16, source_id="b"), new=True)
    for n in range(100):
        uses.seen(f"source {n}")
    told = uses.take(near=False)
    assert told is not None and (told.sources["a"], told.sources["b"]) == ((4, 4), (1, 1))
    assert len(told.sources) == 64


def test_a_set_for_another_replica_is_always_asked_for(payloads: Payloads, origin: Origin) -> None:
    """Its messages may be settled when it is run, and the payload gone."""
    assert payloads.inline(FRAME) == FRAME
    origin.gives = True
    assert decode_frame(payloads.inline(FRAME))[1] == b"payload"
    assert origin.asked == 2
    assert decode_frame(payloads.aside(FRAME))[1] == b"payload"
