"""Files from web servers, by HTTP/1.1: bounded in time and in memory whatever the server does, resumed where a connection broke."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urljoin

from edgeserve.core.errors import FetchError, MessageError, NotAllowed, PayloadGone
from edgeserve.payload._http import GONE, Head, Malformed, left_of, read_head
from edgeserve.payload.arriving import Arriving
from edgeserve.payload.location import PORTS, Location, location_of
from edgeserve.payload.pull import Connections, Origin

_BLOCK = 256 << 10
_MOST_LINE, _MOST_TRAILERS, _MOST_INTERIM, _MOST_REDIRECTS = 1_024, 64, 16, 5
# A connection on which nothing comes for this part of the time there is may be one to a host that is gone.
_STALL_PART = 4
_PAUSE_S = 0.01

_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_REDIRECTS = (301, 302, 303, 307, 308)
_REFUSED = {401: ": it asks for a user", 403: ": it does not let this machine have it"}


class _Lost(ConnectionError):
    """The connection ended before the body did."""


class WebFiles:
    """Fetches. One thread at a time; connections are kept while they are good.

    Args:
        check: raises `NotAllowed` for a location that a redirect may not lead to.
    """

    def __init__(self, check: Callable[[Location], None]) -> None:
        self._check = check
        self._connections = Connections()

    def fetch(self, location: Location, into: Arriving, ends: float, *, redirects: bool = True) -> None:
        """Fetches a file, until `ends` by the monotonic clock.

        Raises:
            PayloadGone: it is not there.
            NotAllowed: it is too large, or a redirect leads to where it may not.
            CorruptMessage: it is another than its message says.
            FetchError: it did not come in time or whole, or the server does not give it.
        """
        stall_s, validator, hops = max(0.05, (ends - time.monotonic()) / _STALL_PART), "", 0
        while True:
            before = into.have
            transfer = _Transfer(self._connections, location, into, ends, stall_s, validator)
            try:
                moved = transfer.run()
            except (FetchError, MessageError):
                raise
            except Malformed as exc:
                raise FetchError(f"{into.shown}: the answer is none: {exc}") from None
            except OSError as exc:
                validator = transfer.validator
                if not (isinstance(exc, _Lost) and validator and into.have > before and time.monotonic() < ends):
                    raise FetchError(
                        f"{into.shown} did not come whole, {into.have:,} bytes of it did: {exc or type(exc).__name__}"
                    ) from None
                time.sleep(_PAUSE_S)
                continue
            if moved is None:
                return
            hops += 1
            if not redirects or hops > _MOST_REDIRECTS:
                raise FetchError(
                    f"{into.shown} is not given, but redirected{' again and again' if redirects else ': that is not followed'}"
                )
            location = self._next(location, moved, into)

    def _next(self, location: Location, moved: str, into: Arriving) -> Location:
        """Where a redirect leads to, if that is allowed."""
        host = f"[{location.host}]" if ":" in location.host else location.host
        try:
            following = location_of(urljoin(f"{location.scheme}://{host}:{location.port}{location.target}", moved))
            if following.scheme not in ("http", "https") or (following.scheme == "http" and location.scheme == "https"):
                raise NotAllowed(f"{following.shown}: from {location.scheme} no redirect to {following.scheme} is followed")
            self._check(following)
        except (NotAllowed, ValueError) as exc:
            why = str(exc) if isinstance(exc, NotAllowed) else "that is no URL"
            raise NotAllowed(f"{into.shown} is redirected to where this node does not fetch from: {why}") from None
        return following

    def close(self) -> None:
        """Ends the connections."""
        self._connections.close()


class _Transfer:
    """One request and its answer."""

    def __init__(self, connections: Connections, location: Location, into: Arriving, ends: float, stall_s: float, validator: str) -> None:
        self._connections, self._location, self._into, self._ends, self._stall_s = connections, location, into, ends, stall_s
        self._origin = Origin("https" if location.scheme == "https" else "http", location.host, location.port)
        self.validator = validator
        self._sock: socket.socket
        self._buffer = bytearray()

    def run(self) -> str | None:
        """Takes the file, or what is missing of it; returns where it is instead, if a redirect says so."""
        head, status = self._asked()
        try:
            if status in _REDIRECTS and "location" in head.fields:
                self._connections.drop(self._sock)
                return head.fields["location"]
            whole = self._body(head, status)
        except BaseException:
            self._connections.drop(self._sock)
            raise
        if whole and not self._buffer and head.stays_open:
            self._connections.keep(self._origin, self._sock)
        else:
            self._connections.drop(self._sock)
        return None

    # --- asking -------------------------------------------------------------------------------------------------

    def _request(self) -> bytes:
        to = self._location
        host = f"[{to.host}]" if ":" in to.host else to.host
        lines = [
            f"GET {to.target} HTTP/1.1",
            f"Host: {host}" if to.port == PORTS[to.scheme] else f"Host: {host}:{to.port}",
            "User-Agent: edgeserve",
            "Accept: */*",
            "Accept-Encoding: identity",
        ]
        if self._into.have:
            lines += [f"Range: bytes={self._into.have}-", f"If-Range: {self.validator}"]
        return "\r\n".join((*lines, "", "")).encode("ascii")

    def _asked(self) -> tuple[Head, int]:
        """The head of the answer, and its status."""
        while True:
            kept = self._connections.take(self._origin)
            self._sock = kept or self._connections.make(self._origin, min(self._ends, time.monotonic() + self._stall_s))
            self._buffer.clear()
            try:
                self._sock.settimeout(left_of(self._ends))
                self._sock.sendall(self._request())
                return self._answer()
            except BaseException as exc:
                self._connections.drop(self._sock)
                # One that was kept may have been ended while nobody used it.
                if kept is None or isinstance(exc, TimeoutError) or not isinstance(exc, OSError):
                    raise

    def _answer(self) -> tuple[Head, int]:
        for _ in range(_MOST_INTERIM):
            head = read_head(self._sock, self._buffer, self._ends, self._stall_s)
            if head is None:
                raise ConnectionError("the connection ended without an answer")
            status = head.status
            if status >= 200:
                return head, status
        raise Malformed("no final answer")

    # --- taking -------------------------------------------------------------------------------------------------

    def _body(self, head: Head, status: int) -> bool:
        """Takes the body; returns whether the connection may be used again."""
        into = self._into
        if status in GONE:
            raise PayloadGone(f"{into.shown} is not there ({status})")
        if status != 200 and (status != 206 or not into.have):
            raise FetchError(f"{into.shown} is not given: status {status}{_REFUSED.get(status, '')}")
        if head.fields.get("content-encoding", "identity").lower() != "identity":
            raise FetchError(f"{into.shown} comes in an encoding that was not asked for")
        length, chunked = head.fields.get("content-length"), head.fields.get("transfer-encoding")
        if (length is not None and not _LENGTH.fullmatch(length)) or (
            chunked is not None and (length is not None or chunked.lower() != "chunked")
        ):
            raise Malformed("it does not say how long it is")
        if status == 200:
            into.start_over()
            self.validator = _validator(head)
        else:
            self._check_range(head)
        if length is not None:
            into.expect(into.have + int(length))
            self._take(int(length))
        elif chunked is not None:
            self._take_chunks()
        elif into.told:
            while block := self._some(_BLOCK):
                into.write(block)
            return False
        else:
            raise FetchError(
                f"{into.shown} comes without its length, so it is not known when it is whole: name it with its size or checksum"
            )
        return True

    def _check_range(self, head: Head) -> None:
        found, into = _RANGE.fullmatch(head.fields.get("content-range", "")), self._into
        if found is None or int(found[1]) != into.have or int(found[2]) + 1 != int(found[3]):
            raise FetchError(f"{into.shown}: another part of it came than was asked for")
        if _validator(head) not in ("", self.validator):
            raise FetchError(f"{into.shown} was changed while it was fetched")
        into.expect(int(found[3]))

    def _take(self, left: int) -> None:
        while left:
            block = self._some(min(left, _BLOCK))
            if not block:
                raise _Lost("the connection ended")
            self._into.write(block)
            left -= len(block)

    def _take_chunks(self) -> None:
        while True:
            found = _CHUNK.fullmatch(self._line())
            if found is None:
                raise Malformed("a chunk without its length")
            size = int(found[1], 16)
            if not size:
                break
            self._take(size)
            if self._line():
                raise Malformed("a chunk that is longer than it says")
        for _ in range(_MOST_TRAILERS):
            if not self._line():
                return
        raise Malformed("more trailers than there can be")

    def _line(self) -> bytes:
        while (at := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _MOST_LINE:
                raise Malformed("a line that does not end")
            came = self._receive(_MOST_LINE)
            if not came:
                raise _Lost("the connection ended")
            self._buffer += came
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 2]
        return line

    def _some(self, most: int) -> bytes:
        if self._buffer:
            block = bytes(self._buffer[:most])
            del self._buffer[:most]
            return block
        return self._receive(most)

    def _receive(self, most: int) -> bytes:
        self._sock.settimeout(min(self._stall_s, left_of(self._ends)))
        try:
            return self._sock.recv(most)
        except (ConnectionError, TimeoutError) as exc:
            raise _Lost(str(exc)) from None


def _validator(head: Head) -> str:
    """By what a server knows again what it has sent; "": it says nothing that is certain."""
    tag = head.fields.get("etag", "")
    return tag if tag and not tag.startswith("W/") else head.fields.get("last-modified", "")


__all__ = ("WebFiles",)
