"""Running a task on a set: payloads decoded only now, the call, its retries, its results as frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from edgeserve.align import JoinSet
from edgeserve.core.errors import ClosedError
from edgeserve.core.message import WATERMARK_END, Header, set_id
from edgeserve.core.payload import decode_value, decoder_for
from edgeserve.stage.base import Options, Raised
from edgeserve.stage.context import Current
from edgeserve.stage.emit import Emitter, Frames
from edgeserve.stage.retry import GaveUp, try_again
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.task import DEFERRED, Task
from edgeserve.transport import Buffer, Frame

_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much, and this is once per set


class Input:
    """A message that the join has taken, until it is acknowledged.

    Attributes:
        uses: how many sets with it are due.
        released: whether the policy has let go of it.
        decided: whether it has had its turn, so that its id is among the settled ones, or will be with the next settlement.
        value: what `gate_in` made of it.
    """

    __slots__ = ("decided", "deliveries", "frame", "header", "payload", "position", "released", "uses", "value")

    def __init__(self, header: Header, payload: memoryview, position: int, frame: Buffer, deliveries: int) -> None:
        self.header, self.payload, self.position, self.frame, self.deliveries = header, payload, position, frame, deliveries
        self.uses = 0
        self.value: Any = None
        self.released = self.decided = False


class Outcome(NamedTuple):
    """What became of a set."""

    result: Any
    set_id: bytes
    ids: list[bytes]
    frames: Frame | Frames | None
    aside: tuple[str, Frame] | None


GiveUp: TypeAlias = Callable[[Sequence[Input], GaveUp], tuple[tuple[str, Frame], Raised | None]]


class RunSet:
    """Calls the task on sets.

    Attributes:
        current: what `edgeserve.context()` tells the task.
        parameters: the sources, in the order of the task's parameters.
        output_id: source id of the results.
        gated: whether inputs pass a `gate_in` when they arrive.
    """

    def __init__(
        self,
        options: Options,
        closing: threading.Event,
        *,
        task: Task,
        emitter: Emitter,
        gate_in: Callable[[Any], Any] | None,
        logs: tuple[StepLog | None, StepLog | None],
    ) -> None:
        self._options, self._closing = options, closing
        self.current = Current()
        self._task, self._emitter, self._gate_in, self._logs = task, emitter, gate_in, logs
        self.parameters, self.output_id, self.gated = task.parameters, emitter.output_id, gate_in is not None
        self._decoders = [decoder_for(task.annotations.get(name, Any), source=name) for name in task.parameters]
        self._emit = emitter.make()

    def open(self) -> None:
        """Sets the task up."""
        self._task.open()

    def close(self) -> None:
        """Closes the task."""
        self._task.close()

    def end_frame(self) -> Frame:
        """What says downstream that no results will follow."""
        return self._emitter.end(time.time_ns())

    def gate(self, item: Input) -> bool:
        """Runs `gate_in` on an input; False: it drops the input."""
        assert self._gate_in is not None
        item.value = self._gate_in(decode_value(item.header.schema, item.payload))
        return item.value is not None

    def __call__(self, joined: JoinSet, promise_ns: int | None, give_up: GiveUp) -> Outcome:
        """Runs one set, again if need be; what cannot be run is put aside."""
        members = joined[0]
        inputs: list[Input | None] = []
        headers: list[Header] = []
        ids: list[bytes] = []
        redelivered = 0
        for name in self.parameters:
            member = members.get(name)
            if member is None:
                inputs.append(None)
                continue
            item = member[1]
            header = item.header
            inputs.append(item)
            headers.append(header)
            ids.append(header.id)
            redelivered += item.deliveries
        of = set_id(ids)
        current = self.current
        current.headers, current.join_id, current.redelivered = headers, of, redelivered > 0
        complete = len(headers) == len(inputs)
        current.missing = () if complete else tuple(n for n in self.parameters if members.get(n) is None)
        try:
            result, frames = self._attempt(inputs, headers, of, promise_ns)
        except Exception as error:
            if isinstance(error, ClosedError) and self._closing.is_set():
                raise
            try:
                o = self._options
                result, frames = try_again(
                    error,
                    lambda: self._attempt(inputs, headers, of, promise_ns),
                    retries=o.retries,
                    backoff_s=o.retry_backoff_ms / 1000,
                    closing=self._closing,
                )
            except GaveUp as gave_up:
                aside, raised = give_up([item for item in inputs if item is not None], gave_up)
                return _new(Outcome, (raised, of, ids, None, aside))
        return _new(Outcome, (result, of, ids, frames, None))

    def _attempt(
        self, inputs: Sequence[Input | None], headers: Sequence[Header], of: bytes, promise_ns: int | None
    ) -> tuple[Any, Frame | Frames | None]:
        values = [
            None if item is None else decode(item.header.schema, item.payload) if item.value is None else item.value
            for decode, item in zip(self._decoders, inputs, strict=True)
        ]
        start_ns = time.time_ns() if self._logs[0] is not None else 0
        result = self._task.call(*values)
        if type(result) in DEFERRED:
            result = self._task.finish(result)
        if self._logs[0] is not None:
            self._logs[0].write(**_line(of, headers), start_ns=start_ns, end_ns=time.time_ns())
        if result is None:
            return None, None
        first = headers[0]
        event_ns, key = first.event_ns, first.key
        oldest_ns = event_ns if first.oldest_ns is None else first.oldest_ns
        for h in headers[1:]:
            if h.event_ns > event_ns:
                event_ns = h.event_ns
            older_ns = h.event_ns if h.oldest_ns is None else h.oldest_ns
            if older_ns < oldest_ns:
                oldest_ns = older_ns
            if h.key != key:
                key = None
        if promise_ns is not None:
            promise_ns = None if promise_ns == WATERMARK_END else min(promise_ns, event_ns)
        value, frames = self._emit(result, of, event_ns, oldest_ns, promise_ns, key)
        if self._logs[1] is not None and frames is not None:
            self._logs[1].write(**_line(of, headers), sent_ns=time.time_ns(), results=len(frames) if type(frames) is Frames else 1)
        return value, frames


def _line(of: bytes, headers: Sequence[Header]) -> dict[str, Any]:
    return {
        "set_id": of.hex(),
        "input_ids": [h.id.hex() for h in headers],
        "source_ids": [h.source_id for h in headers],
        "event_ns": [h.event_ns for h in headers],
    }


__all__ = ("Input", "Outcome", "RunSet")
