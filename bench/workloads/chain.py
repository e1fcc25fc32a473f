"""Small: frames from one host, a model that makes them small, and one that judges what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import Workload, cost, note, numbers, stamp

from edgeserve.pipeline import Pipeline

HZ, FRAME, FOUND = 20.0, 40_000, 4_000
SHRINK_S, JUDGE_S = 0.006, 0.012


def frames() -> Iterator[list[Any]]:
    """(number, payload)."""
    for n in numbers(HZ):
        yield [n, bytes(FRAME)]


def when(frame: list[Any]) -> int:
    return stamp(frame[0], HZ)


def shrink(frames: list[Any]) -> list[Any]:
    """A tenth of it."""
    cost(SHRINK_S)
    return [frames[0], frames[1][:FOUND]]


def judge(shrink: list[Any]) -> list[int]:
    """Nothing is ever found."""
    cost(JUDGE_S)
    return [when(shrink), 0]


app = Pipeline("chain")
app.add_source("frames", frames, event_time=when, max_lateness_ms=0)
app.add_task("shrink", shrink, sources=["frames"])
app.add_task("judge", judge, sources=["shrink"])
app.add_sink("note", note, of="judge")

workload = Workload(
    places={"frames": "a"},
    rates={"frames": (HZ, FRAME + 8)},
    costs={"shrink": (SHRINK_S, FOUND + 8), "judge": (JUDGE_S, 12)},
    levels={"shrink": 0, "judge": 1},
    cores={"a": 1, "b": 1, "c": 0, "d": 1},
    bandwidths=(20,),
    truth=lambda second: 0,
    hz=HZ,
)
