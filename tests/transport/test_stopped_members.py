"""local:// and members that stand still: a stopped one is replaced, and has nothing to say when it goes on; one that computes is not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.transport.children import Child
from tests.waiting import until

from edgeserve.core.errors import Fenced, GroupConflict
from edgeserve.testing.transport.cases import drain, frames_of, numbered, opening, publish
from edgeserve.transport import ClaimLost, GroupKind, Subscription, Transport, beats
from edgeserve.transport.beats import BEAT_S, SILENT_S, Beats
from edgeserve.transport.wake import SocketSwitchboard

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
# Calls that let no other thread of the process run, as a computation in C may be, for longer than it takes to see silence.
COMPUTES = MEMBER.format(
    work="""
ends, count = time.monotonic() + 8, 100_000_000
sys.setswitchinterval(60)
while time.monotonic() < ends:
    sum(range(count))
sys.setswitchinterval(0.005)
"""
)


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


def test_a_process_that_is_stopped_right_after_it_has_subscribed_again_is_replaced_everywhere(url: str, transport: Transport) -> None:
    code = """
    t = connect(url)
    kept = [t.subscribe(["a"], "one", member="child")]
    sys.stdin.readline()
    kept.append(t.subscribe(["a"], "two", member="child"))
    os.kill(os.getpid(), signal.SIGSTOP)
    """
    with Child(code, url) as child:
        until(lambda: "one" in transport.topic_info("a").groups if "a" in transport.topics() else False)
        members = [transport.subscribe(["a"], group, member="mine") for group in ("one", "two")]
        child.tell()
        until(lambda: all("child" in known.members() for known in members))
        until(lambda: all(known.members() == ["mine"] for known in members))
        child.kill()


def test_processes_that_were_stopped_together_take_nobody_for_dead(url: str, transport: Transport) -> None:
    code = """
    s = connect(url).subscribe(["a"], "g", member=sys.argv[2], kind=GroupKind.FAILOVER)
    say("in")
    while True:
        s.receive(1, 100)
    """
    with Child(code, url, "one") as one, Child(code, url, "two") as two:
        assert {one.line(), two.line()} == {"in"}
        before = transport.topic_info("a").groups["g"].epoch
        for signal_ in (signal.SIGSTOP, signal.SIGCONT):
            for child in (one, two):
                os.kill(child.process.pid, signal_)
            # Longer than silence is borne, and than it takes to see it.
            threading.Event().wait(SILENT_S + 2.5 * BEAT_S)
        assert transport.topic_info("a").groups["g"].epoch == before
        one.kill()
        two.kill()


@pytest.fixture
def take_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[Subscription], None]:
    """Makes others see a member of this process as one that stands still."""

    def take_out(member: Subscription) -> None:
        victim = member._waker.address  # type: ignore[attr-defined]
        monkeypatch.setattr(SocketSwitchboard, "stands_still", lambda _, address: address == victim)

    return take_out


def test_who_was_taken_out_of_one_topic_comes_back_to_it_while_another_is_busy(
    transport: Transport, take_out: Callable[[Subscription], None]
) -> None:
    both, one = transport.subscribe(["a", "b"], "g", member="both"), transport.subscribe(["a"], "g", member="one")
    publish(transport, "b", numbered(8))
    take_out(both)
    assert one.members() == ["one"]
    assert transport.topic_info("b").groups["g"].members == ("both",)
    one.close()
    publish(transport, "a", numbered(4))
    assert frames_of(drain(both, 12, batch=2))[:2] == numbered(2)


def test_who_comes_back_does_not_take_the_place_of_another_of_its_name(
    transport: Transport, take_out: Callable[[Subscription], None]
) -> None:
    old, other = transport.subscribe(["a"], "g", member="name"), transport.subscribe(["a"], "g", member="other")
    publish(transport, "a", numbered(2))
    found = old.receive(2, 1_000)
    take_out(old)
    assert other.members() == ["other"]
    other.close()
    new = transport.subscribe(["a"], "g", member="name")
    assert len(new.receive(2, 1_000)) == 2
    for late in (lambda: old.settle({"a": [d[1] for d in found]}), lambda: old.nack("a", [d[1] for d in found])):
        with pytest.raises(ClaimLost):
            late()
    assert not old.alone
    with pytest.raises(GroupConflict, match="give this one another name"):
        old.receive(1, 0)
    old.close()
    assert new.members() == ["name"]
    new.settle({"a": [d[1] for d in found]})
    assert transport.topic_info("a").groups["g"].backlog == 0


def test_a_beat_that_is_missed_is_seen_by_one_look_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    monkeypatch.setattr(beats, "SILENT_S", 0.06)
    other = tmp_path / "other"
    other.touch()
    mine = Beats(str(tmp_path / "mine"))
    assert not mine.stands_still(str(other), None)
    until(lambda: mine._others[str(other)].silent)
    assert mine.stands_still(str(other), None)
    os.utime(other, ns=(1, 1))
    assert not mine.stands_still(str(other), None)
    # This process has run meanwhile, though nothing says so.
    assert not mine.stands_still(str(other), os.getpid())
    other.unlink()
    threading.Event().wait(0.2)
    assert not mine.stands_still(str(other), None)
    mine.close()
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_thread_for_it_nobody_comes_into_a_group(transport: Transport, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError, match="new thread"):
            transport.subscribe(["a"], "g")
    assert os.listdir(f"{url.removeprefix('local://')}/wake") == []
    transport.subscribe(["a"], "g")
