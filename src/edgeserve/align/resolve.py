"""From what a user gives as `join=` to a policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

from edgeserve.align.base import Policy
from edgeserve.align.exact import Exact
from edgeserve.align.keyed import ByKey
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
    by: bool = False,
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
        by: whether the join runs per key: items of different keys never meet.
        **options: for a named policy what its class takes besides; for a user's own `max_held` and `overflow`. With `by` all joins take
            `max_held` and `overflow`, which then bound what all keys together hold: of 'latest', the keys.

    Raises:
        ConfigurationError: the name is unknown, the object is no policy, its sources are not the task's, or an option does not fit it.
    """
    if by:
        named = {"max_time_diff_ms": max_time_diff_ms, "no_overlap": no_overlap, "min_interval_ms": min_interval_ms}
        return _by_key(join, sources, named, **options)
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
    if makes_policies(join):
        join = _made(getattr(join, "__name__", repr(join)), join, sources)
    if not isinstance(join, Policy):
        return _made(type(join).__name__, Adapted, sources, join, **options)  # which checks that it is an OwnPolicy
    if options:
        raise ConfigurationError(f"{', '.join(sorted(options))}: give these to {type(join).__name__}(...) itself")
    if set(join.sources) != set(sources):
        raise ConfigurationError(f"the join is of {sorted(join.sources)}, the task's parameters are {sorted(sources)}")
    return join


def _by_key(
    join: Any, sources: Sequence[str], named: dict[str, Any], *, max_held: int = 10_000, overflow: Any = "drop_oldest", **options: Any
) -> Policy:
    """The policy of a join that runs per key."""
    if join is None or join == "latest":
        # It holds one item per source and key, and the newest replaces it: what is bounded is the number of keys.
        return ByKey(sources, lambda of: make_policy(join, of, **named, **options), max_keys=max_held, overflow=overflow)
    if join == "exact":
        options["on"] = _per_key(options.get("on", "time"))
        return make_policy(join, sources, **named, max_held=max_held, overflow=overflow, **options)
    if isinstance(join, str):
        return make_policy(join, sources, **named)  # which says that it is not known
    make = _maker(join, {**named, **options}, max_held)
    first = make(sources)
    if type(first) is Exact:  # it keeps keys apart itself, at less cost
        limits = {"max_held": first.max_held, "max_interval_ns": first.max_interval_ns}
        return Exact(first.sources, on=_per_key(first.on), overflow=first.overflow, **limits)
    return ByKey(sources, make, max_held=max_held, overflow=overflow)


def _maker(join: Any, options: dict[str, Any], max_held: int) -> Callable[[Sequence[str]], Policy]:
    """The function that makes a user's own policy anew for each key."""
    pristine = None if makes_policies(join) else _copy(join)

    def make(sources: Sequence[str]) -> Policy:
        made = _made(getattr(join, "__name__", repr(join)), join, sources) if pristine is None else _copy(pristine)
        # One key alone may hold as much as all together; where more is an error, that is raised before its policy is asked.
        return make_policy(made, sources, **(options if isinstance(made, Policy) else options | {"max_held": max_held}))

    return make


def _per_key(on: str) -> Any:
    return "key_and_time" if on == "time" else on


def _copy(ready: Any) -> Any:
    try:
        return copy.deepcopy(ready)
    except Exception as exc:  # whatever a user's class holds
        raise ConfigurationError(
            f"a ready {type(ready).__name__} cannot serve several keys, and cannot be copied ({exc}): give join= its class, or a function "
            "that makes one from the sources"
        ) from exc


def makes_policies(join: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether `join` is a class or function that makes a policy from the sources, and not one itself."""
    return isinstance(join, type) or (callable(join) and not hasattr(join, "push"))


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


__all__ = ("make_policy", "makes_policies")
