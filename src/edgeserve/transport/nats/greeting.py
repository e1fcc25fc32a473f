"""What a NATS server says of itself to everyone, before anything is said to it. It takes no client, which is an extra."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import suppress
from typing import Any

import msgspec

from edgeserve.core.errors import TransportError

ANSWER_S = 5.0
_SILENT_S = 1.0


class Refused(TransportError):
    """The server is there and cannot be used as it is asked: waiting does not help."""


class Away(TransportError):
    """There is no server to talk to now."""


async def greeting(host: str, port: int) -> dict[str, Any]:
    """What a server says first.

    Raises:
        Refused: what answers is no NATS server.
        Away: nobody answers.
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    except (OSError, TimeoutError) as exc:
        raise Away(f"no NATS server answers at {host}:{port}: {exc or 'no answer'}") from None
    begun = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_S):
            line = await reader.readline()
        # Who waits for the other to begin closes late; a server that stops, or a proxy before one that is not there, at once.
        if not line and time.monotonic() - begun < _SILENT_S:
            raise Away(f"{host}:{port} closed the connection")
        if not line.startswith(b"INFO "):
            raise ValueError
        info: dict[str, Any] = msgspec.json.decode(line[5:])
        return info
    except (TimeoutError, ValueError, msgspec.DecodeError):
        raise Refused(
            f"what answers at {host}:{port} is no NATS server: its first line is not the INFO of one. Is it the port for clients (4222)? "
            "One that begins with TLS needs nats+tls:// and tls_first=1"
        ) from None
    except OSError as exc:
        raise Away(f"no NATS server answers at {host}:{port}: {exc}") from None
    finally:
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


__all__ = ("ANSWER_S", "Away", "Refused", "greeting")
