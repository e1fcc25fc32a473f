"""`Video`: the pictures of a recording, or of a stream over the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from edgeserve.core.errors import ConfigurationError
from edgeserve.sources.av_input import checked_every, checked_start, checked_timeout, look
from edgeserve.sources.base import Source
from edgeserve.sources.live import VideoStream, clock_of, scheme_of
from edgeserve.sources.timer import Timer
from edgeserve.sources.video_file import VideoFile


class Video(Source):
    """The pictures of a video, as NumPy arrays: a file's at the pace at which they were recorded, a URL's as they come. Needs PyAV, the
    extra `video`.

    A picture is uint8, of shape (height, width, 3), or (height, width) for 'gray'. It is due as long after the first one as its time in the
    file (PTS) says, divided by `speed`; delays do not add up. All are handed out, in order. For the newest of a camera take a `Camera`.

    Args:
        path: a file in whatever format FFmpeg reads; or a URL, 'rtsp://host/path' for example. A URL's pace is its sender's, `speed` has no
            say, and it cannot be read again: no `loop`, no `position`, no `message_id`.
        start: when the first picture was taken: seconds since the epoch, ISO 8601 or a datetime, as in `time_ns`. None: when the file says
            that it was made (`creation_time`), or else 1970, so that event times are those in the file.
        speed: how many times faster than recorded. None: as fast as the pictures are taken.
        format: 'rgb24', 'bgr24' or 'gray'.
        size: (width, height), to which pictures are scaled. None: as they are.
        every: of so many pictures one is handed out, beginning with the first.
        loop: begins again at the end, for ever. Times go on: the file's length is added to them with each turn.
        position: a file that keeps the place behind the last picture that a `DataSource` has sent, so that a new start goes on there.
        clock: for a URL: which clock tells the times: 'device': what an RTSP server says in RTCP sender reports, or the stream's times
            from `start` on; 'arrival': none, and `event_time` is None, so that a `DataSource` stamps what it sends. None: 'device' for
            RTSP, and where there is a `start`.
        timeout_s: for a URL: how long connecting may take, and how long nothing may come.
        timer: what tells the time and waits; tests hand in another.

    Attributes:
        path: the file or URL, as it was given.
        resumable: whether there is a position.

    Raises:
        MissingExtra: PyAV is not installed.
        ConfigurationError: the file cannot be read, or holds no video; or by `next()`: the URL cannot be opened.
        BadRow: by `next()`: a part of the file cannot be decoded; the next call goes on behind it.
        FetchError: by `next()`: the connection was lost; the next call connects again.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start: Any = None,
        speed: float | None = 1.0,
        format: str = "rgb24",
        size: tuple[int, int] | None = None,
        every: int = 1,
        loop: bool = False,
        position: str | os.PathLike[str] | None = None,
        clock: str | None = None,
        timeout_s: float = 10.0,
        timer: Timer | None = None,
    ) -> None:
        looks, every = look("Video", format, size), checked_every("Video", every)
        start_ns, timeout_s = checked_start("Video", start), checked_timeout("Video", timeout_s)
        self._source: VideoFile | VideoStream
        if (scheme := scheme_of(path)) == "file":
            raise ConfigurationError(f"Video: {path!r}: a file is given by its path")
        if scheme:
            url = os.fspath(path)
            if loop or position is not None:
                raise ConfigurationError("Video: a URL cannot be read again: loop= and position= are for files")
            told = clock_of("Video", clock, url, start_ns=start_ns)
            self._source = VideoStream(url, look=looks, every=every, start_ns=start_ns, clock=told, timeout_s=timeout_s, timer=timer)
        else:
            if clock is not None:
                raise ConfigurationError(f"Video: clock={clock!r}: it is for URLs; the times of a file are its own, from start= on")
            self._source = VideoFile(
                path, start_ns=start_ns, look=looks, every=every, speed=speed, loop=loop, position=position, timer=timer
            )
        self.path = path
        self.resumable = self._source.resumable

    def __next__(self) -> Any:
        return next(self._source)

    @property
    def event_time(self) -> Callable[[Any], int] | None:
        """Tells the event time of the picture that was handed out last, ns since the epoch, for `DataSource(event_time=...)`. None for a
        URL with clock='arrival'. Of another picture it raises `ConfigurationError`."""
        return self._source.event_time

    @property
    def message_id(self) -> Callable[[Any], bytes] | None:
        """Tells an id of the picture that was handed out last, the same after every restart, for `DataSource(message_id=...)`. None for
        a URL. Of another picture it raises `ConfigurationError`."""
        return self._source.message_id if isinstance(self._source, VideoFile) else None

    @property
    def rate_hz(self) -> float | None:
        """How many pictures a second the file says that it has, on average. None: it does not, or it is a URL."""
        rate = self._source.rate if isinstance(self._source, VideoFile) else None
        return None if rate is None else float(rate)

    def wake(self) -> None:
        """Makes a `next()` that waits in another thread, or else the next one that would wait, return None at once."""
        self._source.wake()

    def commit(self) -> None:
        """All pictures so far are safe where they went: with `position=`, a new start goes on behind them. A `DataSource` calls this."""
        self._source.commit()

    def close(self) -> None:
        """Ends the stream, from any thread: a `next()` that waits raises StopIteration, and so do later ones. Idempotent."""
        self._source.close()


__all__ = ("Video",)
