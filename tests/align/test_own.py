"""A user's own policy: a class with push, advance and explain becomes a full one, or is refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgeserve.align import JoinSet, Member, Released, SourceReport, make_policy
from edgeserve.core.errors import ConfigurationError, JoinOverflow, UnknownSource


class Newest:
    """Pairs whatever is newest, on a timer; its sets are its own class."""

    def __init__(self) -> None:
        self.newest: dict[str, Any] = {}

    def push(self, source: str, stamp_ns: int, item: Any) -> list[Any] | None:
        if item == "refused":
            raise ValueError("not this one")
        self.newest[source] = SimpleNamespace(stamp_ns=stamp_ns, item=item)
        return None

    def advance(self, now_ns: int) -> list[Any]:
        return [SimpleNamespace(members=dict(reversed(self.newest.items())))] if len(self.newest) == 2 else []

    def explain(self) -> dict[str, str]:
        return {"a": "waits for the timer"}


class Keyed(Newest):
    """Takes all that the stage can tell."""

    def __init__(self, sources: list[str]) -> None:
        super().__init__()
        self.told: list[Any] = [tuple(sources)]

    def push(self, source: str, stamp_ns: int, item: Any, *, key: Any = None) -> list[Any] | None:
        self.told.append(key)
        return super().push(source, stamp_ns, item)

    def watermark(self, source: str, watermark_ns: int) -> list[Any]:
        self.told.append(watermark_ns)
        return self.advance(0)

    def next_due_ns(self) -> int:
        return 42


def test_members_of_a_set_are_released_once_and_others_are_held() -> None:
    join = make_policy(Newest(), ["a", "b"])
    for stamp_ns, item in enumerate(("a0", "a1")):
        assert join.push("a", stamp_ns, item) == []
    join.push("b", 2, "b0")
    expected = JoinSet({"a": Member(1, "a1"), "b": Member(2, "b0")})
    assert join.advance(0) == [expected] and list(expected.members) == ["a", "b"]
    assert join.advance(1) == [expected]
    assert join.drain() == [Released("a", 1, "a1", ""), Released("b", 2, "b0", "")]
    report = join.explain()["a"]
    assert (report.held, report.oldest_ns, report.newest_ns, report.note) == (1, 0, 0, "waits for the timer")
    assert join.explain()["b"].held == 0


def test_the_first_to_arrive_is_dropped_on_overflow() -> None:
    join = make_policy(Newest(), ["a", "b"], max_held=2)
    for stamp_ns, item in ((5, "x"), (1, "y"), (9, "z")):
        join.push("a", stamp_ns, item)
    assert join.drain() == [Released("a", 5, "x", "overflow")]
    assert join.explain()["a"].dropped == {"overflow": 1}


def test_overflow_as_an_error_takes_nothing() -> None:
    join = make_policy(Newest(), ["a", "b"], max_held=1, overflow="error")
    join.push("a", 1, "x")
    with pytest.raises(JoinOverflow, match="Newest"):
        join.push("a", 2, "y")
    join.push("b", 1, "w")
    assert [found.members["a"].item for found in join.advance(0)] == ["x"]


def test_an_item_that_the_policy_refuses_is_not_held() -> None:
    join = make_policy(Newest(), ["a", "b"])
    with pytest.raises(ValueError, match="not this one"):
        join.push("a", 1, "refused")
    assert join.explain()["a"].held == 0 and join.drain() == []


def test_one_object_pushed_twice_is_released_twice() -> None:
    join = make_policy(Newest(), ["a", "b"])
    join.push("a", 1, "same")
    join.push("a", 2, "same")
    join.push("b", 2, "b")
    join.advance(0)
    join.advance(0)
    assert sorted(r.source for r in join.drain()) == ["a", "a", "b"]


def test_key_watermark_and_timer_reach_a_policy_that_asks_for_them() -> None:
    own = Keyed(["a", "b"])
    join = make_policy(own, ["a", "b"])
    join.push("a", 1, "a0", "k")
    join.push("b", 1, "b0")
    assert len(join.watermark("a", 7)) == 1
    assert own.told == [("a", "b"), "k", None, 7]
    assert join.next_due_ns() == 42 and join.explain()["a"].watermark_ns == 7


def test_a_class_is_made_with_the_sources() -> None:
    join = make_policy(Keyed, ["a", "b"])
    assert join.sources == ("a", "b") and join.explain()["a"].note == "waits for the timer"


def test_restored_items_do_not_trigger() -> None:
    class Eager(Newest):
        def push(self, source: str, stamp_ns: int, item: Any) -> list[Any] | None:
            super().push(source, stamp_ns, item)
            return self.advance(0)

    join = make_policy(Eager(), ["a", "b"])
    assert join.restore("a", 1, "a0") is None and join.restore("b", 1, "b0") is None
    assert [found.members["b"].item for found in join.push("b", 2, "b1")] == ["b1"]


def test_explain_takes_text_and_reports() -> None:
    text, report = Newest(), Newest()
    text.explain = lambda: "just a line"  # type: ignore[assignment,return-value]
    report.explain = lambda: {"b": SourceReport(9, None, None, None, {}, 17, "nearly")}  # type: ignore[dict-item]
    assert make_policy(text, ["a"]).explain()["a"].note == "just a line"
    said = make_policy(report, ["a", "b"]).explain()["b"]
    assert (said.held, said.nearest_miss_ns, said.note) == (0, 17, "nearly")


def test_a_wrong_shape_is_refused_with_what_is_missing() -> None:
    class NoExplain:
        def push(self, source: str, stamp_ns: int, item: Any) -> list[Any]:
            return []

        def advance(self, now_ns: int) -> list[Any]:
            return []

    class WrongPush(Newest):
        def push(self, item: Any) -> list[Any]:  # type: ignore[override]
            return []

    with pytest.raises(ConfigurationError, match="NoExplain lacks explain"):
        make_policy(NoExplain(), ["a"])
    with pytest.raises(ConfigurationError, match=r"WrongPush\.push cannot be called with 3 arguments"):
        make_policy(WrongPush(), ["a"])
    with pytest.raises(ConfigurationError, match="int lacks push, advance, explain"):
        make_policy(7, ["a"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (7, "returned int"),
        ([{"a": 1}], "without a mapping .members"),
        ([SimpleNamespace(members={"a": Member(1, "x")})], "expected .'a', 'b'."),
        ([SimpleNamespace(members={"a": Member(1, "x"), "b": (1, "y")})], "lacks .stamp_ns or .item"),
    ],
)
def test_what_is_no_set_is_refused(returned: Any, message: str) -> None:
    own = Newest()
    own.advance = lambda now_ns: returned  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match=message):
        make_policy(own, ["a", "b"]).advance(0)


def test_unknown_sources_and_options_are_named() -> None:
    join = make_policy(Newest(), ["a"])
    for call in (lambda: join.push("z", 1, None), lambda: join.watermark("z", 1)):
        with pytest.raises(UnknownSource, match="'z'"):
            call()
    with pytest.raises(ConfigurationError, match="max_held"):
        make_policy(Newest(), ["a"], max_held=0)
    with pytest.raises(ConfigurationError, match="overflow='wait'"):
        make_policy(Newest(), ["a"], overflow="wait")
