"""What a NATS node URL and the environment say: servers, credentials, TLS, namespace, deadline, retention."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edgeserve.core.errors import ConfigurationError
from edgeserve.transport import records
from edgeserve.transport.url import NodeURL

_DEFAULT_PORT = 4222
_PARAMETERS = (
    "token",
    "creds",
    "nkey",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "tls_first",
    "deadline_s",
    "replicas",
    "retention_mb",
    "retention_s",
)


@dataclass(frozen=True)
class Settings:
    """A node URL, read. `options` are the client's; `shown` is the URL without secrets."""

    shown: str
    hosts: tuple[tuple[str, int], ...]
    namespace: str
    tls: ssl.SSLContext | None
    tls_first: bool
    deadline_s: float | None
    replicas: int
    limits: records.Limits
    options: dict[str, Any] = field(repr=False)

    @property
    def servers(self) -> list[str]:
        """The servers as the client takes them."""
        scheme = "tls" if self.tls else "nats"
        return [f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}" for host, port in self.hosts]

    @property
    def where(self) -> str:
        """The servers for people."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)


def settings_from(url: NodeURL, environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads a node URL; `ConfigurationError` says what is wrong with it. What it does not say is taken from EDGESERVE_NATS_*."""
    url.only(*_PARAMETERS)
    parts = urlsplit(url.text)
    userinfo, _, hosts = parts.netloc.rpartition("@")

    def given(name: str) -> str:
        return url.parameters.get(name) or environment.get(f"EDGESERVE_NATS_{name.upper()}", "")

    deadline_s = url.number("deadline_s", 1) if "deadline_s" in url.parameters else None
    return Settings(
        url.shown,
        tuple(_host(url, text) for text in hosts.split(",")),
        unquote(parts.path.strip("/")),
        _tls(url, given) if url.scheme == "nats+tls" else None,
        url.parameters.get("tls_first", "0") not in ("", "0", "false"),
        deadline_s,
        int(url.number("replicas", 1)),
        records.limits_from(url),
        _credentials(url, userinfo, given),
    )


def _host(url: NodeURL, text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or (port is None and not text.endswith(host) and not text.endswith("]")):
        wrong = "the port is no number" if ":" in text.strip(":") and not text.startswith("[") else "the URL names no server"
        raise ConfigurationError(f"{url.shown}: {wrong}; write {url.scheme}://HOST:{_DEFAULT_PORT}/NAMESPACE")
    return host, port or _DEFAULT_PORT


def _file(url: NodeURL, name: str, path: str) -> str:
    if not Path(path).is_file() or not os.access(path, os.R_OK):
        raise ConfigurationError(f"{url.shown}: {name}= names a file that cannot be read: {path}")
    return path


def _credentials(url: NodeURL, userinfo: str, given: Any) -> dict[str, Any]:
    """What the client is to prove itself with: the URL's user, or a token, or a credentials file, or the seed of an nkey."""
    user, colon, password = userinfo.partition(":")
    if user and colon:
        return {"user": unquote(user), "password": unquote(password)}
    if user:
        return {"token": unquote(user)}
    if given("token"):
        return {"token": given("token")}
    if given("creds"):
        return {"user_credentials": _creds(url, _file(url, "creds", given("creds")))}
    if given("nkey"):
        return {"nkeys_seed": _nkey(url, _file(url, "nkey", given("nkey")))}
    if given("user"):
        return {"user": given("user"), "password": given("password")}
    return {}


def _creds(url: NodeURL, path: str) -> str:
    text = Path(path).read_text(errors="replace")
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise ConfigurationError(f"{url.shown}: creds= names {path}, which is no NATS credentials file (a user's JWT and its seed)")
    return path


def _nkey(url: NodeURL, path: str) -> str:
    import nkeys

    try:
        nkeys.from_seed(bytearray(Path(path).read_bytes().strip())).wipe()
    except Exception as exc:
        raise ConfigurationError(f"{url.shown}: nkey= names {path}, which holds no seed of an nkey ({type(exc).__name__})") from None
    return path


def _tls(url: NodeURL, given: Any) -> ssl.SSLContext:
    ca, cert, key = given("tls_ca"), given("tls_cert"), given("tls_key")
    if key and not cert:
        raise ConfigurationError(f"{url.shown}: tls_key= without tls_cert=")
    try:
        context = ssl.create_default_context(cafile=_file(url, "tls_ca", ca) if ca else None)
        if cert:
            context.load_cert_chain(_file(url, "tls_cert", cert), _file(url, "tls_key", key) if key else None)
    except (ssl.SSLError, OSError) as exc:
        if isinstance(exc, ConfigurationError):
            raise
        raise ConfigurationError(f"{url.shown}: tls_ca=, tls_cert= or tls_key= holds no certificate or key that fits: {exc}") from exc
    return context


__all__ = ("Settings", "settings_from")
