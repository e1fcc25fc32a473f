"""Why a broker does not want us. The client tries for ever again whatever the reason is, so the first words of the protocol are said here.

The binary protocol's CONNECT command and its answer, as https://pulsar.apache.org/docs/developing-binary-protocol/ states them.
"""

from __future__ import annotations

import socket
import ssl
import struct

from edgeserve.transport.pulsar.settings import Settings

_TIMEOUT_S = 3.0
_MOST_BYTES = 1 << 20
_CONNECT, _CONNECTED, _ERROR = 2, 3, 14
_PROTOCOL = 19


def refusal(settings: Settings) -> str | None:
    """Why the broker refuses this client; None when it takes it, or when nobody answers at all."""
    host, _, port = settings.service.partition("://")[2].partition(",")[0].rpartition(":")
    if not host:
        host, port = port, ""
    try:
        with socket.create_connection((host, int(port or (6651 if settings.tls else 6650))), _TIMEOUT_S) as raw:
            if not settings.tls:
                return _greet(raw, settings)
            context = settings.tls_context()
            assert context is not None
            try:
                secured = context.wrap_socket(raw, server_hostname=host)
            except ssl.SSLError as exc:
                return f"its certificate is refused, or it speaks no TLS on this port ({exc}): name the certificate's authority by tls_ca="
            with secured:
                return _greet(secured, settings)
    except OSError:
        return None


def _greet(connection: socket.socket, settings: Settings) -> str | None:
    if settings.oauth2 is not None:
        return None
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
            return None if not size else "what answers there is no Pulsar broker, or expects TLS: use pulsar+ssl://"
        answer = _fields(_exactly(connection, length))
    except TimeoutError:
        return None
    except (ValueError, IndexError):
        return "what answers there is no Pulsar broker"
    if answer.get(1) == _CONNECTED:
        return None
    if answer.get(1) == _ERROR and isinstance(error := answer.get(_ERROR), bytes):
        message = _fields(error).get(3)
        text = message.decode(errors="replace") if isinstance(message, bytes) else "no reason given"
        return f"it does not know this client ({text}): see token=, token_file=, tls_cert=, oauth2="
    return "what answers there is no Pulsar broker"


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


__all__ = ("refusal",)
