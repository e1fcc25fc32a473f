"""Kill -9 at random moments, judged from files that plain functions wrote: nothing lost, nothing mixed, nothing doubled.

    python bench/kills.py                                  every scenario, 5 kills each; exit 1 when one fails
    python bench/kills.py --only exact --kills 20 --seed 7

A kill counts only if the victim held unsettled work: it is stopped first, what it had begun is compared with what is durable, and only if
something is missing there it is killed; else it goes on and is met again later. The sink's file has a line for each call of the user's
function. `latest` is compared with an oracle that reads the input topic in stored order and knows nothing of the stage.
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
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from edgeserve import context
from edgeserve.compute import Compute
from edgeserve.core.codec import decode_frame
from edgeserve.core.payload import decoder_for
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.transport import connect, disconnect
from notes import lines, note

SCENARIOS = [(kind, victim) for kind in ("single", "exact") for victim in ("task", "source", "sink", "all")]
SCENARIOS += [("latest", "task"), ("latest", "all")]
SPREAD = 40  # latest: a partner may be this many numbers away


def stream(name: str, messages: int, rate: float, seed: int, together: Barrier | None) -> Iterator[dict[str, Any]]:
    """Numbered items, at about `rate`; the same after each restart. The first time, all sources begin together."""
    pace = random.Random(f"{name}{seed}")
    if together is not None:
        together.wait()
    for number in range(messages):
        time.sleep(pace.expovariate(rate))
        yield {"source": name, "n": number}


def source(node: str, tag: str, root: Path, name: str, messages: int, rate: float, seed: int, together: Barrier | None) -> None:
    """A source that starts over from the beginning whenever it is started."""

    def stamp(item: dict[str, Any]) -> int:
        return int(item["n"])

    topic, items = "in" + tag, stream(name, messages, rate, seed, together)
    with DataSource(items, node, source_id=name, topic=topic, event_time=stamp, message_id=stamp) as ds:
        for item in ds:
            note(root / f"begun-{name}", item["n"])


def task(node: str, tag: str, root: Path, kind: str) -> None:
    """The task: notes what it begins."""

    def single(a: dict[str, Any]) -> list[int]:
        note(root / "begun-task", a["n"])
        time.sleep(0.0005)
        return [a["n"], a["n"]]

    def both(a: dict[str, Any], b: dict[str, Any]) -> list[int]:
        note(root / "begun-task", [a["n"], b["n"]])
        time.sleep(0.0005)
        return [a["n"], b["n"]]

    options: dict[str, Any] = {"exact": {"join": "exact"}, "latest": {"join": "latest", "max_time_diff_ms": SPREAD / 1e6}}.get(kind, {})
    with Compute(single if kind == "single" else both, node, topic_in="in" + tag, topic_out="out" + tag, **options) as compute:
        compute.run(until="end")


def sink(node: str, tag: str, root: Path, kind: str) -> None:
    """The sink: notes every call, and whether it was told that this may be a repeat."""

    def final(pair: list[int]) -> None:
        note(root / "sink", [*pair, bool(context().redelivered)])
        time.sleep(0.0005)
        note(root / "sink-done", pair)

    with Materialize(final, node, topic="out" + tag) as materialize:
        materialize.run(until="end")


def stored(node: str, topic: str) -> Iterator[tuple[bytes, Any]]:
    """(id, payload) of the data messages of a topic, in stored order."""
    transport, decode = connect(node), decoder_for()
    try:
        for frame, _, _ in transport.read(topic):
            header, payload = decode_frame(frame)
            if header.kind == 0:
                yield header.id, decode(header.schema, payload)
    finally:
        disconnect(transport)


def durable_outputs(node: str, tag: str) -> list[list[int]]:
    """The results in the output topic, in stored order."""
    return [list(pair) for _, pair in stored(node, "out" + tag)]


def stored_inputs(node: str, tag: str) -> list[tuple[str, int]]:
    """(source, number) of the inputs in the input topic, in stored order."""
    return [(item["source"], item["n"]) for _, item in stored(node, "in" + tag)]


def holds_work(victim: str, node: str, tag: str, root: Path, messages: int) -> bool:
    """Whether the stopped victim began something whose outcome is not durable, told from files and the topic alone."""
    if victim == "sink":
        return len(lines(root / "sink")) > len(lines(root / "sink-done"))
    if victim.startswith("source"):
        sent = [n for header_source, n in stored_inputs(node, tag) if header_source == victim.removeprefix("source-")]
        return bool(sent) and max(sent) < messages - 1  # in the middle of its stream, which it will send again from the beginning
    begun = {tuple(v) if isinstance(v, list) else (v, v) for v in lines(root / "begun-task")}
    return bool(begun - {tuple(v) for v in durable_outputs(node, tag)})


def in_time(seconds: float, victims: list[str], node: str, tag: str, root: Path, messages: int) -> bool:
    """Asks `holds_work` in a process of its own: a stopped victim may hold a lock that the answer needs; then it is "not proven"."""
    cx = mp.get_context("fork")
    asker = cx.Process(target=lambda: os._exit(0 if any(holds_work(v, node, tag, root, messages) for v in victims) else 1))
    asker.start()
    asker.join(seconds)
    asker.kill()
    asker.join()
    return asker.exitcode == 0


class Run:
    """One scenario on a fresh store."""

    def __init__(self, kind: str, victim: str, messages: int, kills: int, seed: int, node: str | None) -> None:
        self.kind, self.victim, self.messages, self.kills, self.seed = kind, victim, messages, kills, seed
        self.root = Path(tempfile.mkdtemp(prefix="edgeserve-kills-"))
        os.environ["EDGESERVE_STATE_DIR"] = str(self.root / "state")
        self.node = node or f"local://{self.root}/store"
        self.tag = f"-{self.root.name}" if node else ""
        self.random = random.Random(seed)
        cx = mp.get_context("spawn")
        names = ["a"] if kind == "single" else ["a", "b"]
        rate = messages / (6.0 if kind == "latest" else 4.0)  # of `latest` a set is sooner over, so that fewer stops meet one
        self.together = cx.Barrier(len(names))  # kept here: what its semaphores are called is forgotten with it
        self.started: set[tuple[Any, ...]] = set()
        self.make: dict[str, Callable[[], Any]] = {
            "sink": lambda: cx.Process(target=sink, args=(self.node, self.tag, self.root, kind)),
            "task": lambda: cx.Process(target=task, args=(self.node, self.tag, self.root, kind)),
        }
        for name in names:
            details = (self.node, self.tag, self.root, name, messages, rate, seed)
            self.make[f"source-{name}"] = lambda details=details: cx.Process(target=source, args=(*details, self.first_time(details)))
        self.roles = {name: make() for name, make in self.make.items()}

    def first_time(self, details: tuple[Any, ...]) -> Barrier | None:
        """What the sources meet at, the first time each is made."""
        if details in self.started:
            return None
        self.started.add(details)
        return self.together

    def start_again(self, names: list[str]) -> bool:
        """Stops, looks, kills and restarts; False when there was nothing in hand."""
        alive = [n for n in names if self.roles[n].is_alive()]
        for name in alive:
            os.kill(self.roles[name].pid, signal.SIGSTOP)
        kind = "task" if self.victim == "all" else self.victim
        asked = [n for n in alive if n.startswith(kind)]
        proven = in_time(2.0, asked, self.node, self.tag, self.root, self.messages)
        for name in alive:
            os.kill(self.roles[name].pid, signal.SIGKILL if proven else signal.SIGCONT)
        if proven:
            for name in alive:
                self.roles[name].join()
                self.roles[name] = self.make[name]()
                self.roles[name].start()
        return proven

    def victims(self) -> list[str]:
        """Which processes the next kill is meant for."""
        if self.victim == "all":
            return list(self.roles)
        if self.victim == "source":
            return [self.random.choice([n for n in self.roles if n.startswith("source")])]
        return [self.victim]

    def execute(self) -> list[str]:
        """Runs to the end; returns what is wrong."""
        for role in self.roles.values():
            role.start()
        done, give_up = 0, time.monotonic() + 120
        pause = 0.4 + self.random.random() * 0.5
        while time.monotonic() < give_up and any(r.is_alive() for r in self.roles.values()):
            for role in self.roles.values():
                role.join(pause / len(self.roles))
            pause = self.random.random() * 0.4
            begun = (self.root / "begun-task").exists() and (self.root / "sink").exists()
            if done < self.kills and begun and all(self.roles[n].is_alive() for n in self.victims()):
                killed = self.start_again(self.victims())
                done += killed
                pause = 0.4 + self.random.random() * 0.5 if killed else 0.003
        wrong = [f"{n} did not end" for n, r in self.roles.items() if r.is_alive()]
        wrong += [f"{n} ended with {r.exitcode}" for n, r in self.roles.items() if not r.is_alive() and r.exitcode]
        for role in self.roles.values():
            role.kill()
        if done < self.kills:
            wrong.append(f"only {done} of {self.kills} kills met unsettled work")
        return wrong + self.judge(done)

    def judge(self, kills: int) -> list[str]:
        """Compares the sink's file with what had to come."""
        calls = lines(self.root / "sink")
        pairs = [(a, b) for a, b, _ in calls]
        expected = oracle(self.node, self.tag) if self.kind == "latest" else [(n, n) for n in range(self.messages)]
        want, have = Counter(expected), Counter(pairs)
        lost, wrong = want - have, [p for p in have if p not in want]
        doubled = sum((have - want).values()) - sum(have[p] for p in wrong)
        seen: set[tuple[int, int]] = set()
        unflagged = 0
        for a, b, flagged in calls:
            unflagged += (a, b) in seen and not flagged
            seen.add((a, b))
        allowed = kills if self.victim in ("sink", "all") else 0
        self.summary = f"{len(calls)} calls, {sum(lost.values())} lost, {len(wrong)} wrong, "
        self.summary += f"{doubled} doubled ({unflagged} of them unflagged, {allowed} flagged allowed)"
        found = []
        if lost:
            found.append(f"lost {sum(lost.values())}: {sorted(lost)[:5]}")
        if wrong:
            found.append(f"wrong {len(wrong)}: {sorted(wrong)[:5]}")
        if doubled > allowed or unflagged:
            found.append(f"doubled {doubled}, {unflagged} unflagged, allowed {allowed} flagged")
        return found


def oracle(node: str, tag: str) -> list[tuple[int, int]]:
    """`latest`, from the input topic alone: after each message in stored order, the newest of both if close enough. Each id once."""
    newest: dict[str, int] = {}
    sets, ids = [], set()
    for id_, item in stored(node, "in" + tag):
        if id_ in ids or item["n"] < newest.get(item["source"], -1):
            continue
        ids.add(id_)
        newest[item["source"]] = item["n"]
        if len(newest) == 2 and abs(newest["a"] - newest["b"]) <= SPREAD:
            sets.append((newest["a"], newest["b"]))
    return sets


def main() -> None:
    """Runs the scenarios and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="scenarios whose name contains this, as in 'exact task'")
    parser.add_argument("--node", help="URL of a broker; default: a fresh store of local:// for each scenario")
    parser.add_argument("--messages", type=int, default=1500)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="0: a new one each time")
    parser.add_argument("--keep", action="store_true", help="keep the files of failed runs")
    arguments = parser.parse_args()
    failed = 0
    for number in range(arguments.runs):
        for kind, victim in SCENARIOS:
            if arguments.only not in f"{kind} {victim}":
                continue
            seed = (arguments.seed or random.randrange(1, 2**31)) + number
            run = Run(kind, victim, arguments.messages, arguments.kills, seed, arguments.node)
            wrong = run.execute()
            failed += bool(wrong)
            sys.stdout.write(f"{'FAIL' if wrong else 'ok':4} {kind:7} kill {victim:7} seed {seed:<10} {run.summary} {'; '.join(wrong)}\n")
            sys.stdout.flush()
            if wrong and arguments.keep:
                sys.stdout.write(f"     files in {run.root}\n")
            else:
                shutil.rmtree(run.root, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
