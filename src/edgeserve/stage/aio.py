"""Where synchronous nodes meet `async` code: coroutines run to their end, async iterables read one by one, a daemon thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


class Worker:
    """One daemon thread that calls what it is given, in order. Daemon, so that a forgotten `close()` never holds up an exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Calls `call` in the thread, which starts with the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Ends the thread after the calls that it has."""
        if self._thread is not None:
            self._calls.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as exc:
                future.set_exception(exc)
            del future, call, entry


class Coroutines:
    """Runs coroutines on an event loop of its own; beside a running loop (a notebook) on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._runner: asyncio.Runner | None = None
        self._beside: Worker | None = None
        self._beside_runner: asyncio.Runner | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` to its end and returns its result."""
        context = contextvars.copy_context()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if self._runner is None:
                self._runner = asyncio.Runner()
            return self._runner.run(coroutine, context=context)
        if self._beside is None or self._beside_runner is None:
            self._beside, self._beside_runner = Worker(f"{self._name}-async"), asyncio.Runner()
        runner = self._beside_runner
        return self._beside.submit(lambda: runner.run(coroutine, context=context)).result()

    def close(self) -> None:
        """Closes the loops and the thread. Idempotent."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        if self._beside is not None and self._beside_runner is not None:
            self._beside.submit(self._beside_runner.close).result()
            self._beside.close()
            self._beside = self._beside_runner = None


class Synchronous(Iterator[T]):
    """The items of an async iterable, one at a time, for a caller that is not async.

    Attributes:
        kept: an item that the stream has given while a signal ended the call: the next one returns it.
    """

    def __init__(self, stream: AsyncIterable[T], coroutines: Coroutines) -> None:
        self._stream, self._coroutines = aiter(stream), coroutines
        self.kept: list[T] = []

    def __next__(self) -> T:
        if not self.kept:
            self._coroutines.run(self._take())
        if not self.kept:
            raise StopIteration
        return self.kept.pop()

    async def _take(self) -> None:
        with contextlib.suppress(StopAsyncIteration):
            self.kept.append(await self._stream.__anext__())


class InOneTask(Iterator[T]):
    """The items of an async generator, one at a time, for a caller that is not async. All of it runs in one task, as under `async for`: so
    its timeouts and context variables hold from item to item. Between items it stands still."""

    def __init__(self, stream: AsyncGenerator[T, None], coroutines: Coroutines) -> None:
        self._stream, self._coroutines = stream, coroutines
        self._wanted, self._made = asyncio.Semaphore(0), asyncio.Queue[Any]()
        self._task: asyncio.Task[None] | None = None

    def __next__(self) -> T:
        item: T = self._coroutines.run(self._take())
        if item is _END:
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends the generator where it stands. Idempotent."""
        if self._task is not None and not self._task.done():
            self._coroutines.run(self._cancel(self._task))

    async def _take(self) -> Any:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._wanted.release()
        item = await self._made.get()
        if item is _END:
            await self._task
        return item

    async def _run(self) -> None:
        try:
            async with contextlib.aclosing(self._stream) as items:
                await self._wanted.acquire()
                async for item in items:
                    self._made.put_nowait(item)
                    del item
                    await self._wanted.acquire()
        finally:
            self._made.put_nowait(_END)

    async def _cancel(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _collect(stream: AsyncIterable[T]) -> list[T]:
    return [item async for item in stream]


def collect(stream: AsyncIterable[T], coroutines: Coroutines) -> list[T]:
    """All items of an async iterable."""
    return coroutines.run(_collect(stream))


__all__ = ("Coroutines", "InOneTask", "Synchronous", "Worker", "collect")
