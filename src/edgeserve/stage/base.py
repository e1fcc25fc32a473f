"""What every receiving stage does: subscribe, receive in batches, know its sources' ends, put aside what cannot be processed."""

from __future__ import annotations

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from time import monotonic_ns
from typing import Any, Literal

from edgeserve.core.errors import ReceiveTimeout, TransportError, UnknownTopic
from edgeserve.core.metrics import Counters
from edgeserve.stage.context import Current
from edgeserve.stage.control import SLICE_MS, Control
from edgeserve.stage.deadletter import Asides
from edgeserve.stage.ends import Ends
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.shed import Keep, Shedding
from edgeserve.stage.unseen import Unseen
from edgeserve.transport import Delivery, GroupKind, Start, Subscription, Transport

_FEWEST, _MOST, _FIRST_BATCH = 1, 1024, 16
_QUICK_NS, _SLOW_NS = 10_000_000, 50_000_000
_NEVER = 2**63
_POSITION = itemgetter(1)
_LOOK_FED_S = 0.1
CATCH_UP_NS = 50_000_000
"""For how long messages are taken, while there are any, before the newest set is run (`only_newest`)."""

_SHOWN_NAME = 24
"""Characters of a node's name in those of its members."""


@dataclass(frozen=True)
class Options:
    """What the receiving nodes have in common; times in ms, as in the keywords.

    `only_newest`: so many of the sets that are due are kept, 0: all; `keep`: of the messages that wait, None: all.
    """

    what: str
    name: str
    topics: tuple[str, ...]
    group: str
    kind: GroupKind
    signature: str = ""
    start: Start = "earliest"
    timeout_ms: float | None = None
    on_error: Literal["raise"] | None = None
    retries: int = 3
    retry_backoff_ms: float = 100
    ack_timeout_ms: int = 300_000
    drop_if_older_than_ms: float | None = None
    version: str = ""
    only_newest: int = 0
    keep: Keep | None = None
    holds_senders: bool | None = None
    partitions: int = 1
    letters: str = ""
    payloads: Payloads = field(default_factory=lambda: Payloads("", "eager", None), compare=False)


@dataclass(frozen=True)
class Raised:
    """The outcome of a step whose error the caller asked for (`on_error='raise'`)."""

    error: Exception


def subscribe(transport: Transport, options: Options, control: Control) -> Subscription:
    """A new member of a stage's group."""
    o = options
    subscription = transport.subscribe(
        o.topics,
        o.group,
        kind=o.kind,
        start=o.start,
        ack_timeout_ms=o.ack_timeout_ms,
        signature=o.signature,
        version=o.version,
        holds_senders=o.holds_senders,
        member=f"{o.name[:_SHOWN_NAME]}@{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}",
    )
    subscription.stopping, subscription.giving_up = control.stopping, control.giving_up
    return subscription


def _stays() -> bool:
    return False


class _Control:
    """The outcome of a step that was none: a control message."""


CONTROL = _Control()


class Steps(ABC):
    """The part of Compute and Materialize that does the work. One thread steps at a time; see `Node`."""

    @abstractmethod
    def open(self, transport: Transport) -> None:
        """Subscribes."""

    @abstractmethod
    def next(self) -> Any:
        """One step; see DESIGN in the class that users see."""

    @abstractmethod
    def run(self, until: str | None) -> None:
        """Steps until stopped, or until all sources have ended."""

    @abstractmethod
    def flush(self) -> None:
        """Settles what is pending."""

    @abstractmethod
    def close(self) -> None:
        """Settles what is pending and leaves the group."""

    @abstractmethod
    def explain(self) -> dict[str, Any]:
        """What is held, and why nothing comes of it."""

    @abstractmethod
    def totals(self) -> dict[str, int]:
        """For `counters`."""

    @abstractmethod
    def wake(self) -> None:
        """Makes a waiting step look whether it is to stop. From any thread."""


class Stage(Steps):
    """Steps of the messages of one subscription.

    Attributes:
        leaves: asked between steps: True ends `run`, and a wait of `next`, as if the node were to stop.
    """

    def __init__(self, options: Options, control: Control, counts: Counters) -> None:
        self.options, self._control, self._counts = options, control, counts
        self.current = Current()
        # Newest last in the topic, first out here: `pop()` takes the next one.
        self._ready: list[Delivery] = []
        # A batch that could not be admitted yet.
        self._claimed: list[Delivery] = []
        self._batch, self._asked, self._batch_began_ns = _FIRST_BATCH, _FIRST_BATCH, 0
        # From then on (monotonic) what is ready may have gone to another member.
        self._stale_ns = _NEVER
        self._stale_after_ns = options.ack_timeout_ms * 1_000_000 or _NEVER
        self._fetched = 0
        # Control messages among them: ends, and whatever else is no message of a step.
        self._controls = 0
        self._runs = self._until_end = False
        # While it runs until the end.
        self._unseen: Unseen | None = None
        self._patience = Patience(options.name, control)
        self._transport: Transport
        self._subscription: Subscription
        # What receives of it, if something else does.
        self._shedding: Shedding | None = None
        # Where each topic ended when the nodes that feed this one had ended; whether all of it is settled; when to look the next time.
        self._fed_upto: dict[str, int] | None = None
        self._fed, self._look_fed_at = False, 0.0
        self.leaves: Callable[[], bool] = _stays
        self._shown_topics = ", ".join(options.topics)
        self._aside = Asides(options.what, options.name, options.letters or options.group, options.payloads)
        self._max_age_ns = None if options.drop_if_older_than_ms is None else int(options.drop_if_older_than_ms * 1e6)

    def wake(self) -> None:
        receives = self._shedding or getattr(self, "_subscription", None)
        if receives is not None:
            receives.wake()

    @property
    def received(self) -> int:
        """How many messages have been taken; what is only fetched ahead goes back on close, and control messages are none."""
        return self._fetched - len(self._ready) - self._controls

    def _begin_run(self, until: str | None) -> None:
        self._runs, self._until_end = True, until == "end"
        if self._until_end:
            o = self.options
            self._unseen = Unseen(f"{o.what} {o.name!r}", self._shown_topics, self._never_seen)

    def _end_run(self) -> None:
        self._runs = self._until_end = False
        self._unseen = None

    def _never_seen(self) -> list[str]:
        """The sources that this stage needs and that nothing has come of yet."""
        return []

    @property
    def fed(self) -> bool:
        """Whether the program's nodes that feed this one have ended and all that they sent is settled, as of the last look; True where
        there are none. An end alone does not say so: it may be an earlier run's, which failed and left it. From any thread."""
        return self._fed or self._control.upstream_over is None

    def _have_ended(self, ends: Ends, sources: Iterable[str]) -> bool:
        """Whether all of these sources have ended, and not only in an earlier run."""
        # Who is told when those that feed it have ended need not guess whether one will begin again.
        return ends.all_ended(sources, at_once=self._control.upstream_over is not None) and self.fed

    def _look_whether_fed(self) -> None:
        """Brings `fed` up to date. Only for the thread that steps: another one may ask `has_ended`."""
        over = self._control.upstream_over
        if over is not None and not self._fed and over.is_set() and (now := time.monotonic()) >= self._look_fed_at:
            self._look_fed_at = now + _LOOK_FED_S
            try:
                if self._fed_upto is None:
                    # Once: who else sends there may do so for ever.
                    self._fed_upto = {topic: self._end(topic) for topic in self.options.topics}
                self._fed = all(self._subscription.floor(topic) >= end for topic, end in self._fed_upto.items())
            except TransportError as exc:
                self._look_fed_at = now + self._patience.met(exc)

    def _end(self, topic: str) -> int:
        try:
            return self._transport.end(topic)
        except UnknownTopic:
            return 0  # whoever deletes a topic deletes what was to be processed

    # --- receive ------------------------------------------------------------------------------------------------

    def _receive(self, timeout_ms: float) -> bool:
        """Fetches the next batch into `_ready`, in order with what is there; False when none came in time."""
        if self._batch_began_ns:
            self._adapt()
        self.options.payloads.tidy()
        if self.options.payloads.files is not None:
            self.options.payloads.files.tidy(self.flush)
        try:
            batch = self._claimed
            if not batch:
                batch = (self._shedding or self._subscription).receive(self._batch, timeout_ms)
                self._set_stale()
            if batch:
                self._claimed = batch
                self._admit_batch(batch)
        except NO_ROOM as exc:
            # A claim is a write too, and so is taking over a join.
            self._wait_for_room(exc)
            return False
        if self._patience.troubled:
            self._patience.over()
        if not batch:
            return False
        self._claimed = []
        self._asked, self._batch_began_ns = len(batch), monotonic_ns()
        self._fetched += len(batch)
        batch.reverse()
        self._ready[:] = sorted([*self._ready, *batch], key=_POSITION, reverse=True) if self._ready else batch
        return True

    def _set_stale(self) -> None:
        """Claims were taken, or renewed, just now."""
        self._stale_ns = monotonic_ns() + self._stale_after_ns

    def _wait_for_room(self, error: Exception) -> None:
        """In `run()` a store without room is waited for, as when settling; elsewhere, and when the node is to end, it is an error."""
        if not self._runs or not self._patience.wait(error):
            raise error

    def _adapt(self) -> None:
        """A batch should take some ten milliseconds: long enough to be worth its settlement, short enough to share with others."""
        took = monotonic_ns() - self._batch_began_ns
        self._batch_began_ns = 0
        if took < _QUICK_NS and self._asked >= self._batch:
            self._batch = min(_MOST, self._batch * 2)
        elif took > _SLOW_NS:
            self._batch = max(_FEWEST, self._batch // 2)

    @abstractmethod
    def _admit_batch(self, batch: Sequence[Delivery]) -> None:
        """Looks at a batch as a whole before its messages are looked at."""

    def _await(self, deadline: float | None, due_ns: int | None = None) -> bool:
        """Waits for a batch. False: the timer at wall clock `due_ns` is due, or the clock was set back, or the node is to stop or close.

        Raises:
            ReceiveTimeout: nothing came before `deadline` (monotonic seconds).
        """
        control, last_ns = self._control, 0
        while not control.stop and not control.closing.is_set():
            if self._unseen is not None:
                self._unseen.look()
            wait_ms: float = SLICE_MS
            if due_ns is not None:
                if (now_ns := time.time_ns()) < last_ns:
                    return False  # the clock was set back: what waits may count from a time that is yet to come
                last_ns = now_ns
                wait_ms = min(wait_ms, (due_ns - now_ns) / 1e6)
            if deadline is not None:
                wait_ms = min(wait_ms, (deadline - time.monotonic()) * 1000)
            if self._receive(max(wait_ms, 0)):
                return True
            if due_ns is not None and time.time_ns() >= due_ns:
                return False
            try:
                if self._idle() or self.leaves():
                    return False
            except NO_ROOM as exc:
                self._wait_for_room(exc)
            self._check_deadline(deadline)
        return False

    def _check_deadline(self, deadline: float | None) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise ReceiveTimeout(
                f"{self.options.what} {self.options.name!r} saw no message on {self._shown_topics} "
                f"within timeout_ms={self.options.timeout_ms:g}"
            )

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether all sources have ended and nothing of them is left to be done."""

    def _idle(self) -> bool:
        """Called now and then while nothing comes; True ends the wait."""
        return False


__all__ = ("CATCH_UP_NS", "CONTROL", "Options", "Raised", "Stage", "Steps", "subscribe")
