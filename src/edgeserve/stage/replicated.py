"""A task of several parameters and its replicas: one of them holds the join, all of them run its sets.

A replica that is alone runs the sets that are due itself. As soon as there are others the holder makes a message of each set, in the
settlement that decides its inputs, and the replicas share these as they would the messages of one source. The holder aligns in a thread of
its own then, so that no task, however slow, keeps the others waiting for sets.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from edgeserve.align import Policy
from edgeserve.core.errors import TransportError
from edgeserve.core.metrics import Counters
from edgeserve.stage.base import Options, Steps
from edgeserve.stage.control import Control
from edgeserve.stage.decisions import work_topic
from edgeserve.stage.emit import Emitter
from edgeserve.stage.join import Join
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.runset import RunSet
from edgeserve.stage.sets import Packer
from edgeserve.stage.settask import SetTask, backlog
from edgeserve.transport import Transport

_log = logging.getLogger("edgeserve")


class _Mode(Enum):
    ALONE = auto()
    """The join runs its sets itself."""
    SHARED = auto()
    """There are other replicas: sets go through the topic that they share."""
    DRAINED = auto()
    """This one is alone again, and there are sets left."""


class _Aligner:
    """Runs a join in a thread of its own until it is halted or meets an error."""

    def __init__(self, join: Join, wake: Callable[[], None], name: str) -> None:
        self._join, self._wake = join, wake
        self.halted = self._ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"edgeserve-align-{name}", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._join.leaves = lambda: self.halted
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether nothing will come of it any more; also of one that could not be started."""
        return self._ended or not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._join.run(None)
        except BaseException as exc:
            self.error = exc
        self._ended = True
        self._wake()

    def end(self) -> None:
        """Asks it to end after what it has in hand."""
        self.halted = True
        self._join.wake()

    def halt(self) -> None:
        """Ends it. Idempotent."""
        self.halted = True
        while self._thread.is_alive():
            self._join.wake()
            self._thread.join(0.05)


class Replicated(Steps):
    """Runs a task of several parameters on as many replicas as there are.

    Args:
        emitter: makes the messages of sets.
    """

    def __init__(
        self,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        run_set: RunSet,
        make_policy: Callable[[], Policy],
        emitter: Emitter,
    ) -> None:
        self._options, self._control, self._counts, self._run_set, self._emitter = options, control, counts, run_set, emitter
        self._topic = work_topic(options.topics[0], options.group)
        self._join = Join(options, control, counts, run_set=run_set, make_policy=make_policy)
        self._packer = Packer(self._topic, run_set.parameters, emitter, gated=run_set.gated, payloads=options.payloads)
        self._patience = Patience(options.name, control)
        self._sets: SetTask | None = None
        self._aligner: _Aligner | None = None
        self._mode = _Mode.ALONE
        # Results of sets from the topic, while it was subscribed to before.
        self._sent = 0
        self._transport: Transport

    # --- what a node calls --------------------------------------------------------------------------------------

    def open(self, transport: Transport) -> None:
        self._transport = transport
        self._emitter.max_frame_bytes = transport.capabilities.max_frame_bytes
        self._join.open(transport)
        try:
            if self._may_be_left():
                self._open_sets()
                self._mode = _Mode.DRAINED
            self._turn()
        except BaseException:
            self.close()
            raise

    def _may_be_left(self) -> bool:
        """Whether there are sets that others have made; also where that cannot be asked."""
        try:
            return backlog(self._transport, self._topic, self._options.group) > 0
        except TransportError as exc:
            _log.warning("%s %r cannot ask for what is left of its sets, and looks itself: %s", self._options.what, self._options.name, exc)
            return True

    def next(self) -> Any:
        while True:
            self._turn()
            try:
                return self._stage.next()
            except StopIteration:
                if self._control.stopping():
                    raise

    def run(self, until: str | None) -> None:
        while True:
            try:
                self._turn()
            except NO_ROOM as exc:  # to join a group, and to settle, are writes too
                if not self._patience.wait(exc):
                    raise
                continue
            if self._patience.troubled:
                self._patience.over()
            stage = self._stage
            stage.run(until)
            if self._control.stopping() or (until == "end" and stage.has_ended()):
                return

    def flush(self) -> None:
        if self._sets is not None:
            self._sets.flush()
        if self._mode is _Mode.ALONE:
            self._join.flush()

    def close(self) -> None:
        try:
            self._halt()
        finally:
            try:
                self._close_sets()
            finally:
                self._join.close()

    def wake(self) -> None:
        for stage in (self._join, self._sets):
            if stage is not None:
                stage.wake()

    def explain(self) -> dict[str, Any]:
        return self._join.explain() | {"shares_sets": self._mode is not _Mode.ALONE}

    def totals(self) -> dict[str, int]:
        totals = self._join.totals()
        sets = self._sets
        if sent := self._sent + (0 if sets is None else sets.totals()["sent"]):
            totals["sent"] = totals.get("sent", 0) + sent
        return totals

    # --- which way sets go --------------------------------------------------------------------------------------

    @property
    def _stage(self) -> Join | SetTask:
        return self._join if self._sets is None or self._mode is _Mode.ALONE else self._sets

    def _turn(self) -> None:
        """Between two steps: goes over to another mode if it is time, and raises what the aligning thread has met."""
        aligner = self._aligner
        if aligner is not None and aligner.over:
            self._aligner = None
            if aligner.error is not None:
                raise aligner.error
            aligner = None
        if self._control.stopping():
            return
        if aligner is None:
            self._join.come_back()
        if self._join.shared():
            if aligner is None:
                sets = self._sets or self._open_sets()
                sets.drain(False)
                if self._mode is _Mode.ALONE:
                    self._join.flush()  # an end that goes by way of the sets must not overtake results that did not
                self._join.hand_to(self._packer)
                self._mode = _Mode.SHARED
                self._aligner = _Aligner(self._join, self.wake, self._options.name)
                self._aligner.start()
        elif aligner is not None:
            aligner.end()  # and sets go on meanwhile: it may wait for the room that they take
        else:
            if self._mode is _Mode.SHARED:
                self._mode = _Mode.DRAINED
            if self._mode is _Mode.DRAINED and self._sets is not None:
                self._sets.drain(True)
                if self._sets.drained:
                    self._mode = _Mode.ALONE
            if self._mode is _Mode.ALONE:
                self._close_sets()
                self._join.hand_to(self._run_set)
                self._join.leaves = self._join.shared

    def _turns(self) -> bool:
        """Whether `_turn` has something to do; asked while there are no sets."""
        aligner = self._aligner
        if aligner is None:
            return self._join.shared() or self._sets is None or self._sets.drained
        return aligner.over or not (aligner.halted or self._join.shared())

    def _open_sets(self) -> SetTask:
        sets = SetTask(
            self._options,
            self._control,
            self._counts,
            topic=self._topic,
            run_set=self._run_set,
            has_ended=self._join.has_ended,
            never_seen=self._join.never_seen,
            flush_join=self._join.flush_settled,
        )
        sets.open(self._transport)
        sets.leaves = self._turns
        self._sets = sets
        self._share(True)
        return sets

    def _close_sets(self) -> None:
        sets = self._sets
        if sets is not None:
            try:
                sets.close()
            finally:
                self._sent += sets.totals()["sent"]
                self._sets = None
                self._share(False)

    def _share(self, shared: bool) -> None:
        if self._options.payloads.files is not None:
            self._options.payloads.files.shared = shared

    def _halt(self) -> None:
        aligner, self._aligner = self._aligner, None
        if aligner is not None:
            aligner.halt()
            if aligner.error is not None and not isinstance(aligner.error, NO_ROOM):  # what had no room is settled at last
                raise aligner.error


__all__ = ("Replicated",)
