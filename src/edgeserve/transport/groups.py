"""What a group knows of one topic, as a pure state machine: who its members are, who holds which positions, what comes again.

Positions are claimed in ranges. A range is unclaimed (at or above `cursor`), claimed by a member, waiting to be delivered again, or
settled (everything else). No I/O and no clock: times are handed in, in ns.

A member that has the group to itself (`sole`) reads ahead of the cursor without writing a claim, up to `sole_hi`, which it moves when it
settles; what it has read it claims then. When a newcomer ends this (`share`), all that the sole member may have read becomes its claim,
and it gives back what it had not read when it next looks (`term` tells it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import sub

import msgspec

from edgeserve.core.errors import GroupBusy, GroupConflict
from edgeserve.transport.base import ClaimLost, GroupInfo, GroupKind
from edgeserve.transport.checks import differing

Range = tuple[int, int]
_END = 2**63


class MemberRecord(msgspec.Struct, array_like=True):
    """A member: where to wake it, what it says of itself, and whether senders wait for it."""

    address: str
    signature: str
    joined_ns: int
    version: str = ""
    holds_senders: bool = True


class Claim(msgspec.Struct, array_like=True):
    """Positions [lo, hi) in the hands of a member; `deadline_ns` 0: for as long as it lives."""

    lo: int
    hi: int
    member: str
    deadline_ns: int
    deliveries: int


class Waiting(msgspec.Struct, array_like=True):
    """Positions [lo, hi) to be delivered again, not before `due_ns`; `deliveries`: how often they were delivered already."""

    lo: int
    hi: int
    due_ns: int
    deliveries: int


class GroupState(msgspec.Struct, array_like=True):
    """The state of one group on one topic; stored as it is, fields are only ever appended."""

    kind: GroupKind
    cursor: int
    epoch: int = 0
    active: str = ""
    members: dict[str, MemberRecord] = {}
    claims: list[Claim] = []
    waiting: list[Waiting] = []
    attributes: dict[str, bytes] = {}
    ids_next: int = 0
    ids_kept: int = 0
    settled: int = 0
    blocked: dict[str, tuple[int, int]] = {}
    sole: str = ""
    sole_hi: int = 0
    term: int = 0
    recent_ids: bytes = b""

    def join(self, name: str, record: MemberRecord, kind: GroupKind, head: int, deadline_ns: int = 0) -> None:
        """Takes a member in; what a sole one holds it holds until `deadline_ns` (0: for ever). The caller has removed dead ones before."""
        refuse(kind, record.signature, [(other, self.kind, known.signature) for other, known in self.members.items()])
        self.kind = kind
        self.members[name] = record
        if self.sole and kind is not GroupKind.FAILOVER:
            self.share(head, deadline_ns)
        self.elect()

    def share(self, head: int, deadline_ns: int) -> None:
        """The sole member is so no more: it holds what it may have read."""
        for c in self.claims:
            c.deadline_ns = c.deadline_ns or deadline_ns
        hi = min(self.sole_hi, head)
        if hi > self.cursor:
            self._add([Claim(self.cursor, hi, self.sole, deadline_ns, 0)])
            self.cursor = hi
        self.sole = ""
        self.term += 1

    def elect(self) -> None:
        """In a failover group the longest-standing member receives; elsewhere one that is alone need not claim."""
        if self.active not in self.members:
            self.active = next(iter(self.members), "")
            self.epoch += 1
        if not self.sole and (self.kind is GroupKind.FAILOVER or len(self.members) == 1):
            self.sole, self.sole_hi = self.active, self.cursor

    def leave(self, name: str, head: int, *, died: bool) -> None:
        """Takes a member out; what it held is delivered again, as a redelivery only if it may have been worked on."""
        if self.members.pop(name, None) is None:
            return
        self.give_back([c for c in self.claims if c.member == name], worked_on=died)
        if self.sole == name:
            self.sole = ""
            hi = min(self.sole_hi, head)
            if died and self.cursor < hi:
                # It may have read that far, and worked on it.
                self.waiting.append(Waiting(self.cursor, hi, 0, 1))
                self.waiting.sort(key=lambda w: w.lo)
                self.cursor = hi
        self.elect()

    def claim_ahead(self, name: str, ahead: int, more: int) -> None:
        """The sole member claims what it has read below `ahead`, and may read `more` than that without asking."""
        if self.sole != name:
            return
        if ahead > self.cursor:
            self._add([Claim(self.cursor, ahead, name, 0, 0)])
            self.cursor = ahead
        self.sole_hi = max(self.sole_hi, self.cursor + more)

    def settle_ahead(self, name: str, topic: str, ahead: int, more: int, positions: Sequence[int]) -> None:
        """`claim_ahead` and `settle` of the sole member in one: mostly it has done just what it has read."""
        if not self.claims and positions and self.cursor + len(positions) == ahead and positions == list(range(self.cursor, ahead)):
            self.cursor = ahead
            self.sole_hi = max(self.sole_hi, ahead + more)
            self.settled += len(positions)
            return
        self.claim_ahead(name, ahead, more)
        self.settle(name, topic, positions)

    def give_back_unread(self, name: str, ahead: int) -> bool:
        """A member that was sole gives back what it had not read when a newcomer made it share. Says whether there was any."""
        unread = [(max(c.lo, ahead), c.hi) for c in self.claims if c.member == name and c.hi > ahead]
        for lo, hi in unread:
            self.unclaim(name, lo, hi)
        return bool(unread)

    def give_back(self, claims: Sequence[Claim], *, worked_on: bool) -> None:
        """Puts claims into the queue of what is delivered again."""
        gone = {id(c) for c in claims}
        self.claims = [c for c in self.claims if id(c) not in gone]
        self.waiting.extend(Waiting(c.lo, c.hi, 0, c.deliveries + worked_on) for c in claims)
        self.waiting.sort(key=lambda w: w.lo)

    def expire(self, now_ns: int) -> bool:
        """Takes back claims whose time is up; says whether there were any."""
        late = [c for c in self.claims if c.deadline_ns and c.deadline_ns <= now_ns]
        if late:
            self.give_back(late, worked_on=True)
        return bool(late)

    def available(self, name: str, head: int, now_ns: int) -> bool:
        """Whether `claim` would yield something."""
        if self.sole not in ("", name):
            return False
        return self.cursor < head or any(w.due_ns <= now_ns for w in self.waiting)

    def claim(self, name: str, head: int, now_ns: int, most: int, deadline_ns: int) -> list[Claim]:
        """Claims up to `most` positions for a member, redeliveries first. None for others while there is a sole member."""
        if self.sole not in ("", name):
            return []
        taken: list[Claim] = []
        if self.waiting:
            rest: list[Waiting] = []
            for w in self.waiting:
                if w.due_ns > now_ns or most <= 0:
                    rest.append(w)
                    continue
                hi = min(w.hi, w.lo + most)
                taken.append(Claim(w.lo, hi, name, deadline_ns, w.deliveries))
                most -= hi - w.lo
                if hi < w.hi:
                    rest.append(Waiting(hi, w.hi, w.due_ns, w.deliveries))
            self.waiting = rest
        if most > 0 and self.cursor < head:
            hi = min(head, self.cursor + most)
            taken.append(Claim(self.cursor, hi, name, deadline_ns, 0))
            self.cursor = hi
        self._add(taken)
        return taken

    def _add(self, taken: Sequence[Claim]) -> None:
        claims = self.claims
        for c in taken:
            last = claims[-1] if claims else None
            if (
                last
                and last.hi == c.lo
                and last.member == c.member
                and last.deadline_ns == c.deadline_ns
                and last.deliveries == c.deliveries
            ):
                last.hi = c.hi
            else:
                claims.append(msgspec.structs.replace(c))
        if len(claims) > 1 and any(a.lo > b.lo for a, b in pairwise(claims)):
            claims.sort(key=lambda c: c.lo)

    def unclaim(self, name: str, lo: int, hi: int) -> None:
        """Gives back the part [lo, hi) of what `claim` just returned, as if it had not been asked for."""
        for c in self._cut(name, "", [(lo, hi)]):
            if c.hi == self.cursor and c.deliveries == 0:
                self.cursor = c.lo
            else:
                self.waiting.append(Waiting(c.lo, c.hi, 0, c.deliveries))
        self.waiting.sort(key=lambda w: w.lo)

    def settle(self, name: str, topic: str, positions: Sequence[int]) -> None:
        """Takes positions out of the member's claims for good. Raises `ClaimLost` with the state unchanged."""
        self._cut(name, topic, ranges(positions))
        self.settled += len(positions)

    def nack(self, name: str, topic: str, positions: Sequence[int], due_ns: int) -> None:
        """Puts claimed positions back, to be delivered again at `due_ns`."""
        cut = self._cut(name, topic, ranges(positions))
        self.waiting.extend(Waiting(c.lo, c.hi, due_ns, c.deliveries + 1) for c in cut)
        self.waiting.sort(key=lambda w: w.lo)

    def _cut(self, name: str, topic: str, runs: Sequence[Range]) -> list[Claim]:
        """Removes runs (sorted, disjoint) from the member's claims and returns them; `ClaimLost` if it does not hold them all."""
        cut: list[Claim] = []
        kept: list[Claim] = []
        at, lost = 0, []
        for c in self.claims:
            if c.member != name or at >= len(runs) or c.hi <= runs[at][0]:
                kept.append(c)
                continue
            lo = c.lo
            while at < len(runs) and runs[at][0] < c.hi:
                run_lo, run_hi = runs[at]
                if run_lo < lo:
                    lost.append((run_lo, min(lo, run_hi)))
                    run_lo = lo
                if run_lo > lo:
                    kept.append(Claim(lo, run_lo, name, c.deadline_ns, c.deliveries))
                lo = min(run_hi, c.hi)
                if lo > run_lo:
                    cut.append(Claim(run_lo, lo, name, c.deadline_ns, c.deliveries))
                if run_hi <= c.hi:
                    at += 1
                else:
                    runs = [*runs[:at], (c.hi, run_hi), *runs[at + 1 :]]
                    break
            if lo < c.hi:
                kept.append(Claim(lo, c.hi, name, c.deadline_ns, c.deliveries))
        lost.extend(runs[at:])
        if lost:
            raise ClaimLost(topic, [p for lo, hi in lost for p in range(lo, hi)])
        self.claims = kept
        return cut

    def floor(self) -> int:
        """Every position below is settled."""
        low = self.cursor
        if self.claims:
            low = min(low, self.claims[0].lo)
        if self.waiting:
            low = min(low, self.waiting[0].lo)
        return low

    def backlog(self, head: int) -> int:
        """How many positions are not settled."""
        return head - self.cursor + self.claimed() + sum(w.hi - w.lo for w in self.waiting)

    def claimed(self) -> int:
        """How many positions are in members' hands."""
        return sum(c.hi - c.lo for c in self.claims)

    def unsettled(self, sent: Iterable[Range]) -> int:
        """How many of these positions, in disjoint ascending ranges, are not settled."""
        ranges_ = sorted([*((c.lo, c.hi) for c in self.claims), *((w.lo, w.hi) for w in self.waiting), (self.cursor, _END)])
        count, at = 0, 0
        for lo, hi in sent:
            while ranges_[at][1] <= lo:
                at += 1
            for open_lo, open_hi in ranges_[at:]:
                if open_lo >= hi:
                    break
                count += min(hi, open_hi) - max(lo, open_lo)
        return count

    def unblock(self, head: int) -> list[str]:
        """The senders that should look again whether they have to wait: enough was settled since, or the backlog is short."""
        backlog = self.backlog(head)
        ready = [address for address, (settled, most) in self.blocked.items() if self.settled >= settled or backlog <= most]
        for address in ready:
            del self.blocked[address]
        return ready

    def next_change_ns(self, name: str) -> int | None:
        """When a claim expires or a redelivery is due, whichever comes first; None for others while there is a sole member."""
        if self.sole not in ("", name):
            return None
        times = [c.deadline_ns for c in self.claims if c.deadline_ns]
        times.extend(w.due_ns for w in self.waiting)
        return min(times, default=None)

    def info(self, head: int) -> GroupInfo:
        """For people."""
        active = self.active if self.kind is GroupKind.FAILOVER else None
        versions = {name: member.version for name, member in self.members.items() if member.version}
        shared = dict(self.attributes)
        return GroupInfo(
            self.kind, tuple(self.members), active, self.backlog(head), self.claimed(), self.epoch, versions=versions, attributes=shared
        )


def settled_by_all(states: Sequence[GroupState], lo: int, hi: int) -> list[Range]:
    """The parts of [lo, hi) that are settled in each of these states, ascending."""
    unsettled = [(state.cursor, _END) for state in states]
    for state in states:
        unsettled += [(claim.lo, claim.hi) for claim in state.claims]
        unsettled += [(waiting.lo, waiting.hi) for waiting in state.waiting]
    found: list[Range] = []
    for open_lo, open_hi in sorted(unsettled):
        if lo < min(open_lo, hi):
            found.append((lo, min(open_lo, hi)))
        lo = max(lo, open_hi)
    return [*found, (lo, hi)] if lo < hi else found


def ranges(positions: Sequence[int]) -> list[Range]:
    """Sorted disjoint ranges that cover exactly these positions."""
    if not positions:
        return []
    low, high = positions[0], positions[-1]
    if high - low + 1 == len(positions) and list(positions) == list(range(low, high + 1)):
        return [(low, high + 1)]
    ordered = sorted(set(positions))
    starts = [at for at, step in enumerate(map(sub, ordered[1:], ordered), 1) if step != 1]
    return [(ordered[lo], ordered[hi - 1] + 1) for lo, hi in pairwise([0, *starts, len(ordered)])]


def refuse(kind: GroupKind, signature: str, others: Sequence[tuple[str, GroupKind, str]]) -> None:
    """Raises when a member cannot be in a group together with others: (name, kind, signature) of those that live."""
    for other, their_kind, _ in others:
        if their_kind != kind:
            raise GroupConflict(f"live members of the group subscribe as {their_kind.value}, not {kind.value}: use another group=")
        if kind is GroupKind.EXCLUSIVE:
            raise GroupBusy(f"the group is exclusive and {other!r} has it: stop that one, or use another group=")
    for other, _, their_signature in others:
        if their_signature != signature:
            theirs, own = differing(their_signature, signature)
            raise GroupConflict(
                f"member {other!r} of the group runs another task: it has {theirs}, this one has {own}: "
                "give the different task another group="
            )


__all__ = ("Claim", "GroupState", "MemberRecord", "Range", "Waiting", "ranges", "refuse", "settled_by_all")
