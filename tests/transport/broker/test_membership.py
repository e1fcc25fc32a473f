"""What a member hears of its group's log. The broker is a stub: it takes what it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edgeserve.transport.base import GroupKind
from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.broker.grouplog import Joined, Lead, Left, MemberState, Record, Settled, encode_line
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.membership import Membership


def test_what_a_member_settled_under_a_lead_that_had_passed_is_not_heard() -> None:
    """Of entries that the successor has not touched it would take frames for done whose sets are its own to make."""
    outlet = SimpleNamespace(send=lambda data, done: None, close=lambda: None, keeps=0)
    driver: Any = SimpleNamespace(
        outlet=lambda topic: outlet, deadline_s=None, what="a stub", trouble=lambda: None, newest=lambda topic: None
    )
    heard: list[Record] = []
    member = Membership(driver, "in", "g", "successor", Guard(), lambda topic, record: heard.append(record))

    def settled(epoch: int) -> Settled:
        return Settled("before", b"i" * 16, partial={"in": {11: [0, -3]}}, epoch=epoch)

    records: list[Record] = [
        Joined("before", MemberState(GroupKind.FAILOVER, "s")),
        Lead("before", 1),
        settled(1),
        Joined(member.name, MemberState(GroupKind.FAILOVER, "s")),
        Left("before", member.name),
        Lead(member.name, 2),
        settled(1),
    ]
    for at, record in enumerate(records):
        member._deliver(Entry(at, encode_line([record], None)))
    member.close()
    assert member.leads
    assert [type(record) for record in heard] == [Joined, Lead, Settled, Joined, Left, Lead]
