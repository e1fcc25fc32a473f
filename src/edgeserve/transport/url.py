"""Node URLs, and the engines that their schemes name."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

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
_SERVERS = frozenset(("pulsar", "pulsar+ssl", "nats", "nats+tls"))
_SECRET = frozenset(("token", "password", "secret", "oauth2"))
_HIDDEN = "***"
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):(//)?", re.IGNORECASE)
_WITHOUT_SLASHES = re.compile(r"\s*([a-z][a-z0-9+.-]*)[:;]?\s*(/*)(.*)", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:^|[?&;/#])([^?&;/#=]+)=")
_NEXT_PARAMETER = re.compile(r"&[\w%.+-]+=|$")
_open: dict[tuple[int, str], tuple[Transport, int]] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class NodeURL:
    """A node URL in its parts."""

    text: str = field(repr=False)
    scheme: str
    path: str = field(repr=False)
    parameters: dict[str, str] = field(repr=False)

    @property
    def shown(self) -> str:
        """The URL for people: without user, password and token."""
        return without_secrets(self.text)

    def only(self, *known: str) -> None:
        """Refuses parameters that the engine does not know."""
        for name in self.parameters:
            if name not in known:
                said = self._quoted(name)
                raise ConfigurationError(f"{self.shown}: unknown parameter {said}; {self.scheme}:// knows {', '.join(known)}")

    def number(self, name: str, default: float) -> float:
        """A positive number from the parameters."""
        text = self.parameters.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"{self.shown}: {name}= must be a number above 0, not {self._quoted(text or '')}")
        return value

    def _quoted(self, part: str) -> str:
        """A name or a value, if the URL shows it: what looks like a parameter may be the rest of a password that has a '?' or '&' in it."""
        there = re.search(rf"[?&=]{re.escape(part)}(?=[=&]|$)", self.shown)
        return repr(part if there else _HIDDEN)


def without_secrets(text: str) -> str:
    """A node URL, well-formed or not, as messages may show it: whatever may be a user, a password or a token is `***`.

    The raw text is looked at and not a URL's parts, which are others than meant where a password has a '/', '?', '#' or '[' in it.

    >>> without_secrets("nats://me:s3/cret@host:4222?Token=s3cret&replicas=3")
    'nats://***@host:4222?Token=***&replicas=3'
    """
    shown, end = "", 0
    for begin, stop in sorted(_secret_spans(text)):
        if begin > end or not shown:
            shown += text[end:begin] + _HIDDEN
        end = max(end, stop)
    return shown + text[end:]


def scrubbed(text: str, url: str) -> str:
    """A text of others that may quote a node URL, or what is secret in it, as messages may show it."""
    if not url:
        return text
    text = text.replace(url, without_secrets(url))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def _secret_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where in a node URL something secret may stand; such places may overlap."""
    scheme = _SCHEME.match(text)
    begin = scheme.end() if scheme and (scheme[2] or scheme[1].lower() in _BUILT_IN) else 0
    names_a_path = scheme is not None and scheme[1].lower() == "local" and text.startswith("/", begin)
    at = text.rfind("@")
    if at >= begin and not names_a_path:
        yield begin, at
    for parameter in _PARAMETER.finditer(text):
        if "".join(unquote_plus(parameter[1]).split()).lower() in _SECRET:
            following = _NEXT_PARAMETER.search(text, parameter.end())
            yield parameter.end(), following.start() if following else len(text)


def _secrets(url: str) -> set[str]:
    """What others may quote of a URL's secrets: as it is written and as it is meant, a password with its user and without."""
    hidden = [url[begin:end] for begin, end in _secret_spans(url)]
    written = {part for each in hidden for part in (each, each.partition(":")[2] or each.rstrip(":"), each.partition("#")[0])}
    return {secret for each in written for secret in (each, unquote(each)) if len(secret) > 2}


def parse(text: str) -> NodeURL:
    """Splits a node URL; `ConfigurationError` says what is wrong with it."""
    if not isinstance(text, str):
        raise ConfigurationError(f"a node is a URL such as 'local://', not a {type(text).__name__}")
    shown = without_secrets(text)
    if "://" not in text:
        raise ConfigurationError(f"a node is a URL such as 'local://' or 'nats://host:4222', not {shown!r}{_meant(shown)}")
    # What the exceptions say quotes the text.
    try:
        os.fsencode(text)
    except ValueError:
        raise ConfigurationError(f"the node URL {shown!r} has a character in it that no path can hold: leave it out") from None
    if "\0" in text:
        raise ConfigurationError(f"the node URL {shown!r} has a NUL in it, which no path can hold: leave it out")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ConfigurationError(
            f"the host of the node URL {shown!r} cannot be read: only an IPv6 address stands in brackets, as in nats://[::1]:4222; "
            "in a password write '[' as %5B and ']' as %5D"
        ) from None
    if parts.scheme in _SERVERS and "@" in parts.path + parts.query + parts.fragment:
        raise ConfigurationError(
            f"{shown}: an '@' behind the host, or a '/', '?' or '#' before it, is not read as it is meant: "
            "in a user, a password or a parameter write %40, %2F, %3F and %23"
        )
    if parts.fragment:
        raise ConfigurationError(f"{shown}: a node URL has no part after '#'")
    if parts.scheme not in _WITHOUT_SERVER:
        _check_ports(shown, parts.netloc)
    return NodeURL(text, parts.scheme, parts.netloc + parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)))


def _meant(shown: str) -> str:
    """The URL that was most likely meant by one without `://`, as far as it may be shown."""
    found = _WITHOUT_SLASHES.match(shown)
    if found is None or (scheme := found[1].lower()) not in _BUILT_IN:
        return ""
    rest = found[3] if scheme in _SERVERS else found[2][:1] + found[3]
    return f": did you mean {f'{scheme}://{rest}'!r}?"


def _check_ports(shown: str, netloc: str) -> None:
    for server in netloc.rpartition("@")[2].split(","):
        port = re.search(r":([0-9]+)$", server)
        # One that is not shown is no port, but a part of a password with a '/' in it.
        if port is None or port[0] not in shown or (len(port[1]) < 6 and 0 < int(port[1]) <= 65535):
            continue
        raise ConfigurationError(f"{shown}: there is no port {port[1]}: they go from 1 to 65535")


def server_is_here(text: str) -> bool:
    """Whether what a node URL names is on this machine: an embedded store, or the one server that it names, by its address."""
    url = parse(text)
    if url.scheme in _WITHOUT_SERVER:
        return True
    servers = url.path.rpartition("@")[2].partition("/")[0].split(",")
    host = urlsplit(f"//{servers[0]}").hostname
    if len(servers) > 1 or not host:
        return False
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as taken:
                taken.bind(address)  # nobody can have an address of another machine's
        return True
    except (OSError, UnicodeError):
        return False


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


__all__ = ("ENTRY_POINTS", "NodeURL", "connect", "disconnect", "parse", "scrubbed", "server_is_here", "without_secrets")
