"""Throughput and latency of source -> task -> sink and of two sources -> exact join -> sink, one process each, on one machine.

    python bench/pipeline.py                       the table: 100 B to 1 MB, saturated and paced
    python bench/pipeline.py --check               only what is promised (100 B), exit 1 when a median of the runs falls short
    python bench/pipeline.py --json figures.json   the same figures for a program

Saturated: results per second between the first and the last call of the sink's function. Paced: from the moment the source's stream hands
the message over to the call of the sink's function, on one monotonic clock. Every result is counted by the sink's own function.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize

STAMP = struct.Struct(">qq")
PROMISED = {  # what: (figure, at least / at most, bound)
    ("pipeline", "saturated"): ("per_s", "least", 100_000),
    ("pipeline", "paced"): (("p50_ms", "most", 0.8), ("p99_ms", "most", 3.0)),
    ("join", "saturated"): ("per_s", "least", 40_000),
    ("join", "paced"): (("p50_ms", "most", 0.9),),
}


def stream(size: int, messages: int, rate: float) -> Iterator[bytes]:
    """Numbered, stamped payloads; paced ones are stamped when they are handed over."""
    pad = b"x" * max(0, size - STAMP.size)
    start = time.monotonic()
    for number in range(messages):
        if rate:
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
        yield STAMP.pack(number, time.monotonic_ns()) + pad


def number_of(item: bytes) -> int:
    """The event time of the join: the message's number."""
    return int(STAMP.unpack_from(item)[0])


def source(node: str, tag: str, name: str, size: int, messages: int, rate: float, go: Any) -> None:
    """One source process."""
    with DataSource(stream(size, messages, rate), node, source_id=name, topic="in" + tag, event_time=number_of) as ds:
        go.wait()
        for _ in ds:
            pass


def task(node: str, tag: str, kind: str, ready: Any) -> None:
    """The task process: hands its input on."""

    def one(a: bytes) -> bytes:
        return a

    def both(a: bytes, b: bytes) -> bytes:
        return max(a[:16], b[:16]) + a[16:]  # the later stamp: the numbers before the times are equal

    options: dict[str, Any] = {"join": "exact"} if kind == "join" else {}
    with Compute(both if kind == "join" else one, node, topic_in="in" + tag, topic_out="out" + tag, **options) as compute:
        ready.release()
        compute.run(until="end")


def sink(node: str, tag: str, messages: int, ready: Any, out: Any) -> None:
    """The sink process: a plain function that notes when it was called with what."""
    calls: list[tuple[int, bytes]] = []
    note, now = calls.append, time.monotonic_ns

    def final(value: bytes) -> None:
        note((now(), value[:16]))

    with Materialize(final, node, topic="out" + tag) as materialize:
        ready.release()
        materialize.run(until="end")
    numbers = [STAMP.unpack(value)[0] for _, value in calls]
    late = sorted((at - STAMP.unpack(value)[1]) / 1e6 for at, value in calls[len(calls) // 20 :])
    out.put(
        {
            "right": numbers == list(range(messages)) if messages else True,
            "received": len(numbers),
            "per_s": round((len(calls) - 1) / max(1e-9, (calls[-1][0] - calls[0][0]) / 1e9)),
            "p50_ms": round(late[len(late) // 2], 3),
            "p99_ms": round(late[int(len(late) * 0.99)], 3),
        }
    )


def measure(kind: str, size: int, messages: int, rate: float, node: str | None = None) -> dict[str, Any]:
    """One run on a fresh store, or on topics of its own at `node`."""
    cx = mp.get_context("spawn")
    directory = tempfile.mkdtemp(prefix="edgeserve-bench-")
    tag = f"-{Path(directory).name}" if node else ""
    node = node or f"local://{directory}"
    ready, go, out = cx.Semaphore(0), cx.Event(), cx.Queue()
    names = ["a", "b"] if kind == "join" else ["a"]
    roles = [cx.Process(target=sink, args=(node, tag, messages, ready, out)), cx.Process(target=task, args=(node, tag, kind, ready))]
    roles += [cx.Process(target=source, args=(node, tag, name, size, messages, rate, go)) for name in names]
    try:
        for role in roles:
            role.start()
        for _ in range(2):
            if not ready.acquire(timeout=30):
                raise SystemExit("a process did not start")
        time.sleep(0.5)  # the sources' interpreters start; not part of what is measured
        go.set()
        figures: dict[str, Any] = out.get(timeout=300)
        for role in roles:
            role.join(30)
        return figures
    finally:
        for role in roles:
            role.kill()
        shutil.rmtree(directory, ignore_errors=True)


def plan(check: bool, quick: bool) -> list[tuple[str, str, int, int, float]]:
    """(kind, mode, bytes, messages, rate) of every case."""
    scale = 4 if quick else 1
    cases = [("pipeline", "saturated", 100, 400_000 // scale, 0.0), ("pipeline", "paced", 100, 500 // scale, 100.0)]
    cases += [("join", "saturated", 100, 150_000 // scale, 0.0), ("join", "paced", 100, 500 // scale, 100.0)]
    if not check:
        for size, messages in ((1_000, 200_000), (10_000, 60_000), (100_000, 8_000), (1_000_000, 1_000)):
            cases.append(("pipeline", "saturated", size, messages // scale, 0.0))
            cases.append(("pipeline", "paced", size, 300 // scale, 20.0 if size >= 1_000_000 else 100.0))
        cases.append(("join", "saturated", 1_000, 100_000 // scale, 0.0))
        cases.append(("join", "saturated", 1_000_000, 500 // scale, 0.0))
        cases.append(("join", "paced", 1_000_000, 200 // scale, 20.0))
    return cases


def verdict(kind: str, mode: str, size: int, runs: list[dict[str, Any]]) -> list[str]:
    """What a case promises and does not hold."""
    short = [f"{kind} {mode} {size} B: a run received wrong or unordered results" for r in runs if not r["right"]]
    promised = PROMISED[kind, mode] if size == 100 else ()
    for figure, direction, bound in [promised] if promised and isinstance(promised[0], str) else promised:  # type: ignore[misc]
        median = statistics.median(r[figure] for r in runs)
        if (median < bound) if direction == "least" else (median > bound):
            short.append(f"{kind} {mode} {size} B: median {figure} is {median}, promised is at {direction} {bound}")
    return short


def main() -> None:
    """Runs the cases interleaved, so that a slow minute of the machine meets all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="only the promised figures")
    parser.add_argument("--quick", action="store_true", help="a quarter of the messages")
    parser.add_argument("--only", default="", help="cases whose name contains this, as in 'join paced'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [c for c in plan(arguments.check, arguments.quick) if arguments.only in f"{c[0]} {c[1]}"]
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for _ in range(arguments.runs):
        for kind, mode, size, messages, rate in cases:
            runs.setdefault((kind, mode, size), []).append(measure(kind, size, messages, rate))
    rows, short = [], []
    sys.stdout.write(f"{'':9} {'':9} {'bytes':>9} {'per s':>9} {'(min-max)':>19} {'p50 ms':>8} {'(min-max)':>17} {'p99 ms':>8}\n")
    for (kind, mode, size), found in runs.items():
        spread = {}
        for figure in ("per_s", "p50_ms", "p99_ms"):
            values = [r[figure] for r in found]
            spread[figure] = (min(values), statistics.median(values), max(values))
        low, rate_, high = spread["per_s"]
        sys.stdout.write(f"{kind:9} {mode:9} {size:9,} {rate_:9,.0f} {f'({low:,.0f}-{high:,.0f})':>19} ")
        p50 = spread["p50_ms"]
        sys.stdout.write(f"{p50[1]:8.3f} {f'({p50[0]:.3f}-{p50[2]:.3f})':>17} {spread['p99_ms'][1]:8.3f}\n")
        rows.append({"kind": kind, "mode": mode, "bytes": size, "runs": found})
        short += verdict(kind, mode, size, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if short:
        sys.exit("\n".join(short))


if __name__ == "__main__":
    main()
