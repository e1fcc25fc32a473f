"""What a node has to do with payloads that lie apart from their messages: it keeps its own there, and looks at those of others."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from edgeserve.core.codec import Buffer, decode_frame, encode_frame
from edgeserve.core.errors import ConfigurationError, FetchError, MessageError, PayloadGone, TransportError, UnknownTopic
from edgeserve.core.message import Header
from edgeserve.payload import (
    End,
    Fetching,
    PayloadReader,
    PayloadWriter,
    Ranges,
    Reference,
    Serving,
    Settled,
    Slot,
    Sweep,
    advertised,
    broker_name,
    inner_schema,
    is_gone,
    is_here,
    is_lazy,
    lazy_schema,
    make_payload_directory,
    payload_base,
    reader_of,
    remove_orphans,
    store_name,
)
from edgeserve.stage.control import Control
from edgeserve.stage.files import Files
from edgeserve.stage.linger import Patience
from edgeserve.stage.retry import GoesBack
from edgeserve.stage.routes import ROUTES, Routes, routes_topic
from edgeserve.transport import Frame, Transport
from edgeserve.transport.checks import MAX_NAME_BYTES
from edgeserve.transport.url import without_secrets

_log = logging.getLogger("edgeserve")

LAZY_BYTES = 64 * 1024
"""By default a smaller payload travels with its message: on one machine, to look elsewhere for it would cost more."""

_SWEEP_EVERY_S = 1.0
_AGAIN_S, _TELL_EVERY_S = 1.0, 10.0

Durability: TypeAlias = Literal["origin", "broker"]
Routing: TypeAlias = Literal["eager", "lazy", "auto"]
Payload: TypeAlias = "bytes | Sequence[Buffer]"


class Payloads:
    """Those of one node.

    Args:
        who: the node, for people.
        routing: 'lazy' keeps its own large payloads in shared memory, where the engine can say when they are done with; 'auto' does while
            that costs less.
        topic_out: where its own go; None: it sends nothing.
        control: the node's, for who takes messages.
        source: the source id of its own.
        reads: (topic, group) that it takes messages as a member of.
        lazy_bytes: a smaller payload of its own always travels with its message.

    Raises:
        ConfigurationError: under routing='auto': the topic's name is too long.

    Attributes:
        max_frame_bytes: of the engine; None: no bound.
        files: those that its messages name, with `ftp=True`.
    """

    def __init__(
        self,
        who: str,
        routing: Routing,
        topic_out: str | None,
        control: Control | None = None,
        *,
        source: str = "",
        reads: tuple[str, str] | None = None,
        lazy_bytes: int = LAZY_BYTES,
    ) -> None:
        if routing == "auto" and topic_out is not None and routes_topic(topic_out) is None:
            raise ConfigurationError(
                f"{who}: routing='auto' needs a topic beside {topic_out!r}, {ROUTES[1:]!r} behind its name, and a name has at most "
                f"{MAX_NAME_BYTES} bytes: give it a shorter one"
            )
        self._who, self._routing, self._topic_out, self._source, self._reads = who, routing, topic_out, source, reads
        # Groups tell of what is large to them.
        self.lazy_bytes = lazy_bytes if routing != "auto" else max(lazy_bytes, LAZY_BYTES)
        self._routes: Routes | None = None
        self._patience = Patience(who, control or Control())
        self._directory: Path | None = None
        self._known_reader: PayloadReader | None = None
        self._sweep: Sweep | None = None
        self._sweep_at = self._again_at = 0.0
        self._told = -_TELL_EVERY_S
        self._make_writer: Callable[[], PayloadWriter] | None = None
        # Where payloads of other hosts' stores may be, on an engine between hosts.
        self._base: Path | None = None
        self._fetching: Fetching | None = None
        self._serving: Serving | None = None
        # Where a payload could not be fetched from just now.
        self._unreachable = ""
        self.writer: PayloadWriter | None = None
        self.max_frame_bytes: int | None = None
        self.files: Files | None = None

    def open(self, transport: Transport) -> None:
        """To be called before the node's first message."""
        root, self.max_frame_bytes = transport.root, transport.capabilities.max_frame_bytes
        if not (transport.capabilities.tells_positions and transport.capabilities.durable):
            if self._routing != "eager":
                what = "%s: on %s payloads travel with their messages, routing=%r changes nothing"
                _log.info(what, self._who, transport.url, self._routing)
            return

        name = _store(transport)
        settled, end = _asked(transport)
        self._directory = directory = payload_base() / name
        self._sweep = sweep = Sweep(directory, settled, end)
        if root is None:
            self._base, self._fetching = payload_base(), Fetching()
        why_not = ""
        if self._routing == "auto" and root is None and advertised() is None:
            why_not = "other machines could not fetch them: EDGESERVE_ADVERTISE is not set"
            _log.warning("%s: routing='auto' sends payloads with their messages, since %s", self._who, why_not)
        if self._routing != "eager" and not why_not and (topic := self._topic_out) is not None:
            serving = self._serving = Serving() if root is None else None

            def make_writer() -> PayloadWriter:
                make_payload_directory(name, root)
                if root is not None:
                    remove_orphans(payload_base(), lambda found: is_gone(found, name, root))
                sweep.look()
                origin, token = ("", "") if serving is None else (serving.origin, serving.token)
                return PayloadWriter(directory, topic, settled, end, sweep=sweep.look, whole=root is None, origin=origin, token=token)

            self._make_writer = make_writer
            self._ready_writer()
        sends = (self._topic_out, self._source) if self._routing == "auto" and self._topic_out is not None else None
        if sends is not None or self._reads is not None:
            origin = "" if self._serving is None else self._serving.origin
            self._routes = Routes(self._who, transport, reads=self._reads, sends=sends, origin=origin, why_not=why_not)

    # --- its own ------------------------------------------------------------------------------------------------

    def put(self, schema: str, payload: Payload, size: int) -> tuple[str, Payload, Slot | None]:
        """Keeps a large payload: (schema tag, what travels, where it is kept). The same, and None, where it travels itself."""
        if size < self.lazy_bytes or (self.max_frame_bytes is not None and size > self.max_frame_bytes):
            return schema, payload, None  # what is too large is refused by name: once set apart it could leave its topic no more
        kept = self._keep(payload, size)
        if self._routing == "auto" and self._routes is not None:
            self._routes.sent.add(size, apart=kept is not None)
            self._routes.begin()
        return (schema, payload, None) if kept is None else (lazy_schema(schema), kept[0].encode(), kept[1])

    def _keep(self, payload: Payload, size: int) -> tuple[Reference, Slot] | None:
        if (self._routes is not None and not self._routes.sent.lazy) or (writer := self._ready_writer()) is None:
            return None
        try:
            return writer.put([payload] if isinstance(payload, bytes) else payload, size)
        except OSError as exc:
            self._go_without(exc)
            return None

    def _ready_writer(self) -> PayloadWriter | None:
        """None: this node keeps none, or cannot now."""
        if self._make_writer is None or time.monotonic() < self._again_at:
            return None
        if self.writer is None:
            try:
                self.writer = self._make_writer()
            except OSError as exc:
                self._go_without(exc)
        return self.writer

    def _go_without(self, error: OSError) -> None:
        """Shared memory is full, or there are no descriptors: messages are sent all the same."""
        now = time.monotonic()
        self._again_at = now + _AGAIN_S
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            what = "%s cannot keep payloads in %s now, they travel with their messages: %s. It is tried again"
            _log.warning(what, self._who, self._directory, error)

    def framed(self, header: Header, reference: Payload, slot: Slot) -> Frame:
        """The frame that stands for what is kept in `slot`. Raises as `encode_frame` does, with nothing kept."""
        assert self.writer is not None
        try:
            frame = encode_frame(header, reference)
            self.writer.expect(frame, slot)
        except BaseException:
            self.writer.cancel(slot)
            raise
        return frame

    def placed(self, frames: Sequence[object], first: int) -> None:
        """See `PayloadWriter.placed`."""
        if self.writer is not None:
            self.writer.placed(frames, first)

    def doubt(self, frames: Iterable[object]) -> None:
        """See `PayloadWriter.doubt`."""
        if self.writer is not None:
            self.writer.doubt(frames)

    def drop(self, frames: Iterable[object]) -> None:
        """See `PayloadWriter.drop`."""
        if self.writer is not None:
            self.writer.drop(frames)

    def abandon(self, frames: Iterable[object]) -> None:
        """See `PayloadWriter.abandon`."""
        if self.writer is not None:
            self.writer.abandon(frames)

    # --- others' ------------------------------------------------------------------------------------------------

    def seen(self, header: Header) -> None:
        """A message with a large payload was handed to this node."""
        if self._routes is not None:
            self._routes.uses.seen(header.source_id)
            self._routes.begin()

    def used(self, header: Header, *, new: bool = False) -> None:
        """The node uses its payload. `new`: it was not `seen` before."""
        if self._routes is not None:
            self._routes.uses.used(header, new=new)
            self._routes.begin()

    def take(self, header: Header, payload: bytes | memoryview) -> tuple[str, bytes | memoryview]:
        """Schema tag and payload of a message that is used as it comes, and may be large: see `fetch`."""
        if header.size >= LAZY_BYTES:
            self.used(header, new=True)
        return self.fetch(header.schema, payload) if is_lazy(header.schema) else (header.schema, payload)

    def fetch(self, schema: str, payload: bytes | memoryview) -> tuple[str, memoryview]:
        """The payload that a reference stands for, with its schema tag: a view, which stays good. Waits for what the system has too little
        of: the message can do nothing for it.

        Raises:
            PayloadGone, CorruptMessage: it is not there, or is another.
            FetchError: its host did not give it in time.
            GoesBack: the node is to end.
        """
        reference = Reference.decode(payload)
        while True:
            try:
                view = self._open(reference)
            except FetchError:
                self._unreachable = reference.origin
                if self._routes is not None:
                    self._routes.uses.missed(reference.origin)
                raise
            except OSError as exc:
                if not self._patience.wait(exc):
                    raise GoesBack(f"the node was told to end while a payload could not be had: its message goes back ({exc})") from exc
            else:
                if self._patience.troubled:
                    self._patience.over()
                if reference.origin == self._unreachable:
                    self._unreachable = ""
                return inner_schema(schema), view

    def _open(self, reference: Reference) -> memoryview:
        if self._base is None or self._fetching is None:
            return self._reader().open(reference)
        if is_here(self._base, reference):
            # A store of another name is of the same broker by another URL.
            own = self._directory is not None and reference.store == self._directory.name
            return (self._reader() if own else reader_of(self._base / reference.store)).open(reference)
        if not reference.origin:
            raise PayloadGone(
                f"a payload of {reference.size} bytes is not on this host: it was settled, or its sender's host is another and names no "
                "address for others (EDGESERVE_ADVERTISE)"
            )
        return self._fetching.fetch(reference)

    def copy(self, schema: str, payload: bytes | memoryview) -> tuple[str, bytes]:
        """As `fetch`, a copy: for who has no claim on the message."""
        reference = Reference.decode(payload)
        if self._base is None:
            return inner_schema(schema), self._reader().copy(reference)
        return inner_schema(schema), bytes(self._open(reference))

    def inline(self, frame: Buffer) -> Buffer:
        """The frame with its payload in it, for who will read it when the message is settled. As it is when the payload is gone. Raises
        `GoesBack` as `fetch` does."""
        try:
            header, payload = decode_frame(frame)
            if not is_lazy(header.schema):
                return frame
            schema, payload = self.fetch(header.schema, payload)
        except (MessageError, FetchError):
            return frame
        whole = encode_frame(msgspec.structs.replace(header, schema=schema, size=len(payload)), [payload])
        return whole if isinstance(whole, bytes) else b"".join(whole)

    def aside(self, frame: Buffer) -> Buffer:
        """`inline`, for a message that is given up: not where its payload could not be fetched just now, which took long enough."""
        try:
            header, payload = decode_frame(frame)
            just_failed = self._unreachable != "" and is_lazy(header.schema) and Reference.decode(payload).origin == self._unreachable
        except MessageError:
            return frame
        return frame if just_failed else self.inline(frame)

    def _reader(self) -> PayloadReader:
        reader = self._known_reader
        if reader is None:
            if self._directory is None:
                raise PayloadGone("a payload lies in the shared memory of another engine's store")
            reader = self._known_reader = reader_of(self._directory)
        return reader

    def tidy(self) -> None:
        """To be called now and then: what writers left behind goes when nobody will ask for it any more, and is not kept mapped here."""
        if self._sweep is not None and (now := time.monotonic()) >= self._sweep_at:
            self._sweep_at = now + _SWEEP_EVERY_S
            try:
                self._sweep.look()
            except OSError as exc:
                _log.warning("%s cannot look after the payloads in %s: %s", self._who, self._directory, exc)
            if self._known_reader is not None:
                self._known_reader.prune()

    def close(self) -> None:
        """To be called when the node's last message is settled. Idempotent."""
        if self._directory is None:
            return
        if self._routes is not None:
            self._routes.close()
        left = 0 if self.writer is None else self.writer.close()
        self.writer = self._make_writer = None
        self._sweep_at = 0.0
        self.tidy()
        if self._fetching is not None:
            self._fetching.close()
        if self._serving is not None:
            self._end_serving(self._serving, left)
        self._base = self._fetching = self._serving = self._routes = None
        if self._known_reader is not None:
            self._known_reader.rest()
        self._sweep = self._directory = self._known_reader = None

    def _end_serving(self, serving: Serving, left: int) -> None:
        """`left`: how many of its own payloads are not settled."""
        serving.close()
        if left and serving.origin and not serving.is_served():
            _log.warning(
                "%s leaves %d payload(s) that are not settled, and nobody on this host serves them at %s any more: others have them only "
                "while `edgeserve payloads serve` runs here",
                *(self._who, left, serving.origin),
            )


class LeftBehind:
    """Payloads on this host that their senders, which have ended, have left on topics of a broker."""

    def __init__(self, transport: Transport) -> None:
        settled, end = _asked(transport)
        self._known: dict[str, Ranges] = {}

        def settled_once(topic: str) -> Ranges:
            if topic not in self._known:
                self._known[topic] = settled(topic)
            return self._known[topic]

        self._sweep = Sweep(payload_base() / _store(transport), settled_once, end)

    def count(self, topics: Container[str]) -> Counter[str]:
        """How many of these topics are not settled, by topic. Removes what is. Asks the broker once for each topic."""
        self._known.clear()
        self._sweep.look()
        return self._sweep.left(topics)


def _store(transport: Transport) -> str:
    """Names the directory where payloads lie."""
    root = transport.root
    return broker_name(without_secrets(transport.url)) if root is None else store_name(transport.identity, root)


def _asked(transport: Transport) -> tuple[Settled, End]:
    """What those who look after payloads ask an engine."""

    def settled(topic: str) -> Ranges:
        try:
            return transport.settled(topic)
        except TransportError:
            return ()  # a broker that is away does not tell

    def end(topic: str) -> int:
        try:
            return transport.end(topic)
        except UnknownTopic:
            return 0
        except TransportError:
            return -1

    return settled, end


def in_place(routing: Routing, durability: Durability) -> Routing:
    """How large payloads travel when they have to be as safe as that: what is to outlive its origin's memory does not stay in it."""
    return routing if durability == "origin" else "eager"


__all__ = ("LAZY_BYTES", "Durability", "LeftBehind", "Payloads", "Routing", "in_place")
