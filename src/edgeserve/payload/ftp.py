"""Files on FTP servers that messages name by their URL: fetched, and deleted when they are done with. By `ftplib`."""

from __future__ import annotations

import ftplib
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from edgeserve.core.errors import ConfigurationError, FetchError

_PORT = 21
_IDLE_S = 30.0
_WHOLE_S = 600.0
_MOST_CONNECTIONS = 16
_BLOCK = 1 << 16
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
    except ValueError as exc:
        raise FetchError(f"a message names a file by a URL that is none: {exc}") from None
    if parts.scheme != "ftp" or not host:
        raise FetchError(f"a message names a file by a URL with the scheme {parts.scheme!r}: only ftp://host/path is fetched")
    path = tuple(unquote(part) for part in parts.path.split("/")[1:])
    place = Place(unquote(parts.username or ""), unquote(parts.password or ""), host, port, path)
    if not (place.is_here or host in hosts):
        raise FetchError(
            f"a message names a file on {host!r}, which is not allowed: {HOSTS} lists the hosts to fetch from besides this one"
        )
    if not path or any(part in ("", ".", "..") or part != part.strip() or set(part) & set("/\\\0\r\n") for part in path):
        raise FetchError(f"a message names a file by a path that is not plain: {'/'.join(path)!r}")
    return place


class FtpFiles:
    """Fetches and deletes. One thread at a time. Connections are kept while they are good.

    Args:
        idle_s: how long a server may say nothing.
        whole_s: how long a file may take.
    """

    def __init__(self, *, idle_s: float = _IDLE_S, whole_s: float = _WHOLE_S) -> None:
        self._idle_s, self._whole_s = idle_s, whole_s
        self._connections: OrderedDict[tuple[str, int, str, str], ftplib.FTP] = OrderedDict()

    def fetch(self, place: Place, write: Callable[[bytes], object], most_bytes: int) -> None:
        """Hands over a file in blocks.

        Raises:
            FetchError: it is not there, is too large, or did not come in time.
        """
        until, size = time.monotonic() + self._whole_s, 0

        def take(block: bytes) -> None:
            nonlocal size
            size += len(block)
            if size > most_bytes:
                raise FetchError(f"{place.shown} has more than {most_bytes:,} bytes")
            if time.monotonic() > until:
                raise FetchError(f"{place.shown} did not come whole within {self._whole_s:g} s: {size:,} bytes")
            write(block)

        self._do(place, lambda ftp: ftp.retrbinary(f"RETR {'/'.join(place.path)}", take, _BLOCK), begun=lambda: size > 0)

    def delete(self, place: Place) -> None:
        """Deletes a file; one that is gone is done with.

        Raises:
            FetchError: the server does not let it.
        """
        try:
            self._do(place, lambda ftp: ftp.delete("/".join(place.path)), begun=lambda: False)
        except FetchError as exc:
            cause = exc.__cause__
            if not (isinstance(cause, ftplib.error_perm) and str(cause).startswith(_GONE) and not self._is_there(place)):
                raise

    def _is_there(self, place: Place) -> bool:
        with suppress(FetchError):
            self._do(place, lambda ftp: ftp.size("/".join(place.path)), begun=lambda: False)
            return True
        return False

    def close(self) -> None:
        """Ends the connections. It may be used again."""
        while self._connections:
            self._hang_up(self._connections.popitem()[1])

    # --- connections --------------------------------------------------------------------------------------------

    def _do(self, place: Place, work: Callable[[ftplib.FTP], object], *, begun: Callable[[], bool]) -> None:
        """Works over a connection that is there, and once more over a new one if that had been closed meanwhile."""
        key = (place.host, place.port, place.user, place.password)
        kept = self._connections.pop(key, None)
        if kept is not None:
            try:
                work(kept)
            except ftplib.error_perm as exc:
                self._connections[key] = kept
                raise FetchError(f"{place.shown}: {exc}") from exc
            except (*_TROUBLE, FetchError) as exc:
                self._hang_up(kept)
                if isinstance(exc, FetchError) or begun():
                    raise exc if isinstance(exc, FetchError) else FetchError(f"{place.shown}: {exc}") from exc
            else:
                self._connections[key] = kept
                return
        ftp = self._connect(place)
        try:
            work(ftp)
        except ftplib.error_perm as exc:
            self._connections[key] = ftp
            raise FetchError(f"{place.shown}: {exc}") from exc
        except BaseException as exc:
            self._hang_up(ftp)
            if isinstance(exc, _TROUBLE):
                raise FetchError(f"{place.shown}: {exc or type(exc).__name__}") from exc
            raise
        self._connections[key] = ftp
        if len(self._connections) > _MOST_CONNECTIONS:
            self._hang_up(self._connections.popitem(last=False)[1])

    def _connect(self, place: Place) -> ftplib.FTP:
        ftp = ftplib.FTP(timeout=self._idle_s)
        try:
            ftp.connect(place.host, place.port)
            ftp.login(place.user, place.password)
        except _TROUBLE as exc:
            self._hang_up(ftp)
            raise FetchError(f"{place.shown}: no connection to the server: {exc or type(exc).__name__}") from exc
        return ftp

    @staticmethod
    def _hang_up(ftp: ftplib.FTP) -> None:
        with suppress(Exception):
            ftp.close()


# What `ftplib` raises where a server misbehaves: its own, those of sockets, a reply that is none, one that is too long.
_TROUBLE = (ftplib.Error, OSError, EOFError, ValueError)


__all__ = ("FtpFiles", "Place", "allowed_hosts", "own_url", "place_of")
