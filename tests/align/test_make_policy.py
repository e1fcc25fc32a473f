"""`join=` as users give it."""

from __future__ import annotations

import doctest
import functools
import importlib
from typing import Any

import pytest

from edgeserve.align import Exact, Latest, make_policy
from edgeserve.core.errors import ConfigurationError


@pytest.mark.parametrize("join", [None, "latest"])
def test_latest_is_the_default_and_takes_milliseconds(join: str | None) -> None:
    made = make_policy(join, ["a", "b"], max_time_diff_ms=1.5, no_overlap=True, min_interval_ms=20)
    assert isinstance(made, Latest) and made.sources == ("a", "b")
    assert (made.max_interval_ns, made.min_period_ns, made.no_overlap) == (1_500_000, 20_000_000, True)


def test_exact_by_name_takes_its_options() -> None:
    made = make_policy("exact", ["a", "b"], max_time_diff_ms=2, on="key", max_held=5, overflow="error")
    assert isinstance(made, Exact)
    assert (made.on, made.max_held, made.overflow, made.max_interval_ns) == ("key", 5, "error", 2_000_000)


def test_a_ready_policy_is_taken_as_it_is() -> None:
    ready = Exact(["b", "a"])
    assert make_policy(ready, ["a", "b"]) is ready


def test_a_class_or_a_partial_is_made_with_the_sources() -> None:
    made = make_policy(functools.partial(Exact, on="key"), ["a", "b"])
    assert isinstance(made, Exact) and made.on == "key" and made.sources == ("a", "b")
    assert isinstance(make_policy(Latest, ["a"]), Latest)


@pytest.mark.parametrize(
    ("join", "options", "message"),
    [
        ("newest", {}, "'newest' is not known; use 'exact' or 'latest'"),
        ("latest", {"on": "key"}, "on"),
        ("exact", {"min_interval_ms": 5}, "min_interval_ms does not work with join='exact'"),
        (Exact(["a", "c"]), {}, r"the join is of \['a', 'c'\]"),
        (Exact(["a", "b"]), {"max_held": 5}, r"max_held: give these to Exact"),
        (Exact(["a", "b"]), {"no_overlap": True}, "no_overlap does not work with a policy of your own"),
        (lambda: None, {}, "cannot be made"),
        ("latest", {"max_time_diff_ms": float("nan")}, "max_time_diff_ms=nan"),
        ("latest", {"min_interval_ms": -1}, "min_interval_ms=-1"),
    ],
)
def test_what_cannot_work_is_named(join: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_policy(join, ["a", "b"], **options)


@pytest.mark.parametrize("name", ["latest", "exact"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"edgeserve.align.{name}"))
    assert result.attempted > 0 and result.failed == 0
