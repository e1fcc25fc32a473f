"""A task of one parameter."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters, Reason
from edgeserve.core.payload import decoder_for
from edgeserve.payload import LAZY
from edgeserve.stage.base import Options
from edgeserve.stage.control import Control
from edgeserve.stage.direct import Direct, Perform
from edgeserve.stage.emit import Emitter, Frames
from edgeserve.stage.payloads import LAZY_BYTES
from edgeserve.stage.settle import flattened
from edgeserve.stage.steplog import StepLog
from edgeserve.stage.task import DEFERRED, Task
from edgeserve.transport import Frame, Transport


class SingleTask(Direct):
    """Runs the task on every message of its source and publishes the results."""

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        task: Task,
        emitter: Emitter,
        topic_out: str,
        gate_in: Callable[[Any], Any] | None,
        logs: tuple[StepLog | None, StepLog | None],
    ) -> None:
        super().__init__(options, control, counts)
        self._source = task.parameters[0]
        self._topic_out = topic_out
        self._task, self._emitter, self._gate_in, self._logs = task, emitter, gate_in, logs
        annotation = task.annotations.get(self._source, Any) if gate_in is None else Any
        self._decode = decoder_for(annotation, source=self._source)

    def open(self, transport: Transport) -> None:
        self._emitter.max_frame_bytes = transport.capabilities.max_frame_bytes
        super().open(transport)

    def _prepare(self) -> None:
        self._task.open()

    def _make_perform(self) -> Perform:
        decode, gate_in, call, finish, emit = self._decode, self._gate_in, self._task.call, self._task.finish, self._emitter.make()
        take = self.options.payloads.take

        def perform(header: Header, payload: bytes | memoryview, watermark_ns: int | None) -> tuple[Any, Frame | Frames | None]:
            schema = header.schema
            # The look that takes longest comes last: this runs for every message.
            if header.size >= LAZY_BYTES or (":" in schema and schema[:2] == LAZY):
                schema, payload = take(header, payload)
            value = decode(schema, payload)
            if gate_in is not None:
                value = gate_in(value)
                if value is None:
                    self._counts.count(Reason.GATE, edge=header.source_id)
                    return None, None
            result = call(value)
            if type(result) in DEFERRED:
                result = finish(result)
            if result is None:
                return None, None
            event_ns, oldest_ns = header.event_ns, header.oldest_ns
            return emit(
                result,
                header.id,
                event_ns,
                event_ns if oldest_ns is None else oldest_ns,
                watermark_ns if self._in_order else None,
                header.key,
            )

        return perform if self._logs == (None, None) else self._logged(perform)

    def _logged(self, perform: Perform) -> Perform:
        steps, outputs = self._logs

        def logged(header: Header, payload: bytes | memoryview, watermark_ns: int | None) -> tuple[Any, Frame | Frames | None]:
            start_ns = time.time_ns()
            result, produced = perform(header, payload, watermark_ns)
            end_ns = time.time_ns()
            line = {"input_ids": [header.id.hex()], "source_ids": [header.source_id], "event_ns": header.event_ns}
            if steps is not None:
                steps.write(**line, start_ns=start_ns, end_ns=end_ns)
            if outputs is not None and produced is not None:
                try:
                    outputs.write(**line, sent_ns=end_ns, results=len(produced) if type(produced) is Frames else 1)
                except BaseException:
                    self.options.payloads.drop(flattened([produced]))
                    raise
            return result, produced

        return logged

    def _end_frame(self, of: bytes) -> Frame | None:
        return self._emitter.end(self._emitter.end_id(of))

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._task.close()


__all__ = ("SingleTask",)
