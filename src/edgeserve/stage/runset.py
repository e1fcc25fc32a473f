"""Running a task on a set: payloads decoded only now, the call, its retries, its results as frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec

from edgeserve.align import JoinSet
from edgeserve.core.codec import check_key
from edgeserve.core.errors import ClosedError
from edgeserve.core.message import WATERMARK_END, Header, set_id
from edgeserve.core.payload import decode_value, decoder_for
from edgeserve.payload import LAZY
from edgeserve.stage.base import Options, Raised
from edgeserve.stage.context import CURRENT, Current
from edgeserve.stage.control import Control
from edgeserve.stage.emit import Emitter, Frames
from edgeserve.stage.payloads import LAZY_BYTES
from edgeserve.stage.retry import GaveUp, try_again
from edgeserve.stage.settle import flattened
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.task import DEFERRED, Task
from edgeserve.transport import Buffer, Frame

_FAR_PAST = -(2**63)


class Input(msgspec.Struct, gc=False):
    """A message that the join has taken, until it is acknowledged. A Struct, because there is one per message.

    Attributes:
        uses: how many sets with it are due.
        released: whether the policy has let go of it.
        decided: whether it has had its turn, so that its id is among the settled ones, or will be with the next settlement.
        value: what `gate_in` made of it.
    """

    header: Header
    payload: bytes | memoryview
    position: int
    frame: Buffer
    deliveries: int
    uses: int = 0
    value: Any = None
    released: bool = False
    decided: bool = False


Outcome: TypeAlias = tuple[Any, bytes, list[bytes], "Frame | Frames | None", tuple[str, Frame] | None]
"""What became of a set: (result, set id, its members' ids, what is published, dead letter)."""

GiveUp: TypeAlias = Callable[[Sequence[Input], GaveUp], tuple[tuple[str, Frame], Raised | None]]


class RunSet:
    """Calls the task on sets.

    Attributes:
        current: what `edgeserve.context()` tells the task.
        parameters: the sources, in the order of the task's parameters.
        topic: where they are published.
        output_id: source id of the results.
        verbose: the log of messages that make no set due.
        gated: whether inputs pass a `gate_in` when they arrive.
        screened: whether inputs have to be looked at when they arrive: see `screen`.
    """

    def __init__(
        self,
        options: Options,
        control: Control,
        *,
        task: Task,
        emitter: Emitter,
        gate_in: Callable[[Any], Any] | None,
        by: Callable[[Any], Any] | None = None,
        logs: tuple[StepLog | None, StepLog | None],
        topic: str,
        verbose: bool = False,
    ) -> None:
        self.topic = topic
        self.verbose = logs[0] if verbose else None
        self._options, self._control = options, control
        self.current = Current()
        self._task, self._emitter, self._gate_in, self._by, self._logs = task, emitter, gate_in, by, logs
        self.parameters, self.output_id, self.gated = task.parameters, emitter.output_id, gate_in is not None
        self.screened = self.gated or by is not None
        self._decoders = [decoder_for(task.annotations.get(name, Any), source=name) for name in task.parameters]
        self._decoder_of = dict(zip(task.parameters, self._decoders, strict=True))
        self._emit = emitter.make()

    @property
    def part(self) -> None:
        """See `Sets`: all messages are for the one join."""

    def open(self, max_frame_bytes: int | None) -> None:
        """Sets the task up, for a node that takes messages of this size."""
        self._emitter.max_frame_bytes = max_frame_bytes
        self._task.open()

    def close(self) -> None:
        """Closes the task."""
        self._task.close()

    def end_frame(self, id_: bytes) -> Frame:
        """What says downstream that no results will follow."""
        return self._emitter.end(id_)

    def end_frames(self, _position: int, of: bytes) -> list[Frame]:
        """See `Way`."""
        return [self.end_frame(self._emitter.end_id(of))]

    def screen(self, item: Input) -> bool:
        """Runs `gate_in` on an input, then the function of `by=`, whose key replaces the header's; False: the gate drops the input."""
        header = item.header
        CURRENT.get().headers = header  # of the thread that aligns
        if self._gate_in is not None:
            item.value = self._gate_in(decode_value(*self._fetched(item)))
            if item.value is None:
                return False
        if self._by is not None:
            # What is decoded for it is not kept: it may write to that, and a set is decoded anew for each attempt.
            decode = self._decoder_of[header.source_id]
            key = self._by(decode(*self._fetched(item)) if item.value is None else item.value)
            check_key(key, "the function of by=")
            header.key = key
        return True

    def _fetched(self, item: Input) -> tuple[str, bytes | memoryview]:
        """Schema tag and payload of an input, from where it lies."""
        header, schema = item.header, item.header.schema
        if header.size >= LAZY_BYTES and item.position >= 0:  # in a set for a replica it is no message of the topic
            self._options.payloads.used(header)
        return self._options.payloads.fetch(schema, item.payload) if schema[:2] == LAZY else (schema, item.payload)

    def make(self, give_up: GiveUp) -> Callable[[JoinSet, int | None], Outcome]:
        """The function that runs a set, again if need be; what cannot be run is put aside. A closure: it runs for every set."""
        gather, current, attempt, options, control = self._make_gather(), self.current, self._make_attempt(), self._options, self._control
        backoff_s = options.retry_backoff_ms / 1000

        def run(joined: JoinSet, promise_ns: int | None) -> Outcome:
            inputs, headers, ids, event_ns, oldest_ns = gather(joined[0])
            of = current.join_id
            if promise_ns is not None and promise_ns > event_ns:
                promise_ns = None if promise_ns == WATERMARK_END else event_ns
            try:
                result, frames = attempt(inputs, headers, of, event_ns, oldest_ns, promise_ns)
            except Exception as error:
                if isinstance(error, ClosedError) and control.closing.is_set():
                    raise
                again = partial(attempt, inputs, headers, of, event_ns, oldest_ns, promise_ns)
                try:
                    result, frames = try_again(error, again, retries=options.retries, backoff_s=backoff_s, control=control)
                except GaveUp as gave_up:
                    aside, raised = give_up([item for item in inputs if item is not None], gave_up)
                    return raised, of, ids, None, aside
            return result, of, ids, frames, None

        return run

    def make_once(self) -> Callable[[JoinSet], tuple[Any, Frame | Frames | None]]:
        """The function that runs a set that another replica may have made, once: (result, what is published)."""
        gather, current, attempt = self._make_gather(), self.current, self._make_attempt()

        def once(joined: JoinSet) -> tuple[Any, Frame | Frames | None]:
            again = current.redelivered
            inputs, headers, _, event_ns, oldest_ns = gather(joined[0])
            current.redelivered = current.redelivered or again
            return attempt(inputs, headers, current.join_id, event_ns, oldest_ns, None)

        return once

    def _make_gather(self) -> Callable[[Mapping[str, Any]], tuple[list[Input | None], list[Header], list[bytes], int, int]]:
        """The function that puts a set's members in the task's order, and says in `current` what they are: (inputs, headers, ids, newest
        event time, oldest event time)."""
        parameters, current = self.parameters, self.current

        def gather(members: Mapping[str, Any]) -> tuple[list[Input | None], list[Header], list[bytes], int, int]:
            inputs: list[Input | None] = []
            headers: list[Header] = []
            ids: list[bytes] = []
            redelivered, event_ns, oldest_ns = False, _FAR_PAST, WATERMARK_END
            for name in parameters:
                member = members.get(name)
                if member is None:
                    inputs.append(None)
                    continue
                item = member[1]
                header = item.header
                inputs.append(item)
                headers.append(header)
                ids.append(header.id)
                if item.deliveries:
                    redelivered = True
                member_ns, member_oldest_ns = header.event_ns, header.oldest_ns
                if member_ns > event_ns:
                    event_ns = member_ns
                if member_oldest_ns is None:
                    member_oldest_ns = member_ns
                if member_oldest_ns < oldest_ns:
                    oldest_ns = member_oldest_ns
            current.headers, current.join_id, current.redelivered = headers, set_id(ids), redelivered
            if len(headers) != len(inputs) or current.missing:
                current.missing = tuple([n for n in parameters if members.get(n) is None])
            return inputs, headers, ids, event_ns, oldest_ns

        return gather

    def _make_attempt(self) -> Callable[..., tuple[Any, Frame | Frames | None]]:
        decoders, call, finish, emit, (steps, outputs) = self._decoders, self._task.call, self._task.finish, self._emit, self._logs
        fetched, payloads = self._fetched, self._options.payloads

        def attempt(
            inputs: Sequence[Input | None], headers: Sequence[Header], of: bytes, event_ns: int, oldest_ns: int, promise_ns: int | None
        ) -> tuple[Any, Frame | Frames | None]:
            values: list[Any] = []
            for decode, item in zip(decoders, inputs):  # noqa: B905  as many as there are parameters
                if item is None:
                    values.append(None)
                elif item.value is None:
                    header, schema = item.header, item.header.schema
                    large = header.size >= LAZY_BYTES or (":" in schema and schema[:2] == LAZY)
                    values.append(decode(*fetched(item)) if large else decode(schema, item.payload))
                else:
                    values.append(item.value)
            start_ns = 0 if steps is None else time.time_ns()
            result = call(*values)
            if type(result) in DEFERRED:
                result = finish(result)
            if steps is not None:
                steps.write(**_line(of, headers), start_ns=start_ns, end_ns=time.time_ns())
            if result is None:
                return None, None
            key = headers[0].key
            if key is not None:
                for header in headers:
                    if header.key != key:
                        key = None
            value, frames = emit(result, of, event_ns, oldest_ns, promise_ns, key)
            if outputs is not None and frames is not None:
                try:
                    outputs.write(**_line(of, headers), sent_ns=time.time_ns(), results=len(frames) if type(frames) is Frames else 1)
                except BaseException:
                    payloads.drop(flattened([frames]))
                    raise
            return value, frames

        return attempt


def _line(of: bytes, headers: Sequence[Header]) -> dict[str, Any]:
    return {
        "set_id": of.hex(),
        "input_ids": [h.id.hex() for h in headers],
        "source_ids": [h.source_id for h in headers],
        "event_ns": [h.event_ns for h in headers],
    }


__all__ = ("Input", "RunSet")
