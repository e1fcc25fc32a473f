"""Cases: what is published is what arrives, in order, whatever its size."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeserve.core.errors import TransportError
from edgeserve.testing.transport.cases import LONG_MS, MOMENT_MS, TransportCases, drain, frames_of, numbered, positions_of, publish
from edgeserve.transport import Transport


class MessageCases(TransportCases):
    """Publishing, receiving, reading."""

    def test_messages_arrive_in_the_order_they_were_published(self, transport: Transport) -> None:
        publish(transport, "a", numbered(1_000), batch=7)
        found = drain(transport.subscribe(["a"], "g"), 1_000, batch=100)
        assert frames_of(found) == numbered(1_000)
        assert positions_of(found) == sorted(set(positions_of(found)))
        assert {(earlier, topic) for _, _, _, earlier, topic in found} == {(0, "a")}

    def test_publish_time_is_the_time_of_publishing(self, transport: Transport) -> None:
        before = time.time_ns()
        publish(transport, "a", numbered(3))
        after = time.time_ns()
        assert all(before <= d[2] <= after for d in drain(transport.subscribe(["a"], "g"), 3))

    def test_batches_need_not_be_received_as_they_were_published(self, transport: Transport) -> None:
        publish(transport, "a", numbered(100), batch=100)
        publish(transport, "a", numbered(100, start=100), batch=1)
        subscription = transport.subscribe(["a"], "g")
        sizes, found = [1, 3, 95, 2, 64, 35], []
        for size in sizes:
            found += drain(subscription, size, batch=size)
        assert frames_of(found) == numbered(200)

    def test_a_frame_may_be_a_list_of_buffers(self, transport: Transport) -> None:
        publish(transport, "a", [[b"ab", memoryview(b"xcdx")[1:3], bytearray(b"e")], [b"", b""], [b"f"]])
        assert frames_of(drain(transport.subscribe(["a"], "g"), 3)) == [b"abcde", b"", b"f"]

    def test_a_buffer_may_change_once_it_was_published(self, transport: Transport) -> None:
        buffer, publisher = bytearray(b"first"), transport.publisher("a")
        publisher.publish([[buffer]])
        buffer[:] = b"later"
        publisher.publish([[buffer]])
        publisher.close()
        assert frames_of(drain(transport.subscribe(["a"], "g"), 2)) == [b"first", b"later"]

    def test_empty_frames_are_messages_and_empty_batches_are_none(self, transport: Transport) -> None:
        publisher = transport.publisher("a")
        publisher.publish([])
        publisher.publish([b"", b"x", b""])
        publisher.publish([])
        publisher.flush()
        subscription = transport.subscribe(["a"], "g")
        assert frames_of(drain(subscription, 3)) == [b"", b"x", b""]
        assert subscription.receive(1, MOMENT_MS) == []
        assert [f for f, _, _ in transport.read("a")] == [b"", b"x", b""]

    def test_frames_of_6_mb(self, transport: Transport) -> None:
        if (most := transport.capabilities.max_frame_bytes) is not None and most < 6 << 20:
            pytest.skip(f"the engine's frames end at {most} bytes")
        big = [random.Random(n).randbytes(6 << 20) for n in range(3)]
        frames = [big[0], big[1], b"small", big[2], b"", big[0]]
        publisher = transport.publisher("a")
        for frame in frames[:4]:
            publisher.publish([frame])
        publisher.publish(frames[4:])
        found = drain(transport.subscribe(["a"], "g"), len(frames), batch=10)
        assert frames_of(found) == frames

    def test_several_large_frames_in_one_batch(self, transport: Transport) -> None:
        big = [random.Random(n).randbytes(3 << 20) for n in range(6)]
        publish(transport, "a", [big[0][:10], *big, b"end"])
        assert frames_of(drain(transport.subscribe(["a"], "g"), 8, batch=3)) == [big[0][:10], *big, b"end"]

    def test_a_huge_batch_is_received_in_small_ones(self, transport: Transport) -> None:
        frames = numbered(60_000)
        publish(transport, "a", frames, batch=len(frames))
        assert frames_of(drain(transport.subscribe(["a"], "g"), len(frames), batch=500)) == frames

    def test_several_publishers_lose_nothing_and_keep_their_own_order(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        names = ["p", "q", "r", "s"]
        list(threads.map(lambda name: publish(transport, "a", numbered(500, name), batch=5), names))
        found = frames_of(drain(transport.subscribe(["a"], "g"), 2_000))
        for name in names:
            assert [f for f in found if f.startswith(name.encode())] == numbered(500, name)

    def test_a_waiting_receive_gets_what_is_published_later(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        subscription = transport.subscribe(["a"], "g")
        waiting = threads.submit(subscription.receive, 10, LONG_MS)
        publish(transport, "a", [b"x"])
        assert frames_of(waiting.result(LONG_MS / 1000)) == [b"x"]

    def test_receive_ends_when_its_time_is_over(self, transport: Transport) -> None:
        subscription = transport.subscribe(["a"], "g")
        assert subscription.receive(1, 0) == []
        before = time.monotonic()
        assert subscription.receive(1, 30) == []
        assert time.monotonic() - before >= 0.03

    def test_wake_ends_a_waiting_receive(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        subscription = transport.subscribe(["a"], "g")
        waiting = threads.submit(subscription.receive, 1, None)
        try:
            subscription.wake()
            assert waiting.result(LONG_MS / 1000) == []
        finally:
            subscription.wake()  # should the first one have been lost, the case fails and does not hang
        assert subscription.receive(1, 0) == []  # takes the second wake-up
        publish(transport, "a", [b"x"])
        assert frames_of(subscription.receive(1, LONG_MS)) == [b"x"]

    def test_topics_are_apart(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5, "a"))
        publish(transport, "b", numbered(7, "b"))
        assert frames_of(drain(transport.subscribe(["b"], "g"), 7)) == numbered(7, "b")
        assert frames_of(drain(transport.subscribe(["a"], "g"), 5)) == numbered(5, "a")
        assert transport.topics() == ["a", "b"]

    def test_one_subscription_to_several_topics(self, transport: Transport) -> None:
        publish(transport, "a", numbered(50, "a"))
        publish(transport, "b", numbered(50, "b"))
        found = drain(transport.subscribe(["a", "b"], "g"), 100, batch=10)
        for topic in ("a", "b"):
            assert [bytes(d[0]) for d in found if d[4] == topic] == numbered(50, topic)

    def test_a_full_topic_does_not_starve_another(self, transport: Transport) -> None:
        publish(transport, "busy", numbered(400), batch=10)
        publish(transport, "quiet", [b"x"])
        subscription = transport.subscribe(["busy", "quiet"], "g")
        for _ in range(39):
            if "quiet" in {d[4] for d in drain(subscription, 10, batch=10)}:
                break
            threading.Event().wait(0.01)  # it may be on its way while the other one is here already
        else:
            raise AssertionError("the quiet topic's message comes after all of the busy one's")

    def test_a_paused_topic_waits_and_the_others_go_on(self, transport: Transport) -> None:
        subscription = transport.subscribe(["a", "b"], "g")
        subscription.pause("a")
        publish(transport, "a", numbered(3, "a"))
        publish(transport, "b", numbered(3, "b"))
        assert frames_of(drain(subscription, 3)) == numbered(3, "b")
        assert subscription.receive(1, 0) == []
        subscription.resume("a")
        assert frames_of(drain(subscription, 3)) == numbered(3, "a")

    def test_read_needs_no_group_and_ends(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10), batch=4)
        between = time.time_ns()
        publish(transport, "a", numbered(5, "n"))
        everything = numbered(10) + numbered(5, "n")
        stored = list(transport.read("a"))
        assert [f for f, _, _ in stored] == everything
        at = [p for _, p, _ in stored]
        assert at == sorted(set(at))
        for n in (0, 4, 6, 14):
            assert list(transport.read("a", position=at[n])) == stored[n:]
        assert list(transport.read("a", position=at[14] + 1)) == []
        assert [f for f, _, _ in transport.read("a", between)] == numbered(5, "n")
        assert list(transport.read("a", "latest")) == []
        assert list(transport.read("nothing")) == []
        assert transport.topic_info("a").groups == {}
        assert positions_of(drain(transport.subscribe(["a"], "g"), 15)) == at

    def test_topic_info_of_an_unknown_topic(self, transport: Transport) -> None:
        with pytest.raises(TransportError, match="no topic 'nothing'"):
            transport.topic_info("nothing")


__all__ = ("MessageCases",)
