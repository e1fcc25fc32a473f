"""A member's places in the logs of its group, one log for each topic: members of one group may have joined it for different topics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from edgeserve.core.errors import EdgeServeError
from edgeserve.transport.broker.driver import Driver
from edgeserve.transport.broker.grouplog import Left, MemberState, Record, Settled
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.membership import Membership


class Places:
    """One member of a group on all of its topics.

    Args:
        driver: the broker.
        topics, group: whose logs they are.
        name: this member's.
        guard: of the state; shared with the owner.
        heard: told each record that comes, with its topic; holds the lock.
    """

    def __init__(
        self,
        driver: Driver,
        topics: Sequence[str],
        group: str,
        name: str,
        guard: Guard,
        heard: Callable[[str, Record], None],
    ) -> None:
        self._guard = guard
        self._driver, self._topics, self._group, self._name, self._heard = driver, topics, group, name, heard
        self.of: dict[str, Membership] = {}

    def join(self, me: MemberState, start_ns: int) -> None:
        """Comes into the group on every topic, or is refused and leaves no trace."""
        try:
            for topic in self._topics:
                place = Membership(self._driver, topic, self._group, self._name, self._guard, self._heard)
                place.join(me, start_ns)
                self.of[topic] = place
        except BaseException:
            self.leave({})
            self.close()
            raise

    @property
    def first(self) -> Membership:
        """Where ids, attributes and the lead are: the same for members that list the topics in another order."""
        return self.of[min(self._topics)]

    # --- what is known ------------------------------------------------------------------------------------------

    def take_ids(self) -> list[bytes]:
        """Settled ids that were not taken yet."""
        return [id_ for place in self.of.values() for id_ in place.log.take_ids()]

    @property
    def leads(self) -> bool:
        """Whether this member has the lead."""
        return self.first.leads

    @property
    def epoch(self) -> int:
        """How often the lead was taken."""
        return self.first.log.epoch

    @property
    def nobody_leads(self) -> bool:
        """Whether the lead is to be had."""
        return not self.first.log.leader

    # --- what is done -------------------------------------------------------------------------------------------

    def lead(self, *, wait: bool = False) -> None:
        """Takes the lead when nobody has it and this member is the first in line."""
        self.first.lead(wait=wait)

    def barrier(self, stopping: Callable[[], bool]) -> None:
        """Returns when this member knows all that was in the logs before, or raises some time after `stopping` says to stop."""
        for place in self.of.values():
            place.barrier(stopping)

    def show_life(self, me: MemberState) -> None:
        """To be called about every second: this member lives."""
        for place in self.of.values():
            place.come_back_if_buried(me)
            place.beat()

    def bury_the_dead(self) -> None:
        """To be called about every second: writes down who is dead."""
        for place in self.of.values():
            place.bury_the_dead()

    @property
    def wants_snapshot(self) -> bool:
        """Whether `keep_short` has something to do."""
        return any(place.log.wants_snapshot for place in self.of.values())

    def keep_short(self, floor: Callable[[str], int]) -> None:
        """Writes snapshots where it is time for them. `floor`: of a topic, the oldest entry not settled."""
        for topic, place in self.of.items():
            place.keep_short(partial(floor, topic))

    def write(self, records: Mapping[str, Settled], done: Callable[[Exception | None], None]) -> None:
        """Appends a record to the log of each topic. `done` is called once: when all are durable, or one never will be.

        Under a lead the one that bears the epoch comes first, and the others when it is known to count.
        """
        first = self.first.data_topic
        fenced, others = records.get(first), {topic: record for topic, record in records.items() if topic != first}
        if fenced is None or not fenced.epoch or not others:
            self._write(records, done)
            return

        def go_on(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            try:
                self._write(others, done)
            except EdgeServeError as exc:
                done(exc)

        self.first.settle(fenced, go_on)

    def _write(self, records: Mapping[str, Settled], done: Callable[[Exception | None], None]) -> None:
        left, failed = len(records), list[Exception]()

        def confirm(error: Exception | None) -> None:
            nonlocal left
            with self._guard.mutex:
                left -= 1
                if error is not None:
                    failed.append(error)
                last = left == 0
            if last:
                done(failed[0] if failed else None)

        for topic, record in records.items():
            self.of[topic].settle(record, confirm)

    def leave(self, worked: Mapping[str, list[int]]) -> None:
        """Says goodbye."""
        for topic, place in self.of.items():
            begun = worked.get(topic)
            place.leave(Left(place.name, "", {topic: begun} if begun else {}))

    def close(self) -> None:
        """Lets go of the logs. Idempotent."""
        for place in self.of.values():
            place.close()


__all__ = ("Places",)
