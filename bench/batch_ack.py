"""A task is killed -9 when it has acknowledged a part of a batch: no result may come twice. Under both of Pulsar's settings.

    python bench/batch_ack.py       5 crashes in 1,500 messages, with acknowledgmentAtBatchIndexLevelEnabled=true, then =false

What a broker does there by itself: of a batch whose messages were acknowledged one by one, all come back (857 of 857). The source sends
as fast as it can, so that many messages travel as one batch; a crash counts only if the task had begun a part of one. Judged from the file
that the sink's function writes.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from brokers import Broker
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.transport import connect, disconnect
from notes import lines, note

SETTING = "acknowledgmentAtBatchIndexLevelEnabled"


def source(node: str, tag: str, messages: int) -> None:
    """Sends all at once."""
    with DataSource(iter(range(messages)), node, source_id="a", topic="in" + tag) as ds:
        ds.run(until="end")


def task(node: str, tag: str, root: Path) -> None:
    """Notes what it begins."""

    def same(a: int) -> int:
        note(root / "begun", a)
        time.sleep(0.001)
        return a

    with Compute(same, node, topic_in="in" + tag, topic_out="out" + tag) as compute:
        compute.run(until="end")


def sink(node: str, tag: str, root: Path) -> None:
    """Notes what comes."""
    with Materialize(lambda number: note(root / "sunk", number), node, topic="out" + tag) as materialize:
        materialize.run(until="end")


def batches(node: str, topic: str) -> list[int]:
    """How many messages travelled together, batch by batch, told from the positions: those of a batch follow each other by one."""
    transport = connect(node)
    try:
        places = [position for _, position, _ in transport.read(topic)]
    finally:
        disconnect(transport)
    found: list[int] = []
    for before, here in zip([-2, *places], places, strict=False):
        if here == before + 1:
            found[-1] += 1
        else:
            found.append(1)
    return found


def run(node: str, root: Path, messages: int, crashes: int) -> list[str]:
    """What is wrong."""
    cx, tag = mp.get_context("spawn"), f"-{root.name}"
    sender = cx.Process(target=source, args=(node, tag, messages))
    sender.start()
    sender.join()
    # The topic's last message says that the source has ended.
    ends = [sum(sizes[: n + 1]) for sizes in (batches(node, "in" + tag),) for n in range(len(sizes))]
    largest = max(b - a for a, b in zip([0, *ends], ends, strict=False))
    final = cx.Process(target=sink, args=(node, tag, root))
    final.start()
    at = sorted(random.sample(range(messages // 10, messages - messages // 10), crashes))
    proven = 0
    for least in [*at, messages + 1]:
        worker = cx.Process(target=task, args=(node, tag, root))
        worker.start()
        while worker.is_alive():
            worker.join(0.001)
            if worker.pid is None or len(lines(root / "sunk")) < least:
                continue
            os.kill(worker.pid, signal.SIGSTOP)
            if len(set(lines(root / "begun"))) not in ends:
                proven += 1
                os.kill(worker.pid, signal.SIGKILL)
                break
            os.kill(worker.pid, signal.SIGCONT)  # between two batches: a moment later
        worker.join()
    final.join(60)
    counts = Counter(lines(root / "sunk"))
    again = len(lines(root / "begun")) - len(set(lines(root / "begun")))
    doubled = {n: c for n, c in counts.items() if c > 1}
    lost = [n for n in range(messages) if n not in counts]
    sys.stdout.write(f"{messages} messages in {len(ends)} batches, {crashes} crashes, {again} begun again, ")
    sys.stdout.write(f"{len(lost)} lost, {len(doubled)} doubled\n")
    wrong = [f"lost {lost[:5]}"] if lost else []
    wrong += [f"doubled {sorted(doubled)[:5]}"] if doubled else []
    wrong += [f"only {proven} of {crashes} crashes were in the middle of a batch"] if proven < crashes else []
    wrong += [f"the largest batch had {largest} messages"] if largest < 10 else []
    wrong += ["the sink did not end"] if final.is_alive() else []
    final.kill()
    return wrong


def main() -> None:
    """Both settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_500)
    parser.add_argument("--crashes", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    wrong = []
    for value in ("true", "false"):
        with tempfile.TemporaryDirectory(prefix="edgeserve-batch-ack-") as folder:
            broker = Broker("pulsar", Path(folder) / "data", Path(folder) / "broker", {SETTING: value})
            try:
                for number in range(arguments.runs):
                    root = Path(tempfile.mkdtemp(prefix="edgeserve-batch-ack-"))
                    os.environ["EDGESERVE_STATE_DIR"] = str(root / "state")
                    sys.stdout.write(f"{SETTING}={value}, run {number + 1}: ")
                    wrong += [f"{value}, {root}: {w}" for w in run(broker.url, root, arguments.messages, arguments.crashes)]
            finally:
                broker.stop()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
