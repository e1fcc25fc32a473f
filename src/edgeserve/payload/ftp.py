"""Files on FTP servers that messages name by their URL: fetched, and deleted when they are done with. By `ftplib`."""

from __future__ import annotations

import ftplib
import ipaddress
import socket
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from edgeserve.core.errors import ConfigurationError, FetchError, MessageError

_PORT = 21
_IDLE_S = 30.0
_WHOLE_S = 600.0
_MOST_CONNECTIONS = 16
_BLOCK = 1 << 16
_MOST_LINES = 1_000
_GONE = "550"
HOSTS, HERE = "EDGESERVE_FTP_HOSTS", "EDGESERVE_FTP_URL"


class Place(NamedTuple):
    """A file on a server. `path`: its parts, below where the user is after the login."""

    user: str
    password: str
    host: str
    port: int
    path: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The URL for people: without user and password."""
        return f"ftp://{self.host}{'' if self.port == _PORT else f':{self.port}'}/{'/'.join(self.path)}"

    @property
    def server(self) -> tuple[str, int]:
        """Host and port."""
        return self.host, self.port

    def is_served_by(self, url: str) -> bool:
        """Whether it is on the server of this URL, which is on this machine."""
        own = urlsplit(url)
        return (self.is_here or self.host == own.hostname) and self.port == (own.port or _PORT)

    @property
    def is_here(self) -> bool:
        """Whether the server is on this machine, as far as its name says."""
        return _is_loopback(self.host) or self.host == socket.gethostname().lower()


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def allowed_hosts(environment: Mapping[str, str]) -> frozenset[str]:
    """The hosts that may be fetched from besides this one: `EDGESERVE_FTP_HOSTS`, names or addresses with commas in between; and the one of
    `EDGESERVE_FTP_URL`."""
    named = [*environment.get(HOSTS, "").split(","), urlsplit(own_url(environment)).hostname or ""]
    return frozenset(host.strip().lower() for host in named if host.strip())


def own_url(environment: Mapping[str, str]) -> str:
    """What others reach this machine's FTP server by: `EDGESERVE_FTP_URL`, such as ftp://edge-1:2121, or its host name.

    Raises:
        ConfigurationError: that is no such URL.
    """
    url = environment.get(HERE) or f"ftp://{socket.gethostname()}"
    try:
        parts = urlsplit(url)
        if parts.scheme == "ftp" and parts.hostname and (parts.port or _PORT) and not parts.path.strip("/"):
            return url.rstrip("/")
    except ValueError:
        pass
    raise ConfigurationError(f"{HERE}={url!r} is not what others reach this machine's FTP server by: ftp://host or ftp://host:port")


def place_of(url: str, hosts: Collection[str]) -> Place:
    """Reads a URL that came in a message, and so may say anything.

    Args:
        url: ftp://[user[:password]@]host[:port]/folder/file
        hosts: those that are allowed besides this machine.

    Raises:
        FetchError: it is none, is not allowed, or leaves the user's directory.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or _PORT
    except ValueError:  # which may quote a password
        raise FetchError("a message names a file by a URL whose host or port is none: it is to be ftp://host:port/path") from None
    if parts.scheme != "ftp" or not host:
        raise FetchError(f"a message names a file by a URL with the scheme {parts.scheme!r}: only ftp://host/path is fetched")
    path = tuple(unquote(part) for part in parts.path.split("/")[1:])
    place = Place(unquote(parts.username or ""), unquote(parts.password or ""), host, port, path)
    if not (place.is_here or host in hosts):
        raise FetchError(
            f"a message names a file on {host!r}, which is not allowed: {HOSTS} lists the hosts to fetch from besides this one"
        )
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise FetchError(f"a message names {place.shown!r}, and more after it: in a file's name '?' is written %3F, and '#' %23")
    if not path or not all(map(_is_plain, path)):
        raise FetchError(f"a message names a file by a path that is not plain: {'/'.join(path)!r}")
    return place


def _is_plain(part: str) -> bool:
    return part not in ("", ".", "..") and part == part.strip() and not any(c in "/\\" or unicodedata.category(c) == "Cc" for c in part)


class _Refused(FetchError):
    """The server has answered, and does not do it."""


def is_refusal(error: FetchError) -> bool:
    """Whether a server has answered that it does not do it, and not failed."""
    return isinstance(error, _Refused)


class _Connection(ftplib.FTP):
    """One that reads no endless reply."""

    _lines = 0

    def putcmd(self, line: str) -> None:
        self._lines = 0
        super().putcmd(line)

    def getline(self) -> str:
        self._lines += 1
        if self._lines > _MOST_LINES:
            raise ftplib.Error(f"a reply of more than {_MOST_LINES} lines")
        return super().getline()


class _Deadline:
    """Ends the connection that is in use when the time is over: a reply that trickles in has no end of its own."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._ftp: ftplib.FTP | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.name, self._timer.daemon = "edgeserve-ftp", True
        self._timer.start()

    def watch(self, ftp: ftplib.FTP) -> None:
        """This one is in use."""
        self._ftp = ftp

    def _end(self) -> None:
        self.over = True
        with suppress(OSError):
            if self._ftp is not None and self._ftp.sock is not None:
                self._ftp.sock.shutdown(socket.SHUT_RDWR)

    def cancel(self) -> None:
        """It came in time."""
        self._timer.cancel()


class FtpFiles:
    """Fetches and deletes. One thread at a time. Connections are kept while they are good.

    Args:
        idle_s: how long a server may say nothing.
        whole_s: how long a file may take, and each thing else that is done.
    """

    def __init__(self, *, idle_s: float = _IDLE_S, whole_s: float = _WHOLE_S) -> None:
        self._idle_s, self._whole_s = idle_s, whole_s
        self._connections: OrderedDict[tuple[str, int, str, str], ftplib.FTP] = OrderedDict()

    def fetch(
        self, place: Place, write: Callable[[bytes], object], most_bytes: int, expect: Callable[[int], object] = lambda size: None
    ) -> None:
        """Hands over a file in blocks; before that its size, if the server tells it.

        Raises:
            FetchError: it is not there, is too large, or did not come in time, or not whole.
            MessageError: what `write` and `expect` raise.
        """
        until, size, path = time.monotonic() + self._whole_s, 0, "/".join(place.path)

        def take(block: bytes) -> None:
            nonlocal size
            size += len(block)
            if size > most_bytes:
                raise FetchError(f"{place.shown} has more than {most_bytes:,} bytes")
            if time.monotonic() > until:
                raise FetchError(f"{place.shown} did not come whole within {self._whole_s:g} s: {size:,} bytes")
            write(block)

        def work(ftp: ftplib.FTP) -> None:
            told = _size(ftp, path)
            if told is not None:
                expect(told)
            if told is not None and told > most_bytes:
                raise FetchError(f"{place.shown} has {told:,} bytes, more than {most_bytes:,} bytes")
            ftp.retrbinary(f"RETR {path}", take, _BLOCK)
            if told is not None and size != told:
                raise FetchError(f"{place.shown} has {told:,} bytes, and {size:,} came: it was cut short, or somebody writes to it")

        self._do(place, work, begun=lambda: size > 0)

    def delete(self, place: Place) -> None:
        """Deletes a file; one that is gone is done with.

        Raises:
            FetchError: the server does not let it.
        """
        try:
            self._do(place, lambda ftp: ftp.delete("/".join(place.path)), begun=lambda: False)
        except _Refused as exc:
            # 550 is all that a server says of a file that is not there, and of one that may not be deleted.
            if _GONE not in str(exc) or self._is_there(place):
                raise

    def _is_there(self, place: Place) -> bool:
        found: list[int | None] = []
        self._do(place, lambda ftp: found.append(_size(ftp, "/".join(place.path))), begun=lambda: False)
        return found[-1] is not None

    def close(self) -> None:
        """Ends the connections. It may be used again."""
        while self._connections:
            self._hang_up(self._connections.popitem()[1])

    # --- connections --------------------------------------------------------------------------------------------

    def _do(self, place: Place, work: Callable[[ftplib.FTP], object], *, begun: Callable[[], bool]) -> None:
        """Works over a connection that is there, and once more over a new one if that had been closed meanwhile."""
        deadline = _Deadline(self._whole_s)
        try:
            self._do_by(deadline, place, work, begun)
        except FetchError:
            if deadline.over:
                raise FetchError(f"{place.shown}: the server did not come to an end within {self._whole_s:g} s") from None
            raise
        finally:
            deadline.cancel()

    def _do_by(self, deadline: _Deadline, place: Place, work: Callable[[ftplib.FTP], object], begun: Callable[[], bool]) -> None:
        key = (place.host, place.port, place.user, place.password)
        kept = self._connections.pop(key, None)
        if kept is not None:
            deadline.watch(kept)
            try:
                work(kept)
            except ftplib.error_perm as exc:
                self._connections[key] = kept
                raise _Refused(_told(place, exc)) from None
            except _TROUBLE as exc:
                self._hang_up(kept)
                if isinstance(exc, _OURS):
                    raise
                if begun():
                    raise FetchError(_told(place, exc)) from None
            except BaseException:
                self._hang_up(kept)
                raise
            else:
                self._connections[key] = kept
                return
        ftp = self._connect(place, deadline)
        try:
            work(ftp)
        except ftplib.error_perm as exc:
            self._keep(key, ftp)
            raise _Refused(_told(place, exc)) from None
        except BaseException as exc:
            self._hang_up(ftp)
            if isinstance(exc, _TROUBLE) and not isinstance(exc, _OURS):
                raise FetchError(_told(place, exc)) from None
            raise
        self._keep(key, ftp)

    def _keep(self, key: tuple[str, int, str, str], ftp: ftplib.FTP) -> None:
        self._connections[key] = ftp
        if len(self._connections) > _MOST_CONNECTIONS:
            self._hang_up(self._connections.popitem(last=False)[1])

    def _connect(self, place: Place, deadline: _Deadline) -> ftplib.FTP:
        ftp = _Connection(timeout=self._idle_s)
        deadline.watch(ftp)
        try:
            ftp.connect(place.host, place.port)
            ftp.login(place.user, place.password)
        except _TROUBLE as exc:
            self._hang_up(ftp)
            raise FetchError(_told(place, exc, "no connection to the server: ")) from None
        return ftp

    @staticmethod
    def _hang_up(ftp: ftplib.FTP) -> None:
        with suppress(Exception):
            ftp.close()


def _size(ftp: ftplib.FTP, path: str) -> int | None:
    """How long a file is; None: it is not there, or the server does not tell."""
    ftp.voidcmd("TYPE I")  # many do not tell it of text
    try:
        return ftp.size(path)
    except ftplib.error_perm:
        return None


def _told(place: Place, error: BaseException, what: str = "") -> str:
    """What went wrong, for people: a server may say anything, and repeat the password."""
    said = str(error) or type(error).__name__
    if place.password:
        said = said.replace(place.password, "***")
    return f"{place.shown}: {what}{''.join(c if c.isprintable() else ' ' for c in said)}"


# What `ftplib` raises where a server misbehaves: its own, those of sockets, a reply that is none, one that is too long.
_TROUBLE = (ftplib.Error, OSError, EOFError, ValueError)
_OURS = (FetchError, MessageError)


__all__ = ("FtpFiles", "Place", "allowed_hosts", "is_refusal", "own_url", "place_of")
