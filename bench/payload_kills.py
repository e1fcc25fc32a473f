"""kill -9 of writers and readers of payloads in shared memory: nothing lost, nothing mixed up, nothing left behind.

    python bench/payload_kills.py                    100 kills; exit 1 when something is wrong
    python bench/payload_kills.py --kills 1000 --seed 7

Two sources -> exact join -> sink, one process each, payloads of 70 kB to 2 MB of which every 4 KiB page carries the message's number. One
of the four is killed at a random moment and started again, as often as asked for. A kill counts only if the victim held unsettled work: it
is stopped first, and what the sources have sent is compared with what the sink's function has noted. Every page is looked at by the task;
the numbers are judged from the file that the sink's function writes. At the end all is settled, and no segment may be left.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeserve import context
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import lines, note

PAGE = 4096
SIZES = (70_000, 300_000, 1_000_000, 2_000_000)
AHEAD = 40


def stream(name: str, directory: Path) -> Iterator[Any]:
    """Numbered payloads: from the first that the sink has not noted, and no further than `AHEAD` before it, until told to stop."""
    done = {number for number, _ in lines(directory / "sink")}
    number = next(n for n in range(len(done) + 1) if n not in done)
    while not (directory / "stop").exists() or number < int((directory / "stop").read_text()):
        while number - len(lines(directory / "sink")) > AHEAD:
            time.sleep(0.002)
        size = SIZES[(7 * number + ord(name)) % len(SIZES)]
        payload = np.empty(size, np.uint8)
        payload[::PAGE] = number % 251
        payload[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        note(directory / f"sent-{name}", number)
        yield payload
        number += 1


def number_of(payload: Any) -> int:
    """What stands in a payload."""
    return int.from_bytes(payload[:8].tobytes(), "little")


def source(node: str, name: str, directory: Path) -> None:
    """One source."""
    with DataSource(
        stream(name, directory), node, source_id=name, topic="in", routing="lazy", event_time=number_of, message_id=number_of
    ) as ds:
        ds.run()


def task(node: str) -> None:
    """The join: looks at every page."""

    def both(a: Any, b: Any) -> tuple[int, str]:
        number = number_of(a)
        same = number == number_of(b) and all((p[PAGE::PAGE] == number % 251).all() for p in (a, b))
        return number, "right" if same else f"wrong {number_of(b)}"

    with Compute(both, node, topic_in="in", topic_out="out", join="exact", group="join") as compute:
        compute.run()


def sink(node: str, directory: Path) -> None:
    """Notes each result."""

    def final(value: Any) -> None:
        if not context().redelivered or all(number != value[0] for number, _ in lines(directory / "sink")):
            note(directory / "sink", value)

    with Materialize(final, node, topic="out") as materialize:
        materialize.run()


def main() -> None:
    """Kills, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000)
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="edgeserve-payload-kills-"))
    os.environ["EDGESERVE_PAYLOAD_DIR"] = payloads = tempfile.mkdtemp(prefix="edgeserve-payload-kills-", dir="/dev/shm")
    node, cx = f"local://{directory}/store", mp.get_context("spawn")
    roles: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "a": (source, (node, "a", directory)),
        "b": (source, (node, "b", directory)),
        "task": (task, (node,)),
        "sink": (sink, (node, directory)),
    }

    def start(role: str) -> Any:
        process = cx.Process(target=roles[role][0], args=roles[role][1], name=role)
        process.start()
        return process

    def sent() -> int:
        return min((found[-1] for found in (lines(directory / "sent-a"), lines(directory / "sent-b")) if found), default=-1)

    running = {role: start(role) for role in roles}
    kills, met, killed = 0, 0, dict.fromkeys(roles, 0)
    began = time.monotonic()
    try:
        while kills < arguments.kills:
            time.sleep(choose.uniform(0.02, 0.6))
            role = choose.choice(list(roles))
            victim = running[role]
            if not victim.is_alive():
                sys.exit(f"FAIL {role} ended by itself, status {victim.exitcode}")
            os.kill(victim.pid, signal.SIGSTOP)
            met += 1
            if sent() + 1 > len(lines(directory / "sink")):
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                kills += 1
                killed[role] += 1
                running[role] = start(role)
            else:
                os.kill(victim.pid, signal.SIGCONT)
        last = max(found[-1] for found in (lines(directory / "sent-a"), lines(directory / "sent-b")) if found) + 20
        (directory / "stop").write_text(str(last + 1))
        deadline = time.monotonic() + 120
        while len({number for number, _ in lines(directory / "sink")}) <= last and time.monotonic() < deadline:
            time.sleep(0.1)
        for role in ("a", "b"):
            running[role].join(30)
        for role in ("task", "sink"):
            os.kill(running[role].pid, signal.SIGTERM)
            running[role].join(30)
    finally:
        for process in running.values():
            process.kill()
    found = lines(directory / "sink")
    numbers = [number for number, _ in found]
    wrong = [line for line in found if line[1] != "right"]
    lost = sorted(set(range(last + 1)) - set(numbers))
    doubled = len(numbers) - len(set(numbers))
    left = [str(path) for path in Path(payloads).rglob("*") if path.is_file() and path.name != "origin"]
    print(f"seed {arguments.seed}: {kills} kills ({killed}) of {met} that were stopped, {time.monotonic() - began:.0f} s")
    print(f"{len(set(numbers))} of {last + 1} sets; lost {len(lost)}, wrong {len(wrong)}, doubled {doubled}; files left: {len(left)}")
    shutil.rmtree(directory)
    shutil.rmtree(payloads)
    if lost or wrong or doubled or left:
        sys.exit(f"FAIL lost {lost[:5]}, wrong {wrong[:5]}, left {left[:5]}")


if __name__ == "__main__":
    main()
