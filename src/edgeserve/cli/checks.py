"""A finding of `edgeserve doctor`, and URLs as they may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

Status = Literal["PASS", "WARN", "FAIL"]
_SECRET = ("token", "password", "secret", "oauth2")
_HIDDEN = "***"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was seen, and what to do where it is not well."""

    status: Status
    name: str
    seen: str
    to_do: str = ""


def shown(url: str) -> str:
    """A node URL as it may be shown: without user, password and token."""
    text = re.sub(r"(?<=://)[^/?#]*@", f"{_HIDDEN}@", url)
    return re.sub(rf"([?&](?:{'|'.join(_SECRET)})=)[^&#]*", rf"\1{_HIDDEN}", text, flags=re.IGNORECASE)


def without_secrets(text: str, url: str) -> str:
    """A text that may name a URL, or what is secret in it, as it may be shown."""
    if url:
        text = text.replace(url, shown(url))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(url: str) -> set[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    found = {value for name, value in parse_qsl(parts.query) if name.lower() in _SECRET}
    found |= {match for match in re.findall(rf"[?&](?:{'|'.join(_SECRET)})=([^&#]*)", url, flags=re.IGNORECASE)}
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found |= {password, unquote(password)} if password else {user, unquote(user)}
    return {secret for secret in found if len(secret) > 2}


__all__ = ("Check", "Status", "shown", "without_secrets")
