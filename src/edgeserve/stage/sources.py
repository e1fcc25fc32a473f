"""What is known of a topic's sources: who produces for them, what they promise (watermarks), which have ended.

A source may have several producers: replicas, or one that was restarted and has a new name. A producer whose last message lies before
the first message of a newer one is taken for replaced until it sends again; for its watermark only after it was silent for a while, by
the messages' publish times. So both depend on what is stored and not on when it is read.

A producer whose connection broke sends again what was not confirmed, its end too: that may be stored when the end was read long before, or
when a new round of the sources has begun. It is told from a new beginning by its sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edgeserve.core.message import WATERMARK_END, Header, TimeKind

SILENT_NS = 10_000_000_000
_MOST_PRODUCERS = 64


class Known(msgspec.Struct, frozen=True, array_like=True):
    """Of a producer: name, positions of its first and last message, when that was published, whether it has ended, the sequence of its
    newest end, also where it has begun again, and the highest sequence that has come from it before the ends that are still to be read; -1:
    there is none, or it is not known."""

    name: str
    first: int
    last: int
    seen_ns: int
    ended: bool
    ended_with: int = -1
    newest: int = -1


_PREFIX = "producers:"
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Known]).decode


class _Producer:
    __slots__ = ("ended", "ends", "first", "last", "newest", "seen_ns", "watermark_ns")

    def __init__(self, position: int) -> None:
        self.first = self.last = position
        self.seen_ns = 0
        self.watermark_ns: int | None = None
        self.ended = False
        # The highest sequence that has come from it.
        self.newest = -1
        # Its ends, (position, sequence): the newest that whoever comes next knows, and those behind that. At -1: another member told it.
        self.ends: list[tuple[int, int]] = []

    @property
    def ended_at(self) -> int:
        """The position of its newest end; -1: there is none, or another member has told of it."""
        return self.ends[-1][0] if self.ends else -1

    def add_end(self, position: int, sequence: int) -> None:
        """Notes an end; the same one may be brought again."""
        if not self.ends:
            self.ends.append((position, sequence))
        elif position > self.ends[-1][0]:
            self.ends.append((position, max(sequence, self.ends[-1][1])))

    def comes_again(self, header: Header, position: int) -> bool:
        """Whether this is what was sent before its newest end, or that end, stored once more behind it."""
        return bool(self.ends) and position > self.ends[-1][0] and header.sequence <= self.ends[-1][1]

    def told(self, name: str, upto: int) -> Known:
        """What whoever comes next must know, who will read all ends behind `upto` again."""
        ends = self.ends.copy()
        settled = [end for end in ends if end[0] <= upto]
        newest = ends[len(settled)][1] if len(settled) < len(ends) else self.newest
        ended = self.ended and self.ended_at <= upto
        return Known(name, self.first, self.last, self.seen_ns, ended, settled[-1][1] if settled else -1, newest)

    def forget_ends(self, upto: int) -> None:
        """Of its ends up to there only the newest is needed."""
        settled = sum(at <= upto for at, _ in self.ends)
        self.ends = self.ends[max(0, settled - 1) :]


class SourceClock:
    """One source: the promise of its producers together.

    Attributes:
        ended: whether all of them have.
        computed: whether they are a task's replicas, of which one tells the end of all and does not know what the others have sent.
        changed: whether who they are, or which of them live, is another than was `told`: whoever comes next must know, who may see no
            message of theirs before they end.
    """

    __slots__ = ("_current", "_ended_at", "_name", "_newest_first", "_only", "_producers", "changed", "computed", "ended")

    def __init__(self) -> None:
        self.changed = self.computed = False
        self._producers: dict[str, _Producer] = {}
        self._current: _Producer | None = None
        # The current producer while it is the only one and has not ended.
        self._only: _Producer | None = None
        self._name = ""
        self._newest_first = self._ended_at = -1
        self.ended = False

    @property
    def seen(self) -> bool:
        """Whether anything of the source has come, or is known to have come to others."""
        return self.ended or bool(self._producers)

    def observe(self, header: Header, position: int, published_ns: int) -> int | None:
        """Notes a message; returns the event time below which the source will send nothing more, None while that is unknown."""
        producer = self._only
        if producer is not None and header.producer == self._name and position > producer.last:
            producer.last, producer.seen_ns = position, published_ns
            if header.sequence > producer.newest:
                producer.newest = header.sequence
            watermark_ns, promised_ns = header.watermark_ns, producer.watermark_ns
            if watermark_ns is not None and (promised_ns is None or watermark_ns > promised_ns):
                producer.watermark_ns = watermark_ns
                return watermark_ns
            return promised_ns
        producer = self._current
        if producer is None or header.producer != self._name:
            producer = self._switch(header.producer, position)
        self.computed = header.time_kind == TimeKind.COMPUTED
        if producer.comes_again(header, position):
            return self._together(published_ns) if len(self._producers) > 1 else None if producer.ended else producer.watermark_ns
        if header.sequence > producer.newest:
            producer.newest = header.sequence
        if self.ended and position > self._ended_at:
            self.ended = False
        if producer.ended and position > producer.last:
            producer.ended, producer.watermark_ns, self.changed = False, None, True
        if position > producer.last:
            self.changed = self.changed or producer.last < self._newest_first <= position
            producer.last = position
        producer.seen_ns = published_ns
        watermark_ns = header.watermark_ns
        if watermark_ns is not None and (producer.watermark_ns is None or watermark_ns > producer.watermark_ns):
            producer.watermark_ns = watermark_ns
        if len(self._producers) > 1:
            return self._together(published_ns)
        self._only = None if self.ended or producer.ended else producer
        return None if producer.ended else producer.watermark_ns  # what comes again of one that has ended is no promise for who comes next

    def restore_end(self, position: int) -> None:
        """Another member has recorded that the source has ended there."""
        self.ended, self._ended_at = True, position

    def told(self, upto: int) -> list[Known]:
        """What whoever comes next must know, who will read all ends behind `upto` again."""
        self.changed = False
        for producer in self._producers.values():
            producer.forget_ends(upto)
        return self.known(upto)

    def known(self, upto: int) -> list[Known]:
        """As `told`, for who only looks. From any thread."""
        return [producer.told(name, upto) for name, producer in list(self._producers.items())]

    def restore(self, known: Iterable[Known]) -> None:
        """What another member has told. What a producer has promised is known again when it sends."""
        for one in known:
            producer = self._producers[one.name] = _Producer(one.first)
            producer.last, producer.seen_ns, producer.ended, producer.newest = one.last, one.seen_ns, one.ended, one.newest
            if one.ended_with >= 0:
                producer.add_end(-1, one.ended_with)
            producer.watermark_ns = WATERMARK_END if one.ended else None
            self._newest_first = max(self._newest_first, one.first)

    def end(self, header: Header, position: int) -> bool:
        """Notes that a producer has ended; returns whether the source has.

        One member's end of a Compute is the end of all: it comes when the whole group has settled all of its inputs.
        """
        producer = self._switch(header.producer, position)
        if producer.comes_again(header, position):
            return self.ended
        self._only = None
        producer.last = max(producer.last, position)
        producers = self._producers.values()
        # One that has sent since has not ended: its end came again.
        over = [p for p in producers if p.last <= position and (p is producer or header.time_kind == TimeKind.COMPUTED)]
        for each in over:
            each.add_end(position, header.sequence if each is producer else each.newest)
            each.ended, each.watermark_ns = True, WATERMARK_END
        self.ended = all(p.ended for p in producers if p.last >= self._newest_first)
        self._ended_at = max(self._ended_at, position)
        return self.ended

    def has_come(self, header: Header, position: int) -> bool:
        """Whether an end was stored before, and only comes again."""
        producer = self._producers.get(header.producer)
        return producer is not None and producer.comes_again(header, position)

    def pass_end(self, header: Header, position: int) -> None:
        """Notes an end that the group has recorded, whether the source has begun again or not: by it is known what comes again."""
        producer, self._only = self._switch(header.producer, position), None
        producer.add_end(position, header.sequence)

    def _switch(self, name: str, position: int) -> _Producer:
        producer = self._producers.get(name)
        if producer is None:
            if len(self._producers) >= _MOST_PRODUCERS:
                del self._producers[min(self._producers, key=lambda n: self._producers[n].last)]
            producer, self._only = _Producer(position), None
            self._producers[name] = producer
            self._newest_first, self.changed = max(self._newest_first, position), True
        self._current, self._name = producer, name
        return producer

    def _together(self, now_ns: int) -> int | None:
        """The least of what the live producers promise."""
        least: int | None = WATERMARK_END
        for producer in self._producers.values():
            if producer.ended or (producer.last < self._newest_first and now_ns - producer.seen_ns > SILENT_NS):
                continue
            if producer.watermark_ns is None:
                return None
            if least is None or producer.watermark_ns < least:
                least = producer.watermark_ns
        return None if least == WATERMARK_END else least


def telling(source: str, known: Iterable[Known]) -> dict[str, bytes]:
    """The attribute of a group that says who produces for a source."""
    return {_PREFIX + source: _encode(known)}


def restored(source: str, attributes: dict[str, bytes]) -> SourceClock:
    """A source as the attributes of a group tell it."""
    clock = SourceClock()
    if known := attributes.get(_PREFIX + source):
        clock.restore(_decode(known))
    return clock


__all__ = ("SILENT_NS", "SourceClock", "restored", "telling")
