"""local:// between processes: some are killed, some fork, some are stopped."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.transport.children import Child

from edgeserve.core.errors import Fenced
from edgeserve.testing.transport.cases import LONG_MS, drain, frames_of, numbered, opening, publish
from edgeserve.transport import Transport, connect, disconnect
from edgeserve.transport.local import lmdbkv

HOLD = """
t = connect(url)
s = t.subscribe(["a"], "g", member="child")
say("joined")
sys.stdin.readline()
say(len(s.receive(4, 20000)))
sys.stdin.readline()
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store"


@pytest.fixture
def transport(url: str) -> Iterator[Transport]:
    with opening(lambda: url) as open_it:
        yield open_it()


def test_what_a_killed_member_held_goes_to_another(url: str, transport: Transport) -> None:
    with Child(HOLD, url) as child:
        assert child.line() == "joined"
        mine = transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(10))
        child.tell()
        assert child.line() == "4"
        assert len(drain(mine, 6)) == 6
        child.kill()
        found = drain(mine, 4)
    assert frames_of(found) == numbered(4)
    assert {d[3] for d in found} == {1}
    assert len(transport.topic_info("a").groups["g"].members) == 1


def test_what_a_killed_member_read_while_it_was_alone_counts_as_delivered(url: str, transport: Transport) -> None:
    code = """
    s = connect(url).subscribe(["a"], "g")
    s.settle({"a": [d[1] for d in s.receive(4)]})
    say(len(s.receive(4)))
    sys.stdin.readline()
    """
    publish(transport, "a", numbered(12))
    with Child(code, url) as child:
        assert child.line() == "4"
        child.kill()
    mine = transport.subscribe(["a"], "g")
    found = drain(mine, 8)
    assert frames_of(found) == numbered(8, start=4)
    assert {d[3] for d in found[:4]} == {1}


def test_a_killed_member_comes_back_under_its_name(url: str, transport: Transport) -> None:
    other = transport.subscribe(["a"], "g")
    with Child(HOLD, url) as child:
        assert child.line() == "joined"
        publish(transport, "a", numbered(8))
        drain(other, 1)
        child.tell()
        assert child.line() == "4"
        child.kill()
    again = transport.subscribe(["a"], "g", member="child")
    found = drain(again, 7)
    assert sorted(frames_of(found)) == numbered(7, start=1)
    other.close()
    again.close()


def test_a_stand_by_takes_over_from_a_killed_member(url: str, transport: Transport) -> None:
    code = """
    s = connect(url).subscribe(["a"], "g", kind=GroupKind.FAILOVER)
    found = s.receive(4, 20000)
    s.settle({"a": [found[0][1]]})
    say("holds")
    sys.stdin.readline()
    """
    publish(transport, "a", numbered(6))
    with Child(code, url) as child:
        assert child.line() == "holds"
        mine = transport.subscribe(["a"], "g", kind="failover")
        assert not mine.active
        child.kill()
        assert frames_of(drain(mine, 5)) == numbered(5, start=1)
    assert mine.active


def test_a_broadcast_group_whose_member_was_killed_holds_no_space(url: str, transport: Transport) -> None:
    code = """
    s = connect(url).subscribe(["a"], "g", kind=GroupKind.BROADCAST)
    say("joined")
    sys.stdin.readline()
    """
    with Child(code, url) as child:
        assert child.line() == "joined"
        child.kill()
    assert len(transport.topic_info("a").groups) == 1
    mine = transport.subscribe(["a"], "g", kind="broadcast", member="mine")
    assert list(transport.topic_info("a").groups) == ["g/mine"]
    mine.close()


def test_many_processes_publish_at_once(url: str, transport: Transport) -> None:
    code = """
    p = connect(url).publisher("a", send_window=10**6)
    name = sys.argv[2]
    for n in range(0, 1000, 4):
        p.publish([f"{name}{m}".encode() for m in range(n, n + 4)])
    say("done")
    """
    children = [Child(code, url, name) for name in "pqrs"]
    found = frames_of(drain(transport.subscribe(["a"], "g"), 4_000))
    for name, child in zip("pqrs", children, strict=True):
        with child:
            child.end()
        assert [f for f in found if f.startswith(name.encode())] == numbered(1_000, name)


def test_a_waiting_member_is_woken_by_another_process(url: str, transport: Transport) -> None:
    code = """
    t = connect(url)
    s, p = t.subscribe(["there"], "g"), t.publisher("back")
    say("ready")
    for _ in range(200):
        (found,) = s.receive(1, 20000)
        s.settle({"there": [found[1]]}, {"back": [found[0]]})
    """
    with Child(code, url) as child:
        assert child.line() == "ready"
        publisher, back = transport.publisher("there"), transport.subscribe(["back"], "g")
        for frame in numbered(200):
            publisher.publish([frame])
            assert frames_of(drain(back, 1)) == [frame]
        child.end()


def test_a_fence_is_taken_by_another_process(url: str, transport: Transport) -> None:
    code = """
    f = connect(url).fence("log", "child")
    f.append([b"2"])
    """
    mine = transport.fence("log", "mine")
    mine.append([b"1"])
    with Child(code, url) as child:
        child.end()
    with pytest.raises(Fenced, match="child"):
        mine.append([b"3"])
    assert [f for f, _, _ in transport.read("log")] == [b"1", b"2"]


def test_used_after_fork(url: str) -> None:
    code = """
    from edgeserve.core.errors import UsedAfterFork
    t = connect(url)
    s, p, f = t.subscribe(["a"], "g", member="parent"), t.publisher("a"), t.fence("log", "parent")
    p.publish([b"1", b"2"])
    s.receive(1)
    if os.fork() == 0:
        for use in (lambda: s.receive(1, 0), lambda: s.settle({"a": [0]}), lambda: p.publish([b"x"]), lambda: f.append([b"x"]),
                    t.topics, lambda: list(t.read("a")), lambda: t.subscribe(["a"], "h")):
            try:
                use()
            except UsedAfterFork as exc:
                assert str(os.getppid()) in str(exc)
            else:
                os._exit(3)
        s.close(); p.close(); disconnect(t); t.close()
        mine = connect(url)
        assert mine is not t
        mine.publisher("a").publish([b"3"])
        assert mine.topic_info("a").groups["g"].members == ("parent",)
        other = mine.subscribe(["a"], "h")
        assert len(other.receive(10, 20000)) == 3
        other.close()
        disconnect(mine)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert [bytes(d[0]) for _ in range(2) for d in s.receive(1, 20000)] == [b"2", b"3"]
    s.settle({"a": [0, 1, 2]}, decisions=[b"d"], fence=f)
    say("parent goes on")
    sys.stdin.readline()
    """
    with Child(code, url) as child:
        assert child.line() == "parent goes on"
        transport = connect(url)
        assert transport.topic_info("a").groups["g"].members == ("parent",)
        mine = transport.subscribe(["a"], "g")
        publish(transport, "a", [b"4"])
        drain(mine, 1)
        child.tell()
        child.end()
        disconnect(transport)


def test_forks_among_busy_threads(url: str) -> None:
    code = """
    warnings.simplefilter("ignore", DeprecationWarning)  # to fork among threads is what this is about
    t = connect(url)
    p, s = t.publisher("a"), t.subscribe(["a"], "g")
    done, failed = threading.Event(), []
    def work():
        try:
            while not done.is_set():
                p.publish([b"x"] * 10)
                d = s.receive(10, 0)
                s.settle({"a": [x[1] for x in d]})
                t.topic_info("a")
        except BaseException as exc:
            failed.append(exc)
    threads = [threading.Thread(target=work) for _ in range(1)]
    for thread in threads: thread.start()
    for n in range(30):
        if os.fork() == 0:
            try:
                connect(url).publisher("b").publish([b"y"])
            finally:
                os._exit(sys.exc_info()[0] is not None)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, n
    done.set()
    for thread in threads: thread.join()
    assert not failed, failed
    assert t.topic_info("b").next == 30
    assert t.topic_info("a").next > 300
    """
    with Child(code, url) as child:
        child.end()


def test_a_child_of_a_killed_process_does_not_keep_its_member_alive(url: str, transport: Transport) -> None:
    code = """
    s = connect(url).subscribe(["a"], "g")
    s.receive(4, 20000)
    child = os.fork()
    if child == 0:
        signal.pause()
    say(child)
    sys.stdin.readline()
    """
    publish(transport, "a", numbered(4))
    with Child(code, url) as child:
        grandchild = int(child.line())
        try:
            child.kill()
            assert frames_of(drain(transport.subscribe(["a"], "g"), 4)) == numbered(4)
        finally:
            os.kill(grandchild, 9)


def test_a_killed_reader_does_not_make_the_file_grow(tmp_path: Path) -> None:
    url = f"local://{tmp_path}/store?retention_mb=1"
    code = """
    t = connect(url)
    with t.kv.read() as txn:
        say("reads")
        sys.stdin.readline()
    """
    transport = connect(url)
    publish(transport, "a", [b"x" * 10_000], batch=1)
    with Child(code, url) as child:
        assert child.line() == "reads"
        child.kill()
    publish(transport, "a", [b"x" * 10_000] * 6_000, batch=1)
    # 60 MB went through; a reader that is believed alive holds all of it.
    assert (tmp_path / "store" / "data" / "data.mdb").stat().st_size < 20 << 20
    disconnect(transport)


def test_waiting_costs_next_to_nothing(url: str) -> None:
    code = """
    import resource
    t = connect(url)
    s = t.subscribe(["a", "b"], "g")
    def used():
        u = resource.getrusage(resource.RUSAGE_SELF)
        return u.ru_utime + u.ru_stime
    before = used()
    assert s.receive(1, 2000) == []
    say(used() - before)
    """
    assert resource.RUSAGE_SELF == 0
    with Child(code, url) as child:
        assert float(child.line()) < 0.2  # of 2 s; a busy wait takes all of them
        child.end()


@pytest.mark.parametrize("length", [60, 200])
def test_long_paths(tmp_path: Path, length: int) -> None:
    url = f"local://{tmp_path}/{'d' * length}/{'ä' * (length // 2)}"
    with opening(lambda: url) as open_it, Child(HOLD, url) as child:
        transport = open_it()
        assert child.line() == "joined"
        publish(transport, "a", numbered(4))
        child.tell()
        assert child.line() == "4"
        assert len(transport.topic_info("a").groups["g"].members) == 1
        child.kill()
        assert frames_of(drain(transport.subscribe(["a"], "g"), 4)) == numbered(4)


def test_receive_of_a_stopped_member_is_overtaken_after_its_time(url: str, transport: Transport) -> None:
    code = """
    from edgeserve.transport import ClaimLost
    s = connect(url).subscribe(["a"], "g", ack_timeout_ms=100)
    say("joined")
    sys.stdin.readline()
    (found,) = s.receive(1, 20000)
    say("holds")
    sys.stdin.readline()
    try:
        s.settle({"a": [found[1]]}, {"out": [b"late"]})
    except ClaimLost as exc:
        say(sorted(exc.positions))
    """
    with Child(code, url) as child:
        assert child.line() == "joined"
        mine = transport.subscribe(["a"], "g", ack_timeout_ms=100)
        publish(transport, "a", numbered(1))
        child.tell()
        assert child.line() == "holds"
        found = mine.receive(1, LONG_MS)
        assert [(d[1], d[3]) for d in found] == [(0, 1)]
        mine.settle({"a": [0]}, {"out": [b"r"]})
        child.tell()
        assert child.line() == "[0]"
    assert [f for f, _, _ in transport.read("out")] == [b"r"]
    mine.close()


def test_a_process_that_stands_still_inside_a_transaction_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lmdbkv, "_WATCH_S", 0.05)
    url = f"local://{tmp_path / 'store'}"
    code = """
    with connect(url).kv.write():
        say("in")
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    transport = connect(url)
    with Child(code, url) as child:
        assert child.line() == "in"
        publishing = threading.Thread(target=publish, args=(transport, "a", [b"1"]))
        publishing.start()
        deadline = time.monotonic() + 20
        while "stands still" not in caplog.text and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert f"process {child.process.pid} (stopped)" in caplog.text
        child.process.send_signal(signal.SIGCONT)
        publishing.join(20)
        assert [f for f, _, _ in transport.read("a")] == [b"1"]
    assert caplog.text.count("stands still") == 1
    disconnect(transport)
