"""How names of topics and groups become names that a NATS server takes, and back apart.

Streams are called `edgeserve+NAMESPACE+TOPIC`, their one subject is `edgeserve.NAMESPACE.TOPIC`, a group's consumer `g+GROUP`. In each part
every byte that is not of [A-Za-z0-9_-] is written as `=XX`; a part that gets too long ends in `~` and a hash. The name itself stands in
the description of the stream or consumer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from urllib.parse import unquote_to_bytes

_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_HASH_BYTES = 16
_MOST_NAMESPACE = 64
_MOST_NAME = 160
GROUP_PREFIX = "g+"


def escape(name: str, most: int = _MOST_NAME) -> str:
    """The name in characters that a server, a file system and a subject take; two names never give the same."""
    raw = name.encode()
    text = _UNSAFE.sub(lambda m: b"=%02X" % m[0][0], raw).decode()
    if len(text) <= most:
        return text
    return f"{text[: most - 2 * _HASH_BYTES - 1]}~{blake2b(raw, digest_size=_HASH_BYTES).hexdigest()}"


def unescape(text: str) -> str | None:
    """The name that `escape` made this of; None where it was too long to be whole."""
    return None if "~" in text else unquote_to_bytes(text.replace("=", "%")).decode(errors="replace")


@dataclass(frozen=True)
class Names:
    """The names in one namespace of a server; "" is one, too."""

    namespace: str

    @property
    def _space(self) -> str:
        # A name that is not empty never comes out as this one.
        return escape(self.namespace, _MOST_NAMESPACE) or "="

    @property
    def stream_prefix(self) -> str:
        """What all streams of topics begin with."""
        return f"edgeserve+{self._space}+"

    @property
    def subjects(self) -> str:
        """All subjects of topics."""
        return f"edgeserve.{self._space}.>"

    @property
    def marks_stream(self) -> str:
        """The stream that counts what was given back; no topic's."""
        return f"edgeserve+{self._space}++returned"

    @property
    def marks_subjects(self) -> str:
        """Its subjects."""
        return f"edgeserve-returned.{self._space}.>"

    def stream(self, topic: str) -> str:
        """The stream of a topic."""
        return self.stream_prefix + escape(topic)

    def subject(self, topic: str) -> str:
        """The subject of a topic."""
        return f"edgeserve.{self._space}.{escape(topic)}"

    def channel(self, topic: str) -> str:
        """The subject of what is said beside a topic; of no stream."""
        return f"edgeserve-flow.{self._space}.{escape(topic)}"

    def consumer(self, group: str) -> str:
        """The consumer of a group."""
        return GROUP_PREFIX + escape(group)

    def marks(self, topic: str, group: str) -> str:
        """What the subjects begin with that count a group's entries that were given back."""
        return f"edgeserve-returned.{self._space}.{escape(topic)}.{escape(group)}"


__all__ = ("GROUP_PREFIX", "Names", "escape", "unescape")
