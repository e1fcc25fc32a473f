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
from dataclasses import replace
from typing import Any

import msgspec

from edgeserve.align import Policy
from edgeserve.core.errors import EdgeServeError, GroupConflict, ReceiveTimeout, TransportError, UnknownTopic
from edgeserve.core.metrics import Counters
from edgeserve.stage.assignment import assign, whole_of
from edgeserve.stage.base import CONTROL, Options, Raised, Steps, subscribe
from edgeserve.stage.context import CURRENT
from edgeserve.stage.control import SLICE_MS, Control
from edgeserve.stage.decisions import roster_topic
from edgeserve.stage.exchange import Exchange
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.partition import Partition
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.rounds import Rounds
from edgeserve.stage.runset import RunSet
from edgeserve.stage.settle import OLDEST_PENDING_NS
from edgeserve.stage.unseen import Unseen
from edgeserve.transport import GroupKind, Subscription, Transport

_log = logging.getLogger("edgeserve")

_LOOK_S = 0.2
_SLICE_S = SLICE_MS / 1000
_MOST_TIMES = 8
_HOLDERS = "holders"
_encode = msgspec.msgpack.Encoder().encode
_decode_holders = msgspec.msgpack.Decoder(list[str]).decode


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
            roster = replace(o, topics=(roster_topic(self._topic, o.group),), kind=GroupKind.SHARED)
            self._roster = subscribe(transport, roster, self._control)
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
                    if self._has_ended():
                        return
                    unseen.look()
            self._rest()
        except GoesBack:
            self._rest()  # told to end in the pause before a retry
        finally:
            CURRENT.reset(token)

    def _has_ended(self) -> bool:
        held = list(self._held.values())
        told = self._control.upstream_over
        if told is not None and not (told.is_set() and all(partition.join.fed for partition in held)):
            return False
        # Who holds nothing may have come before anything of this round.
        return self._rounds.ended(held, at_once=told is not None and bool(held))

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
        try:
            self._roster.close()
        except EdgeServeError as exc:
            _log.warning("%s %r left its roster without a word: %s", self._options.what, self._options.name, exc)

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
        for partition in list(held.values()):  # whoever flushes may sweep meanwhile
            # All together as often as one would, while that keeps no result waiting for long.
            partition.join.settle_after_ns = OLDEST_PENDING_NS * min(len(held), _MOST_TIMES)
            news |= self._rounds.news(partition)
        if news:
            roster.settle({}, attributes=news)
        for number, holder in enumerate(holders):
            mine = held.get(number)
            if mine is not None and holder != roster.name:
                mine.halt()
            elif mine is None and holder == roster.name and not self._errors:
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


def _shown(partitions: int) -> str:
    return f"by= and partitions={partitions}" if partitions > 1 else "no partitions="


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
        whole, before = whole_of(name)
        if whole == group and before != partitions:
            raise GroupConflict(
                f"the join of group {group!r} on topic {topic!r} was run with partitions={before}, and this one has {partitions}: "
                f"give it {_shown(before)}, or another group=, or, where it may begin anew, stop all its members and forget what it was: "
                f"edgeserve topic forget {shlex.quote(topic)} {shlex.quote(group)} --node URL"
            )


__all__ = ("Partitioned", "refuse_other_partitions")
