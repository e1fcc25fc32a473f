"""What lies between two machines: bytes are sent from one to the other, which only says that they have come."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import NoReturn

from edgeserve.cli.output import CommandError

_HELLO = b"edgeserve link 1\n"
"""The last figure is the version of what follows."""

_SECRET_BYTES, _CHUNK_BYTES, _MOST_BYTES = 32, 2**16, 2**28
KNOWN_S, _MOST_S, _LONG_S = 5.0, 60.0, 0.5
"""How long a peer has to show that it knows the token, how long it is served then, and what the transfer that counts takes at least."""

_PINGS = 20
_SIZE = struct.Struct("!Q")
_YES, _NO = b"1", b"0"

Address = tuple[str, int]


def listen(address: Address, token: str, ready: Callable[[Address], None]) -> NoReturn:
    """Answers `measure`, one peer at a time, until the process ends. `ready` is told where.

    A peer has to know the token, which never travels; it can make this process read bytes and drop them, at most 256 MiB a time and for a
    minute, and nothing else.
    """
    with socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as listener:
        ready(listener.getsockname()[:2])
        while True:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError, _Ended):
                _answer(_Peer(peer, KNOWN_S), token.encode())


def measure(address: Address, token: str) -> tuple[float, float]:
    """Bytes per second to the machine that listens there, and the milliseconds of half the least round trip.

    Raises:
        CommandError: nobody listens there, or does not answer in time, or has another token.
    """
    where = f"{address[0]}:{address[1]}"
    try:
        with socket.create_connection(address, timeout=KNOWN_S) as connected:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = _Peer(connected, _MOST_S)
            if (hello := peer.read(len(_HELLO))) != _HELLO:
                raise CommandError(f"it says {hello!r}, and not {_HELLO!r}", where, "start the same version of edgeserve there")
            peer.send(proof(token.encode(), peer.read(_SECRET_BYTES)))
            if peer.read(1) != _YES:
                raise CommandError("it has another token", where, "give both the same EDGESERVE_PROFILE_TOKEN")
            round_trip_s = min(peer.took(0) for _ in range(_PINGS))
            size = _CHUNK_BYTES
            while (took_s := peer.took(size)) < _LONG_S and size < _MOST_BYTES:
                size *= 2
            return size / max(took_s - round_trip_s, 1e-9), round_trip_s * 500
    except _Ended:
        raise CommandError("it has ended the connection", where, "see what it says there, and try again") from None
    except OSError as exc:
        to_do = "start edgeserve profile --listen HOST:PORT there, and let the port through"
        raise CommandError(f"no answer: {exc}", where, to_do) from exc


def _answer(peer: _Peer, token: bytes) -> None:
    secret = secrets.token_bytes(_SECRET_BYTES)
    peer.send(_HELLO + secret)
    known = hmac.compare_digest(peer.read(_SECRET_BYTES), proof(token, secret))
    peer.send(_YES if known else _NO)
    if known:
        peer.ends_at = time.monotonic() + _MOST_S
        while (size := _SIZE.unpack(peer.read(_SIZE.size))[0]) <= _MOST_BYTES:
            peer.drop(size)
            peer.send(_YES)


def proof(token: bytes, secret: bytes) -> bytes:
    """What only who knows the token can make of a secret."""
    return hmac.digest(token, secret, "sha256")


class _Ended(Exception):
    """The other side has closed the connection."""


class _Peer:
    """A connection that is over at a time, whatever the other side does."""

    def __init__(self, connected: socket.socket, seconds: float) -> None:
        self._socket, self.ends_at = connected, time.monotonic() + seconds
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))

    def send(self, data: bytes | memoryview) -> None:
        self._hurry()
        self._socket.sendall(data)

    def read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            got += bytes(self._buffer[: self._take(size - len(got))])
        return got

    def drop(self, size: int) -> None:
        while size:
            size -= self._take(min(size, _CHUNK_BYTES))

    def took(self, size: int) -> float:
        """Seconds until so many bytes have come to the other side, and its word for it has come back."""
        begun = time.perf_counter()
        self.send(_SIZE.pack(size))
        for _ in range(size // _CHUNK_BYTES):
            self.send(self._buffer)
        if self.read(1) != _YES:
            raise _Ended
        return time.perf_counter() - begun

    def _take(self, most: int) -> int:
        self._hurry()
        if not (count := self._socket.recv_into(self._buffer, most)):
            raise _Ended
        return count

    def _hurry(self) -> None:
        if (left := self.ends_at - time.monotonic()) <= 0:
            raise TimeoutError("it took too long")
        self._socket.settimeout(left)


__all__ = ("KNOWN_S", "Address", "listen", "measure", "proof")
