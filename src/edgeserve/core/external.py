"""A value that stands for what lies elsewhere: its URL, and how to know that it came whole."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from edgeserve.core.errors import ConfigurationError

_MOST = 8_000
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
_NO_SECRETS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)(?:[^/?#]*@)?([^?#]*)")
_CHECKSUM = re.compile(r"(?:md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})?")


class External(msgspec.Struct, frozen=True, omit_defaults=True):
    """What lies at a URL, in place of its bytes: a node with `fetch=` fetches it when its task is about to run on it.

    Args:
        url: https://host/path, http://, s3://bucket/key, ftp:// or file:///path, percent-encoded.
        size: how many bytes it has, if that is known.
        checksum: 'sha256:<hex>', also sha512 or md5, if it is known. What comes is another then: `CorruptMessage`.

    Raises:
        ConfigurationError: the URL, the size or the checksum is none.

    Example:
        >>> External("https://data.example.org/frames/1.jpg?signature=secret", size=90_000)
        External('https://data.example.org/frames/1.jpg', size=90000)
    """

    url: str
    size: int | None = None
    checksum: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not is_url(self.url) or len(self.url) > _MOST:
            raise ConfigurationError(f"External: its url is no scheme://host/path of at most {_MOST:,} characters")
        if self.size is not None and (type(self.size) is not int or not 0 <= self.size < 2**63):
            raise ConfigurationError(f"External: size={str(self.size)[:30]}: it is a number of bytes, or None")
        if not isinstance(self.checksum, str) or not _CHECKSUM.fullmatch(self.checksum):
            raise ConfigurationError("External: checksum= is none: 'sha256:<64 hex digits>' is one, or sha512, md5, or '' for none")

    def __repr__(self) -> str:
        size = "" if self.size is None else f", size={self.size}"
        checksum = f", checksum={self.checksum!r}" if self.checksum else ""
        return f"External({shown_url(self.url)!r}{size}{checksum})"

    def encode(self) -> bytes:
        """As it travels."""
        return _encode(self)


class OrExternal(NamedTuple):
    """An annotation that a URL or an `External` fits, too, as it is; the rest as `annotation` says."""

    annotation: Any


def decode_external(raw: bytes | memoryview) -> External:
    """What `External.encode` has written."""
    return _decode(raw)


def is_url(text: str) -> bool:
    """Whether a text begins as URLs do that name a host or a file."""
    return _SCHEME.match(text) is not None


def shown_url(url: str) -> str:
    """A URL for people: without user, password and query, where secrets are."""
    found = _NO_SECRETS.match(url)
    text = "a URL" if found is None else found[1] + found[2]
    text = "".join(c if c.isprintable() else "?" for c in text[:203])
    return text if len(text) <= 200 else text[:200] + "..."


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(External).decode

__all__ = ("External", "OrExternal", "decode_external", "is_url", "shown_url")
