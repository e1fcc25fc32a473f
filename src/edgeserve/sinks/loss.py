"""Values that Arrow takes into a column of another type, and makes other values of without a word."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Loses: TypeAlias = Callable[[Any], bool]

_LARGEST: dict[str, float] = {"halffloat": 65_504.0, "float": 2.0**128 - 2.0**104}
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000}


def loss(pa: Any, kind: Any) -> Loses | None:
    """What says of a value whether a column of this type would keep another one. None: it keeps all that Arrow does not refuse.

    A float that is rounded to one of fewer bits is kept; one that becomes infinite is not.
    """
    is_ = pa.types
    if is_.is_integer(kind):
        return _no_whole_number
    if str(kind) in _LARGEST:
        return _larger_than(_LARGEST[str(kind)])
    if is_.is_date(kind):
        return _has_a_time
    if is_.is_timestamp(kind) or is_.is_time(kind) or is_.is_duration(kind):
        return _finer_than(kind.unit)
    if is_.is_dictionary(kind):
        return loss(pa, kind.value_type)
    if is_.is_struct(kind):
        fields = {
            field.name: loses for field in (kind.field(i) for i in range(kind.num_fields)) if (loses := loss(pa, field.type)) is not None
        }
        return _any_field(fields) if fields else None
    if is_.is_map(kind):
        key, item = (loss(pa, each) for each in (kind.key_type, kind.item_type))
        return _any_pair(key, item) if key or item else None
    if is_.is_nested(kind) and kind.num_fields == 1:  # lists of all kinds
        loses = loss(pa, kind.value_type)
        return None if loses is None else _any_item(loses)
    return None


def _no_whole_number(value: Any) -> bool:
    if isinstance(value, int) or value is None:
        return False
    try:
        return bool(value != int(value))
    except (TypeError, ValueError, OverflowError):
        return False  # Arrow refuses it


def _larger_than(largest: float) -> Loses:
    def loses(value: Any) -> bool:
        return isinstance(value, (int, float, np.floating)) and not math.isinf(value) and abs(float(value)) > largest

    return loses


def _has_a_time(value: Any) -> bool:
    return isinstance(value, dt.datetime) and value.timetz().replace(tzinfo=None) != dt.time()


def _finer_than(unit: str) -> Loses:
    step = _MICROSECONDS.get(unit)

    def loses(value: Any) -> bool:
        if isinstance(value, (np.datetime64, np.timedelta64)):
            return bool(value.astype(f"{value.dtype.kind}8[{unit}]") != value and not np.isnat(value))
        if step is None:
            return False
        if isinstance(value, (dt.datetime, dt.time)):
            return value.microsecond % step != 0
        return isinstance(value, dt.timedelta) and value.microseconds % step != 0

    return loses


def _any_item(loses: Loses) -> Loses:
    def any_loses(value: Any) -> bool:
        items = value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else value
        return isinstance(items, (list, tuple, np.ndarray)) and any(map(loses, items))

    return any_loses


def _any_field(fields: dict[str, Loses]) -> Loses:
    def any_loses(value: Any) -> bool:
        return isinstance(value, dict) and any(loses(value.get(name)) for name, loses in fields.items())

    return any_loses


def _any_pair(key: Loses | None, item: Loses | None) -> Loses:
    def any_loses(value: Any) -> bool:
        pairs = value.items() if isinstance(value, dict) else value or ()
        return any((key is not None and key(k)) or (item is not None and item(v)) for k, v in pairs)

    return any_loses


__all__ = ("Loses", "loss")
