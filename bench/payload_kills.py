"""kill -9 of writers and readers of payloads in shared memory: nothing lost, nothing mixed up, nothing left behind.

    python bench/payload_kills.py                    100 kills; exit 1 when something is wrong
    python bench/payload_kills.py --kills 1000 --seed 7
    python bench/payload_kills.py --node nats://localhost   sources on one host, task on another: with the server between them, killed too

Two sources -> exact join -> sink, one process each, payloads of 70 kB to 2 MB of which every 4 KiB page carries the message's number. One
of the four is killed at a random moment and started again, as often as asked for. A kill counts only if the victim held unsettled work: it
is stopped first, and what the sources have sent is compared with what the sink's function has noted. Every page is looked at by the task;
the numbers are judged from the file that the sink's function writes. At the end all is settled, and no payload may be left after
the next start. Hosts are payload directories: what is in another one has to be fetched.
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
from edgeserve.payload.fetch import Fetcher
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
    on_host("here")
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

    on_host("there")
    with Compute(both, node, topic_in="in", topic_out="out", join="exact", group="join") as compute:
        compute.run()


def sink(node: str, directory: Path) -> None:
    """Notes each result."""

    def final(value: Any) -> None:
        if not context().redelivered or all(number != value[0] for number, _ in lines(directory / "sink")):
            note(directory / "sink", value)

    with Materialize(final, node, topic="out") as materialize:
        materialize.run()


def server(node: str) -> None:
    """Serves the sources' payloads, as they do themselves."""
    on_host("here")
    if "EDGESERVE_ADVERTISE" in os.environ:
        os.execv(sys.executable, [sys.executable, "-c", "from edgeserve.cli.app import main; main()", "payloads", "serve"])


def next_start(node: str) -> None:
    """On both hosts: whoever starts removes what was left, and whoever fetches last what was fetched."""
    base = os.environ["EDGESERVE_PAYLOAD_DIR"]
    for name in ("here", "there"):
        os.environ["EDGESERVE_PAYLOAD_DIR"] = base
        on_host(name)
        with DataSource([], node, source_id="again", topic="in", routing="lazy"):
            pass
        if name == "there" and "EDGESERVE_ADVERTISE" in os.environ:
            Fetcher(Path(os.environ["EDGESERVE_PAYLOAD_DIR"]) / "fetched").close()


def on_host(name: str) -> None:
    """This process has the memory of that host, if there are several."""
    if "EDGESERVE_ADVERTISE" in os.environ:
        os.environ["EDGESERVE_PAYLOAD_DIR"] += f"/{name}"


def main() -> None:
    """Kills, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000)
    parser.add_argument("--node", help="URL of a broker, for several hosts; default: a fresh store of local://")
    parser.add_argument("--port", type=int, default=17_465, help="where payloads are served between hosts")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="edgeserve-payload-kills-"))
    os.environ["EDGESERVE_PAYLOAD_DIR"] = payloads = tempfile.mkdtemp(prefix="edgeserve-payload-kills-", dir="/dev/shm")
    node, cx = arguments.node or f"local://{directory}/store", mp.get_context("spawn")
    if arguments.node:
        # Topics of its own.
        node += f"/{directory.name}" if node.startswith("nats") else ""
        os.environ["EDGESERVE_ADVERTISE"] = f"127.0.0.1:{arguments.port}"
    os.environ["EDGESERVE_STATE_DIR"] = str(directory / "state")
    roles: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "a": (source, (node, "a", directory)),
        "b": (source, (node, "b", directory)),
        "task": (task, (node,)),
        "sink": (sink, (node, directory)),
    }
    if arguments.node:
        roles["server"] = (server, (node,))

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
        for role in roles.keys() - {"a", "b"}:
            os.kill(running[role].pid, signal.SIGTERM)
            running[role].join(30)
        for wait_s in (0.0, 61.0):  # what a writer was making may be half made by a living one for a minute
            time.sleep(wait_s)
            again = cx.Process(target=next_start, args=(node,))
            again.start()
            again.join(60)
            left = [str(path) for path in Path(payloads).rglob("*") if path.is_file() and path.name not in ("origin", "token", "users")]
            if not left:
                break
    finally:
        for process in running.values():
            process.kill()
    found = lines(directory / "sink")
    numbers = [number for number, _ in found]
    wrong = [line for line in found if line[1] != "right"]
    lost = sorted(set(range(last + 1)) - set(numbers))
    doubled = len(numbers) - len(set(numbers))
    print(f"seed {arguments.seed}: {kills} kills ({killed}) of {met} that were stopped, {time.monotonic() - began:.0f} s")
    print(f"{len(set(numbers))} of {last + 1} sets; lost {len(lost)}, wrong {len(wrong)}, doubled {doubled}; files left: {len(left)}")
    shutil.rmtree(directory)
    shutil.rmtree(payloads)
    if lost or wrong or doubled or left:
        sys.exit(f"FAIL lost {lost[:5]}, wrong {wrong[:5]}, left {left[:5]}")


if __name__ == "__main__":
    main()
