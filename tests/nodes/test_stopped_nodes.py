"""Nodes that are stepped by hand, and taken out of their group between two steps because they stood still."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.core.payload import decoder_for
from edgeserve.stage import direct
from edgeserve.stage.linger import Linger
from edgeserve.transport import connect, disconnect
from edgeserve.transport.wake import SocketSwitchboard


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    return f"local://{tmp_path}/store"


@pytest.fixture
def stands_still(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes others see a member of this process as one that stands still; None: nobody."""

    def stands_still(member: Any) -> None:
        victim = member and member._waker.address
        monkeypatch.setattr(SocketSwitchboard, "stands_still", lambda _, address: address == victim)

    return stands_still


def send(node: str, source_id: str, count: int) -> None:
    with DataSource(range(count), node, source_id=source_id, event_time=lambda n: n) as source:
        source.run()


def test_a_sink_does_not_do_again_what_others_have_done_meanwhile(
    node: str, stands_still: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_PAUSE_NS", -1)  # two seconds would be long for a test
    done: list[int] = []
    send(node, "s", 12)
    with Materialize(done.append, node, topic="src", timeout_ms=3_000) as old:
        next(old)
        old.flush()
        with Materialize(done.append, node, topic="src", timeout_ms=3_000) as new:
            stands_still(old._stage._subscription)  # type: ignore[attr-defined]
            for _ in range(11):
                next(new)
            new.flush()
            stands_still(None)
            with pytest.raises(ReceiveTimeout):
                while True:
                    next(old)
    assert sorted(done) == list(range(12))


def test_the_holder_of_a_join_that_was_replaced_with_sets_in_hand_goes_on(
    node: str, stands_still: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pair(a: int, b: int) -> list[int]:
        return [a, b]

    for source_id in "ab":
        send(node, source_id, 40)
    with Compute(pair, node, join="exact") as old:
        with monkeypatch.context() as patch:
            patch.setattr(Linger, "nudge", lambda _: None)  # what it has in hand is not settled behind its back
            while next(old) is None:
                pass
            assert old._stage._join._holding.pending.units  # type: ignore[attr-defined]
            with Compute(pair, node, join="exact") as new:
                stands_still(old._stage._join._subscription)  # type: ignore[attr-defined]
                runs = threading.Thread(target=new.run, args=("end",))
                runs.start()
                until(lambda: new.explain()["holds_the_join"])
                stands_still(None)
                old.flush()
                old.run(until="end")
                runs.join(60)
                assert not runs.is_alive()
    transport, decode, found = connect(node), decoder_for(), []
    for frame, _, _ in transport.read("dst"):
        header, payload = decode_frame(frame)
        if header.kind == 0:
            found.append(decode(header.schema, payload))
    disconnect(transport)
    assert sorted(found) == [[n, n] for n in range(40)]
