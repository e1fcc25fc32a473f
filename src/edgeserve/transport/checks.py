"""What every engine refuses by name."""

from __future__ import annotations

from collections.abc import Sequence

from edgeserve.core.errors import ConfigurationError
from edgeserve.transport.base import GroupKind, Start

MAX_NAME_BYTES = 200


def check_name(what: str, name: str) -> None:
    """Refuses names that cannot be stored."""
    try:
        size = len(name.encode()) if isinstance(name, str) else 0
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_NAME_BYTES or "\0" in name:
        raise ConfigurationError(f"{what} must be 1 to {MAX_NAME_BYTES} bytes of UTF-8 without NUL, not {name!r}")


def check_subscription(topics: Sequence[str], group: str, kind: GroupKind, start: Start, ack_timeout_ms: int | None) -> None:
    """Refuses what no group can be made of."""
    check_name("a group", group)
    if isinstance(topics, str) or not topics or len(set(topics)) < len(topics):
        raise ConfigurationError(f"topics must be a list of at least one topic, each once, not {topics!r}")
    for topic in topics:
        check_name("a topic", topic)
    if kind not in list(GroupKind):
        raise ConfigurationError(f"kind= is one of {', '.join(repr(k.value) for k in GroupKind)}, not {kind!r}")
    if start not in ("earliest", "latest") and not isinstance(start, int):
        raise ConfigurationError(f"start= is 'earliest', 'latest' or a publish time in ns, not {start!r}")
    if ack_timeout_ms is not None and ack_timeout_ms <= 0:
        raise ConfigurationError(f"ack_timeout_ms= must be above 0, or None for none, not {ack_timeout_ms!r}")


def differing(theirs: str, own: str) -> tuple[str, str]:
    """What of two signatures, parts with "; " between them, is not the same, on either side."""
    parts = theirs.split("; "), own.split("; ")
    only = [[part for part in mine if part not in others] for mine, others in (parts, parts[::-1])]
    return "; ".join(only[0]) or "nothing of the kind", "; ".join(only[1]) or "nothing of the kind"


def check_window(send_window: int) -> None:
    """Refuses a send window that nothing fits into."""
    if send_window < 1:
        raise ConfigurationError(f"send_window= must be at least 1, not {send_window!r}")


__all__ = ("MAX_NAME_BYTES", "check_name", "check_subscription", "check_window", "differing")
