"""Videos as PyAV opens and decodes them: what is refused, which stream it is, pictures as NumPy arrays."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeserve.core.errors import BadRow, ConfigurationError, MissingExtra
from edgeserve.sources.times import SECOND, time_ns

FORMATS = ("rgb24", "bgr24", "gray")

MAX_PIXELS = 1 << 26
"""A picture of more pixels than this (8192 x 8192) is refused before memory is taken for it."""

_LISTS = {"concat", "concatf", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"}
"""What FFmpeg reads that names other files or hosts."""

_BACK_S = (0, 2, 10)
_PASSWORD = re.compile(r"(?<=://)[^/?#]*@")
_ATTACHED_PICTURE = 1 << 10


class Look(NamedTuple):
    """How pictures are handed out."""

    format: str
    size: tuple[int, int] | None

    def array(self, frame: Any) -> npt.NDArray[np.uint8]:
        """A decoded frame, uint8 of shape (height, width, 3), or (height, width) in gray. Nobody else has its memory."""
        width, height = self.size or (frame.width, frame.height)
        made: npt.NDArray[np.uint8] = frame.to_ndarray(format=self.format, width=width, height=height)
        return made


def look(kind: str, format: Any, size: Any) -> Look:
    """What was asked for, checked.

    Raises:
        ConfigurationError: there are no such pictures.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"{kind}: format={format!r}: it is one of {', '.join(map(repr, FORMATS))}")
    if size is None:
        return Look(format, None)
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ConfigurationError(f"{kind}: size={size!r}: it is (width, height) in pixels, or None for that of the video")
    if size[0] * size[1] > MAX_PIXELS:
        raise ConfigurationError(f"{kind}: size={size!r}: a picture has at most {MAX_PIXELS} pixels")
    return Look(format, (size[0], size[1]))


def checked_every(kind: str, every: Any) -> int:
    """A number of frames."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ConfigurationError(f"{kind}: every={every!r}: it is a number of frames, an int of at least 1")
    return every


def checked_start(kind: str, start: Any) -> int | None:
    """The time of a video's first picture, ns; None: none was given."""
    if start is None:
        return None
    try:
        return time_ns(start)
    except BadRow as exc:
        raise ConfigurationError(f"{kind}: start={start!r}: {exc}") from exc


def checked_timeout(kind: str, seconds: Any) -> float:
    """A number of seconds."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < 86_400:
        raise ConfigurationError(f"{kind}: timeout_s={seconds!r}: it is a number of seconds above 0")
    return float(seconds)


def pyav(kind: str) -> Any:
    """The module `av`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import av
    except ImportError as exc:
        raise MissingExtra(f"{kind} needs PyAV: pip install 'edgeserve-streams[video]'") from exc
    return av


def shown(url: str) -> str:
    """A URL without the user's name and password."""
    return repr(_PASSWORD.sub("", url))


def why(error: BaseException) -> str:
    """What FFmpeg says of an error, without the URL."""
    return str(getattr(error, "strerror", None) or error)


def alone(av: Any) -> dict[str, str]:
    """Options with which FFmpeg reads one file only. It opens it itself: what a signal raises within a file object of Python's is lost."""
    return {"protocol_whitelist": "file", "format_whitelist": ",".join(sorted(av.formats_available - _LISTS))}


def video_of(kind: str, container: Any, where: str) -> Any:
    """The first stream of moving pictures.

    Raises:
        ConfigurationError: there is none, or nothing that decodes it.
    """
    for stream in container.streams.video:
        if int(getattr(stream, "disposition", 0)) & _ATTACHED_PICTURE:  # the cover of a song
            continue
        if stream.codec_context is None:
            raise ConfigurationError(f"{kind}: {where} is a video that FFmpeg has no decoder for: convert it, to H.264 for example")
        return stream
    found = ", ".join(stream.type for stream in container.streams) or "nothing"
    raise ConfigurationError(f"{kind}: {where} has no video stream, but {found}: name a file or a URL with one")


def ns_of(ticks: int, time_base: Any) -> int:
    """A time in units of `time_base`, a fraction of a second, as ns."""
    return int(ticks * SECOND * time_base.numerator // time_base.denominator)


class Damaged(Exception):
    """A part of a video that cannot be decoded; what comes behind it can be asked for."""


class Decoder:
    """The frames of a stream, in the order in which they are shown. After a `Damaged` it goes on.

    Args:
        av: the module.
        container: an open container.
        stream: one of its streams.

    Attributes:
        watch: is shown each packet before it is decoded.
        lost: nothing more can be read, and its end was not reached.
    """

    def __init__(self, av: Any, container: Any, stream: Any) -> None:
        self._av, self.container, self.stream = av, container, stream
        self._packets: Iterator[Any] | None = container.demux(stream)
        self._frames = deque[Any]()
        self._broken = self.lost = False
        self.watch: Callable[[Any], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def close(self) -> None:
        """Idempotent."""
        self._packets, self._broken = None, False
        self._frames.clear()
        self.container.close()

    def __next__(self) -> Any:
        while not self._frames:
            packet = self._packet()
            if getattr(packet, "is_corrupt", False):
                raise Damaged("a part of its data is missing")
            try:
                self._frames.extend(self.stream.decode(packet))
            except EOFError:  # it was told before that nothing follows
                raise StopIteration from None
            except (self._av.FFmpegError, ValueError) as exc:
                raise Damaged(why(exc)) from exc
        return self._frames.popleft()

    def _packet(self) -> Any:
        """The next packet; None once: nothing follows."""
        if self._packets is None:
            if not self._broken:
                raise StopIteration
            self._broken = False
            return None
        try:
            packet = next(self._packets, None)
        except (self._av.FFmpegError, ValueError) as exc:
            self._packets, self._broken, self.lost = None, True, True  # what the decoder has is still to come
            raise Damaged(f"what follows cannot be read: {why(exc)}") from exc
        if packet is None:
            self._packets = None
            raise StopIteration
        if self.watch is not None:
            self.watch(packet)
        return packet

    def seek(self, pts: int) -> bool:
        """Goes behind the frame of that time; returns False where that is not certain to be exact: make a new one then.

        Formats without an index land somewhere before the time, and not at a key frame, so it is tried from further back, too.
        """
        for back_s in _BACK_S:
            try:
                if self._seek(pts, back_s * self.stream.time_base.denominator // self.stream.time_base.numerator):
                    return True
            except (Damaged, StopIteration, self._av.FFmpegError, ValueError):
                pass
        return False

    def _seek(self, pts: int, back: int) -> bool:
        self._frames.clear()
        self.container.seek(pts - back, stream=self.stream, backward=True)
        self._packets, self._broken, self.lost = self.container.demux(self.stream), False, False
        frame = next(self)
        # What a key frame refers to lies before it in this order: all that is shown after it is decoded as it was.
        if not frame.key_frame or frame.pts is None or frame.pts > pts:
            return False
        while frame.pts is not None and frame.pts < pts:
            frame = next(self)
        return bool(frame.pts == pts)


__all__ = (
    "FORMATS",
    "MAX_PIXELS",
    "Damaged",
    "Decoder",
    "Look",
    "alone",
    "checked_every",
    "checked_start",
    "checked_timeout",
    "look",
    "ns_of",
    "pyav",
    "shown",
    "video_of",
    "why",
)
