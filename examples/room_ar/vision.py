"""Where the ball is: in a picture, in the room, and next. Pure code, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_STRIDE = 4
_ORANGE = 60.0
"""So much more red than blue: nothing else in the room is. Full weight at twice that."""

_LEAST = 12.0
_FOLLOW, _TURN = 0.9, 0.5


def detect(picture: npt.NDArray[np.uint8]) -> tuple[float, float] | None:
    """The middle of the ball in a picture (height, width, 3), red first: x and y, to a fraction of a pixel. None: it is not to be seen.

    First on every fourth pixel, then on all around these: the mean of the orange ones, those at the edge by their share.
    """
    coarse = picture[::_STRIDE, ::_STRIDE].astype(np.int16)
    rows, columns = np.nonzero(coarse[..., 0] - coarse[..., 2] > _ORANGE)
    if len(rows) == 0:
        return None
    y, x = (int(np.median(each)) * _STRIDE for each in (rows, columns))
    reach = int(2.5 * max(np.ptp(rows), np.ptp(columns), 2) * _STRIDE / 2) + 2 * _STRIDE
    y0, x0 = max(y - reach, 0), max(x - reach, 0)
    fine = picture[y0 : y + reach, x0 : x + reach].astype(float)
    weight = ((fine[..., 0] - fine[..., 2]) / _ORANGE - 0.5).clip(0, 1)
    total = weight.sum()
    if total < _LEAST or _cut_off(weight, y0, x0, picture.shape):
        return None
    return float(weight.sum(0) @ np.arange(weight.shape[1]) / total + x0), float(weight.sum(1) @ np.arange(weight.shape[0]) / total + y0)


def _cut_off(weight: Array, y0: int, x0: int, shape: tuple[int, ...]) -> bool:
    """Whether the ball reaches over the picture's edge: the middle of what is left of it is not its own."""
    height, width = weight.shape
    edges = ((y0 == 0, weight[0]), (x0 == 0, weight[:, 0]), (y0 + height == shape[0], weight[-1]), (x0 + width == shape[1], weight[:, -1]))
    return any(at and bool(edge.any()) for at, edge in edges)


def triangulate(matrices: Sequence[Array], pixels: Sequence[tuple[float, float]]) -> tuple[Array, float]:
    """The point that is nearest to what two or more cameras see (linear least squares, the direct linear transform), and how many
    pixels the cameras disagree (root mean square).

    Args:
        matrices: 3 x 4, one per camera.
        pixels: x and y, in the same order.
    """
    rows = np.concatenate([np.stack([x * m[2] - m[0], y * m[2] - m[1]]) for m, (x, y) in zip(matrices, pixels, strict=True)])
    depth, point = np.ones(len(rows)), np.zeros(3)
    for _ in range(3):  # divided by its distance an equation is an error in pixels
        scaled = rows / depth[:, None]
        point = np.linalg.lstsq(scaled[:, :3], -scaled[:, 3], rcond=None)[0]
        depth = np.repeat([float(m[2] @ np.append(point, 1)) for m in matrices], 2)
    wrong = rows @ np.append(point, 1) / depth
    return point, float(np.sqrt((wrong**2).mean()))


class Track:
    """Position and velocity, led on by the motion sensor and drawn to what cameras see; when fewer than two do, by the sensor alone.

    Attributes:
        seconds: the time that they are of; None: nothing is known yet.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.position, self.velocity = np.zeros(3), np.zeros(3)
        self._seen = 0

    def step(self, seconds: float, passed: float, turned: Array, moved: Array, seen: Array | None) -> Array | None:
        """Goes on to a time.

        Args:
            seconds: that time.
            passed: how long the sensor's summary is.
            turned: how much the velocity has changed meanwhile, m/s.
            moved: how far that alone has led, metres.
            seen: where cameras see it; None: they don't.

        Returns:
            Where it is; None: nobody has seen it yet.
        """
        if self.seconds is None or passed <= 0 or abs(seconds - self.seconds - passed) > 1e-6:
            if seen is not None:  # it begins here, or after a gap
                self.position, self.velocity, self.seconds, self._seen = seen, np.zeros(3), seconds, 1
            return seen
        self.position = self.position + self.velocity * passed + moved
        self.velocity, self.seconds = self.velocity + turned, seconds
        if seen is not None:
            wrong = seen - self.position
            # The first step tells the velocity; from then on the sensor does, and is set right.
            turn, follow = (1.0, 1.0) if self._seen == 1 else (_TURN, _FOLLOW)
            self.position, self.velocity = self.position + follow * wrong, self.velocity + turn * wrong / passed
            self._seen += 1
        return self.position
