"""Pictures of a video file, at the pace at which they were recorded."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any, BinaryIO

import msgspec
from xxhash import xxh3_128

from edgeserve.core.errors import BadRow, ConfigurationError
from edgeserve.sources.av_input import MAX_PIXELS, Damaged, Decoder, Look, alone, ns_of, pyav, video_of, why
from edgeserve.sources.file_source import Step, open_file
from edgeserve.sources.replay import Place, Replay
from edgeserve.sources.timer import Timer
from edgeserve.sources.times import SECOND, in_range, time_ns

_ENDS_BYTES = 1 << 16


class VideoFile(Replay):
    """A `Video` of a file. In a `Place` a row is a frame, and `offset` the time of the frame before it in the stream's units.

    Args:
        path: the file.
        start_ns: the time of the first frame; None: that which the file says it was made at, else 0.
        look: how pictures are handed out.
        every: of so many frames one is handed out, the first one.
        speed, loop, position, timer: those of a `Replay`.
    """

    _kind = "Video"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start_ns: int | None,
        look: Look,
        every: int,
        speed: float | None,
        loop: bool,
        position: str | os.PathLike[str] | None,
        timer: Timer | None,
    ) -> None:
        super().__init__(path, speed=speed, loop=loop, position=position, timer=timer)
        self._av = pyav(self._kind)
        self._look, self._every, self._given_ns = look, every, start_ns
        self._start_ns, self._digest = 0, ""
        self.rate: Fraction | None = None
        self._decoder: Decoder | None = None
        self._told = False
        self._told_at = (0, -1)
        try:
            self._open(None)
        finally:
            self._release()

    def _open(self, saved: tuple[Place, str] | None) -> None:
        self._release()
        with self._file() as file:
            self._digest = _digest(file)
        decoder = self._decoder = self._fresh()
        self._start_ns = _made_at(decoder.container) if self._given_ns is None else self._given_ns
        rate = decoder.stream.average_rate or decoder.stream.guessed_rate
        self.rate = Fraction(rate.numerator, rate.denominator) if rate else None
        if saved is not None and self._take_up(saved, self._digest):
            self._release()

    def _file(self) -> Any:
        try:
            return open_file(self._kind, self._path)
        except FileNotFoundError as exc:
            raise ConfigurationError(f"{self._kind}: there is no file {self.path!r}") from exc

    def _fresh(self) -> Decoder:
        """A decoder at the first frame."""
        self._file().close()
        most = {"max_pixels": str(MAX_PIXELS)}
        try:
            container = self._av.open(self._path, "r", options={**alone(self._av), **most})
        except (self._av.FFmpegError, ValueError) as exc:
            raise ConfigurationError(
                f"{self._kind}: {self.path!r} cannot be read as a video: {why(exc)}. Where it was cut off before its index was written, "
                "its recorder has to end it (Matroska and MPEG-TS need no index); where it is a list of other files, name one of these"
            ) from exc
        try:
            stream = video_of(self._kind, container, repr(self.path))
            stream.codec_context.options = most
        except BaseException:
            container.close()
            raise
        return Decoder(self._av, container, stream)

    def _decoder_at(self, place: Place) -> Decoder:
        """A decoder behind the frames that are before a place."""
        decoder = self._fresh()
        if not place.row or (place.offset > 0 and decoder.seek(place.offset)):
            return decoder
        decoder.close()
        decoder, left = self._fresh(), place.row
        while left and not self._closed:
            try:
                next(decoder)
                left -= 1
            except Damaged:  # it was told when the place was not here yet
                pass
            except StopIteration:
                break
        return decoder

    def _read(self, place: Place) -> Step | None:
        decoder = self._decoder or self._decoder_at(place)
        # Until it is done: a read that is interrupted begins again at `place`.
        self._decoder = None
        while True:
            try:
                frame = next(decoder, None)
            except Damaged as exc:
                at = place.turn, place.row
                if at == self._told_at:  # one damage may show in several packets
                    continue
                self._decoder, self._told_at = decoder, at
                raise self._broken(f"behind frame {place.row}", str(exc), place) from exc
            if frame is None:
                self._end(decoder, place)
                return None
            row, offset = place.row, frame.pts or 0
            try:
                ns = self._ns(decoder.stream, frame, row)
                item = self._look.array(frame) if row % self._every == 0 else None
            except (BadRow, self._av.FFmpegError, ValueError) as exc:
                self._decoder = decoder
                raise self._broken(f"frame {row + 1}", why(exc), place.behind(None, offset)) from exc
            place = place.behind(ns, offset)
            if item is not None:
                self._decoder = decoder
                return Step(item, ns + place.shift_ns, (place.turn, row, ns), place)

    def _end(self, decoder: Decoder, place: Place) -> None:
        """Behind the last frame."""
        size = os.stat(self._path).st_size
        missing = not self._told and any(entry.pos + entry.size > size for entry in getattr(decoder.stream, "index_entries", ()))
        decoder.close()
        self._cursor.place = place  # behind frames that were left out, too: a turn is as long as the file
        if missing:
            self._told = True
            raise BadRow(
                f"{self.path}, behind frame {place.row}: it was cut off here, its index names more. Copy it again, or do with these"
            )

    def _broken(self, where: str, why: str, after: Place) -> BadRow:
        self._cursor.place = after
        return BadRow(f"{self.path}, {where}: {why}. The next call goes on behind it; copy the file again if it was whole once")

    def _ns(self, stream: Any, frame: Any, row: int) -> int:
        """The time of a frame of the first turn."""
        if frame.pts is not None:
            ns = ns_of(frame.pts - (stream.start_time or 0), stream.time_base)
        elif self.rate:  # a bare stream has no times
            ns = int(row * SECOND / self.rate)
        else:
            raise BadRow("it has no time, and the file no rate")
        return in_range(self._start_ns + ns, self._start_ns + ns)

    def _id(self, mark: tuple[int, int, int]) -> bytes:
        turn, row, ns = mark
        return b"%b:%d:%d:%d" % (self._digest.encode(), turn, row, ns)

    def _saving(self, place: Place) -> tuple[Place, str]:
        return msgspec.structs.replace(place, tail=b""), self._digest

    def _release(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()


def _digest(file: BinaryIO) -> str:
    """What tells the file from others: its size, and its first and last bytes, among which an index is."""
    size = file.seek(0, os.SEEK_END)
    digest = xxh3_128(b"%d" % size)
    for at in (0, max(size - _ENDS_BYTES, 0)):
        file.seek(at)
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def _made_at(container: Any) -> int:
    """When the file says that it was made, ns; 0: it does not."""
    try:
        return time_ns(container.metadata["creation_time"])
    except (KeyError, BadRow):
        return 0


__all__ = ("VideoFile",)
