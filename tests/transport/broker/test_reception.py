"""What a member receives with. The broker is a stub here: the moment that counts cannot be had from a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgeserve.core.errors import SendError
from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.reception import Reception


def test_who_is_closed_while_it_attaches_leaves_no_consumer_behind() -> None:
    closed: list[str] = []

    def inlet(topic: str, *_: Any, **__: Any) -> Any:
        reception.close()  # as the owner's thread does while the member's waits for the broker
        return SimpleNamespace(close=lambda: closed.append(topic))

    engine: Any = SimpleNamespace(driver=SimpleNamespace(inlet=inlet))
    places: Any = SimpleNamespace(of={"in": SimpleNamespace(alone=False)})
    reception = Reception(
        *(engine, places, ["in"], "group", "earliest", Guard(), 0.0, lambda: None, lambda error: None, lambda: False),
        exclusive=True,
    )
    reception.attach()
    assert closed == ["in"]
    assert reception.desks["in"].inlet is None


def test_what_a_holder_could_not_take_in_it_takes_in_at_the_next_call() -> None:
    """The broker gives it to nobody else, and would only bring it again when the holder ends."""
    sent = [Entry(at, b"%d" % at) for at in range(3)]
    polled = iter(sent)
    failing = [True]

    def unwrap(entry: Entry) -> tuple[int, list[bytes]]:
        if entry.at == 1 and failing:
            failing.clear()
            raise SendError("the parts cannot be read")
        return 0, [entry.data]

    inlet = SimpleNamespace(poll=lambda seconds: next(polled, None), close=lambda: None)
    log = SimpleNamespace(start_at=0, worked={}, doubt={}, partial={})
    place = SimpleNamespace(alone=True, came=0, log=log, bury_who_just_died=lambda **_: None)
    engine: Any = SimpleNamespace(driver=SimpleNamespace(inlet=lambda *_, **__: inlet), unwrap=unwrap)
    reception = Reception(
        *(engine, SimpleNamespace(of={"in": place}), ["in"], "group", "earliest", Guard(), 0.0, lambda: None, lambda error: None),
        lambda: False,
        exclusive=True,
    )  # type: ignore[arg-type]
    reception.attach()
    with pytest.raises(SendError):
        reception.receive(10, 0)
    found = [delivery for _ in range(3) for delivery in reception.receive(10, 0)]
    assert [frame for frame, *_ in found] == [b"0", b"1", b"2"]
