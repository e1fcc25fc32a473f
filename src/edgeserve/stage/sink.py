"""The end of a pipeline: a function with an effect outside of it, and the journal that keeps the effect from happening twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters, Reason
from edgeserve.core.payload import decoder_for
from edgeserve.payload import LAZY
from edgeserve.stage.base import Options
from edgeserve.stage.control import Control
from edgeserve.stage.direct import Direct, Perform
from edgeserve.stage.emit import Frames
from edgeserve.stage.journal import Journal, journal_directory
from edgeserve.stage.payloads import LAZY_BYTES
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.task import DEFERRED, Task
from edgeserve.transport import Delivery, Frame, Transport


class Sink(Direct):
    """Calls the function on every message, of any source."""

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        task: Task,
        gate: Callable[[Any], Any] | None,
        url: str,
        log: StepLog | None,
    ) -> None:
        super().__init__(options, control, counts)
        self._task, self._gate, self._url, self._log = task, gate, url, log
        name = task.parameters[0] if task.parameters else ""
        annotation = task.annotations.get(name, Any) if gate is None else Any
        self._decode = decoder_for(annotation, source=name)
        self._journal: Journal
        self._may_repeat: set[bytes] = set()
        self._attached_ns = 0
        self._foreign_past = False

    def open(self, transport: Transport) -> None:
        self._directory = journal_directory(transport, self._url, self.options.topics[0], self.options.group)
        super().open(transport)

    def _prepare(self) -> None:
        self._journal = Journal(self._directory)
        try:
            # Another host may have done what this one's journals know nothing of.
            self._foreign_past = self._journal.fresh and len(self._known) > 0
            self._attached_ns = time.time_ns()
            self._take_over_known()
            self._task.open()
        except BaseException:
            self._journal.close()
            raise

    def _learn(self) -> None:
        self._journal.refresh()
        self._take_over_known()

    def _take_over_known(self) -> None:
        self._known.update(id_ for id_ in self._journal.done if id_ not in self._known)
        self._may_repeat |= {id_ for id_ in self._journal.in_hand if id_ not in self._known}

    def _admit_batch(self, batch: Sequence[Delivery]) -> None:
        if batch[0][3] > 0 or (len(batch) > 1 and max(map(itemgetter(3), batch)) > 0):
            # A member died; what it has done stands in its journal, if it was on this host.
            self._learn()
        super()._admit_batch(batch)

    def _make_perform(self) -> Perform:
        decode, gate, call, finish, log = self._decode, self._gate, self._task.call, self._task.finish, self._log
        journal, known, subscription, positions = self._journal, self._known, self._subscription, self._pending.positions
        begin, done = journal.writer()
        current, may_repeat, fresh, attached_ns = self.current, self._may_repeat, journal.fresh, self._attached_ns
        take = self.options.payloads.take
        shared = False
        hand: bytes | None = None

        def perform(header: Header, payload: bytes | memoryview, watermark_ns: int | None) -> tuple[Any, Frame | Frames | None]:
            nonlocal shared, hand
            came_again = current.redelivered
            if not positions:
                # All is settled, so it is known anew who else there is.
                shared = not subscription.alone
                if shared and not journal.complete():
                    self._learn()
            schema = header.schema
            # The look that takes longest comes last: this runs for every message.
            if header.size >= LAZY_BYTES or (":" in schema and schema[:2] == LAZY):
                schema, payload = take(header, payload)
            value = decode(schema, payload)
            if gate is not None:
                value = gate(value)
                if value is None:
                    self._counts.count(Reason.GATE, edge=header.source_id)
                    return None, None
            id_ = header.id
            start_ns = time.time_ns() if log is not None else 0
            outer = hand
            try:
                if outer is not None:
                    journal.doubt(outer)  # its function steps this node, and its slot is needed
                hand = id_
                begin(id_)
                held = False
                if shared:
                    by_others, held = journal.look(id_)
                    if by_others:
                        known.update(by_others)
                    if id_ in known:
                        journal.abandon(id_)
                        hand = outer
                        if outer is not None:
                            begin(outer)
                        self._counts.count(Reason.DUPLICATE, edge=header.source_id)
                        return None, None
                current.redelivered = (
                    held
                    or (bool(may_repeat) and id_ in may_repeat)
                    or (fresh and header.sent_ns < attached_ns and (came_again or self._foreign_past))
                )
                result = call(value)
                if type(result) in DEFERRED:
                    result = finish(result)
            except BaseException:
                may_repeat.add(id_)
                hand = outer
                if outer is not None:
                    journal.doubt(id_)
                    begin(outer)
                raise
            done()
            hand = outer
            if outer is not None:
                begin(outer)
            if log is not None:
                log.write(
                    msg_id=id_.hex(),
                    source_id=header.source_id,
                    event_ns=header.event_ns,
                    sent_ns=header.sent_ns,
                    start_ns=start_ns,
                    end_ns=time.time_ns(),
                )
            return result, None

        return perform

    def _failed(self, header: Header) -> None:
        self._may_repeat.discard(header.id)
        self._journal.abandon(header.id)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._journal.close()
            self._task.close()


__all__ = ("Sink",)
