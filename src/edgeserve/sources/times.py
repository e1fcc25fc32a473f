"""Times as files have them, as integer nanoseconds since the epoch."""

from __future__ import annotations

import datetime as dt
import re
from decimal import Context, Decimal, InvalidOperation
from typing import Any

from edgeserve.core.errors import BadRow

SECOND = 1_000_000_000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_LEAST, _MOST = -(2**63), 2**63 - 1

# Not the caller's own context: whatever it rounds or traps, a time stays exact.
_exact = Context(prec=60, traps=[InvalidOperation])
_MOST_SECONDS = Decimal(2**63) / SECOND
_FINER = re.compile(r"[.,]\d{6}(\d{1,3})")


def time_ns(value: Any) -> int:
    """A time as integer nanoseconds since the epoch.

    Args:
        value: seconds since the epoch (int, float, Decimal, or text such as '1700000000.25'), ISO 8601 text, or a datetime. Without a time
            zone UTC is meant. What is finer than a nanosecond is cut off; a float counts as the shortest decimal number that it stands for.

    Raises:
        BadRow: it is none of these, or more than 292 years from 1970.

    Example:
        >>> time_ns("1.5"), time_ns("1970-01-01T00:00:01.500000001Z")
        (1500000000, 1500000001)
    """
    if isinstance(value, str):
        text = value.strip()
        seconds = _number(text)
        return in_range(_iso(text), value) if seconds is None else _of_seconds(seconds, value)
    if isinstance(value, dt.datetime):
        return in_range(_of_datetime(value), value)
    if isinstance(value, float):
        return _of_seconds(_exact.create_decimal(repr(value)), value)
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return _of_seconds(value, value)
    raise _no_time(value)


def _number(text: str) -> Decimal | None:
    try:
        return _exact.create_decimal(text)
    except InvalidOperation:
        return None


def _of_seconds(seconds: Decimal | int, value: Any) -> int:
    if isinstance(seconds, int):
        return in_range(seconds * SECOND, value)
    if not seconds.is_finite():
        raise _no_time(value)
    if not -_MOST_SECONDS <= seconds <= _MOST_SECONDS:
        raise _too_far(value)
    return in_range(int(_exact.multiply(seconds, Decimal(SECOND))), value)


def _iso(text: str) -> int:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise _no_time(text) from None
    finer = _FINER.search(text)
    return _of_datetime(moment) + (int(finer[1].ljust(3, "0")) if finer else 0)


def _of_datetime(moment: dt.datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return (moment - _EPOCH) // _MICROSECOND * 1000


def in_range(ns: int, value: Any) -> int:
    """`ns`, or `BadRow` if it does not fit into 64 bits; `value`: what the file says."""
    if not _LEAST <= ns <= _MOST:
        raise _too_far(value)
    return ns


def _no_time(value: Any) -> BadRow:
    return BadRow(f"{_shown(value)} is no time: seconds since the epoch and ISO 8601 are")


def _too_far(value: Any) -> BadRow:
    return BadRow(f"{_shown(value)} is no time that fits into 64 bits of nanoseconds, 292 years around 1970")


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"(an int of {value.bit_length()} bits)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ("SECOND", "in_range", "time_ns")
