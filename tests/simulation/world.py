"""A world with one seed: its threads are greenlets that a scheduler switches, and time passes only while all of them wait.

The code under test runs as it is; `installed` puts this world's `threading`, `time`, `os` and `uuid` in the place of the real ones, in
all modules of edgeserve. A process is a group of threads that can be killed (they are never run again) or paused.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import greenlet

SWITCH_S = 5e-6
"""What every switch costs: a loop that never waits cannot stop time."""


class Stuck(Exception):
    """Nobody can go on, or it has taken too long."""


class Process:
    """Some threads on a host."""

    def __init__(self, world: World, name: str, host: str) -> None:
        self.world, self.name, self.host = world, name, host
        self.pid = world.number()
        self.alive, self.paused = True, False
        self.held: list[Thread] = []
        self.threads: list[Thread] = []
        self.skew_s = world.random.uniform(-2.0, 2.0)
        self.at_kill: list[Callable[[], None]] = []

    def spawn(self, target: Callable[[], object], name: str = "main") -> Thread:
        """A thread that runs from now on."""
        thread = Thread(target=target, name=name, process=self)
        thread.start()
        return thread

    def kill(self) -> None:
        """None of its threads ever runs again."""
        self.alive = False
        self.world.ready = [t for t in self.world.ready if t.process is not self]
        for do in self.at_kill:
            do()

    def pause(self) -> None:
        """SIGSTOP."""
        world = self.world
        self.paused = True
        self.held += [t for t in world.ready if t.process is self]
        world.ready = [t for t in world.ready if t.process is not self]

    def go_on(self) -> None:
        """SIGCONT."""
        self.paused = False
        if self.alive:
            self.world.ready += self.held
        self.held = []


class World:
    """The scheduler.

    Attributes:
        random: where every choice comes from.
        now: seconds since some time.
        errors: what threads have ended with.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_000.0
        self.preempt = self.random.choice((0.0, 0.02, 0.2))
        self.ready: list[Thread] = []
        self.errors: list[BaseException] = []
        self.over = False
        self.current: Thread | None = None
        self.switches = 0
        self._numbers = 1
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._hub = greenlet.getcurrent()
        self._all: list[Thread] = []

    def number(self) -> int:
        """A new one."""
        self._numbers += 1
        return self._numbers

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Calls `do`, which must not wait, later."""
        heapq.heappush(self._timers, (self.now + seconds, self.number(), do))

    def run(self, done: Callable[[], bool], limit_s: float) -> None:
        """Until `done`; raises `Stuck` after so many seconds of this world."""
        limit = self.now + limit_s
        timers, choose = self._timers, self.random.random
        while not done():
            while timers and timers[0][0] <= self.now:
                heapq.heappop(timers)[2]()
            ready = self.ready
            if not ready:
                if not timers or timers[0][0] > limit:
                    raise Stuck(f"nothing happens any more, {self.now - 1_000:.3f} s")
                self.now = max(self.now, timers[0][0])
                continue
            if self.now > limit:
                raise Stuck(f"not over after {limit_s} s")
            self.now += SWITCH_S
            self.switches += 1
            at = int(choose() * len(ready))
            thread = ready[at]
            ready[at] = ready[-1]
            ready.pop()
            self.current = thread
            thread.greenlet.switch()
            self.current = None

    def park(self, timeout_s: float | None = None) -> bool:
        """The running thread waits; True: it was woken, False: in vain."""
        thread = self.current
        if self.over or thread is None:
            raise greenlet.GreenletExit
        thread.parked, thread.ticket = True, thread.ticket + 1
        if timeout_s is not None:
            self.after(max(0.0, timeout_s), partial(self._in_vain, thread, thread.ticket))
        self._hub.switch()
        if self.over:
            raise greenlet.GreenletExit
        return thread.woken

    def _in_vain(self, thread: Thread, ticket: int) -> None:
        if thread.parked and thread.ticket == ticket:
            self.unpark(thread, woken=False)

    def unpark(self, thread: Thread, *, woken: bool = True) -> None:
        """A thread that waits goes on."""
        if thread.parked:
            thread.parked, thread.woken = False, woken
            self.make_ready(thread)

    def make_ready(self, thread: Thread) -> None:
        """It may run."""
        if thread.process.paused:
            thread.process.held.append(thread)
        elif thread.process.alive:
            self.ready.append(thread)

    def give_way(self) -> None:
        """Others may run before the running thread goes on."""
        thread = self.current
        if self.over or thread is None:
            raise greenlet.GreenletExit
        self.make_ready(thread)
        self._hub.switch()
        if self.over:
            raise greenlet.GreenletExit

    def sleep(self, seconds: float) -> None:
        """Of the running thread."""
        self.park(seconds)

    def close(self) -> None:
        """Unwinds what is left, which finds that all is over."""
        self.over = True
        for thread in self._all:
            if thread.started and not thread.greenlet.dead:
                with contextlib.suppress(BaseException):
                    thread.greenlet.throw(greenlet.GreenletExit)
        self._all.clear()


_world: World | None = None


def world() -> World:
    """The one that is installed."""
    assert _world is not None
    return _world


def here() -> Process:
    """The process of the running thread."""
    current = world().current
    if current is None:
        raise greenlet.GreenletExit
    return current.process


# --- threading ------------------------------------------------------------------------------------------------------


class Thread:
    """See `threading.Thread`."""

    def __init__(
        self,
        target: Callable[..., object] | None = None,
        name: str = "",
        daemon: bool = False,
        process: Process | None = None,
        args: tuple[Any, ...] = (),
    ) -> None:
        self._target, self.name, self.daemon, self._args = target, name, daemon, args
        self.process = process or here()
        self.parked = self.woken = self.started = False
        self.ticket = 0
        self._waiters: list[Thread] = []
        self.greenlet = greenlet.greenlet(self._run, parent=self.process.world._hub)
        self.ident = self.process.world.number()

    def start(self) -> None:
        self.started = True
        self.process.threads.append(self)
        self.process.world._all.append(self)
        self.process.world.make_ready(self)

    def _run(self) -> None:
        assert self._target is not None
        world = self.process.world
        try:
            self._target(*self._args)
        except greenlet.GreenletExit:
            pass
        except BaseException as exc:
            world.errors.append(exc)
        for waiter in self._waiters:
            world.unpark(waiter)

    def is_alive(self) -> bool:
        return self.started and not self.greenlet.dead

    def join(self, timeout: float | None = None) -> None:
        world = self.process.world
        until = None if timeout is None else world.now + timeout
        while self.is_alive() and (until is None or world.now < until):
            if world.current is not None:
                self._waiters.append(world.current)
            world.park(None if until is None else until - world.now)


class Lock:
    """See `threading.RLock`; stands for `Lock` too, whose owner never takes it twice here."""

    def __init__(self) -> None:
        self._owner: Thread | None = None
        self._count = 0
        self._waiters: list[Thread] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        w = world()
        me = w.current
        if self._owner is me and me is not None:
            self._count += 1
            return True
        if w.over or me is None:
            raise greenlet.GreenletExit
        if w.preempt and w.random.random() < w.preempt:
            w.give_way()
        while self._owner is not None:
            if not blocking:
                return False
            self._waiters.append(me)
            w.park()
        self._owner, self._count = me, 1
        return True

    def release(self) -> None:
        self._count -= 1
        if not self._count:
            self._owner = None
            if self._waiters:
                world().unpark(self._waiters.pop(0))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def locked(self) -> bool:
        return self._owner is not None

    def _let_go(self) -> int:
        count, self._count = self._count, 1
        self.release()
        return count

    def _take_again(self, count: int) -> None:
        self.acquire()
        self._count = count


class Condition:
    """See `threading.Condition`."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock or Lock()
        self._waiting: list[Thread] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        w = world()
        me = w.current
        if me is None:
            raise greenlet.GreenletExit
        self._waiting.append(me)
        count = self._lock._let_go()
        woken = w.park(timeout)
        if me in self._waiting:
            self._waiting.remove(me)
        self._lock._take_again(count)
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = None if timeout is None else world().now + timeout
        while not (found := predicate()):
            if until is not None and world().now >= until:
                break
            self.wait(None if until is None else until - world().now)
        return found

    def notify(self, n: int = 1) -> None:
        for thread in self._waiting[:n]:
            self._waiting.remove(thread)
            world().unpark(thread)

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """See `threading.Event`."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Thread] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for thread in self._waiting:
            world().unpark(thread)
        self._waiting = []

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else world().now + timeout
        while not self._set and (until is None or world().now < until):
            me = world().current
            if me is None:
                raise greenlet.GreenletExit
            self._waiting.append(me)
            world().park(None if until is None else until - world().now)
            if me in self._waiting:
                self._waiting.remove(me)
        return self._set


class Semaphore:
    """See `threading.Semaphore`."""

    def __init__(self, value: int = 1) -> None:
        self._value, self._changed = value, Condition()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        with self._changed:
            if not self._changed.wait_for(lambda: self._value > 0, timeout):
                return False
            self._value -= 1
            return True

    def release(self) -> None:
        with self._changed:
            self._value += 1
            self._changed.notify()


class _Instead(types.ModuleType):
    """A module with some names replaced."""

    def __init__(self, real: types.ModuleType, **names: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(names)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _wall_s() -> float:
    return 1_700_000_000.0 + world().now + here().skew_s


_THREADING = _Instead(
    threading,
    Thread=Thread,
    Lock=Lock,
    RLock=Lock,
    Condition=Condition,
    Event=Event,
    Semaphore=Semaphore,
    current_thread=lambda: world().current,
    main_thread=lambda: None,
    get_ident=lambda: 0 if world().current is None else world().current.ident,  # type: ignore[union-attr]
)
_TIME = _Instead(
    time,
    monotonic=lambda: world().now,
    monotonic_ns=lambda: int(world().now * 1e9),
    time=_wall_s,
    time_ns=lambda: int(_wall_s() * 1e9),
    sleep=lambda seconds: world().sleep(seconds),
)
_OS = _Instead(os, getpid=lambda: here().pid, urandom=lambda n: world().random.randbytes(n))
_UUID = _Instead(uuid, uuid4=lambda: uuid.UUID(int=world().random.getrandbits(128)))
_MODULES = {"threading": _THREADING, "time": _TIME, "os": _OS, "uuid": _UUID}


@contextlib.contextmanager
def replaced(**more: Any) -> Iterator[None]:
    """All modules of edgeserve have this world's `threading`, `time`, `os`, `uuid`. `more`: "module:name" to what stands in its place."""
    before: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in [m for name, m in sys.modules.items() if name.startswith("edgeserve.") and ".cli" not in name and ".testing" not in name]:
        for name, value in list(vars(module).items()):
            if name in _MODULES and value is _MODULES[name]._real:
                put(module, name, _MODULES[name])
            elif name in ("monotonic_ns", "monotonic", "time_ns", "sleep") and value is getattr(time, name):
                put(module, name, getattr(_TIME, name))
    try:
        for where, value in more.items():
            path, _, name = where.partition(":")
            target: Any = sys.modules[path]
            for part in name.split(".")[:-1]:
                target = getattr(target, part)
            put(target, name.split(".")[-1], value)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


@contextlib.contextmanager
def installed(made: World) -> Iterator[World]:
    """This is the world that there is."""
    global _world
    _world = made
    try:
        yield made
    finally:
        made.close()
        _world = None


__all__ = ("Condition", "Event", "Lock", "Process", "Stuck", "Thread", "World", "here", "installed", "replaced", "world")
