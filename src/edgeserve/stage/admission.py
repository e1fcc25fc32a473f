"""Inputs of a join that never get to its policy: duplicates, strangers, what a gate lets go, what another partition takes."""

from __future__ import annotations

from edgeserve.core.errors import MessageError
from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.base import Options
from edgeserve.stage.deadletter import Asides
from edgeserve.stage.decisions import LEFT, Decisions, unit
from edgeserve.stage.duplicates import RecentIds
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.runset import Input
from edgeserve.stage.ways import Sets
from edgeserve.transport import Delivery, Frame


class Admission:
    """Looks at inputs before the policy, and decides those that it is not to have.

    Args:
        pending: writes what is decided.
        known: ids that the group has decided.
        aside: makes the records of what is given up.

    Attributes:
        apart: messages taken that are none of a set: control messages, and those of other partitions.
    """

    def __init__(self, options: Options, counts: Counters, run_set: Sets, pending: Decisions, known: RecentIds, aside: Asides) -> None:
        self._topic, self._counts, self._run_set = options.topics[0], counts, run_set
        self._pending, self._known, self._aside = pending, known, aside
        self.apart = 0

    def admit(self, item: Input) -> bool:
        """Of a part whose key `by=` makes: whether an input passes its gate and is of this part. What is of another is decided there."""
        if self._run_set.screened and not self.screen(item):
            return False
        part = self._run_set.part
        if part is not None and not part.has(item.header):
            self.leave(item.position)
            return False
        return True

    def leave(self, position: int) -> None:
        """A control message that decides nothing, or another partition's message: nothing is said of it."""
        # For every message of every other partition, so that each call counts.
        self.apart += 1
        self._pending.units.append(([position], LEFT, (), None, None, (), None))

    def screen(self, item: Input) -> bool:
        """Runs `gate_in` and the function of `by=`; False when the input ends here."""
        part = self._run_set.part
        try:
            passed = self._run_set.screen(item)
        except GoesBack:
            raise
        except Exception as exc:
            if part is not None and not part.has(item.header):
                self.leave(item.position)
                return False
            reason = exc.reason if isinstance(exc, MessageError) else str(Reason.DEAD_LETTER)
            aside = self._aside.record(self._topic, [item.frame], [item.header], exc, reason=reason, attempts=1)
            self._counts.count(reason, edge=item.header.source_id)
            self.ack(item.position, item.header.id, reason, aside)
            return False
        if passed:
            return True
        if part is not None and not part.has(item.header):
            self.leave(item.position)
        else:
            self.drop(item.position, item.header, Reason.GATE)
        return False

    def ack(self, position: int, id_: bytes | None = None, reason: str = "", aside: tuple[str, Frame] | None = None) -> None:
        """Decides an input that never gets to the policy."""
        if id_ is None:
            self._pending.units.append(unit([position], [], aside=aside))
        else:
            self._known.new.add(id_)
            self._pending.units.append(unit([position], [id_], drops=[(id_, reason)], aside=aside))

    def drop(self, position: int, header: Header, reason: str) -> None:
        """Decides an input that is not wanted."""
        self._counts.count(reason, edge=header.source_id)
        self.ack(position, header.id, reason)

    def refuse(self, delivery: Delivery, header: Header | None, error: MessageError) -> None:
        """Puts aside what cannot be taken as a message for this join."""
        frame, position, _, _, topic = delivery
        if header is not None and header.id in self._known:
            self._counts.count(Reason.DUPLICATE, edge=header.source_id)
            self.ack(position)
            return
        if (part := self._run_set.part) is not None and not part.has_unread():
            self.leave(position)
            return
        aside = self._aside.record(topic, [frame], [header], error)  # or the message goes back, and is not counted
        self._counts.count(error.reason, edge=topic)  # by topic: strangers may have any number of source ids
        self.ack(position, None if header is None else header.id, error.reason, aside)


__all__ = ("Admission",)
