"""kill -9 of writers, readers and servers of payloads in shared memory: none lost, corrupt, or written over while it is looked at.

    python bench/payload_kills.py                    100 kills on one local:// store; a table; exit 1 when something is wrong
    python bench/payload_kills.py --kills 1000 --seed 7     after a SIGTERM what has been done is judged
    python bench/payload_kills.py --node nats://localhost   two hosts, and servers of each host's payloads that are killed, too
    python bench/payload_kills.py --node nats://localhost --durability broker    a whole host is lost now and then, payloads and all

Sources a and b -> exact join, sources c and d -> two replicas; their results -> two sinks; an audit, a group of its own, takes what c and d
send, too. All send with routing='lazy'. Each word of a payload follows from its source, its number and the word's place, so every page of
every payload is another; who takes one compares all of it at once, holds the view until some more have come, and compares it again.

A process that is chosen at random is killed at a random moment and started again. What the victims' functions take, are done with and let
go of they note; a kill counts if the victim's notes say afterwards that it had something in hand, held a view of shared memory (as its map
in /proc says), or had sent or computed what no sink has seen. A server has no function: it is stopped first, and killed if a lease stands
in its table, or the kernel has bytes of a fetch for it or from it.

In the end all is settled and everything is ended, started again, sends some more, lets go of all views, and is idle: each file must be
locked by a process that lives, and nobody may have a file mapped that is gone. Then all is ended, and there may be no file left. Hosts are
payload directories: what is in another one has to be fetched.

With `--durability broker` there are no servers, and now and then all processes of a host are killed at once and its payload directory is
deleted before they are started again.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing as mp
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brokers import free_port
from edgeserve import context
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import Follower, lines, note

SIZES = tuple(n // 8 for n in (65_536, 70_000, 150_000, 300_000, 1_000_000, 2_500_000))
RAMP = np.arange(max(SIZES), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
TOPICS = {"a": "pairs", "b": "pairs", "c": "blocks", "d": "blocks"}
BECOMES = {"a": "A", "b": "A", "c": "C", "d": "D"}  # which result is of a source's payload
AHEAD, HELD, MORE = 40, 24, 20
LOST = 0.1  # so likely a whole host is lost in place of a process
PAUSE_S, WORK_S, LOOKS, LOOK_S, STUCK_S = 0.5, 0.002, 50, 0.004, 90.0
YOUNG = 0.1  # so likely one is killed before it has begun anything
IDLE_S = 70.0  # what a killed writer has half made may be half made by a living one for a minute
HAD = ("in hand", "view", "unsettled", "segments")
STAY = ("origin", "token", "users")

# --- payloads -------------------------------------------------------------------------------------------------------


def block(source: str, number: int) -> np.ndarray[Any, Any]:
    """The payload of a source with this number: number, source, and words of which no two are the same."""
    seed = hashlib.blake2b(f"{source}{number}".encode(), digest_size=8).digest()
    words = RAMP[: SIZES[seed[0] % len(SIZES)]] + np.frombuffer(seed, np.uint64)
    words[:2] = number, ord(source)
    return words


def name_of(words: np.ndarray[Any, Any]) -> tuple[str, int]:
    """(source, number), as a payload has them."""
    return chr(int(words[1]) % 128), int(words[0])


def is_right(words: np.ndarray[Any, Any], source: str, number: int) -> bool:
    """Whether all of it is as it was made."""
    return bool(np.array_equal(words, block(source, number)))


def mapped(pid: int | str, below: str) -> dict[str, list[range]]:
    """The addresses of files below a directory that a process has mapped. A name of one that is gone ends with ' (deleted)'."""
    found: dict[str, list[range]] = {}
    for row in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _, path = row.partition("/")
        if f"/{path}".startswith(below):
            begin, end = addresses.split()[0].split("-")
            found.setdefault(f"/{path}", []).append(range(int(begin, 16), int(end, 16)))
    return found


# --- the processes --------------------------------------------------------------------------------------------------


class Holder:
    """Looks at payloads when they come and once more when they go, and notes all of it."""

    def __init__(self, directory: Path, me: str, sources: str) -> None:
        self._directory, self._notes, self._sources = directory, directory / me, sources
        self._held: deque[tuple[str, int, np.ndarray[Any, Any]]] = deque()

    def take(self, words: np.ndarray[Any, Any]) -> tuple[str, int]:
        """It comes."""
        source, number = name_of(words)
        at, files = words.__array_interface__["data"][0], mapped("self", os.environ["EDGESERVE_PAYLOAD_DIR"])
        note(self._notes, ["take", source, number, any(at in found for ranges in files.values() for found in ranges)])
        if source not in self._sources or not is_right(words, source, number):
            self._is_wrong("when it came", source, number)
        self._held.append((source, number, words))
        time.sleep(WORK_S)
        return source, number

    def done(self, source: str, number: int) -> None:
        """The function is over with it; lets go of what has been held for long enough."""
        note(self._notes, ["done", source, number])
        while len(self._held) > (0 if (self._directory / "let-go").exists() else HELD):
            self._let_go()

    def _let_go(self) -> None:
        source, number, words = self._held.popleft()
        if not is_right(words, source, number):
            self._is_wrong("after it was held", source, number)
        note(self._notes, ["drop", source, number])

    def _is_wrong(self, *what: str | int) -> None:
        note(self._directory / "wrong", [self._notes.name, *what])

    def close(self) -> None:
        """Lets go of all."""
        while self._held:
            self._let_go()


class Pair(Holder):
    """The join: one payload of two with the same number."""

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        taken = [self.take(a), self.take(b)]
        if [source for source, _ in taken] != ["a", "b"] or taken[0][1] != taken[1][1]:
            self._is_wrong("in one set", str(taken), 0)
        for source, number in taken:
            self.done(source, number)
        return block(BECOMES["a"], taken[0][1])


class Single(Holder):
    """One payload of each."""

    def __call__(self, item: np.ndarray) -> np.ndarray:
        source, number = self.take(item)
        self.done(source, number)
        return block(BECOMES[source], number)


class Final(Holder):
    """The last to see a payload: notes it for the judge."""

    def __call__(self, words: np.ndarray) -> None:
        source, number = self.take(words)
        note(self._directory / f"seen-{source}", [number, bool(context().redelivered)])
        self.done(source, number)


def stream(directory: Path, me: str, source: str) -> Iterator[np.ndarray[Any, Any]]:
    """Payloads from the first that no sink has seen, and no further than `AHEAD` before what they have, until told to stop."""
    sink, stop = Follower(directory / f"seen-{BECOMES[source]}"), directory / "stop"
    seen = {number for number, _ in sink.new()}
    number = next(n for n in range(len(seen) + 1) if n not in seen)
    while not stop.exists() or number < int(stop.read_text()):
        while number - len(seen) > AHEAD:
            time.sleep(0.002)
            seen.update(number for number, _ in sink.new())
        note(directory / me, ["sent", source, number])
        yield block(source, number)
        number += 1


def source(node: str, directory: Path, me: str, name: str, durability: str) -> None:
    """One source; c and d are producers of one source id."""
    options: dict[str, Any] = {"source_id": "item"}
    if TOPICS[name] == "pairs":
        options = {"source_id": name, "event_time": lambda words: name_of(words)[1]}
    options |= {
        "topic": TOPICS[name],
        "routing": "lazy",
        "durability": durability,
        "message_id": lambda words: "{}-{}".format(*name_of(words)),
    }
    while not all((directory / f"listens-{topic}").exists() for topic in ("blocks", "out")):
        time.sleep(0.01)  # what all groups there are have settled is gone for one that comes later
    with DataSource(stream(directory, me, name), node, **options) as ds:
        ds.run()


def task(node: str, directory: Path, me: str, topic: str, durability: str) -> None:
    """The join, or a replica."""
    options: dict[str, Any] = {
        "topic_in": topic,
        "topic_out": "out",
        "output_id": f"of-{topic}",
        "routing": "lazy",
        "durability": durability,
    }
    if topic == "pairs":
        options["join"] = "exact"
    with Compute(Pair(directory, me, "ab") if topic == "pairs" else Single(directory, me, "cd"), node, **options) as compute:
        compute.run()


def final(node: str, directory: Path, me: str, topic: str) -> None:
    """A sink, or the audit."""
    with Materialize(Final(directory, me, "ACD" if topic == "out" else "cd"), node, topic=topic, group=f"final-{topic}") as materialize:
        (directory / f"listens-{topic}").touch()
        materialize.run()


def server(*_: Any) -> None:
    """Serves a host's payloads, as its writers do themselves."""
    os.execv(sys.executable, [sys.executable, "-c", "from edgeserve.cli.app import main; main()", "payloads", "serve"])


def begin(role: Callable[..., None], directory: Path, me: str, host: tuple[str, int] | None, *arguments: str) -> None:
    """A process begins, on a host of its own if there are several."""
    os.dup2(os.open(directory / f"{me}.log", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    if host is not None:
        os.environ["EDGESERVE_PAYLOAD_DIR"] += f"/{host[0]}"
        os.environ["EDGESERVE_ADVERTISE"] = f"127.0.0.1:{host[1]}"
    role(arguments[0], directory, me, *arguments[1:])


class Process:
    """One that is started again and again.

    Attributes:
        kind: source, task, final or server.
        host: where it runs, if there are several.
        running: its newest process.
    """

    def __init__(self, cx: Any, node: str, directory: Path, name: str, role: Callable[..., None], host: Any, *more: str) -> None:
        self.kind, self.host, self._cx, self._name, self._times = role.__name__, host, cx, name, 0
        self._details = role, directory, host, node, *more
        self._directory = directory
        self.start()

    def start(self) -> None:
        """Once more."""
        self._times += 1
        self.me = f"{self._name}.{self._times}"
        role, directory, host, *arguments = self._details
        self.running = self._cx.Process(target=begin, args=(role, directory, self.me, host, *arguments))
        self.running.start()

    @property
    def has_begun(self) -> bool:
        """Whether it has something to note."""
        return self.kind == "server" or (self._directory / self.me).exists()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.running.pid, signal.SIGKILL)
        self.running.join()

    def had(self, seen: dict[str, set[int]]) -> set[str]:
        """What a killed one had, as it has noted itself. `seen`: by the sinks."""
        taken, done, dropped, sent, views = set(), set(), set(), set(), set()
        for what, source, number, *in_place in lines(self._directory / self.me):
            {"take": taken, "done": done, "drop": dropped, "sent": sent}[what].add((source, number))
            if in_place == [True]:
                views.add((source, number))
        worked = sent | taken if self.kind in ("source", "task") else set()
        found = {"in hand": taken - done, "view": views - dropped}
        found["unsettled"] = {(source, number) for source, number in worked if number not in seen[BECOMES[source]]}
        return {what for what, these in found.items() if these}

    def caught(self, choose: random.Random, payloads: str) -> set[str]:
        """Stops a server at random moments until it has something in hand, and kills it then; what it had."""
        pid = self.running.pid
        for _ in range(LOOKS):
            os.kill(pid, signal.SIGSTOP)
            for _ in range(LOOKS // 10):
                found = {what for what, has in (("view", has_lease(pid, payloads)), ("in hand", has_fetch(pid))) if has}
                if found:
                    self.kill()
                    return found
                time.sleep(LOOK_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(choose.uniform(0, 5 * LOOK_S))
        return set()


def has_lease(pid: int, payloads: str) -> bool:
    """Whether something stands in the table in which a process says what it looks at."""
    return any(Path(path).read_bytes().strip(b"\0") for path in mapped(pid, payloads) if "/leases/" in path and Path(path).exists())


def has_fetch(pid: int) -> bool:
    """Whether bytes are under way on a connection of this process."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[9] in inodes and row[3] == "01" and row[4] != "00000000:00000000" for row in rows)


# --- the judge ------------------------------------------------------------------------------------------------------


class Memory:
    """What lies in the payload directories."""

    def __init__(self, path: str) -> None:
        self.path, self.most_bytes = path, 0

    def files(self) -> list[Path]:
        """All that should not outlast the processes."""
        return [path for path in Path(self.path).rglob("*") if path.is_file() and path.name not in STAY]

    def measure(self) -> None:
        """Notes how much it is."""
        total = 0
        for path in self.files():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        self.most_bytes = max(self.most_bytes, total)

    def of_nobody(self, pids: set[int]) -> list[str]:
        """Files that none of these processes has locked, and mapped ones that are gone. What was fetched stays while somebody fetches."""
        locks = {tuple(row.split()[i] for i in (4, 5)) for row in Path("/proc/locks").read_text().splitlines() if "->" not in row}
        locked = {int(file.rpartition(":")[2]) for pid, file in locks if int(pid) in pids}
        files = [path for path in self.files() if path.suffix != ".fetched" and path.exists()]
        found = [str(path) for path in files if path.stat().st_ino not in locked]
        return found + [f"{pid}:{path}" for pid in pids for path in mapped(pid, self.path) if path.endswith(" (deleted)")]


class Run:
    """All processes, on one store."""

    def __init__(self, node: str | None, seed: int, durability: str) -> None:
        self._durability, self.lost = durability, 0
        self.directory = Path(tempfile.mkdtemp(prefix="edgeserve-payload-kills-"))
        self.memory = Memory(tempfile.mkdtemp(prefix="edgeserve-payload-kills-", dir="/dev/shm"))
        os.environ["EDGESERVE_PAYLOAD_DIR"], os.environ["EDGESERVE_STATE_DIR"] = self.memory.path, str(self.directory / "state")
        self.choose, self.told = random.Random(seed), False
        self.kills: Counter[str] = Counter()
        self.had: Counter[tuple[str, str]] = Counter()
        self._seen = {name: (Follower(self.directory / f"seen-{name}"), set[int]()) for name in "ACDcd"}
        self._cx = mp.get_context("forkserver")
        self._cx.set_forkserver_preload(["edgeserve.compute", "edgeserve.data_source", "edgeserve.materialize"])
        self._make(node)

    def _make(self, node: str | None) -> None:
        here = there = None
        url = f"local://{self.directory}/store"
        if node is not None:
            here, there = ("here", free_port()), ("there", free_port())
            url = node + (f"/{self.directory.name}" if node.startswith("nats") else "")  # topics of its own
        safe = self._durability
        details: dict[str, tuple[Any, ...]] = {f"source-{name}": (source, here, name, safe) for name in TOPICS}
        details |= {"join": (task, there, "pairs", safe)} | {f"replica-{n}": (task, there, "blocks", safe) for n in (1, 2)}
        details |= {"audit": (final, here, "blocks")} | {f"sink-{n}": (final, here, "out") for n in (1, 2)}
        if node is not None and safe == "origin":
            details |= {f"server-{n}": (server, host) for n, host in enumerate((here, here, there), 1)}
        self.processes = [Process(self._cx, url, self.directory, name, *each) for name, each in details.items()]

    def seen(self) -> dict[str, set[int]]:
        """What the sinks and the audit have noted."""
        for follower, numbers in self._seen.values():
            numbers.update(number for number, _ in follower.new())
        return {name: numbers for name, (_, numbers) in self._seen.items()}

    def tell(self, *_: Any) -> None:
        """Enough of it: what was done is judged. The second time it is given up."""
        if self.told:
            sys.exit("told to end")
        self.told = True

    def kill(self, wanted: int) -> None:
        """Kills until so many have counted."""
        began, shown = time.monotonic(), 0
        while (counted := sum(self.kills.values()) - self.kills["nothing"]) < wanted and not self.told:
            if counted >= shown + 50:
                shown = counted
                print(f"{counted} kills, {time.monotonic() - began:.0f} s, {len(self.seen()['A'])} sets", flush=True)
            time.sleep(self.choose.uniform(0, 2 * PAUSE_S))
            for process in self.processes:
                if not process.running.is_alive():
                    sys.exit(f"FAIL {process.me} ended by itself, status {process.running.exitcode}; see {self.directory}/{process.me}.log")
            if self._durability == "broker" and self.choose.random() < LOST:
                self._lose_a_host()
                continue
            process = self.choose.choice(self.processes)
            if not process.has_begun and self.choose.random() > YOUNG:
                continue
            self.memory.measure()
            if process.kind == "server":
                found = process.caught(self.choose, self.memory.path)
                if not found:
                    continue
            else:
                segments = any(path.endswith(".payloads") for path in mapped(process.running.pid, self.memory.path))
                process.kill()
                found = process.had(self.seen())
                found |= {"segments"} if found and segments else set()
            self._count(process, found)
            process.start()

    def _count(self, process: Process, found: set[str]) -> None:
        self.kills[process.kind if found else "nothing"] += 1
        self.had.update((process.kind, what) for what in found)

    def _lose_a_host(self) -> None:
        """All of its processes at once, and its payloads."""
        host = self.choose.choice(sorted({process.host for process in self.processes}, key=str))
        victims = [process for process in self.processes if process.host == host]
        for process in victims:
            os.kill(process.running.pid, signal.SIGKILL)
        for process in victims:
            process.running.join()
        for path in Path(self.memory.path).glob("*" if host is None else host[0]):
            shutil.rmtree(path)
        self.lost += 1
        for process in victims:
            self._count(process, process.had(self.seen()) if process.has_begun else set())
            process.start()

    def stop_at(self) -> int:
        """Tells the sources where to end: how many numbers there will be of each."""
        sent = [number for path in self.directory.glob("source-*.*") if path.suffix != ".log" for _, _, number in lines(path)[-1:]]
        stop, new = max(sent) + 1 + MORE, self.directory / "stop.new"
        new.write_text(str(stop))
        new.rename(self.directory / "stop")
        return stop

    def settle(self, stop: int) -> None:
        """Waits until all is seen, or nothing comes any more."""
        before, since = 0, time.monotonic()
        while (now := sum(len(numbers) for numbers in self.seen().values())) < stop * len(self._seen):
            if now > before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > STUCK_S:
                break
            time.sleep(0.1)
        for process in self.processes:
            if process.kind == "source":
                process.running.join(30)

    def end(self) -> list[str]:
        """Asks all to end; who did not, or not well."""
        for process in self.processes:
            if process.running.is_alive():
                os.kill(process.running.pid, signal.SIGTERM)
        for process in self.processes:
            process.running.join(30)
        return [f"{process.me}: {process.running.exitcode}" for process in self.processes if process.running.exitcode != 0]

    def of_nobody(self) -> list[str]:
        """What is nobody's, when nothing has happened for a while."""
        ends = time.monotonic() + IDLE_S
        while True:
            pids = {process.running.pid for process in self.processes if process.running.is_alive()}
            if not (found := self.memory.of_nobody(pids)) or time.monotonic() > ends:
                return found
            time.sleep(0.5)

    def judge(self, stop: int) -> tuple[list[str], list[str]]:
        """(what is to be said, what is wrong)."""
        said, wrong, repeated = [], [], 0
        for name in self._seen:
            found: Counter[int] = Counter()
            unflagged = 0
            for number, flagged in lines(self.directory / f"seen-{name}"):
                unflagged += number in found and not flagged
                found[number] += 1
            lost, doubled = [n for n in range(stop) if n not in found], found.total() - len(found)
            repeated += doubled
            said.append(
                f"{name}: {len(found)} of {stop} seen, {len(lost)} lost, {doubled} handed over again, {unflagged} of these unflagged"
            )
            if lost or unflagged or len(found) != stop:
                wrong.append(f"{said[-1]}; lost {lost[:5]}")
        if repeated > (allowed := self.kills["final"] + self.kills["nothing"]):
            wrong.append(f"{repeated} handed over again, and only {allowed} sinks killed")
        bad = lines(self.directory / "wrong")
        said.append(f"{len(bad)} wrong, corrupt or written over while they were looked at")
        return said, wrong + ([f"{said[-1]}: {bad[:5]}"] if bad else [])

    def close(self, *, keep: bool) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.running.kill()
            process.running.join()
        shutil.rmtree(self.memory.path)
        if not keep:
            shutil.rmtree(self.directory)


def main() -> None:
    """Kills, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000)
    parser.add_argument("--node", help="URL of a broker, for several hosts; default: a fresh store of local://")
    parser.add_argument("--durability", choices=("origin", "broker"), default="origin", help="broker: whole hosts are lost, too")
    arguments = parser.parse_args()
    run, wrong = Run(arguments.node, arguments.seed, arguments.durability), ["it did not come to its end"]
    signal.signal(signal.SIGTERM, run.tell)
    try:
        began = time.monotonic()
        run.kill(arguments.kills)
        took = time.monotonic() - began
        run.settle(run.stop_at())
        ill = run.end()
        (run.directory / "let-go").touch()
        stop = run.stop_at()
        for process in run.processes:
            process.start()
        run.settle(stop)
        nobodys = run.of_nobody()
        ill += run.end()
        left = run.memory.files()
        said, wrong = run.judge(stop)
        wrong += [f"did not end well: {each}" for each in ill]
        wrong += [f"of nobody after the restart: {path}" for path in nobodys] + [f"left behind: {path}" for path in left]
        takes = [line[3] for path in run.directory.glob("*.*") if path.suffix != ".log" for line in lines(path) if line[0] == "take"]
    finally:
        run.close(keep=bool(wrong))
    kills, idle = run.kills.total() - run.kills["nothing"], run.kills["nothing"]
    print(f"\nseed {arguments.seed}: {kills} kills in {took:.0f} s, {60 * kills / took:.0f} a minute; {idle} more met nothing")
    print(f"{'victims':8} {'kills':>9}" + "".join(f"{what:>11}" for what in HAD))
    for kind in ("source", "task", "final", "server"):
        print(f"{kind:8} {run.kills[kind]:9}" + "".join(f"{run.had[kind, what]:11}" for what in HAD))
    print(
        f"{len(takes)} taken and compared twice, {100 * sum(takes) / len(takes):.1f} % in place; {run.memory.most_bytes >> 20} MiB at most"
    )
    print("\n".join(said))
    if arguments.durability == "broker":
        print(f"{run.lost} times a whole host was lost")
    print(f"after the restart {len(nobodys)} files of nobody, when all had ended {len(left)} files left")
    if wrong:
        sys.exit("\n".join(f"FAIL {each}" for each in wrong[:20]) + f"\nfiles in {run.directory}")


if __name__ == "__main__":
    main()
