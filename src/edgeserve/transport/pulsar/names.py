"""Names of topics and groups as Pulsar takes them, and back."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

_FULL = re.compile(r"((?:non-)?persistent://[^/]+/[^/]+/)(.+)", re.DOTALL)
_SAFE = "~"
# An entry: 28 bits of ledger, 24 of entry; with the frame's 12 bits a position fits into 64.
_ENTRY_BITS = 24
_ENTRY_MASK = (1 << _ENTRY_BITS) - 1


def topic_name(space: str, topic: str) -> str:
    """The full name of a topic: as it is when it is one, else in the tenant and namespace `space`."""
    found = _FULL.fullmatch(topic)
    if found is not None:
        # What belongs to a topic is named by adding to its name, be it the full name of another: all behind the namespace is ours.
        return f"{found[1]}{_escaped(found[2])}"
    return f"persistent://{space}/{_escaped(topic)}"


def channel_name(full: str) -> str:
    """The full name of a topic's channel, which the broker stores nothing of."""
    return f"non-persistent://{full.partition('://')[2]}~flow"


def user_name(space: str, full: str) -> str:
    """The name that a user gave, from a full one."""
    own = f"persistent://{space}/"
    if full.startswith(own):
        return unquote(full.removeprefix(own))
    head, slash, last = full.rpartition("/")
    return f"{head}{slash}{unquote(last)}"


def subscription_name(group: str) -> str:
    """The name of a group's subscription."""
    return _escaped(group)


def group_name(subscription: str) -> str:
    """The group of a subscription."""
    return unquote(subscription)


def _escaped(name: str) -> str:
    # Percent signs must survive: Pulsar decodes no names, but the admin API's paths are decoded once.
    return quote(name, safe=_SAFE)


def entry_number(ledger: int, entry: int) -> int:
    """One growing number for an entry of a topic."""
    return ledger << _ENTRY_BITS | entry


def ledger_and_entry(at: int) -> tuple[int, int]:
    """What `entry_number` was made of."""
    return at >> _ENTRY_BITS, at & _ENTRY_MASK


__all__ = ("channel_name", "entry_number", "group_name", "ledger_and_entry", "subscription_name", "topic_name", "user_name")
