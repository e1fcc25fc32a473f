"""From what a user gives as `join=` to a policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from edgeserve.align.base import Policy
from edgeserve.align.exact import Exact
from edgeserve.align.latest import Latest
from edgeserve.align.own import Adapted
from edgeserve.core.errors import ConfigurationError

_T = TypeVar("_T")
_KNOWN = ("exact", "latest")


def make_policy(
    join: str | object | None,
    sources: Sequence[str],
    *,
    max_time_diff_ms: float = 10_000,
    no_overlap: bool = False,
    min_interval_ms: float = 0,
    **options: Any,
) -> Policy:
    """Makes the policy that `join` stands for.

    Args:
        join: a name ('latest' or 'exact'; None is 'latest'), a ready `Policy`, an object with `push`, `advance` and `explain`, or a
            class or function that makes one of these from the sources, such as `functools.partial(Exact, on='key')`.
        sources: the source ids, in the order of the task's parameters.
        max_time_diff_ms: the largest spread of a set; for the named policies.
        no_overlap: each item in at most one set; for 'latest' ('exact' never does otherwise).
        min_interval_ms: the least time between the starts of two sets; for 'latest'.
        **options: for a named policy what its class takes besides; for a user's own `max_held` and `overflow`.

    Raises:
        ConfigurationError: the name is unknown, the object is no policy, its sources are not the task's, or an option does not fit it.
    """
    interval_ns, period_ns = _ns("max_time_diff_ms", max_time_diff_ms), _ns("min_interval_ms", min_interval_ms)
    if join is None or join == "latest":
        return _made("latest", Latest, sources, max_interval_ns=interval_ns, min_period_ns=period_ns, no_overlap=no_overlap, **options)
    if join == "exact":
        _refuse(min_interval_ms=min_interval_ms, of="join='exact'")
        return _made("exact", Exact, sources, max_interval_ns=interval_ns, **options)
    if isinstance(join, str):
        raise ConfigurationError(
            f"join={join!r} is not known; use {' or '.join(map(repr, _KNOWN))}, or an object with push, advance and explain"
        )
    _refuse(no_overlap=no_overlap, min_interval_ms=min_interval_ms, of="a policy of your own")
    if isinstance(join, type) or (callable(join) and not hasattr(join, "push")):
        join = _made(getattr(join, "__name__", repr(join)), join, sources)
    if not isinstance(join, Policy):
        return _made(type(join).__name__, Adapted, sources, join, **options)  # which checks that it is an OwnPolicy
    if options:
        raise ConfigurationError(f"{', '.join(sorted(options))}: give these to {type(join).__name__}(...) itself")
    if set(join.sources) != set(sources):
        raise ConfigurationError(f"the join is of {sorted(join.sources)}, the task's parameters are {sorted(sources)}")
    return join


def _made(name: str, make: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    try:
        return make(*arguments, **options)
    except TypeError as exc:
        raise ConfigurationError(f"the join policy {name} cannot be made with these sources and options: {exc}") from exc


def _refuse(of: str, **options: Any) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigurationError(f"{', '.join(given)} does not work with {of}; it belongs to join='latest'")


def _ns(name: str, milliseconds: float) -> int:
    if not math.isfinite(milliseconds) or milliseconds < 0:
        raise ConfigurationError(f"{name}={milliseconds!r} must be a time in milliseconds, 0 or more")
    return round(milliseconds * 1_000_000)


__all__ = ("make_policy",)
