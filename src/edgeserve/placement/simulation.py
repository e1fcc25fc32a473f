"""A placement lived through, event by event: what the formulas of `evaluate` leave out, queues above all, happens here.

Links and nodes are queues, first come first served: a link has one server and takes bytes over bandwidth for a message, whose packets it
passes on as they come, then the latency passes; a node has its cores. Headers go through the broker, payloads with them or straight from
their maker once a run wants them and they are not on its node yet.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from edgeserve.placement.check import argument, shown
from edgeserve.placement.errors import BadValue
from edgeserve.placement.evaluation import Assignment, Routing, Violation, by_link, read_assignment, read_routing, report
from edgeserve.placement.forest import set_of
from edgeserve.placement.model import Model, split
from edgeserve.placement.problem import ALL, ANY, Problem
from edgeserve.placement.state import State

Then = Callable[[], None]


@dataclass(frozen=True)
class Simulation:
    """What a simulated run showed, its beginning left out.

    Attributes:
        latency_ms: per sink, probability (0.5, 0.9, 0.99) to the latency from event to result that so many stay within; infinite where no
            result came.
        mean_ms: per sink the mean; infinite where no result came.
        results: per sink how many results came.
        link_bytes_s: per link the bytes per second.
        utilisation: per node the part of its cores that was busy.
        throttled: per task how many messages started no run because of `min_interval_ms`.
        violations: what the placement breaks, as `evaluate` says. Where that is the cpu of a node or a link, queues may grow for as long as
            the run lasts: latencies are those of the results that came, and grow with `duration_s`.
    """

    latency_ms: Mapping[str, Mapping[float, float]]
    mean_ms: Mapping[str, float]
    results: Mapping[str, int]
    link_bytes_s: Mapping[str, float]
    utilisation: Mapping[str, float]
    throttled: Mapping[str, int]
    violations: tuple[Violation, ...]


@dataclass(slots=True)
class _Message:
    stream: int
    number: int
    began: float
    made: int  # the node that has the payload
    here: dict[int, bool | list[Then]] = field(default_factory=dict)  # node: whether it has the payload, or who waits for it


@dataclass(slots=True)
class _Inbox:
    """What a task holds: the newest message per input, or with 'all' those that wait for the others."""

    newest: dict[int, _Message] = field(default_factory=dict)
    queues: dict[int, list[tuple[int, int, _Message]]] = field(default_factory=lambda: defaultdict(list))
    last: float = -math.inf
    turn: int = 0
    late: tuple[int, _Message, int] | None = None  # what is to start a run as soon as one may start


class _World:
    """All that is going on."""

    def __init__(self, model: Model, sites: Sequence[tuple[int, ...]], lazy: Sequence[bool], seed: int, poisson: bool) -> None:
        self.model, self.sites, self.lazy, self.poisson = model, sites, lazy, poisson
        self.rng = random.Random(seed)
        self.now = 0.0
        self.from_s, self.until_s = 0.0, math.inf
        self._events: list[tuple[float, int, Then]] = []
        self._count = itertools.count()
        self._numbers = [itertools.count() for _ in model.streams]
        self.link_free = [0.0] * len(model.routes.link_of)
        self.link_busy = [0.0] * len(model.routes.link_of)
        self._idle = [int(cores) for cores in model.cores_of]
        self._queued: list[deque[tuple[float, Then]]] = [deque() for _ in model.nodes]
        self.busy = [0.0] * len(model.nodes)
        self.boxes = [_Inbox() for _ in model.tasks]
        self.throttled = [0] * len(model.tasks)
        self.latencies: dict[str, list[float]] = {edge.consumer: [] for edge in model.edges if edge.task < 0}

    def after(self, delay: float, then: Then) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), then))

    def run(self) -> None:
        while self._events and self._events[0][0] <= self.until_s:
            self.now, _, then = heapq.heappop(self._events)
            then()

    def counted(self, begin: float, end: float) -> float:
        """How many of the seconds between lie in the time that counts."""
        return max(min(end, self.until_s) - max(begin, self.from_s), 0.0)

    def send(self, path: Sequence[int], size: float, then: Then, came: float = -math.inf) -> None:
        """Bytes over links. The first packet is there now, the last one at the time `came`; a link passes on what it has."""
        if not path:
            then()
            return
        link, model = path[0], self.model
        packet = split(size)[0] * model.per_byte_of[link]
        begin = max(self.now, self.link_free[link])
        free = self.link_free[link] = begin + size * model.per_byte_of[link]
        self.link_busy[link] += self.counted(begin, free)
        done, latency = max(free, came + packet), float(model.latency[link])
        # Behind the last link all of it is wanted.
        first = begin + packet if path[1:] else done
        self.after(first + latency - self.now, partial(self.send, path[1:], size, then, done + latency))

    def compute(self, node: int, seconds: float, then: Then) -> None:
        """A run on one of a node's cores."""
        if self._idle[node]:
            self._idle[node] -= 1
            self._begin(node, seconds, then)
        else:
            self._queued[node].append((seconds, then))

    def _begin(self, node: int, seconds: float, then: Then) -> None:
        self.busy[node] += self.counted(self.now, self.now + seconds)

        def end() -> None:
            if self._queued[node]:
                self._begin(node, *self._queued[node].popleft())
            else:
                self._idle[node] += 1
            then()

        self.after(seconds, end)

    def start_source(self, stream: int, shared: random.Random | None) -> None:
        """Sends for ever; sources that share a generator's seed send at the same times."""
        rate = self.model.streams[stream].rate
        rng = shared or random.Random(self.rng.random())
        phase_ms = self.model.problem.sources[stream].phase_ms
        paced = not self.poisson or phase_ms is not None

        def gap() -> float:
            return 1.0 / rate if paced else rng.expovariate(rate)

        def tick() -> None:
            self.emit(stream, self.now, self.model.streams[stream].node)
            self.after(gap(), tick)

        first = gap() if not paced or shared is not None else rng.random() / rate
        self.after(first if phase_ms is None else phase_ms / 1e3 % (1.0 / rate), tick)

    def emit(self, number: int, began: float, node: int) -> None:
        """A message of a stream, made at a node now."""
        model, stream = self.model, self.model.streams[number]
        if not stream.edges:
            return
        message = _Message(number, next(self._numbers[number]), began, node, {node: True})
        eager = any(not self.lazy[edge] for edge in stream.edges)
        size = stream.header + (stream.more if eager else 0.0)
        self.send(model.routes.path(node, model.broker), size, lambda: self._at_broker(message))

    def _at_broker(self, message: _Message) -> None:
        for number in self.model.streams[message.stream].edges:
            self._hand_on(number, message)

    def _hand_on(self, number: int, message: _Message) -> None:
        """From the broker to one taker; replicas take turns."""
        edge = self.model.edges[number]
        if edge.task < 0:
            node, then = edge.taker_node, partial(self._at_sink, number, message, edge.taker_node)
        else:
            node = self._replica(edge.task, edge.taker_group, message)
            then = partial(self._at_task, edge.task, number, message, node)
        path, size = self.model.routes.path(self.model.broker, node), edge.header + (0.0 if self.lazy[number] else edge.more)
        self.send(path, size, lambda: self.after(self.model.hop_s, then))
        if edge.settle:
            self.send(path, edge.settle, lambda: None)

    def _replica(self, task: int, group: int, message: _Message) -> int:
        """The node that takes a message: in turn, and for a join by the message's number, so that what belongs together meets."""
        site, box = self.sites[group], self.boxes[task]
        if len(self.model.inputs[task]) > 1:
            return site[message.number % len(site)]
        box.turn += 1
        return site[box.turn % len(site)]

    def _at_sink(self, number: int, message: _Message, node: int) -> None:
        def done() -> None:
            if message.began >= self.from_s:
                self.latencies[self.model.edges[number].consumer].append(self.now - message.began)

        self.fetch(number, message, node, done)

    def fetch(self, number: int, message: _Message, node: int, then: Then) -> None:
        """Goes on when the payload is on the node."""
        edge = self.model.edges[number]
        if not self.lazy[number] or edge.small:
            then()
            return
        there = message.here.get(node)
        if there is True:
            then()
        elif isinstance(there, list):
            there.append(then)
        else:
            waiting: list[Then] = [then]
            message.here[node] = waiting

            def come() -> None:
                message.here[node] = True
                for each in waiting:
                    each()

            back = self.model.routes.path(message.made, node)
            ask = sum(float(self.model.latency[link]) for link in self.model.routes.path(node, message.made))
            self.after(ask, lambda: self.send(back, edge.bytes, come))

    def _at_task(self, task: int, number: int, message: _Message, node: int) -> None:
        members = self._joined(task, number, message)
        if members is None:
            return
        box, spec = self.boxes[task], self.model.tasks[task]
        may = box.last + spec.min_interval_ms / 1e3
        if spec.min_interval_ms and self.now < may - 1e-12:
            if spec.trigger == ALL or box.late is not None:
                self.throttled[task] += self.now >= self.from_s
            else:
                self.after(may - self.now, partial(self._in_time, task))
            box.late = None if spec.trigger == ALL else (number, message, node)
            return
        self.throttled[task] += box.late is not None and self.now >= self.from_s
        began = message.began if spec.trigger != ALL else min(each.began for each in members.values())
        self._start(task, members, began, node)

    def _in_time(self, task: int) -> None:
        """A run may start again: of what is the newest then."""
        box = self.boxes[task]
        if box.late is None:  # a message came at that very time, and has begun it
            return
        number, message, node = box.late
        members = {**box.newest, number: message}
        newest = members.values() if self.model.tasks[task].trigger == ANY else (message,)
        self._start(task, members, max(each.began for each in newest), node)

    def _start(self, task: int, members: dict[int, _Message], began: float, node: int) -> None:
        """A run, as soon as all payloads are there."""
        box, spec = self.boxes[task], self.model.tasks[task]
        box.last, box.late = self.now, None
        left = len(members)

        def arrived() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._hand_over(task, node, lambda there: self.compute(there, spec.cpu_s / self.model.speed_of[there], partial(ran, there)))

        def ran(there: int) -> None:
            self._ran(task, began, there)

        for edge, member in members.items():
            self.fetch(edge, member, node, arrived)

    def _hand_over(self, task: int, node: int, then: Callable[[int], None]) -> None:
        """From the replica that has joined a set through the broker to the next in turn."""
        model, box, site = self.model, self.boxes[task], self.sites[self.model.group_of[task]]
        size = model.handed_bytes(task, len(site))
        if not size:
            then(node)
            return
        box.turn += 1
        there = site[box.turn % len(site)]

        def down() -> None:
            self.send(model.routes.path(model.broker, there), size, lambda: self.after(model.hop_s, lambda: then(there)))

        self.send(model.routes.path(node, model.broker), size, down)

    def _joined(self, task: int, number: int, message: _Message) -> dict[int, _Message] | None:
        """The members of the run that a message starts, by edge, or None when it starts none."""
        box, spec, edges = self.boxes[task], self.model.tasks[task], self.model.inputs[task]
        if spec.trigger == ALL:
            insort(box.queues[number], (message.number, id(message), message), key=lambda entry: entry[0])
            if any(not box.queues[edge] for edge in edges):
                return None
            return {edge: box.queues[edge].pop(0)[2] for edge in edges}
        old = box.newest.get(number)
        if old is None or old.number < message.number:
            box.newest[number] = message
        wanted = spec.trigger == ANY or self.model.streams[message.stream].name == spec.trigger
        if not wanted or any(edge not in box.newest for edge in edges):
            return None
        return {**box.newest, number: message}

    def _ran(self, task: int, began: float, node: int) -> None:
        stream = self.model.own_stream[task]
        expected = self.model.tasks[task].outputs_per_run
        count = int(expected) + (self.rng.random() < expected - int(expected))
        for _ in range(count):
            self.emit(stream, began, node)


def simulate(
    problem: Problem,
    assignment: Assignment,
    routing: Routing = "lazy",
    *,
    duration_s: float = 60.0,
    warmup_s: float | None = None,
    seed: int = 0,
    arrivals: Literal["poisson", "periodic"] = "poisson",
) -> Simulation:
    """Lives a placement through, in simulated time.

    Args:
        problem: what is placed.
        assignment: as `evaluate` takes it.
        routing: as `evaluate` takes it.
        duration_s: how long, in simulated seconds.
        warmup_s: how much of the beginning is left out, in simulated seconds; a tenth by default.
        seed: a whole number, not negative; the same seed gives the same run.
        arrivals: of sources whose phase is not known: `poisson` (as the formulas assume) or `periodic`. Those that meet in a task with
            `trigger='all'` send together.

    Raises:
        InvalidPlan: as `evaluate`.
        BadValue: no time is left after the beginning, or an argument is no such number.
    """
    duration_s, seed = argument("duration_s", duration_s), argument("seed", seed, int)
    warmup_s = duration_s / 10 if warmup_s is None else argument("warmup_s", warmup_s)
    if not warmup_s < duration_s or arrivals not in ("poisson", "periodic"):
        raise BadValue(
            f"duration_s={duration_s}, warmup_s={warmup_s}, arrivals={shown(arrivals)}: use 0 <= warmup_s < duration_s, and 'poisson' or "
            f"'periodic'"
        )
    model = Model(problem)
    sites, stray = read_assignment(model, assignment)
    lazy = read_routing(model, routing)
    world = _World(model, sites, lazy, seed, arrivals == "poisson")
    together = _meeting(model)
    for number, stream in enumerate(model.streams):
        if stream.group < 0:
            shared = random.Random(f"{seed} {together[number]} {stream.rate}") if number in together else None
            world.start_source(number, shared)
    world.from_s, world.until_s = warmup_s, duration_s
    world.run()
    seconds = duration_s - warmup_s
    return Simulation(
        latency_ms={sink: {p: 1e3 * _quantile(sorted(found), p) for p in (0.5, 0.9, 0.99)} for sink, found in world.latencies.items()},
        mean_ms={sink: 1e3 * sum(found) / len(found) if found else math.inf for sink, found in world.latencies.items()},
        results={sink: len(found) for sink, found in world.latencies.items()},
        link_bytes_s=by_link(
            model, [busy / (seconds * per_byte) for busy, per_byte in zip(world.link_busy, model.per_byte_of, strict=True)]
        ),
        utilisation={name: world.busy[n] / seconds / max(model.cores_of[n], 1.0) for n, name in enumerate(model.nodes)},
        throttled={task.name: world.throttled[n] for n, task in enumerate(model.tasks)},
        violations=report(State(model, sites, lazy), stray).violations,
    )


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else math.inf


def _meeting(model: Model) -> dict[int, int]:
    """Sources that reach an input of a task that waits for all of them, to a number of their own set."""
    parent = list(range(len(model.streams)))

    met: set[int] = set()
    reach: dict[int, set[int]] = {number: {number} for number, stream in enumerate(model.streams) if stream.group < 0}
    for task in model.order:
        own = model.stream_number[model.tasks[task].name]
        inputs = [model.edges[edge].stream for edge in model.inputs[task]]
        reach[own] = set().union(*(reach[stream] for stream in inputs))
        if model.tasks[task].trigger == ALL and len(inputs) > 1:
            first = min(reach[own])
            for other in reach[own]:
                parent[set_of(parent, other)] = set_of(parent, first)
            met |= reach[own]
    return {number: set_of(parent, number) for number in met}
