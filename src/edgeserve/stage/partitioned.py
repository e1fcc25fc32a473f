"""A join by key in several partitions, each with a holder of its own: replicas that join, and not only run sets.

Members find each other in a group of their own, the roster, on a topic that nothing is sent to. Its first member says who holds which
partition; that stands among the roster's attributes, with how far the partitions are (`Rounds`). A partition is a join like any other, of a
group of its own, which takes only what is its own of the topic, and aligns in a thread of its own. Its sets are run one after the other by
the thread that steps the node, so that those of a key stay in their order.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from edgeserve.align import JoinSet, Policy
from edgeserve.core.errors import Fenced, GroupConflict, ReceiveTimeout, TransportError, UnknownTopic
from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters
from edgeserve.stage.assignment import assign, of_partition, partition_group, partition_of
from edgeserve.stage.base import CONTROL, Options, Raised, Steps
from edgeserve.stage.context import CURRENT, Current
from edgeserve.stage.control import SLICE_MS, Control
from edgeserve.stage.decisions import roster_topic
from edgeserve.stage.ends import GRACE_S
from edgeserve.stage.holding import Part
from edgeserve.stage.join import Join
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.runset import GiveUp, Input, Outcome, RunSet
from edgeserve.stage.settle import OLDEST_PENDING_NS, owned
from edgeserve.stage.unseen import Unseen
from edgeserve.transport import ClaimLost, Frame, GroupKind, Subscription, Transport

_log = logging.getLogger("edgeserve")

_LOOK_S = 0.2
_SLICE_S = SLICE_MS / 1000
_MOST_TIMES = 8
_HOLDERS = "holders"
_encode = msgspec.msgpack.Encoder().encode
_decode_holders = msgspec.msgpack.Decoder(list[str]).decode


class _Offer:
    """A set that waits for the thread that runs the task. `changed`: it was run, or its partition is to look around."""

    __slots__ = ("call", "changed", "outcome", "settled", "taken")

    def __init__(self, call: Callable[[], Outcome], settled: threading.Event) -> None:
        self.call, self.settled = call, settled
        self.outcome: Outcome | None = None
        self.taken = False
        self.changed = threading.Event()


class Exchange:
    """Where the threads of partitions offer sets, and whoever steps the node runs them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offers: list[_Offer] = []
        self._woken = False

    def offer(self, offer: _Offer, look: Callable[[], bool]) -> Outcome:
        """Returns what became of a set when it has been run. `look`: called meanwhile, says whether to wait no longer.

        Raises:
            GoesBack: nobody has begun with it, and the partition is to end.
        """
        with self._changed:
            self._offers.append(offer)
            self._changed.notify()
        while True:
            offer.changed.wait(_SLICE_S)
            offer.changed.clear()
            if offer.outcome is not None:
                break
            if look():
                with self._changed:
                    if not offer.taken:
                        self._offers.remove(offer)
                        raise GoesBack("the partition ends before its set was run")
        with self._changed:
            self._offers.remove(offer)
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
            result, of, members, frames, aside = offer.call()
            offer.settled.clear()
            # An error is raised here, and not once more by the partition. The task's own buffers may be written to by the next set.
            offer.outcome = None, of, members, owned(frames), aside
            return result
        finally:
            if offer is not None:
                offer.taken = offer.outcome is not None
                offer.changed.set()

    def _first(self) -> _Offer | None:
        return next((offer for offer in self._offers if not offer.taken), None)

    def wake(self) -> None:
        """Makes `step` return. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()


class _Part(Join):
    """The join of one partition. `between`: called in its own thread, between two steps and while it waits."""

    between: Callable[[], object]

    def _run_some(self) -> None:
        self.between()
        super()._run_some()

    def _idle(self) -> bool:
        self.between()
        return super()._idle()


class Partition:
    """One partition for as long as this member holds it: its part of the messages, the join of them, and the thread that aligns. See `Sets`
    and `Part`.

    Attributes:
        join: of the partition.
        reached: where all sources have ended, as far as it is.
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
        rounds: Rounds,
    ) -> None:
        self.number, self._partitions, self.by_header = number, options.partitions, by_header
        self.topic, self.parameters, self.output_id = run_set.topic, run_set.parameters, run_set.output_id
        self.verbose, self.screened = run_set.verbose, run_set.screened
        self.current = Current()
        self._control, self._run_set, self._exchange, self._screening, self._rounds = control, run_set, exchange, screening, rounds
        self._patience = Patience(f"{options.name}, partition {number + 1}", control)
        self.halted = self.opened = self.over = False
        self.reached: int | None = None
        self.error: BaseException | None = None
        self.unsettled: BaseException | None = None
        self.ready = threading.Event()
        # Whether every set that was run is among what is to be settled; what is on offer; who waits for a flush.
        self._settled = threading.Event()
        self._offered: _Offer | None = None
        self._flush: Future[None] | None = None
        group = partition_group(options.group, number, options.partitions)
        self.join = _Part(replace(options, group=group, letters=options.group), control, counts, run_set=self, make_policy=make_policy)
        self.join.between = self._between
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

    def goes_on(self, position: int) -> bool:
        """The first partition has said so itself, and waits until the roster does: whoever takes it over could not say it any more."""
        return self.number > 0 or self._rounds.published == position

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
            self._settled.set()
            self._offered = offered = _Offer(partial(run, joined, None), self._settled)
            try:
                return self._exchange.offer(offered, self._look)
            finally:
                self._offered = None

        return offer

    def end_frames(self, position: int) -> list[Frame] | None:
        """The first partition publishes the end when all have reached it, and none takes anything behind it before."""
        self.reached = position
        if self.number:
            return [] if self._rounds.published == position else None
        return self._run_set.end_frames(position) if self._rounds.all_are_at(position) else None

    # --- its thread ---------------------------------------------------------------------------------------------

    def start(self, transport: Transport, *, patient: bool) -> None:
        """Begins. `patient`: waits for a store that has no room."""
        self._settled.set()
        name = f"edgeserve-partition-{self.number + 1}"
        self._thread = threading.Thread(target=self._run, args=(transport, patient), name=name, daemon=True)
        self._thread.start()

    def _run(self, transport: Transport, patient: bool) -> None:
        try:
            self._open_join(transport, patient)
            self.ready.set()
            try:
                self.join.run(None)
            finally:
                self._close_join()
        except BaseException as exc:
            self.error = exc
        finally:
            self.over = True
            self._answer_flush(self.unsettled)
            self.ready.set()
            self._exchange.wake()

    def _open_join(self, transport: Transport, patient: bool) -> None:
        while not self.opened:
            try:
                self.join.open(transport)
                self.join.leaves = self._ends
                self.opened = True
            except NO_ROOM as exc:
                if not patient or self._ends() or not self._patience.wait(exc):
                    raise

    def _close_join(self) -> None:
        try:
            self.join.close()
        except BaseException as exc:
            self.unsettled = exc

    def _ends(self) -> bool:
        return self.halted or self._control.stopping()

    def _look(self) -> bool:
        """While a set is on offer."""
        self._serve_flush()
        return self._ends()

    def _between(self) -> None:
        self._settled.set()
        self._serve_flush()

    def _serve_flush(self) -> None:
        if self._flush is None or not self._settled.is_set():
            return
        error: Exception | None = None
        try:
            self.join.flush()
        except (Fenced, ClaimLost):
            pass  # another member has it by now, and does what is left
        except Exception as exc:
            error = exc
        self._answer_flush(error)

    def _answer_flush(self, error: BaseException | None) -> None:
        asked, self._flush = self._flush, None
        if asked is not None and error is not None:
            asked.set_exception(error)
        elif asked is not None:
            asked.set_result(None)

    def flush(self) -> None:
        """Returns when the sets that were run are durable. For who runs them."""
        self._flush = asked = Future[None]()
        while not asked.done() and not self.over:
            if (offered := self._offered) is not None:
                offered.changed.set()
            self.join.wake()
            wait_for([asked], _SLICE_S)
        if asked.done():
            asked.result()

    def halt(self) -> None:
        """Asks it to end after what it has in hand."""
        self.halted = True
        self.join.wake()

    def wait(self) -> None:
        """Until it has ended."""
        while self._thread.is_alive():
            self.join.wake()
            self._thread.join(_SLICE_S)


class Rounds:
    """How far the partitions are, as the roster says: all end a round together.

    A partition that has come to the last source's end says where that is, and waits. When all are there the first one publishes the end and
    says so, and they go on. So no result of a round stands behind its end, and none of the next before it.

    Attributes:
        published: where the last round has ended.
        open: whether another has begun since.
    """

    _AT, _PUBLISHED, _OPEN = "at:", "published", "open"

    def __init__(self, partitions: int, attributes: dict[str, bytes]) -> None:
        self._at: list[int | None] = [None] * partitions
        self.published: int | None = None
        self.open = False
        self.learn(attributes)
        # Whoever finds a round ended when it comes waits for another to begin, as with any source.
        self._waits_until = 0.0 if self.published is None else time.monotonic() + GRACE_S

    def learn(self, attributes: dict[str, bytes]) -> None:
        """Takes over what the roster says."""
        before = self.published
        self._at = [_position(attributes.get(f"{self._AT}{number}")) for number in range(len(self._at))]
        self.published = _position(attributes.get(self._PUBLISHED))
        self.open = bool(attributes.get(self._OPEN))
        if self.published != before:
            self._waits_until = 0.0

    def all_are_at(self, position: int) -> bool:
        """Whether all partitions but the first are there."""
        return all(at == position for at in self._at[1:])

    def news(self, partition: Partition) -> dict[str, bytes]:
        """What the roster does not say yet of a partition."""
        news = {}
        at, ended_at, published = partition.reached, partition.join.ended_at, partition.join.round_ended_at
        if at is not None and self._at[partition.number] != at:
            news[f"{self._AT}{partition.number}"] = _encode(at)
        if partition.number == 0 and partition.join.holds:
            if published is not None and self.published != published:
                news[self._PUBLISHED] = _encode(published)
            if self.open != (ended_at is None):
                news[self._OPEN] = b"1" if ended_at is None else b""
        return news

    def ended(self, held: Iterable[Partition]) -> bool:
        """Whether all partitions have ended: these, and those of others."""
        published = self.published
        return (
            published is not None
            and not self.open
            and time.monotonic() >= self._waits_until
            and all(partition.join.ended_at == published for partition in held)
        )


def _position(encoded: bytes | None) -> int | None:
    return None if encoded is None else msgspec.msgpack.decode(encoded, type=int)


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
        # Of partitions that were held: what they have counted, what they have met, what of it says that results were not stored.
        self._past: Counter[str] = Counter()
        self._errors: deque[BaseException] = deque()
        self._unsettled: list[BaseException] = []
        self._books = threading.Lock()
        self._patience = Patience(options.name, control)
        self._closing = threading.Event()
        # After a `run` that was told to stop: nothing is begun before somebody steps again.
        self._rests = self._told_idle = False
        self._keeper: threading.Thread | None = None
        self._transport: Transport
        self._roster: Subscription
        self._rounds: Rounds

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
            self._roster.stopping, self._roster.giving_up = self._control.stopping, self._control.giving_up
            try:
                self._rounds = Rounds(o.partitions, self._roster.attributes())
                self._look(patient=False)
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
        self._rests = False
        try:
            while not self._control.stopping():
                self._raise_errors()
                result = self._exchange.step(_SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic())))
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
        self._rests = False
        try:
            while not self._control.stopping():
                self._raise_errors()
                result = self._exchange.step(_SLICE_S)
                if type(result) is Raised:
                    raise result.error
                if result is CONTROL and unseen is not None:
                    if self._rounds.ended(list(self._held.values())):
                        return
                    unseen.look()
            self._rest()
        except GoesBack:
            self._rest()  # told to end in the pause before a retry
        finally:
            CURRENT.reset(token)

    def _rest(self) -> None:
        """Told to stop: what was run is settled before `run` returns."""
        self._rests = True
        for partition in list(self._held.values()):
            partition.wait()
        self._sweep()
        self._raise_errors()

    def _raise_errors(self) -> None:
        if self._errors:
            raise self._errors.popleft()

    def flush(self) -> None:
        for partition in list(self._held.values()):
            partition.flush()
        self._sweep()
        self._raise_errors()

    def close(self) -> None:
        try:
            self._let_go()
        finally:
            self._run_set.close()
        while self._errors:
            error = self._errors.popleft()
            if error in self._unsettled:
                raise error
            _log.warning("%s %r met an error after the last step: %s", self._options.what, self._options.name, error)

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

    def _never_seen(self) -> list[str]:
        return sorted({source for partition in list(self._held.values()) for source in partition.join.never_seen()})

    def totals(self) -> dict[str, int]:
        with self._books:
            totals = Counter(self._past)
            for partition in list(self._held.values()):
                totals.update(partition.join.totals())
        return dict(totals)

    def explain(self) -> dict[str, Any]:
        held = [partition for partition in list(self._held.values()) if partition.join.holds]
        found = [partition.join.explain() for partition in held]
        return {
            "holds_the_join": bool(held),
            "partitions": {"held": sorted(partition.number + 1 for partition in held), "of": self._options.partitions},
            "sources": _merged(each["sources"] for each in found),
            "held": sum(each["held"] for each in found),
            "due": sum(each["due"] for each in found),
            "shares_sets": False,
        }

    # --- who holds what -----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._closing.wait(_LOOK_S):
            try:
                if not (self._control.stopping() or self._rests):
                    self._look(patient=True)
                if self._patience.troubled:
                    self._patience.over()
            except NO_ROOM as exc:
                self._closing.wait(self._patience.met(exc))
            except Exception as exc:
                if not self._errors:
                    self._errors.append(exc)
                    self._exchange.wake()

    def _look(self, *, patient: bool) -> None:
        """Takes the partitions that are this member's by now, gives back the others, and says how far they are."""
        self._sweep()
        roster, held, o = self._roster, self._held, self._options
        members, attributes = roster.members(), roster.attributes()
        self._rounds.learn(attributes)
        known = attributes.get(_HOLDERS)
        holders = [] if known is None else _decode_holders(known)
        if len(members) > len(holders) > 0 and roster.name not in holders and not self._told_idle:
            self._told_idle = True
            _log.info("%s %r holds no partition: there are %d, and %d members; it stands by", o.what, o.name, o.partitions, len(members))
        news: dict[str, bytes] = {}
        if members and members[0] == roster.name:
            before, holders = holders, assign(holders, members, o.partitions)
            if holders != before:
                news[_HOLDERS] = _encode(holders)
        for partition in held.values():
            # All together as often as one would, while that keeps no result waiting for long.
            partition.join.settle_after_ns = OLDEST_PENDING_NS * min(len(held), _MOST_TIMES)
            news |= self._rounds.news(partition)
        if news:
            roster.settle({}, attributes=news)
        for number, holder in enumerate(holders):
            if number in held and holder != roster.name:
                held[number].halt()
            elif number not in held and holder == roster.name and not self._errors:
                held[number] = partition = self._partition(number)
                partition.start(self._transport, patient=patient)

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
            rounds=self._rounds,
        )

    def _sweep(self) -> None:
        """Forgets the partitions that have ended; what they have met is raised by whoever steps, flushes or closes."""
        with self._books:
            for number, partition in list(self._held.items()):
                if not partition.over:
                    continue
                self._past.update(partition.join.totals())
                del self._held[number]
                if partition.unsettled is not None:
                    self._unsettled.append(partition.unsettled)
                self._errors += [error for error in (partition.unsettled, partition.error) if error is not None]
        if self._errors:
            self._exchange.wake()


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
            whole["note"] = whole["note"] or report["note"]
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
        if partitions == 1:
            transport.end(roster_topic(topic, group))  # there is none in nearly all cases, and to ask for groups takes a broker long
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
                "give it another group=, or, where it may begin anew, forget the old one: "
                f"edgeserve topic forget {shlex.quote(topic)} {shlex.quote(group)} --node ..."
            )


__all__ = ("Partitioned", "refuse_other_partitions")
