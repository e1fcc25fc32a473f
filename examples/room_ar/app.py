"""The pipeline: pictures of three cameras and readings of a motion sensor in, one track of a ball out.

    python examples/room_ar record --room room
    ROOM=room edgeserve run --until-end examples/room_ar/app.py

What its processes need to know is in the environment:
    EDGESERVE_NODE   where messages go (default local://)
    ROOM             the recording (default: the current directory)
    OUT              directory for track.jsonl (default: the current one)
    SPEED            how many times faster than recorded (default 1)
    ROUTING          of pictures: lazy (default), eager or auto
    JOIN             of what the cameras see: exact (default) or latest
    RUN              ends the names of the topics (default: nothing)
    AT               when the sources begin, seconds since the epoch (default: at once)

Pictures and readings are known by their times, so a second run over the same recording adds nothing; to see it again, name another RUN.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vision import Track, detect, triangulate

from edgeserve.pipeline import Pipeline
from edgeserve.sinks import JsonLinesSink
from edgeserve.sources import CsvReplay, Video, time_ns
from room import CAMERAS, EVERY, FPS, IMU_HZ, START_S, load_cameras

ROOM, OUT = Path(os.environ.get("ROOM") or "."), Path(os.environ.get("OUT") or ".")
SPEED, AT = float(os.environ.get("SPEED") or 1), float(os.environ.get("AT") or 0)
ROUTING, JOIN, RUN = os.environ.get("ROUTING") or "lazy", os.environ.get("JOIN") or "exact", os.environ.get("RUN") or ""

BEHIND_S = 2.0
"""How far the sensor is behind the cameras: what they see at the same time is then looked for at the same time, whichever began first."""

# With 'latest', too, only what was seen at the same time makes a set; but as it comes, and the newest.
JOINS: dict[str, dict[str, Any]] = {"exact": {"join": "exact"}, "latest": {"max_time_diff_ms": 500 / FPS, "no_overlap": True}}


def begin(behind_s: float = 0.0) -> None:
    time.sleep(max(0.0, AT - time.time()) + behind_s)


def camera(n: int) -> Video:
    """Each picture of a film when it is due."""
    film = Video(ROOM / f"camera-{n}.mp4", start=START_S, speed=SPEED)
    begin()
    return film


def readings() -> Iterator[dict[str, Any]]:
    """One per asked-for picture: when, how long since the last one, and what the velocity and the position have gained by acceleration."""
    begin(BEHIND_S)
    step, passed, turned, moved = 1 / IMU_HZ, 0.0, np.zeros(3), np.zeros(3)
    with CsvReplay(ROOM / "imu.csv", time="t", speed=SPEED) as rows:
        for n, row in enumerate(rows):
            if n % (EVERY * IMU_HZ // FPS) == 0:
                yield {"ns": time_ns(row["t"]), "passed": passed, "turned": turned.tolist(), "moved": moved.tolist()}
                passed, turned, moved = 0.0, np.zeros(3), np.zeros(3)
            pull = np.array([float(row[axis]) for axis in ("ax", "ay", "az")])
            moved += turned * step + pull * step**2 / 2
            turned += pull * step
            passed += step


def when(reading: dict[str, Any]) -> int:
    return int(reading["ns"])


def find(frame: np.ndarray[Any, Any], imu: dict[str, Any]) -> dict[str, Any]:
    """Where the ball is in a picture. Only pictures that a reading names are ever fetched."""
    found = detect(frame)
    return {"found": found is not None, "pixel": list(found or ())}


class Fuse:
    """One point from what the cameras see, and one track from these and the motion sensor."""

    def setup(self) -> None:
        self._matrices = [each.matrix for each in load_cameras(ROOM)]
        self._track = Track()

    def __call__(self, seen0: dict[str, Any], seen1: dict[str, Any], seen2: dict[str, Any], imu: dict[str, Any]) -> dict[str, Any] | None:
        seen = [(matrix, each["pixel"]) for matrix, each in zip(self._matrices, (seen0, seen1, seen2), strict=True) if each["found"]]
        point, wrong = triangulate([m for m, _ in seen], [p for _, p in seen]) if len(seen) >= 2 else (None, 0.0)
        place = self._track.step(imu["ns"] / 1e9, imu["passed"], np.array(imu["turned"]), np.array(imu["moved"]), point)
        if place is None:
            return None
        return {"ns": imu["ns"], "place": place.round(5).tolist(), "cameras": len(seen), "pixels_off": round(wrong, 3)}


class Written(JsonLinesSink):
    """A line of JSON for each point of the track, with the time at which it was written."""

    def __call__(self, value: dict[str, Any]) -> None:
        super().__call__(value | {"done_ns": time.time_ns()})


app = Pipeline(f"room{RUN}")
# Both come in order: a picture that is not asked for by then never will be.
app.add_source("imu", readings, event_time=when, message_id=when, max_lateness_ms=0, place="west")
for n in range(CAMERAS):
    place = "east" if n == CAMERAS - 1 else "west"
    app.add_source(f"camera{n}", camera, args={"n": n}, max_lateness_ms=0, routing=ROUTING, place=place)
    app.add_task(f"seen{n}", find, sources=[f"camera{n}", "imu"], join="exact", place="server")
app.add_task("track", Fuse, **JOINS[JOIN], place="server")
app.add_sink("sink", Written, args={"path": OUT / "track.jsonl"}, of="track", place="server")
