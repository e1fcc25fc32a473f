"""Results as frames: the gate, the header, the id that is the same whoever computes the result, and when."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from edgeserve.core.codec import encode_frame
from edgeserve.core.message import WATERMARK_END, Header, Key, Kind, TimeKind, result_id
from edgeserve.core.metrics import Counters, Reason
from edgeserve.core.payload import encode_sized
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.send import too_large
from edgeserve.stage.task import Several
from edgeserve.transport import Buffer, Frame

Emit: TypeAlias = Callable[..., tuple[Any, "Frame | Frames | None"]]
"""(result, id of the input or set, event time, oldest event time, watermark, key) to (what `next` returns, what is published)."""


class Frames(list[Frame]):
    """The frames of a generator's results, told from the list of buffers that one large frame is."""


class Emitter:
    """Makes the messages of one producer's incarnation.

    Attributes:
        output_id: their source id.
        max_frame_bytes: more is refused, as the node would; None: no bound.
    """

    def __init__(
        self,
        output_id: str,
        group: str,
        gate_out: Callable[[Any], Any] | None,
        counts: Counters,
        *,
        payloads: Payloads | None = None,
        task_version: str = "",
    ) -> None:
        self._task_version, self._payloads = task_version, payloads
        self.output_id, self._group, self._gate_out, self._counts = output_id, group.encode(), gate_out, counts
        self._producer = os.urandom(8).hex()
        self._sequence = itertools.count(1)  # atomic: ends may be made by another thread
        self.max_frame_bytes: int | None = None

    def make(self) -> Emit:
        """The function that turns a result into what is published."""
        gate_out, output_id, producer, group, now_ns = self._gate_out, self.output_id, self._producer, self._group, time.time_ns
        computed, version, payloads = int(TimeKind.COMPUTED), self._task_version, self._payloads
        lazy_bytes = math.inf if payloads is None else payloads.lazy_bytes

        def emit(
            value: Any, of: bytes, event_ns: int, oldest_ns: int, watermark_ns: int | None, key: Key, index: int = 0
        ) -> tuple[Any, Frame | Frames | None]:
            if type(value) is Several:
                return several(value, of, event_ns, oldest_ns, watermark_ns, key)
            if gate_out is not None:
                value = gate_out(value)
                if value is None:
                    self._counts.count(Reason.GATE, edge=output_id)
                    return None, None
            schema, payload, size = encode_sized(value)
            slot = None
            if size >= lazy_bytes and payloads is not None:
                schema, payload, slot = payloads.put(schema, payload, size)
            sequence = next(self._sequence)
            id_ = result_id(group, of, index)
            header = Header(
                id_, output_id, producer, sequence, event_ns, now_ns(), schema, size, watermark_ns, key, 0, computed, oldest_ns, version
            )
            if slot is not None and payloads is not None:
                return value, payloads.framed(header, payload, slot)
            frame = encode_frame(header, payload)
            if not isinstance(frame, bytes):
                self._check(frame)
            return value, frame

        def several(
            values: Several, of: bytes, event_ns: int, oldest_ns: int, watermark_ns: int | None, key: Key
        ) -> tuple[list[Any], Frames]:
            pairs: list[Any] = []
            try:
                for index, value in enumerate(values):
                    pairs.append(emit(value, of, event_ns, oldest_ns, watermark_ns, key, index))
            except BaseException:
                if payloads is not None:
                    payloads.drop([frame for _, frame in pairs])  # all are made again, or none
                raise
            return [value for value, frame in pairs if frame is not None], Frames(frame for _, frame in pairs if frame is not None)

        return emit

    def _check(self, frame: Sequence[Buffer]) -> None:
        limit = self.max_frame_bytes
        if limit is not None and (length := sum([len(part) for part in frame])) > limit:
            raise too_large(f"{self.output_id!r}", length, limit)

    def set_frame(self, of: bytes, event_ns: int, payload: Sequence[Buffer]) -> Frame:
        """The message of a set that some replica is to run."""
        size = sum([memoryview(part).nbytes for part in payload])
        header = Header(
            of,
            self.output_id,
            self._producer,
            next(self._sequence),
            event_ns,
            time.time_ns(),
            size=size,
            kind=int(Kind.SET),
            time_kind=int(TimeKind.COMPUTED),
        )
        frame = encode_frame(header, payload)
        if not isinstance(frame, bytes):
            self._check(frame)
        return frame

    def end_id(self, of: bytes) -> bytes:
        """The id of the end that is sent on for the last source's, whose id is `of`: the same whoever sends it, and when."""
        return result_id(self._group, of, 0)

    def end(self, id_: bytes) -> Frame:
        """The header that says that no results will follow."""
        now = time.time_ns()
        header = Header(
            id_,
            self.output_id,
            self._producer,
            next(self._sequence),
            now,
            now,
            watermark_ns=WATERMARK_END,
            kind=int(Kind.END),
            time_kind=int(TimeKind.COMPUTED),
        )
        return encode_frame(header, b"")


__all__ = ("Emit", "Emitter", "Frames")
