"""Sending to a broker: batches as entries, a bounded window of what is not confirmed, parts for what is larger than an entry may be."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_128_digest

from edgeserve.core.errors import ClosedError, Fenced, SendError
from edgeserve.transport.base import Fence, Frame, Publisher
from edgeserve.transport.broker.driver import Driver, Entry, Outlet
from edgeserve.transport.broker.envelope import (
    FRAME_OVERHEAD_BYTES,
    HEAD_BYTES,
    MOST_FRAMES,
    STAMP_MAGIC,
    Reference,
    parts_topic,
    position,
    unwrap,
    whole,
    wrap,
)
from edgeserve.transport.broker.flow import Restraint
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.patience import GRACE_S, Grace, PatientOutlet
from edgeserve.transport.broker.trouble import Silence, Trouble

if TYPE_CHECKING:
    from edgeserve.transport.broker.engine import BrokerEngine

_WINDOW_BYTES = 32 << 20
_CLOSE_S = 30.0
_DISCARD_EVERY = 256
_TAKE_TRIES = 20
_ONLY_BYTES = frozenset((bytes,))


class Appender:
    """Appends batches of frames to one topic.

    Args:
        driver: the broker.
        trouble: says when it is away.
        topic: where to.
        window: how many frames may be unconfirmed.
        stored: told each entry that is, and how many frames it has.

    Attributes:
        stopping: asked while the broker confirms nothing: True ends the wait, some seconds later, with a `SendError`.
    """

    stopping: Callable[[], bool] | None = None

    def __init__(self, driver: Driver, trouble: Trouble, topic: str, window: int, stored: Callable[[int, int], None] | None = None) -> None:
        self._driver, self.topic, self._window, self._stored = driver, topic, window, stored
        self._silence = Silence(driver, trouble, topic)
        self._outlet = self._patient(topic)
        self._parts: Outlet | None = None
        self._guard = Guard()
        self._frames = self._bytes = self._waiters = 0
        self._error: Exception | None = None
        self._closed = False

    def _patient(self, topic: str) -> Outlet:
        return PatientOutlet(self._driver.outlet(topic), self._silence, self._driver.deadline_s)

    def append(
        self,
        frames: Sequence[Frame],
        now_ns: int,
        done: Callable[[Exception | None], None] | None = None,
        stored: Callable[[Sequence[Frame], int], None] | None = None,
    ) -> int:
        """Hands frames over; waits while the window is full. `done` is called once per entry; returns how many there are. `stored`: as a
        `Publisher`'s."""
        count, handed = len(frames), frames
        if count != 1 or type(frames[0]) is not bytes:
            frames = frames if _ONLY_BYTES.issuperset(map(type, frames)) else [whole(f) for f in frames]
        most = self._driver.max_bytes - HEAD_BYTES - 16
        if count <= MOST_FRAMES and sum(map(len, frames)) + count * FRAME_OVERHEAD_BYTES <= most:
            entries = [(count, wrap(frames, now_ns))]  # type: ignore[arg-type]  # bytes, all of them
        else:
            entries = self._entries(frames, now_ns, most)  # type: ignore[arg-type]
        first = 0
        for count, data in entries:
            self._enter(count, len(data))
            of = () if stored is None else handed if len(entries) == 1 else handed[first : first + count]
            first += count

            def confirm(
                at: int | None, error: Exception | None, count: int = count, size: int = len(data), of: Sequence[Frame] = of
            ) -> None:
                with self._guard.mutex:
                    self._frames -= count
                    self._bytes -= size
                    if error is not None and self._error is None:
                        self._error = error
                    if self._waiters:
                        self._guard.changed.notify_all()
                if self._stored is not None and at is not None:
                    self._stored(at, count)
                if stored is not None and at is not None:
                    stored(of, position(at, 0))
                if done is not None:
                    done(error)

            try:
                self._outlet.send(data, confirm)
            except BaseException:
                with self._guard.mutex:
                    self._frames -= count
                    self._bytes -= len(data)
                raise
        return len(entries)

    def _enter(self, count: int, size: int) -> None:
        with self._guard.mutex:
            grace = None
            while self._frames and (self._frames + count > self._window or self._bytes + size > _WINDOW_BYTES):
                self._check()
                grace = grace or Grace(self.stopping)
                self._wait(grace)
            if self._error is not None or self._closed:
                self._check()
            if self._frames:
                self._silence.say(self._frames)
            else:
                self._silence.heard()
            self._frames += count
            self._bytes += size

    def _wait(self, grace: Grace) -> None:
        """Until something is confirmed; holds the lock."""
        before = self._frames
        self._waiters += 1
        try:
            self._guard.changed.wait(1.0)
        finally:
            self._waiters -= 1
        self._silence.say(self._frames)
        if self._frames < before:
            grace.begin_again()
        elif grace.over:
            # What comes behind it cannot be sent any more, either: it would be stored without it.
            self._error = self._error or self._gave_up(self._frames)
            raise self._error

    def _gave_up(self, count: int) -> SendError:
        why = self._driver.trouble() or self._silence.why or "no reason known"
        return SendError(
            f"told to stop while {self._driver.what} has not confirmed {count} messages for topic {self.topic!r} for {GRACE_S:g} s: "
            f"they may be lost; {why}"
        )

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(f"the publisher of topic {self.topic!r} is closed")
        if self._error is not None:
            raise self._error

    def _entries(self, frames: Sequence[bytes], now_ns: int, most: int) -> list[tuple[int, bytes]]:
        """(count of frames, bytes) of each entry, of which none is larger than `most`, where one is not enough."""
        sizes = [len(f) + FRAME_OVERHEAD_BYTES for f in frames]
        found: list[tuple[int, bytes]] = []
        batch: list[bytes | Reference] = []
        room = most
        for frame, size in zip(frames, sizes, strict=True):
            item: bytes | Reference = frame
            if size > most:
                item = self._put_aside(frame, most)
                size = 64 + 9 * len(item.parts)
            if batch and (size > room or len(batch) >= MOST_FRAMES):
                found.append((len(batch), wrap(batch, now_ns)))
                batch, room = [], most
            batch.append(item)
            room -= size
        found.append((len(batch), wrap(batch, now_ns)))
        return found

    def _put_aside(self, frame: bytes, most: int) -> Reference:
        """Writes a frame in parts; returns when they are durable."""
        if self._parts is None:
            self._parts = self._patient(parts_topic(self.topic))
        views = [memoryview(frame)[n : n + most] for n in range(0, len(frame), most)]
        found: list[int | None] = [None] * len(views)
        errors: list[Exception] = []
        left = threading.Semaphore(0)

        def confirm(number: int, at: int | None, error: Exception | None) -> None:
            found[number] = at
            if error is not None:
                errors.append(error)
            left.release()

        for number, view in enumerate(views):
            self._parts.send(wrap([bytes(view)], 0), lambda at, error, n=number: confirm(n, at, error))  # type: ignore[misc]
        for _ in views:
            grace = Grace(self.stopping)
            while not left.acquire(timeout=1.0):
                self._check()
                self._silence.say(len(views), "parts of a message")
                if grace.over:
                    raise self._gave_up(1)
        if errors:
            raise errors[0]
        return Reference(len(frame), xxh3_128_digest(frame), [at for at in found if at is not None])

    @property
    def unconfirmed(self) -> int:
        """How many frames are."""
        return self._frames

    def flush(self, patience_s: float | None = None) -> None:
        """Returns when everything is confirmed. `patience_s`: raises `SendError` when that takes longer."""
        began, grace = time.monotonic(), Grace(self.stopping)
        with self._guard.mutex:
            while self._frames:
                self._check()
                self._wait(grace)
                if self._frames and patience_s is not None and time.monotonic() - began > patience_s:
                    why = self._driver.trouble() or "no reason known"
                    raise SendError(
                        f"{self._driver.what} did not confirm {self._frames} messages for topic {self.topic!r} in {patience_s:g} s: {why}"
                    )
            self._check()

    def close(self) -> None:
        """Lets go. Idempotent."""
        self._closed = True
        self._outlet.close()
        if self._parts is not None:
            self._parts.close()


class BrokerPublisher(Publisher):
    """See `Publisher`. The window is of messages that the broker has not confirmed, or that a join has not settled."""

    def __init__(self, engine: BrokerEngine, topic: str, send_window: int) -> None:
        self._engine = engine
        self._restraint = Restraint(engine.driver, topic, send_window, lambda: self._appender.unconfirmed)
        self._appender = Appender(engine.driver, engine.trouble, topic, send_window, self._restraint.sent)
        self._appender.stopping = lambda: self.giving_up is not None and self.giving_up()
        self._topic, self._closed = topic, False

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise ClosedError(f"the publisher of topic {self._topic!r} is closed")

    def publish(self, frames: Sequence[Frame]) -> None:
        engine = self._engine
        if self._closed or engine.closed or engine.pid != os.getpid():
            self._check()
        if frames:
            self._appender.append(frames, time.time_ns(), None, self.stored)
            self._restraint.wait(len(frames), self._stops)

    def _stops(self) -> bool:
        return self._closed or (self.stopping is not None and self.stopping())

    def flush(self) -> None:
        self._check()
        self._appender.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if not self._engine.foreign:
                self._appender.flush(_CLOSE_S)
        finally:
            if not self._engine.foreign:
                self._restraint.close()
                self._appender.close()


class _Epoch(msgspec.Struct, array_like=True):
    """Stands before each entry of a fenced log: whose it is."""

    epoch: int
    holder: str


_encode_epoch = msgspec.msgpack.Encoder().encode
_decode_epoch = msgspec.msgpack.Decoder(_Epoch).decode


def _stamped(epoch: _Epoch, body: bytes) -> bytes:
    head = _encode_epoch(epoch)
    return STAMP_MAGIC + len(head).to_bytes(2, "little") + head + body


def _epoch_of(entry: Entry | None) -> _Epoch:
    if entry is None or entry.data[:2] != STAMP_MAGIC:
        return _Epoch(0, "")
    return _decode_epoch(entry.data[4 : 4 + int.from_bytes(entry.data[2:4], "little")])


class BrokerFence(Fence):
    """The right to append to a log, by the broker's own means. `stopping`: see `Appender`."""

    stopping: Callable[[], bool] | None = None

    def __init__(self, engine: BrokerEngine, topic: str, holder: str) -> None:
        self._engine, self.topic = engine, topic
        self._silence = Silence(engine.driver, engine.trouble, topic)
        self._decided: deque[int] = deque()
        for tries_left in reversed(range(_TAKE_TRIES)):
            self._outlet = PatientOutlet(engine.driver.fenced_outlet(topic), self._silence, engine.driver.deadline_s)
            try:
                self._epoch = _Epoch(_epoch_of(engine.driver.newest(topic)).epoch + 1, holder)
                self.epoch = self._epoch.epoch
                self._send([])
                return
            except BaseException as exc:
                self._outlet.close()
                # Where a fence is the expected number of the next entry, the holder may have appended in between.
                if not isinstance(exc, Fenced) or not tries_left:
                    raise

    def append(self, frames: Sequence[Frame]) -> None:
        self.append_at(frames)

    def append_at(self, frames: Sequence[Frame]) -> int:
        """`append`; returns the entry. Without frames it only makes sure that the fence is held."""
        self._engine.check()
        try:
            at = self._send([whole(f) for f in frames])
        except Fenced:
            now = _epoch_of(self._engine.driver.newest(self.topic))
            raise Fenced(
                f"the log {self.topic!r} is held by {now.holder!r} since epoch {now.epoch}, not epoch {self.epoch} any more"
            ) from None
        if frames:
            self._let_go(at)
        return at

    def _let_go(self, at: int) -> None:
        """Only the newest decision of a complete settlement is read again: much fewer than these are on their way."""
        self._decided.append(at)
        if len(self._decided) >= 2 * _DISCARD_EVERY:
            for _ in range(_DISCARD_EVERY):
                self._decided.popleft()
            self._engine.driver.discard(self.topic, self._decided[0])

    def close(self) -> None:
        if not self._engine.foreign:
            self._outlet.close()

    def _send(self, frames: list[bytes]) -> int:
        found: list[tuple[int | None, Exception | None]] = []
        there = threading.Event()

        def confirm(at: int | None, error: Exception | None) -> None:
            found.append((at, error))
            there.set()

        self._silence.heard()
        self._outlet.send(_stamped(self._epoch, wrap(frames, time.time_ns())), confirm)
        grace = Grace(self.stopping)
        while not there.wait(1.0):
            self._engine.check()
            self._silence.say(max(1, len(frames)))
            if grace.over:
                raise SendError(f"told to stop while {self._engine.driver.what} has not confirmed a record of the log {self.topic!r}")
        at, error = found[0]
        if error is not None or at is None:
            raise error or SendError(f"the log {self.topic!r} did not take a record")
        return at


def frames_of(entry: Entry, otherwise_ns: int = 0) -> tuple[int, list[bytes]]:
    """(publish time, frames) of an entry that holds no references."""
    publish_ns, items = unwrap(entry.data, otherwise_ns)
    return publish_ns, [bytes(i) if not isinstance(i, Reference) else b"" for i in items]


__all__ = ("Appender", "BrokerFence", "BrokerPublisher", "frames_of")
