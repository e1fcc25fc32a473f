"""The task of a join that several replicas run: each takes sets that whoever holds the join has made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from time import monotonic_ns
from typing import Any

from edgeserve.align import JoinSet
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ClosedError, CorruptMessage, MessageError, TransportError, UnknownTopic
from edgeserve.core.message import Header, Kind
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.base import CATCH_UP_NS, Options
from edgeserve.stage.control import Control
from edgeserve.stage.direct import Direct, Perform
from edgeserve.stage.emit import Frames
from edgeserve.stage.retry import GaveUp
from edgeserve.stage.runset import RunSet
from edgeserve.stage.sets import SOURCE_ID, read_set
from edgeserve.stage.settle import MOST_PENDING
from edgeserve.transport import Delivery, Frame, GroupKind, Transport

_LOOK_EVERY_S = 0.2
_LOOK_SHARE = 4
_FAILED_S = 15.0
_log = logging.getLogger("edgeserve")


class SetTask(Direct):
    """Runs the task on sets from a topic that the group shares, as on the messages of one source.

    Args:
        options: the join's.
        topic: where the sets wait.
        run_set: calls the task, which is open while this is.
        has_ended: says whether the join has nothing left to decide.
        never_seen: names the sources that the join has received nothing of.
        flush_join: returns when what the join has settled is durable.

    Attributes:
        drained: nobody makes sets any more, and all were settled when nothing had come for a while.
    """

    _kind = Kind.SET

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        topic: str,
        run_set: RunSet,
        has_ended: Callable[[], bool],
        never_seen: Callable[[], list[str]],
        flush_join: Callable[[], None],
    ) -> None:
        super().__init__(
            replace(options, topics=(topic,), kind=GroupKind.SHARED, start="earliest", drop_if_older_than_ms=None), control, counts
        )
        self._input_topic, self._source, self._topic_out = options.topics[0], SOURCE_ID, run_set.topic
        self._shown_topics = self._input_topic
        self._run_set, self.current = run_set, run_set.current
        self._join_has_ended, self._join_has_not_seen = has_ended, never_seen
        self._flush_join = flush_join
        self._look_at, self._empty, self._failed_since = 0.0, False, 0.0
        self._draining = self.drained = False

    def _make_perform(self) -> Perform:
        once, parameters = self._run_set.make_once(), self._run_set.parameters

        def perform(header: Header, payload: bytes | memoryview, watermark_ns: int | None) -> tuple[Any, Frame | Frames | None]:
            return once(JoinSet(read_set(payload, parameters), True))

        return perform

    def _control_message(self, delivery: Delivery, header: Header) -> Any:
        if header.kind == Kind.END:
            return super()._control_message(delivery, header)
        self._refuse(delivery, header, CorruptMessage(f"a message of {header.source_id!r} stands where only sets may"))
        return None

    def _give_up(self, delivery: Delivery, header: Header, error: GaveUp) -> tuple[str, Frame]:
        try:
            items = [item for _, item in read_set(decode_frame(delivery[0])[1], self._run_set.parameters).values()]
        except MessageError:
            return super()._give_up(delivery, header, error)
        aside = self._aside.record(self._input_topic, [item.frame for item in items], [item.header for item in items], error)
        for item in items:
            self._counts.count(error.reason, edge=item.header.source_id)
        if self.options.payloads.files is not None:
            self.options.payloads.files.forget([header.id])
        return aside

    def _ends_there(self, source: str) -> bool:
        """An end follows only sets that are decided and sent: what one that held the join before sends behind it was there before."""
        return True

    def _end_frame(self, of: bytes) -> Frame | None:
        return self._run_set.end_frame(of)

    def _never_seen(self) -> list[str]:
        return self._join_has_not_seen()

    def has_ended(self) -> bool:
        """The join's own end says that no sets follow; a replica that came later has not seen it, so what is left is asked for."""
        return not (self._ready or self._pending.positions or self._ends.held) and self._join_has_ended() and self._is_empty()

    def drain(self, draining: bool) -> None:
        """Whether nobody makes sets any more: then it ends when all are settled."""
        if draining and not self._draining:
            self._look_at, self._empty, self._failed_since = 0.0, False, 0.0  # what was seen before counts no more
        self._draining, self.drained = draining, draining and self.drained

    def _receive(self, timeout_ms: float) -> bool:
        if not self.options.only_newest:
            return super()._receive(timeout_ms)
        found, until = list[Delivery](), monotonic_ns() + CATCH_UP_NS
        try:
            while not (found and (self._control.stop or monotonic_ns() > until)) and super()._receive(0 if found else timeout_ms):
                found = self._newest_of([*self._ready, *found])
                self._ready.clear()
                if len(self._pending) >= MOST_PENDING:
                    self._pending.settle()
        finally:
            self._ready += found
        return bool(found)

    def _newest_of(self, deliveries: list[Delivery]) -> list[Delivery]:
        """The newest sets, and all that are none, newest first; the others are dropped."""
        kept, sets = list[Delivery](), 0
        for delivery in sorted(deliveries, key=itemgetter(1), reverse=True):
            try:
                header, _ = decode_frame(delivery[0])
            except MessageError:
                kept.append(delivery)  # to be put aside by name
                continue
            if header.kind != Kind.SET:
                kept.append(delivery)
            elif header.id in self._known:
                self._drop(delivery, header, Reason.DUPLICATE, None)
            elif sets < self.options.only_newest:
                sets += 1
                kept.append(delivery)
            else:
                self._drop(delivery, header, Reason.SUPERSEDED, header.id)
        return kept

    def _idle(self) -> bool:
        self.drained = self._draining and self._is_empty()
        return super()._idle() or self.drained

    def _is_empty(self) -> bool:
        """Whether the group has settled all sets, as of the last look: how long ago that may be depends on how long looking takes."""
        began = time.monotonic()
        if began < self._look_at:
            return self._empty
        pause = 0.0
        try:
            self._flush_join()  # on a broker an end that is settled may still be on its way
            topic = self.options.topics[0]
            self._empty, self._failed_since = self._subscription.floor(topic) >= self._transport.end(topic), 0.0
            pause = _LOOK_SHARE * (time.monotonic() - began)
        except (TransportError, ClosedError) as exc:  # the join may be leaving its group to join it anew
            self._failed_since = self._failed_since or began
            self._empty = time.monotonic() - self._failed_since > _FAILED_S
            if self._empty:
                what, name = self.options.what, self.options.name
                _log.warning("%s %r cannot ask for what is left of its sets, and nothing has come: %s", what, name, exc)
        self._look_at = time.monotonic() + max(_LOOK_EVERY_S, pause)
        return self._empty


def backlog(transport: Transport, topic: str, group: str) -> int:
    """How many messages of a topic a group has not settled; 0 where there is no such topic or group."""
    try:
        info = transport.topic_info(topic)
    except UnknownTopic:
        return 0
    found = info.groups.get(group)
    return info.messages if found is None else found.backlog


__all__ = ("SetTask", "backlog")
