"""Payloads from other hosts: over connections that are kept, into memory that is there, resumed where they broke."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal

import msgspec
from xxhash import xxh3_64

from edgeserve.core.errors import ClosedError, ConfigurationError, CorruptMessage, FetchError, PayloadGone
from edgeserve.payload._http import GONE, TOKEN, Head, Malformed, end, left_of, read_head, shut
from edgeserve.payload.origins import Origins
from edgeserve.payload.reference import Reference

_PAUSE_S = (0.01, 0.5)
_AT_A_TIME_BYTES = 512 << 10
# A connection on which nothing comes for this part of the time there is may be one to a host that is gone.
_STALL_PART = 4
# The server ends one that is idle for 30 s.
_KEPT_S, _MOST_KEPT = 20.0, 8

_ORIGIN = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")
_PASSING = (408, 429, 500, 502, 503, 504)


class Origin(msgspec.Struct, frozen=True):
    """Where a server of payloads listens."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Reads `http://host:port` or `https://host:port`; nothing else is one. Raises `FetchError`."""
        found = _ORIGIN.fullmatch(url)
        if found is None or not 0 < int(found[3]) < 65536:
            raise FetchError(f"a payload's origin is no http://host:port or https://host:port: {url[:100]!a}")
        return cls("https" if found[1] == "https" else "http", found[2].strip("[]"), int(found[3]))

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def _trusting(cafile: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=cafile)
    except OSError as exc:
        raise ConfigurationError(f"cafile={cafile!r} cannot be read as certificates in PEM: {exc}") from exc


class Connections:
    """To all origins; those that are not in use are kept for a while. Thread-safe.

    Args:
        cafile: whose certificates are trusted, a file in PEM; None: the system's.
        origins: which are allowed; None: all.

    Raises:
        ConfigurationError: the file cannot be read.
    """

    def __init__(self, cafile: str | None = None, origins: Origins | None = None) -> None:
        self._lock = threading.Lock()
        self._origins = origins
        # The system's are read when they are wanted.
        self._tls = None if cafile is None else _trusting(cafile)
        self._kept: dict[Origin, list[tuple[float, socket.socket]]] = {}
        self._open: set[socket.socket] = set()
        self.closed = False
        _all.add(self)

    def take(self, origin: Origin) -> socket.socket | None:
        """One that was kept: the one used last. None: there is none."""
        with self._lock:
            kept = self._kept.get(origin, [])
            while kept:
                since, sock = kept.pop()
                if time.monotonic() - since < _KEPT_S:
                    return sock
                self._shut(sock)
        return None

    def keep(self, origin: Origin, sock: socket.socket) -> None:
        """It can be used again."""
        with self._lock:
            if not self.closed:
                kept = self._kept.setdefault(origin, [])
                kept.append((time.monotonic(), sock))
                while len(kept) > _MOST_KEPT or (kept and kept[0][0] < time.monotonic() - _KEPT_S):
                    self._shut(kept.pop(0)[1])
                return
        self.drop(sock)

    def drop(self, sock: socket.socket) -> None:
        """It cannot be used any more."""
        with self._lock:
            self._shut(sock)

    def make(self, origin: Origin, ends: float) -> socket.socket:
        """A new one. Raises `OSError`; `FetchError` when its certificate is not trusted; `NotAllowed`."""
        try:
            found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except UnicodeError as exc:
            raise FetchError(f"{origin} has a name that cannot be one: {exc}") from exc
        if self._origins is not None:
            found = self._origins.admitted(origin.host, found)
        error: OSError | None = None
        for tried, (family, kind, protocol, _, address) in enumerate(found):
            sock = socket.socket(family, kind, protocol)
            self._enter(sock)
            try:
                sock.settimeout(left_of(ends) / (len(found) - tried))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._wrapped(sock, origin, ends) if origin.scheme == "https" else sock
            except ssl.SSLCertVerificationError as exc:
                self.drop(sock)
                raise FetchError(f"{origin} is not trusted: {exc.verify_message}") from exc
            except OSError as exc:
                self.drop(sock)
                error = exc
        raise error or OSError(f"{origin} has no address")

    def _wrapped(self, sock: socket.socket, origin: Origin, ends: float) -> socket.socket:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            self._open.discard(sock)
            sock = self._tls.wrap_socket(sock, server_hostname=origin.host, do_handshake_on_connect=False)
        try:
            self._enter(sock)
            sock.settimeout(left_of(ends))
            sock.do_handshake()
        except BaseException:
            self.drop(sock)
            raise
        return sock

    def _enter(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)
            if self.closed:
                self._shut(sock)
                raise ConnectionError("closed")

    def _shut(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        shut(sock)

    def close(self) -> None:
        """Ends those in use, too: who uses one gets an `OSError`. Idempotent."""
        with self._lock:
            self.closed = True
            for kept in self._kept.values():
                for _, sock in kept:
                    self._shut(sock)
            self._kept.clear()
            for sock in self._open:
                end(sock)  # who uses it closes it

    def _forget(self) -> None:
        """In a child of fork: lets go of its copies."""
        for sock in self._open:
            if sock.fileno() >= 0:
                os.close(sock.detach())
        self._open.clear()


_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connections in list(_all):
        connections._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Pull:
    """One payload on its way.

    Args:
        room: gives the memory for it, `reference.size` bytes; called once, while the origin answers.
        ends: when it has to be there, by the monotonic clock.
        closing: set: it is not wanted any more.

    Attributes:
        answered: whether the origin has begun an answer.
    """

    def __init__(
        self,
        connections: Connections,
        origin: Origin,
        token: str,
        reference: Reference,
        room: Callable[[], memoryview],
        ends: float,
        closing: threading.Event,
    ) -> None:
        if not TOKEN.fullmatch(token):
            raise FetchError(f"the token for {origin} cannot be one")
        self._connections, self._origin, self._token, self._reference = connections, origin, token, reference
        self._room, self._ends, self._closing = room, ends, closing
        self._stall_s = max(0.05, (ends - time.monotonic()) / _STALL_PART)
        self._target = memoryview(b"")
        self._ahead: socket.socket | None = None
        self._have = 0
        self.answered = False
        self._digest = xxh3_64()

    def run(self) -> None:
        """Fetches it.

        Raises:
            PayloadGone: the origin has it no more.
            CorruptMessage: twice it was another, or of another size.
            NotAllowed: the origin is none of those that are allowed.
            FetchError: it did not come in time, or the origin does not give it.
            ClosedError: it is not wanted any more.
            OSError: there is no memory for it.
        """
        try:
            self._ask_ahead()
            self._target = self._room()
        except BaseException:
            self._drop_ahead()
            raise
        pause_s, wrong, resumed_at = _PAUSE_S[0], False, 0
        while True:
            try:
                self._attempt()
                if self._digest.intdigest() == self._reference.checksum:
                    return
                raise CorruptMessage(f"{self._what()} does not match its checksum")
            except CorruptMessage:
                if wrong:
                    raise
                wrong = True
                self._start_over()
                continue
            except FetchError:
                raise
            except Malformed as exc:
                raise FetchError(f"{self._what()}: the answer is none: {exc}") from exc
            except OSError as exc:
                error = exc
            if self._have > resumed_at:
                pause_s = _PAUSE_S[0]
            resumed_at = self._have
            if time.monotonic() + pause_s >= self._ends:
                raise FetchError(f"{self._what()} did not come in time, {self._have} bytes of it did: {error}") from error
            if self._closing.wait(pause_s):
                raise ClosedError(f"{self._what()} is not fetched any more: closed")
            pause_s = min(2 * pause_s, _PAUSE_S[1])

    def _what(self) -> str:
        return f"a payload of {self._reference.size} bytes from {self._origin}"

    def _attempt(self) -> None:
        sock, buffer, head = self._asked()
        try:
            more = self._read(sock, buffer, head)
        except BaseException:
            self._connections.drop(sock)
            raise
        if more:
            self._connections.keep(self._origin, sock)
        else:
            self._connections.drop(sock)

    def _ask_ahead(self) -> None:
        """Asks on a connection that is kept, if there is one; `_asked` takes it from there."""
        self._ahead = self._connections.take(self._origin)
        if self._ahead is not None:
            try:
                self._ask(self._ahead)
            except OSError:
                self._drop_ahead()

    def _drop_ahead(self) -> None:
        """On a connection that is kept the next one would find the answer to this."""
        if self._ahead is not None:
            self._connections.drop(self._ahead)
            self._ahead = None

    def _ask(self, sock: socket.socket) -> None:
        sock.settimeout(left_of(self._ends))
        sock.sendall(self._request())

    def _asked(self) -> tuple[socket.socket, bytearray, Head]:
        """A connection on which an answer has begun, what of it came behind its head, the head."""
        while True:
            ahead, self._ahead = self._ahead, None
            kept = ahead or self._connections.take(self._origin)
            sock = kept or self._connections.make(self._origin, min(self._ends, time.monotonic() + self._stall_s))
            buffer = bytearray()
            try:
                if ahead is None:
                    self._ask(sock)
                head = read_head(sock, buffer, self._ends, self._stall_s)
                if head is not None:
                    self.answered = True
                    return sock, buffer, head
                error: OSError = ConnectionError("ended without an answer")
            except TimeoutError:
                self._connections.drop(sock)
                raise
            except OSError as exc:
                error = exc
            except BaseException:
                self._connections.drop(sock)
                raise
            self._connections.drop(sock)
            if not kept:
                raise error
            # It may have been ended while nobody used it.

    def _request(self) -> bytes:
        to = self._reference
        lines = [
            f"GET /v1/{to.store}/{to.segment}/{to.slot}/{to.generation}/{to.size} HTTP/1.1",
            f"Host: {str(self._origin).partition('//')[2]}",
            f"Authorization: Bearer {self._token}",
        ]
        if self._have:
            lines.append(f"Range: bytes={self._have}-")
        return "\r\n".join((*lines, "", "")).encode("ascii")

    def _read(self, sock: socket.socket, buffer: bytearray, head: Head) -> bool:
        """Reads a payload's bytes; whether the connection can be used again."""
        self._begin(head)
        size = self._reference.size
        came = min(len(buffer), size - self._have)
        self._target[self._have : self._have + came] = buffer[:came]
        self._came(came)
        while self._have < size:
            sock.settimeout(min(self._stall_s, left_of(self._ends)))
            # Not more at a time than what is still in the caches when its checksum is taken.
            read = sock.recv_into(self._target[self._have :], min(_AT_A_TIME_BYTES, size - self._have))
            if not read:
                raise ConnectionError("the connection ended")
            self._came(read)
        return len(buffer) == came and head.stays_open

    def _came(self, count: int) -> None:
        self._digest.update(self._target[self._have : self._have + count])
        self._have += count

    def _start_over(self) -> None:
        self._have = 0
        self._digest.reset()

    def _begin(self, head: Head) -> None:
        """Looks at what the answer says of itself; sets what of the payload is there."""
        status, size = head.status, self._reference.size
        if status in GONE:
            raise PayloadGone(f"{self._what()} is not there any more ({status})")
        if status in _PASSING:
            raise ConnectionError(f"status {status}")
        if status != 200 and (status != 206 or not self._have):
            raise FetchError(f"{self._what()} is not given: status {status}{_HINTS.get(status, '')}")
        if "transfer-encoding" in head.fields or "content-encoding" in head.fields:
            raise FetchError(f"{self._what()} comes in an encoding that was not asked for")
        if status == 200:
            self._start_over()
        elif head.fields.get("content-range") != f"bytes {self._have}-{size - 1}/{size}":
            raise CorruptMessage(f"{self._what()}: another part of it came than was asked for")
        length = head.fields.get("content-length", "")
        if length != str(size - self._have):
            raise CorruptMessage(f"{self._what()} has another length there: {length[:30]!a}")


_HINTS = {401: ": the token is another there"} | dict.fromkeys((301, 302, 303, 307, 308), ": redirects are not followed")

__all__ = ("Connections", "Origin", "Pull")
