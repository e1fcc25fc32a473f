"""`DataSource`: sends the examples of a stream to a topic. Beside it what the research prototype had under other names."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from edgeserve.core.codec import as_parameter, check_source_id, encode_frame
from edgeserve.core.errors import ConfigurationError, UnsupportedType
from edgeserve.core.message import WATERMARK_END, Header, Key, Kind, TimeKind, message_id, replayable_id
from edgeserve.core.metrics import Reason
from edgeserve.core.payload import encode_sized
from edgeserve.sources.base import Source
from edgeserve.sources.csv_replay import CsvReplay
from edgeserve.sources.picture_files import PictureFiles
from edgeserve.stage.aio import Coroutines, Synchronous
from edgeserve.stage.control import Stopped
from edgeserve.stage.keywords import check_keywords
from edgeserve.stage.linger import NO_ROOM
from edgeserve.stage.node import Node
from edgeserve.stage.payloads import LAZY_BYTES, Durability, Payloads, Routing, in_place
from edgeserve.stage.progress import Progress
from edgeserve.stage.send import Sender
from edgeserve.stage.steplog import step_log
from edgeserve.stage.wiring import Wiring
from edgeserve.transport import SEND_WINDOW, Frame, Transport

Gate: TypeAlias = Callable[[Any], Any]

_log = logging.getLogger("edgeserve")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LONG_AGO, _FAR_AHEAD = -(2**63), 2**63 - 1
_ENDED = object()


class DataSource(Node):
    """Sends the examples of a stream, one per `next()`.

    Args:
        stream: an iterable, an iterator or an async iterable. None among its items is no example. One of `edgeserve.sources` is woken when
            another thread closes the node, and closed with it.
        node: URL of the node, for example 'local://'. `pulsar_node=` is an older name for it.
        source_id: what the examples are called downstream: a parameter name of the tasks that take them.
        gate: maps an example to bytes (or to any value that can be sent); None drops it, counted as 'gate'.
        topic: where the examples go.
        log_path: directory of a log of every step, `<log_filename>.datasource`; None: no log.
        log_filename: default: the source id.
        event_time: maps an example to its event time, integer ns or an aware datetime; None: the time at which it is sent.
        message_id: maps an example to an id that is the same when the stream starts over, so that repeats are dropped downstream.
        key: maps an example to its key (str, int, bytes), which travels in the header.
        max_lateness_ms: with `event_time`: how far behind the newest an event may come; what is later counts as late in a join.
        send_window: how many of its own messages live consumers may leave unsettled before a send waits for them.
        routing: 'eager': a payload travels with its message; 'lazy': a large one stays in shared memory, to be read in place, or fetched
            from other machines; 'auto': whichever moves less, as `edgeserve routes` shows.
        lazy_bytes: how many bytes make a payload a large one; with 'auto' 64 KiB at the least. A smaller one costs this machine more than
            it saves, and may be worth it where links are slow.
        durability: 'origin': a payload that stays is lost with this machine's memory; 'broker': it travels with its message all the same,
            to the broker, or into the store of `local://`, and is as safe as the message is.

    Example:
        >>> with DataSource([b"a", b"b"], "memory://docs-source", source_id="letters", topic="letters") as source:
        ...     next(source)
        b'a'
    """

    def __init__(
        self,
        stream: Iterable[Any] | AsyncIterable[Any],
        node: str | None = None,
        source_id: str = "",
        gate: Gate | None = None,
        topic: str = "src",
        log_path: str | os.PathLike[str] | None = None,
        log_filename: str | None = None,
        *,
        pulsar_node: str | None = None,
        event_time: Callable[[Any], int | datetime] | None = None,
        message_id: Callable[[Any], str | int | bytes] | None = None,
        key: Callable[[Any], Key] | None = None,
        max_lateness_ms: float = 10_000,
        send_window: int = SEND_WINDOW,
        routing: Routing = "eager",
        lazy_bytes: int = LAZY_BYTES,
        durability: Durability = "origin",
    ) -> None:
        super().__init__(node, pulsar_node, what="DataSource", name=source_id)
        check_source_id(source_id)
        check_keywords(
            "DataSource",
            topic=topic,
            max_lateness_ms=max_lateness_ms,
            send_window=send_window,
            routing=routing,
            lazy_bytes=lazy_bytes,
            durability=durability,
        )
        routing = in_place(routing, durability)
        if not isinstance(stream, (Iterable, AsyncIterable)):
            raise ConfigurationError(f"DataSource: the stream must be an iterable or an async iterable, not {type(stream).__name__}")
        if isinstance(stream, (str, bytes, bytearray)):
            what = "DataSource %r: the stream is of type %s, so each of its characters is a message; to send it as one, give a list of it"
            _log.warning(what, source_id, type(stream).__name__)
        self._check_callables("DataSource", gate=gate, event_time=event_time, message_id=message_id, key=key)
        self._stream = stream
        self._source_id, self._gate, self._topic = as_parameter(source_id), gate, topic
        self.wiring = Wiring(topic_out=topic, sends=self._source_id, lazy=routing != "eager")
        self._event_time, self._message_id, self._key = event_time, message_id, key
        self._lateness_ns = int(max_lateness_ms * 1e6)
        self._send_window = send_window
        self._payloads = Payloads(f"DataSource {source_id!r}", routing, topic, source=self._source_id, lazy_bytes=lazy_bytes)
        self._coroutines = Coroutines(f"edgeserve-{source_id}")
        self._iterator: Iterator[Any] | None = None
        self._progress: Progress | None = None
        self._log = step_log(log_path, log_filename, source_id, "datasource")
        self._exhausted = False
        self._sequence = 0
        self._last_event_ns = _LONG_AGO

    def _open(self, transport: Transport) -> None:
        if self._log is not None:
            self._log.open()
        publisher = transport.publisher(self._topic, send_window=self._send_window)
        self._payloads.open(transport)
        self._sender = Sender(publisher, self._source_id, self._control, transport.capabilities.max_frame_bytes, self._payloads)
        # A new incarnation: eight random bytes begin all its ids.
        self._prefix = os.urandom(8)
        self._producer = self._prefix.hex()
        self._send = self._make_send()
        if isinstance(self._stream, Source) and self._stream.resumable:
            self._progress = Progress(self._stream, self._send)
            self._send = self._progress.send
        if isinstance(self._stream, AsyncIterable):
            self._iterator = Synchronous(self._stream, self._coroutines)
        else:
            self._iterator = iter(self._stream)

    def _make_send(self) -> Callable[[Any], Any]:
        """The function that sends one example and returns what was sent."""
        gate, event_time, own_id, key_of = self._gate, self._event_time, self._message_id, self._key
        source_id, producer, prefix, lateness_ns = self._source_id, self._producer, self._prefix, self._lateness_ns
        append, now_ns, log, payloads = self._sender.append(), time.time_ns, self._log, self._payloads
        time_kind, lazy_bytes = int(TimeKind.ARRIVAL if event_time is None else TimeKind.DEVICE), payloads.lazy_bytes

        def send(item: Any) -> Any:
            value = item
            if gate is not None:
                value = gate(item)
                if value is None:
                    self._counts.count(Reason.GATE, edge=source_id)
                    return None
            sent_ns = now_ns()
            if event_time is None:
                # A clock that was set back must not break the promise of the watermark.
                event_ns = sent_ns if sent_ns > self._last_event_ns else self._last_event_ns
                watermark_ns = newest_ns = event_ns
            else:
                given = event_time(item)
                event_ns = given if type(given) is int else _to_ns(given)
                if not _LONG_AGO <= event_ns <= _FAR_AHEAD:
                    raise _no_event_time(event_ns, source_id)
                newest_ns = self._last_event_ns
                if event_ns > newest_ns:
                    newest_ns = event_ns
                watermark_ns = newest_ns - lateness_ns
                if watermark_ns < _LONG_AGO:
                    watermark_ns = _LONG_AGO
            sequence = self._sequence
            id_ = message_id(prefix, sequence) if own_id is None else replayable_id(source_id, own_id(item))
            key = None if key_of is None else key_of(item)
            try:
                schema, payload, size = encode_sized(value)
            except UnsupportedType as exc:
                raise UnsupportedType(f"DataSource {source_id!r}, message {sequence + 1}: {exc}") from exc
            slot = None
            if size >= lazy_bytes:
                schema, payload, slot = payloads.put(schema, payload, size)
            header = Header(id_, source_id, producer, sequence, event_ns, sent_ns, schema, size, watermark_ns, key, 0, time_kind)
            frame: Frame = encode_frame(header, payload) if slot is None else payloads.framed(header, payload, slot)
            # Only now: what could not be sent must leave no trace in the watermarks of what can.
            self._sequence, self._last_event_ns = sequence + 1, newest_ns
            append(frame)
            if log is not None:
                log.write(msg_id=id_.hex(), source_id=source_id, sequence=sequence, event_ns=event_ns, sent_ns=sent_ns, bytes=size)
            return value

        return send

    def _next(self) -> Any:
        sender = self._sender
        if sender.error is not None or sender.full:
            sender.check()
        if self._exhausted or self._iterator is None:
            raise StopIteration
        if self._progress is not None and self._progress.due():
            self._flush()
        try:
            try:
                item = next(self._iterator)
            except StopIteration:
                self._end()
                raise
            return None if item is None else self._send(item)
        except BaseException as exc:
            if self._progress is not None and not isinstance(exc, Exception):
                self._progress.doubt()
            raise

    def _run(self, until: str | None) -> None:
        try:
            self._send_all()
        finally:
            self._control.interruptible = False
            self._sender.flush_patiently()

    def _send_all(self) -> None:
        sender, control, progress, taken = self._sender, self._control, self._progress, list[Any]()
        if self._exhausted or self._iterator is None:
            return
        # A signal may come between the iterator's return and any statement here: what it returned is in `taken` by then.
        take = map(taken.append, self._iterator)
        try:
            while not control.stop:
                if sender.error is not None or sender.full:
                    sender.flush_patiently()
                if progress is not None and progress.due():
                    sender.flush_patiently()
                    progress.commit()
                control.interruptible = True
                ended = next(take, _ENDED) is _ENDED
                control.interruptible = False
                if ended:
                    self._end()
                    return
                self._send_patiently(taken.pop())
        except Stopped:
            control.interruptible = False
            if isinstance(self._iterator, Synchronous):
                taken += self._iterator.kept
                self._iterator.kept.clear()
            while taken:
                self._send_patiently(taken.pop())

    def _send_patiently(self, item: Any) -> None:
        if item is not None:
            try:
                self._send(item)
            except NO_ROOM:
                self._sender.flush_patiently()

    def _end(self) -> None:
        """Says downstream, once, that nothing more will come."""
        self._exhausted = True
        now = time.time_ns()
        event_ns = now if self._last_event_ns == _LONG_AGO else self._last_event_ns
        id_ = message_id(self._prefix, self._sequence)
        header = Header(id_, self._source_id, self._producer, self._sequence, event_ns, now, watermark_ns=WATERMARK_END, kind=int(Kind.END))
        self._sequence += 1
        self._sender.end(encode_frame(header, b""))
        if self._progress is not None:
            self._progress.commit()

    def _flush(self) -> None:
        self._sender.flush()
        if self._progress is not None:
            self._progress.commit()

    def _shut(self) -> None:
        try:
            self._sender.close()
            if self._progress is not None:
                self._progress.commit()
        finally:
            if isinstance(self._stream, Source):
                self._stream.close()
            self._payloads.close()
            self._coroutines.close()
            if self._log is not None:
                self._log.close()

    def _wake(self) -> None:
        """A source waits in its stream. One that can be woken returns None then; nothing can wake another."""
        if isinstance(self._stream, Source):
            self._stream.wake()

    def _totals(self) -> dict[str, int]:
        return {"sent": self._sender.sent} if self._opened else {}


class _Series(CsvReplay):
    """Rows without their first column, which has the time."""

    _kind = "SimulateTimeSeries"

    def _item(self, fields: list[str], layout: Any) -> list[str]:
        return fields[1:]


class SimulateTimeSeries(DataSource):
    """Sends the rows of a CSV file without a header, as far apart as the times in its first column (seconds) are: the research prototype's.

    An example is the list of the values behind the first column, as str. Its event time is when it is sent. A `DataSource` around an
    `edgeserve.sources.CsvReplay` can do more.

    Args:
        filename: the file.
        node: URL of the node. `pulsar_node=` is an older name for it.
        source_id: what the examples are called downstream.
        gate: maps an example to bytes (or to any value that can be sent); None drops it.
        topic: where the examples go.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        node: str | None = None,
        source_id: str = "",
        gate: Gate | None = None,
        topic: str = "src",
        *,
        pulsar_node: str | None = None,
    ) -> None:
        super().__init__(_Series(filename, header=False), node, source_id, gate, topic, pulsar_node=pulsar_node)


class CameraSource(DataSource):
    """Writes each picture of a camera as a JPEG file to a directory that an FTP server serves, and sends its URL: the research prototype's.

    A `DataSource` around an `edgeserve.sources.Camera` sends the pictures themselves. Needs PyAV, the extra `video`.

    Args:
        node: URL of the node. `pulsar_node=` is an older name for it.
        local_ftp_path: the directory where the files go, which must be there, such as '/srv/ftp/files/'.
        global_ftp_path: the URL of that directory, such as 'ftp://192.168.1.101/files/'.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        source_id: what the URLs are called downstream.
        gate: maps a URL to bytes (or to any value that can be sent); None drops it.
        topic: where the URLs go.
        cam_id: the number of a camera, 0 is /dev/video0; or the path of a video file, whose pictures come as fast as they are taken.
    """

    def __init__(
        self,
        node: str | None = None,
        local_ftp_path: str | os.PathLike[str] = "/srv/ftp/",
        global_ftp_path: str = "",
        width: int = 640,
        height: int = 480,
        source_id: str = "",
        gate: Gate | None = None,
        topic: str = "src",
        cam_id: int | str | os.PathLike[str] = 0,
        *,
        pulsar_node: str | None = None,
    ) -> None:
        files = PictureFiles("CameraSource", cam_id, local_ftp_path, global_ftp_path, (width, height))
        super().__init__(files, node, source_id, gate, topic, pulsar_node=pulsar_node)


class SimulateVideoWithTimestamps(DataSource):
    """Writes pictures of a video file as `CameraSource` does those of a camera, and sends their URLs: the research prototype's.

    It ends with `timestamps` or with the file. A `DataSource` around an `edgeserve.sources.Video` sends the pictures themselves, at their
    own pace.

    Args:
        timestamps: before each picture: how many seconds of the film are passed over.
        node: URL of the node, and the others as for `CameraSource`.
        cam_id: the path of the video file.
    """

    def __init__(
        self,
        timestamps: Iterable[float],
        node: str | None = None,
        local_ftp_path: str | os.PathLike[str] = "/srv/ftp/",
        global_ftp_path: str = "",
        width: int = 640,
        height: int = 480,
        source_id: str = "",
        gate: Gate | None = None,
        topic: str = "src",
        cam_id: int | str | os.PathLike[str] = 0,
        *,
        pulsar_node: str | None = None,
    ) -> None:
        files = PictureFiles("SimulateVideoWithTimestamps", cam_id, local_ftp_path, global_ftp_path, (width, height), timestamps)
        super().__init__(files, node, source_id, gate, topic, pulsar_node=pulsar_node)


class CodeSource(DataSource):
    """Not here: the research prototype's sent program text, which whoever received it executed. Making one says what to use instead.

    Raises:
        ConfigurationError: always.
    """

    def __init__(self, stream: Any = None, node: str | None = None, gate: Gate | None = None, topic: str = "src", **_: Any) -> None:
        raise ConfigurationError(
            "CodeSource sent program text, which whoever received it executed; nothing that arrives is executed here. Put the function "
            "into the program that runs it: Compute(task, node, topic_in=...), started where it is to run, for example with edgeserve run"
        )


def _to_ns(given: Any) -> int:
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise ConfigurationError(
                f"event_time returned the naive datetime {given}: give it a time zone, for example tzinfo=datetime.UTC"
            )
        return (given - _EPOCH) // _MICROSECOND * 1000
    try:
        return int(given.__index__())
    except AttributeError:
        raise ConfigurationError(
            f"event_time must return integer ns or an aware datetime, not {type(given).__name__}: for seconds use int(seconds * 1e9)"
        ) from None


def _no_event_time(number: int, source_id: str) -> ConfigurationError:
    shown = number if number.bit_length() < 256 else f"(an int of {number.bit_length()} bits)"
    return ConfigurationError(
        f"event_time returned {shown} for an example of source {source_id!r}, which does not fit into 64 bits with a sign: "
        "return nanoseconds since the epoch, or an aware datetime"
    )


__all__ = ("CameraSource", "CodeSource", "DataSource", "SimulateTimeSeries", "SimulateVideoWithTimestamps")
