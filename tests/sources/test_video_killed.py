"""A video source that is killed (kill -9) and started again: downstream each frame is there once, the same to the last pixel."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.test_processes import finish, notes, read, start
from tests.sources.test_killed import sent
from tests.sources.videos import encode, number
from xxhash import xxh3_64_hexdigest

from edgeserve.sources import Video

COUNT = 200
PROGRAM = """
    import signal
    from tests.sources.videos import number
    from xxhash import xxh3_64_hexdigest
    from edgeserve.sources import Video

    def gate(frame):
        n = number(frame)
        if once("first"):
            note("began", n)
        if n in {kills} and once(f"killed-{{n}}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return [n, stream.event_time(frame), xxh3_64_hexdigest(frame)]

    stream = Video(root / "clip.mkv", speed={speed}, start=5{position})
    with DataSource(stream, node, source_id="frames", topic="dst", gate=gate,
                    event_time=stream.event_time, message_id=stream.message_id) as source:
        {run}
"""
STEPS = """
        from edgeserve.stage import progress
        progress.COMMIT_EVERY_NS = 1 << 62
        for _ in range(120):
            next(source)
        source.flush()
        while True:
            next(source)
"""


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path / 'store'}"


@pytest.fixture
def frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is to be downstream in the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    path = encode(tmp_path / "clip.mkv", range(COUNT), options={"bf": "3"})
    with Video(path, speed=None, start=5) as stream:
        found = [[number(frame), stream.event_time(frame), xxh3_64_hexdigest(np.ascontiguousarray(frame))] for frame in stream]  # type: ignore[misc]
    assert [n for n, _, _ in found] == list(range(COUNT))
    return found


def program(*kills: int, position: bool = True, speed: Any = None, run: str = "source.run()") -> str:
    where = ', position=root / "position"' if position else ""
    return PROGRAM.format(kills=kills or (-1,), position=where, speed=speed, run=run.strip())


@pytest.mark.parametrize("position", [True, False])
def test_a_killed_source_sends_each_frame_once(node: str, tmp_path: Path, frames: list[Any], position: bool) -> None:
    code = program(0, 1, 77, COUNT - 1, position=position)
    assert [finish(start(node, tmp_path, code)) for _ in range(5)] == [-signal.SIGKILL] * 4 + [0]
    assert read(node, "dst") == frames


def test_a_new_start_sends_only_what_was_not_durable(node: str, tmp_path: Path, frames: list[Any]) -> None:
    assert finish(start(node, tmp_path, program(150, run=STEPS))) == -signal.SIGKILL
    before = sent(node)
    assert before >= 120
    (tmp_path / "first").unlink()
    assert finish(start(node, tmp_path, program())) == 0
    assert notes(tmp_path, "began") == ["0", "120"]
    assert sent(node) == before + COUNT - 120 + 1
    assert read(node, "dst") == frames
