"""Errors that come out of the midst of a join: the input in hand, and what was held, are still there for the next call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edgeserve import Compute, DataSource
from edgeserve.align import Exact, JoinSet, Latest, Policy
from edgeserve.core.errors import ReceiveTimeout, SkewWarning


def send(url: str, source_id: str, *items: int) -> None:
    with DataSource(items, url, source_id=source_id, event_time=lambda i: i) as source:
        for _ in items:
            next(source)


def steps(compute: Compute, errors: tuple[type[BaseException], ...]) -> tuple[list[Any], list[BaseException]]:
    """Results until nothing comes any more, and the errors between them."""
    found, met = [], []
    while True:
        try:
            found.append(next(compute))
        except (ReceiveTimeout, StopIteration):
            return [f for f in found if f is not None], met
        except errors as exc:
            met.append(exc)


def failing_once(base: type[Policy], method: str, error: BaseException) -> Callable[[Sequence[str]], Policy]:
    """Policies of which one fails once, on 'b', when it has done its work."""
    errors = [error]

    class Failing(base):  # type: ignore[misc, valid-type]
        def push(self, source: str, stamp_ns: int, item: Any, key: bytes | None = None) -> Sequence[JoinSet]:
            sets: Sequence[JoinSet] = super().push(source, stamp_ns, item, key)
            if method == "push" and source == "b" and errors:
                raise errors.pop()
            return sets

        def watermark(self, source: str, stamp_ns: int) -> Sequence[JoinSet]:
            sets: Sequence[JoinSet] = super().watermark(source, stamp_ns)
            if method == "watermark" and source == "b" and errors:
                raise errors.pop()
            return sets

    return Failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a policy's own")])
@pytest.mark.parametrize("base", [Latest, Exact])
@pytest.mark.parametrize("method", ["push", "watermark"])
def test_an_interrupted_push_loses_no_set(embedded: str, base: type[Policy], method: str, error: BaseException, quiet_ms: int) -> None:
    send(embedded, "a", 1, 2)
    send(embedded, "b", 1, 2)
    options: dict[str, Any] = {"timeout_ms": quiet_ms}
    with Compute(lambda a, b: [a, b], embedded, join=base, topic_out="expected", **options) as compute:
        expected, _ = steps(compute, ())
    with Compute(lambda a, b: [a, b], embedded, join=failing_once(base, method, error), **options) as compute:
        found, met = steps(compute, (type(error),))
        assert met == [error]
        assert compute.counters.get("duplicate", 0) == 0
    assert found == expected and found[-1] == [2, 2]


def test_run_goes_on_after_an_error_of_the_policy(embedded: str) -> None:
    for name in "ab":
        with DataSource([1, 2, 3], embedded, source_id=name, event_time=lambda i: i) as source:
            source.run()
    found: list[int] = []
    with Compute(lambda a, b: found.append(a), embedded, join=failing_once(Exact, "push", RuntimeError("once"))) as compute:
        with pytest.raises(RuntimeError, match="once"):
            compute.run(until="end")
        compute.run(until="end")
        assert compute.counters.get("unmatched", 0) == 0
    assert found == [1, 2, 3]


@pytest.mark.parametrize("runs", [False, True])
def test_a_warning_that_is_an_error_loses_no_input(embedded: str, runs: bool, quiet_ms: int) -> None:
    second = 10**9
    send(embedded, "a", 0)
    send(embedded, "b", *(second * n for n in range(100, 105)))
    with Compute(lambda a, b: [a // second, b // second], embedded, timeout_ms=quiet_ms) as compute, warnings.catch_warnings():
        warnings.simplefilter("error", SkewWarning)
        if runs:
            with pytest.raises(SkewWarning):
                compute.run()
        else:
            assert len(steps(compute, (SkewWarning,))[1]) == 1
        send(embedded, "a", second * 104, second * 105)
        found, met = steps(compute, (SkewWarning,))
        assert not met
        assert compute.counters.get("duplicate", 0) == 0
    assert found == [[104, 104], [105, 104]]
