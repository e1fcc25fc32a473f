"""The stage without a join: one message in, its results out, settled together. Tasks of one parameter, and sinks."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any, TypeAlias

from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ClosedError, MessageError, UnknownSource
from edgeserve.core.message import Header, Kind
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.base import CONTROL, Options, Raised, Stage, subscribe
from edgeserve.stage.context import CURRENT
from edgeserve.stage.control import Control
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.emit import Frames
from edgeserve.stage.ends import Ends
from edgeserve.stage.linger import NO_ROOM
from edgeserve.stage.payloads import LAZY_BYTES
from edgeserve.stage.retry import GaveUp, GoesBack, try_again
from edgeserve.stage.settle import MOST_PENDING, OLDEST_PENDING_NS, Pending, settle_at_last
from edgeserve.stage.shed import Shedding, Shelf
from edgeserve.stage.sources import SourceClock
from edgeserve.transport import ClaimLost, Delivery, Frame, Subscription, Transport

_WORTH, _SLOW_NS = 4, 25_000_000
"""While more are ready, `run()` settles no fewer than these together, unless the first of them has waited for so long."""

_PAUSE_NS = 2_000_000_000

Perform: TypeAlias = Callable[[Header, "bytes | memoryview", "int | None"], tuple[Any, "Frame | Frames | None"]]
"""(header, payload, watermark) to (result, what is published); raises what the user's function raises."""


class Direct(Stage):
    """Receives, admits, runs and settles one message after the other.

    Subclasses say what is done with one (`_make_perform`) and which source they take (`_source`; None: any).
    """

    _source: str | None = None
    _topic_out: str | None = None
    _kind = Kind.DATA

    def __init__(self, options: Options, control: Control, counts: Counters) -> None:
        super().__init__(options, control, counts)
        self._known = RecentIds()
        self._clocks: dict[str, SourceClock] = {}
        self._in_order = False
        self._newest = -1
        self._paused_ns = 0
        self._read: dict[str, int] = {}
        self._pending: Pending
        self._ends: Ends
        self._step: Callable[[Delivery], Any]

    @abstractmethod
    def _make_perform(self) -> Perform:
        """The function that takes one message from payload to result."""

    def _prepare(self) -> None:
        """Whatever else has to be opened; called when the group is joined and its ids are known."""

    def _end_frame(self, of: bytes) -> Frame | None:
        """What is published when all sources have ended. `of`: the id of the last one's end."""
        return None

    def _failed(self, header: Header) -> None:
        """The message was given up."""

    # --- what a node calls --------------------------------------------------------------------------------------

    def open(self, transport: Transport) -> None:
        self._transport = transport
        self._subscription = subscribe(transport, self.options, self._control)
        try:
            self._known.update(self._subscription.settled_ids())
            self._ends = Ends(self._subscription.attributes())
            self._prepare()
        except BaseException:
            self._subscription.close()
            raise
        self._pending = Pending(
            self._subscription, self._topic_out, self._known, self._counts, self.options.name, self._control, self.options.payloads
        )
        self._step = self._make_step()
        if (keep := self.options.keep) is not None:
            shelf = Shelf(keep, self._source, self._known.__contains__)
            self._shedding = Shedding(
                *(self._subscription, self.options.topics[0], shelf, keep, self._counts, self._note_shed),
                self.options.ack_timeout_ms / 1000,
            )

    def _note_shed(self, ids: Sequence[bytes], sources: Iterable[str]) -> None:
        """From the thread that receives: single steps, each of which another thread sees whole."""
        self._known.new.update(ids)
        for source in sources:
            self._clocks.setdefault(source, SourceClock())

    def next(self) -> Any:
        timeout = self.options.timeout_ms
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        ready, pending = self._ready, self._pending
        token = CURRENT.set(self.current)
        try:
            while True:
                if not ready:
                    pending.settle()
                    if self._ends.held:
                        self._write_ends()
                    if self.leaves() or not self._await(deadline):
                        raise StopIteration
                now_ns = monotonic_ns()
                if now_ns > self._paused_ns:
                    self._look_again()
                self._paused_ns = now_ns + _PAUSE_NS
                if (now_ns > self._stale_ns or pending.lost) and self._renew():
                    continue
                delivery = ready.pop()
                if not pending.positions:
                    pending.since_ns = now_ns
                try:
                    result = self._step(delivery)
                except BaseException:
                    ready.append(delivery)
                    raise
                if not ready or pending.urgent:
                    pending.settle()
                elif pending.linger.asleep:
                    pending.linger.nudge()
                if result is CONTROL:
                    self._write_ends()
                    continue
                if type(result) is Raised:
                    raise result.error
                return result
        finally:
            CURRENT.reset(token)

    def run(self, until: str | None) -> None:
        token = CURRENT.set(self.current)
        self._begin_run(until)
        self._pending.owner_runs(True)
        try:
            while not self._control.stop:
                if not self._ready:
                    self._pending.settle()
                    if self._ends.held:
                        self._write_ends()
                    if (self._until_end and self.has_ended()) or self.leaves() or not self._await(None):
                        break
                self._run_batch()
        except GoesBack:
            pass  # told to end in the pause before a retry
        finally:
            CURRENT.reset(token)
            self._end_run()
            self._pending.settle()
            if self._ends.held:
                self._write_ends()
            self._pending.owner_runs(False)

    def _run_batch(self) -> None:
        """Steps through what is ready. This loop is where the throughput is made or lost."""
        ready, pending, step, control = self._ready, self._pending, self._step, self._control
        pop, positions, settle = ready.pop, pending.positions, pending.settle
        if len(ready) > 1 and pending.linger.asleep:
            pending.linger.nudge()
        pending.since_ns = since = monotonic_ns()
        if (since > self._stale_ns or pending.lost) and self._renew():
            return
        while ready:
            delivery = pop()
            try:
                result = step(delivery)
            except BaseException:
                ready.append(delivery)
                raise
            age_ns = monotonic_ns() - since
            if age_ns > _PAUSE_NS and type(result) is not Raised:
                self._look_again()
            if (
                (age_ns > OLDEST_PENDING_NS and (len(positions) >= _WORTH or age_ns > _SLOW_NS))
                or len(positions) >= MOST_PENDING
                or pending.urgent
            ):
                settle()
                pending.since_ns = since = monotonic_ns()
                if (since > self._stale_ns or pending.lost) and type(result) is not Raised and self._renew():
                    return
            if type(result) is Raised:
                raise result.error
            if control.stop:
                return

    def flush(self) -> None:
        self._pending.settle()
        self._subscription.flush()

    def close(self) -> None:
        self._pending.close()
        try:
            settle_at_last(self._pending)
        finally:
            try:
                if self._shedding is not None:
                    self._shedding.close()
                # What is done and could not be settled comes again, to whoever looks into the journal of this sink.
                self._subscription.close(worked_on=len(self._pending) > 0)
            finally:
                self._aside.close()

    def totals(self) -> dict[str, int]:
        shed = 0 if self._shedding is None else self._shedding.shed
        return {"received": self.received + shed, "settled": self._pending.settled + shed, "sent": self._pending.results}

    def explain(self) -> dict[str, Any]:
        return {"sources": {source: {"ended": clock.ended} for source, clock in self._clocks.items()}}

    # --- receive, admit -----------------------------------------------------------------------------------------

    def _admit_batch(self, batch: Sequence[Delivery]) -> None:
        subscription, topic, first = self._subscription, batch[0][4], batch[0][1]
        alone = subscription.alone
        read = self._read
        if len(self.options.topics) == 1:
            read[topic] = max(read.get(topic, 0), batch[-1][1] + 1)
        else:
            for _, position, _, _, name in batch:
                read[name] = max(read.get(name, 0), position + 1)
        if self._known.wants_to_turn:
            self._known.turn(read, subscription.floor)
        if not alone or not subscription.knows_all_ids:
            self._known.update(subscription.settled_ids())
        if self._topic_out is not None:
            # A watermark is passed on only while no other member holds older messages, and none of ours has gone back.
            before = self._newest if self._in_order else -1
            self._in_order = alone and len(self.options.topics) == 1 and subscription.in_order(topic, first, before)
            self._newest = batch[-1][1]

    def _renew(self) -> bool:
        """What is ready was claimed so long ago that others may have it by now. Gives back what they have not, to be claimed anew; False:
        there are no others, so it is still this member's."""
        pending, subscription, ready = self._pending, self._subscription, self._ready
        pending.settle()
        # This asks, so it is known then who else there is.
        self._known.update(subscription.settled_ids())
        if subscription.alone and not pending.lost:
            self._set_stale()
            return False
        pending.lost = False
        held: dict[str, list[int]] = {}
        for _, position, _, _, topic in reversed(ready):
            held.setdefault(topic, []).append(position)
        self._fetched -= len(ready)
        ready.clear()
        for topic, positions in held.items():
            _give_back(subscription, topic, positions)
        self._learn()
        return True

    def _look_again(self) -> None:
        """Nobody has stepped for so long that this process may have stood still, and others may have done what is ready, and what is done
        here and not published: that would come behind the end of its round."""
        self._subscription.flush()
        others = self._subscription.settled_ids()
        self._pending.leave_out(set(others))
        self._known.update(others)

    def _learn(self) -> None:
        """Takes over what other members are known to have done, beyond what they have settled."""

    def _make_step(self) -> Callable[[Delivery], Any]:
        """The function that takes one delivered message to its settlement. A closure: its names cost least there."""
        perform, known, current, pending, clocks = self._make_perform(), self._known, self.current, self._pending, self._clocks
        keep_frames, keep_id, keep_topic, keep_position = (
            pending.frames.append,
            pending.ids.append,
            pending.topics.append,
            pending.positions.append,
        )
        only, max_age_ns, ends, now_ns, data = self._source, self._max_age_ns, self._ends, time.time_ns, int(self._kind)

        def step(delivery: Delivery) -> Any:
            frame, position, published_ns, deliveries, topic = delivery
            try:
                header, payload = decode_frame(frame)
            except MessageError as exc:
                return self._refuse(delivery, None, exc)
            if header.kind != data:
                return self._control_message(delivery, header)
            id_, source = header.id, header.source_id
            if only is not None and source != only:
                unknown = UnknownSource(f"source {source!r} is not a parameter of {self.options.name!r}, which takes {only!r}")
                return self._refuse(delivery, header, unknown)
            clock = clocks.get(source)
            if clock is None:
                clock = clocks[source] = SourceClock()
            if id_ in known.new or id_ in known.old:
                if not clock.ended:  # what came twice is no new beginning of a source that has ended
                    clock.observe(header, position, published_ns)
                return self._drop(delivery, header, Reason.DUPLICATE, None)
            watermark_ns = clock.observe(header, position, published_ns)
            if ends.ended and source in ends.ended:
                self._reopen(source, topic, position)
            if max_age_ns is not None and now_ns() - published_ns > max_age_ns:
                if header.size >= LAZY_BYTES:
                    self.options.payloads.seen(header)
                return self._drop(delivery, header, Reason.LATE, id_)
            current.headers = header
            current.redelivered = deliveries > 0
            outcome = None
            try:
                result, produced = perform(header, payload, watermark_ns)
            except Exception as exc:
                result, produced, outcome = self._retry(delivery, header, partial(perform, header, payload, watermark_ns), exc)
            known.new.add(id_)
            if produced is not None and type(produced) is not bytes:
                pending.urgent = True
            keep_frames(produced)
            keep_id(id_)
            keep_topic(topic)
            keep_position(position)
            return result if outcome is None else outcome

        return step

    def _keep(self, delivery: Delivery, id_: bytes | None) -> None:
        """Decides a message without results."""
        pending = self._pending
        if id_ is not None:
            self._known.new.add(id_)
        pending.frames.append(None)
        pending.ids.append(id_)
        pending.topics.append(delivery[4])
        pending.positions.append(delivery[1])

    def _drop(self, delivery: Delivery, header: Header, reason: str, id_: bytes | None) -> None:
        self._counts.count(reason, edge=header.source_id)
        self._keep(delivery, id_)

    def _refuse(self, delivery: Delivery, header: Header | None, error: MessageError) -> None:
        """Counts and puts aside what cannot be taken as a message for this stage."""
        frame, position, _, _, topic = delivery
        id_ = None if header is None else header.id
        if id_ is not None and id_ in self._known:
            self._counts.count(Reason.DUPLICATE, edge=topic)
            self._keep(delivery, None)
            return
        aside = self._aside.record(topic, [frame], [header], error)  # or the message goes back, and is not counted
        self._counts.count(error.reason, edge=topic)  # by topic: strangers may have any number of source ids
        self._pending.aside(topic, position, *aside)
        self._keep(delivery, id_)

    def _retry(
        self, delivery: Delivery, header: Header, attempt: Callable[[], tuple[Any, Frame | Frames | None]], error: Exception
    ) -> tuple[Any, Frame | Frames | None, Raised | None]:
        """Tries again, and in the end puts the message aside."""
        o = self.options
        if isinstance(error, ClosedError) and self._control.closing.is_set():
            raise error
        try:
            return *try_again(error, attempt, retries=o.retries, backoff_s=o.retry_backoff_ms / 1000, control=self._control), None
        except GaveUp as exc:
            gave_up = exc
        try:
            _, position, _, _, topic = delivery
            self._pending.aside(topic, position, *self._give_up(delivery, header, gave_up))
            self._failed(header)
            return None, None, Raised(gave_up.error) if o.on_error == "raise" else None
        finally:
            del gave_up  # its traceback holds this frame, and what the task looked at would stay until the next collection

    def _give_up(self, delivery: Delivery, header: Header, error: GaveUp) -> tuple[str, Frame]:
        """Counts a message that is given up; (topic, frame) of its record."""
        aside = self._aside.record(delivery[4], [delivery[0]], [header], error)
        self._counts.count(error.reason, edge=header.source_id)
        return aside

    # --- ends ---------------------------------------------------------------------------------------------------

    def _control_message(self, delivery: Delivery, header: Header) -> Any:
        _, position, _, _, topic = delivery
        self._controls += 1
        if header.kind == Kind.END and (self._source is None or header.source_id == self._source):
            self._clocks.setdefault(header.source_id, SourceClock()).end(header, position)
            self._ends.hold((topic, position, header.source_id), header.id)
        else:
            self._pending.controls.add((topic, position))
            self._keep(delivery, None)
        return CONTROL

    def _reopen(self, source: str, topic: str, position: int) -> None:
        self._ends.learn(self._subscription.attributes())  # perhaps it has begun, and ended, since this member looked
        attributes = self._ends.reopening(source, topic, position)
        if attributes:
            self._pending.write_control({}, {}, attributes)
            self._ends.learn(attributes)

    def _write_ends(self) -> None:
        """Acknowledges ends that all before is settled of; with the last source's end publishes our own."""
        ends = self._ends
        if not ends.held or self._pending.positions:
            return
        ends.learn(self._subscription.attributes())  # one that another member has recorded may come again
        for entry in list(ends.held):
            topic, position, source = entry
            if self._subscription.floor(topic) < position:
                continue
            attributes: dict[str, bytes] = {}
            outputs: dict[str, list[Frame]] = {}
            self._known.update(self._subscription.settled_ids())
            id_ = ends.ids[entry]
            ended = self._ends_there(source) and ends.is_last(entry) and not ends.has_recorded(entry)
            if ended:
                attributes = ends.recording(source, topic, position)
                # Also where it had ended before: what stands between the two may have gone to other members before the first was recorded.
                # One that was stored twice, or sent on by two members, is recorded where it stands last, and sent on once.
                frame = None if id_ in self._known else self._end_frame(id_)
                if frame is not None and self._topic_out is not None:
                    outputs[self._topic_out] = [frame]
            try:
                self._pending.write_control({topic: [position]}, outputs, attributes, [id_] if ended else ())
            except ClaimLost:
                ends.let_go(entry)  # whoever has it by now records it
            else:
                if ended:
                    self._known.new.add(id_)
                ends.written(entry, ended=ended)

    def _ends_there(self, source: str) -> bool:
        """Whether a source has sent nothing since the end that is held."""
        return self._clocks[source].ended

    def _sources(self) -> list[str]:
        return list(self._clocks) if self._source is None else [self._source]

    def _never_seen(self) -> list[str]:
        return [source for source in self._sources() if source not in self._clocks and source not in self._ends.ended]

    def has_ended(self) -> bool:
        if self._ready or self._pending.positions:
            return False
        self._look_whether_fed()
        return self._have_ended(self._ends, self._sources())

    def _idle(self) -> bool:
        """Between waits: an end may have become due, or another member may have recorded one."""
        if self._ends.held:
            self._write_ends()
        # Not only while there are others: the one that recorded an end may have left since.
        self._ends.learn(self._subscription.attributes())
        return self._until_end and self.has_ended()


def _give_back(subscription: Subscription, topic: str, positions: list[int]) -> None:
    """Gives back those that are still this member's."""
    while positions:
        try:
            subscription.nack(topic, positions)
            return
        except ClaimLost as lost:
            kept = [p for p in positions if p not in lost.positions]
            positions = kept if len(kept) < len(positions) else []
        except NO_ROOM:
            return  # they come again when their time is up


__all__ = ("Direct", "Perform")
