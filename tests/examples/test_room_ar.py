"""The room example: the ball is found to a fraction of a pixel, the track is right, and the whole of it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.examples.conftest import ROOM_AR

av = pytest.importorskip("av")

import vision  # noqa: E402

import room  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of the room."""
    folder = tmp_path_factory.mktemp("room")
    room.record(folder, 4)
    return folder


def edgeserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def test_the_ball_is_found_to_a_fraction_of_a_pixel() -> None:
    for camera in room.cameras():
        eye = room.Eye(camera, 1)
        for seconds in (0.0, 1.1, 2.7):
            ball = room.position(seconds)
            found, (x, y) = vision.detect(eye.picture(ball)), camera.project(ball)
            if 40 < x < room.WIDTH - 40 and 40 < y < room.HEIGHT - 40:
                assert found is not None and np.hypot(found[0] - x, found[1] - y) < 0.5
            else:
                assert found is None


def test_no_ball_is_none() -> None:
    camera = room.cameras()[0]
    behind = camera.place - 2 * (np.array([3, 2.5, 1.1]) - camera.place)
    assert vision.detect(np.full((480, 640, 3), 120, np.uint8)) is None
    assert vision.detect(room.Eye(camera, 1).picture(behind)) is None


def test_two_cameras_give_a_point_and_three_agree_on_it() -> None:
    cameras, ball = room.cameras(), np.array([2.0, 3.1, 0.7])
    for some in (cameras, cameras[1:]):
        pixels = [tuple(each.project(ball)) for each in some]
        point, wrong = vision.triangulate([each.matrix for each in some], pixels)  # type: ignore[arg-type]
        assert np.linalg.norm(point - ball) < 1e-6 and wrong < 1e-6


def test_the_sensor_leads_on_while_nobody_sees_the_ball() -> None:
    track, step, errors = vision.Track(), 0.4, []
    for n in range(12):
        at = n * step
        fine = np.linspace(at - step, at, 41)[:-1] + step / 80
        pulls = np.array([room.acceleration(each) for each in fine])
        turned = pulls.sum(0) * step / 40
        moved = (pulls * (at - fine)[:, None]).sum(0) * step / 40
        seen = room.position(at) if n not in (8, 9) else None
        place = track.step(at, step if n else 0.0, turned, moved, seen)
        assert place is not None
        errors.append(float(np.linalg.norm(place - room.position(at))))
    assert max(errors[3:]) < 0.05


def test_the_recording_is_what_the_truth_says(folder: Path) -> None:
    truth, cameras = list(room.load_truth(folder).values()), room.load_cameras(folder)
    with av.open(str(folder / "camera-1.mp4")) as film:
        frames = list(film.decode(video=0))
    assert len(frames) == len(truth) == 100
    found = vision.detect(frames[60].to_ndarray(format="rgb24"))
    assert found is not None and np.hypot(*(np.array(found) - cameras[1].project(truth[60]))) < 1.5


@pytest.mark.parametrize("options", [[], ["--routing", "eager", "--join", "latest"]])
def test_the_whole_of_it_gives_a_track(folder: Path, tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, str(ROOM_AR), "--room", str(folder), "--out", str(tmp_path / "out"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"HOME": str(tmp_path)})
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["median_cm"] <= 5.0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "track.jsonl").read_text().splitlines()]
    times = [room.frame_ns(n * room.EVERY) for n in range(10)]
    assert (report["results"], report["asked"]) == (len(lines), 10)
    if "latest" in options:  # which pictures meet depends on when they come
        assert lines and {line["ns"] for line in lines} <= {*times}
    else:
        assert [line["ns"] for line in lines] == times
    with av.open(str(tmp_path / "out" / "track.mp4")) as film:
        assert len(list(film.decode(video=0))) == 10


def test_it_is_a_pipeline_that_is_checked_and_drawn() -> None:
    valid = edgeserve("validate", str(ROOM_AR / "app.py"))
    assert "'room': 4 sources, 4 relays, 4 tasks, 1 sink, in 13 processes" in valid.stdout
    graph = json.loads(edgeserve("graph", "--format", "json", str(ROOM_AR / "app.py")).stdout)
    assert {edge["to"] for edge in graph["edges"] if edge["from"].startswith("imu>")} == {"seen0", "seen1", "seen2", "track"}
    assert all(node["places"] for node in graph["nodes"]), "something would run on no host"


def test_its_processes_run_one_by_one_as_on_several_hosts(tmp_path: Path) -> None:
    names = [node["name"] for node in json.loads(edgeserve("graph", "--format", "json", str(ROOM_AR / "app.py")).stdout)["nodes"]]
    room.record(tmp_path / "room", 0.6)
    options = ["--room", str(tmp_path / "room"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOM_AR), *options, "--node", f"local://{tmp_path}/store", "--speed", "10"]
    processes = [subprocess.Popen([*command, name], env=os.environ | {"HOME": str(tmp_path)}) for name in reversed(names)]
    try:
        assert [each.wait(100) for each in processes] == [0] * len(names)
    finally:
        for each in processes:
            each.kill()
            each.wait()
    command = [sys.executable, str(ROOM_AR), "report", *options, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    report = json.loads(ended.stdout)
    assert (report["results"], report["asked"]) == (2, 2) and report["median_cm"] <= 5.0


def test_a_stage_that_dies_ends_the_run(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "camera-1.mp4":
            (tmp_path / path.name).symlink_to(path)
    ended = subprocess.run(
        [sys.executable, str(ROOM_AR), "--room", str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 1 and "there is no file" in ended.stderr and "a stage has failed" in ended.stderr
    alone = [sys.executable, str(ROOM_AR), "camera9", "--room", str(tmp_path), "--node", "memory://"]
    ended = subprocess.run(alone, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1 and "there is no process 'camera9'" in ended.stderr


def test_an_interrupt_ends_all_processes(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOM_AR), "--room", str(folder), "--out", str(tmp_path / "out"), "--speed", "0.01"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and "running 13 nodes" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in "".join(output)


def test_how_long_a_recording_is_made_is_checked(folder: Path) -> None:
    for seconds in ("0", "-1", "nan", "inf", "x"):
        command = [sys.executable, str(ROOM_AR), "record", "--seconds", seconds]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert ended.returncode == 2 and "--seconds" in ended.stderr
    command = [sys.executable, str(ROOM_AR), "--room", str(folder), "--seconds", "5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1 and "holds a recording already" in ended.stderr


def test_a_track_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "track.jsonl").touch()
    command = [sys.executable, str(ROOM_AR), "--room", str(folder), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1 and "holds a track already" in ended.stderr
