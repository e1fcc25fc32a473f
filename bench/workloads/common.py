"""What the three workloads share: their environment, sources that keep a pace, tasks that cost a host's cores, and a sink that notes.

A task's cost is a sleep that holds one of its host's core tokens, since two real cores are not four hosts. Tokens lie in a named pipe:
who runs takes one out and puts it back, and the kernel lets those who wait have them in turn.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("SECONDS") or 10)
FASTER = float(os.environ.get("FASTER") or 1)
REPLICAS = int(os.environ.get("REPLICAS") or 1)
if ready := os.environ.get("READY"):
    Path(ready, str(os.getpid())).touch()


@dataclass(frozen=True)
class Workload:
    """What the comparison has to know of a pipeline.

    Attributes:
        places: source to host.
        rates: source to (messages per second, bytes of a payload).
        costs: task to (cpu-seconds of a run on a core of speed 1, bytes of a result).
        levels: task to how many tasks lie before it, from 0.
        cores: host to core tokens. The last one has the sink, and the broker.
        bandwidths: in Mbit/s.
        truth: the right answer at a time, in seconds since the beginning.
        hz: results per second.
    """

    places: dict[str, str]
    rates: dict[str, tuple[float, float]]
    costs: dict[str, tuple[float, float]]
    levels: dict[str, int]
    cores: dict[str, int]
    bandwidths: tuple[int, ...]
    truth: Callable[[float], int]
    hz: float
    sink: str = "note"


@cache
def begins() -> float:
    """When the first messages are due, in seconds since the epoch: it stands in the file AT as soon as all processes are there."""
    if (file := os.environ.get("AT")) is None:
        return time.time()
    while not Path(file).exists():
        time.sleep(0.01)
    return float(Path(file).read_text())


def numbers(hz: float) -> Iterator[int]:
    """The numbers of a source's messages, each when it is due."""
    for n in range(count(hz)):
        time.sleep(max(0.0, stamp(n, hz) / 1e9 - time.time()))
        yield n


def count(hz: float) -> int:
    """How many messages a source sends."""
    return int(SECONDS * hz * FASTER)


def stamp(n: int, hz: float) -> int:
    """When message `n` was due, in nanoseconds since the epoch."""
    return round((begins() + n / (hz * FASTER)) * 1e9)


def cost(cpu_s: float) -> None:
    """Holds a core of this host for so long."""
    tokens = _tokens()
    if tokens is None:
        time.sleep(cpu_s)
        return
    token = os.read(tokens, 1)
    try:
        time.sleep(cpu_s)
    finally:
        os.write(tokens, token)


@cache
def _tokens() -> int | None:
    path = os.environ.get("CORES")
    return None if path is None else os.open(path, os.O_RDWR)


class Cores:
    """The core tokens of a host."""

    def __init__(self, path: Path, count: int) -> None:
        os.mkfifo(path)
        self._tokens = os.open(path, os.O_RDWR)
        os.write(self._tokens, b"c" * count)

    def close(self) -> None:
        """They are gone."""
        os.close(self._tokens)


def note(line: list[Any]) -> None:
    """Appends to the file of the results: when its inputs were due, when it came, the answer."""
    with open(os.environ.get("OUT") or os.devnull, "a") as file:
        file.write(json.dumps([*line[:1], time.time_ns(), *line[1:]]) + "\n")
