"""The client of one connection: nats-py's, with short cuts for what each message costs, and an end that is always told."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from nats import errors
from nats.aio import client as aio
from nats.aio.msg import Msg

_log = logging.getLogger("edgeserve")

_CLOSE_S = 3.0
_MOST_UNWRITTEN = 8 << 20
_GIVEN = b"$JS.ACK."
HEAD = "NATS/1.0\r\n"


class Client(aio.Client):
    """Gives its credentials to nobody but a server that speaks TLS, where TLS was asked for.

    What is subscribed to is handed to its callback as it is read, without a queue and a task in between: a callback does not wait. However
    the connection ends, and whatever goes wrong while it is closed, its owner is told.
    """

    @property
    def _wire(self) -> asyncio.WriteTransport | None:
        writer = getattr(self._transport, "_io_writer", None)
        return None if writer is None else writer.transport

    @property
    def unwritten(self) -> int:
        """How many bytes the network has not taken yet, about."""
        wire = self._wire
        return self._pending_data_size + (0 if wire is None else wire.get_write_buffer_size())

    @property
    def is_full(self) -> bool:
        """Whether what is sent would wait for long: who has much to send waits until it is not."""
        return self.unwritten > _MOST_UNWRITTEN

    def send(self, subject: str, data: bytes, reply: str = "", head: bytes = b"") -> None:
        """`publish` as a plain function; in the loop only. `head`: the headers as they travel, `HEAD` first."""
        if not self.is_connected:
            raise errors.ConnectionClosedError
        if len(data) > self.max_payload:
            raise errors.MaxPayloadError
        size = len(head) + len(data)
        line = f"HPUB {subject} {reply} {len(head)} {size}\r\n" if head else f"PUB {subject} {reply} {size}\r\n"
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._write)
        self._pending.append(b"".join((line.encode(), head, data, b"\r\n")))
        self._pending_data_size += size

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
        try:
            # What a consumer is given bears its sender's headers, which say nothing to who takes it.
            known = await self._process_headers(headers) if headers and not reply.startswith(_GIVEN) else None
            await found._cb(Msg(self, subject.decode(), reply.decode(), data, known))
        except Exception:
            _log.exception("a message on %r could not be taken", subject)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()  # who waited for it has given up
        await super()._process_pong()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and "tls" in self.options and not info.get("tls_required") and not self.options["tls_handshake_first"]:
            raise errors.Error("the server does not ask for TLS")
        await super()._process_info(info, initial_connection)

    # --- the end ------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        await super()._read_loop()
        if self.is_connected:  # it has met what it did not expect, and nobody reads any more
            await self._process_op_err(errors.UnexpectedEOF())

    async def _process_op_err(self, e: Exception) -> None:
        wire = self._wire
        if wire is not None:
            wire.abort()  # what it still had is sent over the next connection
        await super()._process_op_err(e)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # What cannot be written any more is dropped: to try that, as the client does, raises with uvloop, and nobody would be told.
        self._write()
        self._pending, self._pending_data_size = [], 0
        try:
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await super()._close(status, do_cbs)
        finally:
            if self._closed_cb is not None:
                await self._closed_cb()


__all__ = ("HEAD", "Client")
