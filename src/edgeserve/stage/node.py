"""What DataSource, Compute and Materialize share: lazy opening, iteration, `run()`, closing, and their process."""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from edgeserve.core.errors import ClosedError, ConfigurationError, EdgeServeError, UsedAfterFork
from edgeserve.stage.aio import Worker
from edgeserve.stage.base import Steps
from edgeserve.stage.collector import rare_collections
from edgeserve.stage.control import Control, Stopped
from edgeserve.stage.drops import Drops
from edgeserve.stage.external import ExternalInputs
from edgeserve.stage.files import Files
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.wiring import Wiring
from edgeserve.transport import Transport, connect, disconnect

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Node(ABC):
    """A node of a pipeline. Nothing is connected before `__enter__` or the first `next`.

    Attributes:
        url: of the node that it was given.
        wiring: which topics it reads and writes, and the source ids there.
    """

    wiring: Wiring

    def __init__(self, node: str | None, pulsar_node: str | None, *, what: str, name: str) -> None:
        url = node if node is not None else pulsar_node
        if url is None:
            raise ConfigurationError(f"{what} needs the URL of a node: node= (or its older name pulsar_node=), for example 'local://'")
        if node is not None and pulsar_node is not None:
            raise ConfigurationError(f"{what} got both node= and pulsar_node=, which is its older name: leave one out")
        if not isinstance(url, str):
            raise ConfigurationError(f"{what}: the node is a URL such as 'local://', not {type(url).__name__}")
        self.url = url
        self._what, self._name = what, name
        self._forks = _forks
        self._pid = os.getpid()
        self._transport: Transport | None = None
        self._opened = self._closed = False
        self._control = Control()
        # One step at a time, whichever thread asks; re-entrant, so that a task may look at its own node.
        self._step_lock = threading.RLock()
        self._open_lock = threading.RLock()
        self._stepper: int | None = None
        self._counts = Drops(f"{what} {name!r}", "explain()" if what == "Compute" else "counters")
        self._worker: Worker | None = None
        self._ahead: Any = None

    @staticmethod
    def _check_callables(what: str, **given: Any) -> None:
        for name, value in given.items():
            if value is not None and not callable(value):
                raise ConfigurationError(f"{what}: {name}= is a function of one example, not {type(value).__name__} {value!r}")

    @property
    def counters(self) -> Counter[str]:
        """Messages handled and dropped so far, by what became of them; 0 for what never happened."""
        counts = Counter(self._counts.snapshot())
        counts.update(self._totals())
        return counts

    # --- opening and closing ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._ensure_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except EdgeServeError as exc:
            if error is None:
                raise
            # The block's own error says more than what closing it then met.
            error.add_note(f"closing {self._what} {self._name!r} failed too: {exc}")

    def close(self) -> None:
        """Settles or sends what is due, gives back what was fetched ahead, and lets go of the connection. Idempotent, from any thread."""
        if self._forks != _forks:
            return  # the parent's sockets and claims are the parent's
        if self._closed:
            return
        self._control.closing.set()
        self._control.stop = True
        if self._stepper == threading.get_ident():
            return  # called by the task: the step that it is in ends first
        self._wake()
        # What another thread is about to open has to be there to be closed.
        with self._step_lock, self._open_lock:
            if self._closed:
                return  # another thread was faster
            self._closed = True
            try:
                if self._opened:
                    self._shut()
            finally:
                self._counts.sum_up()
                transport, self._transport = self._transport, None
                if transport is not None:
                    disconnect(transport)
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _ensure_open(self) -> None:
        self._check()
        # A lock of its own: another thread that is in `run()` is no reason to wait.
        with self._open_lock:
            if self._opened:
                return
            transport = connect(self.url)
            try:
                self._transport = transport
                self._open(transport)
            except BaseException:
                self._transport = None
                disconnect(transport)
                raise
            self._opened = True

    def _check(self) -> None:
        if self._forks != _forks:
            raise UsedAfterFork(
                f"{self._what} {self._name!r} was made by process {self._pid} and used by {os.getpid()}: make it where it is used"
            )
        if self._closed:
            raise ClosedError(f"{self._what} {self._name!r} was used after it was closed: make a new one")

    # --- stepping -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        with self._step_lock:
            # A task may step its own node: only the outermost step is the end of what is in hand, and closes.
            outer, self._stepper = self._stepper, threading.get_ident()
            try:
                if self._forks != _forks or self._closed or not self._opened:
                    self._ensure_open()
                return self._next()
            finally:
                self._stepper = outer
                if outer is None and self._control.stop and self._control.closing.is_set():
                    self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        # A step that was cancelled while it waited goes on in its thread; its result belongs to the next call.
        import asyncio

        if self._ahead is None or self._ahead.cancelled():
            if self._worker is None:
                self._worker = Worker(f"edgeserve-{self._name}")
            self._ahead = self._worker.submit(self._next_or_end)
        ended, value = await asyncio.wrap_future(self._ahead)
        self._ahead = None
        if ended:
            raise StopAsyncIteration
        return value

    def _next_or_end(self) -> tuple[bool, Any]:
        try:
            return False, next(self)
        except StopIteration:
            return True, None

    def run(self, until: str | None = None) -> None:
        """Loops until stopped; with `until='end'` until all sources have ended.

        SIGINT and SIGTERM finish the message in hand, settle, and make it return (only in the main thread; the handlers that were there
        before are put back).
        """
        if until not in (None, "end"):
            raise ConfigurationError(f"run(until={until!r}): until is 'end' or None")
        with self._step_lock:
            outer, self._stepper = self._stepper, threading.get_ident()
            try:
                self._ensure_open()
                self._control.stop, self._control.told = self._control.closing.is_set(), False
                with self._signals(), rare_collections():
                    self._run(until)
            finally:
                self._stepper = outer
                self._control.stop = self._control.closing.is_set()
                if outer is None and self._control.stop:
                    self.close()

    def flush(self) -> None:
        """Returns when everything handed over before is durable; raises the error of an earlier send."""
        with self._step_lock:
            self._check()
            if self._opened:
                self._flush()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        control = self._control

        def stop(signum: int, frame: FrameType | None) -> None:
            control.stop = control.told = True
            if control.interruptible:
                control.interruptible = False
                raise Stopped

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    # --- for subclasses -----------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self, transport: Transport) -> None: ...

    @abstractmethod
    def _next(self) -> Any: ...

    @abstractmethod
    def _run(self, until: str | None) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _shut(self) -> None: ...

    @abstractmethod
    def _totals(self) -> dict[str, int]: ...

    @abstractmethod
    def _wake(self) -> None:
        """Makes a step that waits in another thread look whether it was told to stop."""


class StageNode(Node):
    """A node that receives: Compute and Materialize are one each, around the stage that does the work."""

    _stage: Steps
    _payloads: Payloads
    _files: Files | ExternalInputs | None = None
    _logs: tuple[StepLog | None, ...] = ()

    def _open(self, transport: Transport) -> None:
        try:
            for log in self._logs:
                if log is not None:
                    log.open()
            self._payloads.open(transport)
            if self._files is not None:
                self._files.open()
            self._stage.open(transport)
        except BaseException:
            for log in self._logs:
                if log is not None:
                    log.close()
            raise

    def _next(self) -> Any:
        return self._stage.next()

    def _run(self, until: str | None) -> None:
        self._stage.run(until)

    def _flush(self) -> None:
        self._stage.flush()

    def _shut(self) -> None:
        try:
            try:
                if self._files is not None:
                    self._files.close(self._stage.flush)
            finally:
                self._stage.close()
        finally:
            self._payloads.close()
            for log in self._logs:
                if log is not None:
                    log.close()

    def _totals(self) -> dict[str, int]:
        return self._stage.totals() if self._opened else {}

    def _wake(self) -> None:
        self._stage.wake()


def ends_after(node: Node, upstream_over: threading.Event) -> Callable[[], None]:
    """From now on `node.run(until="end")` believes no end before `upstream_over` is set: the nodes that feed it have ended, and all that
    they sent is stored. Returns what wakes the node then."""
    node._control.upstream_over = upstream_over
    return node._wake


__all__ = ("Node", "StageNode", "ends_after")
