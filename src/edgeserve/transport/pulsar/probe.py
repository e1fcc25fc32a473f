"""What a broker says to us first: why it does not want us, and how large a message may be. The client tells neither, and tries for ever
again whatever the reason is, so the first words of the protocol are said here.

The binary protocol's CONNECT command and its answer, as https://pulsar.apache.org/docs/developing-binary-protocol/ states them.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import NamedTuple

from edgeserve.transport.pulsar.settings import Settings

_TIMEOUT_S = 3.0
_MOST_BYTES = 1 << 20
_CONNECT, _CONNECTED, _ERROR = 2, 3, 14
_PROTOCOL = 19
_MAX_MESSAGE_SIZE = 3


class Greeting(NamedTuple):
    """`refusal`: why the broker refuses this client, None when it takes it, or when nobody answers at all. `most_bytes`: how large a
    message may be, None when that is not known. `taken`: whether it takes it."""

    refusal: str | None = None
    most_bytes: int | None = None
    taken: bool = False


_UNKNOWN = Greeting()


def silence(settings: Settings) -> str:
    """Which of the brokers' ports does not answer, and why; "" where one does."""
    reason = ""
    for host, port in settings.addresses:
        try:
            socket.create_connection((host, port), _TIMEOUT_S).close()
        except OSError as exc:
            reason = f"{host}:{port}: {exc.strerror or exc}"
        else:
            return ""
    return reason


def greet(settings: Settings) -> Greeting:
    """Says hello to the first of the brokers that answers."""
    for host, port in settings.addresses:
        try:
            with socket.create_connection((host, port), _TIMEOUT_S) as raw:
                return _greet_secured(raw, host, settings) if settings.tls else _greet(raw, settings)
        except OSError:
            continue
    return _UNKNOWN


def _greet_secured(raw: socket.socket, host: str, settings: Settings) -> Greeting:
    context = settings.tls_context()
    assert context is not None
    try:
        secured = context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLError as exc:
        return Greeting(
            f"its certificate is refused, or it speaks no TLS on this port ({exc}): name the certificate's authority by tls_ca= "
            f"(trusted now: those in {settings.ca_file})"
        )
    with secured:
        return _greet(secured, settings)


def _greet(connection: socket.socket, settings: Settings) -> Greeting:
    if settings.oauth2 is not None:
        return _UNKNOWN
    method, data = ("token", settings.token) if settings.token else ("tls", "") if settings.tls_cert else ("", "")
    connect = _bytes(1, b"edgeserve") + _number(4, _PROTOCOL)
    if method:
        connect += _bytes(3, (data or "").encode()) + _bytes(5, method.encode())
    command = _number(1, _CONNECT) + _bytes(2, connect)
    try:
        connection.sendall(struct.pack(">II", len(command) + 4, len(command)) + command)
        size = _exactly(connection, 8)
        total, length = struct.unpack(">II", size) if len(size) == 8 else (0, 0)
        if not 0 < length <= total - 4 < _MOST_BYTES:
            return Greeting("what answers there is no Pulsar broker, or expects TLS: use pulsar+ssl://") if size else _UNKNOWN
        answer = _fields(_exactly(connection, length))
        return _read(answer)
    except TimeoutError:
        return _UNKNOWN
    except (ValueError, IndexError):
        return Greeting("what answers there is no Pulsar broker")


def _read(answer: dict[int, int | bytes]) -> Greeting:
    if answer.get(1) == _CONNECTED:
        connected = answer.get(_CONNECTED)
        most = _fields(connected).get(_MAX_MESSAGE_SIZE) if isinstance(connected, bytes) else None
        return Greeting(most_bytes=most if isinstance(most, int) and most > 0 else None, taken=True)
    if answer.get(1) == _ERROR and isinstance(error := answer.get(_ERROR), bytes):
        message = _fields(error).get(3)
        text = message.decode(errors="replace") if isinstance(message, bytes) else "no reason given"
        return Greeting(f"it does not know this client ({text}): see token=, token_file=, tls_cert=, oauth2=")
    return Greeting("what answers there is no Pulsar broker")


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes, fewer only at the connection's end."""
    found = b""
    while len(found) < count and (some := connection.recv(count - len(found))):
        found += some
    return found


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes) -> dict[int, int | bytes]:
    """The fields of a protobuf message, numbers and byte strings; raises when it is none."""
    found: dict[int, int | bytes] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number without end")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            found[tag >> 3] = varint()
        elif tag & 7 == 2:
            size = varint()
            if at + size > len(data):
                raise ValueError("a string without end")
            found[tag >> 3] = data[at : at + size]
            at += size
        else:
            raise ValueError("no field of this protocol")
    return found


__all__ = ("Greeting", "greet", "silence")
