"""A stored frame as text and as JSON, whatever is in it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import msgspec

from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import EdgeServeError, MessageError
from edgeserve.core.message import WATERMARK_END, Header, Kind, TimeKind
from edgeserve.core.payload import decoder_for
from edgeserve.payload import is_lazy
from edgeserve.stage.deadletter import read_dead_letter
from edgeserve.transport import Buffer

_TEXT_MAX = 400
_decode_payload = decoder_for()


@dataclass(frozen=True)
class Seen:
    """A message as it lies on a topic. `header` is None where the frame could not be read; `error` says why, then."""

    position: int
    published_ns: int
    header: Header | None
    value: Any
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        found: dict[str, Any] = {"position": self.position, "published_ns": self.published_ns}
        if self.header is not None:
            found |= _header_json(self.header)
        if self.error:
            found["error"] = self.error
        elif self.header is not None and self.header.kind in (Kind.DATA, Kind.DEAD_LETTER):
            found["value"] = to_json(self.value)
        return found

    def as_text(self) -> str:
        """One line, without what a terminal would take for a command."""
        moment = datetime.fromtimestamp(self.published_ns / 1e9, UTC)
        start = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z  {self.position}"
        if self.header is None:
            return plain(f"{start}  {self.error}")
        source = f"{start}  {' '.join(self.header.source_id.split())}"
        if self.error:
            return plain(f"{source}  {self.error}")
        if self.header.kind != Kind.DATA:
            return plain(f"{source}  [{_name(Kind, self.header.kind)}]")
        text = self.value if isinstance(self.value, str) else repr(self.value)
        text = " ".join(text.split())
        return plain(f"{source}  {text if len(text) <= _TEXT_MAX else text[: _TEXT_MAX - 3] + '...'}")


def look(frame: Buffer, position: int, published_ns: int, copy: Callable[[str, bytes | memoryview], tuple[str, bytes]]) -> Seen:
    """Reads a stored frame; one that cannot be read is a finding, not an error. `copy`: of a payload that lies apart."""
    try:
        header, payload = decode_frame(frame)
    except MessageError as exc:
        return Seen(position, published_ns, None, None, f"{type(exc).__name__}: {exc}")
    try:
        schema = header.schema
        if is_lazy(schema):
            schema, payload = copy(schema, payload)
        value = None if header.kind != Kind.DATA else _decode_payload(schema, payload)
    except EdgeServeError as exc:
        return Seen(position, published_ns, header, None, f"{type(exc).__name__}: {exc}")
    return Seen(position, published_ns, header, value)


def dead_letter(topic: str, frame: Buffer, position: int, published_ns: int) -> dict[str, Any]:
    """A dead letter as JSON; the frames of its inputs are left out."""
    place = {"dead_letter_topic": topic, "position": position}
    try:
        letter = read_dead_letter(bytes(frame))
    except MessageError as exc:
        unreadable = {"reason": exc.reason, "error": f"{type(exc).__name__}: {exc}", "traceback": "", "input_ids": [], "source_ids": []}
        return place | unreadable | {"topic": topic, "group": "", "attempts": 0, "time_ns": published_ns}
    known = msgspec.structs.asdict(letter)
    del known["frames"]
    return place | known


def _header_json(header: Header) -> dict[str, Any]:
    watermark: int | str | None = "end" if header.watermark_ns == WATERMARK_END else header.watermark_ns
    return {
        "id": header.id.hex(),
        "source_id": header.source_id,
        "sequence": header.sequence,
        "kind": _name(Kind, header.kind),
        "key": to_json(header.key),
        "task_version": header.task_version,
        "event_ns": header.event_ns,
        "event_time": _name(TimeKind, header.time_kind),
        "sent_ns": header.sent_ns,
        "watermark_ns": watermark,
        "schema": header.schema,
        "size": header.size,
    }


def _name(kinds: type[Kind] | type[TimeKind], value: int) -> str | int:
    try:
        return kinds(value).name.lower().replace("_", "-")
    except ValueError:
        return value


def to_json(value: Any) -> Any:
    """A value as JSON can say it: bytes as `{"base64": ...}`, arrays as nested lists, what has no JSON form as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return to_json(msgspec.to_builtins(value))
    if isinstance(value, datetime | date):
        return value.isoformat()
    for name in ("tolist", "to_pylist"):
        if hasattr(value, name):
            return to_json(getattr(value, name)())
    return str(value)


def plain(text: str) -> str:
    """Takes out control characters: what a message holds must not command the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)


__all__ = ("Seen", "dead_letter", "look", "plain", "to_json")
