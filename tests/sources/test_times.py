"""Times as files have them: exact to the nanosecond, or refused by name."""

from __future__ import annotations

import datetime as dt
from decimal import ROUND_UP, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.errors import BadRow
from edgeserve.sources import time_ns

DAY = 1_700_000_000 * 10**9  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        (" 1.5 ", 1_500_000_000),
        ("-0.000000001", -1),
        ("1700000000.123456789", DAY + 123_456_789),
        ("1.7e9", DAY),
        ("0.1234567899", 123_456_789),
        (3, 3 * 10**9),
        (1700000000.123456, DAY + 123_456_000),
        (Decimal("0.1"), 100_000_000),
        ("2023-11-14T22:13:20Z", DAY),
        ("2023-11-14 22:13:20", DAY),
        ("2023-11-14T23:13:20.5+01:00", DAY + 500_000_000),
        ("2023-11-14T22:13:20.123456+0000", DAY + 123_456_000),
        ("2023-11-14T22:13:20.123456789Z", DAY + 123_456_789),
        ("2023-11-14T22:13:20,1234567Z", DAY + 123_456_700),
        ("2023-11-14", DAY - (22 * 3600 + 13 * 60 + 20) * 10**9),
        (dt.datetime(2023, 11, 14, 22, 13, 20), DAY),  # noqa: DTZ001  # it means UTC
        (dt.datetime(2023, 11, 14, 22, 13, 20, 1, tzinfo=dt.UTC), DAY + 1000),
    ],
)
def test_times_are_exact(value: Any, expected: int) -> None:
    assert time_ns(value) == expected


NO_TIMES = ["", "soon", "nan", "inf", "12:00", "1_0", None, True, b"1", [1], float("nan"), float("inf"), Decimal("sNaN")]


@pytest.mark.parametrize("value", NO_TIMES)
def test_what_is_no_time_is_named(value: Any) -> None:
    with pytest.raises(BadRow, match="is no time"):
        time_ns(value)


@pytest.mark.parametrize("value", ["9223372037", "1e300", "1e999999999", 10**400, -(10**10), 1e300, "2300-01-01", Decimal("1e50")])
def test_what_is_too_far_is_named(value: Any) -> None:
    with pytest.raises(BadRow, match=r"is no time"):
        time_ns(value)


def test_a_caller_s_decimal_context_changes_nothing() -> None:
    with localcontext() as context:
        context.prec, context.rounding = 3, ROUND_UP
        context.traps = dict.fromkeys(context.traps, False)
        assert time_ns("1700000000.123456789") == DAY + 123_456_789
        with pytest.raises(BadRow):
            time_ns("soon")


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_nanosecond_comes_back(ns: int) -> None:
    assert time_ns(str(Decimal(ns).scaleb(-9))) == ns
    assert time_ns(f"{Decimal(ns).scaleb(-9):f}") == ns
