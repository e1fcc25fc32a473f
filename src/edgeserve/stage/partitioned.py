"""A join by key in several partitions, each with a holder of its own: replicas that join, and not only run sets.

Members find each other in a group of their own, the roster, on a topic that nothing is sent to. Its first member says who holds which
partition; that stands among the roster's attributes, with the partitions that have ended. A partition is a join like any other, of a group
of its own, which takes only what is its own of the topic, and aligns in a thread of its own. Its sets are run one after the other by the
thread that steps the node, so that those of a key stay in their order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from edgeserve.align import JoinSet, Policy
from edgeserve.core.errors import ClosedError, Fenced, GroupConflict, ReceiveTimeout, TransportError, UnknownTopic
from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters
from edgeserve.stage.assignment import assign, of_partition, partition_group, partition_of
from edgeserve.stage.base import CONTROL, Options, Raised, Steps
from edgeserve.stage.context import CURRENT, Current
from edgeserve.stage.control import SLICE_MS, Control
from edgeserve.stage.decisions import roster_topic
from edgeserve.stage.ends import Ends
from edgeserve.stage.holding import Part
from edgeserve.stage.join import Join
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.runset import GiveUp, Input, Outcome, RunSet
from edgeserve.stage.settle import OLDEST_PENDING_NS
from edgeserve.stage.unseen import Unseen
from edgeserve.transport import ClaimLost, Frame, GroupKind, Subscription, Transport

_log = logging.getLogger("edgeserve")

_LOOK_S = 0.2
_SLICE_S = SLICE_MS / 1000
_HOLDERS = "holders"
_encode = msgspec.msgpack.Encoder().encode
_decode_holders = msgspec.msgpack.Decoder(list[str]).decode


class _Offer:
    """A set that waits for the thread that runs the task."""

    __slots__ = ("answered", "call", "outcome", "settled", "taken")

    def __init__(self, call: Callable[[], Outcome], settled: threading.Event) -> None:
        self.call, self.settled = call, settled
        self.outcome: Outcome | None = None
        self.taken = False
        self.answered = threading.Event()


class Exchange:
    """Where the threads of partitions offer sets, and whoever steps the node runs them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offers: list[_Offer] = []
        self._woken = False

    def offer(self, call: Callable[[], Outcome], settled: threading.Event, ends: Callable[[], bool]) -> Outcome:
        """Returns what became of a set when it has been run.

        Args:
            call: runs it.
            settled: cleared when it was run; the caller sets it when the outcome is among what is to be settled.
            ends: whether to wait no longer.

        Raises:
            GoesBack: nobody has begun with it, and the partition is to end.
        """
        offer = _Offer(call, settled)
        with self._changed:
            self._offers.append(offer)
            self._changed.notify()
        while not offer.answered.wait(_SLICE_S):
            with self._changed:
                if not offer.taken and ends():
                    self._offers.remove(offer)
                    raise GoesBack("the partition ends before its set was run")
        with self._changed:
            self._offers.remove(offer)
        assert offer.outcome is not None
        return offer.outcome

    def step(self, seconds: float) -> Any:
        """Runs the set that was offered first; returns the task's result, or `Raised`. CONTROL: there was none in time, or `wake` was
        called. What is interrupted stays on offer."""
        offer: _Offer | None = None
        try:
            with self._changed:
                offer = self._first()
                if offer is None and not self._woken:
                    self._changed.wait(seconds)
                    offer = self._first()
                self._woken = False
                if offer is None:
                    return CONTROL
                offer.taken = True
            outcome = offer.call()
            offer.settled.clear()
            offer.outcome = (None, *outcome[1:])  # an error is raised here, and not once more by the partition
            offer.answered.set()
            return outcome[0]
        finally:
            if offer is not None and offer.outcome is None:
                offer.taken = False

    def _first(self) -> _Offer | None:
        return next((offer for offer in self._offers if not offer.taken), None)

    def wake(self) -> None:
        """Makes `step` return. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()


class Partition:
    """One partition for as long as this member holds it: its part of the messages, the join of them, and the thread that aligns. See `Sets`
    and `Part`.

    Attributes:
        join: of the partition.
        settled: whether every set that was run is among what is to be settled.
        ready: set when the join is `opened`, or could not be.
        over: whether the thread has ended.
        error: what has ended it, to be raised once.
        unsettled: why what it had done could not be settled when it ended.
    """

    def __init__(
        self,
        number: int,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        run_set: RunSet,
        by_header: bool,
        make_policy: Callable[[], Policy],
        exchange: Exchange,
        screening: threading.Lock,
        last: Callable[[int], bool],
    ) -> None:
        self.number, self._partitions, self.by_header = number, options.partitions, by_header
        self.topic, self.parameters, self.output_id = run_set.topic, run_set.parameters, run_set.output_id
        self.verbose, self.screened = run_set.verbose, run_set.screened
        self.current = Current()
        self._control, self._run_set, self._exchange, self._screening, self._last = control, run_set, exchange, screening, last
        self.halted = self.opened = self.over = False
        self.error: BaseException | None = None
        self.unsettled: BaseException | None = None
        self.settled, self.ready = threading.Event(), threading.Event()
        group = partition_group(options.group, number, options.partitions)
        self.join = Join(replace(options, group=group, letters=options.group), control, counts, run_set=self, make_policy=make_policy)
        self._thread: threading.Thread

    # --- a part of the messages ---------------------------------------------------------------------------------

    @property
    def part(self) -> Part:
        """See `Sets`."""
        return self

    def has(self, header: Header) -> bool:
        """Whether a message is of this partition."""
        return partition_of(header, self._partitions) == self.number

    def has_unread(self) -> bool:
        """One of them puts aside what none can read."""
        return self.number == 0

    # --- its sets -----------------------------------------------------------------------------------------------

    def open(self, max_frame_bytes: int | None) -> None:
        """The task is opened once for all partitions."""

    def close(self) -> None:
        """As `open`."""

    def screen(self, item: Input) -> bool:
        """As that of the whole, one at a time: the functions are the user's."""
        with self._screening:
            return self._run_set.screen(item)

    def make(self, give_up: GiveUp) -> Callable[[JoinSet, int | None], Outcome]:
        """The function that has a set run. Results are no promise: other partitions may be behind this one."""
        run = self._run_set.make(give_up)

        def offer(joined: JoinSet, _promise_ns: int | None) -> Outcome:
            self.settled.set()
            return self._exchange.offer(partial(run, joined, None), self.settled, self._ends)

        return offer

    def end_frames(self, position: int) -> list[Frame] | None:
        """The first partition says that all have ended, as soon as they have."""
        if self.number:
            return []
        return self._run_set.end_frames(position) if self._last(position) else None

    # --- its thread ---------------------------------------------------------------------------------------------

    def start(self, transport: Transport) -> None:
        """Begins."""
        self.settled.set()
        self._thread = threading.Thread(target=self._run, args=(transport,), name=f"edgeserve-partition-{self.number + 1}", daemon=True)
        self._thread.start()

    def _run(self, transport: Transport) -> None:
        try:
            self.join.open(transport)
            self.join.leaves = self._leaves
            self.opened = True
            self.ready.set()
            try:
                self.join.run(None)
            finally:
                self._close_join()
        except BaseException as exc:
            self.error = exc
        finally:
            self.over = True
            self.settled.set()
            self.ready.set()
            self._exchange.wake()

    def _close_join(self) -> None:
        try:
            self.join.close()
        except BaseException as exc:
            self.unsettled = exc

    def _ends(self) -> bool:
        return self.halted or self._control.stopping()

    def _leaves(self) -> bool:
        self.settled.set()  # asked between two steps
        return self.halted

    def halt(self) -> None:
        """Asks it to end after what it has in hand."""
        self.halted = True
        self.join.wake()

    def wait(self) -> None:
        """Until it has ended."""
        while self._thread.is_alive():
            self.join.wake()
            self._thread.join(_SLICE_S)


class Partitioned(Steps):
    """Runs a task of several parameters on as many replicas as there are, each with some of the partitions.

    Args:
        by_header: whether the key is in the header.
    """

    def __init__(
        self, options: Options, control: Control, counts: Counters, *, run_set: RunSet, by_header: bool, make_policy: Callable[[], Policy]
    ) -> None:
        self._options, self._control, self._counts, self._run_set = options, control, counts, run_set
        self._by_header, self._make_policy = by_header, make_policy
        self._topic = options.topics[0]
        self._exchange, self._screening = Exchange(), threading.Lock()
        self._held: dict[int, Partition] = {}
        self._past: Counter[str] = Counter()
        self._errors: deque[BaseException] = deque()
        self._patience = Patience(options.name, control)
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._transport: Transport
        self._roster: Subscription
        # The partitions' ends, as if they were sources.
        self._ends: Ends
        self._names = [str(number) for number in range(options.partitions)]

    # --- what a node calls --------------------------------------------------------------------------------------

    def open(self, transport: Transport) -> None:
        self._transport = transport
        self._run_set.open(transport.capabilities.max_frame_bytes)
        try:
            o = self._options
            self._roster = transport.subscribe(
                (roster_topic(self._topic, o.group),),
                o.group,
                kind=GroupKind.SHARED,
                signature=o.signature,
                version=o.version,
                member=o.member(),
            )
            try:
                self._ends = Ends(self._roster.attributes())
                self._look()
                for partition in self._held.values():
                    partition.ready.wait()
                    if partition.error is not None and not partition.opened:
                        raise partition.error
                self._keeper = threading.Thread(target=self._keep, name=f"edgeserve-roster-{o.name}", daemon=True)
                self._keeper.start()
            except BaseException:
                self._let_go()
                raise
        except BaseException:
            self._run_set.close()
            raise

    def next(self) -> Any:
        o = self._options
        deadline = None if o.timeout_ms is None else time.monotonic() + o.timeout_ms / 1000
        token = CURRENT.set(self._run_set.current)
        try:
            while not self._control.stopping():
                self._raise_errors()
                wait_s = _SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic()))
                result = self._exchange.step(wait_s)
                if type(result) is Raised:
                    raise result.error
                if result is not CONTROL:
                    return result
                if deadline is not None and time.monotonic() >= deadline:
                    raise ReceiveTimeout(f"{o.what} {o.name!r} saw no set of {self._topic} within timeout_ms={o.timeout_ms:g}")
            raise StopIteration
        finally:
            CURRENT.reset(token)

    def run(self, until: str | None) -> None:
        unseen = Unseen(f"{self._options.what} {self._options.name!r}", self._topic, self._never_seen) if until == "end" else None
        token = CURRENT.set(self._run_set.current)
        try:
            while not self._control.stopping():
                self._raise_errors()
                result = self._exchange.step(_SLICE_S)
                if type(result) is Raised:
                    raise result.error
                if result is CONTROL and unseen is not None:
                    if self.has_ended():
                        return
                    unseen.look()
            for partition in list(self._held.values()):
                partition.wait()  # each settles what it has run
        except GoesBack:
            pass  # told to end in the pause before a retry
        finally:
            CURRENT.reset(token)

    def _raise_errors(self) -> None:
        if self._errors:
            raise self._errors.popleft()

    def flush(self) -> None:
        for partition in list(self._held.values()):
            while not partition.settled.wait(_SLICE_S):
                partition.join.wake()
            if not partition.over:
                with suppress(Fenced, ClaimLost, ClosedError):  # another member has it by now, and does what is left
                    partition.join.flush()

    def close(self) -> None:
        held = list(self._held.values())
        try:
            self._let_go()
        finally:
            self._run_set.close()
        for partition in held:
            if partition.unsettled is not None:
                raise partition.unsettled

    def _let_go(self) -> None:
        self._closing.set()
        if self._keeper is not None:
            self._keeper.join()
        for partition in self._held.values():
            partition.halt()
        for partition in self._held.values():
            partition.wait()
        self._sweep()
        self._roster.close()

    def wake(self) -> None:
        self._exchange.wake()
        for partition in list(self._held.values()):
            partition.join.wake()

    def has_ended(self) -> bool:
        """Whether all partitions have ended, those of others too."""
        ended = self._ends.ended
        return (
            all(partition.join.ended_at is not None for partition in list(self._held.values()))
            and self._ends.all_ended(self._names)
            and len({ended[name] for name in self._names}) == 1
        )

    def _last(self, position: int) -> bool:
        """Whether all partitions but the first have ended with the end at `position`, or a later one."""
        ended = self._ends.ended
        return all(name in ended and ended[name][1] >= position for name in self._names[1:])

    def _never_seen(self) -> list[str]:
        return sorted({source for partition in list(self._held.values()) for source in partition.join.never_seen()})

    def totals(self) -> dict[str, int]:
        totals = Counter(self._past)
        for partition in list(self._held.values()):
            totals.update(partition.join.totals())
        return dict(totals)

    def explain(self) -> dict[str, Any]:
        held = dict(self._held)
        found = [_explained(partition.join) for partition in held.values()]
        return {
            "holds_the_join": bool(held),
            "partitions": {"held": sorted(number + 1 for number in held), "of": self._options.partitions},
            "sources": _merged(each["sources"] for each in found),
            "held": sum(each["held"] for each in found),
            "due": sum(each["due"] for each in found),
            "shares_sets": False,
        }

    # --- who holds what -----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._closing.wait(_LOOK_S):
            try:
                if not self._control.stopping():
                    self._look()
                if self._patience.troubled:
                    self._patience.over()
            except NO_ROOM as exc:
                self._closing.wait(self._patience.met(exc))
            except Exception as exc:
                if not self._errors:
                    self._errors.append(exc)
                    self._exchange.wake()

    def _look(self) -> None:
        """Takes the partitions that are this member's by now, gives back the others, and says which have ended."""
        self._sweep()
        roster, held = self._roster, self._held
        members, attributes = roster.members(), roster.attributes()
        self._learn(attributes)
        known = attributes.get(_HOLDERS)
        holders = [] if known is None else _decode_holders(known)
        if members and members[0] == roster.name:
            before, holders = holders, assign(holders, members, self._options.partitions)
            if holders != before:
                roster.settle({}, attributes={_HOLDERS: _encode(holders)})
        for number, holder in enumerate(holders):
            partition = held.get(number)
            if partition is None and holder == roster.name and not self._errors:
                held[number] = partition = self._partition(number)
                partition.start(self._transport)
            elif partition is not None and holder != roster.name:
                partition.halt()
        for number, partition in held.items():
            partition.join.settle_after_ns = OLDEST_PENDING_NS * len(held)  # all together as often as one would
            at = partition.join.ended_at
            if at is not None and self._ends.ended.get(self._names[number]) != (self._topic, at):
                roster.settle({}, attributes=self._ends.recording(self._names[number], self._topic, at))

    def _learn(self, attributes: dict[str, bytes]) -> None:
        before = dict(self._ends.ended)
        self._ends.learn(attributes)
        if self._ends.ended != before:
            self._ends.at_start = False  # one has ended meanwhile, so it was no other round

    def _partition(self, number: int) -> Partition:
        return Partition(
            number,
            self._options,
            self._control,
            self._counts,
            run_set=self._run_set,
            by_header=self._by_header,
            make_policy=self._make_policy,
            exchange=self._exchange,
            screening=self._screening,
            last=self._last,
        )

    def _sweep(self) -> None:
        """Forgets the partitions that have ended; what they have met is raised by whoever steps."""
        for number, partition in list(self._held.items()):
            if partition.over:
                del self._held[number]
                self._past.update(partition.join.totals())
                for error in (partition.unsettled, partition.error):
                    if error is not None:
                        self._errors.append(error)
                        self._exchange.wake()


def _explained(join: Join) -> dict[str, Any]:
    while True:
        with suppress(RuntimeError):  # a dict of the policy's has changed meanwhile: it is stepped by another thread
            return join.explain()


def _merged(found: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The reports on each source, of all partitions as one."""
    merged: dict[str, dict[str, Any]] = {}
    for reports in found:
        for source, report in reports.items():
            if source not in merged:
                merged[source] = dict(report)
                continue
            whole = merged[source]
            whole["held"] += report["held"]
            whole["dropped"] = dict(Counter(whole["dropped"]) + Counter(report["dropped"]))
            for field, pick in (("oldest_ns", min), ("newest_ns", max), ("watermark_ns", min)):
                whole[field] = pick((ns for ns in (whole[field], report[field]) if ns is not None), default=None)
            miss = report["nearest_miss_ns"]
            if miss is not None and (whole["nearest_miss_ns"] is None or miss < whole["nearest_miss_ns"]):
                whole["nearest_miss_ns"], whole["note"] = miss, report["note"]
    return merged


def refuse_other_partitions(transport: Transport, topic: str, group: str, partitions: int) -> None:
    """Raises when a group's join was run in another number of partitions: what those have done, these would not know.

    Raises:
        GroupConflict: it was.
    """
    try:
        names = transport.topic_info(topic).groups
    except UnknownTopic:
        return
    except TransportError as exc:
        _log.warning("it cannot be asked in how many partitions group %r of topic %r was run before: %s", group, topic, exc)
        return
    for name in names:
        before = 1 if name == group else found[1] if (found := of_partition(name)) is not None and found[0] == group else partitions
        if before != partitions:
            raise GroupConflict(
                f"the join of group {group!r} on topic {topic!r} was run with partitions={before}, and this one has {partitions}: "
                f"give it another group=, or, where it may begin anew, forget the old one: edgeserve topic forget {topic} {name}"
            )


__all__ = ("Partitioned", "refuse_other_partitions")
