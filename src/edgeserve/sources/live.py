"""Pictures that are there once: of a camera, or of a stream over the network. A thread reads them, so that nothing waits for it."""

from __future__ import annotations

import logging
import struct
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from edgeserve.core.errors import BadRow, ConfigurationError, EdgeServeError, FetchError
from edgeserve.sources.av_input import MAX_PIXELS, Damaged, Decoder, Look, ns_of, pyav, shown, video_of, why
from edgeserve.sources.base import Source
from edgeserve.sources.timer import SystemTimer, Timer
from edgeserve.sources.times import SECOND

_log = logging.getLogger("edgeserve")

RETRY_S = 1.0
"""How long a camera that was lost is left alone before it is tried again."""

_LONGEST_S = 3600.0
_BEYOND_S = 1.0
"""How long FFmpeg has, beyond `timeout_s`, to say itself that nothing comes: a read of a device that stands still never ends."""

_MOST_STANDING = 2
"""So many threads may stand in a read that does not end, each with a connection, before there are no more of them."""

_PRFT = struct.Struct("<q")


class Place(NamedTuple):
    """What is read: its URL or device, how FFmpeg is to open it, and what it is called in errors."""

    url: str
    format: str | None
    options: dict[str, str]
    shown: str
    missing: str
    """What to do when it cannot be opened."""


class Clock:
    """Tells the time of a frame by its stream, of one connection; of arrival: nothing does."""

    def begin(self, stream: Any) -> None:
        """The connection is there."""

    def packet(self, packet: Any) -> None:
        """A packet that is about to be decoded."""

    def ns(self, frame: Any) -> int | None:
        """When the frame was taken; None: not known yet."""
        return None


class DeviceClock(Clock):
    """The driver's stamps, which the v4l2 demuxer hands on as times since the epoch (`timestamps=abs`)."""

    def begin(self, stream: Any) -> None:
        self._base = stream.time_base

    def ns(self, frame: Any) -> int | None:
        return None if frame.pts is None else ns_of(frame.pts, self._base)


class SinceClock(Clock):
    """Times in the stream, counted from its first frame, taken at `start_ns`; what has no end went on for the `elapsed_ns` since."""

    def __init__(self, start_ns: int, elapsed_ns: int) -> None:
        self._start_ns, self._elapsed_ns = start_ns, elapsed_ns

    def begin(self, stream: Any) -> None:
        self._base, self._first = stream.time_base, stream.start_time
        if not stream.container.duration:
            self._start_ns += self._elapsed_ns

    def ns(self, frame: Any) -> int | None:
        if frame.pts is None:
            return None
        if self._first is None:
            self._first = frame.pts
        return self._start_ns + ns_of(frame.pts - self._first, self._base)


class Since:
    """Makes the `SinceClock` of each connection, which know when the first of them began."""

    def __init__(self, start_ns: int, timer: Timer) -> None:
        self._start_ns, self._timer = start_ns, timer
        self._began_ns: int | None = None

    def __call__(self) -> SinceClock:
        now_ns = self._timer.monotonic_ns()
        if self._began_ns is None:
            self._began_ns = now_ns
        return SinceClock(self._start_ns, now_ns - self._began_ns)


class RtcpClock(Clock):
    """The camera's own clock, which it sends in RTCP sender reports; FFmpeg puts what they say beside packets ("prft", microseconds)."""

    def begin(self, stream: Any) -> None:
        self._base = stream.time_base
        self._offset_ns: int | None = None

    def packet(self, packet: Any) -> None:
        if packet.pts is None or not packet.has_sidedata("prft"):
            return
        (wallclock_us,) = _PRFT.unpack_from(bytes(packet.get_sidedata("prft")))
        self._offset_ns = wallclock_us * 1000 - ns_of(packet.pts, self._base)

    def ns(self, frame: Any) -> int | None:
        return None if self._offset_ns is None or frame.pts is None else self._offset_ns + ns_of(frame.pts, self._base)


class _Taken(NamedTuple):
    frame: Any
    event_ns: int | None


class Live(Source):
    """Frames of what cannot be read again, in order. What is lost, is lost; there is no position.

    Args:
        place: what is read.
        look: how pictures are handed out.
        every: of so many frames one is handed out.
        clock: makes what tells their times, for each connection; None: their arrival is their time.
        keep: how many decoded frames wait for `next()` at most.
        timeout_s: how long connecting may take, and how long nothing may come.
        timer: what waits for frames, and is woken; tests hand in another.
    """

    resumable = False
    _kind = "Live"

    def __init__(
        self,
        place: Place,
        *,
        look: Look,
        every: int,
        clock: Callable[[], Clock] | None,
        keep: int,
        timeout_s: float,
        timer: Timer | None = None,
    ) -> None:
        self._av = pyav(self._kind)
        self._place, self._look, self._every, self._clock, self._timeout_s = place, look, every, clock, timeout_s
        self._frames: deque[_Taken] = deque(maxlen=keep)
        self._timer: Timer = SystemTimer() if timer is None else timer
        self._rest = SystemTimer()  # what the thread waits with
        self._thread: threading.Thread | None = None
        self._standing: list[threading.Thread] = []  # given up, and still in a read
        self._handed: tuple[Any, int | None] = (None, None)
        self._error: Exception | None = None
        self._ended = self._woken = self._closed = False
        self._alive_ns = 0

    # --- the stream ---------------------------------------------------------------------------------------------

    def __next__(self) -> Any:
        waits_ns = self._timer.monotonic_ns()
        while True:
            if self._closed:
                raise StopIteration
            over = self._ended
            if (taken := self._take()) is not None:
                frame, event_ns = taken
                try:
                    item = self._look.array(frame)
                except (self._av.FFmpegError, ValueError, MemoryError) as exc:
                    raise BadRow(f"{self._kind}: a picture of {self._place.shown} is left out: {why(exc)}") from exc
                self._handed = item, event_ns
                return item
            if self._woken:
                self._woken = False
                return None
            if over:
                error, self._error = self._error, None
                if error is None:
                    raise StopIteration
                self._thread, self._ended = None, False  # the next call tries again
                raise error
            if self._thread is None:
                self._thread = self._begin()
            silent_s = (self._timer.monotonic_ns() - max(waits_ns, self._alive_ns)) / SECOND
            left_s = self._timeout_s + _BEYOND_S - silent_s
            if left_s > 0:
                self._timer.wait(left_s)
            else:
                self._standing.append(self._thread)  # it ends when its read does
                self._thread = None
                self._stands_still(FetchError(f"{self._kind}: {self._place.shown} was lost: {self._silence()}"))

    def _stands_still(self, error: FetchError) -> None:
        """Nothing comes, and not even an error."""
        raise error

    def _take(self) -> _Taken | None:
        """The oldest frame that waits."""
        try:
            return self._frames.popleft()
        except IndexError:
            return None

    def _begin(self) -> threading.Thread:
        self._standing = [thread for thread in self._standing if thread.is_alive()]
        if len(self._standing) >= _MOST_STANDING:
            raise FetchError(
                f"{self._kind}: {self._place.shown} was lost: {self._silence()}, {_MOST_STANDING} times; it is not opened again before one "
                "of these reads has ended: start the program again, or the device"
            )
        self._alive_ns = self._timer.monotonic_ns()
        # No non-daemon thread: FFmpeg may stand in a read for `timeout_s`, and a process that ends does not wait for that.
        thread = threading.Thread(target=self._work, name=f"edgeserve-{self._kind.lower()}-{self._place.shown}", daemon=True)
        self._thread = thread  # before it asks whether it is the one
        thread.start()
        return thread

    @property
    def event_time(self) -> Callable[[Any], int] | None:
        """Tells when the item that was handed out last was taken, ns since the epoch, for `DataSource(event_time=...)`. None: nothing
        does, and a `DataSource` stamps what it sends. Of another item it raises `ConfigurationError`."""
        return None if self._clock is None else self._event_time

    def _event_time(self, item: Any) -> int:
        last, event_ns = self._handed
        if event_ns is None or last is not item:
            raise ConfigurationError(
                f"{self._kind} of {self._place.shown} was asked for the time of an item that is not its last one: give DataSource the "
                f"{self._kind} itself as its stream, and change its items in gate="
            )
        return event_ns

    def wake(self) -> None:
        """Makes a `next()` that waits in another thread, or else the next one, return None at once."""
        self._woken = True
        self._timer.wake()

    def commit(self) -> None:
        """Nothing: what was handed out cannot be had again."""

    def close(self) -> None:
        """Ends the stream, from any thread, at once; its connection ends by itself then. Idempotent."""
        self._closed = True
        self._rest.wake()
        self._timer.wake()

    # --- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        error: Exception | None = None
        try:
            self._read()
        except EdgeServeError as exc:
            error = exc
        except Exception as exc:
            error = FetchError(f"{self._kind}: {self._place.shown} was lost: {self._why(exc)}")
            error.__cause__ = self._cause(exc)
        finally:
            if threading.current_thread() is self._thread:
                self._error, self._ended = error, True
                self._timer.wake()

    @property
    def _stopped(self) -> bool:
        """Asked by a thread that reads: whether nobody wants what it has."""
        return self._closed or threading.current_thread() is not self._thread

    def _still_there(self) -> None:
        if not self._stopped:
            self._alive_ns = self._timer.monotonic_ns()

    @abstractmethod
    def _read(self) -> None:
        """Reads until the stream ends or is closed."""

    def _connect(self) -> Decoder:
        self._still_there()
        place, limit = self._place, self._timeout_s
        options = {"max_pixels": str(MAX_PIXELS), **place.options}
        began_ns = self._timer.monotonic_ns()
        try:
            container = self._av.open(place.url, "r", format=place.format, options=options, timeout=(limit, limit))
        except (self._av.FFmpegError, ValueError) as exc:
            # Of a connection that was cut short by the limit some protocols say that its data is invalid.
            late = self._timer.monotonic_ns() - began_ns >= limit * SECOND
            why = f"{self._kind}: {place.shown} cannot be opened: {self._silence() if late else self._why(exc)}. {place.missing}"
            raise ConfigurationError(why) from self._cause(exc)
        try:
            stream = video_of(self._kind, container, place.shown)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        except BaseException:
            container.close()
            raise
        return Decoder(self._av, container, stream)

    def _read_once(self, put: Callable[[_Taken], None]) -> None:
        """Reads one connection to its end."""
        decoder = self._connect()
        try:
            self._frames_of(decoder, put)
        finally:
            decoder.close()

    def _frames_of(self, decoder: Decoder, put: Callable[[_Taken], None]) -> None:
        """Hands on all frames of a connection.

        Raises:
            FetchError: it was lost.
        """
        if self._stopped:
            return
        clock, count, timed_ns, lost = None if self._clock is None else self._clock(), 0, self._timer.monotonic_ns(), None
        if clock is not None:
            clock.begin(decoder.stream)

        def watch(packet: Any) -> None:
            self._still_there()  # also if no picture can be made of it
            if clock is not None:
                clock.packet(packet)

        decoder.watch = watch
        self._still_there()
        while not self._stopped:
            try:
                frame = next(decoder)
            except StopIteration:
                if lost is not None:
                    raise FetchError(f"{self._kind}: {self._place.shown} was lost: {self._why(lost)}") from self._cause(lost)
                return
            except Damaged as exc:
                if decoder.lost and lost is None:
                    lost = exc.__cause__ or exc  # the decoder may have some frames yet
                _log.debug("%s of %s: a frame is left out: %s", self._kind, self._place.shown, exc)
                continue
            if self._stopped:
                return
            event_ns = None if clock is None else clock.ns(frame)
            if clock is not None and event_ns is None:
                self._without_time(timed_ns)
            else:
                timed_ns = self._timer.monotonic_ns()
                if count % self._every == 0:
                    put(_Taken(frame, event_ns))
                    self._timer.wake()
            self._still_there()
            count += 1

    def _without_time(self, timed_ns: int) -> None:
        """A frame is left out whose time is not known yet; it will not be for ever."""
        if self._timer.monotonic_ns() - timed_ns > self._timeout_s * SECOND:
            raise ConfigurationError(
                f"{self._kind}: {self._place.shown} has sent frames for {self._timeout_s:g} s and never said when they were taken: "
                "clock='arrival' takes the time at which they are sent on"
            )

    def _why(self, exc: BaseException) -> str:
        if isinstance(exc, self._av.error.ExitError):
            return self._silence()
        return why(exc)

    def _silence(self) -> str:
        return f"nothing came for {self._timeout_s:g} s"

    def _cause(self, exc: BaseException) -> BaseException | None:
        """What an error came from; not where it would show a password."""
        return None if "@" in self._place.url else exc


class VideoStream(Live):
    """A `Video` of a URL: all frames, in order; it ends with the stream. A connection that is lost is an error, and the next call connects
    again."""

    _kind = "Video"
    _KEEP = 8

    def __init__(
        self, url: str, *, look: Look, every: int, start_ns: int | None, clock: str, timeout_s: float, timer: Timer | None
    ) -> None:
        timer = SystemTimer() if timer is None else timer
        told = None if clock == "arrival" else RtcpClock if start_ns is None else Since(start_ns, timer)
        place = network(url)
        super().__init__(place, look=look, every=every, clock=told, keep=self._KEEP, timeout_s=timeout_s, timer=timer)

    def _read(self) -> None:
        self._read_once(self._put)

    def _take(self) -> _Taken | None:
        taken = super()._take()
        if taken is not None:
            self._rest.wake()
        return taken

    def _put(self, taken: _Taken) -> None:
        while len(self._frames) >= self._KEEP and not self._stopped:
            self._rest.wait(_LONGEST_S)
        if not self._stopped:
            self._frames.append(taken)


def network(url: str) -> Place:
    """A stream over the network. RTSP goes over TCP: what is lost on the way would be lost from the picture."""
    options = {"rtsp_transport": "tcp"} if scheme_of(url) in ("rtsp", "rtsps") else {}
    return Place(url, None, options, shown(url), "Is it the right address, and does the camera or server run?")


def scheme_of(url: Any) -> str:
    """'rtsp', 'http', ... or '' for what is no URL."""
    return url.partition("://")[0].lower() if isinstance(url, str) and "://" in url else ""


def clock_of(kind: str, given: Any, url: str, *, start_ns: int | None) -> str:
    """Which clock tells the times: 'device' or 'arrival'."""
    if given not in (None, "device", "arrival"):
        raise ConfigurationError(
            f"{kind}: clock={given!r}: it is 'device', 'arrival', or None for the device's where it sends its time along"
        )
    sends = scheme_of(url) in ("", "rtsp", "rtsps") or start_ns is not None
    if given == "device" and not sends:
        raise ConfigurationError(f"{kind}: {shown(url)} does not say when its frames were taken: give start=, or clock='arrival'")
    return str(given or ("device" if sends else "arrival"))


__all__ = (
    "RETRY_S",
    "Clock",
    "DeviceClock",
    "Live",
    "Place",
    "RtcpClock",
    "Since",
    "SinceClock",
    "VideoStream",
    "clock_of",
    "network",
    "scheme_of",
)
