"""Payloads for other hosts: the segments below one directory over HTTP/1.1, straight out of shared memory.

`GET /v1/<store>/<segment>/<slot>/<generation>/<size>` with `Authorization: Bearer <token>`; `HEAD` as well; `Range: bytes=a-b` or `a-`.

=====  ==============================================================================
 200   the payload; 206: the part of it that was asked for
 400   no such request is answered here (405: only GET and HEAD are; 431: it is too long)
 401   the token is another; nothing else was looked at
 404   there is no such segment
 410   the slot holds another payload now
 416   it has not so many bytes
 503   too many are served now
=====  ==============================================================================

While a payload is sent it has a lease, as with a reader on this host, so its slot is not used again; and should it be all the same, the
connection ends before the last byte.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import re
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from pathlib import Path

import msgspec

from edgeserve.core.errors import ClosedError, ConfigurationError, CorruptMessage, TransportError, UsedAfterFork
from edgeserve.payload._http import TOKEN, Head, Malformed, TooLong, end, left_of, read_head, shut
from edgeserve.payload.leases import Table, key_of
from edgeserve.payload.reference import Reference
from edgeserve.payload.segment import Segment, is_name

_log = logging.getLogger("edgeserve")

MOST_CONNECTIONS = 32
"""How many are served at a time; each has a thread."""

_HEAD_S, _IDLE_S, _STALL_S = 5.0, 30.0, 10.0
# A connection gives way to a new one when it has asked for nothing for so long.
_GRACE_S = 0.5
# Who takes less keeps a slot for too long.
_SLACK_S, _SLOWEST_BYTES_PER_S = 10.0, 64 << 10
_TLS_BYTES = 64 << 10
_TICK_S, _LEASES_REST_S, _WARN_EVERY_S = 1.0, 5.0, 5.0
_MOST_SEGMENTS = 64
_LOOKS, _LOOK_S = 20, 0.002
_MOST_REFUSED = 16

_TARGET = re.compile(r"/v1/([^/]{1,100})/([^/]{1,100})/([0-9]{1,10})/([0-9]{1,19})/([0-9]{1,15})")
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})?")
_REASONS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    416: "Range Not Satisfiable",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
_OPENED = (200, 206, 404, 410, 416)
"""After these a connection stays open."""


def _answer(status: int, length: int = 0, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}", *more]
    if status not in _OPENED:
        lines.append("Connection: close")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


class _Refused(Exception):
    """What is asked for is not given: the status, with further fields."""

    def __init__(self, status: int, *more: str) -> None:
        super().__init__(status)
        self.status, self.more = status, more


class _Cut(Exception):
    """A connection is ended by us; why."""


class _Leases:
    """This process's table of leases in one store."""

    def __init__(self, directory: Path) -> None:
        self.table = Table(directory)
        self.used, self.used_at = 0, time.monotonic()


class _Connection:
    """One peer. `waiting_since`: for a request; None: one is answered."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock, self.peer = sock, peer
        self.waiting_since: float | None = time.monotonic()
        self.given_up = False
        self.thread: threading.Thread | None = None


class PayloadServer:
    """Serves the payloads of all stores below a directory to whoever has the token. It starts once, in the process that made it.

    Args:
        base: where the stores' directories are, see `payload_base`; it need not be there yet.
        host, port: where to listen; port 0: one that is free. At any other several processes of this user may listen, and share what comes.
        token: 8 to 1024 of letters, digits and `._~+/=-`.
        tls: the server's certificate and key; None: in the clear.

    Raises:
        ConfigurationError: the token cannot be one.

    Example:
        >>> import tempfile
        >>> with PayloadServer(Path(tempfile.mkdtemp()), token="a-secret") as server:
        ...     server.port > 0
        True
    """

    def __init__(self, base: Path, *, host: str = "127.0.0.1", port: int = 0, token: str, tls: ssl.SSLContext | None = None) -> None:
        if not TOKEN.fullmatch(token):
            raise ConfigurationError("the token of a payload server has 8 to 1024 of letters, digits and ._~+/=-")
        self._base, self._host, self._port, self._tls = base, host, port, tls
        self._expected = f"Bearer {token}".encode()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._refused: deque[socket.socket] = deque()
        self._segments: dict[tuple[str, str], Segment] = {}
        self._leases: dict[str, _Leases] = {}
        self._listener: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._unsaid, self._quiet_until = 0, 0.0
        _servers.add(self)

    def __repr__(self) -> str:
        return f"PayloadServer({str(self._base)!r}, host={self._host!r}, port={self._port})"

    def start(self) -> None:
        """Listens from now on.

        Raises:
            TransportError: it cannot listen there.
            ClosedError: it was started before.
            UsedAfterFork: another process made it.
        """
        self._check_process()
        with self._lock:
            if self._closed or self._listener is not None:
                raise ClosedError(f"{self!r} was started before: make another")
            try:
                family = (
                    socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
                    if self._host
                    else socket.AF_INET
                )
                self._listener = socket.create_server(
                    (self._host, self._port), family=family, backlog=MOST_CONNECTIONS, reuse_port=self._port != 0
                )
            except OSError as exc:
                raise TransportError(f"payloads cannot be served on {self._host}, port {self._port}: {exc}") from exc
            self._listener.setblocking(False)
            self._port = self._listener.getsockname()[1]
            self._wake = socket.socketpair()
            self._thread = threading.Thread(target=self._accept, name=f"payloads:{self._port}", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; before `start` what was asked for."""
        return self._port

    def close(self) -> None:
        """Ends all connections and waits for their threads. Idempotent. In a child of fork there is nothing to close."""
        if os.getpid() != self._pid:
            return
        with _forks, self._lock:
            first, self._closed = not self._closed, True
            connections = list(self._connections)
            for connection in connections:
                end(connection.sock)
        if not first or self._listener is None or self._wake is None or self._thread is None:
            return
        self._wake[1].send(b"x")
        self._thread.join()
        for thread in [connection.thread for connection in connections if connection.thread is not None]:
            thread.join()
        for sock in (self._listener, *self._wake, *self._refused):
            sock.close()
        with self._lock:
            for leases in self._leases.values():
                leases.table.close()
            self._leases.clear()
            self._segments.clear()

    def __enter__(self) -> PayloadServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork(f"{self!r} was made by process {self._pid} and used by {os.getpid()}: make one after the fork")

    def _forget(self) -> None:
        """In a child of fork: its copies of the sockets would keep the port and the connections."""
        for sock in (self._listener, *(self._wake or ()), *self._refused, *(connection.sock for connection in self._connections)):
            if sock is not None and sock.fileno() >= 0:
                os.close(sock.detach())
        self._connections.clear()
        self._refused.clear()
        self._segments.clear()

    # --- connections --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None and self._wake is not None
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake[0], select.POLLIN)
        tidy_at = 0.0
        while not self._closed:
            poll.poll(int(_TICK_S * 1000))
            if (now := time.monotonic()) >= tidy_at:
                tidy_at = now + _TICK_S
                self._tidy()
            try:
                while not self._closed and self._take_one():
                    pass
            except OSError as exc:
                self._warn("a new connection", f"cannot be taken: {exc.strerror}")
                poll.unregister(self._listener)
                poll.poll(100)  # what is lacking will not be there at once
                poll.register(self._listener, select.POLLIN)

    def _take_one(self) -> bool:
        """Whether there was a new connection."""
        assert self._listener is not None
        with _forks:
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return False
            connection = _Connection(sock, f"{address[0]}:{address[1]}")
            with self._lock:
                taken = not self._closed and self._has_room()
                if taken:
                    self._connections.add(connection)
                else:
                    self._refused.append(sock)
        if taken:
            connection.thread = threading.Thread(target=self._serve, args=[connection], name=f"payloads:{self._port}", daemon=True)
            try:
                connection.thread.start()
            except RuntimeError:
                with self._lock:
                    self._connections.discard(connection)
                    self._refused.append(sock)
                connection.thread, taken = None, False
        if not taken:
            self._refuse(sock)
            self._warn(connection.peer, "too many connections")
        return True

    def _has_room(self) -> bool:
        now = time.monotonic()
        busy = [connection for connection in self._connections if not connection.given_up]
        if len(busy) < MOST_CONNECTIONS:
            return True
        idle = [(since, connection) for connection in busy if (since := connection.waiting_since) is not None and now - since > _GRACE_S]
        if not idle or len(self._connections) >= 2 * MOST_CONNECTIONS:
            return False
        _, oldest = min(idle, key=lambda each: each[0])
        oldest.given_up = True
        end(oldest.sock)
        return True

    def _refuse(self, sock: socket.socket) -> None:
        """It is closed later: at once, what it has sent would make the answer unreadable to it."""
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._tls is None:
                sock.send(_answer(503, 0, "Retry-After: 1"))
            sock.shutdown(socket.SHUT_WR)
        while len(self._refused) > _MOST_REFUSED:
            self._refused.popleft().close()

    def _tidy(self) -> None:
        """What nobody asks for any more is let go of: it would keep memory, or a store's directory."""
        now = time.monotonic()
        while self._refused:
            self._refused.popleft().close()
        with self._lock:
            self._segments = {name: segment for name, segment in self._segments.items() if segment.path.exists()}
            for store in [store for store, leases in self._leases.items() if not leases.used and now - leases.used_at > _LEASES_REST_S]:
                self._leases.pop(store).table.close()

    def _serve(self, connection: _Connection) -> None:
        try:
            if self._tls is not None:
                connection.sock.settimeout(_HEAD_S)
                if not connection.sock.recv(1, socket.MSG_PEEK):
                    return  # it only looked whether somebody is here
                with _forks:
                    connection.sock = self._tls.wrap_socket(connection.sock, server_side=True, do_handshake_on_connect=False)
                if self._closed:
                    return
                connection.sock.do_handshake()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._converse(connection)
        except _Cut as exc:
            self._warn(connection.peer, str(exc))
        except ssl.SSLError as exc:
            self._warn(connection.peer, f"TLS: {exc.reason}")
        except OSError as exc:
            if not self._closed and not connection.given_up:
                self._warn(connection.peer, f"it broke: {exc.strerror or exc}")
        except Exception as exc:
            self._warn(connection.peer, f"a {type(exc).__name__} of our own")
            _log.debug("a payload server's connection", exc_info=True)
        finally:
            with self._lock:
                self._connections.discard(connection)
            shut(connection.sock)

    def _converse(self, connection: _Connection) -> None:
        buffer = bytearray()
        ends = time.monotonic() + _HEAD_S
        while not self._closed:
            try:
                head = read_head(connection.sock, buffer, ends)
            except TimeoutError:
                raise _Cut("its request did not come in time") from None
            except Malformed as exc:
                self._part(connection, 431 if isinstance(exc, TooLong) else 400, str(exc))
                return
            if head is None:
                return
            connection.waiting_since = None
            if not self._answered(connection, head):
                return
            connection.waiting_since = time.monotonic()
            if not buffer and not self._next_comes(connection.sock):
                return
            ends = time.monotonic() + _HEAD_S

    def _next_comes(self, sock: socket.socket) -> bool:
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        return _is_ready(sock, _IDLE_S)

    # --- requests -----------------------------------------------------------------------------------------------

    def _answered(self, connection: _Connection, head: Head) -> bool:
        """Whether the connection stays open."""
        if not hmac.compare_digest(head.fields.get("authorization", "").encode(), self._expected):
            self._part(connection, 401, "another token")
            return False
        try:
            self._send(connection, head)
        except _Refused as refused:
            if refused.status not in _OPENED:
                self._part(connection, refused.status, "a request that is not answered")
                return False
            connection.sock.settimeout(_STALL_S)
            connection.sock.sendall(_answer(refused.status, 0, *refused.more))
        return head.fields.get("connection", "").lower() != "close" and head.first.endswith(" HTTP/1.1")

    def _send(self, connection: _Connection, head: Head) -> None:
        with_body, reference, wanted = _asked(head)
        segment = self._segment(reference)
        lease = self._lease(reference)
        try:
            # The release of the lock stands between the lease and the look at what is there.
            if not _holds(segment, reference):
                raise _Refused(410)
            if segment.entry(reference.slot).size != reference.size:
                raise _Refused(400)
            first, behind = _part_of(wanted, reference.size)
            fields = ["Content-Type: application/octet-stream"]
            if wanted is not None:
                fields.append(f"Content-Range: bytes {first}-{behind - 1}/{reference.size}")
            answer = memoryview(_answer(200 if wanted is None else 206, behind - first, *fields))
            ends = time.monotonic() + _SLACK_S + reference.size / _SLOWEST_BYTES_PER_S
            if not with_body or first == behind:
                _send(connection.sock, [answer], ends)
                return
            # The kernel copies what it is given, so the slot is not needed any more then. To hand it pages (sendfile) took twice as long.
            body = segment.slot(reference.slot, reference.size)
            _send(connection.sock, [answer, body[first : behind - 1]], ends)
            if not _holds(segment, reference):
                raise _Cut("what it was sent was replaced meanwhile")
            _send(connection.sock, [body[behind - 1 : behind]], ends)
        finally:
            self._let_go(reference, lease)

    def _part(self, connection: _Connection, status: int, why: str) -> None:
        """Answers and ends the connection, so that the peer can read the answer."""
        sock = connection.sock
        self._warn(connection.peer, f"{status}: {why}")
        ends = time.monotonic() + 1.0
        with contextlib.suppress(OSError):
            sock.settimeout(1.0)
            sock.sendall(_answer(status, 0, *(["WWW-Authenticate: Bearer"] if status == 401 else [])))
            socket.socket.shutdown(sock, socket.SHUT_WR)
            for _ in range(8):
                sock.settimeout(left_of(ends))
                if not sock.recv(1 << 14):
                    break

    def _segment(self, reference: Reference) -> Segment:
        name = reference.store, reference.segment
        if not is_name(reference.segment):
            raise _Refused(404)
        with self._lock:
            segment = self._segments.pop(name, None)
            if segment is None:
                try:
                    segment = Segment.open(self._base / reference.store / reference.segment)
                except (CorruptMessage, OSError) as exc:
                    raise _Refused(503 if isinstance(exc, OSError) and exc.errno in _PASSING else 404) from None
            if len(self._segments) >= _MOST_SEGMENTS:
                self._segments.pop(next(iter(self._segments)))
            self._segments[name] = segment  # the one used last is last
        if reference.slot >= segment.count or reference.size > segment.slot_bytes:
            raise _Refused(404)
        return segment

    # --- leases -------------------------------------------------------------------------------------------------

    def _lease(self, reference: Reference) -> tuple[_Leases, int] | None:
        """None: there is no room to say that somebody looks: it is noticed when the slot is used again."""
        key = key_of(reference.segment, reference.slot, reference.generation)
        with self._lock:
            leases = self._leases.get(reference.store)
            if leases is None or leases.table.gone:
                try:
                    leases = self._leases[reference.store] = _Leases(self._base / reference.store)
                except OSError:
                    return None
            index = leases.table.enter(key)
            if index is None:
                return None
            leases.used += 1
            return leases, index

    def _let_go(self, reference: Reference, lease: tuple[_Leases, int] | None) -> None:
        if lease is None:
            return
        leases, index = lease
        with self._lock:
            leases.table.let_go(index)
            leases.used -= 1
            leases.used_at = time.monotonic()
            if not leases.used and self._leases.get(reference.store) is not leases:
                leases.table.close()

    def _warn(self, peer: str, what: str) -> None:
        """One line now and then, whatever peers do."""
        now = time.monotonic()
        with self._lock:
            if now < self._quiet_until:
                self._unsaid += 1
                return
            unsaid, self._unsaid, self._quiet_until = self._unsaid, 0, now + _WARN_EVERY_S
        _log.warning("payloads on port %d: %s: %s%s", self._port, peer, what, f" (and {unsaid} more)" if unsaid else "")


def _asked(head: Head) -> tuple[bool, Reference, tuple[int, int | None] | None]:
    """Whether with a body, which payload, which part of it."""
    method, _, rest = head.first.partition(" ")
    target, _, version = rest.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not method.isalpha():
        raise _Refused(400)
    if method not in ("GET", "HEAD"):
        raise _Refused(405, "Allow: GET, HEAD")
    found = _TARGET.fullmatch(target)
    if (
        found is None
        or {found[1], found[2]} & {".", ".."}
        or "transfer-encoding" in head.fields
        or head.fields.get("content-length", "0") != "0"
    ):
        raise _Refused(400)
    store, segment, *numbers = found.groups()
    try:
        reference = msgspec.convert([store, segment, *map(int, numbers), 0], Reference)
    except msgspec.ValidationError:
        raise _Refused(400) from None
    asked = head.fields.get("range")
    if asked is None:
        return method == "GET", reference, None
    part = _RANGE.fullmatch(asked)
    if part is None:
        raise _Refused(400)
    return method == "GET", reference, (int(part[1]), None if part[2] is None else int(part[2]))


def _part_of(wanted: tuple[int, int | None] | None, size: int) -> tuple[int, int]:
    """[first, behind) of a payload's bytes."""
    if wanted is None:
        return 0, size
    first, last = wanted
    behind = size if last is None else min(last + 1, size)
    if first >= behind:
        raise _Refused(416, f"Content-Range: bytes */{size}")
    return first, behind


def _holds(segment: Segment, reference: Reference) -> bool:
    """Whether the payload is there; its writer may only be looking whether it is still needed."""
    generation = segment.entry(reference.slot).generation
    for _ in range(_LOOKS):
        if generation >= reference.generation:  # a slot's generations only grow
            break
        time.sleep(_LOOK_S)
        generation = segment.entry(reference.slot).generation
    return generation == reference.generation


def _send(sock: socket.socket, parts: list[memoryview], ends: float) -> None:
    """Sends it all. Raises `_Cut` when the peer takes nothing, or too little."""
    sock.settimeout(_STALL_S)
    while parts:
        if time.monotonic() > ends:
            raise _Cut("it takes too little of what it is sent")
        try:
            sent = sock.send(parts[0][:_TLS_BYTES]) if isinstance(sock, ssl.SSLSocket) else sock.sendmsg(parts)
        except TimeoutError:
            raise _Cut("it takes nothing of what it is sent") from None
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if sent:
            parts[0] = parts[0][sent:]


def _is_ready(sock: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(1, int(seconds * 1000))))


# Of what this process, or the machine, has too little of now.
_PASSING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))

# Held while a socket is made that a child of fork must not keep.
_forks = threading.Lock()
_servers: weakref.WeakSet[PayloadServer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._forget()
    _forks.release()


os.register_at_fork(before=_forks.acquire, after_in_parent=_forks.release, after_in_child=_after_fork_in_child)

__all__ = ("MOST_CONNECTIONS", "PayloadServer")
