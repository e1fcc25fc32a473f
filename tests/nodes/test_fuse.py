"""Stages that run as one task: each gets the very objects that the one before it makes, one at a time."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.conftest import fresh

import edgeserve
from edgeserve import Compute, DataSource
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.transport import Transport

node = pytest.fixture(params=["memory", "local"], name="node")(fresh)

Send = Callable[..., None]
Results = Callable[..., list[Any]]
DeadLetters = Callable[[str], list[DeadLetter]]


class Picture:
    """Something that cannot be sent."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_a_stage_gets_the_object_that_the_one_before_it_returned(node: str, send: Send, results: Results) -> None:
    made: list[Picture] = []

    def decode(a: int) -> Picture:
        made.append(Picture(a))
        return made[-1]

    def detect(picture: Picture) -> int:
        assert picture is made[-1]
        return 10 * picture.number

    send("a", [1, 2])
    with Compute(fuse=[decode, detect], node=node) as compute:
        assert [next(compute), next(compute)] == [10, 20]
        assert compute.counters["sent"] == 2
    assert results() == [10, 20]


def test_the_first_stage_takes_the_set_and_each_may_ask_for_the_context(node: str, results: Results) -> None:
    asked: list[Any] = []

    def pair(a: int, *, b: int) -> tuple[int, int] | None:
        asked.append(edgeserve.context())
        return (a, b) if a != 2 else None

    async def add(ab: tuple[int, int]) -> int | None:
        asked.append(edgeserve.context())
        return sum(ab) if ab != (3, 3) else None

    for name in "ab":
        with DataSource([1, 2, 3, 4], node, source_id=name, topic="src", event_time=int) as source:
            source.run()
    with Compute(fuse=(pair, add), node=node, join="exact") as compute:
        compute.run(until="end")
        assert "a" in compute.explain()["sources"]
    assert results() == [2, 8], "None ends a set, whichever stage returns it"
    assert [asked[0].join_id, asked[0].event_times_ns] == [asked[1].join_id, {"a": 1, "b": 1}]
    assert len(asked) == 7


def doubling(kind: str) -> Any:
    """A stage that makes one, or two and a None, of what it takes."""

    def plain(a: int) -> int:
        return 2 * a

    async def coroutine(a: int) -> int:
        await asyncio.sleep(0)
        return 2 * a

    def generator(a: int) -> Iterator[int | None]:
        yield from (2 * a, None, 2 * a + 1)

    async def async_generator(a: int) -> AsyncIterator[int | None]:
        for each in (2 * a, None, 2 * a + 1):
            await asyncio.sleep(0)
            yield each

    async def later(a: int) -> Any:
        return async_generator(a)

    return locals()[kind]


KINDS = ("plain", "coroutine", "generator", "async_generator", "later")


def test_every_kind_of_task_may_be_every_stage(node: str, send: Send, results: Results) -> None:
    chains = [*itertools.product(KINDS, repeat=2), *((one, "coroutine", other) for one, other in itertools.product(KINDS, repeat=2))]
    send("a", [1])
    for number, kinds in enumerate(chains):
        wanted = [1]
        for kind in kinds:
            wanted = [2 * n + more for n in wanted for more in ((0,) if kind in ("plain", "coroutine") else (0, 1))]
        with Compute(fuse=[doubling(kind) for kind in kinds], node=node, topic_out=f"out{number}") as compute:
            got = next(compute)
        assert (got if isinstance(got, list) else [got]) == wanted == results(f"out{number}"), kinds


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_yielded_goes_on_before_the_next_one_is_made(node: str, send: Send, asynchronous: bool) -> None:
    order: list[str] = []
    made: weakref.WeakSet[Picture] = weakref.WeakSet()

    def film(a: int) -> Iterator[Picture]:
        for number in range(a):
            assert not made, "the one before is no longer needed"
            order.append(f"make {number}")
            picture = Picture(number)
            made.add(picture)
            yield picture
            del picture

    async def film_async(a: int) -> AsyncIterator[Picture]:
        for picture in film(a):
            yield picture
            del picture

    def halves(picture: Picture) -> Iterator[float]:
        yield picture.number
        yield picture.number + 0.5

    def number_of(half: float) -> float:
        order.append(f"take {half}")
        return half

    send("a", [2])
    with Compute(fuse=[film_async if asynchronous else film, halves, number_of], node=node) as compute:
        assert next(compute) == [0, 0.5, 1, 1.5]
    assert order == ["make 0", "take 0", "take 0.5", "make 1", "take 1", "take 1.5"]


def test_an_async_generator_runs_in_one_task_and_all_stages_on_one_loop(node: str, send: Send) -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    loops: set[Any] = set()

    class Frames:
        async def setup(self) -> None:
            loops.add(asyncio.get_running_loop())

        async def __call__(self, a: int) -> AsyncIterator[asyncio.Future[int]]:
            task = asyncio.current_task()
            token = variable.set("inside")
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for number in range(a):
                    yield group.create_task(asyncio.sleep(0, number))
                    assert (asyncio.current_task(), variable.get()) == (task, "inside")
            variable.reset(token)
            loops.add(asyncio.get_running_loop())

    async def wait(number: asyncio.Future[int]) -> int:
        assert variable.get() == "outside"
        loops.add(asyncio.get_running_loop())
        return await number

    send("a", [3])
    with Compute(fuse=[Frames(), wait], node=node) as compute:
        assert next(compute) == [0, 1, 2]
    assert len(loops) == 1


def test_stages_run_beside_a_loop_that_is_running(node: str, send: Send) -> None:
    send("a", [1, 2])

    async def notebook() -> list[Any]:
        with Compute(fuse=[doubling("async_generator"), doubling("coroutine")], node=node) as compute:
            return [next(compute), next(compute)]

    assert asyncio.run(notebook()) == [[4, 6], [8, 10]]


# --- setup, close, errors -------------------------------------------------------------------------------------------


class Stage:
    """Notes what is done to it, and fails where it is told to."""

    def __init__(self, name: str, events: list[str], fails: str = "") -> None:
        self.name, self._events, self._fails = name, events, fails

    def _note(self, what: str) -> None:
        self._events.append(f"{what} {self.name}")
        if what == self._fails:
            raise ValueError(f"{self.name} fails")

    async def setup(self) -> None:
        self._note("setup")

    def __call__(self, a: int) -> int:
        self._note("call")
        return a + 1

    def close(self) -> None:
        self._note("close")


def test_stages_are_set_up_in_order_and_closed_in_reverse(node: str, send: Send) -> None:
    events: list[str] = []
    send("a", [1])
    compute = Compute(fuse=[Stage("one", events), Stage("two", events, fails="close"), lambda a: a, Stage("three", events)], node=node)
    with pytest.raises(ValueError, match="two fails") as raised, compute:
        assert next(compute) == 4
    calls = [f"{what} {name}" for what in ("setup", "call") for name in ("one", "two", "three")]
    assert events == [*calls, "close three", "close two", "close one"]
    assert raised.value.__notes__ == ["in stage 2 of 4, Stage"]


@pytest.mark.parametrize("options", [{}, {"min_interval_ms": 1}], ids=["single", "join"])
def test_when_one_cannot_be_set_up_those_before_it_are_closed(node: str, options: dict[str, Any]) -> None:
    events: list[str] = []
    stages = [Stage("one", events), Stage("two", events, fails="close"), Stage("three", events, fails="setup"), Stage("four", events)]
    with pytest.raises(ValueError, match="fails") as raised, Compute(fuse=stages, node=node, **options):
        pass
    assert events == ["setup one", "setup two", "setup three", "close two", "close one"]
    assert raised.value.__notes__ == ["in stage 2 of 4, Stage"]
    assert isinstance(raised.value.__context__, ValueError)
    assert raised.value.__context__.__notes__ == ["in stage 3 of 4, Stage"]


def test_an_error_names_its_stage_and_all_stages_are_tried_again(
    node: str, send: Send, results: Results, dead_letters: DeadLetters
) -> None:
    calls: list[str] = []

    def film(a: int) -> Iterator[int]:
        try:
            calls.append("film")
            yield a
            yield -a
        finally:
            calls.append("end of film")

    async def detect(number: int) -> int:
        calls.append("detect")
        if number == -1 and calls.count("film") < 3:
            raise ValueError("not yet")
        if number == -2:
            raise ValueError("never")
        return number

    send("a", [1, 2])
    with Compute(fuse=[film, detect], node=node, retries=2, retry_backoff_ms=1) as compute:
        assert [next(compute), next(compute)] == [[1, -1], None]
    assert calls == ["film", "detect", "detect", "end of film"] * 6
    assert results() == [1, -1]
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert (letter.error, letter.attempts) == ("ValueError: never (in stage 2 of 2, detect)", 3)
    assert "in detect" in letter.traceback and "in stage 2 of 2, detect" in letter.traceback
    assert "in film" not in letter.traceback


@pytest.mark.parametrize("kind", ["generator", "async_generator"])
def test_an_error_between_two_objects_is_of_the_stage_that_makes_them(node: str, send: Send, dead_letters: DeadLetters, kind: str) -> None:
    def generator(a: int) -> Iterator[int]:
        yield a
        raise LookupError("no more")

    async def async_generator(a: int) -> AsyncIterator[int]:
        yield a
        raise LookupError("no more")

    send("a", [1])
    with Compute(fuse=[lambda a: a, locals()[kind], lambda a: a], node=node, retries=0, on_error="raise") as compute:
        with pytest.raises(LookupError) as raised:
            next(compute)
    assert raised.value.__notes__ == [f"in stage 2 of 3, {kind}"]
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert letter.error == f"LookupError: no more (in stage 2 of 3, {kind})"
    assert f"in {kind}\n    raise LookupError" in letter.traceback


@pytest.mark.parametrize("kind", ["generator", "async_generator"])
def test_what_a_stage_does_at_its_end_is_done_when_a_later_one_fails(node: str, send: Send, dead_letters: DeadLetters, kind: str) -> None:
    ended: list[Any] = []

    def generator(a: int) -> Iterator[int]:
        try:
            yield a
        finally:
            ended.append(edgeserve.context().join_id)

    async def async_generator(a: int) -> AsyncIterator[int]:
        task = asyncio.current_task()
        try:
            yield a
        finally:
            await asyncio.sleep(0)
            ended.append(asyncio.current_task() is task)

    def fail(a: int) -> None:
        raise ValueError("detect")

    send("a", [1])
    with Compute(fuse=[locals()[kind], fail], node=node, retries=0) as compute:
        assert next(compute) is None
        assert len(ended) == 1 and ended[0]
    assert dead_letters("src.src->dst.dead-letters")[0].error == "ValueError: detect (in stage 2 of 2, fail)"


def test_an_error_that_is_raised_again_and_again_is_noted_once(node: str, send: Send, dead_letters: DeadLetters) -> None:
    always = ValueError("always the same one")

    def fail(a: int) -> int:
        raise always

    send("a", [1, 2])
    with Compute(fuse=[lambda a: a, fail], node=node, retries=1, retry_backoff_ms=0) as compute:
        assert [next(compute), next(compute)] == [None, None]
    assert {letter.error for letter in dead_letters("src.src->dst.dead-letters")} == {
        "ValueError: always the same one (in stage 2 of 2, fail)"
    }


# --- results --------------------------------------------------------------------------------------------------------


def test_results_have_the_ids_of_the_one_task_that_does_the_same(node: str, transport: Transport, send: Send) -> None:
    def film(a: int) -> Iterator[int]:
        yield from range(a)

    def odd(number: int) -> int | None:
        return number if number % 2 else None

    def whole(a: int) -> Iterator[int]:
        yield from (number for number in range(a) if number % 2)

    def sent(topic: str, **task: Any) -> list[bytes]:
        send("a", [4, 5], topic=topic, message_id=lambda a: a)
        with Compute(node=node, group="g", topic_in=topic, topic_out=f"{topic}-out", **task) as compute:
            assert [next(compute), next(compute)] == [[1, 3], [1, 3]]
        return [decode_frame(frame)[0].id for frame, _, _ in transport.read(f"{topic}-out")]

    ids = sent("whole", task=whole)
    assert ids == sent("once", fuse=[film, odd]) == sent("again", fuse=[film, odd])
    assert len(set(ids)) == 4


def test_views_of_shared_memory_are_good_for_as_long_as_a_stage_holds_them(tmp_path: Path) -> None:
    node = f"local://{tmp_path}/store"
    held: list[Any] = []

    def rows(a: Any) -> Iterator[Any]:
        assert not a.flags.owndata
        yield from (a[:1], a[-1:])

    class Keep:
        def __call__(self, row: Any) -> int:
            assert np.shares_memory(row, row.base)
            held.append(row)
            return int(row[0, 0])

    pictures = (np.full((2, 50_000), n) for n in range(20))
    with Compute(fuse=[rows, Keep()], node=node) as compute:
        with DataSource(pictures, node, source_id="a", topic="src", routing="lazy") as source:
            for n in range(20):
                next(source)
                source.flush()
                assert next(compute) == [n, n]
                compute.flush()
    assert [(row == n // 2).all() for n, row in enumerate(held)] == [True] * 40
    held.clear()


def test_exactly_one_of_both_is_given(node: str) -> None:
    one: Any = lambda a: a  # noqa: E731
    for options, said in (
        ({}, "got neither a task nor fuse=: give it a task"),
        ({"task": one, "fuse": [one]}, "got both a task and fuse="),
        ({"fuse": []}, r"fuse=\[\]: it is a list"),
        ({"fuse": "decode"}, "fuse='decode': it is a list"),
        ({"fuse": {one, print}}, "fuse=.*: it is a list"),
        ({"fuse": [one, 3]}, r"Compute: fuse\[1\] needs a callable, got int"),
        ({"fuse": [one, Picture]}, r"fuse\[1\] got the class Picture: pass an instance"),
        ({"fuse": [one, lambda a, b: a]}, r"fuse\[1\]: .* is called with one value, and cannot be"),
        ({"fuse": [lambda: 1, one]}, r"fuse\[0\]: .* has no parameters"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Compute(node=node, **options)
    with Compute(fuse=[one], node=node):
        pass
