"""URLs that messages name, and which of them a node may fetch: read strictly, because they come from the network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from edgeserve.core.errors import ConfigurationError, NotAllowed
from edgeserve.core.external import shown_url

PORTS = {"http": 80, "https": 443, "ftp": 21, "s3": 0, "file": 0}
"""The schemes that can be fetched, and their ports."""

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{0,253})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?P<fragment>#.*)?"
)
_PLAIN = re.compile(r"[!-~]*")
_ESCAPED = 3  # so often a path may be escaped; some servers undo it twice


class Location(NamedTuple):
    """A URL in its parts. `host`: of s3 the bucket; `path`: its parts, unescaped; `target`: path and query as they were."""

    scheme: str
    host: str
    port: int
    path: tuple[bytes, ...]
    target: str
    shown: str


def location_of(url: str) -> Location:
    """Reads a URL, which may say anything.

    Raises:
        NotAllowed: it is none, or has a user, a scheme or a path that nothing is fetched by.
    """
    shown = shown_url(url)
    if not _PLAIN.fullmatch(url) or "\\" in url:
        raise NotAllowed(f"{shown} has characters that no URL has: spaces and what is not ASCII are written as %20 and the like")
    scheme = url.partition("://")[0].lower()
    if scheme not in PORTS:
        raise NotAllowed(f"{shown}: nothing is fetched by that scheme, only by {', '.join(PORTS)}")
    if "@" in re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]:
        raise NotAllowed(f"{shown} is named with a user or a password, which have no place in messages")
    found = _URL.fullmatch(url)
    if found is None or (found["port"] and not (PORTS[scheme] and 0 < int(found["port"]) < 65536)):
        raise NotAllowed(f"{shown} has a host or a port that is none")
    host, path = found["host"], found["path"] or "/"
    host = host if scheme == "s3" else host.strip("[]").lower()
    if scheme == "file":
        host = "" if host == "localhost" else host
    if bool(host) == (scheme == "file"):
        raise NotAllowed(f"{shown}: file:///path names no host, and every other scheme does")
    if scheme not in ("http", "https") and (found["query"] or found["fragment"]):
        raise NotAllowed(f"{shown}, and more after it: in a file's name '?' is written %3F, and '#' %23")
    parts = tuple(unquote_to_bytes(part) for part in path.split("/")[1:])
    if not all(map(_is_plain, parts)) or (scheme not in ("http", "https") and b"" in parts[:-1]):
        raise NotAllowed(f"{shown} has a path that is not plain: no '..' or '.', no escaped '/', no '\\', nothing that cannot be printed")
    return Location(scheme, host, int(found["port"] or PORTS[scheme]), parts, path + (found["query"] or ""), shown)


def _is_plain(part: bytes) -> bool:
    if b"/" in part or any(byte < 32 or byte == 127 for byte in part):
        return False
    for _ in range(_ESCAPED):
        if b"\\" in part or any(each.partition(b";")[0].strip() in (b".", b"..") for each in part.split(b"/")):
            return False
        once_more = unquote_to_bytes(part)
        if once_more == part:
            return True
        part = once_more
    return False


class Allowed:
    """What may be fetched: URLs whose scheme, host and port are those of one of `urls`, and whose path is below that one's.

    Args:
        urls: such as 'https://data.example.org/frames/', 's3://bucket/' or 'file:///srv/frames/'.

    Raises:
        ConfigurationError: one is none.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._prefixes = [_prefix(url) for url in urls]
        self._roots = [os.path.realpath(b"/" + b"/".join(each.path)) for each in self._prefixes if each.scheme == "file"]

    @property
    def schemes(self) -> frozenset[str]:
        """Those of the URLs."""
        return frozenset(each.scheme for each in self._prefixes)

    def check(self, location: Location) -> None:
        """Raises `NotAllowed` where it is not among them."""
        for each in self._prefixes:
            if each[:3] == location[:3] and location.path[: len(each.path)] == each.path:
                return
        raise NotAllowed(f"{location.shown} is not allowed: fetch= lists the schemes, hosts and paths that this node fetches from")

    def is_below(self, path: bytes) -> bool:
        """Whether a file, with all links followed, lies in an allowed directory."""
        return any(path == root or path.startswith(root.rstrip(b"/") + b"/") for root in self._roots)


def _prefix(url: object) -> Location:
    try:
        if not isinstance(url, str):
            raise NotAllowed(f"a {type(url).__name__} is no URL")
        found = location_of(url)
        if "?" in url or "#" in url:
            raise NotAllowed(f"{found.shown}, and more after it: what stands behind '?' or '#' is no part of a path")
    except NotAllowed as exc:
        raise ConfigurationError(f"fetch=: {exc}. It is a list of URLs such as 'https://data.example.org/frames/'") from None
    found = found._replace(path=found.path[:-1] if found.path[-1:] == (b"",) else found.path)
    if found.scheme == "file" and not found.path:
        raise ConfigurationError("fetch=: 'file:///' would allow every file of this machine: name a directory, such as file:///srv/frames/")
    return found


__all__ = ("PORTS", "Allowed", "Location", "location_of")
