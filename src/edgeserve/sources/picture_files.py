"""What the research prototype's camera sources sent: pictures written as JPEG files, and the URLs under which an FTP server has them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from edgeserve.core.errors import ConfigurationError
from edgeserve.sources.av_input import pyav
from edgeserve.sources.base import Source
from edgeserve.sources.camera import Camera
from edgeserve.sources.video import Video


class PictureFiles(Source):
    """Writes each picture as a JPEG file, and yields its URL.

    A file is there as a whole or not at all. It is named after the time at which it was written, in seconds.

    Args:
        kind: whose errors these are.
        camera: the number of a camera, a device, a URL, or a video file, whose pictures come as fast as they are taken.
        local_ftp_path: the directory where the files go, which must be there.
        global_ftp_path: the URL of that directory.
        size: width and height of the pictures.
        timestamps: of a video file: how many seconds are passed over before each picture. None: all pictures.
    """

    resumable = False

    def __init__(
        self,
        kind: str,
        camera: int | str | os.PathLike[str],
        local_ftp_path: str | os.PathLike[str],
        global_ftp_path: str,
        size: tuple[int, int],
        timestamps: Iterable[float] | None = None,
    ) -> None:
        if not isinstance(global_ftp_path, str) or "://" not in global_ftp_path:
            raise ConfigurationError(
                f"{kind}: global_ftp_path={global_ftp_path!r}: it is the URL of a directory, such as 'ftp://edge-1/files/'"
            )
        self._folder, self._url = Path(local_ftp_path), global_ftp_path.rstrip("/")
        if not self._folder.is_dir():
            raise ConfigurationError(f"{kind}: local_ftp_path={str(local_ftp_path)!r} is not a directory: create it first")
        self._av = pyav(kind)
        self._pictures: Video | Camera
        if isinstance(camera, (str, os.PathLike)) and os.path.isfile(camera):
            self._pictures = Video(camera, speed=None, size=size)
        elif timestamps is None:
            self._pictures = Camera(camera if isinstance(camera, int) else os.fspath(camera), size=size)
        else:
            raise ConfigurationError(f"{kind}: cam_id={camera!r} is no file: timestamps= pass over parts of a video file, so name one")
        self._waits = None if timestamps is None else iter(timestamps)
        self._last_ns = 0

    def __next__(self) -> Any:
        picture = self._next_picture()
        return None if picture is None else self._write(picture)

    def _next_picture(self) -> Any:
        if self._waits is None:
            return next(self._pictures)
        skip = int((self._pictures.rate_hz or 0) * next(self._waits)) if isinstance(self._pictures, Video) else 0
        return next(islice(self._pictures, skip, None))

    def _write(self, picture: Any) -> str:
        self._last_ns = max(time.time_ns(), self._last_ns + 1)
        name = f"{self._last_ns // 10**9}.{self._last_ns % 10**9:09}.jpg"
        fresh = self._folder / f".{name}.new"
        fresh.write_bytes(jpeg(self._av, picture))
        fresh.replace(self._folder / name)
        return f"{self._url}/{name}"

    def wake(self) -> None:
        self._pictures.wake()

    def commit(self) -> None:
        """Nothing: a new start begins anew."""

    def close(self) -> None:
        self._pictures.close()


def jpeg(av: Any, picture: Any) -> bytes:
    """A picture of shape (height, width, 3), red first, as JPEG."""
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = frame.width, frame.height, "yuvj420p", Fraction(1, 25)
    encoder.options = {"qmin": "2", "qmax": "4"}
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


__all__ = ("PictureFiles", "jpeg")
