"""The record that goes to `<topic>.<group>.dead-letters` when a message or a set cannot be processed."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import ForeignMessage, PayloadMismatch
from edgeserve.core.message import Header, Kind
from edgeserve.core.metrics import Reason
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.retry import GaveUp

log = logging.getLogger("edgeserve")

Buffer = bytes | bytearray | memoryview

TRACEBACK_MAX_CHARS = 16_384
_TOLD_SINGLY = 5
_TELL_EVERY_S = 10.0


class DeadLetter(msgspec.Struct, kw_only=True):
    """Why inputs could not be processed, and the inputs themselves.

    Attributes:
        reason: the counter that it is counted under.
        error: type and text of the error, and its notes.
        traceback: the last attempt's traceback, its end when it is very long; "" when no user's code ran.
        input_ids: the inputs' ids in hexadecimal; "" for one that could not be decoded.
        attempts: how often the task ran.
        time_ns: when it was given up, wall clock.
        frames: the inputs as they were stored, so that they can be published again; none where they are too large for one message, as
            `error` says then.
        topic: where the inputs came from.
        group: the group that gave them up.
        source_ids: the inputs' source ids; "" for one that could not be decoded.
    """

    reason: str
    error: str
    traceback: str = ""
    input_ids: list[str] = []
    attempts: int = 0
    time_ns: int = 0
    frames: list[bytes] = []
    topic: str = ""
    group: str = ""
    source_ids: list[str] = []


_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep


def dead_letter_topic(topic: str, group: str) -> str:
    """The topic on which `group` puts what it could not process of `topic`."""
    return f"{topic}.{group}.dead-letters"


def _keep_the_tasks(found: traceback.TracebackException) -> None:
    """Takes out our frames that led to the user's code, and the attempt before, which failed at the same place."""
    begin = next((n for n, frame in enumerate(found.stack) if not _ours(frame)), 0)
    found.stack = traceback.StackSummary(found.stack[begin:])
    for name in ("__cause__", "__context__"):
        inner = getattr(found, name)
        if inner is not None and inner.stack and _ours(inner.stack[0]):
            setattr(found, name, None)
        elif inner is not None:
            _keep_the_tasks(inner)


def _ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_PACKAGE)


def describe(error: BaseException) -> tuple[str, str]:
    """(type and text, traceback) of an error, each of bounded length."""
    found = traceback.TracebackException.from_exception(error)
    _keep_the_tasks(found)
    text = "".join(found.format())
    notes = getattr(error, "__notes__", None)
    noted = "".join(f" ({note})" for note in notes if isinstance(note, str)) if isinstance(notes, list) else ""
    return f"{type(error).__name__}: {found}{noted}"[:TRACEBACK_MAX_CHARS], text[-TRACEBACK_MAX_CHARS:]


def encode_dead_letter(letter: DeadLetter) -> bytes | Sequence[Buffer]:
    """The frame of a dead letter."""
    body = msgspec.msgpack.encode(letter)
    now = time.time_ns()
    header = Header(os.urandom(16), "dead-letter", "", 0, now, now, "", len(body), kind=Kind.DEAD_LETTER)
    return encode_frame(header, [body])


def _size(frame: bytes | Sequence[Buffer]) -> int:
    return len(frame) if isinstance(frame, bytes) else sum(map(len, frame))


def read_dead_letter(frame: bytes | memoryview) -> DeadLetter:
    """The dead letter in `frame`.

    Raises:
        MessageError: the frame is none, or is not a dead letter's.
    """
    header, payload = decode_frame(frame)
    if header.kind != Kind.DEAD_LETTER:
        raise ForeignMessage(f"the message from source {header.source_id!r} is not a dead letter")
    try:
        return msgspec.msgpack.decode(payload, type=DeadLetter)
    except msgspec.DecodeError as exc:
        raise PayloadMismatch(f"the dead letter cannot be read: {exc}") from exc


@dataclass
class _Told:
    """Of one topic and reason: how many were told one by one, how many were not told yet, and since when."""

    singly: int = 0
    untold: int = 0
    since: float = 0.0


class Asides:
    """Makes the records of what one stage gives up, and says so in the log: the first of a kind one by one, then how many there were."""

    def __init__(self, what: str, name: str, group: str, payloads: Payloads) -> None:
        self._what, self._name, self._group, self._payloads = what, name, group, payloads
        self._told: dict[tuple[str, str], _Told] = {}

    def record(
        self,
        topic: str,
        frames: Sequence[Buffer],
        headers: Sequence[Header | None],
        error: Exception,
        *,
        reason: str | None = None,
        attempts: int = 0,
    ) -> tuple[str, bytes | Sequence[Buffer]]:
        """(topic, frame) of the record of inputs; a header is None where it could not be read."""
        if isinstance(error, GaveUp):
            reason, attempts, error = error.reason, error.attempts, error.error
        reason = reason or str(getattr(error, "reason", Reason.DEAD_LETTER))
        text, trace = describe(error)
        letter = DeadLetter(
            reason=reason,
            error=text,
            traceback=trace if attempts else "",
            input_ids=["" if h is None else h.id.hex() for h in headers],
            attempts=attempts,
            time_ns=time.time_ns(),
            frames=[bytes(self._payloads.aside(frame)) for frame in frames],
            topic=topic,
            group=self._group,
            source_ids=["" if h is None else h.source_id for h in headers],
        )
        if self._payloads.files is not None:
            self._payloads.files.put_aside([h.id for h in headers if h is not None])
        self._tell(topic, reason, len(frames), text)
        record, most = encode_dead_letter(letter), self._payloads.max_frame_bytes
        if most is not None and (size := _size(record)) > most:
            # It would wait for room for ever, and what comes after it with it.
            letter.error += f" (the inputs are left out: with them this would be {size} bytes, and the node takes {most} in one message)"
            letter.frames = []
            record = encode_dead_letter(letter)
        return dead_letter_topic(topic, self._group), record

    def _tell(self, topic: str, reason: str, count: int, text: str) -> None:
        told = self._told.setdefault((topic, reason), _Told())
        if told.singly < _TOLD_SINGLY:
            told.singly, told.since = told.singly + 1, time.monotonic()
            log.warning("%s %r put %d input(s) of %r aside (%s): %s", self._what, self._name, count, topic, reason, text)
            return
        told.untold += count
        if time.monotonic() - told.since >= _TELL_EVERY_S:
            self._sum_up(topic, reason, told)

    def _sum_up(self, topic: str, reason: str, told: _Told) -> None:
        now = time.monotonic()
        what = "%s %r put %d more input(s) of %r aside (%s) in %.0f s: see its dead letters"
        log.warning(what, self._what, self._name, told.untold, topic, reason, now - told.since)
        told.untold, told.since = 0, now

    def close(self) -> None:
        """Says what was not said yet."""
        for (topic, reason), told in self._told.items():
            if told.untold:
                self._sum_up(topic, reason, told)


__all__ = (
    "TRACEBACK_MAX_CHARS",
    "Asides",
    "DeadLetter",
    "dead_letter_topic",
    "describe",
    "encode_dead_letter",
    "read_dead_letter",
)
