"""What travels in place of a payload: where it lies, and how to know that it is still the same.

The schema tag of a message whose payload is a reference is `r:` and the payload's own tag. A reader that knows no references refuses it
by name, as any tag that it does not know.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from edgeserve.core.errors import CorruptMessage

LAZY = "r:"
"""Begins the schema tag of a message whose payload is a reference; hot loops compare with it themselves."""

_NAME = r"^[0-9a-z.-]{1,100}$"


class Reference(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A payload in a store: file `segment` (a name, never a path), number and generation of the slot, the payload's bytes and xxh3_64.

    `origin`, `token`: where another host fetches it, and what it has to say there; "": it cannot. Shown, it does not tell the token.
    """

    store: Annotated[str, msgspec.Meta(pattern=_NAME)]
    segment: Annotated[str, msgspec.Meta(pattern=_NAME)]
    slot: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    generation: Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
    checksum: int
    origin: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Reference({self.store!r}, {self.segment!r}, {self.slot}, {self.generation}, {self.size}, {self.checksum}, {self.origin!r})"

    def bare(self) -> Reference:
        """The same, as its own host knows it."""
        return Reference(self.store, self.segment, self.slot, self.generation, self.size, self.checksum)

    @property
    def name(self) -> str:
        """Of its file on every host that fetches it. Another origin's payload has another, whatever that one says of it."""
        return hashlib.blake2b(b"%b\n%b" % (self.origin.encode(), self.bare().encode()), digest_size=16).hexdigest()

    def encode(self) -> bytes:
        """As it travels."""
        return _encode(self)

    @classmethod
    def decode(cls, raw: bytes | memoryview) -> Reference:
        """Raises `CorruptMessage` when these bytes are none."""
        try:
            return _decode(raw)
        except Exception as exc:  # what a crafted one makes msgspec raise has no common root
            raise CorruptMessage(f"a payload's reference cannot be read: {exc}") from exc


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Reference).decode


def is_lazy(schema: str) -> bool:
    """Whether the payload of a message with this schema tag is a reference."""
    return schema[:2] == LAZY


def lazy_schema(schema: str) -> str:
    """The tag of a message that has a reference in place of a payload with the tag `schema`."""
    return LAZY + schema


def inner_schema(schema: str) -> str:
    """The tag of the payload that a message with a reference stands for."""
    return schema[len(LAZY) :]


__all__ = ("LAZY", "Reference", "inner_schema", "is_lazy", "lazy_schema")
