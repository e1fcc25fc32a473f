"""Pulsar's admin API, as far as the client's protocol cannot answer: what topics there are, what they hold, how far groups are."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from itertools import pairwise
from typing import Any
from urllib.parse import quote, unquote_plus

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Extent
from edgeserve.transport.pulsar.names import entry_number
from edgeserve.transport.pulsar.settings import Settings

_TIMEOUT_S = 8.0
_RANGE = re.compile(r"\((-?\d+:-?\d+)..(-?\d+:-?\d+)\]")


def _numbers(position: str) -> tuple[int, int]:
    """Ledger and entry."""
    ledger, _, entry = position.partition(":")
    return int(ledger), int(entry)


def _behind(stats: dict[str, Any], position: str) -> int:
    """The entry behind a position."""
    ledger, entry = _numbers(position)
    for each, following in pairwise(stats["ledgers"]):
        # Positions are compared: behind the last entry of a ledger comes the first of the next one.
        if int(each["ledgerId"]) == ledger and entry + 1 >= int(each["entries"]):
            return entry_number(int(following["ledgerId"]), 0)
    return entry_number(ledger, entry + 1)


class Admin:
    """Calls of the admin API."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        context = settings.tls_context()
        if context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, path: str, method: str = "GET", body: Any = None, *, absent: Any = None, needed_for: str = "this") -> Any:
        """The answer's JSON; `absent` where there is no such thing."""
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
            reason = exc.read(500).decode(errors="replace")
            hint = "its token has no right to it" if exc.code in (401, 403) else reason
            raise TransportError(f"Pulsar's admin API at {self._settings.admin} refused {method} {path} ({exc.code}): {hint}") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise TransportError(
                f"Pulsar's admin API at {self._settings.admin} does not answer ({exc}); {needed_for} needs it: give its URL by admin="
            ) from exc
        return json.loads(raw) if raw else absent

    def topic_path(self, full: str) -> str:
        """The path of a topic."""
        domain, _, rest = full.partition("://")
        tenant, namespace, name = rest.split("/", 2)
        return f"{domain}/{tenant}/{namespace}/{quote(name, safe='')}"

    def topics(self, space: str) -> list[str]:
        """Full names of a namespace's topics."""
        found = self.call(f"persistent/{space}", needed_for="listing topics")
        if found is None:
            raise TransportError(f"Pulsar has no namespace {space!r}: `pulsar-admin namespaces create {space}` makes it")
        return [str(name) for name in found]

    def internal(self, full: str) -> dict[str, Any] | None:
        """A topic's ledgers and cursors; None where there is no such topic."""
        found: dict[str, Any] | None = self.call(f"{self.topic_path(full)}/internalStats", needed_for="what a topic holds")
        if found is not None:
            # Here, and only here, the names of subscriptions come encoded once more.
            found["cursors"] = {unquote_plus(name): cursor for name, cursor in found["cursors"].items()}
        return found

    def extent(self, full: str) -> Extent | None:
        """What a topic holds."""
        stats = self.internal(full)
        if stats is None:
            return None
        first = last = None
        ledger, _, entry = str(stats["lastConfirmedEntry"]).partition(":")
        for each in stats["ledgers"]:
            count = int(each["entries"]) or (int(entry) + 1 if str(each["ledgerId"]) == ledger else 0)
            if count:
                first = entry_number(int(each["ledgerId"]), 0) if first is None else first
                last = entry_number(int(each["ledgerId"]), count - 1)
        return Extent(first, last, int(stats["totalSize"]))

    def subscriptions(self, full: str) -> dict[str, Any]:
        """What is known of a topic's durable subscriptions."""
        stats = self.call(f"{self.topic_path(full)}/stats", absent={}, needed_for="listing groups")
        return {name: s for name, s in stats.get("subscriptions", {}).items() if s.get("durable", True)}

    def floor(self, full: str, subscription: str) -> int:
        """Every entry below is acknowledged."""
        stats = self.internal(full) or {"cursors": {}}
        cursor = stats["cursors"].get(subscription)
        return 0 if cursor is None else _behind(stats, cursor["markDeletePosition"])

    def floors(self, full: str) -> list[int]:
        """The same of each subscription and reader of a topic."""
        stats = self.internal(full) or {"cursors": {}}
        return [_behind(stats, cursor["markDeletePosition"]) for cursor in stats["cursors"].values()]

    def delivered(self, full: str, subscription: str) -> int:
        """The newest entry that was given to anybody."""
        cursor = (self.internal(full) or {"cursors": {}})["cursors"].get(subscription)
        return -1 if cursor is None else entry_number(*_numbers(cursor["readPosition"])) - 1

    def acknowledged(self, full: str, subscription: str) -> list[tuple[int, int]]:
        """Entries above the floor that are acknowledged, too: from the first to the last of each range."""
        cursor = (self.internal(full) or {"cursors": {}})["cursors"].get(subscription, {})
        found = []
        for after, last in _RANGE.findall(cursor.get("individuallyDeletedMessages", "")):
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
