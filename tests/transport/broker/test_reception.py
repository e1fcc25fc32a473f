"""What a member receives with. The broker is a stub here: the moment that counts cannot be had from a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
