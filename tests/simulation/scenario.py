"""Replicas of a task with two inputs, over the simulated broker, while processes are killed, stopped and paused, and the broker is
restarted. Some join by key, in one partition or several; some sources have two producers, or begin again after their end.

The judge reads what is stored on the topic of the results, and knows what must be there: nothing of the code under test is asked.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.simulation.broker import CAPABILITIES, Broker, SimDriver
from tests.simulation.world import Condition, Event, Process, Stuck, World, here, installed, replaced, world

import edgeserve.compute
import edgeserve.transport.broker.member
from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import EdgeServeError
from edgeserve.core.message import WATERMARK_END, Header, Kind, TimeKind
from edgeserve.core.payload import encode_sized
from edgeserve.stage.assignment import partition_group
from edgeserve.stage.decisions import decision_topic, work_topic
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import unwrap, wrap
from edgeserve.transport.broker.grouplog import MemberState

_PAIR = struct.Struct(">qq")
LIMIT_S = 180.0
_GROUP = "in->out"
_KEYS = 5
_URL = "pulsar://simulated:6650"


@dataclass
class Verdict:
    """What became of a schedule. `wrong`: what must not be, in words; [] where all promises were kept."""

    seed: int
    join: str
    partitions: int = 1
    rounds: int = 1
    wrong: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    takeovers: int = 0
    shared_sets: int = 0
    switches: int = 0
    seconds: float = 0.0


class _Watch:
    """Stands for `Watch`: this world's processes."""

    def __init__(self) -> None:
        self._pids: set[int] = set()

    def only(self, pids: Any) -> None:
        self._pids = set(pids)

    def someone_died(self, *, thorough: bool = False) -> bool:
        alive = {p.pid for p in _processes if p.alive}
        return bool(self._pids - alive)

    def close(self) -> None:
        self._pids = set()


_processes: list[Process] = []


def _lives(host: str, process: str) -> bool | None:
    if host != here().host:
        return None
    return any(p.alive and str(p.pid) == process.partition("-")[0] for p in _processes)


def _connect(url: str) -> BrokerEngine:
    process = here()
    engine = getattr(process, "engine", None)
    if engine is None:
        engine = process.engine = BrokerEngine(_URL, SimDriver(_broker[0], process), CAPABILITIES)  # type: ignore[attr-defined]
    return engine


_broker: list[Broker] = []


def _frame(
    source: str,
    producer: str,
    number: int,
    kind: Kind = Kind.DATA,
    *,
    mark: int | None = None,
    time_kind: TimeKind = TimeKind.DEVICE,
    end_of: int | None = None,
) -> bytes:
    schema, payload, size = encode_sized(b"" if kind is Kind.END else _PAIR.pack(number, number))
    id_ = source.encode() + kind.to_bytes(1, "big") + (number if end_of is None else end_of).to_bytes(14, "big")
    now = int(1e18)
    mark = WATERMARK_END if kind is Kind.END else number if mark is None else mark
    key = None if kind is Kind.END else number % _KEYS
    sequence = 2 * number + (kind is not Kind.END)  # an end has its own, between those of the messages around it
    header = Header(
        id_, source, producer, sequence, number, now, schema, size, watermark_ns=mark, key=key, kind=int(kind), time_kind=int(time_kind)
    )
    return bytes(encode_frame(header, payload))


class _Barrier:
    """Where so many wait for each other."""

    def __init__(self, parties: int) -> None:
        self._missing, self._changed = parties, Condition()

    def wait(self) -> None:
        self._missing -= 1
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._missing == 0)


def _send(outlet: Any, frames: list[bytes], *, twice: bool = False) -> None:
    """Returns when it is stored."""
    stored = Event()
    for _ in range(1 + twice):
        outlet.send(wrap(frames, int(1e18)), lambda at, error: stored.set())
    stored.wait()


def _feed(
    source: str, producer: str, numbers: list[int], begin: _Barrier, go_on: _Barrier, replicas: tuple[_Barrier, bool, int] | None
) -> Callable[[], None]:
    """A producer that is never killed; it may send a message twice. Returns what sends its newest message and its end once more, as a
    client does whose connection broke, or one that takes over from who has sent the end and was killed.

    One that sends nothing more once another of its source has begun is taken for replaced by it, and what one promises before another
    begins is the promise of all: so each begins, and then each goes on.

    `replicas`: the source is a task's replicas, one of which (True: this one) sends the end of all, of this round, when all have sent
    all."""
    random = world().random
    frame = partial(_frame, source, producer, time_kind=TimeKind.DEVICE if replicas is None else TimeKind.COMPUTED)
    outlet = SimDriver(_broker[0], here()).outlet("in")
    newest, end = numbers[-1], numbers[-1] + 1
    first, second, *numbers = numbers
    _send(outlet, [frame(first, mark=0)])
    begin.wait()
    _send(outlet, [frame(second)])
    go_on.wait()
    while numbers:
        some, numbers = numbers[: (n := random.randint(1, 4))], numbers[n:]
        _send(outlet, [frame(number) for number in some], twice=random.random() < 0.1)
        world().sleep(random.choice((0.0, 0.001, 0.05, 0.5)) * random.random())
    last = [frame(newest), frame(end, Kind.END, end_of=None if replicas is None else replicas[2])]
    if replicas is not None:
        replicas[0].wait()
    if replicas is None or replicas[1]:
        _send(outlet, last[1:])

    def again() -> None:
        for each in last:
            _send(outlet, [each])

    return again


class Schedule:
    """One run. Everything in it follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        random = self.world.random
        # Of `latest` every second one may use a message in several sets; "none" is a task of one parameter.
        join = random.choice(("exact", "exact", "latest", "overlapping", "none"))
        self.verdict = Verdict(seed, join, 1 if join == "none" else random.choice((1, 1, 1, 2, 3)), random.choice((1, 1, 1, 2)))
        self._by_key = join != "none" and (self.verdict.partitions > 1 or random.random() < 0.2)
        # Whether a source that begins again has the same producers.
        self._same = random.random() < 0.5
        self.pairs = random.choice((random.randint(4, 14), random.randint(10, 40)))
        # Replicas of a task of one parameter do not tell each other of a source's producers.
        self._producers = {"a": 1} if join == "none" else {source: random.choice((1, 1, 1, 2)) for source in "ab"}
        self._replicas_of = {source for source, producers in self._producers.items() if producers > 1 and random.random() < 0.5}
        self._again = 0.0 if random.random() < 0.3 else 0.2
        self._feeding = sum(self._producers.values())
        self._serial = 0
        self._replicas: list[Process] = []
        self._nodes: dict[int, edgeserve.compute.Compute] = {}
        self._ended: set[int] = set()
        self._hosts = random.choice((("h1",), ("h1", "h2")))
        self._task_s = random.choice((0.0, 0.002, 0.05, 0.6))
        self._ack_timeout_ms = random.choice((300_000, 300_000, 250))
        self._fails = random.choice((0.0, 0.0, 0.1))
        # Replicas and faults that are about to come.
        self._coming = self._crashes = 0

    def run(self) -> Verdict:
        """Runs it to its end."""
        verdict, made = self.verdict, self.world
        with installed(made):
            _processes.clear()
            _broker[:] = [Broker(made)]
            random = made.random
            ends = [_Barrier(self._feeding) for _ in range(verdict.rounds)]
            for source, producers in self._producers.items():
                rounds = [(_Barrier(producers), _Barrier(producers), _Barrier(producers), end) for end in ends]
                for number in range(producers):
                    self._process(source).spawn(partial(self._feed, source, number, rounds))
            for _ in range(random.randint(1, 3)):
                self._later(random.random() * 0.5, self._add)
            for _ in range(random.randint(0, 4)):
                self._later(random.random() * random.choice((0.3, 2.0, 6.0)), self._fault)
            try:
                made.run(self._is_over, LIMIT_S)
                # What is on its way to the broker still comes there.
                over = made.now + 0.5
                made.after(1.0, lambda: None)
                made.run(lambda: made.now > over, 2.0)
            except Stuck as exc:
                verdict.wrong.append(f"stuck: {exc}")
            verdict.wrong += [f"{type(exc).__name__}: {exc}" for exc in made.errors]
            self._judge()
            verdict.switches, verdict.seconds = made.switches, made.now - 1_000
            made.close()
        return verdict

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        def now() -> None:
            self._coming -= 1
            do()

        self._coming += 1
        self.world.after(seconds, now)

    def _feed(self, source: str, number: int, rounds: list[tuple[_Barrier, _Barrier, _Barrier, _Barrier]]) -> None:
        for round_, (begin, go_on, sent, end) in enumerate(rounds):
            numbers = range(round_ * self.pairs, (round_ + 1) * self.pairs)[number :: self._producers[source]]
            replicas = (sent, number == 0, round_) if source in self._replicas_of else None
            again = _feed(source, f"{source}{number}.{0 if self._same else round_}", list(numbers), begin, go_on, replicas)
            end.wait()
            if self.world.random.random() < self._again:
                # Perhaps when the others have begun the next round, or when all is over.
                self.world.sleep(self.world.random.choice((0.0, 0.5, 2.0)) * self.world.random.random())
                again()
        self._feeding -= 1

    def _process(self, name: str) -> Process:
        process = Process(self.world, name, self.world.random.choice(self._hosts))
        _processes.append(process)
        return process

    def _add(self) -> None:
        """Another replica, whose name sorts before or behind the others'."""
        self._serial += 1
        process = self._process(f"{self.world.random.choice('az')}{self._serial}")
        self._replicas.append(process)
        process.spawn(partial(self._work, process))

    def _work(self, process: Process) -> None:
        all_is_there = self._feeding == 0

        def single(a: bytes) -> bytes:
            return task(a, a)

        def task(a: bytes, b: bytes) -> bytes:
            if self._task_s:
                world().sleep(self._task_s * world().random.random())
            if world().random.random() < self._fails:
                raise ValueError("planned")  # and tried again, until it does not
            return _PAIR.pack(_PAIR.unpack(a)[0], _PAIR.unpack(b)[0])

        compute = edgeserve.compute.Compute(
            single if self.verdict.join == "none" else task,
            _URL,
            topic_in="in",
            topic_out="out",
            worker_id=process.name,
            output_id="r",
            join="exact" if self.verdict.join == "exact" else "latest",
            no_overlap=self.verdict.join != "overlapping",
            by=True if self._by_key else None,
            partitions=self.verdict.partitions,
            ack_timeout_ms=self._ack_timeout_ms,
            retries=100,
            retry_backoff_ms=1,
        )
        self._nodes[process.pid] = compute
        try:
            with compute:
                compute.run(until="end")
            if self.verdict.rounds > 1 and not (all_is_there and self._all_was_settled()):
                self._later(0.2, self._add)  # it has ended after a round
        except EdgeServeError as exc:
            # A supervisor starts it again.
            self._crashes += 1
            if self._crashes > 20 or not self.verdict.faults:
                raise
            self.verdict.faults.append(f"{self.world.now - 1_000:.3f} {process.name} ended with {type(exc).__name__}: {exc}")
            self._later(0.2, self._add)
        self._ended.add(process.pid)

    def _groups(self) -> list[str]:
        parts = self.verdict.partitions
        return [_GROUP] if parts == 1 else [partition_group(_GROUP, number, parts) for number in range(parts)]

    def _all_was_settled(self) -> bool:
        """What the broker has forgotten to be acknowledged nobody has to wait for."""
        topic = _broker[0].topic("in")
        there = {at for at, data in enumerate(topic.entries) if data is not None}
        return all(there <= topic.group(group).ever for group in self._groups())

    @property
    def _is_exact(self) -> bool:
        return self.verdict.join in ("exact", "none")

    def _living(self) -> list[Process]:
        return [p for p in self._replicas if p.alive and p.pid not in self._ended]

    def _fault(self) -> None:
        random, living = self.world.random, self._living()
        kind = random.choice(("kill", "kill", "pause", "pause", "broker", "add", "stop"))
        when = f"{self.world.now - 1_000:.3f}"
        if kind == "add" or not living:
            self.verdict.faults.append(f"{when} add")
            self._add()
        elif kind == "broker":
            self.verdict.faults.append(f"{when} broker")
            broker = _broker[0]
            if broker.up:
                broker.kill()
                self.world.after(random.choice((0.05, 1.0, 5.0)) * random.random(), broker.start)
        elif kind == "kill":
            victim = random.choice(living)
            self.verdict.faults.append(f"{when} kill {victim.name}")
            victim.kill()
            self._later(random.choice((0.0, 0.5, 4.0)) * random.random(), self._add)
        elif kind == "stop":
            victim = random.choice(living)
            self.verdict.faults.append(f"{when} stop {victim.name}")
            if victim.pid in self._nodes:
                control = self._nodes[victim.pid]._control  # as the handler of a signal does
                control.stop = control.told = True
            self._later(random.choice((0.0, 0.5, 4.0)) * random.random(), self._add)
        else:
            victim, seconds = (
                random.choice(living),
                random.choice((0.3 * random.random(), random.uniform(3.0, 5.0), 10.0 * random.random())),
            )
            if victim.paused:
                return
            self.verdict.faults.append(f"{when} pause {victim.name} {seconds:.2f} s")
            victim.pause()
            self.world.after(seconds, partial(self._go_on, victim))
            driver = next((d for d in _broker[0].drivers if d.process is victim), None)
            if driver is not None and seconds > _broker[0].keep_alive_s:
                self.world.after(_broker[0].keep_alive_s, driver.disconnect)

    def _go_on(self, process: Process) -> None:
        process.go_on()
        for driver in _broker[0].drivers:
            if driver.process is process:
                driver.come_back()

    def _is_over(self) -> bool:
        """All replicas that live have ended, and none is about to come."""
        return bool(self.world.errors) or (self._serial > 0 and self._coming == 0 and not self._living())

    def _judge(self) -> None:
        verdict, broker = self.verdict, _broker[0]
        # Set by its id: its members and where its result stands first.
        found: dict[bytes, tuple[int, int]] = {}
        ends = set[bytes]()
        # Results that others ran may be ahead of an end that waits for a slow replica: only partitions end a round together.
        behind, newest, over, strict = False, -1, -1, verdict.partitions > 1
        for data in broker.topic("out").entries:
            for frame in unwrap(data, 0)[1] if data is not None else ():
                header, payload = decode_frame(frame)  # type: ignore[arg-type]  # there are no references
                if header.kind == Kind.END:
                    if header.id not in ends:  # one that comes twice is one
                        ends.add(header.id)
                        over, behind = newest if strict else len(ends) - 1, False
                    continue
                pair = _PAIR.unpack(bytes(payload)[-_PAIR.size :])
                if header.id not in found:
                    behind = bool(ends)
                    newest = max(newest, max(pair) // self.pairs)
                    if min(pair) // self.pairs <= over:
                        verdict.wrong.append(f"a result came behind the end: {pair}")
                    if pair[0] // self.pairs != pair[1] // self.pairs:
                        verdict.wrong.append(f"a set of two rounds: {pair}")
                    if self._by_key and header.key != pair[0] % _KEYS:
                        verdict.wrong.append(f"the key of {pair} is {header.key!r}")
                if found.setdefault(header.id, pair) != pair:
                    verdict.wrong.append(f"one id for {found[header.id]} and {pair}")
        if not 0 < len(ends) <= verdict.rounds:
            verdict.wrong.append(f"{len(ends)} ends were sent on" if ends else "no end was sent on")
        if behind:
            verdict.wrong.append("the last result came behind the end")
        for side, name in enumerate(self._producers):
            used = [pair[side] for pair in found.values()]
            if verdict.join != "overlapping" and (twice := sorted({n for n in used if used.count(n) > 1})):
                verdict.wrong.append(f"of {name} in two sets: {twice}")
            if self._is_exact and (missing := sorted({*range(self.pairs * verdict.rounds)} - {*used})):
                verdict.wrong.append(f"lost: {missing}")
            if verdict.partitions > 1 and verdict.join == "exact" and max(self._producers.values()) == 1:
                by_key = [[n for n in used if n % _KEYS == key] for key in range(_KEYS)]
                verdict.wrong += [f"{name} out of order for a key: {of_key}" for of_key in by_key if of_key != sorted(of_key)]
        if self._is_exact and (mixed := [pair for pair in found.values() if pair[0] != pair[1]]):
            verdict.wrong.append(f"wrong pairs: {mixed}")
        if self._by_key and (mixed := [pair for pair in found.values() if pair[0] % _KEYS != pair[1] % _KEYS]):
            verdict.wrong.append(f"two keys in a set: {mixed}")
        if not found:
            verdict.wrong.append("no results at all")
        self._judge_topics()

    def _judge_topics(self) -> None:
        verdict, broker = self.verdict, _broker[0]
        groups = self._groups()
        works, logs = [work_topic("in", group) for group in groups], [decision_topic("in", group) for group in groups]
        if verdict.join == "none":
            works = logs = []
        expected = {"in", "out", *logs, *(works if verdict.partitions == 1 else ())}
        if strange := [
            name for name, topic in broker.topics.items() if topic.entries and name not in expected and not name.endswith("~group")
        ]:
            verdict.wrong.append(f"topics that should not be: {strange}")
        for group in groups if not verdict.wrong and not verdict.faults and not self._again else ():
            if left := broker.topic("in").last() + 1 - broker.topic("in").group(group).rise():
                verdict.wrong.append(f"{left} entries were never acknowledged by {group}")
        verdict.shared_sets = sum(len(broker.topic(name).entries) for name in works)
        verdict.takeovers = max((broker.topic(name).fence for name in logs), default=0)


def patches() -> dict[str, Any]:
    """What stands in for the machine."""
    membership = "edgeserve.transport.broker.membership"

    def this_process(kind: Any, signature: str, version: str) -> MemberState:
        return MemberState(kind, signature, here().host, f"{here().pid}-1", version=version)

    log = "edgeserve.transport.broker.grouplog"
    return {
        # So that short runs have many.
        f"{log}:SNAPSHOT_EVERY_IDS": 10,
        f"{log}:SNAPSHOT_EVERY_RECORDS": 30,
        f"{log}:IDS_KEPT": 48,
        f"{log}:_REWRITTEN_IDS": 4,
        "edgeserve.stage.join:_MOST_WAITING": 3,
        f"{membership}:Watch": _Watch,
        f"{membership}:lives": _lives,
        f"{membership}:this_host": lambda: here().host,
        "edgeserve.transport.broker.member:this_process": this_process,
        "edgeserve.transport.broker.engine:lives": _lives,
        "edgeserve.transport.broker.engine:this_host": lambda: here().host,
        "edgeserve.stage.node:connect": _connect,
        "edgeserve.stage.node:disconnect": lambda transport: transport.close(),
    }


def run(seeds: Any, planted: dict[str, Any] | None = None, each: Callable[[Verdict], object] = lambda _: None) -> list[Verdict]:
    """Runs schedules; returns those that broke a promise."""
    failed = []
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with replaced(**patches(), **(planted or {})):
            for seed in seeds:
                verdict = Schedule(seed).run()
                each(verdict)
                if verdict.wrong:
                    failed.append(verdict)
    finally:
        logging.disable(before)
    return failed


class _FoundError(Exception):
    """The first schedule that broke a promise."""


def search(seeds: Iterable[int], planted: dict[str, Any]) -> tuple[int, Verdict | None]:
    """How many schedules ran until one broke a promise, and which."""
    tried = 0

    def look(verdict: Verdict) -> None:
        nonlocal tried
        tried += 1
        if verdict.wrong:
            raise _FoundError(verdict)

    try:
        run(seeds, planted, look)
    except _FoundError as exc:
        return tried, exc.args[0]
    return tried, None


__all__ = ("Schedule", "Verdict", "run", "search")
