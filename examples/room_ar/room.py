"""The room, and its recordings: three cameras' films and a motion sensor's readings of a ball that flies around, and the truth.

Films are real H.264 files. What is in them is rendered here: rays from each pixel to the ball, a floor of tiles, grey walls, sensor noise.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SIZE = np.array([6.0, 5.0, 3.0])
"""Of the room, metres: x and y on the floor, z upwards."""

WIDTH, HEIGHT, FOCAL = 640, 480, 420.0
FPS, EVERY = 25, 10
"""Pictures a second, and of how many one is asked for: the motion sensor's readings name them, 2.5 a second."""

IMU_HZ = 100
START_S = 1_793_610_000
CAMERAS = 3
RADIUS = 0.12
ORANGE = np.array([250.0, 120.0, 10.0])
_SUBPIXELS = 3
_AMPLITUDE, _SPEED, _PHASE = np.array([1.7, 1.4, 0.6]), np.array([0.9, 1.3, 1.7]), np.array([0.0, 0.5, 1.1])


@dataclass(frozen=True)
class Camera:
    """A calibrated camera: what `place` sees through a pinhole.

    Attributes:
        place: where it hangs, metres.
        turn: 3 x 3, from the room's axes to the camera's (right, down, ahead).
    """

    place: Array
    turn: Array

    @property
    def matrix(self) -> Array:
        """3 x 4: homogeneous points of the room to homogeneous pixels."""
        inner = np.array([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]])
        return np.asarray(inner @ np.column_stack([self.turn, -self.turn @ self.place]))

    def project(self, point: Array) -> Array:
        """The pixel at which a point is seen, x and y."""
        seen = self.matrix @ np.append(point, 1)
        return np.asarray(seen[:2] / seen[2])


def cameras() -> list[Camera]:
    """Three, under the ceiling, all looking at the middle."""
    return [_looking(np.array(place)) for place in ([0.2, 0.2, 2.7], [5.8, 0.4, 2.6], [2.6, 4.8, 2.8])][:CAMERAS]


def _looking(place: Array) -> Camera:
    ahead = np.array([SIZE[0] / 2, SIZE[1] / 2, 1.1]) - place
    ahead /= np.linalg.norm(ahead)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    return Camera(place, np.stack([right, np.cross(ahead, right), ahead]))


# --- the truth ----------------------------------------------------------------------------------------------------


def position(seconds: float) -> Array:
    """Where the ball is, metres."""
    return np.asarray([SIZE[0] / 2, SIZE[1] / 2, 1.3] + _AMPLITUDE * np.sin(_SPEED * seconds + _PHASE))


def acceleration(seconds: float) -> Array:
    """Of the ball, m/s2."""
    return np.asarray(-_AMPLITUDE * _SPEED**2 * np.sin(_SPEED * seconds + _PHASE))


def frame_ns(number: int) -> int:
    """When a picture was taken, ns."""
    return START_S * 10**9 + number * 10**9 // FPS


# --- pictures -----------------------------------------------------------------------------------------------------


class Eye:
    """Renders what one camera sees."""

    def __init__(self, camera: Camera, seed: int) -> None:
        self._camera = camera
        self._random = np.random.default_rng(seed)
        self._background = self._walls()

    def _rays(self, x: Array, y: Array) -> Array:
        """Directions of unit length from the camera through pixels, in the room's axes."""
        ahead = np.stack(np.broadcast_arrays((x - (WIDTH - 1) / 2) / FOCAL, (y - (HEIGHT - 1) / 2) / FOCAL, 1.0), -1)
        rays = ahead @ self._camera.turn
        return np.asarray(rays / np.linalg.norm(rays, axis=-1, keepdims=True))

    def _walls(self) -> Array:
        rays = self._rays(np.arange(WIDTH)[None, :], np.arange(HEIGHT)[:, None])
        with np.errstate(divide="ignore"):
            far = np.where(rays > 0, (SIZE - self._camera.place) / rays, -self._camera.place / rays)
        which = far.argmin(-1)
        hit = self._camera.place + rays * far.min(-1, keepdims=True)
        tiles = (np.floor(hit[..., 0] / 0.5) + np.floor(hit[..., 1] / 0.5)) % 2
        grey = np.where((which == 2) & (rays[..., 2] < 0), 70 + 50 * tiles, np.choose(which, [150.0, 165.0, 190.0]))
        return np.asarray(grey[..., None] * [1.0, 1.0, 1.04])

    def picture(self, ball: Array) -> npt.NDArray[np.uint8]:
        """uint8 of shape (HEIGHT, WIDTH, 3), red first, with the ball there."""
        made = self._background.copy()
        u, v = self._camera.project(ball)
        reach = 1.5 * FOCAL * RADIUS / float((self._camera.turn @ (ball - self._camera.place))[2]) + 2
        x0, x1 = max(int(u - reach), 0), min(int(u + reach) + 2, WIDTH)
        y0, y1 = max(int(v - reach), 0), min(int(v + reach) + 2, HEIGHT)
        if x0 < x1 and y0 < y1:
            offsets = (np.arange(_SUBPIXELS) + 0.5) / _SUBPIXELS - 0.5
            x = (np.arange(x0, x1)[:, None] + offsets).ravel()[None, :]
            y = (np.arange(y0, y1)[:, None] + offsets).ravel()[:, None]
            hit, light = self._sphere(self._rays(x, y), ball)
            shape = (y1 - y0, _SUBPIXELS, x1 - x0, _SUBPIXELS)
            share = hit.reshape(shape).mean((1, 3))[..., None]
            shade = (hit * light).reshape(shape).mean((1, 3))[..., None]
            made[y0:y1, x0:x1] = made[y0:y1, x0:x1] * (1 - share) + ORANGE * shade
        made += self._random.normal(0, 3, made.shape)
        return np.asarray(made.clip(0, 255).astype(np.uint8))

    def _sphere(self, rays: Array, ball: Array) -> tuple[Array, Array]:
        """Where rays meet the ball (1 or 0), and how bright it is there; the light is in the middle of the ceiling."""
        to = self._camera.place - ball
        along = rays @ to
        under = along**2 - (to @ to - RADIUS**2)
        hit = under > 0
        surface = (to + rays * (-along - np.sqrt(under.clip(0)))[..., None]) / RADIUS
        lamp = np.array([SIZE[0] / 2, SIZE[1] / 2, SIZE[2]]) - ball
        return hit.astype(float), 0.75 + 0.25 * (surface @ (lamp / np.linalg.norm(lamp))).clip(0)


# --- recordings ---------------------------------------------------------------------------------------------------


def record(folder: Path, seconds: float, seed: int = 1) -> None:
    """Writes camera-0.mp4 and so on, imu.csv, truth.csv and cameras.json. The same seed gives the same room."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, camera in enumerate(cameras()):
        _film(folder / f"camera-{index}.mp4", Eye(camera, seed * 100 + index), seconds)
    _readings(folder / "imu.csv", seconds, np.random.default_rng(seed * 100 + 99))
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ns", "x", "y", "z"])
        rows.writerows([frame_ns(n), *position(n / FPS).round(6)] for n in range(_frames(seconds)))
    calibrations = [{"place": camera.place.tolist(), "turn": camera.turn.tolist()} for camera in cameras()]
    (folder / "cameras.json").write_text(json.dumps(calibrations, indent=1))


def _frames(seconds: float) -> int:
    return max(int(seconds * FPS), 1)


def _film(path: Path, eye: Eye, seconds: float) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20"}
        for n in range(_frames(seconds)):
            frame = av.VideoFrame.from_ndarray(eye.picture(position(n / FPS)), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _readings(path: Path, seconds: float, random: np.random.Generator) -> None:
    """Accelerations as a cheap sensor would have them: noise, and a bias that stays."""
    bias = random.normal(0, 0.03, 3)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["t", "ax", "ay", "az"])
        for n in range(_frames(seconds) * IMU_HZ // FPS):
            measured = acceleration((n + 0.5) / IMU_HZ) + bias + random.normal(0, 0.05, 3)  # the mean over the step that begins then
            rows.writerow([f"{START_S + n / IMU_HZ:.2f}", *(f"{each:.5f}" for each in measured)])


def load_cameras(folder: Path) -> list[Camera]:
    """The calibrations beside a recording."""
    return [Camera(np.array(each["place"]), np.array(each["turn"])) for each in json.loads((folder / "cameras.json").read_text())]


def load_truth(folder: Path) -> dict[int, Array]:
    """Where the ball was, by time in ns."""
    with (folder / "truth.csv").open(newline="") as file:
        return {int(row["ns"]): np.array([float(row[axis]) for axis in "xyz"]) for row in csv.DictReader(file)}


def summary(folder: Path) -> dict[str, Any]:
    """How long a recording is, and how many pictures of each camera are asked for."""
    frames = len(load_truth(folder))
    return {"seconds": frames / FPS, "asked": (frames + EVERY - 1) // EVERY}
