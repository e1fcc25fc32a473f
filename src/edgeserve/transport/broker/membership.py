"""A member's part in its group's log: it follows the log, writes to it, shows that it lives, and notices who does not."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from edgeserve.core.errors import ClosedError, Fenced, GroupBusy, GroupConflict, SendError, TransportError
from edgeserve.core.process import lives, process_name, this_host
from edgeserve.transport.base import GroupKind
from edgeserve.transport.broker.driver import Driver, Entry, Tail
from edgeserve.transport.broker.grouplog import (
    Beat,
    Checkpoint,
    GroupLog,
    Joined,
    Lead,
    Left,
    Line,
    MemberState,
    Record,
    Settled,
    Snapshot,
    decode_line,
    encode_line,
    group_topic,
)
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.history import find_snapshot
from edgeserve.transport.broker.patience import Grace, PatientOutlet
from edgeserve.transport.broker.start import entry_since
from edgeserve.transport.broker.trouble import Silence
from edgeserve.transport.broker.watch import Watch
from edgeserve.transport.groups import refuse

BEAT_S = 1.0
SILENT_S = 3.0
_ANSWER_S = 3.0
_log = logging.getLogger(__name__)


def given_name(name: str) -> str:
    """A member's name as its program gave it, without what tells two incarnations apart."""
    return name.partition("\0")[0]


def this_process(kind: GroupKind, signature: str, version: str) -> MemberState:
    """What a member of this process says of itself."""
    return MemberState(kind, signature, this_host(), process_name(os.getpid()), version=version)


def _pid(member: MemberState) -> int:
    return int(member.process.partition("-")[0] or 0)


class Membership:
    """One member of a group.

    Args:
        driver: the broker.
        topic, group: whose log it is.
        name: this member's.
        guard: of the state; shared with the owner.
        heard: told each record that comes, with the topic; holds the lock.

    Attributes:
        came: how many others have come since this member has.
        error, tail: what went wrong with the log; what follows it.
        buried_at: when this member last heard that another was found dead (monotonic seconds).
    """

    def __init__(self, driver: Driver, topic: str, group: str, name: str, guard: Guard, heard: Callable[[str, Record], None]) -> None:
        self._driver, self.data_topic, self.topic, self._group = driver, topic, group_topic(topic, group), group
        self._heard, self.came, self.buried_at = heard, 0, float("-inf")
        # Two incarnations under one name are two members.
        self.name = f"{name}\0{uuid.uuid4().hex[:8]}"
        self._guard = guard
        self.log = GroupLog(self.name)
        self._seen: dict[str, float] = {}
        self._watch = Watch()
        self.error: Exception | None = None
        self._outlet = PatientOutlet(driver.outlet(self.topic), Silence(driver, None, self.topic), driver.deadline_s)
        self.tail: Tail | None = None
        self._sent = 0.0
        # Settlements that are durable and were not read back yet, by their entry: the epoch, and who is to be told.
        self._unheard: dict[int, tuple[int, Callable[[Exception | None], None]]] = {}
        self._closed = self._shortening = False
        # Whether it has said goodbye: then it does not come back.
        self._left, self._coming = False, threading.Lock()
        self._life = ""

    def join(self, me: MemberState, start_ns: int) -> None:
        """Comes into the group, or is refused."""
        try:
            founds = self._follow()
            life, start_at = "", 0
            if start_ns and founds:
                life, start_at = self._driver.life(self.data_topic), entry_since(self._driver, self.data_topic, start_ns)
            self.write([Joined(self.name, me, start_at, life)], wait=True)
            self._settle_in(me)
        except BaseException:
            self.close()
            raise

    def come_back_if_buried(self, me: MemberState) -> None:
        """Joins again, if others have taken it for dead while it was held up."""
        with self._coming:
            if self.name not in self.log.members and not self._left:
                _log.warning("a member of group %r was silent for too long and joins again", self._group)
                self.write([Joined(self.name, me)])

    def _follow(self) -> bool:
        """Whether the log is new."""
        founds = self._driver.last(self.topic) is None
        self.log, after = (GroupLog(self.name), None) if founds else self._restored()
        self.tail = self._driver.tail(self.topic, after, self._deliver)
        return founds

    def _restored(self) -> tuple[GroupLog, int | None]:
        """The log as of a snapshot, and after which record it is to be read."""
        log, found = GroupLog(self.name), find_snapshot(self._driver, self._group, self.topic)
        if found is None:
            return log, None
        log.restore(*found)
        return log, found[0].ids_after if found[0].ids_after >= 0 else None

    def settle(self, record: Settled, done: Callable[[Exception | None], None]) -> None:
        """Appends a settlement. `done` is called when it is durable, under a lead when it is known to count: the log is read up to it."""
        if not record.epoch:
            self.write([record], told=lambda _, error: done(error))
            return

        def confirm(at: int | None, error: Exception | None) -> None:
            with self._guard.mutex:
                if error is None and at is not None and self.log.at < at:
                    self._unheard[at] = record.epoch, done
                    return
            done(error or self._outlived(at, record.epoch))

        self.write([record], told=confirm)

    def _outlived(self, at: int | None, epoch: int) -> Exception | None:
        """Why a settlement that stands in the log does not count."""
        if at is None or self.log.counts(at, epoch):
            return None
        return Fenced(
            f"the lead of group {self._group!r} on {self.data_topic!r} has passed to another member while this one stood still: what it "
            "settled last is that one's to settle"
        )

    def _deliver(self, entry: Entry) -> None:
        """By the driver's thread."""
        unheard = list[Callable[[Exception | None], None]]()
        with self._guard.mutex:
            if self._life not in ("", entry.life):
                unheard = self._begin_anew()
            self._life = entry.life
        for lost in unheard:
            lost(None)  # their results are stored, and nobody can refuse them any more
        if entry.at <= self.log.at:
            return  # again, over a new connection; never in a log that has begun anew
        try:
            line = decode_line(self._group, entry.data)
            caught_up = self._caught_up(entry.at, line.checkpoint)
        except TransportError as exc:
            with self._guard.mutex:
                self.error = self.error or exc
                self._guard.changed.notify_all()
            return
        with self._guard.mutex:
            if caught_up is not None:
                self._go_on_with(caught_up)
            self._apply(line, entry.at)
            heard = [(at, *self._unheard.pop(at)) for at in sorted(self._unheard) if at <= entry.at]
            outcomes = [(done, self._outlived(at, epoch)) for at, epoch, done in heard]
            self._guard.changed.notify_all()
        for done, outlived in outcomes:
            done(outlived)

    def _apply(self, line: Line, at: int) -> None:
        now, fresh = time.monotonic(), at > self.log.upto
        self.log.apply(line, at, ids_only=not fresh)
        for record in line.records:
            self._shortening = self._shortening and not isinstance(record, Snapshot)
            if not isinstance(record, Snapshot):
                if record.name == self.name and now - self._seen.get(self.name, now) > 2 * BEAT_S:
                    # The broker was away, or this process stood still: the others' time begins anew.
                    self._seen.clear()
                self._seen[record.name] = now
            if type(record) is Left and record.by:
                self.buried_at = now
            if fresh:
                self.came += type(record) is Joined and record.name != self.name
                if type(record) is not Settled or at not in self.log.refused:
                    self._heard(self.data_topic, record)
        if any(type(record) in (Joined, Left, Snapshot) for record in line.records):
            self._watch_members()

    def _watch_members(self) -> None:
        if not self._closed:
            self._watch.only(_pid(m) for m in self.log.members.values() if m.host and m.host == this_host())

    def _caught_up(self, upto: int, named: Checkpoint | None) -> GroupLog | None:
        """The log as it is before an entry, where records between that and what was read last were trimmed. `named`: by the entry."""
        last = max(self.log.at, self.log.upto)
        if last < 0:
            # What is named after it is of a log that was deleted since. It may have been trimmed since this member began to follow it, too.
            whole = (named is None or named.at >= upto) and find_snapshot(self._driver, self._group, self.topic) is None
        else:
            whole = upto <= last + 1 or self._driver.get(self.topic, last) is not None  # what is trimmed is trimmed from the oldest on
        if whole:
            return None
        while True:
            log, after = self._restored()
            log.follow(self.log)
            for missed in self._driver.scan(self.topic, None if after is None else after + 1):
                if missed.at >= upto:
                    break
                log.apply(decode_line(self._group, missed.data), missed.at, ids_only=missed.at <= log.upto)
            if log.upto < 0 or self._driver.get(self.topic, log.upto) is not None:
                return log  # else more was trimmed meanwhile

    def _go_on_with(self, log: GroupLog) -> None:
        """Holds the lock."""
        _log.warning("a member of group %r was cut off for so long that its log went on without it: it reads up", self._group)
        self.log, self._shortening = log, False
        self._seen.clear()
        self.came += 1  # whoever it was
        self._heard(self.data_topic, Settled("", partial=log.partial))
        self._heard(self.data_topic, Left("", worked=log.worked))
        self._watch_members()

    def _begin_anew(self) -> list[Callable[[Exception | None], None]]:
        """The log was deleted and made again: whoever lives joins anew. Returns who waits for records of the old one."""
        _log.warning(
            "the log of group %r on topic %r was deleted: its members join anew; what they had settled is not known to newcomers any more",
            *(self._group, self.data_topic),
        )
        self.log, self._shortening = GroupLog(self.name), False
        self._seen.clear()
        unheard, self._unheard = [done for _, done in self._unheard.values()], {}
        return unheard

    def forget_entries(self) -> None:
        """The topic was deleted and made again: what the log says is of other entries. Holds the lock."""
        entries = self.log.forget(self.data_topic)
        if entries:
            self.write([Settled(self.name, closed={self.data_topic: entries})])

    def _settle_in(self, me: MemberState) -> None:
        """Finds out whether those who were here before live, and whether this member can be with them."""
        deadline = time.monotonic() + SILENT_S + BEAT_S / 2
        came = time.monotonic()
        refused: Exception | None = None
        while True:
            self.bury_the_dead(wait=True)
            with self._guard.mutex:
                mine = self.log.members.get(self.name)
                others = {n: m for n, m in self.log.members.items() if n != self.name and (mine is None or m.joined_at < mine.joined_at)}
                # Another with this name took its place in the log, or this member took that of one.
                refused = self._refusal(me, others)
                if refused is None:
                    return
                proven = all(self._here(m) or self._seen.get(n, 0) > came for n, m in others.items())
                if proven or time.monotonic() > deadline:
                    break
                self._guard.changed.wait(BEAT_S / 5)
        self.write([Left(self.name)], wait=True)
        raise refused

    def _refusal(self, me: MemberState, others: dict[str, MemberState]) -> Exception | None:
        for other in others:
            if given_name(other) == given_name(self.name):
                return GroupConflict(
                    f"group {self._group!r} has a live member {given_name(other)!r} on {self.data_topic!r}: give this one another name"
                )
        try:
            refuse(me.kind, me.signature, [(given_name(n), m.kind, m.signature) for n, m in others.items()])
        except (GroupConflict, GroupBusy) as exc:
            return exc
        return None

    # --- writing ------------------------------------------------------------------------------------------------

    def write(
        self,
        records: Sequence[Record],
        *,
        told: Callable[[int | None, Exception | None], None] | None = None,
        wait: bool = False,
        patience_s: float | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        """Appends records. `told` is called when they are durable, with where they are; `wait`: returns when this member has
        read them itself, or raises when that takes longer than `patience_s` (None: waits for as long as the broker is away, or until
        `stopping` says to stop)."""
        confirmed: list[int | None] = []

        def confirm(at: int | None, error: Exception | None) -> None:
            with self._guard.mutex:
                confirmed.append(at)
                if error is not None:
                    self.error = self.error or error
                self._guard.changed.notify_all()
            if told is not None:
                told(at, error)

        self._sent = time.monotonic()
        self._outlet.send(encode_line(records, self.log.checkpoint), confirm)
        if wait:
            began, grace = time.monotonic(), Grace(stopping)
            with self._guard.mutex:
                while not confirmed or confirmed[0] is None or self.log.at < confirmed[0]:
                    self.check()
                    if self._closed:
                        raise ClosedError(f"the member {self.name!r} of group {self._group!r} is closed")
                    if grace.over:
                        raise SendError(f"told to stop while the log of group {self._group!r} does not answer")
                    if not self._guard.changed.wait(0.5) and patience_s is not None and time.monotonic() - began > patience_s:
                        why = self._driver.trouble() or "no reason is known"
                        raise TransportError(f"the log of group {self._group!r} did not answer within {patience_s:g} s: {why}")

    def barrier(self, stopping: Callable[[], bool] | None = None) -> None:
        """Returns when this member knows all that was in the log before. `stopping`: see `write`."""
        self.write([Beat(self.name)], wait=True, stopping=stopping)

    def check(self) -> None:
        """Raises what went wrong with the log."""
        error = self.error or (None if self.tail is None else self.tail.error)
        if error is not None:
            raise TransportError(f"the log of group {self._group!r} failed: {error}") from error

    # --- who lives ----------------------------------------------------------------------------------------------

    def bury_who_just_died(self, *, thorough: bool) -> None:
        """What a killed member held may come at once: then it must be known that it is dead."""
        with self._guard.mutex:
            died = self._watch.someone_died(thorough=thorough)
        if died:
            self.bury_the_dead(wait=True, whoever=True)

    def _here(self, member: MemberState) -> bool:
        """Whether a member is a living process of this machine."""
        return lives(member.host, member.process) is True

    def _dead(self, name: str, member: MemberState, now: float) -> bool:
        if lives(member.host, member.process) is False:
            return True
        # Silent for as long as this member itself was heard.
        return self._seen.get(self.name, now) - self._seen.setdefault(name, now) > SILENT_S

    def beat(self) -> None:
        """To be called about every second."""
        now = time.monotonic()
        if now - self._sent >= BEAT_S * 0.9 and not self._outlet.keeps:
            self.write([Beat(self.name)])

    def bury_the_dead(self, *, wait: bool = False, whoever: bool = False) -> list[str]:
        """Writes down who is dead; returns their names. One member of those that live is enough, unless `whoever` finds it must."""
        now = time.monotonic()
        with self._guard.mutex:
            dead = [n for n, m in self.log.members.items() if n != self.name and self._dead(n, m, now)]
            living = [n for n in self.log.members if n not in dead]
            if not dead or (not whoever and self.name in living and self.log.first_of(living) != self.name):
                return []  # one is enough; if that one is dead too, this member is the first by then
        doubt = {}
        last = self._driver.last(self.data_topic)
        if last is not None:
            doubt[self.data_topic] = last
        for name in dead:
            _log.warning("member %r of group %r is gone", given_name(name), self._group)
        self.write([Left(name, self.name, {}, doubt) for name in dead], wait=wait)
        return dead

    def lead(self, *, wait: bool = False) -> None:
        """Takes the lead when nobody has it and this member is the first in line."""
        with self._guard.mutex:
            log = self.log
            wants = not log.leader and self.name in log.members and log.first_of(log.members) == self.name
            epoch = log.epoch + 1
        if wants:
            self.write([Lead(self.name, epoch)], wait=wait)

    @property
    def leads(self) -> bool:
        """Whether this member has the lead."""
        return self.log.leader == self.name

    @property
    def alone(self) -> bool:
        """Whether there is no other member; not of one that was taken for dead by mistake, and is not back yet."""
        return len(self.log.members) <= 1 and self.name in self.log.members

    def leave(self, goodbye: Left) -> None:
        """Says goodbye."""
        with self._coming:
            self._left = True
        self.write([goodbye], wait=True, patience_s=_ANSWER_S)

    def keep_short(self, floor: Callable[[], int]) -> None:
        """Writes a snapshot when it is time for one; what is older is not needed then. `floor`: the oldest entry not settled."""
        with self._guard.mutex:
            if self._shortening or not self.log.wants_snapshot or self.log.first_of(self.log.members) != self.name:
                return
        unsettled, newest = floor(), self._driver.last(self.data_topic)
        with self._guard.mutex:
            records = self.log.snapshot(-1 if newest is None else newest, unsettled)
            self._shortening = True
        # What it stands for may go only when it is there itself.
        try:
            self.write(records, wait=True, patience_s=_ANSWER_S)
        except BaseException:
            self._shortening = False  # and is tried again
            raise
        snapshot = records[-1]
        assert isinstance(snapshot, Snapshot)
        if snapshot.ids_after > 0:
            self._driver.discard(self.topic, snapshot.ids_after)

    def close(self) -> None:
        """Lets go of the log. Idempotent."""
        with self._guard.mutex:
            self._closed = True
            self._watch.close()
        if self.tail is not None:
            self.tail.close()
        self._outlet.close()


__all__ = ("BEAT_S", "SILENT_S", "Membership", "given_name", "this_process")
