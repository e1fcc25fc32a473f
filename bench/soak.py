"""Ten minutes at 5,000 messages/s: memory stays flat, the store within its retention; and what a waiting next() costs.

    python bench/soak.py                     10 minutes; exit 1 when a process grows by 1 MB/min after minute 2, or the store too far
    python bench/soak.py --minutes 3         shorter
    python bench/soak.py --waiting           only the share of a core that three waiting nodes use, over 20 s

Resident memory is read from /proc (anonymous pages: pages of the store's file map are the page cache's), the store's size from its files.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeserve.compute import Compute
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize

RETENTION_MB = 32


def stream(rate: int, seconds: float) -> Iterator[bytes]:
    """100-byte items at a steady rate, handed over every 2 ms."""
    start = time.monotonic()
    sent = 0
    while (passed := time.monotonic() - start) < seconds:
        for _ in range(int(passed * rate) - sent):
            sent += 1
            yield b"%099d" % sent
        time.sleep(0.002)


def source(node: str, rate: int, seconds: float) -> None:
    with DataSource(stream(rate, seconds), node, source_id="a", topic="in") as ds:
        for _ in ds:
            pass


def task(node: str) -> None:
    with Compute(lambda a: a, node, topic_in="in", topic_out="out") as compute:
        compute.run(until="end")


def sink(node: str, path: str) -> None:
    count = 0

    def final(value: bytes) -> None:
        nonlocal count
        count += 1
        if int(value) != count:
            raise SystemExit(f"message {int(value)} came where {count} was due")

    with Materialize(final, node, topic="out") as materialize:
        materialize.run(until="end")
    Path(path).write_text(str(count))


def anonymous_kb(pid: int) -> int:
    """Resident pages of a process that belong to no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    return 0


def soak(minutes: float, rate: int) -> list[str]:
    """Runs and samples; returns what does not hold."""
    root = Path(tempfile.mkdtemp(prefix="edgeserve-soak-"))
    os.environ["EDGESERVE_STATE_DIR"] = str(root / "state")
    node = f"local://{root}/store?retention_mb={RETENTION_MB}"
    cx = mp.get_context("spawn")
    roles = {
        "sink": cx.Process(target=sink, args=(node, str(root / "count"))),
        "task": cx.Process(target=task, args=(node,)),
        "source": cx.Process(target=source, args=(node, rate, minutes * 60)),
    }
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in roles}
    store: list[float] = []
    for role in roles.values():
        role.start()
    start = time.monotonic()
    while (passed := time.monotonic() - start) < minutes * 60 - 1:
        time.sleep(5)
        if any(not r.is_alive() for r in roles.values()):
            return [f"{n} ended early with {r.exitcode}" for n, r in roles.items() if not r.is_alive()]
        for name, role in roles.items():
            samples[name].append((passed / 60, anonymous_kb(role.pid or 0)))
        store.append(sum(f.stat().st_blocks * 512 for f in root.rglob("*") if f.is_file()) / 2**20)
    for role in roles.values():
        role.join(60)
    wrong = [f"{n} did not end well: {r.exitcode}" for n, r in roles.items() if r.exitcode != 0]
    warm = min(2.0, minutes / 3)
    for name, found in samples.items():
        late = [(m, kb) for m, kb in found if m >= warm]
        slope = statistics.linear_regression(*zip(*late, strict=True)).slope / 1024
        first, warmed, last = (kb / 1024 for kb in (found[0][1], late[0][1], found[-1][1]))
        sys.stdout.write(f"{name:7} {first:7.1f} MB at first, {warmed:7.1f} MB warm, {last:7.1f} MB at last: {slope:+.3f} MB/min\n")
        if slope >= 1.0:
            wrong.append(f"{name} grows by {slope:.2f} MB/min")
    # Two topics of RETENTION_MB each, and what LMDB keeps free for reuse.
    bound = 2 * RETENTION_MB * 2 + 32
    count = (root / "count").read_text() if (root / "count").exists() else "none"
    sys.stdout.write(f"store   {max(store):7.1f} MB at most (two topics of {RETENTION_MB} MB; bound {bound} MB)\n")
    sys.stdout.write(f"sink    {count} messages in order\n")
    if max(store) > bound:
        wrong.append(f"the store grew to {max(store):.0f} MB")
    shutil.rmtree(root, ignore_errors=True)
    return wrong


def wait(node: str, kind: str, seconds: float, out: Any) -> None:
    """A node that waits for messages that do not come; what it used of the processor meanwhile."""
    waiting: Compute | Materialize
    if kind == "sink":
        waiting = Materialize(print, node, topic="out", timeout_ms=seconds * 1000)
    elif kind == "join":
        waiting = Compute(lambda a, b: a, node, topic_in="in", topic_out="out", group="join", timeout_ms=seconds * 1000)
    else:
        waiting = Compute(lambda a: a, node, topic_in="in", topic_out="out", timeout_ms=seconds * 1000)
    with waiting:
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            next(waiting)
        except ReceiveTimeout:
            after = resource.getrusage(resource.RUSAGE_SELF)
            out.put((kind, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / seconds * 100))


def waiting(seconds: float = 20.0) -> list[str]:
    """What three waiting nodes cost."""
    root = Path(tempfile.mkdtemp(prefix="edgeserve-wait-"))
    os.environ["EDGESERVE_STATE_DIR"] = str(root / "state")
    cx = mp.get_context("spawn")
    out = cx.Queue()
    roles = [cx.Process(target=wait, args=(f"local://{root}/store", kind, seconds, out)) for kind in ("task", "join", "sink")]
    for role in roles:
        role.start()
    wrong = []
    for _ in roles:
        kind, share = out.get(timeout=seconds + 30)
        sys.stdout.write(f"waiting {kind:5} uses {share:.3f} % of a core\n")
        if share >= 1:
            wrong.append(f"a waiting {kind} uses {share:.2f} % of a core")
    for role in roles:
        role.join()
    shutil.rmtree(root, ignore_errors=True)
    return wrong


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--waiting", action="store_true", help="only the waiting nodes")
    arguments = parser.parse_args()
    wrong = waiting()
    if not arguments.waiting:
        wrong += soak(arguments.minutes, arguments.rate)
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
