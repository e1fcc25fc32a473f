"""The stage with a join: inputs are aligned into sets, sets are run, and the decision log says what became of every input.

One member of the group holds the join; it owns the log's fence, the others stand by. Who takes over replays what is unacknowledged:
inputs that have had their turn are restored as state, the others are pushed again and make the same sets.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import monotonic_ns
from typing import Any

from edgeserve.align import Policy
from edgeserve.core.errors import Fenced, JoinOverflow, SendError
from edgeserve.core.metrics import Counters
from edgeserve.stage.base import CATCH_UP_NS, CONTROL, Options, Raised, Stage, subscribe
from edgeserve.stage.context import CURRENT, Current
from edgeserve.stage.control import Control
from edgeserve.stage.decisions import Decisions, decision_topic, last_record
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.ends import Ends
from edgeserve.stage.holding import Holding
from edgeserve.stage.linger import NO_ROOM
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.settle import MOST_PENDING, OLDEST_PENDING_NS, settle_at_last
from edgeserve.stage.ways import Sets, Way
from edgeserve.transport import ClaimLost, Delivery, Fence, Transport

log = logging.getLogger("edgeserve")

_TELL_EVERY = 256
_STRIDE = 16
"""So many messages are taken before the loop looks at the clock again."""

_AT_END_S = 0.02
_MOST_WAITING = 1_024
"""So many messages of the next round are fetched while other partitions are on their way to the end of this one. More only while something
of this round is missing, and `_FEW` every `_SLOWLY_S`: what a broker brings again comes first."""
_SLOWLY_S, _FEW = 0.2, 16
_LOST = (Fenced, ClaimLost)


class Join(Stage):
    """Runs a task of several parameters.

    Attributes:
        settle_after_ns: how old what is decided may become before it is settled, though more is ready.
    """

    settle_after_ns = OLDEST_PENDING_NS

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        run_set: Sets,
        make_policy: Callable[[], Policy],
    ) -> None:
        super().__init__(options, control, counts)
        self.current = run_set.current
        self._way: Way = run_set
        self._make_policy, self._run_set = make_policy, run_set
        self._topic = options.topics[0]
        self._log_topic = decision_topic(self._topic, options.group)
        self._holding: Holding | None = None
        self._fence: Fence | None = None
        self._known: RecentIds
        # The newest wall clock time at which something waited for it; below which position messages have been read.
        self._wall_ns = self._read_upto = 0
        # What others have recorded, while this member stands by.
        self._ends: Ends
        # Whether it has left its group and there was no room to join it again.
        self._outside = False

    # --- holding the join ---------------------------------------------------------------------------------------

    def open(self, transport: Transport) -> None:
        self._transport = transport
        self._run_set.open(transport.capabilities.max_frame_bytes)
        try:
            self._enter()
        except BaseException:
            self._run_set.close()
            raise

    def _enter(self) -> None:
        self._subscription, self._known = subscribe(self._transport, self.options, self._control), RecentIds()
        self._subscription.stopping = self._stopping
        try:
            self._ends = Ends(self._subscription.attributes())
            if self._subscription.active:
                self._take_over()
        except BaseException:
            self._close_log()
            self._subscription.close()
            raise

    def _take_over(self) -> Holding:
        """Becomes the holder: whoever was it before is refused from here on, and the log says what was decided."""
        self._close_log()
        fence = self._fence = self._transport.fence(self._log_topic, f"{self.options.name}-{os.getpid()}")
        # Told once each: a takeover that fails half-way and is tried again must still know them.
        self._known.update(self._subscription.settled_ids())
        record = last_record(self._subscription, self._log_topic)
        restorable = None if record is None else dict(record.held)
        pending = Decisions(
            *(self._subscription, fence, self._topic, self._run_set.topic, self._run_set.output_id, self.options.name, self._control),
            self.options.payloads,
        )
        pending.held = dict(restorable or {})
        pending.owner_runs(self._runs)
        self._holding = Holding(
            self.options, self._counts, self._make_policy, self._run_set, self._subscription, pending, self._known, restorable, self._aside
        )
        self._holding.hand_to(self._way)
        return self._holding

    def _close_log(self) -> None:
        fence, self._fence = self._fence, None
        if fence is not None:
            fence.close()

    def _stopping(self) -> bool:
        return self._control.stopping() or self.leaves()

    @property
    def holds(self) -> bool:
        """Whether this member has the join."""
        return self._holding is not None

    def shared(self) -> bool:
        """Whether the join is another's, or the group has another member, as far as is known without asking."""
        return self._holding is None or not self._subscription.alone

    @property
    def leads(self) -> bool:
        """Whether it does, and no other member has taken it over since. From any thread."""
        return self._holding is not None and self._subscription.active

    def hand_to(self, way: Way) -> None:
        """From now on the sets that are due go this way. Called while nobody steps."""
        try:
            self._mend()
            if self._holding is not None:
                self._holding.hand_to(way)
            self._way = way
        except _LOST as exc:
            self._way = way
            self._stand_down(exc)
        # While another thread runs the task this one aligns, and its gates have a context of their own.
        self.current = self._run_set.current if way is self._run_set else Current()

    def _mend(self) -> None:
        """Begins anew after an error that has left the holding half changed. What it has decided is whole, so that is kept."""
        if self._outside:
            self.come_back()
        if self._holding is not None and self._holding.broken:
            self._holding.pending.settle()
            log.warning("Compute %r was interrupted in the midst of a message and takes up the join of its topic anew", self.options.name)
            self._begin_anew()

    def _stand_down(self, why: Exception) -> None:
        """Somebody else holds the join by now: what is held here is theirs."""
        log.warning("Compute %r lost the join of topic %r and begins anew: %s", self.options.name, self._topic, why)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Leaves the group and joins it again: what is unsettled comes back as state or as messages, to whoever holds the join then."""
        if self._holding is not None:
            self._holding.pending.close()
            self._holding.pending.give_up()
            if self.options.payloads.files is not None:
                self.options.payloads.files.forget_all()
            self._controls += self._holding.apart
            self._holding = None
        self._fetched -= len(self._ready)
        self._ready.clear()
        self._claimed = []
        self._close_log()
        self._outside = True
        try:
            self._subscription.close()
        except SendError as exc:
            log.warning("Compute %r: %s", self.options.name, exc)  # to whoever holds the join then
        self.come_back()

    def come_back(self) -> None:
        """Joins the group again, if it has left it and there was no room then."""
        while self._outside:
            try:
                self._enter()
                self._outside = False
            except NO_ROOM as exc:
                self._wait_for_room(exc)

    # --- what a node calls --------------------------------------------------------------------------------------

    def next(self) -> Any:
        timeout = self.options.timeout_ms
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        token = CURRENT.set(self.current)
        try:
            while True:
                if self.leaves():
                    raise StopIteration
                try:
                    self._mend()
                    outcome = self._step(deadline)
                    if outcome is CONTROL:
                        continue
                    self._settle_soon()
                except _LOST as exc:
                    self._stand_down(exc)
                    continue
                if type(outcome) is Raised:
                    raise outcome.error
                return outcome
        finally:
            CURRENT.reset(token)

    def _settle_soon(self) -> None:
        holding = self._holding
        if holding is None or not holding.pending.units:
            return
        pending = holding.pending
        if not (self._ready or holding.due) or pending.urgent or len(pending.units) >= MOST_PENDING:
            pending.settle()
        elif pending.linger.asleep:
            pending.linger.nudge()

    def _step(self, deadline: float | None) -> Any:
        """Runs a set that is due if there is one, else takes one message. CONTROL: nothing that counts has happened."""
        holding, due_ns = self._holding, None
        if holding is not None:
            if not holding.pending.units:
                holding.pending.since_ns = monotonic_ns()
            due_ns = self._advance(holding)
            if holding.due:
                return self._run_due(holding)
        if self._ready and holding is not None and not holding.is_of_the_next_round(self._ready[-1][1]):
            outcome = self._take(holding)
            self._advance(holding)
            return self._run_due(holding) if holding.due else outcome
        if holding is not None:
            holding.pending.settle()  # first: somebody waits for the result
            holding.tell()
            holding.copy_remains(self._asked)
            holding.pending.settle()
            holding.write_ends(idle=True)
            holding.say_held()
            if self._ready and holding.at_end:
                self._look_behind(holding)
                if self._stopping():
                    raise StopIteration
                self._check_deadline(deadline)
            if self._ready or holding.due:
                return CONTROL
        if not self._await(deadline, due_ns) and self._over():
            raise StopIteration
        return CONTROL

    def _advance(self, holding: Holding) -> int | None:
        """Tells the policy the time when it wants to know it, and when the clock was set back: what waits may count from a time that is yet
        to come. Returns when it wants to know it next."""
        due_ns = holding.policy.next_due_ns()
        if due_ns is None or holding.due:
            return due_ns
        now_ns, last_ns = time.time_ns(), self._wall_ns
        self._wall_ns = now_ns
        if due_ns <= now_ns or now_ns < last_ns:
            holding.advance(now_ns)
            due_ns = holding.policy.next_due_ns()
        return due_ns

    def _look_behind(self, holding: Holding) -> None:
        """Other partitions are still on their way to the end of the round: the next one waits. What comes again of this one goes first."""
        if len(self._ready) < _MOST_WAITING:
            self._receive(_AT_END_S * 1000)
        elif holding.all_is_settled():
            self._control.closing.wait(_AT_END_S)
        elif not self._control.closing.wait(_SLOWLY_S):
            self._batch = _FEW
            self._receive(0)

    def _run_due(self, holding: Holding) -> Any:
        if self._skips_old:
            until = monotonic_ns() + CATCH_UP_NS
            try:
                while not holding.at_end and (self._ready or self._receive(0)) and monotonic_ns() < until:
                    self._push_next(holding)
            except JoinOverflow:
                pass  # raised again when it is taken the next time; what is due makes room for it
            holding.keep_newest(self.options.only_newest)
        return holding.run_due()

    @property
    def _skips_old(self) -> bool:
        """Whether only the newest sets that are due are run; where replicas share sets they see to that."""
        return self.options.only_newest > 0 and self._way is self._run_set

    def _over(self) -> bool:
        return self._stopping() or (self._until_end and self.has_ended())

    def _push_next(self, holding: Holding) -> Any:
        delivery = self._ready.pop()
        try:
            return holding.push(delivery)
        except BaseException:
            self._ready.append(delivery)
            raise

    def _take(self, holding: Holding) -> Any:
        """Takes the next message that is ready."""
        outcome = self._push_next(holding)
        holding.untold = untold = holding.untold + 1
        if untold >= _TELL_EVERY:
            holding.tell()
        if holding.warned is not None:
            outcome = Raised(holding.take_warning())
        return outcome

    def run(self, until: str | None) -> None:
        token = CURRENT.set(self.current)
        self._begin_run(until)
        if self._holding is not None:
            self._holding.pending.owner_runs(True)
        try:
            while not (self._control.stop or self.leaves()):
                try:
                    self._mend()
                    self._run_some()
                except _LOST as exc:
                    self._stand_down(exc)
                except (StopIteration, GoesBack):
                    break
        finally:
            CURRENT.reset(token)
            self._end_run()
            self._settle_at_end()

    def _run_some(self) -> None:
        """Steps through what is ready. This loop is where the throughput is made or lost."""
        if self._control.upstream_over is not None:
            self._look_whether_fed()  # messages may come all the time
        outcome = self._step(None)
        holding, control, ready = self._holding, self._control, self._ready
        if holding is None:
            return
        if self._skips_old:
            self._settle_soon()
            if type(outcome) is Raised or holding.warned is not None:
                raise outcome.error if type(outcome) is Raised else holding.take_warning()
            return
        pending, due, push, run_due, next_due_ns = holding.pending, holding.due, holding.push, holding.run_due, holding.policy.next_due_ns
        units, pop, timed, now_ns = pending.units, ready.pop, holding.policy.timed, monotonic_ns
        if (ready or due) and pending.linger.asleep:
            pending.linger.nudge()
        while True:
            if type(outcome) is Raised or holding.warned is not None:
                pending.settle()
                raise outcome.error if type(outcome) is Raised else holding.take_warning()
            if units and (len(units) >= MOST_PENDING or pending.urgent or monotonic_ns() - pending.since_ns > self.settle_after_ns):
                pending.settle()
            if not units:
                pending.since_ns = monotonic_ns()
            if control.stop or not (ready or due) or (holding.at_end and not due):
                return
            if due:
                outcome = run_due()
                continue
            if next_due_ns() is not None:
                outcome = self._step(None)
                continue
            if holding.untold >= _TELL_EVERY:
                holding.tell()
            there = len(ready)
            for _ in range(min(there, _STRIDE)):
                delivery = pop()
                try:
                    outcome = push(delivery)
                except BaseException:
                    ready.append(delivery)
                    raise
                if holding.push is not push or (outcome is CONTROL and holding.at_end):
                    break
                if due:
                    # The common case of a join: one message completes one set.
                    outcome = run_due()
                    if due or pending.urgent or type(outcome) is Raised or now_ns() - pending.since_ns > self.settle_after_ns:
                        break
                if timed and next_due_ns() is not None:
                    break
            holding.untold += there - len(ready)
            if holding.push is not push:
                return  # a new round has begun, with a policy of its own

    def _settle_at_end(self) -> None:
        holding = self._holding
        if holding is not None:
            try:
                holding.pending.settle()
                if not holding.broken:
                    holding.write_ends(idle=not self._ready or holding.at_end)
            except _LOST as exc:
                self._stand_down(exc)
            finally:
                holding.pending.owner_runs(False)

    def flush(self) -> None:
        if self._holding is not None:
            try:
                self._holding.pending.settle()
            except _LOST as exc:
                self._stand_down(exc)
        self.flush_settled()

    def flush_settled(self) -> None:
        """Returns when what was settled is durable."""
        if not self._outside:
            self._subscription.flush()

    def close(self) -> None:
        try:
            if self._holding is not None:
                self._holding.pending.close()
                settle_at_last(self._holding.pending)
        except _LOST as exc:
            log.warning("Compute %r lost the join of topic %r while it closed: %s", self.options.name, self._topic, exc)
        finally:
            try:
                self._subscription.close(worked_on=self._holding is not None and len(self._holding.pending) > 0)
            finally:
                self._close_log()
                self._aside.close()
                self._run_set.close()

    def totals(self) -> dict[str, int]:
        holding = self._holding
        if holding is None:
            return {"received": self.received, "settled": 0, "sent": 0}
        return {"received": self.received - holding.apart, "settled": holding.pending.settled, "sent": holding.pending.results}

    def explain(self) -> dict[str, Any]:
        """From any thread."""
        while True:
            try:
                return self._explain()
            except RuntimeError as exc:  # a dict of the policy's has changed meanwhile: it is stepped by another thread
                if "changed size" not in str(exc) and "mutated" not in str(exc):
                    raise

    def _explain(self) -> dict[str, Any]:
        holding = self._holding
        if holding is None:
            return {"holds_the_join": False, "sources": {}, "held": 0, "due": 0}
        sources = {source: asdict(report) for source, report in holding.policy.explain().items()}
        return {"holds_the_join": True, "sources": sources, "held": holding.held, "due": len(holding.due)}

    # --- receive ------------------------------------------------------------------------------------------------

    def _admit_batch(self, batch: Sequence[Delivery]) -> None:
        holding = self._holding or self._take_over()
        self._read_upto = max(self._read_upto, batch[-1][1] + 1)  # what comes again stands before what was read
        holding.known.turn({self._topic: self._read_upto}, holding.undecided_from)

    def never_seen(self) -> list[str]:
        """The sources that nothing has come of yet."""
        # Who stands by is handed nothing.
        return [] if self._holding is None else self._holding.never_seen()

    _never_seen = never_seen

    def has_ended(self) -> bool:
        holding = self._holding
        if holding is not None and (self._ready or holding.due or holding.pending.units):
            return False
        return self._have_ended(self._ends if holding is None else holding.ends, self._run_set.parameters)

    @property
    def ended_at(self) -> int | None:
        """The position of the last source's end, while that is the last that has come. From any thread."""
        holding = self._holding
        if holding is None or self._ready or holding.due or holding.pending.units:
            return None
        return holding.ended_at if holding.ends.all_ended(self._run_set.parameters, at_once=True) else None

    @property
    def round_ended_at(self) -> int | None:
        """The position of the last source's end, of the last round that has ended. From any thread."""
        return None if self._holding is None else self._holding.ended_at

    def _idle(self) -> bool:
        """Between waits: what other members have recorded, and whether the join has come to this one."""
        if self._holding is None:
            if self._subscription.active:
                self._take_over()
            else:
                self._ends.learn(self._subscription.attributes())
        else:
            if self._holding.ends.held and not self._ready:
                # What comes before an end may only now be settled for the engine, too: a broker takes its time.
                self._holding.write_ends(idle=True)
            self._holding.say_held()
        self._look_whether_fed()
        return self._until_end and self.has_ended()


__all__ = ("Join",)
