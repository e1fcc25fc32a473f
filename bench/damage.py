"""Damages stores of local:// and looks at what comes of it: `python bench/damage.py --files 1000`.

Each file is a copy of a store, closed well or not, that is damaged in one of many ways and then opened by another process. It must not
crash or hang, must deliver nothing but what was published, and must name whatever is missing. Ends with 1 if one of them does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from edgeserve.core.errors import EdgeServeError, StoreDamagedWarning
from edgeserve.transport import Subscription, Transport, connect, disconnect

PAGE = 4096
LIMIT_S = 60.0
TOPICS = ("a", "b", "ünï/c", "big", "log")


@dataclass
class Store:
    """A store to damage: its folder, older states of its data file, and what was published, as digests by topic and position."""

    folder: Path
    older: list[bytes]
    published: dict[str, list[str]]
    settled: dict[str, int]
    sealed: bool


@dataclass
class Outcome:
    """What a process saw of a damaged store."""

    kind: str
    sealed: bool
    missing: int = 0
    of: int = 0
    named: str = ""
    error: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """In a word."""
        if self.failures:
            return "FAILED"
        if self.error:
            return "refused, named"
        if not self.missing:
            return "whole, named" if self.named else "whole"
        return "all lost, named" if self.missing == self.of else "part lost, named"


def digest(frame: bytes | memoryview) -> str:
    """A frame in short."""
    return xxhash.xxh3_64_hexdigest(frame)


# --- building ---------------------------------------------------------------------------------------------------


def build(folder: Path, seed: int, *, sealed: bool) -> Store:
    """Several topics with batches of all sizes, groups that have settled some of it with ids, a log with a fence."""
    rng = random.Random(seed)
    live = folder / "live"
    transport = connect(f"local://{live}?retention_mb=100")
    published: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    groups = {topic: transport.subscribe([topic], "g", member="old") for topic in TOPICS[:3]}
    fence = transport.fence("log", "holder")
    older, steps = [], rng.randrange(40, 90)
    for step in range(steps):
        if step in (30, steps - 4, steps - 2, steps - 1):
            older.append((live / "data" / "data.mdb").read_bytes())
        _step(transport, rng, published, fence, groups)
    settled = {topic: group.floor(topic) for topic, group in groups.items()}
    kept = folder / "kept"
    if not sealed:
        shutil.copytree(live, kept, ignore=shutil.ignore_patterns("wake"))
    for group in groups.values():
        group.close()
    disconnect(transport)
    if sealed:
        shutil.copytree(live, kept, ignore=shutil.ignore_patterns("wake"))
    shutil.rmtree(live)
    return Store(kept, older, published, settled, sealed)


def _step(transport: Transport, rng: random.Random, published: dict[str, list[str]], fence: Any, groups: dict[str, Subscription]) -> None:
    topic = rng.choice(TOPICS[:4])
    size = rng.choice((10, 100, 3000)) if topic != "big" else 60_000
    frames = [rng.randbytes(size) for _ in range(rng.choice((1, 3, 20)) if topic != "big" else 1)]
    published[topic] += map(digest, frames)
    publisher = transport.publisher(topic, send_window=10**6)
    publisher.publish(frames)
    publisher.close()
    group = rng.choice(list(groups))
    if found := groups[group].receive(rng.choice((1, 5, 50)), 0):
        decisions = [rng.randbytes(50)]
        published["log"] += map(digest, decisions)
        ids = [rng.randbytes(16) for _ in found]
        groups[group].settle({group: [d[1] for d in found]}, ids=ids, decisions=decisions, fence=fence)


# --- damaging ---------------------------------------------------------------------------------------------------


def _flips(data: bytearray, rng: random.Random, first: int = 0, stop: int | None = None) -> None:
    for _ in range(rng.randint(1, 16)):
        data[rng.randrange(first, stop or len(data))] ^= 1 << rng.randrange(8)


def _flips_in_structure(data: bytearray, rng: random.Random) -> None:
    pages = [at for at in range(0, len(data) - PAGE + 1, PAGE) if data[at + 10] & 0x03]
    for _ in range(rng.randint(1, 16)):
        page = rng.choice(pages)
        data[page + rng.randrange(rng.choice((16, 64, PAGE)))] ^= 1 << rng.randrange(8)


def _pages_swapped(data: bytearray, rng: random.Random) -> None:
    one, two = (rng.randrange(len(data) // PAGE) * PAGE for _ in range(2))
    data[one : one + PAGE], data[two : two + PAGE] = data[two : two + PAGE], data[one : one + PAGE]


def _zeroed(data: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(data)), rng.choice((1, 100, PAGE, 10 * PAGE))
    length = min(length, len(data) - at)
    data[at : at + length] = bytes(length)


def _torn(data: bytearray, rng: random.Random, older: bytes) -> None:
    share, spare_meta = rng.choice((0.02, 0.3, 0.7)), rng.random() < 0.7
    for at in range(2 * PAGE if spare_meta else 0, min(len(data), len(older)) - PAGE + 1, PAGE):
        if rng.random() < share:
            data[at : at + PAGE] = older[at : at + PAGE]


def _one_page_older(data: bytearray, rng: random.Random, older: bytes) -> None:
    """The likeliest after a power cut: all was written but a page or two of the tree."""
    at_both = range(2 * PAGE, min(len(data), len(older)) - PAGE + 1, PAGE)
    pages = [at for at in at_both if data[at + 10] & older[at + 10] & 0x03 and data[at : at + PAGE] != older[at : at + PAGE]]
    for at in rng.sample(pages, min(len(pages), rng.choice((1, 1, 2)))):
        data[at : at + PAGE] = older[at : at + PAGE]


def damage(store: Store, folder: Path, kind: str, rng: random.Random) -> None:
    """Damages one copy; see `KINDS`."""
    file = folder / "data" / "data.mdb"
    data = bytearray(file.read_bytes())
    match kind:
        case "bits flipped":
            _flips(data, rng)
        case "bits flipped in the tree":
            _flips_in_structure(data, rng)
        case "bits flipped in the root pages":
            _flips(data, rng, 0, 2 * PAGE)
        case "cut off":
            del data[rng.choice((rng.randrange(len(data)), rng.randrange(len(data) // PAGE) * PAGE, 0)) :]
        case "a range zeroed":
            _zeroed(data, rng)
        case "pages swapped":
            _pages_swapped(data, rng)
        case "pages of an older state":
            _torn(data, rng, rng.choice(store.older))
        case "a tree page of an older state":
            _one_page_older(data, rng, rng.choice(store.older))
        case "the whole older state":
            data[:] = rng.choice(store.older)
        case "garbage at the end":
            data += rng.randbytes(rng.choice((1, 100, 10 * PAGE)))
        case "garbage instead":
            data[:] = rng.randbytes(len(data))
        case "the small files":
            for small in (folder / name for name in ("seal.json", "mark", "opened.json", "data/lock.mdb")):
                if small.exists() and rng.random() < 0.6:
                    _damage_small(small, rng)
        case _:
            raise ValueError(kind)
    file.write_bytes(data)


def _damage_small(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    way = rng.randrange(4)
    if way == 0 and data:
        _flips(data, rng)
    elif way == 1:
        del data[rng.randrange(len(data) + 1) :]
    elif way == 2:
        data[:] = rng.randbytes(len(data))
    else:
        data += rng.randbytes(20)
    path.write_bytes(data)


KINDS = (
    "bits flipped",
    "bits flipped in the tree",
    "bits flipped in the root pages",
    "cut off",
    "a range zeroed",
    "pages swapped",
    "pages of an older state",
    "a tree page of an older state",
    "the whole older state",
    "garbage at the end",
    "garbage instead",
    "the small files",
)

# --- looking ----------------------------------------------------------------------------------------------------


def look(folder: str, published: dict[str, list[str]], settled: dict[str, int]) -> dict[str, Any]:
    """Opens a store as a user would and compares what it delivers. Runs in a process of its own."""
    seen: dict[str, Any] = {"missing": 0, "named": "", "error": "", "failures": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            transport = connect(f"local://{folder}?retention_mb=100")
            try:
                _look(transport, published, settled, seen)
            finally:
                disconnect(transport)
        except EdgeServeError as exc:
            seen["error"] = f"{type(exc).__name__}: {exc}"
    named = [str(w.message) for w in caught if issubclass(w.category, StoreDamagedWarning)]
    seen["named"] = " | ".join(named)
    seen["failures"] += [
        f"unexpected {w.category.__name__}: {w.message}" for w in caught if not issubclass(w.category, StoreDamagedWarning)
    ]
    if not named and not seen["error"]:
        if seen["missing"]:
            seen["failures"].append(f"{seen['missing']} messages are missing and nobody said so")
        if seen["again"]:
            seen["failures"].append(f"settled messages came again and nobody said that anything was lost: {seen['again']}")
    return seen


def _look(transport: Transport, published: dict[str, list[str]], settled: dict[str, int], seen: dict[str, Any]) -> None:
    seen["again"] = []
    for topic in transport.topics():
        if topic not in published:
            seen["failures"].append(f"there was no topic {topic!r}")
    for topic, expected in published.items():
        read = {position: digest(frame) for frame, position, _ in transport.read(topic)}
        subscription = transport.subscribe([topic], "looks")
        received: dict[int, str] = {}
        while found := subscription.receive(100, 0):
            received.update((d[1], digest(d[0])) for d in found)
            subscription.settle({topic: [d[1] for d in found]}, ids=[b"i" * 16])
        subscription.close()
        for way, got in (("read", read), ("received", received)):
            wrong = [p for p, d in got.items() if p >= len(expected) or d != expected[p]]
            if wrong:
                seen["failures"].append(f"{way} what was never published: {topic!r} at {wrong[:5]}")
        if read != received:
            seen["failures"].append(f"read() and a subscription differ on {topic!r}")
        seen["missing"] += len(expected) - len(read)
        if topic in settled:
            old = transport.subscribe([topic], "g")
            again = [d[1] for d in old.receive(10**6, 0) if d[1] < settled[topic]]
            old.settled_ids(), old.close()
            if again:
                seen["again"].append(f"{len(again)} of {topic!r}")
    _use(transport, seen)


def _use(transport: Transport, seen: dict[str, Any]) -> None:
    """What was saved must be a store that works."""
    subscription, publisher = transport.subscribe(["a", "new"], "uses", start="latest"), transport.publisher("a")
    publisher.publish([b"x" * 5000])
    found = subscription.receive(5, 1000)
    subscription.settle({"a": [d[1] for d in found]}, {"new": [b"y"]}, ids=[b"j" * 16])
    if [bytes(d[0]) for d in found] != [b"x" * 5000]:
        seen["failures"].append("what is published now does not arrive")
    subscription.close()
    publisher.close()


def work() -> None:
    """Looks at one store after another; a line of JSON in, a line of JSON out."""
    for line in sys.stdin:
        print(json.dumps(look(**json.loads(line))), flush=True)


class Looker:
    """A process that looks; a new one when it died or hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def look(self, **question: Any) -> dict[str, Any]:
        """What it saw, or why it did not come back."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        answer = process.stdout.readline() if ready else ""
        if answer:
            result: dict[str, Any] = json.loads(answer)
            return result
        self.close(kill=True)
        why = f"ended with {process.returncode}" if ready else f"did not answer within {LIMIT_S} s"
        return {"missing": 0, "named": "", "error": "", "failures": [f"the process {why}"]}

    def close(self, *, kill: bool = False) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            if kill:
                process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            process.stdout.close()


def examine(store: Store, kind: str, seed: int, folder: Path, looker: Looker) -> Outcome:
    """Damages one copy and lets it be looked at."""
    shutil.copytree(store.folder, folder)
    damage(store, folder, kind, random.Random(seed))
    file = folder / "data" / "data.mdb"
    changed = file.read_bytes() != (store.folder / "data" / "data.mdb").read_bytes()
    seen = looker.look(folder=str(folder), published=store.published, settled=store.settled)
    outcome = Outcome(kind, store.sealed, seen["missing"], sum(map(len, store.published.values())), seen["named"], seen["error"])
    outcome.failures = seen["failures"]
    if store.sealed and changed and not (outcome.named or outcome.error or outcome.failures):
        outcome.failures.append("the file is not as it was sealed, and nobody said so")
    shutil.rmtree(folder)
    return outcome


def run(files: int, seed: int, folder: Path, workers: int = 2, kinds: tuple[str, ...] = KINDS) -> list[Outcome]:
    """Examines that many files, the kinds in turn, half of them sealed."""
    stores = [build(folder / f"store-{n}", seed + n, sealed=n % 2 == 0) for n in range(max(2, min(8, files // 10)))]

    def share(worker: int) -> list[Outcome]:
        looker, outcomes = Looker(), []
        try:
            for n in range(worker, files, workers):
                kind, store = kinds[n % len(kinds)], stores[n // len(kinds) % len(stores)]
                outcome = examine(store, kind, seed * 1_000_003 + n, folder / f"file-{n}", looker)
                outcome.failures = [f"file {n}: {text}" for text in outcome.failures]
                outcomes.append(outcome)
        finally:
            looker.close()
        return outcomes

    with ThreadPoolExecutor(workers) as pool:
        return [outcome for outcomes in pool.map(share, range(workers)) for outcome in outcomes]


def table(outcomes: list[Outcome]) -> str:
    """Outcomes by kind, and how much of the messages was saved."""
    words = ("whole", "whole, named", "part lost, named", "all lost, named", "refused, named", "FAILED")
    lines = [f"{'damage':32}{'store':10}{'files':>6}{'saved %':>9}  " + "  ".join(words)]
    for kind in KINDS:
        for sealed in (True, False):
            some = [o for o in outcomes if o.kind == kind and o.sealed is sealed]
            if some:
                counts = Counter(o.text for o in some)
                saved = 100 - 100 * sum(o.missing if not o.error else o.of for o in some) / sum(o.of for o in some)
                cells = "  ".join(f"{counts[word] or '':>{len(word)}}" for word in words)
                lines.append(f"{kind:32}{'closed' if sealed else 'killed':10}{len(some):6}{saved:9.1f}  {cells}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of damage; may be given again")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edgeserve-damage-") as folder:
        outcomes = run(options.files, options.seed, Path(folder), kinds=tuple(options.kind or KINDS))
    print(table(outcomes))
    failures = [text for o in outcomes for text in o.failures]
    print(f"{len(outcomes)} files in {time.monotonic() - started:.0f} s, {len(failures)} failures", *failures[:40], sep="\n  ")
    if options.json:
        options.json.write_text(json.dumps([o.__dict__ | {"outcome": o.text} for o in outcomes], indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "default")
    sys.exit(main())
