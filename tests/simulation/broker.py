"""A broker of the simulated world, and the connection of a process to it.

It does what real ones do: it confirms late, hands entries to whoever has room, brings back what was not acknowledged, forgets
acknowledgements when it is killed, and takes twice what a client sends again after a connection broke. An entry that is stored stays, and
the order of one topic is the same for all who read it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.simulation.world import Condition, Process, World

from edgeserve.core.errors import Fenced, GroupBusy
from edgeserve.transport import Capabilities, Start
from edgeserve.transport.broker.driver import Channel, Deliver, Done, Driver, Entry, Extent, Inlet, NoAnswer, Outlet, Tail

QUEUE = 8
"""Entries that a member is sent ahead."""
_FORGOTTEN_ACKS = 6
_NO_ANSWER = 0.05
"""How often a broker cannot tell how far a group is."""


class Subscription:
    """A group at the broker."""

    def __init__(self, broker: Broker, topic: Topic) -> None:
        self._broker, self._topic = broker, topic
        self.acked: set[int] = set()
        # Those that were acknowledged at some time, also where that is forgotten.
        self.ever: set[int] = set()
        self.recent: deque[int] = deque(maxlen=_FORGOTTEN_ACKS)
        self.next = 0
        self.floor = 0
        self.again: list[int] = []
        self.counts: dict[int, int] = {}
        self.out: dict[int, SimInlet] = {}
        self.inlets: list[SimInlet] = []

    def ack(self, at: int) -> None:
        self.acked.add(at)
        self.ever.add(at)
        self.recent.append(at)
        self.out.pop(at, None)
        if at in self.again:
            self.again.remove(at)
        self.rise()

    def rise(self) -> int:
        """The floor, moved on over all that is acknowledged, and over numbers that nothing has."""
        while self.floor in self.acked or self._topic.is_hole(self.floor):
            self.floor += 1
        return self.floor

    def back(self, at: int, *, counted: bool = True) -> None:
        if at not in self.acked and at not in self.again:
            self.out.pop(at, None)
            insort(self.again, at)
            if counted:
                self.counts[at] = self.counts.get(at, 0) + 1

    def leave(self, inlet: SimInlet) -> None:
        if inlet in self.inlets:
            self.inlets.remove(inlet)
            for at in [at for at, holder in self.out.items() if holder is inlet]:
                self.back(at)
            self.pump()

    def forget_some(self) -> None:
        """The broker was killed before it had written down its newest acknowledgements."""
        lost = [at for at in self.recent if self._broker.world.random.random() < 0.5]
        self.recent.clear()
        self.acked.difference_update(lost)
        self.floor = min([self.floor, *lost])
        self.counts.clear()
        for at in lost:
            self.back(at, counted=False)

    def pump(self) -> None:
        random = self._broker.world.random
        while self.again or self.next < len(self._topic.entries):
            free = [inlet for inlet in self.inlets if inlet.room > 0]
            if not free:
                return
            inlet = free[int(random.random() * len(free))]
            if self.again:
                at = self.again.pop(0)
            else:
                at, self.next = self.next, self.next + 1
                if at in self.acked:
                    continue
            data = self._topic.entries[at]
            if data is not None:
                self.out[at] = inlet
                inlet.hand(at, data, self.counts.get(at, 0))


class Topic:
    """A log. `entries` below `first` are trimmed. None: a number that no entry has, as between two ledgers."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.name, self.first = name, 0
        self.entries: list[bytes | None] = []
        self.groups: dict[str, Subscription] = {}
        self.tails: list[SimTail] = []
        self.fence = 0
        self._broker = broker

    def is_hole(self, at: int) -> bool:
        """Whether there is no entry of this number, and others behind it."""
        return at < len(self.entries) and self.entries[at] is None

    def last(self) -> int:
        """The number of the newest entry; -1: there is none."""
        return next((at for at in reversed(range(len(self.entries))) if self.entries[at] is not None), -1)

    def store(self, data: bytes) -> int:
        self.entries.append(data)
        for group in self.groups.values():
            group.pump()
        for tail in self.tails:
            tail.changed()
        return len(self.entries) - 1

    def group(self, name: str, start: Start = "earliest") -> Subscription:
        if name not in self.groups:
            found = self.groups[name] = Subscription(self._broker, self)
            if start == "latest":
                found.next = found.floor = len(self.entries)
        return self.groups[name]


class Broker:
    """All topics."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.topics: dict[str, Topic] = {}
        self.drivers: list[SimDriver] = []
        self.up = True
        # For how long a client that says nothing keeps its connection.
        self.keep_alive_s = world.random.choice((2.0, 6.0, 30.0))

    def topic(self, name: str) -> Topic:
        if name not in self.topics:
            self.topics[name] = Topic(self, name)
        return self.topics[name]

    def kill(self) -> None:
        """All connections end; what is stored stays."""
        self.up = False
        for driver in self.drivers:
            driver.disconnect()
        for topic in self.topics.values():
            if topic.entries and self.world.random.random() < 0.5:
                topic.entries.append(None)
            for group in topic.groups.values():
                group.forget_some()

    def start(self) -> None:
        self.up = True
        for driver in self.drivers:
            driver.come_back()


class SimDriver(Driver):
    """A connection of a process. `session` tells apart what was sent over the connection before."""

    what, max_bytes, precision_ms = "the simulated broker", 1 << 20, 1
    deadline_s = None

    def __init__(self, broker: Broker, process: Process) -> None:
        self.broker, self.process, self.world = broker, process, broker.world
        self.session, self.connected = 0, broker.up
        self.outlets: list[SimOutlet] = []
        self.inlets: list[SimInlet] = []
        self._changed = Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._thread: Any = None
        self.slow = broker.world.random.choice((1.0, 1.0, 5.0, 30.0, 100.0))
        # Large results take longer than what is said of them.
        self.slow_results = broker.world.random.choice((1.0, 1.0, 1.0, 500.0 / self.slow))
        broker.drivers.append(self)
        process.at_kill.append(self.gone)

    # --- the wire -----------------------------------------------------------------------------------------------

    def latency(self) -> float:
        return self.world.random.uniform(0.0002, 0.002) * self.slow

    def call(self, do: Callable[[], None]) -> None:
        """By the client's own thread, in order."""
        if self._thread is None:
            self._thread = self.process.spawn(self._io, "io")
        self._calls.append(do)
        self._changed.notify_all()

    def _io(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    self._changed.wait()
                do = self._calls.popleft()
            do()

    def ask(self) -> None:
        """A round trip; waits while there is no connection."""
        self.world.sleep(2 * self.latency())
        while not self.connected:
            self.world.sleep(0.02)

    def disconnect(self) -> None:
        if not self.connected:
            return
        self.connected, self.session = False, self.session + 1
        for inlet in self.inlets:
            inlet.lose()

    def come_back(self) -> None:
        if self.connected or not self.broker.up or not self.process.alive or self.process.paused:
            return
        self.connected = True
        for inlet in list(self.inlets):
            inlet.join()
        for outlet in list(self.outlets):
            outlet.send_again()

    def gone(self) -> None:
        """The process was killed: what is on the wire may still come."""
        if self.world.random.random() < 0.5:
            self.session += 1
        self.connected = False
        # Its connection ends at once, or is only missed after a while.
        after = 0.0 if self.world.random.random() < 0.7 else self.broker.keep_alive_s * self.world.random.random()
        for inlet in self.inlets:
            self.world.after(after, partial(inlet.group.leave, inlet))

    # --- what is asked for --------------------------------------------------------------------------------------

    def outlet(self, topic: str) -> Outlet:
        self.ask()
        return SimOutlet(self, self.broker.topic(topic), None)

    def fenced_outlet(self, topic: str) -> Outlet:
        self.ask()
        found = self.broker.topic(topic)
        found.fence += 1
        return SimOutlet(self, found, found.fence)

    def inlet(self, topic: str, group: str, start: Start, *, exclusive: bool) -> Inlet:
        self.ask()
        found = self.broker.topic(topic).group(group, start)
        if exclusive and found.inlets:
            raise GroupBusy(f"{topic} is taken")
        return SimInlet(self, found, exclusive=exclusive)

    def tail(self, topic: str, after: int | None, deliver: Deliver) -> Tail:
        self.ask()
        return SimTail(self, self.broker.topic(topic), after, deliver)

    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel | None:
        return _Silent()

    def newest(self, topic: str) -> Entry | None:
        self.ask()
        found = self.broker.topic(topic)
        data = found.entries[last] if (last := found.last()) >= 0 else None
        return None if data is None else Entry(last, data)

    def scan(self, topic: str, first: int | None = None, *, since_ns: int | None = None) -> Iterator[Entry]:
        self.ask()
        found = self.broker.topics.get(topic)
        if found is not None:
            for at in range(max(first or 0, found.first), len(found.entries)):
                if (data := found.entries[at]) is not None:
                    yield Entry(at, data)

    def discard(self, topic: str, before: int) -> None:
        self.ask()
        found = self.broker.topics.get(topic)
        if found is not None:
            found.first = max(found.first, min([before, *(g.floor for g in found.groups.values())]))

    def topics(self) -> list[str]:
        self.ask()
        return list(self.broker.topics)

    def extent(self, topic: str) -> Extent | None:
        self.ask()
        found = self.broker.topics.get(topic)
        if found is None:
            return None
        last = found.last()
        return Extent(found.first, last, 0) if last >= found.first else Extent(None, None, 0)

    def groups(self, topic: str) -> list[str]:
        self.ask()
        found = self.broker.topics.get(topic)
        return [] if found is None else list(found.groups)

    def floor(self, topic: str, group: str) -> int:
        self._ask_for_numbers()
        return self.broker.topic(topic).group(group).rise()

    def delivered(self, topic: str, group: str) -> int:
        self._ask_for_numbers()
        return self.broker.topic(topic).group(group).next - 1

    def _ask_for_numbers(self) -> None:
        self.ask()
        if self.world.random.random() < _NO_ANSWER:
            raise NoAnswer("not now")

    def claimed(self, topic: str, group: str) -> int:
        self.ask()
        return len(self.broker.topic(topic).group(group).out)

    def delete_group(self, topic: str, group: str) -> None:
        raise NotImplementedError

    def delete_topic(self, topic: str) -> None:
        raise NotImplementedError

    def trouble(self) -> str | None:
        return None if self.connected else "there is no connection"

    def close(self) -> None:
        self.connected = False


class SimOutlet(Outlet):
    """Sends are on their way for a while, there and back; after a broken connection they are sent again."""

    def __init__(self, driver: SimDriver, topic: Topic, fence: int | None) -> None:
        self._driver, self._topic, self._fence = driver, topic, fence
        self._open: deque[tuple[bytes, Done]] = deque()
        self._there = self._back = 0.0
        driver.outlets.append(self)

    def send(self, data: bytes, done: Done) -> None:
        one = (data, done)
        self._open.append(one)
        if self._driver.connected:
            self._leave(one)

    def send_again(self) -> None:
        for one in list(self._open):
            self._leave(one)

    def _leave(self, one: tuple[bytes, Done]) -> None:
        driver = self._driver
        slow = driver.slow_results if self._topic.name == "out" else 1.0
        self._there = max(self._there, driver.world.now + driver.latency() * slow)
        driver.world.after(self._there - driver.world.now, partial(self._arrive, one, driver.session))

    def _arrive(self, one: tuple[bytes, Done], session: int) -> None:
        driver = self._driver
        if session != driver.session or not driver.broker.up:
            return
        at: int | None = None
        error: Exception | None = None
        if self._fence is not None and self._fence != self._topic.fence:
            error = Fenced(f"{self._topic.name} is another's")
        else:
            at = self._topic.store(one[0])
        self._back = max(self._back, driver.world.now + driver.latency())
        driver.world.after(self._back - driver.world.now, partial(self._confirm, one, at, error, session))

    def _confirm(self, one: tuple[bytes, Done], at: int | None, error: Exception | None, session: int) -> None:
        if session == self._driver.session and self._driver.process.alive and one in self._open:
            self._open.remove(one)
            self._driver.call(partial(one[1], at, error))

    def close(self) -> None:
        if self in self._driver.outlets:
            self._driver.outlets.remove(self)


class SimInlet(Inlet):
    """A consumer with a queue of its own."""

    def __init__(self, driver: SimDriver, group: Subscription, *, exclusive: bool) -> None:
        self._driver, self.group, self._exclusive = driver, group, exclusive
        self._queue: deque[Entry] = deque()
        self._changed = Condition()
        self._closed = False
        self.room, self._due = QUEUE, 0.0
        driver.inlets.append(self)
        group.inlets.append(self)
        group.pump()

    def hand(self, at: int, data: bytes, count: int) -> None:
        driver = self._driver
        self.room -= 1
        self._due = max(self._due, driver.world.now + driver.latency())
        driver.world.after(self._due - driver.world.now, partial(self._arrive, Entry(at, data, count, driver.session), driver.session))

    def _arrive(self, entry: Entry, session: int) -> None:
        if session == self._driver.session and not self._closed:
            self._queue.append(entry)
            self._changed.notify_all()

    def lose(self) -> None:
        """The connection broke: what was not handed over is dropped, and comes again."""
        self._queue.clear()
        self.group.leave(self)

    def join(self) -> None:
        session = self._driver.session
        if self._exclusive and self.group.inlets:
            # It is another's by now; the client tries again and again.
            self._driver.world.after(0.1, lambda: self.join() if session == self._driver.session else None)
        elif not self._closed:
            self.room = QUEUE
            self.group.inlets.append(self)
            self.group.pump()

    def poll(self, seconds: float) -> Entry | None:
        with self._changed:
            if not self._queue and seconds > 0 and not self._closed:
                self._changed.wait(seconds)
            if self._closed or not self._queue:
                return None
            entry = self._queue.popleft()
        self.room += 1
        self.group.pump()
        return entry

    def _later(self, seconds: float, entry: Entry, do: Callable[[int], None]) -> None:
        session = self._driver.session
        if entry.token == session and self._driver.connected and not self._closed:
            self._driver.world.after(seconds, lambda: do(entry.at) if session == self._driver.session and self._driver.broker.up else None)

    def acknowledge(self, entry: Entry) -> None:
        self._later(self._driver.latency(), entry, self.group.ack)

    def give_back(self, entry: Entry) -> None:
        def back(at: int) -> None:
            self.group.back(at)
            self.group.pump()

        self._later(0.1 + self._driver.latency(), entry, back)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._changed:
            self._changed.notify_all()
        self._driver.world.sleep(self._driver.latency())
        if self in self._driver.inlets:
            self._driver.inlets.remove(self)
        self.group.leave(self)


class SimTail(Tail):
    """A reader, and its thread."""

    def __init__(self, driver: SimDriver, topic: Topic, after: int | None, deliver: Deliver) -> None:
        self._driver, self._topic, self._deliver = driver, topic, deliver
        self._next = 0 if after is None else after + 1
        self._closed = False
        self._changed = Condition()
        topic.tails.append(self)
        driver.process.spawn(self._run, "tail")

    def changed(self) -> None:
        self._changed.notify_all()

    def _run(self) -> None:
        driver = self._driver
        while not self._closed:
            self._next = max(self._next, self._topic.first)
            if self._next >= len(self._topic.entries):
                with self._changed:
                    self._changed.wait(1.0)
                continue
            driver.world.sleep(driver.latency())
            if not driver.connected:
                driver.world.sleep(0.02)
            elif not self._closed and self._next >= self._topic.first:
                at, self._next = self._next, self._next + 1
                if (data := self._topic.entries[at]) is not None:
                    self._deliver(Entry(at, data))

    def close(self) -> None:
        self._closed = True
        if self in self._topic.tails:
            self._topic.tails.remove(self)
        self._changed.notify_all()


class _Silent(Channel):
    """Nothing depends on a channel."""

    def say(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


CAPABILITIES = Capabilities(retention_by_size=False, max_frame_bytes=1 << 20, holds_senders=False)

__all__ = ("CAPABILITIES", "Broker", "SimDriver")
