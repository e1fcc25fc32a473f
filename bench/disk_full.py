"""The disk fills up in the middle of a run, for real, and is freed again: everything goes on, nothing is lost. Needs root, for a tmpfs.

    python bench/disk_full.py                       every scenario; exit 1 when one fails, 77 when a tmpfs cannot be mounted
    python bench/disk_full.py --only "disk full"    one of them
    python bench/disk_full.py --broker nats         the disk is a broker's; also `pulsar`

Source, task and sink are processes on one `local://` store, or on a broker whose data lies on the small disk. What they did is judged from
files that plain functions wrote elsewhere: each number must have reached the sink's function, and only once (after a kill of everything,
the one in its hand may come twice). On a broker: NATS stops writing to a stream whose write failed until it is started anew, which is done
here when the disk is free; Pulsar's storage turns read-only at a share of its disk (`diskUsageThreshold`), and goes on by itself. A Pulsar
whose disk is filled to its last byte past that guard loses what it has stored itself ("No such ledger exists on Bookies").
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from brokers import Broker
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import lines, note

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.disks import BALLAST, fill_up

NUMBERS = 4_000
PAYLOAD = 2_000
ROLES = ("source", "task", "sink")
PATIENCE_S = 60.0
PULSAR_STORAGE = {
    "diskUsageThreshold": "0.85",
    "diskUsageWarnThreshold": "0.8",
    "diskUsageLwmThreshold": "0.8",
    "diskCheckInterval": "1000",
}
LEFT_TO_PULSAR = 0.08
MEGABYTES = {"local": 64, "nats": 96, "pulsar": 640}


# --- the processes ----------------------------------------------------------------------------------------------


def stream(pause_s: float) -> Iterator[dict[str, Any]]:
    """Numbers with some weight, a few thousand a second, fewer on a broker: so long a run that its disk is full in the middle."""
    for number in range(NUMBERS):
        if number % 20 == 0:
            time.sleep(pause_s)
        yield {"n": number, "weight": bytes(PAYLOAD)}


def role(name: str, node: str, notes: Path) -> None:
    """One of the three nodes, as users write them."""
    if name == "source":
        numbers = stream(0.005 if node.startswith("local:") else 0.1)
        with DataSource(numbers, node, source_id="a", topic="in", message_id=lambda item: int(item["n"])) as source:
            source.run(until="end")
    elif name == "task":
        with Compute(lambda a: a, node, topic_in="in", topic_out="out") as compute:
            note(notes / "ready", name)
            compute.run(until="end")
    else:
        with Materialize(lambda item: note(notes / "sunk", item["n"]), node, topic="out") as sink:
            note(notes / "ready", name)
            sink.run(until="end")


class Run:
    """The three processes of one scenario, and what they leave behind."""

    def __init__(self, node: str, state: Path, notes: Path) -> None:
        self.node, self.state, self.notes = node, state, notes
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts them all; what they log is kept. The source last: for a topic that nobody reads only the retention counts."""
        self.processes.clear()
        readers = len(lines(self.notes / "ready")) + len(ROLES) - 1
        for name in sorted(ROLES, key=lambda role: role == "source"):
            if name == "source":
                self.wait_for("the readers", lambda: len(lines(self.notes / "ready")) >= readers)
            with open(self.notes / f"{name}.log", "ab") as output:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, __file__, "--role", name, "--node", self.node, "--notes", str(self.notes)],
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "EDGESERVE_STATE_DIR": str(self.state)},
                )

    def log(self) -> str:
        """What they logged."""
        return "\n".join((self.notes / f"{name}.log").read_text(errors="replace") for name in ROLES)

    def sunk(self) -> list[int]:
        """What reached the sink's function."""
        return lines(self.notes / "sunk")

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits, but not for ever, and not for the dead."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            dead = {name: p.returncode for name, p in self.processes.items() if p.poll()}
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {'ended: ' + str(dead) if dead else 'waited in vain'}\n{self.log()[-2000:]}")
            time.sleep(0.02)

    def signal(self, number: int, *names: str) -> None:
        """Sends a signal to some of them."""
        for name in names or ROLES:
            self.processes[name].send_signal(number)

    def finish(self) -> list[int]:
        """Waits for their good end; what the sink got."""
        self.wait_for("the end", lambda: all(p.poll() is not None for p in self.processes.values()))
        return self.sunk()

    def end(self) -> None:
        """Whatever happened."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


# --- the disk ---------------------------------------------------------------------------------------------------


class Disk:
    """A small filesystem; `broker` keeps its data there, if there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broker = folder, cast(Broker | None, None)
        self._ballast = folder / BALLAST

    def fill(self) -> None:
        """Takes the space that is left. For Pulsar, whose storage guards its disk, only so much that it stores nothing more."""
        if self.broker is not None and self.broker.engine == "pulsar":
            usage = shutil.disk_usage(self.folder)
            self._ballast.write_bytes(bytes(usage.free - int(LEFT_TO_PULSAR * usage.total)))
            return
        fill_up(self.folder)

    def free(self) -> None:
        """Gives it back. NATS has shut the streams that it could not write, until it is started anew."""
        self._ballast.unlink()
        if self.broker is not None and self.broker.engine == "nats":
            self.broker.stop()
            self.broker.start()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Disk]:
    """A filesystem of its own."""
    with tempfile.TemporaryDirectory(prefix="edgeserve-disk-") as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False)
        if mounted.returncode:
            print(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
            sys.exit(77)
        try:
            yield Disk(Path(folder))
        finally:
            subprocess.run(["umount", "-l", folder], check=False)


# --- scenarios --------------------------------------------------------------------------------------------------


def _stalled(run: Run) -> None:
    """Waits until somebody says why it waits, and nothing moves any more."""
    words = ("no space left", "is there, but it stores nothing")
    run.wait_for(f"that somebody says one of {words}", lambda: any(word in run.log() for word in words))
    before = -1
    while before != (before := len(run.sunk())):
        time.sleep(0.5)


def disk_full(run: Run, disk: Disk) -> None:
    """Fills the disk in the middle, frees it after a while."""
    run.wait_for("a quarter", lambda: len(run.sunk()) > NUMBERS // 4)
    disk.fill()
    _stalled(run)
    disk.free()


def disk_full_twice(run: Run, disk: Disk) -> None:
    """The same again, later."""
    disk_full(run, disk)
    run.wait_for("a half", lambda: len(run.sunk()) > NUMBERS // 2)
    disk.fill()
    time.sleep(1)
    disk.free()


def killed_while_full(run: Run, disk: Disk) -> None:
    """Everything is killed while the disk is full, and started again when it is free."""
    run.wait_for("a quarter", lambda: len(run.sunk()) > NUMBERS // 4)
    disk.fill()
    _stalled(run)
    run.signal(signal.SIGKILL)
    for process in run.processes.values():
        process.wait()
    disk.free()
    run.start()


def store_full(run: Run, disk: Disk) -> None:
    """The store's own limit: the task stands still, so that its input fills the store, and goes on."""
    run.wait_for("a quarter", lambda: len(run.sunk()) > NUMBERS // 4)
    run.signal(signal.SIGSTOP, "task")
    run.wait_for("a full store", lambda: "the store is full" in run.log())
    run.signal(signal.SIGCONT, "task")


SCENARIOS: dict[str, tuple[Callable[[Run, Disk], None], str, int]] = {
    "disk full": (disk_full, "", 0),
    "disk full, durability=disk": (disk_full, "?durability=disk", 0),
    "disk full twice": (disk_full_twice, "", 0),
    "killed while the disk is full": (killed_while_full, "", 1),
    "store full": (store_full, "?size_mb=2&retention_mb=1", 0),
}
ON_A_BROKER = ("disk full", "disk full twice", "killed while the disk is full")


def judge(numbers: list[int], repeats_allowed: int) -> str:
    """What is wrong with what reached the sink, or nothing."""
    counts = Counter(numbers)
    lost = [n for n in range(NUMBERS) if not counts[n]]
    extra = sum(counts.values()) - len(counts)
    wrong = [f"{len(lost)} lost, such as {lost[:3]}"] if lost else []
    wrong += [f"{extra} doubled"] if extra > repeats_allowed else []
    wrong += ["numbers that were never sent"] if set(counts) - set(range(NUMBERS)) else []
    return ", ".join(wrong)


def scenario(name: str, engine: str) -> tuple[str, float]:
    """Runs one; what is wrong, and how long it took."""
    act, parameters, repeats_allowed = SCENARIOS[name]
    started = time.monotonic()
    with small_disk(MEGABYTES[engine]) as disk, tempfile.TemporaryDirectory(prefix="edgeserve-notes-") as elsewhere:
        notes = Path(elsewhere)
        try:
            if engine == "local":
                run = Run(f"local://{disk.folder}/store{parameters}", disk.folder / "state", notes)
            else:
                disk.broker = Broker(engine, disk.folder / "data", notes / "broker", PULSAR_STORAGE if engine == "pulsar" else {})
                run = Run(disk.broker.url, notes / "state", notes)
        except RuntimeError as exc:
            return str(exc), time.monotonic() - started
        try:
            run.start()
            act(run, disk)
            wrong = judge(run.finish(), repeats_allowed)
        except RuntimeError as exc:
            wrong = str(exc)
        finally:
            run.end()
            if disk.broker is not None:
                disk.broker.stop()
    return wrong, time.monotonic() - started


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("nats", "pulsar"), help="the small disk is that of a broker, started and stopped here")
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    for hidden in ("--role", "--node", "--notes"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role(options.role, options.node, Path(options.notes))
        return 0
    if os.geteuid() != 0 or shutil.which("mount") is None:
        print("needs root, to mount a small filesystem")
        return 77
    outcomes = []
    print(f"{'scenario':34}{'seconds':>8}  outcome")
    for name in options.only or (ON_A_BROKER if options.broker else SCENARIOS):
        wrong, seconds = scenario(name, options.broker or "local")
        outcomes.append({"scenario": name, "seconds": round(seconds, 2), "wrong": wrong})
        print(f"{name:34}{seconds:8.1f}  {'FAILED: ' + wrong if wrong else f'all {NUMBERS} arrived'}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))
    return 1 if any(o["wrong"] for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
