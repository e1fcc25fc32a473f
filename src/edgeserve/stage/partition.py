"""One partition of a join by key, in the hands of one member."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import partial

from edgeserve.align import JoinSet, Policy
from edgeserve.core.errors import Fenced
from edgeserve.core.message import Header
from edgeserve.core.metrics import Counters
from edgeserve.stage.assignment import partition_group, partition_of
from edgeserve.stage.base import Options
from edgeserve.stage.context import Current
from edgeserve.stage.control import SLICE_MS, Control
from edgeserve.stage.exchange import Exchange, Offer
from edgeserve.stage.join import Join
from edgeserve.stage.linger import NO_ROOM, Patience
from edgeserve.stage.rounds import Rounds
from edgeserve.stage.runset import GiveUp, Input, Outcome, RunSet
from edgeserve.stage.ways import Part
from edgeserve.transport import ClaimLost, Frame, Transport

_SLICE_S = SLICE_MS / 1000


class _Part(Join):
    """The join of one partition. `between`: called in its own thread, between two steps and while it waits."""

    between: Callable[[], object]

    def _run_some(self) -> None:
        self.between()
        super()._run_some()

    def _idle(self) -> bool:
        self.between()
        return super()._idle()


class Partition:
    """One partition for as long as this member holds it: its part of the messages, the join of them, and the thread that aligns. See `Sets`
    and `Part`.

    Attributes:
        join: of the partition.
        reached: where all sources have ended, as far as it is.
        ready: set when the join is `opened`, or could not be.
        over: whether the thread has ended.
        error: what has ended it, to be raised once.
        unsettled: why what it had done could not be settled when it ended.
    """

    def __init__(
        self,
        number: int,
        options: Options,
        control: Control,
        counts: Counters,
        *,
        run_set: RunSet,
        by_header: bool,
        make_policy: Callable[[], Policy],
        exchange: Exchange,
        screening: threading.Lock,
        rounds: Rounds,
    ) -> None:
        self.number, self._partitions, self.by_header = number, options.partitions, by_header
        self.topic, self.parameters, self.output_id = run_set.topic, run_set.parameters, run_set.output_id
        self.verbose, self.screened = run_set.verbose, run_set.screened
        self.current = Current()
        self._control, self._run_set, self._exchange, self._screening, self._rounds = control, run_set, exchange, screening, rounds
        self._patience = Patience(f"{options.name}, partition {number + 1}", control)
        self.halted = self.opened = self.over = False
        self.reached: int | None = None
        self.error: BaseException | None = None
        self.unsettled: BaseException | None = None
        self.ready = threading.Event()
        # Whether every set that was run is among what is to be settled; what is on offer; who waits for a flush.
        self._settled, self._changed = threading.Event(), threading.Event()
        self._offered: Offer | None = None
        self._flush: Future[None] | None = None
        group = partition_group(options.group, number, options.partitions)
        self.join = _Part(replace(options, group=group, letters=options.group), control, counts, run_set=self, make_policy=make_policy)
        self.join.between = self._between
        self._thread = threading.Thread(target=self._run, name=f"edgeserve-partition-{number + 1}", daemon=True)
        self._transport: Transport
        self._opens_patiently = False

    # --- a part of the messages ---------------------------------------------------------------------------------

    @property
    def part(self) -> Part:
        """See `Sets`."""
        return self

    def has(self, header: Header) -> bool:
        """Whether a message is of this partition."""
        return partition_of(header, self._partitions) == self.number

    def has_unread(self) -> bool:
        """One of them puts aside what none can read."""
        return self.number == 0

    def goes_on(self, position: int) -> bool:
        """The first partition has said so itself, and waits until the roster does: whoever takes it over could not say it any more."""
        return self.number > 0 or self._rounds.published == position

    # --- its sets -----------------------------------------------------------------------------------------------

    def open(self, max_frame_bytes: int | None) -> None:
        """The task is opened once for all partitions."""

    def close(self) -> None:
        """As `open`."""

    def screen(self, item: Input) -> bool:
        """As that of the whole, one at a time: the functions are the user's."""
        with self._screening:
            return self._run_set.screen(item)

    def make(self, give_up: GiveUp) -> Callable[[JoinSet, int | None], Outcome]:
        """The function that has a set run. Results are no promise: other partitions may be behind this one."""
        run = self._run_set.make(give_up)

        def offer(joined: JoinSet, _promise_ns: int | None) -> Outcome:
            self._settled.set()
            self._offered = offered = Offer(partial(run, joined, None), self._settled, self._changed)
            try:
                return self._exchange.offer(offered, self._look)
            finally:
                self._offered = None

        return offer

    def end_frames(self, position: int, of: bytes) -> list[Frame] | None:
        """The first partition publishes the end when all have reached it, and none takes anything behind it before."""
        if self.number and self.reached != position:
            self.join.flush()  # results that are on their way would stand behind the end
        self.reached = position
        if self.number:
            return [] if self._rounds.published == position else None
        return self._run_set.end_frames(position, of) if self._rounds.all_are_at(position) else None

    # --- its thread ---------------------------------------------------------------------------------------------

    def start(self, transport: Transport, *, patient: bool) -> None:
        """Begins. `patient`: waits for a store that has no room."""
        self._settled.set()
        self._transport, self._opens_patiently = transport, patient
        self._thread.start()

    def _run(self) -> None:
        try:
            self._open_join()
            self.ready.set()
            try:
                self.join.run(None)
            finally:
                self._close_join()
        except BaseException as exc:
            self.error = exc
        finally:
            self.over = True
            self._answer_flush(self.unsettled)
            self.ready.set()
            self._exchange.wake()

    def _open_join(self) -> None:
        while not self.opened:
            try:
                self.join.open(self._transport)
                self.join.leaves = self._ends
                self.opened = True
            except NO_ROOM as exc:
                if not self._opens_patiently or self._ends() or not self._patience.wait(exc):
                    raise

    def _close_join(self) -> None:
        try:
            self.join.close()
        except BaseException as exc:
            self.unsettled = exc

    def _ends(self) -> bool:
        return self.halted or self._control.stopping()

    def _look(self) -> bool:
        """While a set is on offer."""
        self._serve_flush()
        return self._ends()

    def _between(self) -> None:
        self._settled.set()
        self._serve_flush()

    def _serve_flush(self) -> None:
        if self._flush is None or not self._settled.is_set():
            return
        error: Exception | None = None
        try:
            self.join.flush()
        except (Fenced, ClaimLost):
            pass  # another member has it by now, and does what is left
        except Exception as exc:
            error = exc
        self._answer_flush(error)

    def _answer_flush(self, error: BaseException | None) -> None:
        asked, self._flush = self._flush, None
        if asked is not None and error is not None:
            asked.set_exception(error)
        elif asked is not None:
            asked.set_result(None)

    def flush(self) -> None:
        """Returns when the sets that were run are durable. For who runs them."""
        self._flush = asked = Future[None]()
        while not asked.done() and not self.over:
            if (offered := self._offered) is not None:
                offered.changed.set()
            self.join.wake()
            wait_for([asked], _SLICE_S)
        if asked.done():
            asked.result()

    def halt(self) -> None:
        """Asks it to end after what it has in hand."""
        self.halted = True
        self.join.wake()

    def wait(self) -> None:
        """Until it has ended."""
        while self._thread.is_alive():
            self.join.wake()
            self._thread.join(_SLICE_S)


__all__ = ("Partition",)
