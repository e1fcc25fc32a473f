"""Pulsar's admin API, as far as the client's protocol cannot answer: what topics there are, what they hold, how far groups are."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import pairwise
from typing import Annotated, Any, TypeAlias
from urllib.parse import quote, unquote_plus, urlsplit

import msgspec

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Extent, NoAnswer
from edgeserve.transport.pulsar.names import entry_number
from edgeserve.transport.pulsar.probe import silence
from edgeserve.transport.pulsar.settings import Settings

_TIMEOUT_S = 8.0
_RANGE = re.compile(r"\((-?\d+:-?\d+)..(-?\d+:-?\d+)\]")

# A position in a topic: ledger and entry.
_Position: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^-?\d+:-?\d+$")]


class _Ledger(msgspec.Struct, rename="camel"):
    ledger_id: int
    entries: int


class _Cursor(msgspec.Struct, rename="camel"):
    # A cursor that is only being made, or is just moving, has none, or says more than where it is.
    mark_delete_position: str | None = None
    read_position: str | None = None
    individually_deleted_messages: str = ""


class Internal(msgspec.Struct, rename="camel"):
    """What the broker knows of a topic: its ledgers, and a cursor for each subscription and reader."""

    ledgers: list[_Ledger]
    cursors: dict[str, _Cursor]
    last_confirmed_entry: _Position
    total_size: int


class _Subscription(msgspec.Struct, rename="camel"):
    durable: bool = True
    unacked_messages: int = 0


class _Stats(msgspec.Struct):
    subscriptions: dict[str, _Subscription] = {}


def _given(position: str | None) -> str | None:
    """Ledger and entry, where they are said."""
    found = re.match(r"-?\d+:-?\d+", position or "")
    return found[0] if found else None


def _numbers(position: str) -> tuple[int, int]:
    """Ledger and entry."""
    ledger, _, entry = position.partition(":")
    return int(ledger), int(entry)


def _behind(stats: Internal, position: str) -> int:
    """The entry behind a position."""
    ledger, entry = _numbers(position)
    for each, following in pairwise(stats.ledgers):
        # Positions are compared: behind the last entry of a ledger comes the first of the next one.
        if each.ledger_id == ledger and entry + 1 >= each.entries:
            return entry_number(following.ledger_id, 0)
    return entry_number(ledger, entry + 1)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A broker sends who asks for a topic to the broker that owns it: whatever was asked goes there as it is, not only a GET."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if code not in (307, 308) and req.get_method() != "GET":
            return None
        if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
            raise TransportError(
                f"Pulsar's admin API at {before.scheme}://{before.netloc} sends to {after.scheme}://{after.netloc}, which is no https: its "
                "brokers must know each other's, by webServicePortTls"
            )
        kept = {name: value for name, value in req.headers.items() if name != "Authorization" or before.scheme == after.scheme}
        return urllib.request.Request(newurl, req.data, kept, method=req.get_method(), unverifiable=True)


class Admin:
    """Calls of the admin API."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _Redirects()]
        context = settings.tls_context()
        if context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def call(
        self, path: str, method: str = "GET", body: Any = None, *, absent: Any = None, needed_for: str = "this", type: Any = Any
    ) -> Any:
        """The answer's JSON, as a `type`; `absent` where there is no such thing."""
        request = urllib.request.Request(f"{self._settings.admin}/admin/v2/{path}", method=method)  # http(s) by construction
        request.add_header("Accept", "application/json")
        if self._settings.token:
            request.add_header("Authorization", f"Bearer {self._settings.token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, data, timeout=_TIMEOUT_S) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as exc:
            if exc.code in (404, 412):
                return absent
            reason = ""
            with suppress(OSError, http.client.HTTPException):  # the answer is cut short
                reason = exc.read(500).decode(errors="replace")
            hint = "its token has no right to it" if exc.code in (401, 403) else reason
            error = NoAnswer if exc.code >= 500 else TransportError
            raise error(f"Pulsar's admin API at {self._settings.admin} refused {method} {path} ({exc.code}): {hint}") from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            silent = silence(self._settings)
            raise NoAnswer(
                f"{f'nobody answers at {silent}, and ' if silent else ''}Pulsar's admin API at {self._settings.admin} does not answer "
                f"({exc}); {needed_for} needs it: give its URL by admin="
            ) from exc
        try:
            return msgspec.json.decode(raw, type=type) if raw else absent
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise TransportError(
                f"what answers at {self._settings.admin} is not Pulsar's admin API, or a version that is not known ({exc}; it began with "
                f"{raw[:40]!r}); {needed_for} needs it: give its URL by admin="
            ) from exc

    def topic_path(self, full: str) -> str:
        """The path of a topic."""
        domain, _, rest = full.partition("://")
        tenant, namespace, name = rest.split("/", 2)
        return f"{domain}/{tenant}/{namespace}/{quote(name, safe='')}"

    def topics(self, space: str) -> list[str]:
        """Full names of a namespace's topics."""
        found: list[str] | None = self.call(f"persistent/{space}", needed_for="listing topics", type=list[str])
        if found is None:
            raise TransportError(f"Pulsar has no namespace {space!r}: `pulsar-admin namespaces create {space}` makes it")
        return found

    def internal(self, full: str) -> Internal | None:
        """A topic's ledgers and cursors; None where there is no such topic."""
        path = f"{self.topic_path(full)}/internalStats"
        found: Internal | None = self.call(path, needed_for="what a topic holds", type=Internal)
        if found is not None:
            # Here, and only here, the names of subscriptions come encoded once more.
            found.cursors = {unquote_plus(name): cursor for name, cursor in found.cursors.items()}
        return found

    def _cursor(self, full: str, subscription: str) -> _Cursor | None:
        stats = self.internal(full)
        return None if stats is None else stats.cursors.get(subscription)

    def extent(self, full: str) -> Extent | None:
        """What a topic holds."""
        stats = self.internal(full)
        if stats is None:
            return None
        first = last = None
        ledger, entry = _numbers(stats.last_confirmed_entry)
        for each in stats.ledgers:
            count = each.entries or (entry + 1 if each.ledger_id == ledger else 0)
            if count:
                first = entry_number(each.ledger_id, 0) if first is None else first
                last = entry_number(each.ledger_id, count - 1)
        return Extent(first, last, stats.total_size)

    def subscriptions(self, full: str) -> dict[str, int]:
        """A topic's durable subscriptions, and how many entries are in their consumers' hands."""
        stats = self.call(f"{self.topic_path(full)}/stats", absent=_Stats(), needed_for="listing groups", type=_Stats)
        return {name: one.unacked_messages for name, one in stats.subscriptions.items() if one.durable}

    def floor(self, full: str, subscription: str) -> int:
        """Every entry below is acknowledged."""
        stats = self.internal(full)
        cursor = None if stats is None else stats.cursors.get(subscription)
        at = None if cursor is None else _given(cursor.mark_delete_position)
        return 0 if stats is None or at is None else _behind(stats, at)

    def floors(self, full: str) -> dict[str, int]:
        """The same of each durable subscription of a topic: a reader's cursor outlives it for a moment."""
        stats = self.internal(full)
        if stats is None:
            return {}
        durable = self.subscriptions(full)
        positions = {name: _given(cursor.mark_delete_position) for name, cursor in stats.cursors.items() if name in durable}
        return {name: 0 if at is None else _behind(stats, at) for name, at in positions.items()}

    def delivered(self, full: str, subscription: str) -> int:
        """The newest entry that was given to anybody."""
        cursor = self._cursor(full, subscription)
        at = None if cursor is None else _given(cursor.read_position)
        return -1 if at is None else entry_number(*_numbers(at)) - 1

    def acknowledged(self, full: str, subscription: str) -> list[tuple[int, int]]:
        """Entries above the floor that are acknowledged, too: from the first to the last of each range."""
        cursor = self._cursor(full, subscription)
        found = []
        for after, last in _RANGE.findall("" if cursor is None else cursor.individually_deleted_messages):
            ledger, entry = _numbers(after)
            found.append((entry_number(ledger, entry + 1), entry_number(*_numbers(last))))
        return found

    def delete_subscription(self, full: str, subscription: str) -> None:
        """Deletes a subscription that nobody uses."""
        name = quote(quote(subscription, safe=""), safe="")  # of a subscription's name the broker decodes the path twice
        self.call(f"{self.topic_path(full)}/subscription/{name}?force=true", "DELETE", needed_for="forgetting a group")

    def delete_topic(self, full: str) -> None:
        """Deletes a topic with all that is on it."""
        self.call(f"{self.topic_path(full)}?force=true", "DELETE", needed_for="forgetting a group")

    def keep(self, full: str, megabytes: float | None, seconds: float | None) -> None:
        """Sets how much of a topic is kept."""
        body = {
            "retentionSizeInMB": -1 if megabytes is None else max(1, round(megabytes)),
            "retentionTimeInMinutes": -1 if seconds is None else max(1, round(seconds / 60)),
        }
        self.call(f"{self.topic_path(full)}/retention", "POST", body, needed_for="retention_mb= and retention_s=")


__all__ = ("Admin",)
