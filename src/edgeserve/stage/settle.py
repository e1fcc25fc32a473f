"""Decided inputs and their results, gathered until one settlement writes them together."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from time import monotonic_ns
from typing import Any, TypeVar

from edgeserve.core.errors import Fenced, SendError, TransportError
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.control import Control
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.emit import Frames
from edgeserve.stage.linger import LINGER_NS, NO_ROOM, Linger, Patience
from edgeserve.stage.payloads import Payloads
from edgeserve.transport import ClaimLost, Fence, Frame, Subscription

MOST_PENDING = 256
OLDEST_PENDING_NS = 8_000_000
"""`run()` settles when the oldest unsettled input began this long ago, though more are ready; see `Direct._run_batch` for slow tasks."""

_STUCK_NS = 20_000_000
REFUSED = (*NO_ROOM, ClaimLost, Fenced)
"""Errors of a settlement of which nothing was written."""

_T = TypeVar("_T")


class Settlement(ABC):
    """What is decided and not settled yet, and the thread that settles a tail.

    The stage appends; whoever settles takes from the front what is there. So the stage never waits for the thread, and a user's function
    never runs under a lock.

    Args:
        subscription: settles.
        payloads: the node's.
        decided: what a subclass gathers, one entry per unit, appended last.
        name: the node's.
        control: the node's.

    Attributes:
        since_ns: when the oldest unsettled one began (monotonic), about.
        urgent: a result is too large to have been copied, so it has to be settled before the task runs again.
        results: how many result messages were published.
        settled: how many inputs were.
        fence: the decision log's, for stages that have one.
    """

    fence: Fence | None = None

    def __init__(self, subscription: Subscription, decided: list[Any], name: str, control: Control, payloads: Payloads) -> None:
        self._subscription, self._decided, self._payloads = subscription, decided, payloads
        subscription.stored = payloads.placed
        self.lock = threading.RLock()
        self.since_ns = 0
        self.urgent = False
        self.results = self.settled = 0
        self._patience = Patience(name, control)
        self._error: Exception | None = None
        self._retry_ns = 0
        self._linger_ns = LINGER_NS
        self._patient = False
        self.linger = Linger(f"edgeserve-settle-{name}", self._write_tail)

    def __len__(self) -> int:
        """How many units are pending."""
        return len(self._decided)

    @abstractmethod
    def _write(self, n: int) -> None:
        """Settles the first `n` units; called with the lock held."""

    def _lost(self, lost: ClaimLost, n: int) -> None:
        """Another member has some of the inputs by now."""
        raise lost

    def settle(self) -> None:
        """Writes all that is pending, or raises with all of it kept. In `run()` a store without room is waited for."""
        if self._error is not None:
            self._raise_earlier()
        if self._decided:
            try:
                self._settle()
            except NO_ROOM as exc:
                self._be_patient(exc, self._settle)
            if self._patience.troubled:
                self._patience.over()
        # Not by the thread: the stage may just have said so of a result that came after what the thread has written.
        self.urgent = False

    def write_control(
        self,
        acks: Mapping[str, list[int]],
        outputs: Mapping[str, list[Frame]],
        attributes: Mapping[str, bytes],
        ids: Sequence[bytes] = (),
    ) -> None:
        """Settles control messages, which have no results. `ids`: of ends."""

        def write() -> None:
            with self.lock:
                self._subscription.settle(acks, outputs, ids=ids, attributes=attributes, fence=self.fence)

        try:
            write()
        except NO_ROOM as exc:
            self._be_patient(exc, write)

    def owner_runs(self, runs: bool) -> None:
        """In `run()` the owner settles in time itself, unless the task is stuck: the thread would only be in its way."""
        self._linger_ns = _STUCK_NS if runs else LINGER_NS
        self.linger.period_s = (_STUCK_NS if runs else LINGER_NS) / 1e9 * 2
        self._patient = runs

    def _raise_earlier(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        if isinstance(error, (ClaimLost, Fenced)):
            raise error
        raise SendError(f"settling earlier results failed, they are kept and tried again: {error}") from error

    def _be_patient(self, error: Exception, write: Callable[[], None]) -> None:
        while self._patient and self._patience.wait(error):
            try:
                write()
                return
            except NO_ROOM as exc:
                error = exc
        raise error

    def _settle(self) -> None:
        with self.lock:
            while n := len(self._decided):
                try:
                    self._write(n)
                    return
                except ClaimLost as lost:
                    self._lost(lost, n)

    def close(self) -> None:
        """Ends the thread that settles tails. What is pending stays."""
        self.linger.close()

    def _write_tail(self) -> bool:
        """In the linger thread: settles what its owner left behind."""
        if not self._decided or self._error is not None:
            return False
        now = monotonic_ns()
        if now - self.since_ns >= self._linger_ns and now >= self._retry_ns:
            try:
                self._settle()
            except NO_ROOM as exc:
                self._retry_ns = now + int(self._patience.met(exc) * 1e9)
            except Exception as exc:
                self._error = exc
        return bool(self._decided) and self._error is None


class Pending(Settlement):
    """The inputs that a stage without a join has decided.

    The stage appends to `frames`, `ids`, `topics` and, last, to `positions`.

    Attributes:
        controls: topic and position of control messages among what is pending, which are settled and not counted.
        lost: some inputs went to another member, so what else was claimed with them may have gone too.
    """

    def __init__(
        self,
        subscription: Subscription,
        topic_out: str | None,
        known: RecentIds,
        counts: Counters,
        name: str,
        control: Control,
        payloads: Payloads,
    ) -> None:
        self.frames: list[Frame | Frames | None] = []
        self.ids: list[bytes | None] = []
        self.topics: list[str] = []
        self.positions: list[int] = []
        super().__init__(subscription, self.positions, name, control, payloads)
        self._topic_out, self._known, self._counts = topic_out, known, counts
        self._asides: dict[tuple[str, int], tuple[str, Frame]] = {}
        self.controls: set[tuple[str, int]] = set()
        self.lost = False

    def leave_out(self, settled: Container[bytes]) -> None:
        """Publishes no results of inputs that others have settled."""
        with self.lock:
            for n, id_ in enumerate(self.ids):
                if id_ is not None and id_ in settled:
                    self._payloads.abandon(flattened([self.frames[n]]))
                    self.frames[n] = None
                    self._asides.pop((self.topics[n], self.positions[n]), None)
                    self._counts.count(Reason.DUPLICATE, edge=self.topics[n])

    def aside(self, topic: str, position: int, to: str, frame: Frame) -> None:
        """A frame for another topic, such as a dead letter, that is written with the input's settlement."""
        self._asides[topic, position] = (to, frame)

    def _write(self, n: int) -> None:
        frames, ids, topics, positions = self.frames[:n], self.ids[:n], self.topics[:n], self.positions[:n]
        outputs: dict[str, list[Frame]] = {}
        results = 0
        if self._topic_out is not None:
            plain = None not in frames and Frames not in map(type, frames)
            if produced := frames if plain else flattened(frames):
                outputs[self._topic_out] = produced  # type: ignore[assignment]  # plain: no None, no `Frames`
                results = len(produced)
        acks: dict[str, list[int]] = {topics[0]: positions}
        if topics.count(topics[0]) < n:
            acks = {}
            for topic, position in zip(topics, positions, strict=True):
                acks.setdefault(topic, []).append(position)
        if self._asides:
            for at in zip(topics, positions, strict=True):
                if at in self._asides:
                    to, frame = self._asides[at]
                    outputs.setdefault(to, []).append(frame)
        try:
            self._subscription.settle(acks, outputs, ids=ids if None not in ids else _present(ids))  # type: ignore[arg-type]
        except BaseException as exc:
            if not isinstance(exc, REFUSED):
                self._payloads.doubt(flattened(frames))
            # Large results are the task's own buffers: it may write to them again once this call has returned.
            self.frames[:n] = [owned(f) for f in frames]
            raise
        if self._asides:
            for at in zip(topics, positions, strict=True):
                self._asides.pop(at, None)
        if self._payloads.files is not None:
            self._payloads.files.settled(ids)
        del self.frames[:n], self.ids[:n], self.topics[:n], self.positions[:n]
        self.results += results
        self.settled += n
        if self.controls:
            found = [at for at in zip(topics, positions, strict=True) if at in self.controls]
            self.settled -= len(found)
            self.controls.difference_update(found)

    def _lost(self, lost: ClaimLost, n: int) -> None:
        """Leaves out inputs that another member has by now: it computes the same results, under the same ids."""
        units = zip(self.frames[:n], self.ids[:n], self.topics[:n], self.positions[:n], strict=True)
        kept: list[tuple[Frame | Frames | None, bytes | None, str, int]] = []
        gone: list[tuple[Frame | Frames | None, bytes | None, str, int]] = []
        for unit in units:
            (gone if unit[2] == lost.topic and unit[3] in lost.positions else kept).append(unit)
        self.lost = True
        if not gone:
            raise TransportError(f"the engine refused to settle messages of {lost.topic!r} that were not asked for") from lost
        for _, id_, topic, position in gone:
            self._asides.pop((topic, position), None)
            self.controls.discard((topic, position))
            if id_ is not None:
                self._known.discard((id_,))
        if self._payloads.files is not None:
            self._payloads.files.forget([u[1] for u in gone])
        self._payloads.abandon(flattened([u[0] for u in gone]))
        self._counts.count(Reason.DUPLICATE, len(gone), edge=lost.topic)
        self.frames[:n] = [u[0] for u in kept]
        self.ids[:n] = [u[1] for u in kept]
        self.topics[:n] = [u[2] for u in kept]
        self.positions[:n] = [u[3] for u in kept]


def settle_at_last(settlement: Settlement) -> None:
    """Settles when a node closes: a store without room gets a moment, then what is pending goes back and comes again."""
    for _ in range(3):
        try:
            settlement.settle()
            return
        except NO_ROOM:
            time.sleep(0.1)
    settlement.settle()


def _present(found: list[_T | None]) -> list[_T]:
    """Those that are not None."""
    return [f for f in found if f is not None]


def flattened(produced: list[Frame | Frames | None]) -> list[Frame]:
    """Each result's frames in one list."""
    found: list[Frame | Frames] = _present(produced)
    if Frames in map(type, found):
        return [g for f in found for g in (f if isinstance(f, Frames) else [f])]
    return found  # type: ignore[return-value]


def owned(frame: Frame | Frames | None) -> Frame | Frames | None:
    """The same frame, no longer made of anybody else's buffers."""
    if frame is None or isinstance(frame, bytes):
        return frame
    if type(frame) is Frames:
        return Frames(f if isinstance(f, bytes) else b"".join(f) for f in frame)
    return b"".join(frame)  # type: ignore[arg-type]  # a list of buffers: `Frames` is told apart above


__all__ = ("MOST_PENDING", "OLDEST_PENDING_NS", "REFUSED", "Pending", "Settlement", "flattened", "owned", "settle_at_last")
