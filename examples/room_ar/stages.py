"""The stages, each a function that runs until its inputs have ended: a process of its own, on whatever host.

camera 0..2   Video of camera-N.mp4          -> frames-N          every picture, at its pace
imu           motion, 2.5 readings a second  -> frames-0..2, seen each names a picture by its time
detect 0..2   frame and imu, exact           -> seen              where the ball is in the picture that was named
track         cam0, cam1, cam2, imu          -> track             where it is in the room
sink          track                          -> files, a film, the report
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from view import Report
from vision import Track, detect, triangulate

import edgeserve
from edgeserve import Compute, DataSource, Materialize
from edgeserve.sinks import JsonLinesSink
from edgeserve.sources import CsvReplay, Video, time_ns
from room import CAMERAS, EVERY, FPS, IMU_HZ, load_cameras


@dataclass(frozen=True)
class Setting:
    """What all stages agree on.

    Attributes:
        node: where the messages go.
        folder: the recording.
        routing: of pictures: 'eager' or 'lazy'.
        join: of what the cameras see: 'exact' or 'latest'.
        speed: how many times faster than recorded.
        run: ends the names of the topics.
        at: when the sources begin, seconds since the epoch; 0: at once.
    """

    node: str
    folder: Path
    routing: Any = "lazy"
    join: str = "exact"
    speed: float = 1.0
    run: str = ""
    at: float = 0.0

    def topic(self, name: str) -> str:
        return f"{name}{self.run}"

    def wait(self) -> None:
        time.sleep(max(0.0, self.at - time.time()))


# --- sources ------------------------------------------------------------------------------------------------------


def camera(setting: Setting, index: int) -> None:
    """Sends each picture of a film when it is due. Pictures come in order: what was not asked for by then never will be."""
    film = Video(setting.folder / f"camera-{index}.mp4", start=_began(setting), speed=setting.speed)
    setting.wait()
    with DataSource(
        film,
        setting.node,
        source_id="frame",
        topic=setting.topic(f"frames-{index}"),
        event_time=film.event_time,
        message_id=film.message_id,
        max_lateness_ms=0,
        routing=setting.routing,
    ) as source:
        source.run()


def _began(setting: Setting) -> str:
    """When the recording began: what all its times count from."""
    with CsvReplay(setting.folder / "imu.csv", time="t", speed=None) as rows:
        return str(next(rows)["t"])


def imu(setting: Setting) -> None:
    """Sends what the motion sensor has measured since its last reading to everyone who is to act on it."""
    setting.wait()
    topics = [setting.topic(name) for name in (*(f"frames-{n}" for n in range(CAMERAS)), "seen")]
    options: dict[str, Any] = {"event_time": _ns, "message_id": _ns, "max_lateness_ms": 0}
    with ExitStack() as stack:
        open_: list[DataSource] = [
            stack.enter_context(DataSource(readings(setting), setting.node, source_id="imu", topic=topic, **options)) for topic in topics
        ]
        while open_:
            open_ = [each for each in open_ if next(each, None) is not None]


def readings(setting: Setting) -> Iterator[dict[str, Any]]:
    """One per asked-for picture: when, how long since the last one, and what the velocity and the position have gained by acceleration."""
    step, passed, turned, moved = 1 / IMU_HZ, 0.0, np.zeros(3), np.zeros(3)
    with CsvReplay(setting.folder / "imu.csv", time="t", speed=setting.speed) as rows:
        for n, row in enumerate(rows):
            if n % (EVERY * IMU_HZ // FPS) == 0:
                yield {"ns": time_ns(row["t"]), "passed": passed, "turned": turned.tolist(), "moved": moved.tolist()}
                passed, turned, moved = 0.0, np.zeros(3), np.zeros(3)
            pull = np.array([float(row[axis]) for axis in ("ax", "ay", "az")])
            moved += turned * step + pull * step**2 / 2
            turned += pull * step
            passed += step


def _ns(reading: dict[str, Any]) -> int:
    return int(reading["ns"])


# --- tasks --------------------------------------------------------------------------------------------------------


def find(frame: np.ndarray[Any, Any], imu: dict[str, Any]) -> dict[str, Any]:
    """The task of `detect`: only pictures that a reading names are ever fetched."""
    found = detect(frame)
    return {"found": found is not None, "pixel": list(found or ())}


def detecting(setting: Setting, index: int) -> None:
    topics = {"topic_in": setting.topic(f"frames-{index}"), "topic_out": setting.topic("seen")}
    with Compute(find, setting.node, worker_id=f"cam{index}", join="exact", **topics) as compute:
        compute.run(until="end")


class Fuse:
    """The task of `track`: one point from what the cameras see, and one track from these and the motion sensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def setup(self) -> None:
        self._matrices = [each.matrix for each in load_cameras(self._folder)]
        self._track = Track()

    def __call__(self, cam0: dict[str, Any], cam1: dict[str, Any], cam2: dict[str, Any], imu: dict[str, Any]) -> dict[str, Any] | None:
        seen = [(matrix, cam["pixel"]) for matrix, cam in zip(self._matrices, (cam0, cam1, cam2), strict=True) if cam["found"]]
        point, wrong = triangulate([m for m, _ in seen], [p for _, p in seen]) if len(seen) >= 2 else (None, 0.0)
        place = self._track.step(imu["ns"] / 1e9, imu["passed"], np.array(imu["turned"]), np.array(imu["moved"]), point)
        if place is None:
            return None
        return {"ns": edgeserve.context().event_ns, "place": place.round(5).tolist(), "cameras": len(seen), "pixels_off": round(wrong, 3)}


def tracking(setting: Setting) -> None:
    # With 'latest' only what was seen at the same time makes a set, too; but as it comes, and the newest.
    options: dict[str, Any] = {"join": "exact"} if setting.join == "exact" else {"max_time_diff_ms": 500 / FPS, "no_overlap": True}
    topics = {"topic_in": setting.topic("seen"), "topic_out": setting.topic("track")}
    with Compute(Fuse(setting.folder), setting.node, worker_id="track", **topics, **options) as compute:
        compute.run(until="end")


def sinking(setting: Setting, out: Path, *, live: bool) -> None:
    """Writes track.jsonl, track.mp4 and report.json."""
    out.mkdir(parents=True, exist_ok=True)
    with JsonLinesSink(out / "track.jsonl") as lines, Report(setting.folder, out, live=live) as report:

        def keep(fix: dict[str, Any]) -> None:
            lines.write(fix, id_=edgeserve.context().join_id)
            report.add(fix)

        with Materialize(keep, setting.node, topic=setting.topic("track")) as sink:
            sink.run(until="end")
