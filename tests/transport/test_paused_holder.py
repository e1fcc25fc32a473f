"""The holder of a join stands still between its decision and the group's log, another takes over, and it wakes: it has nothing to say."""

from __future__ import annotations

import os
import signal
import uuid

import pytest
from tests.servers import with_namespace
from tests.transport.children import Child

from edgeserve.core.errors import Fenced
from edgeserve.transport import connect, disconnect

HOLDER = """
    with_url = connect(url)
    mine = with_url.subscribe(["in"], "g", kind=GroupKind.FAILOVER, member=sys.argv[2])
    while not mine.active:
        mine.receive(1, 100)
    fence = with_url.fence("in.g.sets", sys.argv[2])
    say("holds", bytes(mine.newest_decision("in.g.sets") or b"").decode() or "nothing")
    for line in sys.stdin:
        decision, *what = line.split()
        frame, position, *_ = (mine.receive(1, 20_000) or [(b"nothing", 0)])[0]
        mine.settle({"in": [position]}, {"out": [frame]}, ids=[os.urandom(16)], decisions=[decision.encode()], fence=fence)
        if what:
            os.kill(os.getpid(), signal.SIGSTOP)  # before the group's log is told: that lingers
        try:
            mine.flush()
            say("settled", bytes(mine.newest_decision("in.g.sets")).decode())
        except Exception as exc:
            say(type(exc).__name__)
    mine.close()
"""


@pytest.fixture(params=["nats", "pulsar"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "pulsar":
        return with_namespace(request.getfixturevalue("pulsar_url"))
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


def test_what_a_paused_holder_settles_after_its_successor_took_over_does_not_count(url: str) -> None:
    transport = connect(url)
    try:
        publisher = transport.publisher("in")
        for n in range(4):
            publisher.publish([f"m{n}".encode()])
            publisher.flush()
        with Child(HOLDER, url, "one") as one:
            assert one.line() == "holds nothing"
            one.tell("d0")
            assert one.line() == "settled d0"
            with Child(HOLDER, url, "two") as two:
                one.tell("d1 stop")
                # What it decided last is the successor's to decide anew: under the same ids, which are dropped downstream.
                assert two.line() == "holds d0"
                two.tell("d2")
                assert two.line() == "settled d2"
                os.kill(one.process.pid, signal.SIGCONT)
                assert one.line() == Fenced.__name__
                two.tell("d3")
                assert two.line() == "settled d3"
    finally:
        disconnect(transport)
