"""`routing='lazy'`: payloads stay in shared memory, and everything else is as it was."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.conftest import running
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError, ReceiveTimeout, TooLarge
from edgeserve.core.payload import decode_value
from edgeserve.payload import PayloadReader
from edgeserve.payload.segment import Segment
from edgeserve.payload.writer import slot_bytes_for
from edgeserve.stage.deadletter import DeadLetter, dead_letter_topic, read_dead_letter
from edgeserve.transport import connect, disconnect

SIZE = 300_000


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    return f"local://{tmp_path}/store"


def segments(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "payloads").glob("*/*.payloads*"))


def image(n: int, seed: int = 0) -> Any:
    return np.full((100, SIZE // 100), (n + seed) % 251, np.uint8)


def send(url: str, name: str, count: int, seed: int = 0) -> None:
    numbers = iter(range(count))
    with DataSource(
        (image(n, seed) for n in range(count)), url, source_id=name, topic="in", routing="lazy", event_time=lambda _: next(numbers)
    ) as ds:
        ds.run()


def stored_bytes(url: str, topic: str) -> int:
    transport = connect(url)
    try:
        return transport.topic_info(topic).stored_bytes
    finally:
        disconnect(transport)


def letters_of(url: str, topic: str, group: str) -> list[DeadLetter]:
    transport = connect(url)
    try:
        return [read_dead_letter(frame) for frame, _, _ in transport.read(dead_letter_topic(topic, group))]
    finally:
        disconnect(transport)


def test_a_chain_hands_arrays_on_and_moves_only_headers(url: str, tmp_path: Path) -> None:
    send(url, "a", 20)
    assert stored_bytes(url, "in") < 20 * 1_000
    seen: list[Any] = []

    def twice(a: Any) -> Iterator[Any]:
        assert not a.flags.writeable
        yield a
        yield a[:50] + 1

    def final(value: Any) -> None:
        seen.append((value.shape, int(value[0, 0]), bool((value == value[0, 0]).all())))

    with Compute(twice, url, topic_in="in", topic_out="out", routing="lazy") as compute:
        compute.run(until="end")
    assert stored_bytes(url, "out") < 40 * 1_000
    with Materialize(final, url, topic="out") as sink:
        sink.run(until="end")
    assert seen == [each for n in range(20) for each in (((100, 3_000), n, True), ((50, 3_000), n + 1, True))]
    assert segments(tmp_path) == []


def test_how_large_a_payload_has_to_be_can_be_said(url: str, tmp_path: Path) -> None:
    sizes = [999, 1_000, 2_000]
    with DataSource(map(bytes, sizes), url, source_id="a", topic="in", routing="lazy", lazy_bytes=1_000) as source:
        source.run()
        assert stored_bytes(url, "in") > 999 and stored_bytes(url, "in") < 2_000
    with Compute(lambda a: a + b"1", url, topic_in="in", topic_out="out", routing="lazy", lazy_bytes=1_001) as compute:
        compute.run(until="end")
    assert 1_000 < stored_bytes(url, "out") < 2_000
    seen: list[int] = []
    with Materialize(lambda value: seen.append(len(value)), url, topic="out") as sink:
        sink.run(until="end")
    assert seen == [size + 1 for size in sizes]
    with pytest.raises(ConfigurationError, match="lazy_bytes=0: it is the size from which payloads stay"):
        DataSource([], url, source_id="a", lazy_bytes=0)


def test_a_join_reads_in_place(url: str, tmp_path: Path) -> None:
    send(url, "a", 10)
    send(url, "b", 10, seed=100)
    kept: list[Any] = []

    def both(a: Any, b: Any) -> int:
        kept.append((a, b))
        return int(b[0, 0]) - int(a[0, 0])

    with Compute(both, url, topic_in="in", topic_out="out", join="exact") as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 10
    # Views live for as long as the user holds them, settled or not.
    assert [(int(a.max()), int(b.min())) for a, b in kept] == [(n, n + 100) for n in range(10)]
    results: list[int] = []
    with Materialize(results.append, url, topic="out") as sink:
        sink.run(until="end")
    assert results == [100] * 10


def test_a_dead_letter_holds_the_payload_itself(url: str, tmp_path: Path) -> None:
    send(url, "a", 3)

    def fails(a: Any) -> None:
        raise ValueError("no")

    with Compute(fails, url, topic_in="in", topic_out="out", retries=0, group="g") as compute:
        compute.run(until="end")
    assert segments(tmp_path) == []
    letters = letters_of(url, "in", "g")
    for n, letter in enumerate(letters):
        header, payload = decode_frame(letter.frames[0])
        assert (decode_value(header.schema, payload) == image(n)).all()
    assert len(letters) == 3


class Want:
    """For so many times a segment cannot be opened to be read, for want of descriptors."""

    times = 0.0

    def __init__(self) -> None:
        self.met = threading.Event()

    def open(self, path: Path) -> Segment:
        if self.times > 0:
            self.times -= 1
            self.met.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Segment.open(path)


@pytest.fixture
def want(monkeypatch: pytest.MonkeyPatch) -> Want:
    found = Want()
    monkeypatch.setattr("edgeserve.payload.reader.Segment", found)
    return found


@pytest.mark.parametrize(("sources", "task"), [("a", lambda a: int(a[0, 0])), ("ab", lambda a, b: int(b[0, 0]))])
def test_a_payload_that_cannot_be_had_now_is_no_failure_of_the_task(url: str, want: Want, sources: str, task: Any) -> None:
    for name in sources:
        send(url, name, 2)
    want.times = 2
    with Compute(
        task, url, topic_in="in", topic_out="out", join="exact" if len(sources) > 1 else "latest", retries=0, group="g"
    ) as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 2 and compute.counters["dead_letter"] == 0
    assert want.times == 0


def test_a_dead_letter_waits_for_its_payload(url: str, want: Want) -> None:
    send(url, "b", 1)
    want.times = 2
    with Compute(lambda a: None, url, topic_in="in", topic_out="out", group="g", timeout_ms=50) as compute:
        next(compute)
        assert compute.counters["unknown_source"] == 1
    (letter,) = letters_of(url, "in", "g")
    header, payload = decode_frame(letter.frames[0])
    assert (decode_value(header.schema, payload) == image(0)).all()


def test_a_node_that_ends_while_a_payload_cannot_be_had_gives_its_message_back(url: str, want: Want) -> None:
    send(url, "a", 1)
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "group": "g", "retries": 0}
    want.times = math.inf
    with Compute(lambda a: 1, url, **options) as compute:
        thread = threading.Thread(target=compute.run)
        thread.start()
        assert want.met.wait(60)
        compute.close()
        thread.join(60)
    want.times = 0
    with Compute(lambda a: 1, url, **options) as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 1
    assert not letters_of(url, "in", "g")


@pytest.mark.parametrize(
    ("sources", "task", "gate"),
    [("a", lambda a: 1, None), ("ab", lambda a, b: 1, None), ("ab", lambda a, b: 1, lambda value: value)],
)
def test_a_node_that_is_told_to_stop_while_a_payload_cannot_be_had_gives_its_message_back(
    url: str, want: Want, monkeypatch: pytest.MonkeyPatch, sources: str, task: Any, gate: Any
) -> None:
    monkeypatch.setattr("edgeserve.stage.linger._AFTER_STOP_S", 0.0)
    for name in sources:
        send(url, name, 1)
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "group": "g", "retries": 0, "gate_in": gate}
    options["join"] = "exact" if len(sources) > 1 else "latest"
    want.times = math.inf

    def stop() -> None:
        if want.met.wait(60):
            os.kill(os.getpid(), signal.SIGTERM)

    with Compute(task, url, **options) as compute:
        thread = threading.Thread(target=stop)
        thread.start()
        compute.run()
        thread.join()
        assert compute.counters["dead_letter"] == 0
    want.times = 0
    with Compute(task, url, **options) as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 1
    assert not letters_of(url, "in", "g")


@pytest.mark.parametrize("task", [lambda a: 1, lambda a, b: 1])
@pytest.mark.parametrize("fails", [False, True])
def test_what_goes_back_for_want_of_its_payload_is_not_counted_as_given_up(
    url: str, monkeypatch: pytest.MonkeyPatch, task: Any, fails: bool
) -> None:
    monkeypatch.setattr("edgeserve.stage.linger._AFTER_STOP_S", 0.0)
    send(url, "a" if fails else "stranger", 1)

    def refuse(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def gate(value: Any) -> None:
        monkeypatch.setattr(PayloadReader, "open", refuse)  # so that it fails for the dead letter
        raise ValueError("no")

    if not fails:
        monkeypatch.setattr(PayloadReader, "open", refuse)
    with Compute(task, url, topic_in="in", topic_out="out", group="g", retries=0, gate_in=gate) as compute:
        compute.run()
        assert compute.counters["unknown_source"] == compute.counters["dead_letter"] == 0
    assert not letters_of(url, "in", "g")


def test_a_payload_that_the_store_could_not_hold_is_refused(url: str, tmp_path: Path) -> None:
    with DataSource([np.zeros(5 << 20, np.uint8), 1], f"{url}?size_mb=4", source_id="a", topic="in", routing="lazy") as source:
        with pytest.raises(TooLarge, match="size_mb"):
            next(source)
        next(source)
    with Compute(lambda a: np.zeros(5 << 20, np.uint8), f"{url}?size_mb=4", topic_in="in", topic_out="out", routing="lazy") as compute:
        assert next(compute) is None and compute.counters["dead_letter"] == 1
    assert segments(tmp_path) == []


def test_a_dead_letter_leaves_out_what_the_store_could_not_hold(url: str) -> None:
    for name in "ab":
        with DataSource(
            [np.zeros(3 << 20, np.uint8), np.zeros(1 << 20, np.uint8)],
            f"{url}?size_mb=4",
            source_id=name,
            topic="in",
            routing="lazy",
            event_time=lambda a: a.size,
        ) as source:
            source.run()

    def fails(a: Any, b: Any) -> None:
        raise ValueError("no")

    with Compute(fails, f"{url}?size_mb=4", topic_in="in", topic_out="out", join="exact", retries=0, group="g") as compute:
        compute.run(until="end")
        assert compute.counters["dead_letter"] == 4
    large, small = sorted(letters_of(url, "in", "g"), key=lambda letter: len(letter.frames))
    assert large.frames == [] and "left out" in large.error and large.source_ids == ["a", "b"]
    assert len(small.frames) == 2 and small.error == "ValueError: no"


def test_a_payload_that_is_gone_is_a_named_dead_letter(url: str, tmp_path: Path) -> None:
    send(url, "a", 2)
    for path in segments(tmp_path):
        path.unlink()
    with Compute(lambda a: 1, url, topic_in="in", topic_out="out") as compute:
        compute.run(until="end")
        assert compute.counters["payload_gone"] == 2 and compute.counters["sent"] == 0


def test_replicas_get_the_payloads_themselves(url: str, tmp_path: Path) -> None:
    ran: list[set[int]] = [set(), set()]
    together = threading.Barrier(2, timeout=60)

    def replica(number: int) -> Compute:
        def both(a: Any, b: Any) -> Any:
            if not ran[number]:
                together.wait()  # each has one
            assert (a == a[0, 0]).all() and (b == a[0, 0] + 100).all()
            ran[number].add(int(a[0, 0]))
            return a

        options: dict[str, Any] = {"join": "exact", "output_id": "pair", "group": "g", "routing": "lazy"}
        return Compute(both, url, worker_id=f"w{number}", topic_in="in", topic_out="out", **options)

    with running(replica(0), replica(1)):
        send(url, "a", 40)
        send(url, "b", 40, seed=100)
    assert ran[0] | ran[1] == set(range(40))
    seen: list[int] = []
    with Materialize(lambda v: seen.append(int(v.max())), url, topic="out") as sink:
        sink.run(until="end")
    assert sorted(seen) == list(range(40))


def test_partitions_of_a_join_by_what_is_in_the_payload(url: str, tmp_path: Path) -> None:
    send(url, "a", 30)
    send(url, "b", 30)
    options: dict[str, Any] = {"join": "latest", "by": lambda image: int(image[0, 0]), "partitions": 4, "routing": "lazy"}
    with Compute(lambda a, b: np.concatenate([a, b]), url, topic_in="in", topic_out="out", **options) as compute:
        compute.run(until="end")
    seen: list[int] = []
    with Materialize(lambda v: seen.append(int(v[0, 0])) if (v == v[0, 0]).all() else None, url, topic="out") as sink:
        sink.run(until="end")
    assert sorted(seen) == list(range(30))
    assert segments(tmp_path) == []


def test_a_consumer_that_drops_all_leaves_nothing(url: str, tmp_path: Path) -> None:
    send(url, "a", 3)
    assert segments(tmp_path)
    with Compute(lambda a: 1, url, topic_in="in", topic_out="out", drop_if_older_than_ms=0) as compute:
        compute.run(until="end")
        assert compute.counters["late"] == 3
    assert segments(tmp_path) == []


def test_a_member_whose_claim_expired_still_looks_at_what_it_had(url: str, tmp_path: Path) -> None:
    seen: list[int] = []

    def slow(a: Any) -> None:
        if len(seen) == 0:
            # Another member gets the message, and settles it, and its memory would be used again.
            seen.append(int(a[0, 0]))
            with Compute(lambda a: 1, url, worker_id="other", **options) as other:
                while other.counters["settled"] < 1:
                    next(other)
            for _ in range(8):
                next(source)
            seen.append(int(a.max()))

    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "group": "g", "ack_timeout_ms": 50}
    with (
        DataSource((image(n + 1) for n in range(9)), url, source_id="a", topic="in", routing="lazy") as source,
        Compute(slow, url, worker_id="one", timeout_ms=1_000, **options) as one,
    ):
        assert source._payloads.writer is not None
        source._payloads.writer._limit_bytes = 4 * slot_bytes_for(SIZE)
        next(source)
        next(one)
    assert seen == [1, 1]


def test_small_payloads_travel_with_their_messages(url: str, tmp_path: Path) -> None:
    with DataSource([b"x" * 1_000, "y", np.arange(10)], url, source_id="a", topic="in", routing="lazy") as ds:
        ds.run()
    assert segments(tmp_path) == []


def test_every_group_gets_every_payload(url: str, tmp_path: Path) -> None:
    seen: list[list[int]] = [[], []]
    with (
        Materialize(lambda v: seen[0].append(int(v[0, 0])), url, topic="in", group="one") as one,
        Materialize(lambda v: seen[1].append(int(v[0, 0])), url, topic="in", group="two") as two,
    ):
        send(url, "a", 5)
        one.run(until="end")
        two.run(until="end")
    assert seen == [list(range(5))] * 2
    assert segments(tmp_path) == []


def test_who_has_always_something_to_do_removes_what_others_left(url: str, tmp_path: Path) -> None:
    with DataSource([image(0)], url, source_id="a", topic="old", routing="lazy") as source:
        source.run()
    with DataSource([1, 2], url, source_id="a", topic="in") as source:
        source.run()
    transport = connect(url)  # of no node: it removes nothing when it goes
    transport.delete_topic("old")
    disconnect(transport)
    with Compute(lambda a: a, url, topic_in="in", topic_out="out") as compute:
        assert segments(tmp_path)
        next(compute)
        assert segments(tmp_path) == []


def test_who_waits_keeps_no_memory_that_is_gone(url: str, tmp_path: Path) -> None:
    def mapped() -> bool:
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        return any(f"{tmp_path}/payloads/" in line and ".payloads" in line for line in lines)

    send(url, "a", 2)
    with Compute(lambda a: None, url, topic_in="in", topic_out="out", timeout_ms=50) as compute:
        next(compute)
        assert mapped()

        def waits() -> bool:
            with contextlib.suppress(ReceiveTimeout):
                next(compute)
            return not mapped()

        until(waits)
    assert segments(tmp_path) == []


@pytest.mark.parametrize("what", ["edgeserve.stage.payloads.make_payload_directory", "edgeserve.stage.payloads.PayloadWriter.put"])
def test_what_cannot_be_kept_now_travels_with_its_message(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(what, refuse)
        source = DataSource((image(n) for n in range(3)), url, source_id="a", topic="in", routing="lazy").__enter__()
        next(source)
        next(source)
    assert segments(tmp_path) == [] and stored_bytes(url, "in") > 2 * SIZE
    monkeypatch.setattr(source._payloads, "_again_at", 0.0)  # a second later
    source.run()
    source.close()
    assert len(segments(tmp_path)) == 1 and stored_bytes(url, "in") < 2.5 * SIZE
    assert [record.message.count("travel with their messages") for record in caplog.records if record.levelname == "WARNING"] == [1]
    seen: list[int] = []
    with Materialize(lambda v: seen.append(int(v[0, 0])), url, topic="in") as sink:
        sink.run(until="end")
    assert seen == [0, 1, 2]


def test_memory_that_others_may_write_to_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGESERVE_PAYLOAD_DIR")
    monkeypatch.setattr("edgeserve.payload.place._SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm" / f"edgeserve-{os.getuid()}").mkdir(parents=True, mode=0o777)
    os.chmod(tmp_path / "shm" / f"edgeserve-{os.getuid()}", 0o777)
    with pytest.raises(ValueError, match="EDGESERVE_PAYLOAD_DIR"), DataSource([b"x"], url, source_id="a", topic="in", routing="lazy"):
        pass
