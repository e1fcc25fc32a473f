"""kill -9 of the broker under load, restarted each time, judged from the files that plain functions wrote.

    python bench/broker_kills.py pulsar                 20 kills; the broker is started and stopped by `edgeserve broker`
    python bench/broker_kills.py nats --kills 5

Source -> task -> sink and two sources -> exact join -> sink run beside each other. A kill counts only if at its moment messages had been
sent that the sink's function had not seen; the script proves it from the files while the broker stands still.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brokers import Broker
from edgeserve import context
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import lines, note

KINDS = ("single", "exact")


def numbers(root: Path, rate: float) -> Iterator[int]:
    """Numbers at a rate until the file `stop` is there."""
    number, start = 0, time.monotonic()
    while not (root / "stop").exists():
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        yield number
        number += 1


def source(node: str, root: Path, kind: str, name: str, rate: float) -> None:
    """Notes what it has sent when it has."""
    with DataSource(numbers(root, rate), node, source_id=name, topic=f"in-{kind}-{root.name}", event_time=int, message_id=int) as ds:
        for number in ds:
            note(root / f"sent-{kind}-{name}", number)


def task(node: str, root: Path, kind: str) -> None:
    """Hands its inputs on."""

    def single(a: int) -> list[int]:
        return [a, a]

    def exact(a: int, b: int) -> list[int]:
        return [a, b]

    options: dict[str, Any] = {"join": "exact"} if kind == "exact" else {}
    names = {"topic_in": f"in-{kind}-{root.name}", "topic_out": f"out-{kind}-{root.name}"}
    with Compute(exact if kind == "exact" else single, node, **names, **options) as compute:
        compute.run(until="end")


def sink(node: str, root: Path, kind: str) -> None:
    """Notes every call, and whether it was told that this may be a repeat."""

    def final(pair: list[int]) -> None:
        note(root / f"sink-{kind}", [*pair, bool(context().redelivered)])

    with Materialize(final, node, topic=f"out-{kind}-{root.name}") as materialize:
        materialize.run(until="end")


def unseen(root: Path, kind: str) -> bool:
    """Whether something was sent that the sink has not seen."""
    sent = min(len(lines(path)) for path in root.glob(f"sent-{kind}-*"))
    return sent > len(lines(root / f"sink-{kind}"))


def judge(root: Path, kind: str) -> tuple[str, bool]:
    """(what came of it, whether that is right)."""
    calls = lines(root / f"sink-{kind}")
    sent = min(len(lines(path)) for path in root.glob(f"sent-{kind}-*"))
    have = Counter((a, b) for a, b, _ in calls)
    lost = [n for n in range(sent) if (n, n) not in have]
    wrong = [pair for pair in have if pair[0] != pair[1]]
    doubled = sum(count - 1 for count in have.values())
    text = f"{kind:7} {sent} sent by each source, {len(calls)} calls, {len(lost)} lost, {len(wrong)} wrong, {doubled} doubled"
    return text, not (lost or wrong or doubled)


def main() -> None:
    """Starts everything, kills, waits for the end, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("pulsar", "nats"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=200.0, help="messages/s of each source")
    parser.add_argument("--away", type=float, default=0.0, help="seconds that the broker stays away after each kill")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="edgeserve-broker-kills-"))
    os.environ["EDGESERVE_STATE_DIR"] = str(root / "state")
    broker = Broker(arguments.engine, root / "data", root / "state")
    node = broker.url
    cx = mp.get_context("spawn")
    roles = [cx.Process(target=t, args=(node, root, kind)) for kind in KINDS for t in (task, sink)]
    roles += [cx.Process(target=source, args=(node, root, k, n, arguments.rate)) for k in KINDS for n in ("a", "b")[: 1 + (k == "exact")]]
    for role in roles:
        role.start()
    done, began = 0, time.monotonic()
    try:
        while done < arguments.kills:
            time.sleep(2 + 2 * random.random())
            if dead := [r for r in roles if not r.is_alive()]:
                raise SystemExit(f"{len(dead)} processes ended by themselves: {[r.exitcode for r in dead]}")
            os.kill(broker.pid, signal.SIGSTOP)
            proven = all((root / f"sink-{kind}").exists() and unseen(root, kind) for kind in KINDS)
            os.kill(broker.pid, signal.SIGKILL if proven else signal.SIGCONT)
            if proven:
                done += 1
                time.sleep(arguments.away)
                broker.start()
                sys.stdout.write(f"kill {done} of {arguments.kills}, {time.monotonic() - began:.0f} s\n")
                sys.stdout.flush()
        time.sleep(2)
        (root / "stop").touch()
        for role in roles:
            role.join(120)
        stuck = [r for r in roles if r.is_alive() or r.exitcode]
        found = [judge(root, kind) for kind in KINDS]
    finally:
        for role in roles:
            role.kill()
        broker.stop()
    sys.stdout.write("".join(f"{'ok  ' if right else 'FAIL'} {text}\n" for text, right in found))
    if stuck or not all(right for _, right in found):
        sys.exit(f"{len(stuck)} processes did not end well: {[r.exitcode for r in stuck]}; files in {root}")


if __name__ == "__main__":
    main()
