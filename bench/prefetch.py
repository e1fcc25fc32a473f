"""What it is worth to fetch ahead: a join of two cameras on another host, over 100 Mbit/s, whose task takes as long as its frames' fetch.

    python bench/prefetch.py                  results/s of `run()`, which fetches ahead, and of `next()`, which takes nothing ahead
    python bench/prefetch.py --runs 3 --sets 60

Hosts are network namespaces, as in `bench/hosts.py`; the frames, 1 MB each, have all been sent before the task begins. Each page of each is
checked. `carried`: bytes over the consumer's link for each byte of the payloads used. Exits 1 when the ratio of the medians is below 1.6,
more than 1.08 bytes are carried for one, or a result is missing or wrong. Needs root.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from hosts import MOST_BYTES, SIZE, Cluster, frame, number
from notes import lines, note

WORK_S = 2 * SIZE * 8 / 100e6
MODES = ("run", "next")
LEAST, FIRST = 1.6, 4
PATIENCE_S = 120.0


def camera(node: str, root: Path, name: str, sets: int) -> None:
    """Sends its frames, and stays until it is killed."""

    def stream() -> Iterator[np.ndarray[Any, Any]]:
        for n in range(sets):
            yield frame(n)

    with DataSource(stream(), node, source_id=name, topic="frames", routing="lazy", event_time=number) as source:
        source.run()
        note(root / "sent", name)
        time.sleep(10 * PATIENCE_S)


def consumer(node: str, root: Path, mode: str, sets: int) -> None:
    """Works on pairs, and notes them."""

    def pair(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        right = number(a) == number(b)
        time.sleep(WORK_S)
        note(root / "pairs", [number(a) if right else -1, time.monotonic()])

    with Compute(pair, node, topic_in="frames", topic_out="pairs", join="exact") as compute:
        if mode == "run":
            compute.run(until="end")
        while mode == "next" and len(lines(root / "pairs")) < sets:
            next(compute)


def measure(mode: str, sets: int, engine: str) -> tuple[float, float, bool]:
    """Results per second, bytes carried for each, and whether all are there and right."""
    with Cluster("prefetch", engine, hosts=("a", "c")) as cluster:
        root = cluster.root
        role = [sys.executable, __file__, "--node", cluster.node, "--root", str(root), "--sets", str(sets)]
        cameras = [cluster.on("a", *role, "--role", name, env={"EDGESERVE_ADVERTISE": address(cluster, n)}) for n, name in enumerate("ab")]
        await_lines(root / "sent", 2, cameras)
        before = cluster.network.counters("c")[0]
        task = cluster.on("c", *role, "--role", mode)
        await_lines(root / "pairs", sets, [task])
        carried = (cluster.network.counters("c")[0] - before) / (2 * SIZE * sets)
        pairs = lines(root / "pairs")
        return (sets - FIRST) / (pairs[-1][1] - pairs[FIRST - 1][1]), carried, [n for n, _ in pairs] == list(range(sets))


def address(cluster: Cluster, n: int) -> str:
    """Where the nth camera of the one host serves."""
    return f"{cluster.network.addresses['a']}:{7465 + n}"


def await_lines(path: Path, count: int, processes: list[Any]) -> None:
    """Until a file has so many lines."""
    ends = time.monotonic() + PATIENCE_S
    while len(lines(path)) < count:
        if time.monotonic() > ends or any(process.poll() for process in processes):
            sys.exit(f"{path.name}: {len(lines(path))} lines came of {count}")
        time.sleep(0.1)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--engine", choices=("nats", "pulsar"), default="nats")
    for name in ("--role", "--node", "--root"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.role in MODES:
        consumer(a.node, Path(a.root), a.role, a.sets)
    elif a.role:
        camera(a.node, Path(a.root), a.role, a.sets)
    else:
        wrong, rates = list[str](), {mode: list[float]() for mode in MODES}
        sys.stdout.write("mode   results/s   carried\n")
        for _ in range(a.runs):
            for mode in MODES:
                rate, carried, right = measure(mode, a.sets, a.engine)
                rates[mode].append(rate)
                sys.stdout.write(f"{mode:6} {rate:9.2f} {carried:9.3f}\n")
                sys.stdout.flush()
                if carried > MOST_BYTES or not right:
                    wrong.append(f"{mode}: {carried:.3f} bytes for one, not {MOST_BYTES:g}" if right else f"{mode}: a wrong result")
        ahead, one_by_one = (statistics.median(rates[mode]) for mode in MODES)
        sys.stdout.write(f"ahead: {ahead / one_by_one:.2f} times as many\n")
        if ahead < LEAST * one_by_one:
            wrong.append(f"{ahead / one_by_one:.2f} times as many results/s, not {LEAST:g}")
        if wrong:
            sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
