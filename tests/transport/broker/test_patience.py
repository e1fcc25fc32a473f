"""A broker without room loses nothing: what it refuses is sent again, in order. Who was told to stop waits no longer than it may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from edgeserve.core.errors import SendError, StoreFull
from edgeserve.transport.broker import patience
from edgeserve.transport.broker.driver import Done, Outlet
from edgeserve.transport.broker.patience import Grace, PatientOutlet
from edgeserve.transport.broker.trouble import Silence


class _Store(Outlet):
    """A broker of so much room; it answers when it is told to."""

    def __init__(self) -> None:
        self.room = 1_000
        self.stored: list[bytes] = []
        self.refused = threading.Event()
        self._waiting: list[tuple[bytes, Done]] | None = None

    def send(self, data: bytes, done: Done) -> None:
        if self._waiting is None:
            self._answer(data, done)
        else:
            self._waiting.append((data, done))

    def hold(self) -> None:
        self._waiting = []

    def answer(self) -> None:
        waiting, self._waiting = self._waiting or [], None
        for data, done in waiting:
            self._answer(data, done)

    def _answer(self, data: bytes, done: Done) -> None:
        if self.room < len(data):
            self.refused.set()
            done(None, StoreFull("there is no room"))
        else:
            self.room -= len(data)
            self.stored.append(data)
            done(len(self.stored), None)

    def close(self) -> None:
        """Nothing."""


class _Nobody:
    """Hears what would be said; the rest of it has tests of its own."""

    why = ""

    def say(self, count: int, of: str = "") -> None:
        """Nothing."""

    def heard(self) -> None:
        """Nothing."""


class _Answers:
    def __init__(self) -> None:
        self.got: list[tuple[int | None, Exception | None]] = []
        self.changed = threading.Condition()

    def __call__(self, at: int | None, error: Exception | None) -> None:
        with self.changed:
            self.got.append((at, error))
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= count, 20)


@pytest.fixture
def store() -> _Store:
    return _Store()


@pytest.fixture
def answers() -> _Answers:
    return _Answers()


@pytest.fixture
def outlet(store: _Store) -> Iterator[PatientOutlet]:
    made = PatientOutlet(store, cast(Silence, _Nobody()), None)
    yield made
    made.close()


def test_what_was_refused_and_what_comes_behind_it_is_stored_in_order(outlet: PatientOutlet, store: _Store, answers: _Answers) -> None:
    store.room = 2
    entries = [b"%d" % n for n in range(9)]
    store.hold()
    for entry in entries[:5]:
        outlet.send(entry, answers)
    store.answer()
    assert outlet.keeps and len(answers.got) == 2
    for entry in entries[5:]:
        outlet.send(entry, answers)
    store.room = 1_000
    answers.wait_for(len(entries))
    assert store.stored == entries
    assert sorted(at for at, _ in answers.got if at is not None) == list(range(1, 10))


def test_room_for_some_of_it_at_a_time(outlet: PatientOutlet, store: _Store, answers: _Answers) -> None:
    store.room = 0
    entries = [b"%d" % n for n in range(9)]
    for entry in entries:
        outlet.send(entry, answers)
    for count in range(1, 4):
        store.refused.clear()
        store.room = 3
        answers.wait_for(3 * count)
    assert store.stored == entries
    outlet.send(b"last", answers)
    store.room = 4
    answers.wait_for(10)


def test_after_the_deadline_it_fails(store: _Store, answers: _Answers) -> None:
    outlet = PatientOutlet(store, cast(Silence, _Nobody()), 0.0)
    store.room = 0
    outlet.send(b"a", answers)
    answers.wait_for(1)
    assert store.stored == [] and isinstance(answers.got[0][1], SendError)
    outlet.close()


def test_closing_ends_the_waiting(store: _Store, answers: _Answers) -> None:
    outlet = PatientOutlet(store, cast(Silence, _Nobody()), None)
    store.room = 0
    outlet.send(b"a", answers)
    outlet.close()
    assert answers.got == [] and not any(thread.name == "edgeserve-no-room" for thread in threading.enumerate())


def test_who_was_told_to_stop_waits_for_a_while_that_a_confirmation_renews(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [100.0], [False]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    grace = Grace(lambda: told[0])
    now[0] += 60
    assert not grace.over
    told[0] = True
    assert not grace.over
    now[0] += patience.GRACE_S
    assert not grace.over
    grace.begin_again()
    assert not grace.over
    now[0] += patience.GRACE_S + 1
    assert grace.over
    assert not Grace(None).over
