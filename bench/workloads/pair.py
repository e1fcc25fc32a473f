"""Small: pictures from one host and sound from another, a model of the pictures, and one that takes both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import Workload, cost, note, numbers, stamp

from edgeserve.pipeline import Pipeline

HZ, PICTURE, SOUND, SEEN = 15.0, 30_000, 3_000, 2_000
SEE_S, BOTH_S = 0.015, 0.010


def stream(size: int) -> Iterator[list[Any]]:
    """(number, payload)."""
    for n in numbers(HZ):
        yield [n, bytes(size)]


def when(item: list[Any]) -> int:
    return stamp(item[0], HZ)


def see(pictures: list[Any]) -> list[Any]:
    """What is to be seen in one."""
    cost(SEE_S)
    return [pictures[0], pictures[1][:SEEN]]


def both(see: list[Any], sound: list[Any]) -> list[int]:
    """Nothing is ever the matter."""
    cost(BOTH_S)
    return [when(see), 0]


app = Pipeline("pair")
app.add_source("pictures", stream, args={"size": PICTURE}, event_time=when, max_lateness_ms=0)
app.add_source("sound", stream, args={"size": SOUND}, event_time=when, max_lateness_ms=0)
app.add_task("see", see, sources=["pictures"])
app.add_task("both", both, sources=["see", "sound"], join="exact")
app.add_sink("note", note, of="both")

workload = Workload(
    places={"pictures": "a", "sound": "b"},
    rates={"pictures": (HZ, PICTURE + 8), "sound": (HZ, SOUND + 8)},
    costs={"see": (SEE_S, SEEN + 8), "both": (BOTH_S, 12)},
    levels={"see": 0, "both": 1},
    cores={"a": 1, "b": 1, "c": 0, "d": 1},
    bandwidths=(20,),
    truth=lambda second: 0,
    hz=HZ,
)
