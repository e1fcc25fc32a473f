"""One join, many replicas: how much faster they are, how they share the work, and what faults do to it.

    python bench/replicas.py                           local://: 1, 2, 4, 8 replicas, then 30 faults; exit 1 when a line does not hold
    python bench/replicas.py --node nats://localhost   on a broker
    python bench/replicas.py --only scale|faults|keys --runs 5

Judged from files that plain functions wrote: a line for each call of the task and of the sink. A fault hits whoever holds the join, stopped
first and seen to have begun sets whose results are not stored: every second one is a kill -9, the others leave it stopped for longer than
its silence is borne and let it go on. A newcomer takes a killed one's place, with a name that sorts first or last in turn.

keys: a join of 1,000 keys in several partitions, four replicas beside one; then one that holds some of them is killed. Its keys are those
that it has run until then.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgeserve.compute import Compute
from edgeserve.core.codec import decode_frame
from edgeserve.core.payload import decoder_for
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.transport import Transport, connect
from notes import last, lines, note

TASK_S = 0.005
KEYED_TASK_S = 0.001
KEYS = 1_000
LOAD = 0.8
STILL_S = 0.5
STOPPED_S = 8.0
EVERY_S = 5.0
JUST_S = 5.0


def stream(name: str, count: int, rate: float | None, together: Any) -> Iterator[dict[str, Any]]:
    """Numbered items at a steady rate, or as fast as they are taken."""
    together.wait()
    start = time.monotonic()
    for n in range(count):
        if rate is not None and (early := start + n / rate - time.monotonic()) > 0:
            time.sleep(early)
        yield {"source": name, "n": n, "sent": time.monotonic()}


def source(node: str, tag: str, name: str, count: int, rate: float | None, together: Any) -> None:
    """One of two sources."""

    def stamp(item: dict[str, Any]) -> int:
        return int(item["n"])

    def key(item: dict[str, Any]) -> int:
        return int(item["n"]) % KEYS

    items = stream(name, count, rate, together)
    with DataSource(items, node, source_id=name, topic="in" + tag, event_time=stamp, message_id=stamp, key=key) as ds:
        ds.run()


def replica(node: str, tag: str, root: Path, name: str, together: Any, keyed: int, told: bool) -> None:
    """The task: sleeps, and notes when it began which set. `told`: notes, too, when it gets or loses the join."""

    ran = root / f"ran-{os.getpid()}"

    def pair(a: dict[str, Any], b: dict[str, Any]) -> list[int]:
        note(ran, [a["n"], b["n"], time.monotonic(), max(a["sent"], b["sent"])])
        time.sleep(KEYED_TASK_S if keyed else TASK_S)
        return [a["n"], b["n"]]

    options: dict[str, Any] = {"join": "exact", "max_held": 100_000} | ({"by": True, "partitions": keyed} if keyed else {})
    with Compute(pair, node, worker_id=name, group="g", output_id="pair", topic_in="in" + tag, topic_out="out" + tag, **options) as compute:
        if told:
            threading.Thread(target=tell, args=(compute, root), daemon=True).start()
        if together is not None:
            together.wait()
        compute.run(until="end")


def tell(compute: Compute, root: Path) -> None:
    """Notes whenever this one gets or loses the join."""
    held = False
    while True:
        holds = bool(compute.explain()["holds_the_join"])
        if holds != held:
            held = holds
            note(root / "holders", [os.getpid(), holds])
        time.sleep(0.02)


def sink(node: str, tag: str, root: Path) -> None:
    """Notes every result."""

    had = root / "sink"

    def final(pair: list[int]) -> None:
        note(had, pair)

    with Materialize(final, node, topic="out" + tag) as materialize:
        materialize.run(until="end")


class Run:
    """Sources, replicas and a sink on fresh topics."""

    def __init__(self, node: str | None, replicas: int, count: int, rate: float | None, *, keyed: int = 0, told: bool = False) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="edgeserve-replicas-"))
        os.environ["EDGESERVE_STATE_DIR"] = str(self.root / "state")
        self.node = node or f"local://{self.root}/store"
        self.tag = f"-{self.root.name}"
        self.count, self.keyed, self.told, self.cx = count, keyed, told, mp.get_context("spawn")
        # All begin when all are there.
        self.together = self.cx.Barrier(replicas + 2)
        self.replicas = [self._replica(f"w{n}", self.together) for n in range(replicas)]
        self.others = [self.cx.Process(target=sink, args=(self.node, self.tag, self.root))]
        self.others += [self.cx.Process(target=source, args=(self.node, self.tag, name, count, rate, self.together)) for name in "ab"]
        for process in self.replicas + self.others:
            process.start()

    def _replica(self, name: str, together: Any) -> Any:
        return self.cx.Process(target=replica, args=(self.node, self.tag, self.root, name, together, self.keyed, self.told))

    def newcomer(self, name: str) -> None:
        """Starts another replica."""
        process = self._replica(name, None)
        process.start()
        self.replicas.append(process)

    @property
    def holder(self) -> int:
        """The process that has the join, as far as the notes say."""
        pid = 0
        for told, holds in lines(self.root / "holders"):
            pid = told if holds else (0 if told == pid else pid)
        return pid

    def calls(self) -> list[list[Any]]:
        """Of the task, of all replicas: [a, b, when, when the later of them was sent]."""
        return [call for path in self.root.glob("ran-*") for call in lines(path)]

    def behind(self) -> float:
        """How old the newest item was, that a set of now is of."""
        return time.monotonic() - max((sent for path in self.root.glob("ran-*") for _, _, _, sent in last(path)), default=0.0)

    def shares(self) -> list[int]:
        """How many sets each replica has run."""
        return [len(lines(path)) for path in self.root.glob("ran-*")]

    def wait(self, seconds: float) -> list[str]:
        """Until all have ended; returns what is wrong."""
        until = time.monotonic() + seconds
        for process in self.replicas + self.others:
            process.join(max(0.1, until - time.monotonic()))
        wrong = []
        for process in self.replicas + self.others:
            if process.is_alive():
                wrong.append(f"{process.pid} did not end")
                process.kill()
            elif process.exitcode not in (0, -signal.SIGKILL):
                wrong.append(f"{process.pid} ended with {process.exitcode}")
        have = Counter((a, b) for a, b in lines(self.root / "sink"))
        want = Counter((n, n) for n in range(self.count))
        for what, found in (("lost", want - have), ("wrong or doubled", have - want)):
            if found:
                wrong.append(f"{what} {sum(found.values())}: {sorted(found)[:4]}")
        return wrong

    def close(self) -> None:
        """Removes its files."""
        shutil.rmtree(self.root, ignore_errors=True)


def scale(node: str | None, most: int) -> tuple[list[str], float]:
    """Throughput of saturated replicas, and their shares at 80 % of it. Returns what is wrong, and how many times one's eight have."""
    wrong: list[str] = []
    alone = times = 0.0
    say("replicas   sets/s   times one   least and most of the fair share at 80 %")
    for replicas in [n for n in (1, 2, 4, 8) if n <= most]:
        run = Run(node, replicas, 2_500 * replicas, None)
        wrong += [f"{replicas} saturated: {w}" for w in run.wait(200)]
        when = sorted(call[2] for call in run.calls())
        rate = (len(when) - 1) / (when[-1] - when[0])
        run.close()
        alone = alone or rate
        shares = [1.0]
        if replicas > 1:
            run = Run(node, replicas, 20_000, LOAD * replicas / TASK_S)
            wrong += [f"{replicas} at {LOAD:.0%}: {w}" for w in run.wait(200)]
            shares = [n / (20_000 / replicas) for n in run.shares()]
            run.close()
        times = rate / alone
        say(f"{replicas:8} {rate:8.0f} {times:11.2f}   {min(shares):.2f} {max(shares):.2f}")
        if min(shares) < 0.5 or max(shares) > 2:
            wrong.append(f"{replicas} replicas: shares {min(shares):.2f} to {max(shares):.2f}")
    return wrong, times


def holds_work(run: Run, transport: Transport, pid: int) -> bool:
    """Whether a stopped replica has just begun sets whose results are not stored."""
    decode, stored = decoder_for(), set()
    for frame, _, _ in transport.read("out" + run.tag, time.time_ns() - int(3 * JUST_S * 1e9)):
        header, payload = decode_frame(frame)
        if header.kind == 0:
            stored.add(tuple(decode(header.schema, payload)))
    return any((a, b) not in stored for a, b, when, _ in lines(run.root / f"ran-{pid}") if when > time.monotonic() - JUST_S)


class Asker:
    """Asks `holds_work` in a process of its own, which is connected before: to connect may take a lock that the stopped one holds."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._start()

    def _start(self) -> None:
        self._here, there = mp.get_context("fork").Pipe()
        self._process = mp.get_context("fork").Process(target=self._answer, args=(there,), daemon=True)
        self._process.start()
        self._here.recv()

    def _answer(self, there: Any) -> None:
        transport = connect(self._run.node)
        there.send(None)
        while True:
            there.send(holds_work(self._run, transport, there.recv()))

    def in_time(self, pid: int) -> bool:
        """Whether the answer comes, and is yes."""
        self._here.send(pid)
        if self._here.poll(3.0):
            return bool(self._here.recv())
        self.close()
        os.kill(pid, signal.SIGCONT)
        self._start()
        return False

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.join()


def faults(node: str | None, count: int, within_s: float) -> list[str]:
    """Kills and stops whoever holds the join. Each fault waits until the replicas have worked off what the one before has left."""
    rate = 150.0
    run = Run(node, 3, int(rate * (EVERY_S + STOPPED_S / 2 + 3) * count), rate, told=True)
    asker, wrong = Asker(run), list[str]()
    hits: tuple[list[float], list[float]] = ([], [])
    rng, done, until = random.Random(), 0, time.monotonic() + 40 * count
    while done < count and time.monotonic() < until and any(p.is_alive() for p in run.others[1:]):
        time.sleep(EVERY_S * (0.8 + 0.4 * rng.random()))
        at = None
        while at is None and any(p.is_alive() for p in run.others[1:]):
            time.sleep(0.01)
            if run.behind() < STILL_S:
                at = hit(run, asker, kill=done % 2 == 0)
        if at is None:
            break
        hits[done % 2].append(at)
        if done % 2 == 0:
            run.newcomer(f"{'0' if done % 4 == 0 else 'z'}{done}")
        done += 1
    asker.close()
    wrong += run.wait(120)
    calls = sorted(run.calls(), key=lambda call: call[2])
    resumed, stopped = ([next((when - at for _, _, when, sent in calls if sent > at), float("inf")) for at in some] for some in hits)
    if done < count:
        wrong.append(f"only {done} of {count} faults met unsettled work")
    slow = [f"{s:.2f} s" for s in resumed if s > within_s]
    if slow:
        wrong.append(f"work resumed only after {', '.join(slow)}, not within {within_s:g} s")
    say(f"{done} faults, {len(resumed)} of them kills; resumed after {statistics.median(resumed):.2f} s (at most {max(resumed):.2f} s); ")
    if stopped:
        say(
            f"after {len(stopped)} stops of {STOPPED_S:g} s resumed after {statistics.median(stopped):.2f} s (at most {max(stopped):.2f} s)"
        )
    say(f"{len(lines(run.root / 'sink'))} results of {run.count}; shares {sorted(run.shares())}")
    if not wrong:
        run.close()
    return wrong


def hit(run: Run, asker: Asker, kill: bool) -> float | None:
    """Stops the holder and, if it has unsettled work, kills it or leaves it stopped for long. Returns when; None: there was nothing."""
    pid = run.holder
    if not any(process.pid == pid and process.is_alive() for process in run.replicas):
        return None
    os.kill(pid, signal.SIGSTOP)
    if not asker.in_time(pid):
        os.kill(pid, signal.SIGCONT)
        return None
    at = time.monotonic()
    if kill:
        os.kill(pid, signal.SIGKILL)
    else:
        time.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)
    return at


def keys(node: str | None, partitions: int) -> tuple[list[str], float]:
    """Throughput of a join by key on one and on four replicas, and what stops when the holder is killed. Returns as `scale`, of four."""
    wrong, rates = list[str](), list[float]()
    for replicas in (1, 4):
        run = Run(node, replicas, 5_000 * replicas, None, keyed=partitions)
        wrong += [f"by key, {replicas} saturated: {w}" for w in run.wait(200)]
        when = sorted(call[2] for call in run.calls())
        rates.append((len(when) - 1) / (when[-1] - when[0]))
        run.close()
    say(f"{KEYS:,} keys: {rates[0]:.0f} sets/s on one replica, {rates[1]:.0f} on four: {rates[1] / rates[0]:.2f} times")
    each = 1.0  # of a key, per second
    run = Run(node, 4, int(20 * each * KEYS), each * KEYS, keyed=partitions, told=True)
    while len(run.calls()) < 5 * each * KEYS:
        time.sleep(0.1)
    asker = Asker(run)
    while (at := hit(run, asker, kill=True)) is None:
        time.sleep(0.01)
    asker.close()
    victim = run.holder
    wrong += [f"by key, one killed: {w}" for w in run.wait(120)]
    runs: dict[int, list[float]] = {}
    for n, _, when_, _ in sorted(run.calls(), key=lambda call: float(call[2])):
        runs.setdefault(n % KEYS, []).append(when_)
    its = {n % KEYS for n, *_ in lines(run.root / f"ran-{victim}")}
    gaps = {key: max(b - a for a, b in pairwise(times) if b > at) for key, times in runs.items()}
    others = [gap for key, gap in gaps.items() if key not in its]
    its_gap, others_gap, others_before = (
        max(gaps[key] for key in its),
        max(others),
        max(b - a for key, times in runs.items() if key not in its for a, b in pairwise(times) if b <= at and a > at - 5),
    )
    say(f"one of four killed: its {len(its)} keys stood still for at most {its_gap:.2f} s")
    say(f"the other {len(others)}: no longer than {others_gap:.2f} s between two runs, in the 5 s before {others_before:.2f} s")
    if its_gap > 5 or others_gap > 1 / each + STILL_S:
        wrong.append(f"by key: a kill stopped its keys for {its_gap:.2f} s, and others for {others_gap:.2f} s")
    if not wrong:
        run.close()
    return wrong, rates[1] / rates[0]


def repeated(part: Callable[[], tuple[list[str], float]], runs: int, least: float, what: str) -> list[str]:
    """Runs a part several times; its throughput is judged by the median, all else in each run."""
    wrong, found = list[str](), list[float]()
    for _ in range(runs):
        some, times = part()
        wrong += some
        found.append(times)
    median = statistics.median(found)
    if runs > 1:
        say(f"{what}: {median:.2f} times one ({min(found):.2f}-{max(found):.2f}), {runs} runs")
    return wrong if median >= least else [*wrong, f"{what}: {median:.2f} times one, not {least:g}"]


def say(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", help="URL of a broker; default: fresh stores of local://")
    parser.add_argument("--only", choices=["scale", "faults", "keys"])
    parser.add_argument("--most", type=int, default=8, help="replicas, at most")
    parser.add_argument("--partitions", type=int, default=8, help="of the join by key")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--runs", type=int, default=1, help="of scale and keys: the median throughput counts")
    given = parser.parse_args()
    wrong: list[str] = []
    if given.only in (None, "scale"):
        wrong += repeated(lambda: scale(given.node, given.most), given.runs, 6 if given.most >= 8 else 0, "eight replicas")
    if given.only in (None, "keys"):
        wrong += repeated(lambda: keys(given.node, given.partitions), given.runs, 3, "by key, four replicas")
    if given.only in (None, "faults"):
        wrong += faults(given.node, given.faults, 2.0 if given.node is None else 5.0)
    for what in wrong:
        say(f"FAIL {what}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
