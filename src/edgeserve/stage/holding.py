"""A join in the hands of one member: what it has taken, what is due, what became of every input.

An input stays unacknowledged until the policy has released it and every set with it is settled. Policies are users' code, and a signal may
raise anywhere: what was left half done in memory is begun anew, from the store and the log, which know nothing of it yet.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from edgeserve.align import JoinSet, Policy, Released
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import JoinOverflow, MessageError, UnknownSource
from edgeserve.core.message import WATERMARK_END, Header, Kind, set_id
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.admission import Admission
from edgeserve.stage.base import CONTROL, Options, Raised
from edgeserve.stage.deadletter import Asides
from edgeserve.stage.decisions import Decisions, read_held, unit
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.ends import Ends
from edgeserve.stage.payloads import LAZY_BYTES
from edgeserve.stage.retry import GaveUp
from edgeserve.stage.runset import Input, Outcome
from edgeserve.stage.skew import SkewWatch
from edgeserve.stage.sources import SourceClock, restored, telling
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.ways import Sets, Way
from edgeserve.transport import Delivery, Frame, Subscription

_NO_PROMISE = -(2**63)
_SAY_HELD_S = 1.0
_BARREN = 3
"""So many messages in a row without a set make it worth to ask why."""


class _Whole:
    """Around what must be done whole."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._holding.broken = True


class Holding:
    """Takes messages into the policy, runs the sets that it makes due, and decides inputs.

    Args:
        options: the stage's.
        counts: the node's.
        policy: made anew for this holding.
        run_set: runs the task.
        subscription: active.
        pending: writes what is decided.
        known: ids that the group has decided.
        aside: makes the records of what is given up.
        restorable: position to id of the inputs that were held after their turn; None when the log cannot be read.

    Attributes:
        due: sets that wait to be run.
        ends: the sources' ends.
        untold: messages since the policy was last told the watermarks.
        ended_at: the position of the last source's end, of the last round that has ended.
        at_end: all sources have ended and the last end is not written, or, of a join in partitions, not known to all: nothing behind it is
            to be taken.
        push: takes one delivered message.
        broken: whether an error came out of the midst of a change: nothing more is to be taken or run by this holding.
        warned: a warning that is an error here, to be raised between two messages.
    """

    def __init__(
        self,
        options: Options,
        counts: Counters,
        make_policy: Callable[[], Policy],
        run_set: Sets,
        subscription: Subscription,
        pending: Decisions,
        known: RecentIds,
        restorable: dict[int, bytes] | None,
        aside: Asides,
    ) -> None:
        self._options, self._counts, self._run_set, self._subscription = options, counts, run_set, subscription
        self._topic = options.topics[0]
        self._parameters = run_set.parameters
        self._aside = aside
        self._make_policy = make_policy
        self._way: Way = run_set
        self.pending, self.known = pending, known
        self._admission = Admission(options, counts, run_set, pending, known, aside)
        self._restorable = restorable
        self._held: dict[int, Input] = {}
        self.due: deque[JoinSet] = deque()
        attributes = subscription.attributes()
        self._clocks = {name: restored(name, attributes) for name in self._parameters}
        self._marks: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self.untold = 0
        self._said, self._say_at = read_held(attributes) or 0, time.monotonic() + _SAY_HELD_S
        self.broken = self.at_end = False
        self._whole = _Whole(self)
        self.warned: Warning | None = None
        self.ends, self._settled_upto = Ends(attributes), -1
        if run_set.part is not None:
            pending.known = self._computed
        # Sources that have ended, as far as this member has read: their next message opens them again.
        self._gone = {source for source in self._parameters if source in self.ends.ended}
        self.ended_at = max(at for _, at in self.ends.ended.values()) if len(self._gone) == len(self._parameters) else None
        self._look_whether_at_end()
        self._begin()
        for source in self._gone:
            self._clocks[source].restore_end(self.ends.ended[source][1])
            if len(self._gone) < len(self._parameters):  # else whoever comes next begins a new round
                self._mark(source, WATERMARK_END)

    def _begin(self) -> None:
        self.policy = self._make_policy()
        self._skew = SkewWatch(self.policy, self._options.name)
        self.push = self._make_push()
        if self._run_set.verbose is not None:
            self.push = self._logged(self.push, self._run_set.verbose)
        self.run_due = self._make_run_due(self._way.make(self._give_up))
        self._skip_due = self._make_run_due(self._skip, Reason.SUPERSEDED)

    def hand_to(self, way: Way) -> None:
        """From now on what is due goes this way. Settles what is pending first, or raises with all as it was."""
        if way is not self._way:
            self.pending.settle()
            with self._whole:
                self.pending.topic_out, self._way = way.topic, way
                self.run_due = self._make_run_due(way.make(self._give_up))

    @property
    def held(self) -> int:
        """How many inputs are not acknowledged yet."""
        return len(self._held)

    @property
    def apart(self) -> int:
        """How many messages were taken that are none of a set: control messages, and those of other partitions."""
        return self._admission.apart

    def say_held(self) -> None:
        """Tells the group how much is held, about every second while that changes. To be called when what was taken is done with."""
        if self._said != len(self._held) and (now := time.monotonic()) >= self._say_at:
            self._said, self._say_at = len(self._held), now + _SAY_HELD_S
            self.pending.say_held(self._said)

    def take_warning(self) -> Warning:
        """The warning that is to be raised, once."""
        assert self.warned is not None
        warning, self.warned = self.warned, None
        return warning

    def undecided_from(self, topic: str) -> int:
        """The position of the oldest input that had no turn yet. What is held as state after its turn may stay for ever."""
        return min((item.position for item in self._held.values() if not item.decided), default=2**63)

    # --- admit, align -------------------------------------------------------------------------------------------

    def _make_push(self) -> Callable[[Delivery], Any]:
        """The function that takes one delivered message into the policy. A closure: its names cost least there."""
        restorable = self._restorable
        admission = self._admission
        known, held, clocks, marks, policy = self.known, self._held, self._clocks, self._marks, self.policy
        push_item, drain, leaving, release, refused = policy.push, policy.drain, policy.leaving, self._release, self._skew.look
        due, enqueue = self.due.append, self._enqueue
        max_age_ms, now_ns, data, screened = self._options.drop_if_older_than_ms, time.time_ns, int(Kind.DATA), self._run_set.screened
        max_age_ns = None if max_age_ms is None else int(max_age_ms * 1e6)
        drops_late, gone, barren, part = policy.drops_late, self._gone, 0, self._run_set.part
        is_mine = part.has if part is not None and part.by_header else None
        seen = self._options.payloads.seen
        by_value = part is not None and is_mine is None
        # A policy that a user has derived may answer these itself.
        own_drain = type(policy).drain is not Policy.drain
        own_spread = type(policy).spread_refused is not Policy.spread_refused

        def push(delivery: Delivery) -> Any:
            nonlocal barren
            frame, position, published_ns, deliveries, _ = delivery
            try:
                header, payload = decode_frame(frame)
            except MessageError as exc:
                return admission.refuse(delivery, None, exc)
            if header.kind != data:
                return self._control_message(delivery, header)
            source, id_, stamp_ns = header.source_id, header.id, header.event_ns
            clock = clocks.get(source)
            if clock is None:
                return admission.refuse(delivery, header, self._unknown(source))
            if position in held:
                return None  # it came back to the member that has it
            foreign = is_mine is not None and not is_mine(header)
            # What is held after its turn is state, even if it was decided longer ago than ids are remembered.
            decided = id_ in known.new or id_ in known.old or (restorable and restorable.get(position) == id_)
            # What came twice is no new beginning of a source that has ended; but not all partitions would know it.
            if part is not None or not (decided and clock.ended):
                watermark_ns = clock.observe(header, position, published_ns)
                if watermark_ns is not None:
                    marks[source] = watermark_ns
                # First: who knew of the producer, and not that a round has begun, would take the others' ends for those of this round.
                if gone and source in gone and not clock.ended and self._reopen(source, position):
                    return self.push(delivery)
                if clock.changed:
                    self._tell_producers(source, clock)
            if foreign:
                return admission.leave(position)
            if decided:
                return self._known_id(delivery, header, payload)
            item = Input(header, payload, position, frame, deliveries)
            if by_value and not admission.admit(item):
                return None
            if header.size >= LAZY_BYTES:
                seen(header)
            if max_age_ns is not None and now_ns() - published_ns > max_age_ns:
                return admission.drop(position, header, Reason.LATE)
            # The sender's own promise decides, and not what has been read of others: the same after every restart.
            if drops_late and header.watermark_ns is not None and stamp_ns < header.watermark_ns:
                return admission.drop(position, header, Reason.LATE)
            if screened and not by_value and not admission.screen(item):
                return None
            try:
                known.new.add(id_)
                held[position] = item
                sets = push_item(source, stamp_ns, item, header.key)
                if sets:
                    barren = 0
                    if sets[0][1] and len(sets) == 1:
                        due(sets[0])
                    else:
                        enqueue(sets)
                else:
                    barren += 1
                    if barren >= _BARREN and (policy.refused is not None or own_spread):
                        self.warned = refused() or self.warned
                if leaving or own_drain:
                    release(drain())
            except JoinOverflow:
                # The policy has refused it before it changed anything.
                del held[position]
                known.discard((id_,))
                raise
            except BaseException:
                self.broken = True
                raise
            return None

        return push

    def _logged(self, push: Callable[[Delivery], Any], steps: StepLog) -> Callable[[Delivery], Any]:
        """`log_verbose`: a line for each message, whether it makes a set due or not."""

        def logged(delivery: Delivery) -> Any:
            outcome = push(delivery)
            with contextlib.suppress(MessageError):
                header, _ = decode_frame(delivery[0])
                line = {"msg_id": header.id.hex(), "source_id": header.source_id, "event_ns": header.event_ns}
                steps.write(**line, received_ns=time.time_ns(), sets_due=len(self.due))
            return outcome

        return logged

    def advance(self, now_ns: int) -> None:
        """Tells the policy the time."""
        with self._whole:
            self._enqueue(self.policy.advance(now_ns))
            self._release(self.policy.drain())

    def _unknown(self, source: str) -> UnknownSource:
        takes = ", ".join(self._parameters)
        return UnknownSource(f"source {source!r} is not a parameter of {self._options.name!r}, which takes {takes}")

    def _enqueue(self, sets: Sequence[JoinSet]) -> None:
        for joined in sets:
            if not joined[1]:
                for member in joined[0].values():
                    if member is not None:
                        member[1].uses += 1
            self.due.append(joined)

    def _release(self, released: Sequence[Released]) -> None:
        """Settles what the policy lets go of and no set needs any more."""
        free: list[Input] = []
        drops: list[tuple[bytes, str]] = []
        for source, _, item, reason in released:
            item.released = True
            if reason:
                self._counts.count(reason, edge=source)
                drops.append((item.header.id, reason))
            if not item.uses:
                free.append(item)
        if not free and not drops:
            return  # all of them are in sets that are due
        ids: list[bytes] = []
        for item in free:
            del self._held[item.position]
            if not item.decided:
                item.decided = True
                ids.append(item.header.id)
        self.pending.units.append(unit([item.position for item in free], ids, drops=drops))

    def _known_id(self, delivery: Delivery, header: Header, payload: bytes | memoryview) -> None:
        """An id that was decided before: an input that is still held comes back as state, all else is a duplicate."""
        frame, position, _, deliveries, _ = delivery
        restorable = self._restorable
        if position not in self._held and (deliveries > 0 if restorable is None else restorable.get(position) == header.id):
            item = Input(header, payload, position, frame, deliveries)
            item.decided = True
            if self._run_set.screened and not self._admission.screen(item):
                return
            with self._whole:
                self._held[position] = item
                self.policy.restore(header.source_id, header.event_ns, item, header.key)
                self._release(self.policy.drain())
                if restorable:
                    restorable.pop(position, None)
            return
        self._counts.count(Reason.DUPLICATE, edge=header.source_id)
        self._admission.ack(position)

    # --- run ----------------------------------------------------------------------------------------------------

    def keep_newest(self, most: int) -> None:
        """Drops what is due but the newest sets."""
        while len(self.due) > most:
            self._skip_due()

    def _skip(self, joined: JoinSet, _promise_ns: int | None) -> Outcome:
        """In place of running a set."""
        members = [member[1].header.id for name in self._parameters if (member := joined[0].get(name)) is not None]
        self._counts.count(Reason.SUPERSEDED, edge="sets")
        return None, set_id(members), members, None, None

    def _make_run_due(self, run: Callable[[JoinSet, int | None], Outcome], dropped: str = "") -> Callable[[], Any]:
        """The function that runs the first set that is due and decides its inputs; returns the result, or `Raised`. `dropped`: the sets are
        not run, and the log says why."""
        due, marks, held, pending, width = self.due, self._marks, self._held, self.pending, len(self._parameters)
        next_due_ns, units = self.policy.next_due_ns, self.pending.units

        def run_due() -> Any:
            joined = due[0]
            # Sets that are due already, or wait for a timer, may lie behind the watermark: no promise while there are any.
            promise = min(marks.values()) if len(due) == 1 and len(marks) == width and next_due_ns() is None else None
            result, of, members, frames, aside = run(joined, promise)
            try:
                due.popleft()
                acks: list[int] = []
                decision, drops = (None, ((of, dropped),)) if dropped else ((of, members), ())
                if joined[1]:
                    # No other set has them, so this is their one turn.
                    for member in joined[0].values():
                        position = member[1].position
                        acks.append(position)
                        del held[position]
                    units.append((acks, members, (), frames, decision, drops, aside))
                else:
                    ids: list[bytes] = []
                    kept: list[tuple[int, bytes]] | None = None
                    for member in joined[0].values():
                        if member is None:
                            continue
                        item = member[1]
                        item.uses = uses = item.uses - 1
                        gone = item.released and not uses
                        if gone:
                            acks.append(item.position)
                            del held[item.position]
                        if not item.decided:
                            item.decided = True
                            ids.append(item.header.id)
                            if not gone:
                                kept = kept or []
                                kept.append((item.position, item.header.id))
                    units.append((acks, ids, kept or (), frames, decision, drops, aside))
                if frames is not None and type(frames) is not bytes:
                    pending.urgent = True
            except BaseException:
                self.broken = True
                raise
            return result

        return run_due

    def _give_up(self, inputs: Sequence[Input], error: GaveUp) -> tuple[tuple[str, Frame], Raised | None]:
        """The record of a set that cannot be run, and what `next` makes of it."""
        aside = self._aside.record(self._topic, [item.frame for item in inputs], [item.header for item in inputs], error)
        for item in inputs:
            self._counts.count(error.reason, edge=item.header.source_id)
        return aside, Raised(error.error) if self._options.on_error == "raise" else None

    def copy_remains(self, newest: int) -> None:
        """Copies what is still held of the `newest` inputs taken. A view keeps the whole batch that it was read with."""
        if not self._held:
            return
        for item in islice(reversed(self._held.values()), newest):
            frame = item.frame
            if type(frame) is memoryview and len(frame) * 2 < memoryview(frame.obj).nbytes:
                item.frame = frame = bytes(frame)
                item.payload = memoryview(frame)[len(frame) - len(item.payload) :]

    def never_seen(self) -> list[str]:
        """The sources that nothing has come of yet, not even an end."""
        return [source for source, clock in self._clocks.items() if not clock.seen]

    # --- watermarks and ends ------------------------------------------------------------------------------------

    def _mark(self, source: str, watermark_ns: int) -> None:
        with self._whole:
            self._marks[source] = self._told[source] = watermark_ns
            if sets := self.policy.watermark(source, watermark_ns):
                self._enqueue(sets)
            if released := self.policy.drain():
                self._release(released)

    def tell(self) -> None:
        """Tells the policy the watermarks. Not with each message: they only free what waits in vain, and cost as much as a push."""
        self.untold = 0
        for source, watermark_ns in self._marks.items():
            if self._told.get(source) != watermark_ns:
                self._mark(source, watermark_ns)

    def _tell_producers(self, source: str, clock: SourceClock) -> None:
        """Before anything of it is settled, and behind what was decided while less was known of it."""
        try:
            self.pending.settle()
            self.pending.write_control({}, {}, telling(source, clock.told(self._settled_end(source))))
        except BaseException:
            clock.changed = True
            raise

    def _settled_end(self, source: str) -> int:
        """Below which position whoever comes next reads no end of a source again."""
        return min((position for _, position, name in self.ends.held.copy() if name == source), default=2**63) - 1

    def _computed(self) -> dict[str, bytes]:
        """What is to be told with a settlement, of sources that are a task's replicas: what one of them stores again behind another's end
        is known by its sequence, and by its id only to the partition that it is of. From any thread."""
        attributes: dict[str, bytes] = {}
        for source, clock in self._clocks.items():
            if clock.computed:
                attributes |= telling(source, clock.known(self._settled_end(source)))
        return attributes

    def _control_message(self, delivery: Delivery, header: Header) -> Any:
        _, position, _, _, topic = delivery
        clock = self._clocks.get(header.source_id)
        if header.kind != Kind.END or clock is None:
            self._admission.leave(position)
            return CONTROL
        entry = (topic, position, header.source_id)
        recorded = self.ends.has_recorded(entry)
        # Stored twice, or sent on by two members of its group: the one before would wait for this one to be the last.
        if self._is_known_end(header.id) or (not recorded and clock.has_come(header, position)):
            self._admission.leave(position)
            return CONTROL
        self._admission.apart += 1
        if entry not in self.ends.held:
            with self.pending.lock:  # who settles tells what is known of an end, and whether it is held
                self.ends.hold(entry, header.id)
                ended = not recorded and clock.end(header, position)
                if recorded:
                    clock.pass_end(header, position)
            if ended:
                self._gone.add(header.source_id)
                self._mark(header.source_id, WATERMARK_END)
            self.at_end = all(clock.ended for clock in self._clocks.values())
        return CONTROL

    def _is_known_end(self, id_: bytes) -> bool:
        """Whether the group has recorded an end."""
        return id_ in self.known

    def _reopen(self, source: str, position: int) -> bool:
        """A new incarnation of a source that had ended. After the end of all of them it begins a new round, and opens all. True: with a new
        policy, since the ends of the round before are not written yet."""
        whole = len(self._gone) == len(self._parameters)
        begins = whole and bool(self.ends.held)
        if begins:
            while (due_ns := self.policy.next_due_ns()) is not None:
                self.advance(due_ns)  # a set that waits for its time is the last of its round
            self._let_go()
        self.pending.settle()  # what the ends have decided: whoever comes next reads no end of them again
        attributes = self.ends.reopening_all() if whole else self.ends.reopening(source, self._topic, position)
        if attributes:
            self.pending.write_control({}, {}, attributes)
            self.ends.learn(attributes)
        if not whole:
            self._gone.discard(source)
            self._mark(source, _NO_PROMISE)
            del self._marks[source]
            return False
        self._gone.clear()
        for clock in self._clocks.values():
            clock.ended = False
        return begins

    def write_ends(self, *, idle: bool) -> None:
        """Acknowledges ends that all before is settled of. When all sources have ended, nothing will use what is held any more.

        `idle`: no message is ready.
        """
        ends, pending = self.ends, self.pending
        if not ends.held:
            if self._run_set.part is not None:
                self._look_whether_at_end()
            return
        if self.due or not idle:
            return
        last = all(clock.ended for clock in self._clocks.values()) and self.policy.next_due_ns() is None
        if last and (self._marks or self._held):
            self._let_go()
        pending.settle()
        while ends.held:
            topic, position, source = entry = ends.held[0]
            # What was settled stays so, also where a broker that was killed has forgotten it and brings it again.
            self._settled_upto = max(self._settled_upto, self._subscription.floor(topic))
            if self._settled_upto < position:
                return
            again = ends.has_recorded(entry)
            ends_round = last and len(ends.held) == 1 and not again
            id_ = ends.ids[entry]
            frames = self._way.end_frames(position, id_) if ends_round else []
            if frames is None:
                return
            ended = self._clocks[source].ended and ends.is_last(entry) and not again
            attributes = telling(source, self._clocks[source].told(position)) | (ends.recording(source, topic, position) if ended else {})
            pending.write_control({topic: [position]}, {pending.topic_out: frames} if frames else {}, attributes, [id_] if ended else ())
            if ended:
                self.known.new.add(id_)
            ends.written(entry, ended=ended)
            if ends_round:
                if self._run_set.part is not None:
                    self._subscription.flush()  # before the others are told, and go on
                self.ended_at = position
        self._look_whether_at_end()

    def is_of_the_next_round(self, position: int) -> bool:
        """Whether a message stands behind the end that is waited for. What stands before it may come again."""
        if not self.at_end:
            return False
        end = self.ends.held[-1][1] if self.ends.held else self.ended_at
        return end is not None and position > end

    def all_is_settled(self) -> bool:
        """Whether what stands before the end that is waited for is settled."""
        return not self.ends.held or self._settled_upto >= self.ends.held[-1][1]

    def _look_whether_at_end(self) -> None:
        part = self._run_set.part
        self.at_end = (
            part is not None and self.ended_at is not None and len(self._gone) == len(self._parameters) and not part.goes_on(self.ended_at)
        )

    def _let_go(self) -> None:
        """Decides what the policy still holds, and no set that is due: its sources have ended."""
        with self._whole:
            self._release(self.policy.drain())
            awaited = {id(member[1]) for joined in self.due for member in joined[0].values() if member is not None}
            for item in list(self._held.values()):
                if id(item) in awaited:
                    item.released = True
                    continue
                del self._held[item.position]
                if item.decided:
                    self._admission.ack(item.position)
                else:
                    self._admission.drop(item.position, item.header, Reason.UNMATCHED)
            self._told.clear()
            self._marks.clear()
            self._begin()


__all__ = ("Holding",)
