"""What `edgeserve doctor` looks at in a broker: the settings that decide how fast edgeserve is there, and what is lost."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from edgeserve.cli.brokers.nats import read_info
from edgeserve.cli.checks import Check, shown, without_secrets

_ANSWER_S = 5.0
_KIB, _MIB = 1024, 1024 * 1024
_RETENTION = "bin/pulsar-admin namespaces set-retention {space} --time 1d --size 512M"
_IN_CONF = "set {name}={value} in the broker's broker.conf (or standalone.conf) and restart it"


def engine_checks(url: str) -> Iterator[Check]:
    """Looks at the broker behind a node URL; nothing where there is none."""
    look = _BY_SCHEME.get(urlsplit(url).scheme)
    if look is None:
        return
    for check in look(url):
        yield Check(check.status, check.name, without_secrets(check.seen, url), without_secrets(check.to_do, url))


def _given(url: str, name: str, environment: str) -> str:
    return dict(parse_qsl(urlsplit(url).query)).get(name) or os.environ.get(environment + name.upper(), "")


# --- Pulsar ---------------------------------------------------------------------------------------------------


def admin_url(url: str) -> str:
    """Base URL of Pulsar's admin API: `admin=`, else EDGESERVE_PULSAR_ADMIN, else the broker's host and the usual port.

    >>> admin_url("pulsar://a.example:6650,b.example:6650/public/default?token=x")
    'http://a.example:8080'
    >>> admin_url("pulsar+ssl://broker.example:6651")
    'https://broker.example:8443'
    """
    given = _given(url, "admin", "EDGESERVE_PULSAR_")
    if given:
        return given.rstrip("/")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].partition(",")[0]
    host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return f"https://{host}:8443" if parts.scheme == "pulsar+ssl" else f"http://{host}:8080"


def _namespace(url: str) -> str:
    return urlsplit(url).path.strip("/") or "public/default"


class _Admin:
    """Questions to Pulsar's admin API."""

    def __init__(self, url: str) -> None:
        self.base = admin_url(url)
        self._token = _given(url, "token", "EDGESERVE_PULSAR_")
        file = _given(url, "token_file", "EDGESERVE_PULSAR_")
        if not self._token and file:
            with open(file, encoding="utf-8") as opened:
                self._token = opened.read().strip()
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.base.startswith("https:"):
            context = ssl.create_default_context(cafile=_given(url, "tls_ca", "EDGESERVE_PULSAR_") or None)
            certificate = _given(url, "tls_cert", "EDGESERVE_PULSAR_")
            if certificate:
                context.load_cert_chain(certificate, _given(url, "tls_key", "EDGESERVE_PULSAR_") or None)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str) -> Any:
        """The answer; None for an empty one."""
        request = urllib.request.Request(f"{self.base}/admin/v2/{path}", headers={"Accept": "application/json"})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        with self._opener.open(request, timeout=_ANSWER_S) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None


def _pulsar(url: str) -> Iterator[Check]:
    base = admin_url(url)
    try:
        admin = _Admin(url)
        settings = admin.ask("brokers/configuration/runtime")
        if not isinstance(settings, dict):
            raise ValueError("the answer is not what Pulsar says")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        yield Check("WARN", "pulsar admin", f"{shown(base)} does not tell the broker's settings: {_reason(exc)}", _admin_to_do(exc))
        return
    yield Check("PASS", "pulsar admin", f"{shown(base)} answers")
    yield from _pulsar_settings(settings)
    try:
        yield from _retention(admin, settings, _namespace(url))
    except (OSError, ValueError, http.client.HTTPException) as exc:
        yield Check("WARN", "pulsar retention", f"cannot be told: {_reason(exc)}", _admin_to_do(exc))


def _reason(exc: Exception) -> str:
    if isinstance(exc, urllib.error.HTTPError):
        return f"status {exc.code}"
    return " ".join(str(getattr(exc, "reason", exc)).split())


def _admin_to_do(exc: Exception) -> str:
    if isinstance(exc, urllib.error.HTTPError) and exc.code in (401, 403):
        return "the broker's settings are for its administrators: run it with a token of one, or ask them to"
    if isinstance(exc, urllib.error.HTTPError) and exc.code == 404:
        return "the namespace is not there: bin/pulsar-admin namespaces create TENANT/NAMESPACE"
    return "name the admin API in the node URL, as in pulsar://host:6650?admin=http://host:8080; listing topics needs it, too"


def _number(settings: dict[str, Any], name: str) -> float | None:
    try:
        return float(settings[name])
    except (KeyError, TypeError, ValueError):
        return None


def _pulsar_settings(settings: dict[str, Any]) -> Iterator[Check]:
    name = "acknowledgmentAtBatchIndexLevelEnabled"
    if str(settings.get(name)).lower() == "true":
        yield Check("PASS", "pulsar batch-index acknowledgement", f"{name}=true")
    else:
        seen = f"{name}={settings.get(name)}: after a crash whole batches come back, whose messages edgeserve drops by their ids"
        yield Check("WARN", "pulsar batch-index acknowledgement", seen, _IN_CONF.format(name=name, value="true"))
    for title, name, limit, wanted, why in (
        ("failover delay", "activeConsumerFailoverDelayTimeMillis", 0, 0, "a stand-by waits so many ms before it takes over"),
        ("keep-alive", "keepAliveIntervalSeconds", 10, 3, "a client that hangs is noticed after twice as many seconds"),
        ("entry check delay", "managedLedgerNewEntriesCheckDelayInMillis", 1, 1, "most messages wait so many ms at the broker"),
    ):
        value = _number(settings, name)
        text = f"{name}={settings.get(name)}"
        if value is None:
            yield Check("WARN", f"pulsar {title}", f"the broker does not tell {name}", "see the documentation of that Pulsar version")
        elif value <= limit:
            yield Check("PASS", f"pulsar {title}", text)
        else:
            yield Check("WARN", f"pulsar {title}", f"{text}: {why}", _IN_CONF.format(name=name, value=wanted))
    size = _number(settings, "maxMessageSize")
    if size is None or size >= _MIB:
        seen = "the broker does not tell" if size is None else f"up to {size / _MIB:g} MiB; larger ones in parts"
        yield Check("PASS", "pulsar message size", seen)
    else:
        seen = f"up to {size / _KIB:g} KiB; larger ones go in parts, which is slower"
        yield Check("WARN", "pulsar message size", seen, _IN_CONF.format(name="maxMessageSize", value=5 * _MIB))


def _retention(admin: _Admin, settings: dict[str, Any], space: str) -> Iterator[Check]:
    policy = admin.ask(f"namespaces/{space}/retention")
    names = ("retentionTimeInMinutes", "retentionSizeInMB")
    if isinstance(policy, dict):
        minutes, megabytes = (_number(policy, name) for name in names)
        said_by = f"of {space}"
    else:
        minutes, megabytes = (_number(settings, f"defaultR{name[1:]}") for name in names)
        said_by = "the broker's default"
    kept = minutes != 0 and megabytes != 0
    text = f"{_amount(minutes, 'min')} and {_amount(megabytes, 'MiB')} per topic ({said_by})"
    to_do = _RETENTION.format(space=space)
    if kept:
        yield Check("PASS", "pulsar retention", text)
    else:
        yield Check("WARN", "pulsar retention", f"{text}: messages that no group has subscribed to yet are deleted", to_do)
    inactive = admin.ask(f"namespaces/{space}/inactiveTopicPolicies")
    if isinstance(inactive, dict):
        deletes = bool(inactive.get("deleteWhileInactive"))
        mode, seconds = str(inactive.get("inactiveTopicDeleteMode")), inactive.get("maxInactiveDurationSeconds")
    else:
        deletes = str(settings.get("brokerDeleteInactiveTopicsEnabled")).lower() == "true"
        mode = str(settings.get("brokerDeleteInactiveTopicsMode"))
        seconds = settings.get("brokerDeleteInactiveTopicsMaxInactiveDurationSeconds") or settings.get(
            "brokerDeleteInactiveTopicsFrequencySeconds"
        )
    title = "pulsar inactive topics"
    if not deletes:
        yield Check("PASS", title, "are kept")
    elif mode == "delete_when_no_subscriptions" and kept:
        yield Check("PASS", title, f"without groups are deleted after {seconds} s, but not before their retention is over")
    elif mode == "delete_when_no_subscriptions":
        seen = f"without groups are deleted after {seconds} s, with what they hold: nothing is kept (retention)"
        yield Check("WARN", title, seen, to_do)
    else:
        seen = f"are deleted after {seconds} s even where groups stand on them, which start over then ({mode})"
        yield Check("WARN", title, seen, _IN_CONF.format(name="brokerDeleteInactiveTopicsMode", value="delete_when_no_subscriptions"))


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return f"unknown {unit}"
    return f"any {unit}" if value < 0 else f"{value:g} {unit}"


# --- NATS -----------------------------------------------------------------------------------------------------


def _nats(url: str) -> Iterator[Check]:
    host, port = _nats_server(url)
    try:
        info = read_info(host, port)
    except (OSError, ValueError) as exc:
        yield Check("WARN", "nats server", f"{host}:{port}: {_reason(exc)}", "start it: edgeserve broker start nats; or correct the URL")
        return
    version = str(info.get("version", ""))
    if not info.get("jetstream"):
        to_do = "start it with JetStream: nats-server --jetstream --store_dir DIRECTORY, or jetstream {} in its configuration"
        yield Check("FAIL", "nats jetstream", f"is not enabled on {host}:{port} (NATS {version})", to_do)
        return
    yield Check("PASS", "nats jetstream", f"is enabled (NATS {version})")
    size = info.get("max_payload")
    if isinstance(size, int) and size >= _MIB:
        yield Check("PASS", "nats message size", f"up to {size / _MIB:g} MiB; larger ones in parts")
    else:
        seen = f"max_payload={size}: larger messages go in parts, which is slower"
        yield Check("WARN", "nats message size", seen, "set max_payload: 1MB in the server's configuration")
    yield from _nats_account(url, host, port)


def _nats_server(url: str) -> tuple[str, int]:
    host = urlsplit(url).netloc.rpartition("@")[2].partition(",")[0]
    parts = urlsplit(f"//{host}")
    return parts.hostname or "localhost", parts.port or 4222


def _nats_account(url: str, host: str, port: int) -> Iterator[Check]:
    """What the account may store."""
    title = "nats storage"
    try:
        import nats
    except ImportError:
        yield Check("WARN", title, "the client is not installed", "pip install 'edgeserve-streams[nats]'")
        return
    del nats
    try:
        found = asyncio.run(_account(url, host, port))
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        to_do = "give what the server asks for: token=, creds= or nkey= in the node URL, or EDGESERVE_NATS_TOKEN"
        yield Check("FAIL", title, f"the account cannot be asked: {reason}", to_do)
        return
    used, limit, in_memory = found.storage, found.limits.max_storage, found.limits.max_memory
    if limit is None or limit < 0:
        text = f"{used / _MIB:.1f} MiB used; no limit of the account's, the server's max_file_store holds"
        yield Check("PASS", title, text)
    elif limit == 0:
        seen = f"the account may store nothing on disk (in memory: {_amount(in_memory, 'bytes')})"
        yield Check("FAIL", title, seen, "give the account disk storage, max_file or disk_storage in the server's configuration")
    elif used >= 0.8 * limit:
        seen = f"{used / _MIB:.1f} of {limit / _MIB:.1f} MiB used"
        yield Check("WARN", title, seen, "give the account more, or keep less: retention_mb= or retention_s= in the node URL")
    else:
        yield Check("PASS", title, f"{used / _MIB:.1f} of {limit / _MIB:.1f} MiB used")


async def _account(url: str, host: str, port: int) -> Any:
    import nats

    secure = urlsplit(url).scheme == "nats+tls"
    options: dict[str, Any] = {"allow_reconnect": False, "connect_timeout": _ANSWER_S, "error_cb": _quiet}
    if secure:
        options["tls"] = ssl.create_default_context(cafile=_given(url, "tls_ca", "EDGESERVE_NATS_") or None)
        certificate = _given(url, "tls_cert", "EDGESERVE_NATS_")
        if certificate:
            options["tls"].load_cert_chain(certificate, _given(url, "tls_key", "EDGESERVE_NATS_") or None)
    user, colon, password = urlsplit(url).netloc.rpartition("@")[0].partition(":")
    if colon:
        options |= {"user": unquote(user), "password": unquote(password)}
    elif user:
        options["token"] = unquote(user)
    else:
        for name, option in (("token", "token"), ("creds", "user_credentials"), ("nkey", "nkeys_seed")):
            value = _given(url, name, "EDGESERVE_NATS_")
            if value:
                options[option] = value
                break
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    client = await nats.connect(f"{'tls' if secure else 'nats'}://{where}", **options)
    try:
        return await client.jetstream(timeout=_ANSWER_S).account_info()
    finally:
        await client.close()


async def _quiet(_: Exception) -> None:
    """What goes wrong is raised, too."""


_BY_SCHEME: dict[str, Callable[[str], Iterator[Check]]] = {
    "pulsar": _pulsar,
    "pulsar+ssl": _pulsar,
    "nats": _nats,
    "nats+tls": _nats,
}

__all__ = ("admin_url", "engine_checks")
