"""Bugs, one per promise, that the simulator has to find: each replaces something of the code under test by what a mistake would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from edgeserve.core.message import Kind
from edgeserve.stage.partition import Partition
from edgeserve.stage.sources import _Producer
from edgeserve.transport.broker.desk import Desk
from edgeserve.transport.broker.grouplog import GroupLog, Line
from edgeserve.transport.broker.member import BrokerSubscription
from edgeserve.transport.broker.membership import Membership
from edgeserve.transport.broker.settlements import Settlement, Settlements

_apply = GroupLog.apply
_records = Settlements._records
_follow = BrokerSubscription._follow_the_lead
_snapshot = GroupLog.snapshot
_end_frames = Partition.end_frames
_comes_again, _told = _Producer.comes_again, _Producer.told


def _any_epoch(self: GroupLog, line: Line, at: int, *, ids_only: bool = False) -> None:
    _apply(self, line, at, ids_only=ids_only)
    self.refused.clear()


def _at_once(self: Settlements) -> list[Settlement]:
    found = list(self._waiting)
    self._waiting.clear()
    self._recorded.extend(found)
    return found


def _due_at_once(self: Settlements) -> float | None:
    return self._last if self._waiting else None


def _not_all_ids(self: Settlements, found: list[Settlement]) -> Any:
    for one in found:
        one.ids = one.ids[:-1]
    return _records(self, found)


def _confirmed_at_once(self: Membership, record: Any, done: Callable[[Exception | None], None]) -> None:
    self.write([record], told=lambda _, error: done(error))


def _never_lapses(self: BrokerSubscription) -> None:
    _follow(self)
    self._lapsed = False


def _whatever(self: Desk, positions: Any) -> None:
    return None


def _snapshot_without_ids(self: GroupLog, stored: int, unsettled: int) -> list[Any]:
    *_, state = _snapshot(self, stored, unsettled)
    state.ids_after = self.at
    return [state]


def _while_results_are_on_their_way(self: Partition, position: int, of: bytes) -> Any:
    self.reached = position
    return _end_frames(self, position, of)


PLANTED: dict[str, dict[str, Any]] = {
    "a settlement under a lead that has passed counts": {
        "edgeserve.transport.broker.grouplog:GroupLog.counts": lambda self, at, epoch: True,
    },
    "inputs are acknowledged before their results are durable": {
        "edgeserve.transport.broker.settlements:Settlements._take_done": _at_once,
        "edgeserve.transport.broker.settlements:Settlements.due": _due_at_once,
    },
    "inputs are acknowledged before their settlement is known to count": {
        "edgeserve.transport.broker.membership:Membership.settle": _confirmed_at_once,
    },
    "a record misses a settled id": {"edgeserve.transport.broker.settlements:Settlements._records": _not_all_ids},
    "who takes over does not ask for settled ids": {
        "edgeserve.transport.broker.member:BrokerSubscription.settled_ids": lambda self: [],
    },
    "a holder is not told that its lead was another's": {
        "edgeserve.transport.broker.member:BrokerSubscription._follow_the_lead": _never_lapses,
    },
    "what comes twice opens a source that has ended": {"edgeserve.stage.sources:SourceClock.restore_end": lambda self, position: None},
    "an end is recorded before what came before it is settled": {
        "edgeserve.transport.broker.member:BrokerSubscription.floor": lambda self, topic: 1 << 62,
    },
    "a replica that is alone again leaves sets behind": {"edgeserve.stage.settask:SetTask._is_empty": lambda self: True},
    "a member settles what is not in its hands": {"edgeserve.transport.broker.desk:Desk.check": _whatever},
    "the end is published before all partitions have come to it": {
        "edgeserve.stage.rounds:Rounds.all_are_at": lambda self, position: True,
    },
    "a partition says that it has come to the end while its results are on their way": {
        "edgeserve.stage.partition:Partition.end_frames": _while_results_are_on_their_way,
    },
    "a partition goes on before the end is published": {"edgeserve.stage.partition:Partition.goes_on": lambda self, position: True},
    "an end that comes again counts once more": {
        "edgeserve.stage.ends:Ends.has_recorded": lambda self, entry: False,
        "edgeserve.stage.holding:Holding._is_known_end": lambda self, id_: False,
        "edgeserve.stage.sources:SourceClock.has_come": lambda self, header, position: False,
        "edgeserve.stage.sources:_Producer.comes_again": lambda self, header, position: (
            header.kind != Kind.END and _comes_again(self, header, position)
        ),
    },
    "an end that comes again is waited for in place of the first": {
        "edgeserve.stage.holding:Holding._is_known_end": lambda self, id_: False,
        "edgeserve.stage.sources:SourceClock.has_come": lambda self, header, position: False,
    },
    "what is stored once more behind an end begins a source anew": {
        "edgeserve.stage.sources:_Producer.comes_again": lambda self, header, position: False,
    },
    "who takes over does not know a source's producers": {"edgeserve.stage.sources:SourceClock.restore": lambda self, known: None},
    "who takes over does not know what the replicas of a source have sent": {
        "edgeserve.stage.sources:_Producer.told": lambda self, name, upto: replace(_told(self, name, upto), newest=-1),
    },
    "a partition is given away while its holder goes on": {"edgeserve.stage.partition:Partition.halt": lambda self: None},
    "a checkpoint misses ids": {"edgeserve.transport.broker.grouplog:GroupLog.snapshot": _snapshot_without_ids},
}
"""What is wrong to the names that are replaced."""

__all__ = ("PLANTED",)
