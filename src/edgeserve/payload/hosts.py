"""Payloads between hosts: what a process serves of this host's, and fetches of others', for all nodes in it."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import ssl
import stat
import threading
from pathlib import Path
from urllib.parse import urlsplit

from edgeserve.core.errors import ConfigurationError
from edgeserve.payload.fetch import Fetcher
from edgeserve.payload.origins import Origins
from edgeserve.payload.place import payload_base
from edgeserve.payload.reference import Reference
from edgeserve.payload.server import PayloadServer

_log = logging.getLogger("edgeserve")

PORT = 7465
_TOKEN, _FETCHED = "token", "fetched"
_HOST = re.compile(r"[0-9a-z._-]+|[0-9a-f:.]+")
_LOOPBACK = ("localhost", "127.", "::1")
_LOOK_S = 0.5


def advertised() -> tuple[str, int] | None:
    """Under which address and port other hosts reach this one, `$EDGESERVE_ADVERTISE`; None: they do not.

    Raises:
        ConfigurationError: the variable is no `host` or `host:port`.
    """
    given = os.environ.get("EDGESERVE_ADVERTISE")
    if not given:
        return None
    try:
        parts = urlsplit(f"//{given}")
        if parts.hostname and _HOST.fullmatch(parts.hostname) and given == parts.netloc and "@" not in given and parts.port != 0:
            return parts.hostname, parts.port or PORT
    except ValueError:
        pass
    raise ConfigurationError(f"EDGESERVE_ADVERTISE={given!r}: the address of this machine for others is wanted, host or host:port")


def token_of(base: Path) -> str:
    """What the servers of this user and host ask for: made once, kept in a file that only this user can read.

    Raises:
        ConfigurationError: others can read or write it.
    """
    path = base / _TOKEN
    if not path.exists():
        _make_token(path)
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(f"{path} has the token for this host's payloads, and others can read it: remove it")
    return path.read_text(encoding="ascii")


def _make_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{_TOKEN}.{secrets.token_hex(8)}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            os.link(new, path)  # whole, or another process's
        except FileExistsError:
            pass
    finally:
        new.unlink(missing_ok=True)


def _certificate() -> ssl.SSLContext | None:
    cert = os.environ.get("EDGESERVE_PAYLOAD_CERT")
    if not cert:
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, os.environ.get("EDGESERVE_PAYLOAD_KEY") or None)
    except OSError as exc:
        raise ConfigurationError(
            f"EDGESERVE_PAYLOAD_CERT={cert!r} cannot be used: {exc}; a certificate in PEM is wanted, and its key in EDGESERVE_PAYLOAD_KEY "
            "if it is not in the same file"
        ) from exc
    return context


def _bound(host: str) -> str:
    """Where a server listens that others reach as `host`; "": everywhere."""
    return host if host.startswith(_LOOPBACK) else ""


class _Hosts:
    """One for a process: by address a server and for how many nodes it is, a fetcher and for how many."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.servers: dict[tuple[str, int], tuple[PayloadServer, int]] = {}
        self.fetcher: Fetcher | None = None
        self.fetching = 0


_hosts = _Hosts()


def _after_fork() -> None:
    global _hosts
    _hosts = _Hosts()


os.register_at_fork(after_in_child=_after_fork)


class Serving:
    """That this process serves, for as long as a node needs it.

    Attributes:
        origin: where from others fetch what is kept here; "": this host advertises no address.
        token: for who fetches.

    Raises:
        ConfigurationError, TransportError: it cannot serve as the settings say.
    """

    def __init__(self) -> None:
        self._hosts, self.origin, self.token, self._closed = _hosts, "", "", False
        address = self._address = advertised()
        if address is None:
            _log.warning("EDGESERVE_ADVERTISE is not set: payloads of routing='lazy' can be read on this machine only")
            return
        (host, port), token = address, token_of(payload_base())
        with _hosts.lock:
            server, nodes = _hosts.servers.get(address, (None, 0))
            if server is None:
                # Others of this user and host may serve at the same port.
                server = PayloadServer(payload_base(), host=_bound(host), port=port, token=token, tls=_certificate())
                server.start()
            _hosts.servers[address] = server, nodes + 1
        shown = f"[{host}]" if ":" in host else host
        self.origin = f"{'https' if os.environ.get('EDGESERVE_PAYLOAD_CERT') else 'http'}://{shown}:{port}"
        self.token = token

    def is_served(self) -> bool:
        """Whether somebody on this host serves at its address now, this process or another."""
        if self._address is None:
            return False
        host, port = self._address
        try:
            socket.create_connection((_bound(host) or "127.0.0.1", port), _LOOK_S).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Idempotent. The last one in the process ends its server."""
        address = self._address
        if address is None or self._closed:
            return
        self._closed = True
        with self._hosts.lock:
            server, nodes = self._hosts.servers.pop(address)
            if nodes > 1:
                self._hosts.servers[address] = server, nodes - 1
        if nodes == 1:
            server.close()


class Fetching:
    """Fetches from other hosts, as far as `EDGESERVE_ORIGINS` allows it, from when it is first asked to until it is closed. Thread-safe.

    Raises:
        ConfigurationError: the variable is no list of hosts and networks.
    """

    def __init__(self) -> None:
        self._hosts = _hosts
        self._origins = Origins(os.environ)
        self._fetcher: Fetcher | None = None

    def fetch(self, reference: Reference) -> memoryview:
        """See `Fetcher.fetch`."""
        return self._ready().fetch(reference)

    def _ready(self) -> Fetcher:
        hosts = self._hosts
        with hosts.lock:
            if self._fetcher is None:
                if hosts.fetcher is None:
                    cafile = os.environ.get("EDGESERVE_PAYLOAD_CA") or None
                    hosts.fetcher = Fetcher(payload_base() / _FETCHED, cafile=cafile, origins=self._origins)
                hosts.fetching += 1
                self._fetcher = hosts.fetcher
            return self._fetcher

    def close(self) -> None:
        """Idempotent."""
        fetcher = None
        with self._hosts.lock:
            if self._fetcher is not None:
                self._fetcher = None
                self._hosts.fetching -= 1
                if not self._hosts.fetching:
                    fetcher, self._hosts.fetcher = self._hosts.fetcher, None
        if fetcher is not None:
            fetcher.close()


__all__ = ("PORT", "Fetching", "Serving", "advertised", "token_of")
