"""`partitions=` while a holder is killed or stands still, the broker is away, or the disk is full."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests import servers
from tests.disks import fill_up
from tests.nodes.conftest import fresh, running
from tests.nodes.test_partitions import Reading, held, number, pair, readings, replica, room, send, shared_out
from tests.transport.test_pulsar_admin import FakeAdmin
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize

node = pytest.fixture(params=["local", "nats"], name="node")(fresh)


@contextmanager
def sink(node: str) -> Iterator[list[int]]:
    """What a sink gets until the end, in order."""
    found = list[int]()
    with Materialize(found.append, node, topic="out") as materialize:
        thread = threading.Thread(target=materialize.run, kwargs={"until": "end"})
        thread.start()
        yield found
        thread.join(60)
        assert not thread.is_alive()


def _stands_still(node: str, began: Any, never: Any) -> None:
    """A replica that stands still in its fifth set."""
    ran = 0

    def task(a: Reading, b: Reading) -> int:
        nonlocal ran
        ran += 1
        if ran == 5:
            began.set()
            never.wait()
        return pair(a, b)

    with replica(node, task, 0) as compute:
        compute.run(until="end")


def test_the_keys_of_a_paused_holder_are_taken_over(node: str) -> None:
    """Until it is silent for too long; when it goes on it takes part again, and what it had in hand counts once."""
    cx = mp.get_context("spawn")
    began, go_on = cx.Event(), cx.Event()
    paused = cx.Process(target=_stands_still, args=(node, began, go_on))
    other = replica(node, pair, 1)
    with sink(node) as found, running(other):
        paused.start()
        until(lambda: len(held(other)) == 2)
        send(node, 400)
        assert began.wait(60)
        os.kill(paused.pid or 0, signal.SIGSTOP)
        until(lambda: len(held(other)) == 4)
        until(lambda: len(found) == 400)
        os.kill(paused.pid or 0, signal.SIGCONT)
        go_on.set()
    paused.join(60)
    assert paused.exitcode == 0
    assert sorted(found) == list(range(400))


def _killed_at_the_end(node: str, when: str) -> None:
    """A replica that is gone without a word while a round ends: before the end is stored, or between the end and the word of it."""
    from edgeserve.stage.partition import Partition
    from edgeserve.stage.rounds import Rounds

    def end_frames(self: Partition, position: int, of: bytes) -> Any:
        frames = has_end_frames(self, position, of)
        if frames:
            os.kill(os.getpid(), signal.SIGKILL)
        return frames

    def news(self: Rounds, partition: Partition) -> dict[str, bytes]:
        says = has_news(self, partition)
        if "published" in says:
            os.kill(os.getpid(), signal.SIGKILL)
        return says

    has_end_frames, has_news = Partition.end_frames, Rounds.news
    if when == "before":
        Partition.end_frames = end_frames  # type: ignore[method-assign]
    else:
        Rounds.news = news  # type: ignore[method-assign]
    with replica(node, pair, 0) as compute:
        compute.run(until="end")


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_kill_while_a_round_ends(node: str, when: str) -> None:
    killed = mp.get_context("spawn").Process(target=_killed_at_the_end, args=(node, when))
    other = replica(node, pair, 1)
    with sink(node) as found:
        killed.start()
        # It comes first, so that it holds the first partition, which publishes the end.
        with DataSource(readings(0, 40), node, source_id="a", topic="in", event_time=number, key=room, message_id=number) as source:
            for _ in range(20):
                next(source)
            send(node, 40, "b")
            until(lambda: len(found) >= 20)
            with running(other):
                until(lambda: len(held(other)) == 2)
                source.run()
                killed.join(60)
                assert killed.exitcode == -signal.SIGKILL
    assert sorted(found) == list(range(40))


def test_partitions_wait_for_their_broker(new_nats: servers.NewServer) -> None:
    server = new_nats()
    replicas = [replica(server.url, pair, n) for n in range(2)]
    with sink(server.url) as found, running(*replicas):
        shared_out(*replicas)
        with DataSource(readings(0, 400), server.url, source_id="a", topic="in", event_time=number, key=room, message_id=number) as a:
            for _ in range(200):
                next(a)
            send(server.url, 400, "b")
            until(lambda: len(found) == 200)
            server.kill()
            for _ in range(100):
                next(a)
            server.start()
            a.run()
    assert sorted(found) == list(range(400))


def test_partitions_wait_for_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = f"local://{small_disk}/store?retention_mb=100"
    taken = threading.Semaphore(0)

    def task(a: Reading, b: Reading) -> bytes:
        taken.acquire()
        return pair(a, b).to_bytes(4, "big") + bytes(10_000)

    replicas = [replica(node, task, n) for n in range(2)]
    found = list[int]()
    send(node, 100)
    with running(*replicas):
        shared_out(*replicas)
        ballast = fill_up(small_disk)
        taken.release(100)
        until(lambda: "waits, nothing is lost" in caplog.text)
        ballast.unlink()
    with Materialize(lambda result: found.append(int.from_bytes(result[:4], "big")), node, topic="out") as materialize:
        materialize.run(until="end")
    assert sorted(found) == list(range(100))


@pytest.mark.parametrize("away", [True, False])
def test_partitions_end_by_name_when_the_broker_does_not_answer_in_time(new_nats: servers.NewServer, away: bool) -> None:
    """It is gone, or stands still. Who comes when it is back goes on with what is left."""
    server, errors = new_nats(), list[Exception]()

    def run(compute: Compute) -> None:
        try:
            with compute:
                compute.run(until="end")
        except Exception as exc:
            errors.append(exc)

    with sink(server.url) as found:
        first = replica(f"{server.url}/?deadline_s=2", pair, 0)
        thread = threading.Thread(target=run, args=(first,))
        thread.start()
        with DataSource(readings(0, 400), server.url, source_id="a", topic="in", event_time=number, key=room, message_id=number) as a:
            for _ in range(200):
                next(a)
            send(server.url, 400, "b")
            until(lambda: len(found) == 200)
            if away:
                server.kill()
            else:
                os.kill(server.pid, signal.SIGSTOP)
            for _ in range(100):
                next(a)
            thread.join(60)
            assert not thread.is_alive()
            if away:
                server.start()
            else:
                os.kill(server.pid, signal.SIGCONT)
            with running(replica(server.url, pair, 1)):
                a.run()
    assert len(errors) == 1 and "deadline_s" in str(errors[0])
    assert sorted(found) == list(range(400))


@pytest.mark.parametrize("node", ["pulsar"], indirect=True)
def test_partitions_end_though_the_broker_cannot_tell_how_far_they_are(node: str) -> None:
    """Who holds one knows that itself, and does not wait for an answer until the deadline."""
    refuses = FakeAdmin(b"not enough non-faulty bookies", status=500)
    with sink(node) as found:
        send(node, 40)
        with replica(f"{node.partition('?')[0]}?admin={refuses.url}&deadline_s=1", pair, 0) as compute:
            compute.run(until="end")
    refuses.shutdown()
    refuses.server_close()
    assert refuses.asked.is_set()
    assert sorted(found) == list(range(40))
