"""`Camera`: the newest picture of a camera."""

from __future__ import annotations

import logging
from typing import Any

from edgeserve.core.errors import ConfigurationError, EdgeServeError, FetchError
from edgeserve.sources import live
from edgeserve.sources.av_input import checked_timeout, look
from edgeserve.sources.live import DeviceClock, Live, Place, RtcpClock, clock_of, network, scheme_of
from edgeserve.sources.timer import Timer

_log = logging.getLogger("edgeserve")


class Camera(Live):
    """The newest picture of a camera, as often as it is asked for; each once. Needs PyAV, the extra `video`.

    A picture is a NumPy array, uint8, of shape (height, width, 3), or (height, width) for 'gray'. Whoever takes them slowly misses some,
    which `dropped` counts, and never gets an old one. A camera that is lost after its first picture is looked for every second; there is
    no end. A thread reads it, so that `close()`, SIGTERM and Ctrl-C never wait for it.

    Args:
        device: a video device of this machine, '/dev/video0' or 0; or the URL of a network camera, 'rtsp://host/path'.
        format: 'rgb24', 'bgr24' or 'gray'.
        size: (width, height). A device is asked for it, and what it sends is scaled to it. None: as it sends them.
        rate_hz: how many pictures a second a device is asked for. None: its own choice.
        clock: which clock tells the event times: 'device': the driver's stamps, or what a network camera says in RTCP sender reports;
            'arrival': none, and `event_time` is None, so that a `DataSource` stamps what it sends. None: 'device' for devices and RTSP.
        timeout_s: how long connecting may take, and how long nothing may come before the camera counts as lost.
        timer: what waits; tests hand in another.

    Attributes:
        path: the device or URL, as it was given.
        dropped: how many pictures were replaced by newer ones before anybody took them.

    Raises:
        MissingExtra: PyAV is not installed.
        ConfigurationError: something that cannot work; or by `next()`: there is no such camera. The next call tries again.
        FetchError: by `next()`: it is there and sends nothing. The next call tries again. Or two reads of it stand still: then it is not
            opened again before one of them has ended.
        BadRow: by `next()`: a picture that cannot be handed out. The next call goes on behind it.
    """

    _kind = "Camera"

    def __init__(
        self,
        device: str | int = "/dev/video0",
        *,
        format: str = "rgb24",
        size: tuple[int, int] | None = None,
        rate_hz: float | None = None,
        clock: str | None = None,
        timeout_s: float = 10.0,
        timer: Timer | None = None,
    ) -> None:
        looks = look(self._kind, format, size)
        self.path = device
        self.dropped = self._seen = 0
        place = _place(device, size, rate_hz)
        told = clock_of(self._kind, clock, place.url, start_ns=None)
        kept = None if told == "arrival" else RtcpClock if scheme_of(place.url) else DeviceClock
        timeout_s = checked_timeout(self._kind, timeout_s)
        super().__init__(place, look=looks, every=1, clock=kept, keep=1, timeout_s=timeout_s, timer=timer)

    def _stands_still(self, error: FetchError) -> None:
        if not self._seen:
            raise error
        _log.warning("%s (it is opened once more)", error)

    def _read(self) -> None:
        told = False
        while not self._stopped:
            try:
                before = self._seen
                self._read_once(self._put)
            except EdgeServeError as exc:
                if not self._seen:
                    raise
                if not told or self._seen > before:
                    _log.warning("%s (it is looked for every %g s)", exc, live.RETRY_S)
                told = True
            self._still_there()
            if not self._stopped:
                self._rest.wait(live.RETRY_S)

    def _put(self, taken: Any) -> None:
        if self._take() is not None:
            self.dropped += 1
        self._frames.append(taken)
        self._seen += 1


def _place(device: Any, size: Any, rate_hz: Any) -> Place:
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        device = f"/dev/video{device}"
    if not isinstance(device, str) or not device:
        raise ConfigurationError(f"Camera: {device!r}: a device is wanted, such as '/dev/video0' or 0, or a URL such as 'rtsp://host/path'")
    if rate_hz is not None and (not isinstance(rate_hz, (int, float)) or isinstance(rate_hz, bool) or not 0 < rate_hz < 100_000):
        raise ConfigurationError(f"Camera: rate_hz={rate_hz!r}: it is a number of pictures a second, above 0")
    if scheme_of(device):
        if rate_hz is not None:
            raise ConfigurationError("Camera: rate_hz is for devices: a network camera has its rate in its own settings")
        return network(device)
    options = {"timestamps": "abs"}
    if size is not None:
        options["video_size"] = f"{size[0]}x{size[1]}"
    if rate_hz is not None:
        options["framerate"] = f"{rate_hz:g}"
    missing = "Look for it with `ls /dev/video*`; another program may have it; its user has to be in the group `video`"
    return Place(device, "v4l2", options, device, missing)


__all__ = ("Camera",)
