"""What `edgeserve doctor` looks at in a broker: the settings that decide how fast edgeserve is there, and what is lost."""

from __future__ import annotations

import asyncio
import urllib.error
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgeserve.cli.checks import Check
from edgeserve.core.errors import ConfigurationError, TransportError
from edgeserve.transport.nats.greeting import Away, Refused
from edgeserve.transport.nats.settings import Settings, settings_from
from edgeserve.transport.url import NodeURL, parse, scrubbed

if TYPE_CHECKING:
    from edgeserve.transport.pulsar.admin import Admin

_ANSWER_S = 5.0
_KIB, _MIB = 1024, 1024 * 1024
_RETENTION = "bin/pulsar-admin namespaces set-retention {space} --time 1d --size 512M"
_IN_CONF = "set {name}={value} in the broker's broker.conf (or standalone.conf) and restart it"


def engine_checks(url: str) -> Iterator[Check]:
    """Looks at the broker behind a node URL; nothing where there is none, or where the URL is wrong, which the check of the node says."""
    try:
        node = parse(url)
        look = _BY_SCHEME.get(node.scheme)
        for check in look(node) if look is not None else ():
            yield Check(check.status, check.name, scrubbed(check.seen, url), scrubbed(check.to_do, url))
    except ConfigurationError:
        return


# --- Pulsar ---------------------------------------------------------------------------------------------------


def _pulsar(node: NodeURL) -> Iterator[Check]:
    # Only here: they load the client, and a doctor has to get up without it.
    from edgeserve.transport.pulsar.admin import Admin
    from edgeserve.transport.pulsar.settings import settings_from

    settings = settings_from(node)
    try:
        admin = Admin(settings)
        found = admin.call("brokers/configuration/runtime", needed_for="what the broker is set to")
        if not isinstance(found, dict):
            raise ValueError("the answer is not what Pulsar says")
    except (TransportError, OSError, ValueError) as exc:
        yield Check("WARN", "pulsar admin", f"{settings.admin} does not tell the broker's settings: {_reason(exc)}", _admin_to_do(exc))
        return
    yield Check("PASS", "pulsar admin", f"{settings.admin} answers")
    yield from _pulsar_settings(found)
    try:
        yield from _retention(admin, found, settings.space)
    except (TransportError, OSError, ValueError) as exc:
        yield Check("WARN", "pulsar retention", f"cannot be told: {_reason(exc)}", _admin_to_do(exc))


def _reason(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _admin_to_do(exc: Exception) -> str:
    cause = exc.__cause__
    if isinstance(cause, urllib.error.HTTPError) and cause.code in (401, 403):
        return "the broker's settings are for its administrators: run it with a token of one, or ask them to"
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


def _retention(admin: Admin, settings: dict[str, Any], space: str) -> Iterator[Check]:
    policy = admin.call(f"namespaces/{space}/retention")
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
    inactive = admin.call(f"namespaces/{space}/inactiveTopicPolicies")
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


def _nats(node: NodeURL) -> Iterator[Check]:
    settings = settings_from(node)
    if find_spec("nats") is None or find_spec("nkeys") is None:
        yield Check("WARN", "nats server", "the client is not installed", "pip install 'edgeserve-streams[nats]'")
        return
    try:
        info, account = asyncio.run(_nats_answers(settings))
    except Away as exc:
        yield Check("WARN", "nats server", _reason(exc), "start it: edgeserve broker start nats; or correct the URL")
        return
    except Refused as exc:
        to_do = "correct the URL or the server; credentials: token=, user:password@, creds= or nkey= in the URL, or EDGESERVE_NATS_*"
        yield Check("FAIL", "nats server", _reason(exc), to_do)
        return
    version = str(info.get("version", ""))
    if not info.get("jetstream"):
        to_do = "start it with JetStream: nats-server --jetstream --store_dir DIRECTORY, or jetstream {} in its configuration"
        yield Check("FAIL", "nats jetstream", f"is not enabled on {settings.where} (NATS {version})", to_do)
        return
    yield Check("PASS", "nats jetstream", f"is enabled (NATS {version})")
    size = info.get("max_payload")
    if isinstance(size, int) and size >= _MIB:
        yield Check("PASS", "nats message size", f"up to {size / _MIB:g} MiB; larger ones in parts")
    else:
        seen = f"max_payload={size}: larger messages go in parts, which is slower"
        yield Check("WARN", "nats message size", seen, "set max_payload: 1MB in the server's configuration")
    yield _nats_storage(account)


async def _nats_answers(settings: Settings) -> tuple[dict[str, Any], Any]:
    """What the server says of itself, and what of the account or why it does not; reached as a node reaches it."""
    # Only here: the client is an extra.
    from edgeserve.transport.nats.dial import dial

    client = await dial(settings, lambda: None, lambda _: None)
    try:
        account = await client.jetstream(timeout=_ANSWER_S).account_info()
    except Exception as exc:
        return client._server_info, exc
    else:
        return client._server_info, account
    finally:
        await client.close()


def _nats_storage(account: Any) -> Check:
    """What the account may store."""
    title = "nats storage"
    if isinstance(account, Exception):
        to_do = "let the user ask $JS.API.INFO, and enable JetStream for the account"
        return Check("FAIL", title, f"the account cannot be asked: {_reason(account)}", to_do)
    used, limit, in_memory = account.storage, account.limits.max_storage, account.limits.max_memory
    if limit is None or limit < 0:
        return Check("PASS", title, f"{used / _MIB:.1f} MiB used; no limit of the account's, the server's max_file_store holds")
    if limit == 0:
        seen = f"the account may store nothing on disk (in memory: {_amount(in_memory, 'bytes')})"
        return Check("FAIL", title, seen, "give the account disk storage, max_file or disk_storage in the server's configuration")
    seen = f"{used / _MIB:.1f} of {limit / _MIB:.1f} MiB used"
    if used >= 0.8 * limit:
        return Check("WARN", title, seen, "give the account more, or keep less: retention_mb= or retention_s= in the node URL")
    return Check("PASS", title, seen)


_BY_SCHEME: dict[str, Callable[[NodeURL], Iterator[Check]]] = {
    "pulsar": _pulsar,
    "pulsar+ssl": _pulsar,
    "nats": _nats,
    "nats+tls": _nats,
}

__all__ = ("engine_checks",)
