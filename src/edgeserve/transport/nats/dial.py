"""One try to reach a server: what it says of itself, whether it can be used, and if not, why, by name."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
from nats import errors

from edgeserve.core.errors import TransportError
from edgeserve.transport.nats.client import Client
from edgeserve.transport.nats.greeting import ANSWER_S, Away, Refused, greeting
from edgeserve.transport.nats.settings import Settings

_PING_S = 5
_HANG_UP_S = 0.5
_OLDEST = (2, 10)
_PENDING_BYTES = 64 << 20


def _check(settings: Settings, host: str, port: int, info: dict[str, Any]) -> None:
    """Refuses what is known before anything secret is said."""
    where = f"the NATS server at {host}:{port}"
    version = str(info.get("version", "0"))
    if tuple(int(n) for n in version.partition("-")[0].split(".")[:2] if n.isdigit()) < _OLDEST:
        raise Refused(f"{where} is version {version}; JetStream as it is used here needs {'.'.join(map(str, _OLDEST))} or newer")
    if settings.tls is None and info.get("tls_required"):
        raise Refused(f"{where} asks for TLS: use nats+tls://")
    if settings.tls is not None and not info.get("tls_required"):
        raise Refused(f"{where} does not speak TLS: nothing secret was sent; use nats://, or give the server a certificate")
    if info.get("auth_required") and not settings.options:
        raise Refused(
            f"{where} asks for credentials and none are given: token=, user:password@, creds= or nkey= in the URL, or EDGESERVE_NATS_*"
        )


async def dial(settings: Settings, closed: Callable[[], None], trouble: Callable[[Exception], None]) -> Client:
    """Connects to the first server that can be used.

    Raises:
        Refused: one answered, and it is no use to wait.
        Away: none answered.
    """
    last: Exception = Away(f"no NATS server answers at {settings.where}")
    for (host, port), server in zip(settings.hosts, settings.servers, strict=True):
        try:
            if not settings.tls_first:
                _check(settings, host, port, await greeting(host, port))
            return await _connect(settings, host, port, server, closed, trouble)
        except (Refused, Away) as exc:
            last = exc if not isinstance(last, Refused) else last
    raise last


async def _connect(
    settings: Settings, host: str, port: int, server: str, closed: Callable[[], None], trouble: Callable[[Exception], None]
) -> Client:
    client, seen = Client(), deque[Exception](maxlen=1)

    async def on_error(exc: Exception) -> None:
        seen.append(exc)
        trouble(exc)

    async def on_closed() -> None:
        closed()

    where = f"the NATS server at {host}:{port}"
    try:
        await client.connect(
            servers=[server],
            name="edgeserve",
            error_cb=on_error,
            closed_cb=on_closed,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=int(ANSWER_S),
            ping_interval=_PING_S,
            max_outstanding_pings=2,
            pending_size=_PENDING_BYTES,
            tls=settings.tls,
            tls_handshake_first=settings.tls_first,
            **settings.options,
        )
        if not client.is_connected:
            raise Away(f"{where} closed the connection during the login" + (f": {seen[-1]}" if seen else ""))
        if settings.tls is not None:
            # The client upgrades the connection under asyncio's feet, which logs a complaint at its end unless it is told.
            with suppress(AttributeError):
                client._transport._io_writer.transport.get_protocol()._over_ssl = True  # type: ignore[union-attr]
        return client
    except ssl.SSLCertVerificationError as exc:
        raise await _hang_up(
            client, Refused(f"the certificate of {where} is not good: {exc.verify_message}. tls_ca= names the CA's file")
        ) from exc
    except ssl.SSLError as exc:
        raise await _hang_up(
            client, Refused(f"TLS with {where} failed ({exc.reason or exc}): does it ask for a certificate (tls_cert=, tls_key=)?")
        ) from exc
    except errors.NoServersError:
        raise await _hang_up(client, Away(f"{where} does not answer: {seen[-1] if seen else 'no reason given'}")) from None
    except (OSError, TimeoutError, errors.TimeoutError) as exc:
        raise await _hang_up(
            client, exc if isinstance(exc, Away) else Away(f"{where} does not answer: {exc or type(exc).__name__}")
        ) from exc
    except Exception as exc:
        text = str(exc).removeprefix("nats: ").strip("'")
        if "authoriz" in text.lower() or "authent" in text.lower():
            kind = ", ".join(name for name in settings.options if name != "user") or "no credentials"
            names = {"user_credentials": "the credentials file", "nkeys_seed": "the nkey", "token": "the token", "password": "the password"}
            raise await _hang_up(client, Refused(f"{where} does not accept {names.get(kind, kind)}: {text}")) from None
        raise await _hang_up(client, Refused(f"{where} cannot be used: {text or type(exc).__name__}")) from exc


async def _hang_up(client: Client, exc: Exception) -> Exception:
    # Closing waits for the other side to close, which it does not do after a handshake that failed.
    with suppress(Exception):
        async with asyncio.timeout(_HANG_UP_S):
            await client._close(Client.CLOSED, False)
    return exc


async def check_jetstream(ask: Callable[[str, bytes], Awaitable[Any]], where: str) -> None:
    """Refuses a server or an account without JetStream."""
    try:
        reply = await ask("$JS.API.INFO", b"")
    except (TransportError, TimeoutError):
        return  # this user may not ask: what is not there shows later
    if reply.headers and reply.headers.get("Status") == "503":
        raise Refused(f"JetStream is not enabled on {where}: start nats-server with -js, or `jetstream {{}}` in its configuration")
    error = msgspec.json.decode(reply.data).get("error")
    if error and error.get("err_code") in (10039, 10076):
        raise Refused(f"JetStream is not enabled for this account on {where}: {error.get('description')}")


__all__ = ("Away", "Refused", "check_jetstream", "dial")
