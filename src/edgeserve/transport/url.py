"""Node URLs, and the engines that their schemes name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from urllib.parse import parse_qsl, urlsplit

from edgeserve.core.errors import ConfigurationError, UnknownScheme
from edgeserve.transport.base import Transport

ENTRY_POINTS = "edgeserve.transports"
_BUILT_IN = {
    "memory": "edgeserve.transport.memory:connect",
    "local": "edgeserve.transport.local:connect",
    "pulsar": "edgeserve.transport.pulsar:connect",
    "pulsar+ssl": "edgeserve.transport.pulsar:connect",
    "nats": "edgeserve.transport.nats:connect",
    "nats+tls": "edgeserve.transport.nats:connect",
}
_WITHOUT_SERVER = frozenset(("memory", "local"))
_SECRET = frozenset(("token", "password"))
_open: dict[tuple[int, str], tuple[Transport, int]] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class NodeURL:
    """A node URL in its parts."""

    text: str
    scheme: str
    path: str
    parameters: dict[str, str]

    @property
    def shown(self) -> str:
        """The URL for people: without user, password and token."""
        return without_secrets(self.text)

    def only(self, *known: str) -> None:
        """Refuses parameters that the engine does not know."""
        for name in self.parameters:
            if name not in known:
                raise ConfigurationError(f"{self.shown}: unknown parameter {name!r}; {self.scheme}:// knows {', '.join(known)}")

    def number(self, name: str, default: float) -> float:
        """A positive number from the parameters."""
        text = self.parameters.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"{self.shown}: {name}= must be a number above 0, not {text!r}")
        return value


def without_secrets(text: str) -> str:
    """A node URL as messages may show it."""
    parts = urlsplit(text)
    query = "&".join(
        f"{name}=***" if name in _SECRET else f"{name}={value}" for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + (f"?{query}" if query else "")


def parse(text: str) -> NodeURL:
    """Splits a node URL; `ConfigurationError` says what is wrong with it."""
    if not isinstance(text, str) or "://" not in text:
        raise ConfigurationError(f"a node is a URL such as 'local://', not {text!r}")
    try:
        os.fsencode(text)
        parts = urlsplit(text)
    except ValueError as exc:
        raise ConfigurationError(f"the node URL {text!r} cannot be read ({exc}): name one such as 'local:///var/lib/edgeserve'") from exc
    if "\0" in text:
        raise ConfigurationError(f"the node URL {text!r} has a NUL in it, which no path can hold: leave it out")
    if parts.fragment:
        raise ConfigurationError(f"{without_secrets(text)}: a node URL has no part after '#'")
    if parts.scheme not in _WITHOUT_SERVER:
        _check_ports(text, parts.netloc)
    return NodeURL(text, parts.scheme, parts.netloc + parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)))


def _check_ports(text: str, netloc: str) -> None:
    for server in netloc.rpartition("@")[2].split(","):
        port = server.rpartition(":")[2]
        if port.isdigit() and ":" in server and not 0 < int(port) <= 65535:
            raise ConfigurationError(f"{without_secrets(text)}: there is no port {port}: they go from 1 to 65535")


def _factory(url: NodeURL) -> Callable[[NodeURL], Transport]:
    if url.scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[url.scheme].partition(":")
        factory: Callable[[NodeURL], Transport] = getattr(import_module(module), name)
        return factory
    others = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if url.scheme in others:
        factory = others[url.scheme].load()
        return factory
    known = ", ".join(f"{s}://" for s in sorted({*_BUILT_IN, *others}))
    raise UnknownScheme(
        f"no engine for {url.scheme}:// in {url.shown!r}; known: {known}. Others come as packages with the entry point {ENTRY_POINTS}"
    )


def connect(text: str) -> Transport:
    """Connects to the engine that a node URL names. Nodes of one process share the connection: as many closes as connects end it."""
    url = parse(text)
    key = (os.getpid(), text)
    with _lock:
        if key in _open:
            transport, users = _open[key]
            _open[key] = (transport, users + 1)
            return transport
        transport = _factory(url)(url)
        _open[key] = (transport, 1)
        return transport


def disconnect(transport: Transport) -> None:
    """Gives back what `connect` gave; the last user closes it."""
    with _lock:
        key = next((k for k, (known, _) in _open.items() if known is transport and k[0] == os.getpid()), None)
        if key is None:
            return
        users = _open[key][1]
        if users > 1:
            _open[key] = (transport, users - 1)
        else:
            del _open[key]
            transport.close()


__all__ = ("ENTRY_POINTS", "NodeURL", "connect", "disconnect", "parse")
