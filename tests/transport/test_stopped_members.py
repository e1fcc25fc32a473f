"""local:// and members that stand still: a stopped one is replaced, and has nothing to say when it goes on; one that computes is not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.transport.children import Child
from tests.waiting import until

from edgeserve.core.errors import Fenced
from edgeserve.testing.transport.cases import drain, frames_of, numbered, opening, publish
from edgeserve.transport import ClaimLost, GroupKind, Transport
from edgeserve.transport.beats import Beats, Watch

MEMBER = """
t = connect(url)
s = t.subscribe(["a", "b"], "g", member="child", kind=GroupKind(sys.argv[2]))
fence = t.fence("log", "child")
say("joined")
sys.stdin.readline()
found = s.receive(4, 20000)
say(len(found))
sys.stdin.readline()
{work}
try:
    s.settle({{found[0][4]: [d[1] for d in found]}}, {{"out": [b"late"]}}, ids=[b"i" * 16], decisions=[b"late"], fence=fence)
    say("settled")
except Exception as exc:
    say(type(exc).__name__)
while True:
    try:
        for frame, position, _, _, topic in s.receive(4, 200):
            s.settle({{topic: [position]}}, {{"out": [frame]}})
    except Exception as exc:
        say(type(exc).__name__)
"""
STOPPED = MEMBER.format(work="os.kill(os.getpid(), signal.SIGSTOP)")
# One call that lets no other thread of the process run, as a computation in C may be.
COMPUTES = MEMBER.format(work="sum(range(500_000_000))")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store"


@pytest.fixture
def transport(url: str) -> Iterator[Transport]:
    with opening(lambda: url) as open_it:
        yield open_it()


@pytest.mark.parametrize("kind", [GroupKind.FAILOVER, GroupKind.SHARED])
def test_a_stopped_member_is_replaced_and_is_refused_when_it_goes_on(url: str, transport: Transport, kind: GroupKind) -> None:
    with Child(STOPPED, url, kind.value) as child:
        assert child.line() == "joined"
        mine = transport.subscribe(["a", "b"], "g", member="mine", kind=kind)
        publish(transport, "a", numbered(4))
        child.tell()
        assert child.line() == "4"
        child.tell()
        found = drain(mine, 4, settle=False)
        assert frames_of(found) == numbered(4)
        assert {d[3] for d in found} == {1}
        assert mine.members() == ["mine"]
        fence = transport.fence("log", "mine")
        mine.settle({"a": [d[1] for d in found]}, {"out": [b"mine"]}, ids=[b"i" * 16], decisions=[b"mine"], fence=fence)
        os.kill(child.process.pid, signal.SIGCONT)
        assert child.line() == (Fenced if kind is GroupKind.FAILOVER else ClaimLost).__name__
        if kind is GroupKind.FAILOVER:
            assert child.line() == Fenced.__name__  # once more, from `receive`: it was not the active one for a while
        until(lambda: mine.members() == ["mine", "child"])
        assert [f for f, _, _ in transport.read("out")] == [f for f, _, _ in transport.read("log")] == [b"mine"]
        # It is a member like any other again.
        mine.close()
        publish(transport, "b", [b"1"])
        until(lambda: [f for f, _, _ in transport.read("out")] == [b"mine", b"1"])
        child.kill()


def test_a_member_that_computes_for_long_is_not_taken_for_a_stopped_one(url: str, transport: Transport) -> None:
    with Child(COMPUTES, url, GroupKind.FAILOVER.value) as child:
        assert child.line() == "joined"
        mine = transport.subscribe(["a", "b"], "g", member="mine", kind=GroupKind.FAILOVER)
        publish(transport, "a", numbered(1))
        child.tell()
        assert child.line() == "1"
        child.tell()
        # As a stand-by it looks around every second until the other has done its work.
        until(lambda: not mine.receive(1, 1_000) and transport.topic_info("a").groups["g"].backlog == 0)
        assert child.line() == "settled"
        assert mine.members() == ["child", "mine"]
        child.kill()


def test_who_stood_still_itself_takes_nobody_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other"
    path.touch()
    beats, now = Beats(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Beats, "heard", True)
    watch = Watch(beats)

    def looks(*steps: float) -> list[bool]:
        found = []
        for step in steps:
            now[0] += step
            found.append(watch.stands_still("1", 2**22 + 1, str(path)))
        return found

    assert looks(0, 1, 1, 1, 0.5) == [False, False, False, False, True]
    os.utime(path, ns=(1, 1))
    assert looks(1, 1, 1, 1, 1) == [False, False, False, False, True]
    # A pause of the one who looks: it does not know what the other did meanwhile.
    assert looks(3, 1, 1, 1, 1) == [False, False, False, False, True]
    monkeypatch.setattr(Beats, "heard", False)
    assert looks(1, 1) == [False, False]
    path.unlink()
    assert looks(1) == [False]
