"""The stage with a join: inputs are aligned into sets, sets are run, and the decision log says what became of every input.

An input stays unacknowledged until the policy has released it and every set with it is settled. One member of the group holds the join;
it owns the log's fence. Who takes over replays what is unacknowledged: inputs that have had their turn are restored as state, the others
are pushed again and make the same sets.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import monotonic_ns
from typing import Any

from edgeserve.align import Exact, JoinSet, Policy, Released
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import Fenced, JoinOverflow, MessageError, StandbyWarning, UnknownSource
from edgeserve.core.message import WATERMARK_END, Header, Kind
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.base import CONTROL, Ends, Options, Raised, Stage
from edgeserve.stage.context import CURRENT
from edgeserve.stage.control import Control
from edgeserve.stage.decisions import Decisions, Unit, decision_topic, last_record
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.linger import LINGER_NS, NO_ROOM
from edgeserve.stage.runset import Input, RunSet
from edgeserve.stage.settle import MOST_PENDING
from edgeserve.stage.skew import SkewWatch
from edgeserve.stage.sources import SourceClock
from edgeserve.transport import ClaimLost, Delivery, Frame, Transport

log = logging.getLogger("edgeserve")

_TELL_EVERY = 64
_NO_PROMISE = -(2**63)


class Join(Stage):
    """Runs a task of several parameters."""

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        run_set: RunSet,
        make_policy: Callable[[], Policy],
        topic_out: str,
    ) -> None:
        super().__init__(options, control, counts)
        self._parameters = run_set.parameters
        self._make_policy = make_policy
        self.current = run_set.current
        self._run_set, self._topic_out, self._topic = run_set, topic_out, options.topics[0]
        self._log_topic = decision_topic(self._topic, options.group)
        self._transport: Transport
        self._pending: Decisions | None = None
        self._ends: Ends
        self._until_end = False
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        """No state: what is held belongs to another member, or to none yet."""
        self._policy = self._make_policy()
        self._known = RecentIds()
        self._held: dict[int, Input] = {}
        self._restorable: dict[int, bytes] | None = None
        self._due: deque[JoinSet] = deque()
        self._clocks = {name: SourceClock() for name in self._parameters}
        self._marks: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._untold = 0
        self._skew = SkewWatch(self._policy, self.options.name)
        self._push: Callable[[Delivery], Any]

    # --- holding the join ---------------------------------------------------------------------------------------

    def open(self, transport: Transport) -> None:
        self._transport = transport
        self._subscription = self._subscribe(transport)
        self._run_set.open()
        self._ends = Ends(self._subscription.attributes())
        if self._subscription.active:
            self._take_over()
        else:
            self._stand_by()

    def _stand_by(self) -> None:
        message = (
            f"Compute {self.options.name!r} stands by: another member of group {self.options.group!r} holds the join of topic "
            f"{self._topic!r}. It takes over when that one goes; more members do not make a join faster in this release"
        )
        log.warning("%s", message)
        warnings.warn(message, StandbyWarning, stacklevel=2)

    def _take_over(self) -> None:
        """Becomes the holder: whoever was it before is refused from here on, and the log says what was decided."""
        fence = self._transport.fence(self._log_topic, f"{self.options.name}-{os.getpid()}")
        self._forget()
        self._known.update(self._subscription.settled_ids())
        record = last_record(self._transport, self._log_topic)
        self._restorable = None if record is None else dict(record.held)
        self._ends = Ends(self._subscription.attributes())
        for source in self._ends.ended:
            if source in self._clocks:
                self._clocks[source].ended = True
                self._mark(source, WATERMARK_END)
        self._pending = Decisions(
            self._subscription, fence, self._topic, self._topic_out, self._run_set.output_id, self.options.name, self._control.closing
        )
        self._pending.held = dict(self._restorable or {})
        self._push = self._make_push()

    def _stand_down(self, why: Exception) -> None:
        """Somebody else holds the join by now: what is held here is theirs."""
        log.warning("Compute %r lost the join of topic %r and begins anew: %s", self.options.name, self._topic, why)
        if self._pending is not None:
            self._pending.close()
            self._pending = None
        self._ready.clear()
        self._forget()
        self._subscription.close()
        self._subscription = self._subscribe(self._transport)
        self._ends = Ends(self._subscription.attributes())
        if not self._subscription.active:
            self._stand_by()

    # --- what a node calls --------------------------------------------------------------------------------------

    def next(self) -> Any:
        timeout = self.options.timeout_ms
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        token = CURRENT.set(self.current)
        try:
            while True:
                try:
                    outcome = self._step(deadline)
                    if outcome is not CONTROL:
                        self._settle_soon()
                except (Fenced, ClaimLost) as exc:
                    self._stand_down(exc)
                    continue
                if outcome is CONTROL:
                    continue
                if type(outcome) is Raised:
                    raise outcome.error
                return outcome
        finally:
            CURRENT.reset(token)

    def _settle_soon(self) -> None:
        pending = self._pending
        if pending is None or not pending.units:
            return
        if not (self._ready or self._due) or pending.urgent or len(pending.units) >= MOST_PENDING:
            pending.settle()
        elif pending.linger.asleep:
            pending.linger.nudge()

    def _step(self, deadline: float | None) -> Any:
        """Runs a set that is due if there is one, else takes one message. CONTROL: nothing that counts has happened."""
        if self._due:
            return self._run_due()
        due_ns = self._policy.next_due_ns()
        if due_ns is not None and (now_ns := time.time_ns()) >= due_ns:
            self._enqueue(self._policy.advance(now_ns))
            self._release()
            if self._due:
                return self._run_due()
            due_ns = self._policy.next_due_ns()
        if not self._ready:
            self._tell()
            if self._pending is not None:
                self._pending.settle()
                self._write_ends()
            if not self._due and not self._await(deadline, due_ns):
                if self._control.stop or self._control.closing.is_set() or (self._until_end and self._finished()):
                    raise StopIteration
            return CONTROL
        outcome = self._take()
        return self._run_due() if self._due else outcome

    def _take(self) -> Any:
        """Takes the next message that is ready."""
        pending = self._pending
        delivery = self._ready.pop()
        if pending is not None and not pending.units:
            pending.since_ns = monotonic_ns()
        try:
            outcome = self._push(delivery)
        except BaseException:
            self._ready.append(delivery)
            raise
        self._untold += 1
        if self._untold >= _TELL_EVERY:
            self._tell()
        return outcome

    def _run_due(self) -> Any:
        """Runs the first set that is due."""
        pending, due = self._pending, self._due
        if pending is None:  # lost since the set came due
            due.clear()
            return CONTROL
        if not pending.units:
            pending.since_ns = monotonic_ns()
        joined = due[0]
        # Sets that are due already may lie behind the watermark: no promise while there are any.
        promise = None
        if len(due) == 1 and len(self._marks) == len(self._parameters) and self._policy.next_due_ns() is None:
            promise = min(self._marks.values())
        outcome = self._run_set(joined, promise, self._dead_letter_of)
        due.popleft()
        self._decide(joined, outcome.set_id, outcome.frames, outcome.aside)
        if outcome.frames is not None and type(outcome.frames) is not bytes:
            pending.urgent = True
        return outcome.result

    def run(self, until: str | None) -> None:
        token = CURRENT.set(self.current)
        self._until_end = until == "end"
        try:
            while not self._control.stop:
                try:
                    self._run_some()
                except (Fenced, ClaimLost) as exc:
                    self._stand_down(exc)
                except StopIteration:
                    break
        finally:
            CURRENT.reset(token)
            self._until_end = False
            self._settle_at_end()

    def _run_some(self) -> None:
        """Steps through what is ready, settling now and then."""
        if not self._ready and self._pending is not None:
            self._tell()
            self._pending.settle_patiently()
        outcome = self._step(None)
        pending, control, ready, due, step, take, push_run = (
            self._pending,
            self._control,
            self._ready,
            self._due,
            self._step,
            self._take,
            self._run_due,
        )
        if pending is None:
            return
        if pending.linger.asleep:
            pending.linger.nudge()
        timed = self._policy.next_due_ns() is not None
        while True:
            if type(outcome) is Raised:
                pending.settle_patiently()
                raise outcome.error
            if len(pending.units) >= MOST_PENDING or pending.urgent or (pending.units and monotonic_ns() - pending.since_ns > LINGER_NS):
                pending.settle_patiently()
            if control.stop or not (ready or due):
                return
            if due:
                outcome = push_run()
            elif timed:
                outcome = step(None)
            else:
                outcome = take()
                timed = self._policy.next_due_ns() is not None

    def _settle_at_end(self) -> None:
        if self._pending is not None:
            try:
                self._pending.settle_patiently()
                self._write_ends()
            except (Fenced, ClaimLost) as exc:
                self._stand_down(exc)

    def flush(self) -> None:
        if self._pending is not None:
            self._pending.settle()
        self._subscription.flush()

    def close(self) -> None:
        pending = self._pending
        try:
            if pending is not None:
                pending.close()
                for attempt in range(4):
                    try:
                        pending.settle()
                        break
                    except NO_ROOM:
                        if attempt == 3:
                            raise
                        time.sleep(0.1)
        except (Fenced, ClaimLost) as exc:
            log.warning("Compute %r lost the join of topic %r while it closed: %s", self.options.name, self._topic, exc)
        finally:
            try:
                self._subscription.close()
            finally:
                self._run_set.close()

    def totals(self) -> dict[str, int]:
        pending = self._pending
        return {"received": self.received} | ({} if pending is None else {"settled": pending.settled, "sent": pending.results})

    def explain(self) -> dict[str, Any]:
        return {
            "holds_the_join": self._pending is not None,
            "sources": {source: asdict(report) for source, report in self._policy.explain().items()},
            "held": len(self._held),
            "due": len(self._due),
        }

    # --- receive, admit, align ----------------------------------------------------------------------------------

    def _admit_batch(self, batch: Sequence[Delivery]) -> None:
        if self._pending is None:
            self._take_over()
        self._known.turn()

    def _make_push(self) -> Callable[[Delivery], Any]:
        """The function that takes one delivered message into the policy. A closure: its names cost least there."""
        known, held, clocks, marks, policy = self._known, self._held, self._clocks, self._marks, self._policy
        push_item, drain, enqueue, release, refused = policy.push, policy.drain, self._enqueue, self._release, self._skew.look
        max_age_ns, now_ns, data, gated, told = self._max_age_ns, time.time_ns, int(Kind.DATA), self._run_set.gated, self._told
        drops_late = isinstance(policy, Exact)

        def push(delivery: Delivery) -> Any:
            frame, position, published_ns, deliveries, topic = delivery
            try:
                header, payload = decode_frame(frame)
            except MessageError as exc:
                return self._refuse(delivery, None, exc)
            if header.kind != data:
                return self._control_message(delivery, header)
            source, id_, stamp_ns = header.source_id, header.id, header.event_ns
            clock = clocks.get(source)
            if clock is None:
                return self._refuse(delivery, header, self._unknown(source))
            if deliveries and position in held:
                return None  # it came back to the member that has it
            watermark_ns = clock.observe(header, position, published_ns)
            if watermark_ns is not None:
                marks[source] = watermark_ns
            if told.get(source) == WATERMARK_END and not clock.ended:
                self._reopen(source, position)
            if id_ in known.new or id_ in known.old:
                return self._known_id(delivery, header, payload)
            if max_age_ns is not None and now_ns() - published_ns > max_age_ns:
                return self._drop(position, header, Reason.LATE)
            # The sender's own promise decides, and not what has been read of others: the same after every restart.
            if drops_late and header.watermark_ns is not None and stamp_ns < header.watermark_ns:
                return self._drop(position, header, Reason.LATE)
            item = Input(header, payload, position, frame, deliveries)
            if gated and not self._gate(delivery, item):
                return None
            known.new.add(id_)
            held[position] = item
            try:
                sets = push_item(source, stamp_ns, item, header.key)
            except JoinOverflow:
                del held[position]
                known.discard((id_,))
                raise
            if sets:
                enqueue(sets)
            elif refused is not None:
                refused()
            released = drain()
            if released:
                release(released)
            return None

        return push

    def _unknown(self, source: str) -> UnknownSource:
        return UnknownSource(f"source {source!r} is not a parameter of {self.options.name!r}, which takes {', '.join(self._parameters)}")

    def _enqueue(self, sets: Sequence[JoinSet]) -> None:
        for joined in sets:
            for member in joined[0].values():
                if member is not None:
                    member[1].uses += 1
            self._due.append(joined)

    def _release(self, released: Sequence[Released] | None = None) -> None:
        """Settles what the policy lets go of and no set needs any more."""
        acks: list[int] = []
        ids: list[bytes] = []
        drops: list[tuple[bytes, str]] = []
        for source, _, item, reason in self._policy.drain() if released is None else released:
            item.released = True
            if reason:
                self._counts.count(reason, edge=source)
                drops.append((item.header.id, reason))
            if not item.uses:
                acks.append(item.position)
                del self._held[item.position]
                if not item.decided:
                    item.decided = True
                    ids.append(item.header.id)
        if (acks or drops) and self._pending is not None:
            self._pending.units.append(Unit(acks, ids, [], None, None, drops, None))

    def _decide(self, joined: JoinSet, set_id: bytes, frames: Any, aside: tuple[str, Frame] | None) -> None:
        """Notes that a set has run."""
        acks: list[int] = []
        ids: list[bytes] = []
        kept: list[tuple[int, bytes]] = []
        members: list[bytes] = []
        held = self._held
        for member in joined[0].values():
            if member is None:
                continue
            item = member[1]
            id_ = item.header.id
            members.append(id_)
            item.uses -= 1
            gone = item.released and not item.uses
            if gone:
                acks.append(item.position)
                del held[item.position]
            if not item.decided:
                item.decided = True
                ids.append(id_)
                if not gone:
                    kept.append((item.position, id_))
        if self._pending is not None:
            self._pending.units.append(Unit(acks, ids, kept, frames, (set_id, members), [], aside))

    def _known_id(self, delivery: Delivery, header: Header, payload: memoryview) -> None:
        """An id that was decided before: an input that is still held comes back as state, all else is a duplicate."""
        frame, position, _, deliveries, _ = delivery
        restorable = self._restorable
        if position not in self._held and (deliveries > 0 if restorable is None else restorable.get(position) == header.id):
            item = Input(header, payload, position, frame, deliveries)
            item.decided = True
            if self._run_set.gated and not self._gate(delivery, item):
                return
            self._held[position] = item
            self._policy.restore(header.source_id, header.event_ns, item, header.key)
            self._release()
            return
        self._counts.count(Reason.DUPLICATE, edge=header.source_id)
        self._ack(position)

    def _gate(self, delivery: Delivery, item: Input) -> bool:
        """Runs `gate_in`; False when the input ends here."""
        self.current.headers = item.header
        try:
            passed = self._run_set.gate(item)
        except Exception as exc:
            error, reason, _ = self._given_up(exc)
            header = item.header
            self._counts.count(reason, edge=header.source_id)
            aside = self._dead_letter(delivery[4], [delivery[0]], [header.id], [header.source_id], error, reason, 1)
            self._ack(item.position, header.id, aside, reason)
            return False
        if not passed:
            self._drop(item.position, item.header, Reason.GATE)
        return passed

    def _ack(self, position: int, id_: bytes | None = None, aside: tuple[str, Frame] | None = None, reason: str = "") -> None:
        """Decides an input that never gets to the policy."""
        ids, drops = ([], []) if id_ is None else ([id_], [(id_, reason)])
        if id_ is not None:
            self._known.new.add(id_)
        if self._pending is not None:
            self._pending.units.append(Unit([position], ids, [], None, None, drops, aside))

    def _drop(self, position: int, header: Header, reason: str) -> None:
        self._counts.count(reason, edge=header.source_id)
        self._ack(position, header.id, None, reason)

    def _refuse(self, delivery: Delivery, header: Header | None, error: MessageError) -> None:
        frame, position, _, _, topic = delivery
        if header is not None and header.id in self._known:
            self._counts.count(Reason.DUPLICATE, edge=header.source_id)
            self._ack(position)
            return
        self._counts.count(error.reason, edge=topic if header is None else header.source_id)
        ids, sources = ([b""], [""]) if header is None else ([header.id], [header.source_id])
        self._ack(position, ids[0] or None, self._dead_letter(topic, [frame], ids, sources, error, error.reason, 0), error.reason)

    def _dead_letter_of(self, inputs: Sequence[Input], error: Exception) -> tuple[tuple[str, Frame], Raised | None]:
        """The record of a set that is given up, and what `next` makes of it."""
        last, reason, attempts = self._given_up(error)
        for item in inputs:
            self._counts.count(reason, edge=item.header.source_id)
        aside = self._dead_letter(
            self._topic,
            [item.frame for item in inputs],
            [item.header.id for item in inputs],
            [item.header.source_id for item in inputs],
            last,
            reason,
            attempts,
        )
        return aside, Raised(last) if self.options.on_error == "raise" else None

    # --- watermarks and ends ------------------------------------------------------------------------------------

    def _mark(self, source: str, watermark_ns: int) -> None:
        self._marks[source] = self._told[source] = watermark_ns
        self._enqueue(self._policy.watermark(source, watermark_ns))
        self._release()

    def _tell(self) -> None:
        """Tells the policy the watermarks. Not with each message: they only free what waits in vain, and cost as much as a push."""
        self._untold = 0
        for source, watermark_ns in self._marks.items():
            if self._told.get(source) != watermark_ns:
                self._mark(source, watermark_ns)

    def _control_message(self, delivery: Delivery, header: Header) -> Any:
        _, position, _, _, topic = delivery
        clock = self._clocks.get(header.source_id)
        if header.kind != Kind.END or clock is None:
            self._ack(position)
        elif (topic, position, header.source_id) not in self._ends.held:
            self._ends.held.append((topic, position, header.source_id))
            if clock.end(header, position):
                self._mark(header.source_id, WATERMARK_END)
        return CONTROL

    def _reopen(self, source: str, position: int) -> None:
        """A new incarnation of a source that had ended."""
        self._marks.pop(source, None)
        self._mark(source, _NO_PROMISE)
        del self._marks[source]
        attributes = self._ends.reopen(source, self._topic, position)
        if attributes and self._pending is not None:
            self._pending.write_control({}, {}, attributes)

    def _write_ends(self) -> None:
        """Acknowledges ends that all before is settled of. When all sources have ended, nothing will use what is held any more."""
        ends, pending = self._ends, self._pending
        if not ends.held or pending is None or self._ready or self._due:
            return
        last = all(clock.ended for clock in self._clocks.values()) and self._policy.next_due_ns() is None
        if last:
            self._let_go()
        pending.settle()
        while ends.held:
            topic, position, source = ends.held[0]
            if self._subscription.floor(topic) < position:
                return
            ends.held.pop(0)
            attributes = ends.record(source, topic, position) if self._clocks[source].ended else {}
            outputs: dict[str, list[Frame]] = {}
            if last and not ends.held:
                outputs[self._topic_out] = [self._run_set.end_frame()]
            pending.write_control({topic: [position]}, outputs, attributes)

    def _let_go(self) -> None:
        """Releases what the policy still holds: its sources have ended."""
        self._release()
        for item in list(self._held.values()):
            if not item.decided:
                self._counts.count(Reason.UNMATCHED, edge=item.header.source_id)
            self._held.pop(item.position)
            id_ = None if item.decided else item.header.id
            self._ack(item.position, id_, None, Reason.UNMATCHED)
        self._policy = self._make_policy()
        self._skew = SkewWatch(self._policy, self.options.name)
        self._told.clear()
        for source in self._parameters:
            self._mark(source, WATERMARK_END)
        self._push = self._make_push()

    def _finished(self) -> bool:
        return not (self._ready or self._due or self._pending) and self._ends.all_ended(self._parameters)

    def _idle(self) -> bool:
        """Between waits: what other members have recorded, and whether the join has come to this one."""
        if self._pending is None:
            if self._subscription.active:
                self._take_over()
            else:
                self._ends.learn(self._subscription.attributes())
        return self._until_end and self._finished()


__all__ = ("Join",)
