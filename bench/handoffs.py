"""Payloads of 64 KiB handed from process to process through shared memory, ten million times, each compared with its checksum.

    python bench/handoffs.py                      exit 1 when one was lost, wrong, out of order, or changed while somebody held it
    python bench/handoffs.py --count 200000       fewer

A source and a sink are processes on one `local://` store. Each payload has its number and a checksum (XXH3) of all else in it, which the
sink's function computes anew; of every 16th it keeps the view for a while and computes it once more. Every 10,000th call leaves a line.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import last, lines, note

SIZE, HEAD = 64 * 1024, 16
POOL, EVERY, HELD = 64, 16, 32
SAY_EVERY, SHOW_EVERY_S = 10_000, 30.0
cx = mp.get_context("spawn")


def stream(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """uint8: the number, the checksum of what follows it but these 8 bytes, random bytes of one of several kinds."""
    bodies = [np.random.default_rng(n).integers(0, 256, SIZE, np.uint8) for n in range(POOL)]
    sums = [xxh3_64_intdigest(body[HEAD:]) for body in bodies]
    for n in range(count):
        body = bodies[n % POOL]
        body[:HEAD].view(np.uint64)[:] = n, sums[n % POOL] ^ n
        yield body


def right(payload: np.ndarray[Any, Any], n: int) -> bool:
    """Whether it is payload number n, whole."""
    number, found = (int(value) for value in payload[:HEAD].view(np.uint64))
    return payload.size == SIZE and number == n and found == xxh3_64_intdigest(payload[HEAD:]) ^ n


def source(node: str, count: int, go: Any) -> None:
    """Sends them as fast as they are taken."""
    with DataSource(stream(count), node, source_id="a", topic="blocks", routing="lazy") as ds:
        go.wait()
        for _ in ds:
            pass


def sink(node: str, root: Path, ready: Any) -> None:
    """Checks each, and notes how many were wrong."""
    held: deque[tuple[int, np.ndarray[Any, Any]]] = deque()
    seen = wrong = changed = 0

    def check(block: np.ndarray[Any, Any]) -> None:
        nonlocal seen, wrong, changed
        wrong += not right(block, seen)
        if seen % EVERY == 0:
            held.append((seen, block))
            if len(held) > HELD:
                n, before = held.popleft()
                changed += not right(before, n)
        seen += 1
        if seen % SAY_EVERY == 0:
            note(root / "seen", [seen, wrong, changed])

    with Materialize(check, node, topic="blocks") as materialize:
        ready.set()
        materialize.run(until="end")
    note(root / "seen", [seen, wrong, changed])


def main() -> None:
    """Runs it, and says now and then how far it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000_000)
    count = parser.parse_args().count
    root = Path(tempfile.mkdtemp(prefix="edgeserve-handoffs-"))
    node, ready, go = f"local://{root / 'store'}", cx.Event(), cx.Event()
    roles = [cx.Process(target=sink, args=(node, root, ready)), cx.Process(target=source, args=(node, count, go))]
    try:
        for role in roles:
            role.start()
        ready.wait(60)
        go.set()
        began = time.monotonic()
        while roles[0].is_alive():
            roles[0].join(SHOW_EVERY_S)
            if lines_there := (root / "seen").exists() and last(root / "seen"):
                seen, wrong, changed = lines_there[0]
                took = time.monotonic() - began
                print(f"{seen:11,} of {count:,} in {took:6.0f} s, {seen / took:7,.0f}/s: {wrong} wrong, {changed} changed", flush=True)
        roles[1].join(60)
        seen, wrong, changed = lines(root / "seen")[-1]
    finally:
        for role in roles:
            role.kill()
        shutil.rmtree(root, ignore_errors=True)
    if wrong or changed or seen != count:
        sys.exit(f"{count - seen:,} lost, {wrong:,} wrong, {changed:,} changed while they were held")


if __name__ == "__main__":
    main()
