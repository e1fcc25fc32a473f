"""The client of one connection: nats-py's, with short cuts for what each message costs, and an end that is always told."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from nats import errors
from nats.aio import client as aio
from nats.aio.msg import Msg

_CLOSE_S = 3.0
_GIVEN = b"$JS.ACK."
HEAD = "NATS/1.0\r\n"


class Client(aio.Client):
    """Gives its credentials to nobody but a server that speaks TLS, where TLS was asked for.

    What is subscribed to is handed to its callback as it is read, without a queue and a task in between: a callback does not wait.
    """

    def send(self, subject: str, data: bytes, reply: str = "", head: bytes = b"") -> None:
        """`publish` as a plain function; in the loop only. `head`: the headers as they travel, `HEAD` first. What is sent is bounded by who
        waits for answers.
        """
        if not self.is_connected:
            raise errors.ConnectionClosedError
        if len(data) > self.max_payload:
            raise errors.MaxPayloadError
        size = len(head) + len(data)
        line = f"HPUB {subject} {reply} {len(head)} {size}\r\n" if head else f"PUB {subject} {reply} {size}\r\n"
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._write)
        self._pending.append(b"".join((line.encode(), head, data, b"\r\n")))

    def _write(self) -> None:
        """Writes what is pending; where the connection is gone its end is noticed by who reads."""
        if self._pending and self._transport is not None and self.is_connected:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            with suppress(OSError, RuntimeError):
                self._transport.writelines(pending)

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        self._write()  # its answer says that all before it has arrived
        await super()._send_ping(future)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        found = self._subs.get(sid)
        if found is None or found._cb is None:
            return
        # What a consumer is given bears its sender's headers, which say nothing to who takes it.
        known = await self._process_headers(headers) if headers and not reply.startswith(_GIVEN) else None
        try:
            await found._cb(Msg(self, subject.decode(), reply.decode(), data, known))
        except Exception as exc:
            await self._error_cb(exc)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and "tls" in self.options and not info.get("tls_required") and not self.options["tls_handshake_first"]:
            raise errors.Error("the server does not ask for TLS")
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        # What is left cannot be written any more. To try that, as the client does when it closes, raises with uvloop, and nobody would hear
        # that the connection has ended.
        self._pending, self._pending_data_size = [], 0
        with suppress(Exception):
            async with asyncio.timeout(_CLOSE_S):
                await super()._process_op_err(e)
        if self._closed_cb is not None:
            await self._closed_cb()


__all__ = ("HEAD", "Client")
