"""A member's place in its group on one topic: what it knows of the group, how far it has read, what came with wake-ups."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat

from edgeserve.core.errors import ClosedError, Fenced, GroupConflict, StoreDamagedWarning
from edgeserve.transport import log, records, settled
from edgeserve.transport.base import ClaimLost, Delivery, GroupKind, Start, merge_attributes
from edgeserve.transport.engine import LogEngine, first_position
from edgeserve.transport.groups import Claim, GroupState, MemberRecord
from edgeserve.transport.kv import Space, Txn

_CLAIM_BYTES = 8 << 20
_MOST_MAIL = 64


class Place:
    """One member of one group on one topic.

    All that a message's way needs is in the slots of one object: what lies apart is out of the caches when traffic is slow.

    Attributes:
        state: the group's, as it was last seen or written.
        unsure: whether `state` may not be what is stored.
        paused: whether nothing is to be received from here.
        skipped: whether the last claim found damage.
        lost: whether others have taken this member out because it stood still: then what it held is theirs.
        deposed: whether it was the active one until then.
    """

    __slots__ = (
        "_ack_timeout_ns",
        "_address",
        "_ahead",
        "_engine",
        "_gone",
        "_group",
        "_key",
        "_let_go",
        "_mail",
        "_member",
        "_raw",
        "_seen",
        "_term",
        "_undelivered",
        "deposed",
        "lost",
        "number",
        "paused",
        "skipped",
        "state",
        "topic",
        "unsure",
    )

    def __init__(self, engine: LogEngine, topic: str, group: str, member: str, ack_timeout_ns: int) -> None:
        self._engine, self.topic, self._group, self._member, self._ack_timeout_ns = engine, topic, group, member, ack_timeout_ns
        self._key = records.group_key(topic, group)
        self.number = -1
        self.state: GroupState
        # The stored bytes that `state` was read from or written as.
        self._raw = b""
        self.unsure = True
        self.paused = self.skipped = self.lost = self.deposed = False
        self._address = ""
        self._mail: deque[bytes] = deque(maxlen=_MOST_MAIL)
        # Positions found damaged, or in a gap, and not settled yet; messages found with them and not handed over yet.
        self._gone: list[int] = []
        self._let_go: list[int] = []
        self._undelivered: list[Delivery] = []
        # While this member has the group to itself: below which position it has read; else -1. And the term that this is of.
        self._ahead = self._term = -1
        self._seen = settled.NOTHING

    # --- the group's state --------------------------------------------------------------------------------------

    def find(self, txn: Txn) -> GroupState:
        """The group's state as it is stored."""
        raw = txn.get(Space.STATE, self._key)
        if raw is None:
            raise ClosedError(f"group {self._group!r} of topic {self.topic!r} was deleted while it was in use")
        if self._raw != raw:
            stored = bytes(raw)
            state = records.decode_state(self.topic, self._group, stored)
            if self._address and not self.lost and not self._is_in(state):
                self.lost, self.deposed = True, self.state.active == self._member
                self._ahead = -1
                self._mail.clear()
            self.state, self._raw = state, stored
        return self.state

    def _is_in(self, state: GroupState) -> bool:
        """Whether this member is there, and not another of its name that came since."""
        record = state.members.get(self._member)
        return record is not None and record.address == self._address

    def save(self, txn: Txn) -> None:
        """Writes the state."""
        raw = records.encode_state(self._key, self.state)
        txn.put(Space.STATE, self._key, raw)
        self._raw = raw

    def forget(self) -> None:
        """A transaction did not commit: the state may have been changed by it, so it is not what is stored."""
        self._raw = b""
        self.unsure = True

    def join(self, txn: Txn, kind: GroupKind, start: Start, record: MemberRecord) -> None:
        """Takes the place; the group is made where it does not exist."""
        head = records.make_head(txn, self.topic)
        if kind is GroupKind.BROADCAST:
            self._engine.forget_dead_broadcasts(txn, self.topic, head)
        state = records.group_state(txn, self.topic, self._group)
        if state is None:
            state = GroupState(kind, first_position(txn, head, start))
            head.groups.append(self._group)
        self.state = state
        self._enter(txn, head, kind, record)

    def come_back(self, txn: Txn, kind: GroupKind, record: MemberRecord) -> None:
        """Takes a place anew; what this member held goes to others, if it has not. After the commit it is not `lost`."""
        self.find(txn)
        head = records.make_head(txn, self.topic)
        if not self.lost:
            self.state.leave(self._member, head.next, died=True)
        self._gone, self._let_go, self._undelivered = [], [], []
        self._ahead = -1
        self._mail.clear()
        self._enter(txn, head, kind, record)

    def _enter(self, txn: Txn, head: records.Head, kind: GroupKind, record: MemberRecord) -> None:
        state = self.state
        self._bury(head, [m.address for m in state.members.values() if not self._engine.board.alive(m.address)])
        if self._member in state.members:
            raise GroupConflict(f"group {self._group!r} has a live member {self._member!r} on {self.topic!r}: give this one another name")
        deadline_ns = record.joined_ns + self._ack_timeout_ns if self._ack_timeout_ns else 0
        state.join(self._member, record, kind, head.next, deadline_ns)
        head.listeners[record.address] = self._group
        self.number, self._address = head.number, record.address
        records.save_head(txn, self.topic, head)
        self.save(txn)

    def leave(self, txn: Txn, address: str, *, worked_on: bool) -> bool:
        """Gives the place up, and what it holds back; returns whether there is still a group."""
        head, state = records.make_head(txn, self.topic), records.group_state(txn, self.topic, self._group)
        head.listeners.pop(address, None)
        left = False
        if state is not None:
            if self._is_in(state):
                state.leave(self._member, head.next, died=worked_on)
            left = state.kind is not GroupKind.BROADCAST
            self.state = state
            if left:
                self.save(txn)
            else:
                settled.forget_group(txn, self.topic, head, self._group)
        records.save_head(txn, self.topic, head)
        return left

    def others(self) -> list[str]:
        """The addresses of the group's other members."""
        return [m.address for name, m in self.state.members.items() if name != self._member]

    def look_around(self) -> None:
        """Finds out whether other members died or stand still; what they held is delivered again."""
        engine = self._engine
        with engine.kv.read() as txn:
            self.find(txn)
        if not self._gone_others():
            return
        with engine.kv.write(self.forget) as txn:
            head = records.make_head(txn, self.topic)
            self.find(txn)
            # Looked at again: to get here may have taken long.
            gone = [] if self.lost else self._gone_others()
            if not gone:
                return
            self._bury(head, gone)
            records.save_head(txn, self.topic, head)
            self.save(txn)
        engine.notify(self.others())

    def _gone_others(self) -> list[str]:
        """The addresses of other members that are dead or stand still."""
        board = self._engine.board
        return [address for address in self.others() if not board.alive(address) or board.stands_still(address)]

    def _bury(self, head: records.Head, gone: Sequence[str]) -> None:
        """Takes out the members with these addresses."""
        for name, address in [(name, m.address) for name, m in self.state.members.items() if m.address in gone]:
            self.state.leave(name, head.next, died=True)
            head.listeners.pop(address, None)

    # --- receiving ----------------------------------------------------------------------------------------------

    def keep_mail(self, packet: bytes) -> None:
        """Keeps a batch that came with a wake-up."""
        self._mail.append(packet)

    def receive(self, most: int) -> list[Delivery]:
        """Claims up to `most` messages, or reads them where no claim is needed."""
        if self._undelivered:
            found, self._undelivered = self._undelivered, []
            return found
        if self._gone or self._let_go:
            self._skip_gone()
        if self._mail and not self.unsure and (found := self._from_mail(most)):
            return found
        now_ns = time.time_ns()
        with self._engine.kv.read() as txn:
            head, state = records.find_head(txn, self.topic), self.find(txn)
            if head is None or self.lost:
                return []
            self.unsure = False
            change = state.next_change_ns(self._member)
            overdue = change is not None and change <= now_ns
            lo = -1
            if state.sole == self._member and state.term == self._term:
                lo = max(self._ahead, state.cursor)
                hi = min(head.next, lo + most)
                if lo >= hi and not overdue:
                    return []
                if overdue or hi > state.sole_hi:
                    lo = -1
                else:
                    # The sole member reads on without a write: it claims when it settles.
                    batches = log.read(txn, head.number, lo, hi, _CLAIM_BYTES)
                    hi = min(hi, batches[-1].last + 1) if batches else hi
            elif not (overdue or (self._ahead >= 0 and state.term != self._term) or state.available(self._member, head.next, now_ns)):
                return []
        if lo < 0:
            return self._claim(most, now_ns)
        self._ahead = hi
        return self._decode([(Claim(lo, hi, self._member, 0, 0), batches)])

    def _from_mail(self, most: int) -> list[Delivery]:
        """What the sole member can take without a look at the store: the batch that is next came with a wake-up. Whether it really was
        the sole member still, and these positions its own, is found out when it settles."""
        mail, state = self._mail, self.state
        if state.sole != self._member or state.term != self._term or state.waiting:
            return []
        lo = state.cursor
        if self._ahead > lo:
            lo = self._ahead
        while mail:
            packet = mail[0]
            found = log.unpacked(packet)
            if found is None or found[1] >= lo:
                break
            mail.popleft()
        else:
            return []
        if found is None or found[0] != lo or found[1] >= lo + most or found[1] >= state.sole_hi:
            return []
        mail.popleft()
        base, last, publish_ns, frames = found
        self._ahead = last + 1
        return list(zip(frames, range(base, last + 1), repeat(publish_ns), repeat(0), repeat(self.topic)))

    def _claim(self, most: int, now_ns: int) -> list[Delivery]:
        """Claims in a write transaction."""
        reads: list[tuple[Claim, list[log.Batch]]] = []
        with self._engine.kv.write(self.forget) as txn:
            head, state = records.make_head(txn, self.topic), self.find(txn)
            if self.lost:
                return []
            unread = self.catch_up(0)
            state.expire(now_ns)
            timed = self._ack_timeout_ns and state.kind is GroupKind.SHARED and state.sole != self._member
            deadline_ns = now_ns + self._ack_timeout_ns if timed else 0
            budget = _CLAIM_BYTES
            for claim in state.claim(self._member, head.next, now_ns, most, deadline_ns):
                batches = log.read(txn, head.number, claim.lo, claim.hi, budget) if budget > 0 else []
                budget -= sum(len(b.raw) for b in batches)
                end = batches[-1].last + 1 if batches else claim.lo
                if end < claim.hi and (batches or budget <= 0):
                    state.unclaim(self._member, end, claim.hi)
                    claim.hi = end
                    budget = 0
                if claim.hi > claim.lo:
                    reads.append((claim, batches))
            state.claim_ahead(self._member, state.cursor, most)
            self.save(txn)
        self.unsure = False
        self._ahead = state.cursor if state.sole == self._member else -1
        self._term = state.term
        if unread:
            self._engine.notify(self.others())
        return self._decode(reads)

    def catch_up(self, more: int) -> bool:
        """Writes down how far this member has read while it was alone; if it is no more, gives back the rest. Whether there was any."""
        if self._ahead < 0:
            return False
        if self.state.term == self._term:
            self.state.claim_ahead(self._member, self._ahead, more)
            return False
        return self.state.give_back_unread(self._member, self._ahead)

    def _decode(self, reads: Sequence[tuple[Claim, list[log.Batch]]]) -> list[Delivery]:
        found: list[Delivery] = []
        gone: list[int] = []
        let_go: list[int] = []
        for claim, batches in reads:
            count = len(found)
            for batch in batches:
                frames = batch.frames()
                if frames is None:
                    continue
                lo, hi = max(claim.lo, batch.base), min(claim.hi, batch.last + 1)
                if not frames:
                    let_go.extend(range(lo, hi))
                    continue
                if hi - lo != len(frames):
                    frames = frames[lo - batch.base : hi - batch.base]
                found.extend(zip(frames, range(lo, hi), repeat(batch.publish_ns), repeat(claim.deliveries), repeat(self.topic)))
            if len(found) - count < claim.hi - claim.lo:
                there = {d[1] for d in found[count:]}.union(let_go)
                gone.extend(p for p in range(claim.lo, claim.hi) if p not in there)
        if gone or let_go:
            # What follows may raise; what is intact is handed over by the next call then.
            self._gone, self._let_go, self._undelivered = gone, let_go, found
            self._skip_gone()
            self._undelivered = []
        return found

    def _skip_gone(self) -> None:
        """Settles positions that can never be delivered; says so of those that were not let go as settled, before this group was there."""
        gone, wake = self._gone, set[str]()
        with self._engine.kv.write(self.forget) as txn:
            self.settle(txn, sorted([*gone, *self._let_go]), 0, (), None, wake)
        self._gone, self._let_go, self.skipped = [], [], True
        self._engine.notify(wake)
        if gone:
            warnings.warn(
                f"skipped {len(gone)} messages of topic {self.topic!r} ({min(gone)} to {max(gone)}): damaged or missing at "
                f"{self._engine.url}",
                StoreDamagedWarning,
                stacklevel=2,
            )

    # --- settling -----------------------------------------------------------------------------------------------

    def settle(
        self,
        txn: Txn,
        positions: Sequence[int],
        more: int,
        ids: Sequence[bytes],
        attributes: Mapping[str, bytes] | None,
        wake: set[str],
    ) -> bool:
        """Takes positions out of this member's hands for good. Adds to `wake` whom this concerns; returns whether this member had seen all
        ids before these: then `seen_all` is to be called after the commit."""
        state, member, ahead = self.find(txn), self._member, self._ahead
        if self.lost:
            self._refuse(positions)
        if ahead >= 0 and state.term == self._term and state.sole == member:
            state.settle_ahead(member, self.topic, ahead, more, positions)
        else:
            if self.catch_up(more):
                wake.update(self.others())
            state.settle(member, self.topic, positions)
        seen_all = False
        if ids:
            seen_all = self.knows_all_ids
            settled.keep_ids(txn, self.number, self._group, state, ids)
        if attributes:
            merge_attributes(state.attributes, attributes)
            wake.update(self.others())
        if state.blocked:
            wake.update(state.unblock(records.make_head(txn, self.topic).next))
        self.save(txn)
        return seen_all

    def nack(self, txn: Txn, positions: Sequence[int], due_ns: int, more: int) -> None:
        """Gives messages back."""
        state = self.find(txn)
        if self.lost:
            self._refuse(positions)
        self.catch_up(more)
        state.nack(self._member, self.topic, positions, due_ns)
        self.save(txn)

    def _refuse(self, positions: Sequence[int]) -> None:
        """Who stood still has nothing to say of what it held."""
        if self.state.kind is GroupKind.FAILOVER:
            raise Fenced(f"another member of group {self._group!r} has taken over topic {self.topic!r}: this one stood still for too long")
        if positions:
            raise ClaimLost(self.topic, positions)

    def seen_all(self) -> None:
        """All ids that the state holds are known to this member."""
        self._seen = (self.state.ids_next, len(self.state.recent_ids))

    def new_ids(self, txn: Txn) -> list[bytes]:
        """The ids that were settled since the last call, this member's own left out as far as no others came between."""
        state = self.find(txn)
        if self.knows_all_ids:
            return []
        ids = settled.read_ids(txn, self.number, self._group, state, self._seen)
        self.seen_all()
        return ids

    @property
    def knows_all_ids(self) -> bool:
        """Whether the state, as far as it is known, holds no ids that this member was not told."""
        return self._seen == (self.state.ids_next, len(self.state.recent_ids))


__all__ = ("Place",)
