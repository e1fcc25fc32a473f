"""The stage's parts, each on its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from edgeserve.core.codec import encode_frame
from edgeserve.core.errors import ClosedError, ConfigurationError, ForeignMessage, PayloadMismatch, SendError, StoreFull, TransportError
from edgeserve.core.message import WATERMARK_END, Header, Kind, TimeKind
from edgeserve.core.metrics import Counters
from edgeserve.stage.collector import rare_collections
from edgeserve.stage.control import Control
from edgeserve.stage.deadletter import Asides, DeadLetter, encode_dead_letter, read_dead_letter
from edgeserve.stage.decisions import Record, decision_topic, read_decision
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.ends import Ends
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.retry import GaveUp, try_again
from edgeserve.stage.send import BATCH_FRAMES, Sender
from edgeserve.stage.settle import Pending
from edgeserve.stage.sources import SILENT_NS, SourceClock
from edgeserve.stage.task import DEFERRED, Several, Task
from edgeserve.stage.unseen import AGAIN_S, FIRST_S, Unseen
from edgeserve.transport import ClaimLost, Frame

# --- duplicates -------------------------------------------------------------------------------------------------


def test_recent_ids_keep_at_least_a_generation_and_at_most_two() -> None:
    ids = RecentIds(generation=10)
    names = [b"%d" % n for n in range(35)]
    ids.update(names)
    ids.turn()
    assert all(name in ids for name in names[-10:])
    assert len(ids) <= 20
    ids.discard(names[-1:])
    assert names[-1] not in ids


def test_ids_since_the_oldest_unsettled_input_are_kept() -> None:
    ids, floor = RecentIds(generation=10), 3
    names = [b"%d" % n for n in range(100)]
    for at in range(0, 60, 5):
        ids.update(names[at : at + 5])
        ids.turn({"t": at + 5}, lambda _: floor)
    assert all(name in ids for name in names[:60])
    floor = 25
    for at in range(60, 70, 5):
        ids.update(names[at : at + 5])
        ids.turn({"t": at + 5}, lambda _: floor)
    assert all(name in ids for name in names[25:70])
    assert not any(name in ids for name in names[:20])


def test_what_was_settled_before_the_start_is_kept_until_it_is_known_where_that_was() -> None:
    names = [b"%d" % n for n in range(100)]
    ids = RecentIds(names[:45], generation=10)
    ids.turn({"t": 50}, lambda _: 40)
    assert all(name in ids for name in names[:45])
    ids.update(names[45:60])
    ids.turn({"t": 60}, lambda _: 50)
    assert not any(name in ids for name in names[:40])
    assert all(name in ids for name in names[40:60])


def test_ids_are_bounded_though_an_input_stays_unsettled(caplog: pytest.LogCaptureFixture) -> None:
    ids = RecentIds(generation=10, most=50)
    names = [b"%d" % n for n in range(1000)]
    for at, name in enumerate(names):
        ids.update([name])
        ids.turn({"t": at + 1}, lambda _: 0)
    assert len(ids) <= 50
    assert all(name in ids for name in names[-40:])
    assert len(caplog.records) == 1 and "stayed unsettled" in caplog.text


# --- retry ------------------------------------------------------------------------------------------------------


def test_trying_again_is_bounded_and_keeps_the_last_error() -> None:
    errors = iter([ValueError("second"), ValueError("third")])

    def attempt() -> None:
        raise next(errors)

    with pytest.raises(GaveUp) as caught:
        try_again(ValueError("first"), attempt, retries=2, backoff_s=0, control=Control())
    assert (str(caught.value.error), caught.value.attempts, caught.value.reason) == ("third", 3, "dead_letter")


def test_what_cannot_help_is_not_tried_again() -> None:
    with pytest.raises(GaveUp) as caught:
        try_again(PayloadMismatch("no"), lambda: 1, retries=5, backoff_s=60, control=Control())
    assert (caught.value.attempts, caught.value.reason) == (1, "schema")


def test_closing_ends_the_pause() -> None:
    control = Control()
    control.closing.set()
    with pytest.raises(ClosedError):
        try_again(ValueError(), lambda: 1, retries=1, backoff_s=60, control=control)
    control = Control()
    threading.Timer(0.05, setattr, (control, "stop", True)).start()
    with pytest.raises(ClosedError):
        try_again(ValueError(), lambda: 1, retries=1, backoff_s=60, control=control)


# --- tasks ------------------------------------------------------------------------------------------------------


def test_keyword_only_and_positional_only_parameters() -> None:
    def task(a: int, /, b: int, *, c: int) -> tuple[int, int, int]:
        return a, b, c

    made = Task(task, what="Compute", named=True)
    assert made.parameters == ("a", "b", "c")
    assert made.call(1, 2, 3) == (1, 2, 3)
    assert made.annotations == {"a": int, "b": int, "c": int}


def test_an_annotation_that_cannot_be_resolved_is_named() -> None:
    def task(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    with pytest.raises(ConfigurationError, match="'Missing' of parameter 'a'"):
        Task(task, what="Compute", named=True)


def test_sinks_may_be_built_ins_and_classes_may_not() -> None:
    assert Task(print, what="Materialize", named=False).call is print
    with pytest.raises(ConfigurationError, match="instance"):
        Task(dict, what="Materialize", named=False)


def test_generators_and_coroutines_are_run_to_their_end() -> None:
    async def later(_: Any) -> Any:
        return several()

    def several() -> Any:
        yield 1
        yield None
        yield 2

    made = Task(later, what="Compute", named=False)
    value = made.call(0)
    assert type(value) in DEFERRED
    assert made.finish(value) == Several([1, 2])
    made.open()
    made.close()


# --- sources ----------------------------------------------------------------------------------------------------


def header(producer: str, watermark_ns: int | None = None, *, kind: Kind = Kind.DATA, computed: bool = False) -> Header:
    time_kind = TimeKind.COMPUTED if computed else TimeKind.DEVICE
    return Header(b"i" * 16, "s", producer, 0, 0, 0, watermark_ns=watermark_ns, kind=kind, time_kind=time_kind)


def test_a_source_promises_what_all_its_live_producers_promise() -> None:
    clock = SourceClock()
    assert clock.observe(header("p"), 0, 0) is None
    assert clock.observe(header("p", 10), 1, 0) == 10
    assert clock.observe(header("p", 5), 2, 0) == 10
    assert clock.observe(header("q", 50), 3, 0) == 10
    assert clock.observe(header("p", 40), 4, 0) == 40
    clock.end(header("p", kind=Kind.END), 5)
    assert clock.observe(header("q", 60), 6, 0) == 60


def test_a_silent_producer_that_was_replaced_no_longer_holds_back() -> None:
    clock = SourceClock()
    clock.observe(header("old", 10), 0, 0)
    assert clock.observe(header("new", 50), 1, 1) == 10
    assert clock.observe(header("new", 60), 2, SILENT_NS + 1) == 60


def test_a_source_has_ended_when_its_producers_have() -> None:
    clock = SourceClock()
    clock.observe(header("p"), 0, 0)
    clock.observe(header("q"), 1, 0)
    clock.observe(header("p"), 2, 0)
    assert not clock.end(header("q", kind=Kind.END), 3)
    assert clock.end(header("p", kind=Kind.END), 4)


def test_a_killed_producer_does_not_hold_back_the_end_of_its_successor() -> None:
    clock = SourceClock()
    clock.observe(header("killed"), 0, 0)
    clock.observe(header("again"), 1, 0)
    assert clock.end(header("again", kind=Kind.END), 2)


def test_the_end_of_one_member_is_the_end_of_its_group() -> None:
    clock = SourceClock()
    for position, producer in enumerate("pqpq"):
        clock.observe(header(producer, computed=True), position, 0)
    assert clock.end(header("p", kind=Kind.END, computed=True), 4)


def test_an_ended_source_opens_again_with_a_later_message_only() -> None:
    clock = SourceClock()
    clock.observe(header("p", 10), 0, 0)
    clock.end(header("p", kind=Kind.END), 5)
    clock.observe(header("p", 10), 3, 0)
    assert clock.ended
    assert clock.observe(header("r", 20), 6, 0) == 20
    assert not clock.ended


def test_the_producers_of_a_source_are_not_remembered_for_ever() -> None:
    clock = SourceClock()
    for position in range(1000):
        clock.observe(header(f"p{position}", 1), position, 0)
    assert len(clock._producers) <= 64


# --- ends -------------------------------------------------------------------------------------------------------


def test_recorded_ends_reach_other_members_and_are_taken_back() -> None:
    one, two = Ends({}), Ends({})
    one.hold(("t", 7, "a"), bytes(16))
    two.learn(one.recording("a", "t", 7))
    one.written(("t", 7, "a"), ended=True)
    assert two.all_ended(["a"]) and not two.all_ended(["a", "b"])
    assert one.reopening("a", "t", 6) == {}
    two.learn(one.reopening("a", "t", 8))
    assert not two.all_ended(["a"])
    assert two.has_recorded(("t", 7, "a")) and not two.has_recorded(("t", 9, "a"))


def test_ends_as_an_older_store_has_them_are_read() -> None:
    ends = Ends({"end:a": b"", "end:b": Ends({}).recording("b", "t", 7)["^end:b"]})
    assert set(ends.ended) == {"b"}


def test_a_member_that_was_away_takes_no_later_end_back() -> None:
    away, other = Ends({}), Ends({})
    for ends in (away, other):
        ends.learn(ends.recording("a", "t", 7))
    other.learn(other.recording("a", "t", 12))
    other.learn(away.reopening("a", "t", 8))
    assert other.all_ended(["a"])


def test_who_reads_the_ends_of_a_round_again_knows_that_the_next_has_begun() -> None:
    holder = Ends({})
    holder.learn(holder.recording("a", "t", 5))
    holder.hold(("t", 7, "b"), bytes(16))
    attributes = holder.recording("a", "t", 5) | holder.reopening_all()
    late = Ends(attributes)
    assert not late.ended and late.has_recorded(("t", 5, "a")) and late.has_recorded(("t", 7, "b"))


def test_ends_found_at_the_start_are_not_believed_at_once() -> None:
    attributes = Ends({}).recording("a", "t", 7)
    late = Ends(attributes)
    assert late.ended and not late.all_ended(["a"])
    late.opened -= 60
    assert late.all_ended(["a"])


def test_what_was_never_seen_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now_s, missing = 100.0, ["a", "b"]
    unseen = Unseen("Compute 'fuse'", "t", lambda: missing, lambda: now_s)

    def lines_after(seconds: float) -> list[str]:
        nonlocal now_s
        now_s += seconds
        caplog.clear()
        unseen.look()
        return caplog.messages

    line = "Compute 'fuse' waits: it runs until the end, and has received nothing of 'a', 'b' on topic 't' yet"
    assert lines_after(FIRST_S - 1) == []
    assert lines_after(1) == [line]
    assert lines_after(AGAIN_S - 1) == []
    assert lines_after(1) == [line]
    missing.remove("a")
    assert lines_after(AGAIN_S) == [line.replace("'a', ", "")]
    missing.clear()
    assert lines_after(AGAIN_S) == []


# --- records ----------------------------------------------------------------------------------------------------


def test_dead_letters_are_read_back() -> None:
    letter = DeadLetter(reason="late", error="E", frames=[b"frame"], input_ids=["00"])
    frame = encode_dead_letter(letter)
    assert read_dead_letter(bytes(frame) if isinstance(frame, bytes) else b"".join(frame)) == letter


def test_other_messages_are_no_dead_letters_and_no_decisions() -> None:
    frame = encode_frame(header("p"), b"x")
    assert isinstance(frame, bytes)
    with pytest.raises(ForeignMessage):
        read_dead_letter(frame)
    with pytest.raises(ValueError, match="decision log"):
        read_decision(frame)


def test_a_dead_letter_says_what_the_inputs_were() -> None:
    topic, frame = Asides("Compute", "w", "g", EAGER).record("t", [b"f"], [None], ForeignMessage("what is this"))
    assert topic == "t.g.dead-letters" and decision_topic("t", "g") == "t.g.sets"
    letter = read_dead_letter(bytes(frame))  # type: ignore[arg-type]
    assert (letter.reason, letter.input_ids, letter.source_ids, letter.traceback) == ("foreign", [""], [""], "")


def test_records_are_small() -> None:
    assert Record([], [], []).held == []


# --- sending ----------------------------------------------------------------------------------------------------


EAGER = Payloads("s", "eager", None)


class FakePublisher:
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.batches: list[int] = []
        self.error: Exception | None = None
        self.published = threading.Event()

    def publish(self, frames: Sequence[Frame]) -> None:
        if self.error is not None:
            raise self.error
        self.frames += frames
        self.batches.append(len(frames))
        self.published.set()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def sender(publisher: FakePublisher, limit: int | None = None) -> Sender:
    return Sender(publisher, "s", Control(), limit, EAGER)  # type: ignore[arg-type]


def test_slow_traffic_goes_at_once_and_fast_traffic_in_batches() -> None:
    publisher = FakePublisher()
    sending = sender(publisher)
    append = sending.append()
    append(b"first")
    assert publisher.batches == [1]
    for number in range(5000):
        append(b"%d" % number)
    sending.close()
    assert publisher.frames == [b"first", *(b"%d" % n for n in range(5000))]
    assert max(publisher.batches) == BATCH_FRAMES
    assert sending.published == 5001


def test_a_tail_goes_without_another_call() -> None:
    publisher = FakePublisher()
    append = sender(publisher).append()
    append(b"first")
    publisher.published.clear()
    append(b"tail")
    assert publisher.published.wait(5)
    assert publisher.frames == [b"first", b"tail"]


def test_a_full_store_keeps_all_and_the_next_call_tries_again() -> None:
    publisher = FakePublisher()
    sending = sender(publisher)
    append = sending.append()
    publisher.error = StoreFull("full")
    buffer = bytearray(b"large")
    with pytest.raises(StoreFull):
        append([b"head", buffer])
    buffer[:] = b"reuse"  # the caller has its buffer back
    assert sending.full
    with pytest.raises(StoreFull):
        sending.check()
    publisher.error = None
    sending.check()
    append(b"next")
    sending.close()
    assert publisher.frames == [b"headlarge", b"next"]


def test_an_error_of_the_background_is_raised_by_the_next_call_and_nothing_is_lost() -> None:
    publisher = FakePublisher()
    sending = sender(publisher)
    append = sending.append()
    append(b"first")
    publisher.error = TransportError("the line is down")
    append(b"second")
    while sending.error is None:
        threading.Event().wait(0.001)
    publisher.error = None
    with pytest.raises(SendError, match="the line is down"):
        sending.check()
    sending.close()
    assert publisher.frames == [b"first", b"second"]


def test_what_the_engine_cannot_take_is_refused_before_it_is_kept() -> None:
    publisher = FakePublisher()
    sending = sender(publisher, limit=10)
    with pytest.raises(SendError, match="exceeds the 10"):
        sending.append()(b"x" * 11)
    sending.close()
    assert publisher.frames == []


def test_what_is_stored_when_the_wait_for_the_window_is_interrupted_is_not_sent_again() -> None:
    class Interrupted(FakePublisher):
        stored: Any = None

        def publish(self, frames: Sequence[Frame]) -> None:
            super().publish(frames)
            if len(self.batches) == 1:
                self.stored(frames, 0)
                raise KeyboardInterrupt

    publisher = Interrupted()
    sending = sender(publisher)
    with pytest.raises(KeyboardInterrupt):
        sending.append()(b"first")
    sending.close()
    assert publisher.frames == [b"first"] and sending.published == 1


# --- settling ---------------------------------------------------------------------------------------------------


class FakeSubscription:
    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, list[int]], dict[str, list[Frame]], list[bytes]]] = []
        self.errors: list[Exception] = []

    def settle(self, acks: Mapping[str, Sequence[int]], outputs: Any = None, *, ids: Sequence[bytes] = (), **rest: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.calls.append(({t: list(p) for t, p in acks.items()}, {t: list(f) for t, f in (outputs or {}).items()}, list(ids)))


def pending(subscription: FakeSubscription, known: RecentIds, counts: Counters) -> Pending:
    return Pending(subscription, "out", known, counts, "w", Control(), EAGER)  # type: ignore[arg-type]


def add(settlement: Pending, position: int, frame: Frame | None, id_: bytes, topic: str = "in") -> None:
    settlement.frames.append(frame)
    settlement.ids.append(id_)
    settlement.topics.append(topic)
    settlement.positions.append(position)


def test_inputs_results_and_ids_are_settled_together() -> None:
    subscription = FakeSubscription()
    settlement = pending(subscription, RecentIds(), Counters())
    add(settlement, 1, b"r1", b"i1")
    add(settlement, 2, None, b"i2")
    add(settlement, 9, [b"large", b"result"], b"i3", "other")
    settlement.aside("in", 2, "dead", b"letter")
    settlement.settle()
    settlement.settle()
    assert subscription.calls == [
        ({"in": [1, 2], "other": [9]}, {"out": [b"r1", [b"large", b"result"]], "dead": [b"letter"]}, [b"i1", b"i2", b"i3"])
    ]
    assert (settlement.results, settlement.settled, len(settlement)) == (2, 3, 0)


def test_inputs_that_another_member_has_are_left_out() -> None:
    subscription, known, counts = FakeSubscription(), RecentIds([b"i1", b"i2", b"i3"]), Counters()
    settlement = pending(subscription, known, counts)
    for position in (1, 2, 3):
        add(settlement, position, b"r%d" % position, b"i%d" % position)
    subscription.errors = [ClaimLost("in", [2])]
    settlement.settle()
    assert subscription.calls == [({"in": [1, 3]}, {"out": [b"r1", b"r3"]}, [b"i1", b"i3"])]
    assert counts.snapshot() == {"duplicate": 1}
    assert b"i2" not in known and b"i1" in known


def test_without_room_all_is_kept_and_written_later() -> None:
    subscription = FakeSubscription()
    settlement = pending(subscription, RecentIds(), Counters())
    buffer = bytearray(b"large")
    add(settlement, 1, [buffer], b"i1")
    subscription.errors = [StoreFull("full")]
    with pytest.raises(StoreFull):
        settlement.settle()
    buffer[:] = b"reuse"
    settlement.settle()
    assert subscription.calls == [({"in": [1]}, {"out": [b"large"]}, [b"i1"])]


def test_run_waits_for_room() -> None:
    subscription = FakeSubscription()
    settlement = pending(subscription, RecentIds(), Counters())
    settlement.owner_runs(True)
    add(settlement, 1, b"r", b"i1")
    subscription.errors = [StoreFull("full"), StoreFull("full")]
    settlement.settle()
    assert len(subscription.calls) == 1


def test_a_tail_is_settled_without_its_owner() -> None:
    subscription = FakeSubscription()
    settlement = pending(subscription, RecentIds(), Counters())
    add(settlement, 1, b"r", b"i1")
    settlement.linger.nudge()
    deadline = threading.Event()
    for _ in range(2000):
        if subscription.calls:
            break
        deadline.wait(0.005)
    settlement.close()
    assert len(subscription.calls) == 1


def test_the_thread_does_not_take_back_that_a_result_is_urgent() -> None:
    class Meanwhile(FakeSubscription):
        def settle(self, *args: Any, **rest: Any) -> None:
            super().settle(*args, **rest)
            if len(self.calls) == 1:
                settlement.urgent = True
                add(settlement, 2, [b"the task's own", b"buffers"], b"i2")

    subscription = Meanwhile()
    settlement = pending(subscription, RecentIds(), Counters())
    add(settlement, 1, b"r1", b"i1")
    settlement._write_tail()
    assert settlement.urgent
    assert len(settlement) == 1
    settlement.settle()
    assert not settlement.urgent
    assert len(settlement) == 0


def test_the_watermark_of_an_ended_source_is_the_end() -> None:
    clock = SourceClock()
    clock.observe(header("p", 3), 0, 0)
    clock.end(header("p", WATERMARK_END, kind=Kind.END), 1)
    assert clock.ended


def test_closing_sends_what_an_earlier_error_kept() -> None:
    publisher = FakePublisher()
    sending = sender(publisher)
    append = sending.append()
    append(b"first")
    publisher.error = TransportError("away")
    append(b"kept")
    while sending.error is None:
        threading.Event().wait(0.001)
    publisher.error = None
    sending.close()
    assert publisher.frames == [b"first", b"kept"]


# --- the garbage collector --------------------------------------------------------------------------------------


def test_the_collector_is_put_back_when_the_last_node_has_run() -> None:
    before = gc.get_threshold()
    with rare_collections():
        with rare_collections():
            assert gc.get_threshold()[0] > before[0]
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
    gc.set_threshold(0)
    try:
        with rare_collections():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
