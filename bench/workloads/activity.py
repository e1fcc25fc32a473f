"""Activity recognition: four groups of sensors on a person and in a room, a model for each, and one that hears all four.

Each reading shows what the person does, with some of them wrong; a group's model reads it, the joint model lets the four vote.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from common import REPLICAS, Workload, cost, note, numbers, stamp

from edgeserve.pipeline import Pipeline

HZ, ACTIVITIES, LASTS_S = 30.0, 6, 1.5
GROUPS = {"wrist": (256, 0.001), "ankle": (512, 0.002), "chest": (1_024, 0.0035), "room": (2_048, 0.005)}
"""Bytes of a reading, cpu-seconds of its model."""
JOINT_S, RIGHT = 0.015, 0.8


def truth(second: float) -> int:
    """What the person does at a time."""
    return int(second / LASTS_S) * 5 % ACTIVITIES


def readings(group: str, size: int) -> Iterator[list[Any]]:
    """(number, payload)."""
    for n in numbers(HZ):
        chance = random.Random(f"{group} {n}")
        seen = truth(n / HZ) if chance.random() < RIGHT else chance.randrange(ACTIVITIES)
        yield [n, bytes([seen]) + chance.randbytes(size - 1)]


def when(reading: list[Any]) -> int:
    return stamp(reading[0], HZ)


class Model:
    """One group's."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def __call__(self, reading: list[Any]) -> list[int]:
        cost(self._cpu_s)
        return [reading[0], reading[1][0]]


def joint(wrist: list[int], ankle: list[int], chest: list[int], room: list[int]) -> list[int]:
    """What most of them say."""
    cost(JOINT_S)
    votes = [each[1] for each in (wrist, ankle, chest, room)]
    return [when(wrist), max(votes, key=votes.count)]


app = Pipeline("activity")
for name, (size, cpu_s) in GROUPS.items():
    app.add_source(name, readings, args={"group": name, "size": size}, event_time=when, max_lateness_ms=0)
    app.add_task(f"{name}_model", Model, args={"cpu_s": cpu_s}, sources=[name], replicas=REPLICAS)
app.add_task("joint", joint, sources=[f"{name}_model" for name in GROUPS], join="exact", replicas=REPLICAS)
app.add_sink("note", note, of="joint")

workload = Workload(
    places=dict(zip(GROUPS, "aabc", strict=True)),
    rates={name: (HZ, size + 4) for name, (size, _) in GROUPS.items()},
    costs={f"{name}_model": (cpu_s, 4) for name, (_, cpu_s) in GROUPS.items()} | {"joint": (JOINT_S, 12)},
    levels={f"{name}_model": 0 for name in GROUPS} | {"joint": 1},
    cores={"a": 1, "b": 1, "c": 1, "d": 2},
    bandwidths=(20,),
    truth=truth,
    hz=HZ,
)
