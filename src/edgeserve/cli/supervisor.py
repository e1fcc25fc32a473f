"""Runs several processes as one: their lines by name, one failing is started again or ends all, a signal ends all."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LADDER = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_KILL = len(_LADDER) - 1
_TAIL_LINES = 60
_WAITING_AFTER_S = 1.0
_ECHO_S = 0.2
"""A stop signal so soon after the first is the same one once more: `timeout`, a shell that goes and many wrappers hand it on as well."""
_NEVER = float("inf")
_RESTART_AFTER_S, _RESTART_AT_MOST_S = 0.1, 10.0
_LOOK_EVERY_S = 0.1
_STEADY_S = 60.0
"""Who ran so long may be started again as often as at the beginning."""

Line = Callable[[str, str, str], None]
"""Takes a line: the process's name, "stdout" or "stderr", the text."""

Waiting = Callable[[list[str]], None]
"""Takes the names of the processes that still run a moment after a signal asked them to end."""

Again = Callable[[str, str], None]
"""Takes the name of a process that is about to be started again, and how it ended."""

Stays = Callable[[], bool]
"""Whether there is something yet to stay for when all processes have ended well."""


class _Stream:
    """The lines of a pipe, as far as they have come."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd, self.ended = name, fd, False
        self._rest = b""
        os.set_blocking(fd, False)

    def lines(self, *, last: bool = False) -> list[str]:
        """What has come since; with `last` a line without its end, too."""
        chunks = [self._rest]
        while True:
            try:
                chunk = os.read(self.fd, 65536)
            except BlockingIOError:
                break
            if not chunk:
                self.ended = True
                break
            chunks.append(chunk)
        *whole, self._rest = b"".join(chunks).split(b"\n")
        if self._rest and (last or self.ended):
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace").rstrip("\r") for line in whole]


class _Child:
    """One process, its streams, and the end of what it wrote on standard error."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], pipe: int, progress: int) -> None:
        self.name, self.process = name, process
        self.started_at = time.monotonic()
        self.pipe, self.progress = pipe, progress
        # Bytes that it has written about its progress: the first when it is ready, the second when it has done all.
        self.heard = 0
        self.told = False
        self.streams = [
            _Stream(stream, pipe.fileno()) for stream, pipe in (("stdout", process.stdout), ("stderr", process.stderr)) if pipe is not None
        ]
        self.tail: list[str] = []
        self.reported = False

    @property
    def status(self) -> int | None:
        """The exit status; negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def ready(self) -> bool:
        """Whether it is, or was."""
        return self.heard > 0 or self.reported

    @property
    def over(self) -> bool:
        """Whether it has done well all that it will do."""
        return self.heard > 1 or (self.reported and self.status == 0)

    def signal(self, number: signal.Signals) -> None:
        """Signals the process and what it has started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # ended in this moment


@dataclass(frozen=True)
class Failure:
    """A process that ended otherwise than well: its name, how, its last lines on standard error. `why`: why it was not started again."""

    name: str
    how: str
    tail: tuple[str, ...]
    why: str = ""


@dataclass
class Outcome:
    """How a run ended. `stopped_by` names the first signal that asked for it; `killed`: who had to be, by a second one or in the end."""

    stopped_by: str = ""
    failures: list[Failure] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)


class Supervisor:
    """Starts processes, passes their lines on, and ends them together.

    A signal asks them to end, and they are asked more strongly each time that the grace is over; a second signal kills them.

    Args:
        commands: name to command line. `{parent}` in it becomes the number of a file descriptor that is at its end when this process
            has ended, however it ended (see `upstream` for what else comes there); `{progress}` that of one to which it writes a byte when
            it is ready ("0" if it is never to be started again), and another when it has done all. They start with SIGINT, SIGTERM and
            SIGHUP blocked and unblock them when they can handle them: a signal in between is not lost, and no half-started interpreter
            complains about it.
        line: takes each line that a process writes.
        waiting: is told, once, who still runs a second after the first signal.
        grace_s: how long the processes have after SIGINT, and again after SIGTERM.
        last: names of those that are started when the others are ready, or have ended.
        upstream: name to the names of others. It is told with a byte on its `{parent}` when all of these have done all, or ended well.
        most_s: how long after all were ready they are asked to end, as after a signal.
        restarts: how often one that was ready, at whatever start, and fails is started again before its failure ends all.
        forgets: whether one that has run for a minute may be started again as often as at the beginning.
        again: is told of each of these.
        stays: asked again and again when all have ended by themselves and none has failed: False, or a signal, ends the run.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        line: Line,
        waiting: Waiting,
        *,
        grace_s: float = 10.0,
        last: Container[str] = (),
        most_s: float = _NEVER,
        upstream: Mapping[str, Iterable[str]] = MappingProxyType({}),
        restarts: int = 0,
        forgets: bool = True,
        again: Again = lambda name, how: None,
        stays: Stays = lambda: False,
    ) -> None:
        self._commands, self._line, self._waiting, self._grace_s = commands, line, waiting, grace_s
        self._last = [name for name in commands if name in last]
        self._upstream = {name: set(names) for name, names in upstream.items()}
        self._most_s, self._stop_at = most_s, _NEVER
        self._restarts, self._forgets, self._again, self._stays = restarts, forgets, again, stays
        self._were_ready, self._once = set[str](), set[str]()
        self._restarted: dict[str, int] = {}
        self._restart_at: dict[str, float] = {}
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._rung = -1
        self._next_rung_at = self._tell_at = _NEVER
        self._asked: list[tuple[signal.Signals, float]] = []
        self._first_asked = _NEVER
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Runs until all processes have ended; call it once, from the main thread."""
        with _signals(self._asked) as wake:
            self._selector.register(wake, selectors.EVENT_READ)
            try:
                self._start([name for name in self._commands if name not in self._last])
                while self._last or self._restart_at or any(not child.reported for child in self._children):
                    if self._last and all(child.ready for child in self._children):
                        names, self._last = self._last, []
                        self._start(names)
                    self._turn(wake)
                while self._rung < 0 and not self._outcome.failures and self._stays():
                    self._turn(wake, _LOOK_EVERY_S)
            finally:
                self._kill_what_is_left()
                for child in self._children:
                    os.close(child.pipe)
                    os.close(child.progress)
                self._selector.close()
        return self._outcome

    def _start(self, names: Sequence[str]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            for name in names:
                (parent, pipe), (progress, says) = os.pipe(), os.pipe()
                process = subprocess.Popen(
                    [argument.format(parent=parent, progress=says) for argument in self._commands[name]],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(parent, says),
                    # A group of its own: Ctrl-C in the terminal reaches this process only, which then asks each child once.
                    process_group=0,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )
                os.close(parent)
                os.close(says)
                child = _Child(name, process, pipe, progress)
                self._children.append(child)
                self._selector.register(progress, selectors.EVENT_READ, child)
                for stream in child.streams:
                    self._selector.register(stream.fd, selectors.EVENT_READ, (child, stream))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _turn(self, wake: socket.socket, most_s: float = _NEVER) -> None:
        next_at = min(self._next_rung_at, self._tell_at, self._stop_at, *self._restart_at.values(), time.monotonic() + most_s)
        wait = None if next_at == _NEVER else max(0.0, next_at - time.monotonic())
        for key, _ in self._selector.select(wait):
            if isinstance(key.data, _Child):
                self._hear(key.data)
            elif key.data is None:
                wake.recv(4096)
            else:
                self._read(*key.data)
        for child in [*self._children]:
            if not child.reported and child.status is not None:
                self._report(child)
        self._tell_of_upstream()
        while self._asked:
            self._stop(*self._asked.pop(0))
        if (self._outcome.failures and self._rung < 0) or time.monotonic() >= self._next_rung_at:
            self._climb(self._rung + 1)
        if time.monotonic() >= self._stop_at:
            self._climb(0)
        if time.monotonic() >= self._tell_at:
            self._tell()
        due = [name for name, at in self._restart_at.items() if time.monotonic() >= at]
        for name in due:
            del self._restart_at[name]
        self._start(due)

    def _hear(self, child: _Child) -> None:
        said = os.read(child.progress, 2)
        if not said:
            self._selector.unregister(child.progress)
        elif not child.heard:
            self._were_ready.add(child.name)
            if said.startswith(b"0"):
                self._once.add(child.name)
        child.heard += len(said)
        if self._stop_at == _NEVER and self._rung < 0 and not self._last and all(each.ready for each in self._children):
            self._stop_at = time.monotonic() + self._most_s

    def _tell_of_upstream(self) -> None:
        over = {child.name for child in self._children if child.over}
        for child in self._children:
            if not child.told and child.name in self._upstream and self._upstream[child.name] <= over:
                child.told = True
                with contextlib.suppress(BrokenPipeError):  # it has just ended
                    os.write(child.pipe, b"1")

    def _stop(self, number: signal.Signals, at: float) -> None:
        """The first signal asks, a second one has no patience any more."""
        if not self._outcome.stopped_by:
            self._outcome.stopped_by, self._first_asked = number.name, at
            self._tell_at = time.monotonic() + _WAITING_AFTER_S
            self._climb(self._rung + 1)
        elif at - self._first_asked > _ECHO_S:
            self._climb(_KILL)

    def _tell(self) -> None:
        self._tell_at = _NEVER
        names = [child.name for child in self._children if not child.reported]
        if names and self._rung < _KILL:
            self._waiting(names)

    def _read(self, child: _Child, stream: _Stream, *, last: bool = False) -> None:
        for text in stream.lines(last=last):
            if stream.name == "stderr":
                child.tail.append(text)
                del child.tail[:-_TAIL_LINES]
            self._line(child.name, stream.name, text)
        if (stream.ended or last) and stream.fd in self._selector.get_map():
            self._selector.unregister(stream.fd)

    def _report(self, child: _Child) -> None:
        """Takes an ended process's last lines (its own children may still hold the pipe open) and judges how it ended."""
        child.reported = True
        for stream in child.streams:
            self._read(child, stream, last=True)
        for pipe in (child.process.stdout, child.process.stderr):
            if pipe is not None:
                pipe.close()
        status = child.status or 0
        if self._rung == _KILL and status == -signal.SIGKILL:
            self._outcome.killed.append(child.name)
        asked = self._rung >= 0 and -status in _LADDER
        if status != 0 and not asked:
            how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
            if not self._restart(child, how):
                self._outcome.failures.append(Failure(child.name, how, tuple(child.tail), self._why_not(child)))

    def _why_not(self, child: _Child) -> str:
        """Why one that failed is not started again, where that was asked for."""
        if not self._restarts:
            return ""
        if child.name in self._once:
            return "without message_id= or a stream with a position it may send once more what it has sent"
        if child.name not in self._were_ready:
            return "it failed before it was ready for the first time"
        times = "once" if self._restarts == 1 else f"{self._restarts} times"
        return f"it has been, {times} (--restarts)" if self._restarted.get(child.name, 0) >= self._restarts else ""

    def _restart(self, child: _Child, how: str) -> bool:
        """Has a process that failed started again, if it may be. One that never was ready would not be the next time either."""
        if child.progress in self._selector.get_map() and select.select([child.progress], [], [], 0)[0]:
            self._hear(child)
        if self._rung >= 0 or self._outcome.failures or child.heard > 1:
            return False
        if child.name not in self._were_ready or child.name in self._once:
            return False
        now = time.monotonic()
        before = 0 if self._forgets and child.heard and now - child.started_at > _STEADY_S else self._restarted.get(child.name, 0)
        if before >= self._restarts:
            return False
        self._restarted[child.name] = before + 1
        self._restart_at[child.name] = now + min(_RESTART_AFTER_S * 2**before, _RESTART_AT_MOST_S)
        self._drop(child)
        self._again(child.name, how)
        return True

    def _drop(self, child: _Child) -> None:
        """Forgets one in whose place another is started."""
        if child.progress in self._selector.get_map():
            self._selector.unregister(child.progress)
        os.close(child.pipe)
        os.close(child.progress)
        self._children.remove(child)

    def _climb(self, rung: int) -> None:
        """Sends the signal of this rung, or the strongest there is, to all that still run; who was to start does not any more."""
        self._last = []
        self._restart_at = {}
        self._stop_at = _NEVER
        self._rung = min(rung, _KILL)
        self._next_rung_at = time.monotonic() + self._grace_s
        for child in self._children:
            if child.status is None:
                child.signal(_LADDER[self._rung])

    def _kill_what_is_left(self) -> None:
        for child in self._children:
            if child.status is None:
                child.signal(signal.SIGKILL)
                child.process.wait()


@contextmanager
def _signals(asked: list[tuple[signal.Signals, float]]) -> Iterator[socket.socket]:
    """Collects stop signals in `asked`, with when they came; the socket becomes readable on each of them and when a child ends."""

    def note(number: int, _frame: FrameType | None) -> None:
        if number in _STOPS:
            asked.append((signal.Signals(number), time.monotonic()))

    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = {number: signal.signal(number, note) for number in (*_STOPS, signal.SIGCHLD)}
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


__all__ = ("Again", "Failure", "Line", "Outcome", "Stays", "Supervisor", "Waiting")
