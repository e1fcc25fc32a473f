"""Video files as streams, against files that real encoders wrote: pictures, times, pace, damage, where a restart goes on."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sources.conftest import FakeTimer
from tests.sources.videos import HEIGHT, RATE, WIDTH, av, encode, number, picture

from edgeserve.core.errors import BadRow, ConfigurationError, MissingExtra
from edgeserve.sources import Source, Video

FRAME_NS = 10**9 // RATE
FILES = {
    "h264.mp4": {},
    "h264-bframes.mkv": {"options": {"bf": "3"}},
    "h264-open-gop.mp4": {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.ts": {},
    "motion.mkv": {"codec": "mjpeg"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module", params=FILES)
def video(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A video of 60 frames."""
    options = dict(FILES[request.param])
    return encode(folder / request.param, range(60), **options)


@pytest.fixture(scope="module")
def mp4(folder: Path) -> Path:
    """60 frames in a file whose index comes first."""
    return encode(folder / "front.mp4", range(60), container_options={"movflags": "faststart"})


def numbers(path: Path, **options: Any) -> list[int]:
    with Video(path, speed=None, **options) as stream:
        return [number(frame) for frame in stream]


# --- pictures -----------------------------------------------------------------------------------------------------


def test_all_frames_come_in_order_with_their_times(video: Path) -> None:
    with Video(video, speed=None) as stream:
        found = [(number(frame), stream.event_time(frame)) for frame in stream]  # type: ignore[misc]
    assert [n for n, _ in found] == list(range(60))
    # Matroska has milliseconds, MPEG-TS 1/90,000 s.
    assert [ns for _, ns in found] == pytest.approx([n * FRAME_NS for n in range(60)], abs=1_000_000)


def test_times_are_exact_where_the_file_s_are(mp4: Path) -> None:
    with Video(mp4, speed=None, start="2026-11-02T09:00:00Z") as stream:
        found = [stream.event_time(frame) for frame in stream]  # type: ignore[misc]
    assert found == [1793610000 * 10**9 + n * FRAME_NS for n in range(60)]


@pytest.mark.parametrize(("format", "shape"), [("rgb24", (HEIGHT, WIDTH, 3)), ("bgr24", (HEIGHT, WIDTH, 3)), ("gray", (HEIGHT, WIDTH))])
def test_formats(mp4: Path, format: str, shape: tuple[int, ...]) -> None:
    with Video(mp4, speed=None, format=format) as stream:
        for n, frame in enumerate(stream):
            assert frame.shape == shape and frame.dtype == np.uint8 and frame.flags.c_contiguous
            gray = frame if frame.ndim == 2 else frame.mean(axis=2)
            assert np.abs(gray - picture(n).astype(float)).mean() < 30


def test_colours_are_where_the_format_says(folder: Path) -> None:
    path = folder / "red.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        red[..., 0] = 250
        container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        container.mux(stream.encode(None))
    for format, channel in (("rgb24", 0), ("bgr24", 2)):
        (frame,) = Video(path, format=format)
        assert frame[..., channel].min() > 230 and np.delete(frame, channel, axis=2).max() < 20


def test_size_and_every(mp4: Path) -> None:
    with Video(mp4, speed=None, size=(128, 96), every=7) as stream:
        found = [(frame.shape, number(frame), stream.event_time(frame)) for frame in stream]  # type: ignore[misc]
    assert found == [((96, 128, 3), n, n * FRAME_NS) for n in range(0, 60, 7)]


def test_the_start_is_the_file_s_own_if_it_says_so(folder: Path) -> None:
    path = encode(folder / "made.mkv", range(3), metadata={"creation_time": "2026-01-02T03:04:05.000000Z"})
    with Video(path, speed=None) as stream:
        assert stream.event_time(next(stream)) == 1767323045 * 10**9  # type: ignore[misc]
    with Video(path, speed=None, start=7) as stream:
        assert stream.event_time(next(stream)) == 7 * 10**9  # type: ignore[misc]


def test_a_bare_stream_counts_its_frames_at_its_rate(folder: Path) -> None:
    path = encode(folder / "bare.h264", range(30), format="h264", options={"bf": "2"})
    with Video(path, speed=None) as stream:
        found = [(number(frame), stream.event_time(frame)) for frame in stream]  # type: ignore[misc]
    assert found == [(n, n * FRAME_NS) for n in range(30)]


def test_a_frame_is_its_holder_s(mp4: Path) -> None:
    with Video(mp4, speed=None) as stream:
        frames = list(stream)
    frames[0][:] = 0
    assert [number(frame) for frame in frames[1:]] == list(range(1, 60))


# --- pace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [1, 2, 0.5, None])
def test_frames_come_as_far_apart_as_they_are(folder: Path, speed: float | None) -> None:
    times = [0, 40, 80, 500, 520, 2000]
    path = encode(folder / "uneven.mkv", range(6), times=times)
    timer = FakeTimer(patient=True)
    begin = timer.now_ns
    with Video(path, speed=speed, timer=timer) as stream:
        found = [(number(frame), (timer.now_ns - begin) / 1e6) for frame in stream]
    assert found == [(n, 0 if speed is None else ms / speed) for n, ms in enumerate(times)]


def test_a_loop_goes_on_in_time(folder: Path) -> None:
    path = encode(folder / "short.mp4", range(10))
    timer = FakeTimer(patient=True)
    begin = timer.now_ns
    with Video(path, loop=True, every=4, timer=timer) as stream:
        found = [(number(f), stream.event_time(f), timer.now_ns - begin) for f in itertools.islice(stream, 8)]  # type: ignore[misc]
    at = [turn * 10 + n for turn in range(3) for n in (0, 4, 8)][:8]
    assert found == [(n % 10, n * FRAME_NS, n * FRAME_NS) for n in at]


def test_waking_ends_a_wait_and_loses_no_frame(mp4: Path, closing: Callable[[Source], Any]) -> None:
    timer = FakeTimer(lambda: stream.wake(), patient=True)
    stream = closing(Video(mp4, timer=timer))
    found = [next(stream) for _ in range(4)]
    assert found[1] is None and [number(frame) for frame in found if frame is not None] == [0, 1, 2]


def test_closing_ends_a_wait_in_another_thread(folder: Path) -> None:
    stream = Video(encode(folder / "slow.mkv", range(2), times=[0, 1_000_000]))
    next(stream)
    ended = threading.Event()

    def wait() -> None:
        assert list(stream) == []
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    stream.close()
    thread.join(20)
    assert ended.is_set()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


class Interrupted(BaseException):
    """As a signal would raise."""


@pytest.mark.parametrize("where", ["decode", "look"])
def test_an_interrupted_read_loses_no_frame(video: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from edgeserve.sources import av_input

    owner, name = (av_input.Decoder, "__next__") if where == "decode" else (av_input.Look, "array")
    taken, take = [0], getattr(owner, name)

    def taking(self: Any, *given: Any) -> Any:
        found = take(self, *given)
        taken[0] += 1
        if taken[0] in (14, 60):
            raise Interrupted
        return found

    monkeypatch.setattr(owner, name, taking)
    found: list[int] = []
    with Video(video, speed=None) as stream:
        for _ in range(3):
            try:
                found.extend(number(frame) for frame in stream)
            except Interrupted:
                continue
            break
    assert taken[0] > 60
    assert found == list(range(60))


# --- ids and positions --------------------------------------------------------------------------------------------


def ids(path: Path, count: int | None = None, **options: Any) -> list[bytes]:
    with Video(path, speed=None, **options) as stream:
        return [stream.message_id(frame) for frame in itertools.islice(stream, count)]  # type: ignore[misc]


def test_ids_are_those_of_the_frames(folder: Path) -> None:
    path = encode(folder / "a.mp4", range(20))
    found = ids(path)
    assert len(set(found)) == 20 and ids(path) == found
    assert ids(path, format="gray", size=(32, 24)) == found
    assert ids(path, every=3) == found[::3]
    turns = ids(path, 40, loop=True)
    assert turns[:20] == found and len(set(turns)) == 40
    encode(path, range(1, 21))
    assert not set(ids(path)) & set(found)
    assert not set(ids(encode(folder / "b.mp4", range(20)))) & set(found)


def test_the_time_of_another_frame_is_refused(mp4: Path, closing: Callable[[Source], Any]) -> None:
    stream = closing(Video(mp4, speed=None))
    first, second = next(stream), next(stream)
    assert stream.event_time(second) == FRAME_NS
    for ask in (stream.event_time, stream.message_id):
        with pytest.raises(ConfigurationError, match=r"give DataSource the Video itself.*gate="):
            ask(first)


@pytest.mark.parametrize("every", [1, 3])
def test_a_new_start_goes_on_behind_what_was_committed(video: Path, tmp_path: Path, every: int) -> None:
    """However the file has its frames: some refer to later ones."""
    position, found, stamps, known = tmp_path / "position", [], [], []
    while True:
        with Video(video, speed=None, every=every, position=position) as stream:
            frames = list(itertools.islice(stream, 7))
            stream.commit()
            if not frames:
                break
            found.extend(number(frame) for frame in frames)
            stamps.append(stream.event_time(frames[-1]))  # type: ignore[misc]
            known.append(stream.message_id(frames[-1]))  # type: ignore[misc]
    assert found == list(range(0, 60, every))
    everything = ids(video, every=every)
    assert known == [everything[min(n + 6, len(everything) - 1)] for n in range(0, len(everything), 7)]


def test_what_follows_a_new_start_is_the_same_to_the_last_pixel(video: Path, tmp_path: Path) -> None:
    with Video(video, speed=None) as stream:
        whole = list(stream)
    for at in (1, 9, 10, 11, 12, 19, 20, 33, 59):
        position = tmp_path / f"position{at}"
        with Video(video, speed=None, position=position) as stream:
            assert len(list(itertools.islice(stream, at))) == at
            stream.commit()
        with Video(video, speed=None, position=position) as stream:
            rest = list(stream)
        assert len(rest) == 60 - at
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[at:], strict=True))


def test_a_loop_goes_on_after_a_new_start(folder: Path, tmp_path: Path) -> None:
    path, position = encode(folder / "loop.mp4", range(10)), tmp_path / "position"
    expected = ids(path, 24, loop=True)
    found = []
    for _ in range(4):
        with Video(path, speed=None, loop=True, position=position) as stream:
            found.extend(stream.message_id(frame) for frame in itertools.islice(stream, 6))  # type: ignore[misc]
            stream.commit()
    assert found == expected


def test_another_file_is_replayed_from_its_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, position = encode(tmp_path / "a.mp4", range(20)), tmp_path / "position"
    with Video(path, speed=None, position=position) as stream:
        next(stream)
        stream.commit()
    encode(path, range(5, 20))
    assert numbers(path, position=position) == list(range(5, 20))
    assert "not the file that was read before" in caplog.text


# --- damage -------------------------------------------------------------------------------------------------------


def taken(path: Path, **options: Any) -> tuple[list[int], list[str]]:
    """The numbers of the frames that come, and what is said of those that don't."""
    found, said = list[int](), list[str]()
    with Video(path, speed=None, **options) as stream:
        while len(said) < 1000:
            try:
                found.append(number(next(stream)))
            except BadRow as exc:
                said.append(str(exc))
            except StopIteration:
                return found, said
    raise AssertionError("it goes on for ever")


def cut(path: Path, fresh: Path, share: float) -> Path:
    data = path.read_bytes()
    fresh.write_bytes(data[: int(len(data) * share)])
    return fresh


@pytest.mark.parametrize("packets", [5, 30, 55])
def test_a_file_that_was_cut_off_gives_what_it_has_and_says_so(mp4: Path, tmp_path: Path, packets: int) -> None:
    """Within a frame: of those that are shown after it some may have come before it in the file."""
    with av.open(str(mp4)) as container:
        position, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.pos][packets]
    path = tmp_path / "cut.mp4"
    path.write_bytes(mp4.read_bytes()[: position + size // 2])
    found, said = taken(path)
    assert packets - 3 <= len(found) <= packets and found == sorted(set(found)) and found[:-4] == list(range(len(found) - 4))
    assert "a part of its data is missing" in said[0] and "cut off here, its index names more. Copy it again" in said[-1]


def test_a_file_that_was_cut_off_between_two_frames_says_so(mp4: Path, tmp_path: Path) -> None:
    with av.open(str(mp4)) as container:
        ends = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
    path = tmp_path / "cut.mp4"
    path.write_bytes(mp4.read_bytes()[: ends[40]])
    found, said = taken(path)
    assert found == list(range(40)) and len(said) == 1 and "behind frame 40: it was cut off here" in said[0]


def test_a_format_without_an_index_ends_where_it_was_cut_off(folder: Path, tmp_path: Path) -> None:
    found, _ = taken(cut(encode(folder / "cut.ts", range(60)), tmp_path / "cut.ts", 0.6))
    assert 20 < len(found) < 60 and found == list(range(len(found)))


def test_a_file_without_its_index_is_named_at_once(folder: Path, tmp_path: Path) -> None:
    path = cut(encode(folder / "back.mp4", range(60)), tmp_path / "cut.mp4", 0.9)
    with pytest.raises(ConfigurationError, match=r"cut\.mp4' cannot be read as a video: .*before its index was written"):
        Video(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_file_with_wrong_bytes_ends_and_goes_on_meanwhile(video: Path, tmp_path: Path, seed: int) -> None:
    """Whatever it says: no crash, no endless loop, and what comes is a picture."""
    random = np.random.default_rng(seed)
    data = np.frombuffer(video.read_bytes(), np.uint8).copy()
    for at in random.integers(0, len(data), 1 + 4 * seed):
        data[at] = random.integers(256)
    path = tmp_path / video.name
    path.write_bytes(data.tobytes())
    try:
        with Video(path, speed=None, size=(WIDTH, HEIGHT)) as stream:
            for _ in range(2000):
                try:
                    assert next(stream).shape == (HEIGHT, WIDTH, 3)
                except BadRow:
                    pass
                except StopIteration:
                    return
    except ConfigurationError:
        return
    raise AssertionError("it goes on for ever")


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 5000, b"no video at all\n" * 100, bytes(range(256)) * 40, b"\0\0\0\x18ftypmp42" + b"\xff" * 4000]
)
def test_what_is_no_video_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"clip\.mp4' (cannot be read as a video|has no video stream)"):
        Video(path)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {target}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["hls", "concat", "sdp"],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.sdp"])
def test_a_list_of_other_files_opens_none_of_them(mp4: Path, tmp_path: Path, text: str, name: str) -> None:
    """Who may place a file does not thereby read others, or reach what the host can reach."""
    path = tmp_path / name
    path.write_text(text.format(target=mp4))
    with pytest.raises((ConfigurationError, BadRow)):
        list(Video(path, speed=None))


def test_a_picture_that_is_too_large_is_refused_before_it_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(folder / "large.mkv", range(3), codec="mjpeg")
    monkeypatch.setattr("edgeserve.sources.video_file.MAX_PIXELS", WIDTH * HEIGHT // 2)
    with pytest.raises((ConfigurationError, BadRow)):
        next(Video(path, speed=None))


def test_sound_is_no_video(folder: Path) -> None:
    path = folder / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ConfigurationError, match=r"sound\.wav' has no video stream, but audio"):
        Video(path)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"format": "yuv420p"}, "format='yuv420p': it is one of 'rgb24'"),
        ({"size": 64}, "size=64"),
        ({"size": (64, 0)}, "size="),
        ({"size": (1 << 20, 1 << 20)}, "at most"),
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"speed": 0}, "speed=0"),
        ({"start": "yesterday"}, "start='yesterday'.*is no time"),
        ({"loop": 1}, "loop=1"),
        ({"clock": "arrival"}, "it is for URLs"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"position": "/nowhere/at/all"}, "is not a directory"),
    ],
)
def test_what_cannot_work_is_named_at_once(mp4: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        Video(mp4, **options)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        Video(tmp_path / "none.mp4")
    with pytest.raises(ConfigurationError, match="no regular file"):
        Video(tmp_path)
    with pytest.raises(ConfigurationError, match="the path of a file"):
        Video(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="given by its path"):
        Video(f"file://{tmp_path}/a.mp4")


def test_without_pyav_the_command_that_installs_it_is_named(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"Video needs PyAV: pip install 'edgeserve-streams\[video\]'"):
        Video(mp4)


def test_no_file_stays_open(mp4: Path) -> None:
    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{name}") == str(mp4) for name in os.listdir("/proc/self/fd"))

    stream = Video(mp4, speed=None)
    assert opened() == 0
    next(stream)
    assert opened() == 1
    stream.close()
    assert opened() == 0
    assert len(numbers(mp4)) == 60 and opened() == 0
