"""Live streams and cameras.

RTSP is spoken by a server of a few lines, which sends real RTP and RTCP (FFmpeg's muxer writes them); HTTP stands in for what else FFmpeg
reads from a network. There is no video device on the machines that run these tests, so that of a v4l2 camera only what comes before and
after the device is tested: its options, the error when it is not there, its clock.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from tests.nodes.test_processes import finish, start, wait_for
from tests.sources.streams import Server, encoded, http, rtsp
from tests.sources.videos import HEIGHT, RATE, WIDTH, number
from tests.waiting import until

from edgeserve import DataSource
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError, FetchError, MissingExtra
from edgeserve.core.message import Header, Kind, TimeKind
from edgeserve.sources import Camera, Source, Video, live
from edgeserve.sources.av_input import Damaged, shown
from edgeserve.sources.live import DeviceClock
from edgeserve.transport import connect, disconnect

FRAME_NS = 10**9 // RATE


@pytest.fixture
def resting() -> Iterator[threading.Event]:
    """What holds a server's connection open, until the test ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(scope="module")
def ts() -> bytes:
    return encoded(range(60), format="mpegts")


@pytest.fixture(scope="module")
def quick() -> bytes:
    """As a camera encodes: a frame is decoded before the next one comes."""
    return encoded(range(60), format="mpegts", options={"tune": "zerolatency"})


def stalled(data: bytes, resting: threading.Event) -> Server:
    """Sends bytes, then nothing, and keeps the connection."""

    def chunks() -> Iterator[bytes]:
        yield data
        resting.wait(60)

    return http(chunks, resting)


class Frames:
    """A decoder that has these."""

    stream, lost = None, False
    watch: Callable[[Any], None] | None = None

    def __init__(self, frames: list[Any]) -> None:
        self._frames = iter(frames)

    def __next__(self) -> Any:
        return next(self._frames)


def url(server: Server, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.port}/stream"


@pytest.fixture
def node() -> Iterator[str]:
    """A store in memory that is there until the test ends."""
    node = f"memory://{uuid.uuid4().hex}"
    transport = connect(node)
    yield node
    disconnect(transport)


def headers(node: str) -> list[Header]:
    transport = connect(node)
    try:
        return [decode_frame(frame)[0] for frame, _, _ in transport.read("src")]
    finally:
        disconnect(transport)


# --- Video of a URL -----------------------------------------------------------------------------------------------


def test_all_frames_of_a_stream_come_in_order_and_it_ends(ts: bytes) -> None:
    with http(lambda: [ts]) as server, Video(url(server)) as stream:
        assert [number(frame) for frame in stream] == list(range(60))
        assert (stream.event_time, stream.message_id, stream.resumable, stream.rate_hz) == (None, None, False, None)


def test_a_stream_with_a_start_has_its_own_times(ts: bytes) -> None:
    with http(lambda: [ts]) as server, Video(url(server), start=100, every=3, size=(32, 24), format="gray") as stream:
        found = [(number(frame), frame.shape, stream.event_time(frame)) for frame in stream]  # type: ignore[misc]
    assert [(n, shape) for n, shape, _ in found] == [(n, (24, 32)) for n in range(0, 60, 3)]
    assert [ns for _, _, ns in found] == pytest.approx([100 * 10**9 + n * FRAME_NS for n in range(0, 60, 3)], abs=20_000)


@pytest.mark.parametrize("source", [Video, Camera])
def test_rtsp_says_when_its_frames_were_taken(source: Callable[..., Any], resting: threading.Event) -> None:
    """Its server's clock is this machine's; RTCP says when the stream's time was what."""
    began = time.time_ns()
    with rtsp(range(40), rest=resting) as server, source(url(server, "rtsp")) as stream:
        assert stream.event_time is not None
        frame = next(stream)
        found = [(number(frame), stream.event_time(frame))]
        if source is Video:
            found.extend((number(frame), stream.event_time(frame)) for frame in itertools.islice(stream, 30))
            begin = found[0][0]  # behind the frames that came before the first report
            assert begin <= 2 and [n for n, _ in found] == list(range(begin, begin + 31))
            # RTP counts 1/90,000 s, RTCP says microseconds.
            assert [b - a for (_, a), (_, b) in itertools.pairwise(found)] == pytest.approx([FRAME_NS] * 30, abs=20_000)
        first_ns = found[0][1] - found[0][0] * FRAME_NS
        assert began - 10**9 < first_ns < time.time_ns() + 10**9


def test_rtsp_that_says_no_times_is_named_and_can_be_had_by_arrival(resting: threading.Event) -> None:
    with rtsp(range(40), reports=False, rest=resting) as server:
        with Video(url(server, "rtsp"), timeout_s=5) as stream:
            fast = itertools.count(0, 10**10)  # for the thread that reads, ten seconds pass from look to look

            def monotonic_ns() -> int:
                return time.monotonic_ns() if threading.current_thread() is threading.main_thread() else next(fast)

            stream._source._timer.monotonic_ns = monotonic_ns  # type: ignore[method-assign]
            with pytest.raises(ConfigurationError, match="never said when they were taken: clock='arrival'"):
                next(stream)
        with Video(url(server, "rtsp"), clock="arrival") as stream:
            assert stream.event_time is None
            assert [number(next(stream)) for _ in range(5)] == list(range(5))


@pytest.mark.parametrize("clock", ["device", "arrival"])
def test_the_header_says_whose_clock_it_is(node: str, clock: str, resting: threading.Event) -> None:
    with rtsp(range(40), rest=resting) as server:
        stream = Video(url(server, "rtsp"), clock=clock)
        with DataSource(stream, node, source_id="camera", event_time=stream.event_time, message_id=stream.message_id) as source:
            for _ in range(3):
                next(source)
    kind = TimeKind.DEVICE if clock == "device" else TimeKind.ARRIVAL
    assert [header.time_kind for header in headers(node) if header.kind == Kind.DATA] == [kind] * 3


def test_a_stream_that_is_read_slowly_is_held_back_and_loses_nothing(ts: bytes) -> None:
    with http(lambda: [ts]) as server, Video(url(server)) as stream:
        found = [number(next(stream))]
        until(lambda: len(stream._source._frames) == 8)  # type: ignore[union-attr]
        assert not stream._source._ended  # type: ignore[union-attr]
        found.extend(number(frame) for frame in stream)
    assert found == list(range(60))


def test_a_connection_that_is_cut_is_an_error_or_an_end_and_the_next_call_connects_again(ts: bytes, resting: threading.Event) -> None:
    with stalled(ts[: len(ts) // 2], resting) as server, Video(url(server), timeout_s=0.5) as stream:
        found = []
        with pytest.raises(FetchError, match=r"Video: 'http://127.*was lost: nothing came for 0.5 s"):
            while True:
                found.append(number(next(stream)))
        assert 10 < len(found) < 60 and found == list(range(len(found)))
        assert number(next(stream)) == 0 and server.asked == 2


def test_a_server_that_says_nothing_is_named_and_its_password_is_not() -> None:
    event = threading.Event()

    def silent(connection: socket.socket) -> None:
        event.wait(60)

    with Server(silent) as server:
        with Video(f"rtsp://me:secret@127.0.0.1:{server.port}/live", timeout_s=0.3) as stream:
            with pytest.raises(ConfigurationError, match=r"nothing came for 0\.3 s") as caught:
                next(stream)
        event.set()
    shown = f"{caught.value!r}{caught.value.__cause__!r}"
    assert "secret" not in shown and "rtsp://127.0.0.1" in shown


def test_nobody_at_the_address(closing: Callable[[Source], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stream = closing(Video(f"rtsp://127.0.0.1:{port}/live"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"cannot be opened: .*refused.*Is it the right address"):
            next(stream)


def test_what_is_served_is_no_video() -> None:
    with http(lambda: [b"<html>sign in</html>" * 100]) as server, Video(url(server)) as stream:
        with pytest.raises(ConfigurationError, match="cannot be opened"):
            next(stream)


# --- waking and closing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Video, Camera])
def test_closing_ends_a_wait_in_another_thread_however_long_the_network_is_silent(
    source: Callable[..., Any], ts: bytes, resting: threading.Event
) -> None:
    with stalled(ts, resting) as server:
        stream = source(url(server), timeout_s=600)
        next(stream)
        ended = threading.Event()

        def wait() -> None:
            for _ in stream:
                pass
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        stream.close()
        thread.join(20)
        assert ended.is_set()
        with pytest.raises(StopIteration):
            next(stream)


def test_its_thread_ends_with_the_stream(ts: bytes, resting: threading.Event) -> None:
    with stalled(ts, resting) as server:
        stream = Video(url(server))
        next(stream)
        inner = stream._source._thread  # type: ignore[union-attr]
        assert inner is not None and inner.daemon and inner.name.startswith("edgeserve-video-")
        stream.close()
    inner.join(20)
    assert not inner.is_alive()


def test_waking_ends_a_wait(ts: bytes, resting: threading.Event) -> None:
    with stalled(ts[: len(ts) // 2], resting) as server, Video(url(server)) as stream:
        next(stream)
        stream.wake()
        taken: Any = 0
        while taken is not None:
            taken = next(stream)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_source_whose_camera_is_silent(tmp_path: Path, quick: bytes, resting: threading.Event, number: int) -> None:
    with stalled(quick, resting) as server:
        program = f"""
            from edgeserve.sources import Camera

            def gate(frame):
                (root / "came").touch()
                return frame

            with DataSource(Camera("{url(server)}", timeout_s=600), node, source_id="camera", gate=gate) as source:
                source.run()
        """
        process = start(f"local://{tmp_path / 'store'}", tmp_path, program)
        wait_for(tmp_path / "came", process)
        process.send_signal(number)
        assert finish(process) == 0


# --- Camera -------------------------------------------------------------------------------------------------------


def test_a_camera_hands_out_the_newest_picture_each_once(quick: bytes, resting: threading.Event) -> None:
    with stalled(quick, resting) as server, Camera(url(server)) as camera:
        assert camera.event_time is None
        first = number(next(camera))
        until(lambda: camera._seen >= 55)  # where the last one ends is known when the next one begins
        newest = number(next(camera))
        assert first < newest and newest >= 54 and camera.dropped == camera._seen - 2 - len(camera._frames)


def test_a_camera_that_is_lost_is_looked_for(quick: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RETRY_S", 0.01)
    with http(lambda: [quick]) as server, Camera(url(server)) as camera:
        while server.asked < 4:
            assert next(camera).shape == (HEIGHT, WIDTH, 3)
    assert camera.path == url(server)


def test_a_camera_that_was_there_and_cannot_be_reached_is_told_once(
    quick: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "RETRY_S", 0.01)
    with http(lambda: [quick]) as server:
        camera = Camera(url(server))
        next(camera)
    tries: list[int] = []
    connecting = camera._connect
    monkeypatch.setattr(camera, "_connect", lambda: (tries.append(1), connecting())[1])
    until(lambda: len(tries) > 5)
    camera.close()
    told = [record for record in caplog.records if "it is looked for" in record.message]
    assert len(told) == 1


def pipe(tmp_path: Path, data: bytes) -> tuple[live.Place, BinaryIO]:
    """In place of a device: what FFmpeg reads of it, it waits for without end. It has some data."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pipe"
    os.mkfifo(path)
    ends = os.open(path, os.O_RDWR)
    fcntl.fcntl(ends, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(ends, data)
    return live.Place(str(path), "mpegts", {"probesize": "100000"}, "/dev/video0", ""), os.fdopen(ends, "rb", buffering=0)


def test_a_device_that_never_sends_anything_is_named_by_the_deadline(tmp_path: Path, closing: Callable[[Source], Any]) -> None:
    camera = closing(Camera(0, clock="arrival", timeout_s=0.1))
    camera._place, ends = pipe(tmp_path, b"")
    with ends:
        for _ in range(2):
            with pytest.raises(FetchError, match=r"Camera: /dev/video0 was lost: nothing came for 0\.1 s"):
                next(camera)


def test_a_device_that_stands_still_is_opened_once_more(
    tmp_path: Path, quick: bytes, closing: Callable[[Source], Any], caplog: pytest.LogCaptureFixture
) -> None:
    camera = closing(Camera(0, clock="arrival", timeout_s=60))
    camera._place, ends = pipe(tmp_path, quick)
    with ends:
        assert next(camera).shape == (HEIGHT, WIDTH, 3)
        until(lambda: camera._seen >= 55)
        next(camera)
        camera._timeout_s = 0.5
        stands = camera._thread
        camera._place, new_ends = pipe(tmp_path, quick)
        with new_ends:
            assert next(camera).shape == (HEIGHT, WIDTH, 3)
        assert camera._thread is not stands and "nothing came for 0.5 s (it is opened once more)" in caplog.text


def test_no_more_than_two_threads_stand_in_a_read_that_does_not_end(
    tmp_path: Path, quick: bytes, closing: Callable[[Source], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_BEYOND_S", 0.1)
    camera = closing(Camera(0, clock="arrival", timeout_s=0.1))
    camera._place, ends = pipe(tmp_path, b"")
    with ends:
        for _ in range(2):
            with pytest.raises(FetchError, match=r"nothing came for 0\.1 s$"):
                next(camera)
        for _ in range(3):
            with pytest.raises(FetchError, match=r"nothing came for 0\.1 s, 2 times; it is not opened again before one"):
                next(camera)
        standing = [thread for thread in threading.enumerate() if thread.name == "edgeserve-camera-/dev/video0"]
        assert len(standing) == 2
    for thread in standing:
        thread.join(20)
    camera._timeout_s = 60
    camera._place, ends = pipe(tmp_path, quick)
    with ends:
        assert next(camera).shape == (HEIGHT, WIDTH, 3)


def test_each_connection_has_a_clock_of_its_own_and_one_that_was_given_up_has_none() -> None:
    stream = Video("rtsp://127.0.0.1/live", timeout_s=5)._source
    assert isinstance(stream, live.VideoStream)
    begun: list[Any] = []

    def clock() -> Any:
        made = SimpleNamespace(begin=lambda _: begun.append(made), packet=None, ns=lambda frame: frame)
        return made

    stream._clock = clock
    stream._frames_of(Frames([1]), pytest.fail)  # type: ignore[arg-type]
    assert begun == []
    stream._thread = threading.current_thread()
    for _ in range(2):
        stream._frames_of(Frames([1]), lambda _: None)  # type: ignore[arg-type]
    assert len(begun) == 2 and begun[0] is not begun[1]


def test_what_no_picture_can_be_made_of_is_a_sign_of_life() -> None:
    stream = Video("rtsp://127.0.0.1/live", clock="arrival", timeout_s=5)._source
    assert isinstance(stream, live.VideoStream)
    now = itertools.count()
    stream._timer.monotonic_ns = lambda: next(now)  # type: ignore[method-assign]
    stream._thread = threading.current_thread()
    seen: list[int] = []

    class Broken(Frames):
        def __next__(self) -> Any:
            super().__next__()
            seen.append(stream._alive_ns)
            assert self.watch is not None
            self.watch(None)
            raise Damaged("it is gray")

    stream._frames_of(Broken([1, 2, 3]), pytest.fail)  # type: ignore[arg-type]
    assert seen[0] < seen[1] < seen[2]


def test_a_camera_that_comes_back_is_left_alone_for_a_second_also_while_pictures_are_taken(quick: bytes) -> None:
    rests: list[float] = []
    with http(lambda: [quick]) as server, Camera(url(server)) as camera:
        wait = camera._rest.wait

        def rest(seconds: float) -> bool:
            rests.append(seconds)
            woken = wait(seconds / 20)
            assert not woken or camera._closed
            return woken

        camera._rest.wait = rest  # type: ignore[method-assign]
        while len(rests) < 3:
            next(camera)
    assert not camera._error


def test_one_frame_without_a_time_does_not_end_a_stream_that_is_old() -> None:
    stream = Video("rtsp://127.0.0.1/live", timeout_s=5)._source
    assert isinstance(stream, live.VideoStream)
    now = itertools.count(0, 10**9)
    stream._timer.monotonic_ns = lambda: next(now)  # type: ignore[method-assign]
    stream._thread = threading.current_thread()
    times = [*range(30), None, 31, None]
    stream._clock = lambda: SimpleNamespace(begin=lambda _: None, packet=None, ns=lambda frame: frame)  # type: ignore[assignment, return-value]
    taken: list[Any] = []
    stream._frames_of(Frames(times), taken.append)  # type: ignore[arg-type]
    assert [event_ns for _, event_ns in taken] == [*range(30), 31]


def test_a_stream_without_an_end_goes_on_in_time_when_it_is_connected_again() -> None:
    timer = SimpleNamespace(monotonic_ns=iter([0, 60 * 10**9]).__next__)
    clocks = live.Since(100 * 10**9, timer)  # type: ignore[arg-type]
    endless = SimpleNamespace(time_base=Fraction(1, 10), start_time=0, container=SimpleNamespace(duration=None))
    found = []
    for clock in (clocks(), clocks()):
        clock.begin(endless)
        found.extend(clock.ns(SimpleNamespace(pts=pts)) for pts in (0, 5))
    assert found == [100 * 10**9, 100_500_000_000, 160 * 10**9, 160_500_000_000]


def test_no_part_of_a_password_is_shown() -> None:
    assert shown("rtsp://me:p@ss@host:554/a@b?c@d") == "'rtsp://host:554/a@b?c@d'"


def test_a_camera_that_is_not_there_is_named(closing: Callable[[Source], Any]) -> None:
    camera = closing(Camera("/dev/video99"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"Camera: /dev/video99 cannot be opened: .*ls /dev/video\*"):
            next(camera)
    assert closing(Camera(3))._place.url == "/dev/video3"


def test_a_file_is_no_camera(tmp_path: Path, closing: Callable[[Source], Any]) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(encoded(range(3), format="mpegts"))
    with pytest.raises(ConfigurationError, match=r"cannot be opened"):
        next(closing(Camera(str(path))))


def test_what_a_device_is_asked_for() -> None:
    camera = Camera("/dev/video0", size=(640, 480), rate_hz=30)
    assert camera._place.format == "v4l2"
    assert camera._place.options == {"timestamps": "abs", "video_size": "640x480", "framerate": "30"}
    assert camera.event_time is not None and Camera(0, clock="arrival").event_time is None


def test_a_device_s_stamps_are_times_since_the_epoch() -> None:
    clock = DeviceClock()
    clock.begin(SimpleNamespace(time_base=Fraction(1, 1_000_000)))
    assert clock.ns(SimpleNamespace(pts=1_700_000_000_123_456)) == 1_700_000_000_123_456_000


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Camera(""), "a device is wanted"),
        (lambda: Camera(-1), "a device is wanted"),
        (lambda: Camera(0, rate_hz=0), "rate_hz=0"),
        (lambda: Camera(0, size=5), "size=5"),  # type: ignore[arg-type]
        (lambda: Camera(0, format="yuv"), "format='yuv'"),
        (lambda: Camera(0, clock="wall"), "clock='wall'"),
        (lambda: Camera("http://a/b", clock="device"), "give start=, or clock='arrival'"),
        (lambda: Camera("rtsp://a/b", rate_hz=5), "in its own settings"),
        (lambda: Video("http://a/b", clock="device"), "give start=, or clock='arrival'"),
        (lambda: Video("http://a/b", loop=True), "cannot be read again"),
        (lambda: Video("rtsp://a/b", position="p"), "cannot be read again"),
    ],
)
def test_what_cannot_work_is_named_at_once(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make()


def test_the_time_of_another_picture_is_refused(ts: bytes) -> None:
    with http(lambda: [ts]) as server, Video(url(server), start=0) as stream:
        first, _ = next(stream), next(stream)
        assert stream.event_time is not None
        with pytest.raises(ConfigurationError, match=r"not its last one: give DataSource the Video itself"):
            stream.event_time(first)


def test_without_pyav_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"Camera needs PyAV: pip install 'edgeserve-streams\[video\]'"):
        Camera()
