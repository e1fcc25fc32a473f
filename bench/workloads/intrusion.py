"""Intrusion detection: four taps, each with three detectors of which every one looks closer at a quarter of what the one before has seen.

Flows travel in micro-batches of 10 ms; a task's cost is that of all flows that it looks at. An attack is a batch with many flows
that only the closest look tells apart; the answer is how many taps see one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from common import REPLICAS, Workload, cost, count, note, numbers, stamp

from edgeserve.pipeline import Pipeline

HZ, FLOWS, ESCALATES, LASTS_S = 100.0, 20, 0.25, 1.0
TAPS = ("north", "east", "south", "west")
LEVELS = {"scan": 5e-6, "check": 50e-6, "inspect": 700e-6}
"""Cpu-seconds for a flow."""
PACKET, LAZY_BYTES = 128, 2_000


def truth(second: float) -> int:
    """How many taps are attacked at a time."""
    return int(second / LASTS_S) * 3 % (len(TAPS) + 1)


def batches(tap: int) -> Iterator[list[Any]]:
    """(number, flows): of each flow how much of an attack it is, and its one to ten packets."""
    noise = random.Random(tap).randbytes(10 * PACKET)

    def flows(n: int) -> list[Any]:
        chance = random.Random(f"{tap} {n}")
        attacked = tap < truth(n / HZ)
        return [
            [chance.random() / 2 + attacked / 2 * (chance.random() < 0.4), noise[: PACKET * chance.randint(1, 10)]] for _ in range(FLOWS)
        ]

    made = [flows(n) for n in range(count(HZ))]  # before the clock runs: what a tap has to do takes nothing of the cores
    for n in numbers(HZ):
        yield [n, made[n]]


def when(batch: list[Any]) -> int:
    return stamp(batch[0], HZ)


class Detector:
    """Of one level: passes on the flows that are most like an attack."""

    def __init__(self, cpu_s: float, last: bool) -> None:
        self._cpu_s, self._last = cpu_s, last

    def __call__(self, batch: list[Any]) -> list[Any]:
        n, flows = batch
        cost(self._cpu_s * len(flows))
        worst = sorted(flows, key=lambda flow: flow[0], reverse=True)[: max(1, round(len(flows) * ESCALATES))]
        return [n, int(worst[0][0] > 0.5)] if self._last else [n, worst]


def verdict(north: list[int], east: list[int], south: list[int], west: list[int]) -> list[int]:
    """How many taps see an attack."""
    return [when(north), sum(each[1] for each in (north, east, south, west))]


app = Pipeline("intrusion")
for number, name in enumerate(TAPS):
    app.add_source(name, batches, args={"tap": number}, event_time=when, max_lateness_ms=0, lazy_bytes=LAZY_BYTES)
    before = name
    for level, cpu_s in LEVELS.items():
        arguments = {"cpu_s": cpu_s, "last": level == "inspect"}
        app.add_task(f"{name}_{level}", Detector, args=arguments, sources=[before], replicas=REPLICAS, lazy_bytes=LAZY_BYTES)
        before = f"{name}_{level}"
app.add_task("verdict", verdict, sources=[f"{name}_inspect" for name in TAPS], join="exact", replicas=REPLICAS)
app.add_sink("note", note, of="verdict")

_FLOW = 5.5 * PACKET + 12
_AT = {"scan": FLOWS, "check": FLOWS * ESCALATES, "inspect": max(1, round(FLOWS * ESCALATES * ESCALATES))}
workload = Workload(
    places=dict(zip(TAPS, "aabc", strict=True)),
    rates={name: (HZ, FLOWS * _FLOW + 8) for name in TAPS},
    costs={
        f"{name}_{level}": (cpu_s * _AT[level], {"scan": _AT["check"], "check": _AT["inspect"], "inspect": 0}[level] * _FLOW + 8)
        for name in TAPS
        for level, cpu_s in LEVELS.items()
    }
    | {"verdict": (1e-5, 12)},
    levels={f"{name}_{level}": n for name in TAPS for n, level in enumerate(LEVELS)} | {"verdict": len(LEVELS)},
    cores={"a": 1, "b": 1, "c": 1, "d": 2},
    bandwidths=(100, 20),
    truth=truth,
    hz=HZ,
)
