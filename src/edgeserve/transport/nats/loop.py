"""One connection and its event loop, in a thread of its own; everybody else calls from other threads.

A client is used for one connection only. When it ends a new one is made, so that what was on its way and not confirmed is known, and is
sent again in order by those whose it is.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from nats import errors
from nats.aio.msg import Msg

from edgeserve.core.errors import ClosedError, TransportError
from edgeserve.transport.broker.trouble import FOR_EVER
from edgeserve.transport.nats.answers import ApiError, Lost, User
from edgeserve.transport.nats.client import Client
from edgeserve.transport.nats.dial import Away, Refused, check_jetstream, dial
from edgeserve.transport.nats.settings import Settings
from edgeserve.transport.nats.tell import Teller

try:
    import uvloop as loops  # a message costs a third less
except ImportError:  # there is none for Windows
    loops = asyncio  # type: ignore[misc]

T = TypeVar("T")
_log = logging.getLogger("edgeserve")
_ANSWER_S = 5.0
_AGAIN_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_SAY_EVERY_S = 5.0
_SAY_AFTER_S = 1.0
_CLOSE_S = 3.0
# "JetStream system temporarily unavailable": a cluster has no leader yet.
_NOT_YET = 10008
_VIOLATION = re.compile(r"permissions violation for (\w+) to \"([^\"]+)\"")


class Connection:
    """See the module.

    Attributes:
        client: the connection, if there is one.
        teller: calls others back.
        users: told about what happens.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.users: set[User] = set()
        self.max_payload = 0
        self.loop: asyncio.AbstractEventLoop = loops.new_event_loop()
        self.teller = Teller()
        self.client: Client | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._trouble: str | None = f"no connection to {settings.where} yet"
        self._away_since = time.monotonic()
        self._closed = False
        self._replies: dict[str, Callable[[Msg | TransportError], None]] = {}
        self._subjects: dict[str, str] = {}
        self._count = 0
        self._inbox = ""
        self._deaf: TransportError | None = None
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._pumped = self._pumping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="edgeserve-nats", daemon=True)
        self._thread.start()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # --- from other threads -------------------------------------------------------------------------------------

    def _start(self) -> None:
        first: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.soon(lambda: self._task(self._keep(first)))
        self.soon(lambda: self._task(self._tick()))
        first.result()

    def soon(self, do: Callable[[], object]) -> None:
        """Has something done in the loop; does nothing after the end."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(do)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts work in the loop; only there."""
        return self._task(work)

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Has work done in the loop and waits for it."""
        if self._closed:
            raise ClosedError(f"the connection to {self.settings.where} is closed")
        future = asyncio.run_coroutine_threadsafe(work(), self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClosedError(f"the connection to {self.settings.where} was closed") from None
        except BaseException:
            future.cancel()
            raise

    def post(self, subject: str, data: bytes) -> None:
        """Sends something that nobody answers, in order, when there is a connection. Any thread; does not wait."""
        self._outbox.append((subject, data))
        if not self._pumped:
            self._pumped = True
            self.soon(self._start_pump)

    def trouble(self) -> str | None:
        """What is wrong, None when nothing is."""
        return self._trouble

    def close(self) -> None:
        """Ends the connection and its thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with suppress(RuntimeError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(3 * _CLOSE_S)
        self.soon(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)
        self.teller.close(_CLOSE_S)

    async def sent(self) -> None:
        """Returns when what was posted before is with the server, or after a while when it does not say so."""
        with suppress(errors.Error, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_S):
                await self._idle.wait()
                client = self.client
                if client is not None:
                    await client.flush(int(_CLOSE_S))

    async def settled(self, reply: str) -> None:
        """Returns when a consumer has taken in the acknowledgements that were posted before, the last of them to `reply`."""
        await self.sent()
        client = self.client
        if client is not None:
            with suppress(TransportError, TimeoutError, errors.Error):
                await self._ask(client, reply, b"+ACK", 1.0)

    # --- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("the connection to %s: %r", self.settings.where, task.exception())

    async def _end(self) -> None:
        client = self.client
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await self.sent()
        mine = asyncio.current_task()
        others = [task for task in self._tasks if task is not mine and not task.done()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await client.close()
        # What the client has started for itself.
        rest = [task for task in asyncio.all_tasks() if task is not mine]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _keep(self, first: concurrent.futures.Future[None]) -> None:
        """Connects, waits for the end of the connection, connects again."""
        tries, said = 0, 0.0
        while True:
            ended = asyncio.Event()
            try:
                client = await dial(self.settings, ended.set, self._on_error)
                await self._greet(client)
            except (Refused, Away) as exc:
                self._trouble = str(exc)
                waited = time.monotonic() - self._away_since
                deadline_s = self.settings.deadline_s
                if not first.done() and (isinstance(exc, Refused) or (deadline_s is not None and waited > deadline_s)):
                    first.set_exception(exc if isinstance(exc, Refused) else TransportError(f"{exc} (deadline_s={deadline_s:g})"))
                    return
                now = time.monotonic()
                if not first.done() and waited >= _SAY_AFTER_S and now - said >= _SAY_EVERY_S:
                    limit = "" if said or deadline_s is not None else FOR_EVER
                    said = now
                    _log.warning("NATS has been away for %.0f s, waiting%s: %s", waited, limit, exc)
                await asyncio.sleep(_AGAIN_S[min(tries, len(_AGAIN_S) - 1)])
                tries += 1
                continue
            if said:
                _log.warning("NATS is back after %.0f s", time.monotonic() - self._away_since)
            tries, said = 0, 0.0
            self.client, self._trouble = client, None
            if not first.done():
                first.set_result(None)
            for user in list(self.users):
                self._safely(user.up)
            if client.is_connected:
                await ended.wait()
            self.client = None
            self._away_since = time.monotonic()
            self._trouble = f"the connection to {self.settings.where} ended" + (f": {client.last_error}" if client.last_error else "")
            replies, self._replies, self._subjects = self._replies, {}, {}
            for reply in replies.values():
                reply(Lost("the connection ended"))

    async def _greet(self, client: Client) -> None:
        """What a new connection needs before it is used."""
        try:
            self._inbox, self._deaf = f"{client.new_inbox()}.", None
            await client.subscribe(f"{self._inbox}*", cb=self._on_reply)
            self.max_payload = client.max_payload
            await check_jetstream(lambda subject, data: self._ask(client, subject, data), self.settings.where)
            if self._deaf is not None:
                raise Refused(f"{self._deaf}; without subscriptions below _INBOX. it hears no answer")
        except BaseException as exc:
            with suppress(Exception):
                await client.close()
            if isinstance(exc, (Refused, asyncio.CancelledError)):
                raise
            raise Away(f"the connection to {self.settings.where} ended: {exc}") from exc

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            away_s = 0.0 if self.client is not None else time.monotonic() - self._away_since
            for user in list(self.users):
                self._safely(partial(user.tick, away_s))

    def _safely(self, tell: Callable[[], None]) -> None:
        """Others, and the connection itself, hang on who tells it."""
        try:
            tell()
        except Exception:
            _log.exception("the connection to %s", self.settings.where)

    def _start_pump(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._idle.clear()
            self._task(self._pump())

    async def _pump(self) -> None:
        outbox = self._outbox
        while outbox:
            client = await self.up(patient=True)
            try:
                while outbox:
                    client.send(*outbox[0])
                    outbox.popleft()
            except Exception:
                await asyncio.sleep(0.02)  # the connection ends
            self._pumped = False  # who adds something from now on says so
        self._pumping = False
        self._idle.set()

    def _on_error(self, exc: Exception) -> None:
        found = _VIOLATION.search(str(exc))
        if found is None:
            return
        subject = found[2]
        verb = "subscribe" if found[1] == "subscription" else "publish"
        error = TransportError(f"the NATS server at {self.settings.where} does not permit this user to {verb} to {subject!r}")
        mine = found[1] == "subscription" and self._inbox.lower().startswith(subject.rstrip("*>"))
        if mine:
            self._deaf = error
        for token in [t for t, s in self._subjects.items() if mine or s == subject]:
            self._subjects.pop(token)
            reply = self._replies.pop(token, None)
            if reply is not None:
                reply(error)
        for user in list(self.users):
            user.forbidden(subject, error)

    async def _on_reply(self, message: Msg) -> None:
        token = message.subject[len(self._inbox) :]
        self._subjects.pop(token, None)
        reply = self._replies.pop(token, None)
        if reply is not None:
            reply(message)

    # --- in the loop --------------------------------------------------------------------------------------------

    async def up(self, *, patient: bool = False) -> Client:
        """The connection; waits for one. `patient`: whatever the deadline."""
        while True:
            client = self.client
            if client is not None and client.is_connected:
                return client
            self.check_deadline(patient)
            await asyncio.sleep(0.02)

    def check_deadline(self, patient: bool = False) -> None:
        """Raises when the server has been away for longer than the user wants to wait."""
        deadline_s = self.settings.deadline_s
        away_s = time.monotonic() - self._away_since
        if not patient and deadline_s is not None and self.client is None and away_s > deadline_s:
            raise TransportError(
                f"the NATS server at {self.settings.where} has been away for {away_s:.0f} s (deadline_s=): {self._trouble}"
            )

    def expect(self, subject: str, reply: Callable[[Msg | TransportError], None]) -> tuple[str, str]:
        """(token, reply subject) for something that is published to `subject` and answered."""
        self._count += 1
        token = f"{self._count:x}"
        self._replies[token] = reply
        self._subjects[token] = subject.lower()
        return token, self._inbox + token

    def forget(self, token: str) -> None:
        """An answer is not waited for any more."""
        self._replies.pop(token, None)
        self._subjects.pop(token, None)

    async def _ask(self, client: Client, subject: str, data: bytes, patience_s: float = _ANSWER_S) -> Msg:
        answer: asyncio.Future[Msg] = self.loop.create_future()

        def take(reply: Msg | TransportError) -> None:
            if answer.done():
                return
            if isinstance(reply, TransportError):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)

        token, inbox = self.expect(subject, take)
        try:
            client.send(subject, data, inbox)
            async with asyncio.timeout(patience_s):
                return await answer
        finally:
            self.forget(token)
            if answer.done() and not answer.cancelled():
                answer.exception()

    async def request(self, subject: str, data: bytes = b"") -> Msg:
        """Asks, again after a new connection if need be: only what may be asked twice."""
        begun = time.monotonic()
        while True:
            client = await self.up()
            try:
                reply = await self._ask(client, subject, data)
                self._trouble = None if self.client is client else self._trouble
                return reply
            except TimeoutError:
                self._complain(f"the NATS server at {self.settings.where} does not answer {subject!r}", begun)
            except Lost:
                continue
            except TransportError:
                raise
            except Exception:
                if client.is_connected:
                    raise

    def _complain(self, trouble: str, begun: float) -> None:
        self._trouble = trouble
        deadline_s = self.settings.deadline_s
        if deadline_s is not None and time.monotonic() - begun > deadline_s:
            raise TransportError(f"{trouble} (deadline_s={deadline_s:g})")

    async def api(self, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Asks JetStream; raises `ApiError`."""
        begun = time.monotonic()
        while True:
            reply = await self.request(f"$JS.API.{subject}", msgspec.json.encode(body) if body is not None else b"")
            if not reply.headers or reply.headers.get("Status") != "503":
                answer: dict[str, Any] = msgspec.json.decode(reply.data)
                error = answer.get("error")
                if error is None:
                    return answer
                exc = ApiError(subject, error)
                if exc.err_code != _NOT_YET:
                    raise exc
            self._complain(f"JetStream does not answer on {self.settings.where}", begun)
            await asyncio.sleep(0.2)


__all__ = ("Connection",)
