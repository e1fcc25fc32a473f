"""What a `pulsar://` URL and the environment say: where the broker is, who one is to it, where its admin API is. Secrets stay in here."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from edgeserve.core.errors import ConfigurationError, TransportError
from edgeserve.transport.url import NodeURL, without_secrets

_KNOWN = ("token", "token_file", "oauth2", "tls_ca", "tls_cert", "tls_key", "admin", "deadline_s", "retention_mb", "retention_s")
_ENVIRONMENT = "EDGESERVE_PULSAR_"
# Where Debian, Red Hat, SUSE and Alpine keep them: a Python of one's own does not always know.
_SYSTEM_CA = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True)
class Settings:
    """A connection's settings.

    Attributes:
        service: for the client, 'pulsar://host:6650'.
        shown: the node URL without secrets.
        space: 'tenant/namespace' of topics without their own.
        admin: base URL of the admin API.
        deadline_s: how long to wait for a broker that is away; None: for ever.
        retention_mb, retention_s: asked for topics that are written to; None: the broker's.
    """

    service: str
    shown: str
    space: str
    admin: str
    tls: bool
    deadline_s: float | None = None
    retention_mb: float | None = None
    retention_s: float | None = None
    token: str | None = field(default=None, repr=False)
    oauth2: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each broker."""
        usual = 6651 if self.tls else 6650
        found = (_host_and_port(where) for where in self.service.partition("://")[2].split(","))
        return [(host, port or usual) for host, port in found]

    @property
    def ca_file(self) -> str | None:
        """The authorities that are trusted. Pulsar's client, told none, trusts those of the package certifi, and not what an organization
        has added to the system's."""
        usual = (ssl.get_default_verify_paths().cafile, *_SYSTEM_CA)
        return self.tls_ca or next((path for path in usual if path is not None and os.path.isfile(path)), None)

    def tls_context(self) -> ssl.SSLContext | None:
        """For what speaks TLS beside the client."""
        if not self.tls and not self.admin.startswith("https"):
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.tls_cert:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        return context


def settings_from(url: NodeURL) -> Settings:
    """The settings that a URL and the environment give."""
    url.only(*_KNOWN)
    host, _, path = url.path.partition("/")
    if not host:
        raise ConfigurationError(f"{url.scheme}:// needs a host, as in {url.scheme}://server-address:6650")
    if "@" in host:
        raise ConfigurationError(f"{url.scheme}://: Pulsar has no user names; give a token by token= or {_ENVIRONMENT}TOKEN")
    space = path.strip("/") or "public/default"
    if space.count("/") != 1:
        raise ConfigurationError(f"{url.shown}: the path is a tenant and a namespace, as in /public/default")
    given = url.parameters

    def setting(name: str) -> str | None:
        return given.get(name) or os.environ.get(_ENVIRONMENT + name.upper()) or None

    token, token_file = setting("token"), setting("token_file")
    if token is None and token_file is not None:
        token = _read(token_file, "token_file").strip()
    oauth2 = setting("oauth2")
    tls = url.scheme == "pulsar+ssl"
    admin = setting("admin")
    if "@" in (admin or ""):
        raise ConfigurationError(f"{url.shown}: admin= and {_ENVIRONMENT}ADMIN take no user: give a token by token= or {_ENVIRONMENT}TOKEN")
    if admin is not None and not admin.startswith(("http://", "https://")):
        said = without_secrets(admin)
        raise ConfigurationError(f"{url.shown}: admin={said} is no URL of an admin API: write admin=http://{said}")
    try:
        first, *_ = [_host_and_port(where)[0] for where in host.split(",")]
    except ValueError:
        # What the exceptions say quotes the text.
        text = f"{url.shown}: each broker is a name or an address with a port, as in {url.scheme}://[::1]:6650"
        raise ConfigurationError(text) from None
    first = f"[{first}]" if ":" in first else first
    for name in ("tls_ca", "tls_cert", "tls_key"):
        path_ = setting(name)
        if path_ is not None and not os.path.isfile(path_):
            raise ConfigurationError(f"{name}={path_}: there is no such file")
    return Settings(
        service=f"{url.scheme}://{host}",
        shown=url.shown,
        space=space,
        admin=(admin or (f"https://{first}:8443" if tls else f"http://{first}:8080")).rstrip("/"),
        tls=tls,
        deadline_s=url.number("deadline_s", 1) if "deadline_s" in given else None,
        retention_mb=url.number("retention_mb", 1) if "retention_mb" in given else None,
        retention_s=url.number("retention_s", 1) if "retention_s" in given else None,
        token=token,
        oauth2=None if oauth2 is None else _read(oauth2, "oauth2"),
        tls_ca=setting("tls_ca"),
        tls_cert=setting("tls_cert"),
        tls_key=setting("tls_key"),
    )


def _host_and_port(where: str) -> tuple[str, int | None]:
    """Of one broker; `ValueError` when it is none."""
    parts = urlsplit(f"//{where}")
    if not parts.hostname:
        raise ValueError("one of the brokers has no name")
    return parts.hostname, parts.port


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{what}={path}: cannot be read: {exc}") from exc


class BrokerAway(TransportError, TimeoutError):
    """The broker did not answer before the deadline that the user set."""


__all__ = ("BrokerAway", "Settings", "settings_from")
