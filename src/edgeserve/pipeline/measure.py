"""A pipeline as it is run to be measured: its tasks note what each run takes, its sources keep no place, its sinks are left out."""

from __future__ import annotations

import itertools
import math
import os
import resource
import time
from array import array
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from edgeserve.core.message import Header, TimeKind
from edgeserve.pipeline.backfill import BY_THE_CLOCK, HOLDS_ALL, LOGS, check_names, reading
from edgeserve.pipeline.callables import Renamed, make_stream, make_task
from edgeserve.pipeline.costs import QUANTILES, SourceCost, TaskCost
from edgeserve.pipeline.declared import Declared
from edgeserve.pipeline.pipeline import Pipeline
from edgeserve.sources.base import Source

_PACED = 0.1
"""So much is the variance of the times between messages at most, over their mean squared, where a pace is kept."""


class Report(msgspec.Struct, frozen=True):
    """What one process of a task has noted.

    Attributes:
        task: its name.
        runs: how many it began.
        cpu_ns: of each run but the last, from its start to that of the next one: what the process does around the task's function is part
            of it.
        wall_ns: from the first start to the last.
        memory_bytes: the most that it held.
    """

    task: str
    runs: int
    cpu_ns: list[int]
    wall_ns: int
    memory_bytes: int


def measured(pipeline: Pipeline, recorded: Mapping[str, Path], folder: Path, messages: int | None = None) -> Pipeline:
    """A pipeline of the same sources and tasks, which measures itself.

    Args:
        pipeline: what is to be measured.
        recorded: source to the file that is read in its place, as `backfill` takes them.
        folder: where each process of a task leaves a `Report` when it is closed.
        messages: each process of a source ends after so many. None: when its stream does.

    Raises:
        UnknownName: there is no such source.
        BadValue: the suffix of a file is none that can be read.
    """
    made = pipeline.emptied()
    check_names(pipeline, "source", recorded, pipeline.declared)
    inputs = {part.name: part.inputs for part in pipeline.graph().parts}
    for each in pipeline.declared:
        if each.kind == "source":
            made.declare(_source(each, recorded.get(each.name), messages))
        elif each.kind == "task":
            made.declare(_task(each, inputs[each.name], folder, in_step=not recorded))
    return made


@dataclass
class Sent:
    """What one producer has sent, as far as it is still kept.

    Attributes:
        messages: how many are kept.
        newest: how many of them have the newest event time.
        moments: how often the event time was another one than that of the message before; where they are in order, how many there are.
        squares: of the times from one to the next, in ns, added up.
        sequence: of the last one.
        timed: whether it has event times of its own.
    """

    messages: int = 0
    bytes: int = 0
    oldest_ns: int = 2**63
    newest_ns: int = -(2**63)
    newest: int = 0
    moments: int = 0
    last_ns: int | None = None
    squares: float = 0.0
    sequence: int = 0
    timed: bool = False

    def add(self, header: Header) -> None:
        """Takes the next one."""
        event_ns = header.event_ns
        self.messages += 1
        self.bytes += header.size
        if event_ns > self.newest_ns:
            self.newest_ns, self.newest = event_ns, 0
        self.newest += event_ns == self.newest_ns
        self.moments += event_ns != self.last_ns
        self.squares += 0.0 if self.last_ns is None else (event_ns - self.last_ns) ** 2.0
        self.oldest_ns, self.last_ns = min(self.oldest_ns, event_ns), event_ns
        self.sequence, self.timed = header.sequence, header.time_kind != TimeKind.ARRIVAL

    @property
    def paced(self) -> bool:
        """Whether the times from one to the next are nearly all the same."""
        count, took_ns = self.messages - 1, self.newest_ns - self.oldest_ns
        return self.moments == self.messages > 2 and self.squares * count / took_ns**2 - 1 < _PACED


def source_cost(producers: Collection[Sent], first_ns: int) -> SourceCost | None:
    """The rate and the size of what the processes of a source sent, and when it began after `first_ns`; None: its event times tell no
    rate."""
    if not producers or any(sent.newest_ns == sent.oldest_ns for sent in producers):
        return None
    return SourceCost(
        # How long the newest ones are to last is not known, one or a bunch of one time: they end the time that the others took.
        rate_hz=sum((sent.messages - sent.newest) / (sent.newest_ns - sent.oldest_ns) * 1e9 for sent in producers),
        bytes=_mean_size(producers),
        phase_ms=(min(sent.oldest_ns for sent in producers) - first_ns) / 1e6 if [sent.paced for sent in producers] == [True] else None,
        messages=sum(sent.sequence + 1 for sent in producers),  # a source counts from 0
    )


def task_cost(reports: Collection[Report], producers: Collection[Sent], warm_up: int) -> TaskCost | None:
    """What the processes of a task noted, without the first `warm_up` runs of each; None: there were no others."""
    cpu_s = sorted(ns / 1e9 for report in reports for ns in report.cpu_ns[warm_up:])
    if not cpu_s:
        return None
    return TaskCost(
        cpu_s=sum(cpu_s) / len(cpu_s),
        cpu_s_quantiles={q: cpu_s[math.ceil(float(q) * len(cpu_s)) - 1] for q in QUANTILES},
        memory_bytes=max(report.memory_bytes for report in reports),
        output_bytes=_mean_size(producers),
        outputs_per_run=sum(sent.sequence for sent in producers) / sum(report.runs for report in reports),  # a task counts from 1
        runs=len(cpu_s),
    )


def _mean_size(producers: Collection[Sent]) -> float:
    return sum(sent.bytes for sent in producers) / max(sum(sent.messages for sent in producers), 1)


# Sinks are gone, and with them who takes what together.
_TOPICS = ("topic", "topic_in", "topic_out")


def _without(each: Declared, keywords: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in each.keywords.items() if name not in keywords}


# --- sources ----------------------------------------------------------------------------------------------------------


def _source(each: Declared, path: Path | None, messages: int | None) -> Declared:
    if path is not None:
        each = reading(each, path)
    elif each.args is not None:
        each = replace(each, args={name: value for name, value in each.args.items() if name != "position"})

    def stream(replica: int = 0) -> Any:
        return _cut(make_stream(each, replica), messages)

    return replace(each, function=stream, args=None, keywords=_without(each, (*LOGS, *_TOPICS)))


def _cut(stream: Any, messages: int | None) -> Any:
    """The first of a stream's items; all if it is not said how many."""
    if isinstance(stream, Source):
        return _Placeless(stream, messages)
    if messages is None:
        return stream
    if isinstance(stream, AsyncIterable):
        return _first(stream, messages)
    return itertools.islice(stream, messages) if isinstance(stream, Iterable) else stream


async def _first(stream: AsyncIterable[Any], messages: int) -> AsyncIterator[Any]:
    async for item in stream:
        yield item
        messages -= 1
        if not messages:
            return


class _Placeless(Source):
    """A source that begins where it is told to, and never says how far it has come: that is for who reads it in earnest."""

    resumable = False

    def __init__(self, stream: Source, messages: int | None) -> None:
        self._stream, self._left = stream, messages
        self.event_time, self.message_id = (getattr(stream, name, None) for name in ("event_time", "message_id"))

    def __next__(self) -> Any:
        if self._left == 0:
            raise StopIteration
        item = next(self._stream)
        if self._left is not None and item is not None:
            self._left -= 1
        return item

    def wake(self) -> None:
        self._stream.wake()

    def commit(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._stream.close()


# --- tasks ------------------------------------------------------------------------------------------------------------


def _task(each: Declared, inputs: tuple[str, ...], folder: Path, *, in_step: bool) -> Declared:
    def task(replica: int) -> Any:
        return _Noting(make_task(each, inputs, replica), inputs, each.name, folder)

    keywords = _without(each, (*LOGS, *_TOPICS, "ftp_delete", *(() if in_step else (*BY_THE_CLOCK, "backlog", "max_backlog"))))
    if not in_step and (keywords.get("join") == "exact" or keywords.get("by") is not None):
        keywords |= HOLDS_ALL
    return replace(each, function=task, before=(), args={}, inputs=inputs, keywords=keywords)


class _Noting(Renamed):
    """A task that notes when each of its runs starts, in cpu time, and leaves a report when it is closed."""

    def __init__(self, task: Any, inputs: tuple[str, ...], name: str, folder: Path) -> None:
        super().__init__(task, inputs)
        self._name, self._folder = name, folder
        self._cpu_ns, self._wall_ns = array("q"), array("q")
        self._close_task = vars(self).pop("close", None)

    def __call__(self, *values: Any) -> Any:
        self._cpu_ns.append(_cpu_ns())
        self._wall_ns.append(time.perf_counter_ns())
        return self._call(*values)

    def close(self) -> Any:
        """Writes the report, then closes the task."""
        cycles = [after - before for before, after in itertools.pairwise(self._cpu_ns)]
        wall_ns = self._wall_ns[-1] - self._wall_ns[0] if self._wall_ns else 0
        report = Report(self._name, len(self._cpu_ns), cycles, wall_ns, _peak_memory())
        (self._folder / f"{self._name}.{os.getpid()}").write_bytes(msgspec.msgpack.encode(report))
        return None if self._close_task is None else self._close_task()


def _cpu_ns() -> int:
    """What all threads of this process have used, and the processes that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time_ns() + int((children.ru_utime + children.ru_stime) * 1e9)


def _peak_memory() -> int:
    """The most bytes that this process held at a time. What getrusage says begins with those of the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


__all__ = ("Report", "Sent", "measured", "source_cost", "task_cost")
