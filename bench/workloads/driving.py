"""Driving: six cameras, a lidar and five radars, a model for each, and one that combines the newest of all ten times a second.

Each reading shows in which of some lanes the obstacle is, with some of them wrong; the joint model takes a weighted vote.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from common import REPLICAS, Workload, cost, note, numbers, stamp

from edgeserve.pipeline import Pipeline

KINDS = {"camera": (6, 12.0, 150_000, 0.050), "lidar": (1, 20.0, 700_000, 0.080), "radar": (5, 13.0, 2_000, 0.030)}
"""How many there are, readings per second, bytes of a reading, cpu-seconds of its model."""
SENSORS = {f"{kind}_{n}": (hz, size, cpu_s) for kind, (count, hz, size, cpu_s) in KINDS.items() for n in range(count)}
JOINT_S, EVERY_MS, LANES, LASTS_S, RIGHT = 0.040, 100.0, 5, 2.0, 0.7
HOSTS = dict(zip(SENSORS, "aaabbbcaabbc", strict=True))


def truth(second: float) -> int:
    """The lane of the obstacle at a time."""
    return int(second / LASTS_S) * 3 % LANES


def readings(sensor: str, hz: float, size: int) -> Iterator[list[Any]]:
    """(number, when it was due in ns, payload)."""
    noise = random.Random(sensor).randbytes(size)
    for n in numbers(hz):
        chance = random.Random(f"{sensor} {n}")
        seen = truth(n / hz) if chance.random() < RIGHT else chance.randrange(LANES)
        yield [n, stamp(n, hz), bytes([seen]) + n.to_bytes(8, "little") + noise[9:]]


def when(reading: list[Any]) -> int:
    return int(reading[1])


class Model:
    """One sensor's."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def __call__(self, reading: list[Any]) -> list[int]:
        cost(self._cpu_s)
        return [reading[0], reading[1], reading[2][0]]


def joint(
    c0: list[int] | None,
    c1: list[int] | None,
    c2: list[int] | None,
    c3: list[int] | None,
    c4: list[int] | None,
    c5: list[int] | None,
    lidar: list[int] | None,
    r0: list[int] | None,
    r1: list[int] | None,
    r2: list[int] | None,
    r3: list[int] | None,
    r4: list[int] | None,
) -> list[int]:
    """What most of them say, as of the newest."""
    cost(JOINT_S)
    seen = [each for each in (c0, c1, c2, c3, c4, c5, lidar, r0, r1, r2, r3, r4) if each is not None]
    return [max(each[1] for each in seen), Counter(each[2] for each in seen).most_common(1)[0][0]]


app = Pipeline("driving")
for name, (hz, size, cpu_s) in SENSORS.items():
    app.add_source(name, readings, args={"sensor": name, "hz": hz, "size": size}, event_time=when, max_lateness_ms=0)
    app.add_task(f"{name}_model", Model, args={"cpu_s": cpu_s}, sources=[name], replicas=REPLICAS)
app.add_task("joint", joint, sources=[f"{name}_model" for name in SENSORS], min_interval_ms=EVERY_MS, replicas=REPLICAS)
app.add_sink("note", note, of="joint")

workload = Workload(
    places=HOSTS,
    rates={name: (hz, size + 12) for name, (hz, size, _) in SENSORS.items()},
    costs={f"{name}_model": (cpu_s, 14) for name, (_, _, cpu_s) in SENSORS.items()} | {"joint": (JOINT_S, 12)},
    levels={f"{name}_model": 0 for name in SENSORS} | {"joint": 1},
    cores={"a": 4, "b": 4, "c": 3, "d": 12},
    bandwidths=(1_000, 100),
    truth=truth,
    hz=1000 / EVERY_MS,
)
