"""What stands behind the research prototype's camera sources: pictures as JPEG files, and their URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.sources.videos import av, encode, number

from edgeserve import Materialize
from edgeserve.core.errors import ConfigurationError, ReceiveTimeout
from edgeserve.data_source import CameraSource, SimulateVideoWithTimestamps
from edgeserve.sources.picture_files import PictureFiles

URL = "ftp://192.168.1.101/files/"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return encode(tmp_path / "film.mp4", range(60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def shown(folder: Path, urls: list[str]) -> list[tuple[int, tuple[int, ...]]]:
    """The number in each picture, and its shape."""
    found = []
    for url in urls:
        assert url.startswith(URL) and "//" not in url.removeprefix("ftp://")
        with av.open(str(folder / url.removeprefix(URL))) as container:
            (frame,) = container.decode(video=0)
        picture = frame.to_ndarray(format="rgb24")
        found.append((number(picture), picture.shape))
    return found


def test_each_picture_is_a_jpeg_file_under_a_url(film: Path, folder: Path) -> None:
    with PictureFiles("CameraSource", film, folder, URL, (128, 96)) as files:
        urls = list(files)
    assert shown(folder, urls) == [(n, (96, 128, 3)) for n in range(60)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(url.rpartition("/")[2] for url in urls)
    assert all(path.read_bytes()[:2] == b"\xff\xd8" for path in folder.iterdir())


def test_timestamps_pass_over_parts_of_the_film(film: Path, folder: Path) -> None:
    with PictureFiles("SimulateVideoWithTimestamps", str(film), folder, URL, (64, 48), [0, 0.2, 0, 0.4]) as files:
        assert [n for n, _ in shown(folder, list(files))] == [0, 6, 7, 18]
    with PictureFiles("SimulateVideoWithTimestamps", film, folder, URL, (64, 48), [1.0] * 5) as files:
        assert [n for n, _ in shown(folder, list(files))] == [25, 51]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"local_ftp_path": "/nowhere"}, "local_ftp_path='/nowhere' is not a directory"),
        ({"global_ftp_path": ""}, "global_ftp_path=''"),
        ({"size": (0, 48)}, r"size=\(0, 48\)"),
        ({"camera": 0, "timestamps": [1.0]}, "cam_id=0 is no file"),
    ],
)
def test_what_cannot_work_is_named_at_once(film: Path, folder: Path, options: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"camera": film, "local_ftp_path": folder, "global_ftp_path": URL, "size": (64, 48)}
    with pytest.raises(ConfigurationError, match=why):
        PictureFiles("CameraSource", **given | options)


def test_a_camera_that_is_not_there_is_named(folder: Path) -> None:
    with PictureFiles("CameraSource", 99, folder, URL, (64, 48)) as files, pytest.raises(ConfigurationError, match="/dev/video99"):
        next(files)


def test_the_prototype_s_sources_send_the_urls(film: Path, folder: Path) -> None:
    """As its programs make them: by position."""
    with CameraSource("memory://pictures", folder, URL, 64, 48, "camera", None, "frames", film) as source:
        urls = [next(source), next(source)]
    assert [n for n, _ in shown(folder, urls)] == [0, 1]
    options: dict[str, Any] = {"local_ftp_path": str(folder), "global_ftp_path": URL, "width": 64, "height": 48, "cam_id": str(film)}
    with SimulateVideoWithTimestamps([0, 0.2], pulsar_node="memory://pictures", source_id="film", topic="frames", **options) as film_source:
        urls += list(film_source)
    assert [n for n, _ in shown(folder, urls[2:])] == [0, 6]
    seen: list[str] = []
    with Materialize(seen.append, "memory://pictures", topic="frames", timeout_ms=0) as sink, pytest.raises(ReceiveTimeout):
        for _ in range(5):
            next(sink)
    assert seen == urls
