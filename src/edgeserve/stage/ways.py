"""What a join asks of whoever takes its sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from edgeserve.align import JoinSet
from edgeserve.core.message import Header
from edgeserve.stage.context import Current
from edgeserve.stage.runset import GiveUp, Input, Outcome
from edgeserve.stage.steplog import StepLog
from edgeserve.transport import Frame


class Way(Protocol):
    """Where the sets that are due go: into the task, or to whichever replica runs them."""

    topic: str

    def make(self, give_up: GiveUp) -> Callable[[JoinSet, int | None], Outcome]:
        """The function that takes a set, and tells what is published in its place."""

    def end_frames(self, position: int, of: bytes) -> list[Frame] | None:
        """What is published when no more sets will come, since the last source's end, at `position` and with the id `of`, is reached;
        None: not yet."""


class Part(Protocol):
    """The messages of a topic that are a join's, where others take the rest."""

    by_header: bool
    """Whether the key is in the header, so that nothing has to be decoded to find it."""

    def has(self, header: Header) -> bool:
        """Whether a message is of this part, by its key; one without a key is by its id."""

    def has_unread(self) -> bool:
        """Whether this part takes care of what cannot be read."""

    def goes_on(self, position: int) -> bool:
        """Whether all know that the round has ended whose last end is there."""


class Sets(Way, Protocol):
    """What a join asks of the task that it is for."""

    current: Current
    parameters: tuple[str, ...]
    output_id: str
    verbose: StepLog | None
    screened: bool

    @property
    def part(self) -> Part | None:
        """None where it takes all messages."""

    def open(self, max_frame_bytes: int | None) -> None:
        """See `RunSet`."""

    def close(self) -> None:
        """See `RunSet`."""

    def screen(self, item: Input) -> bool:
        """See `RunSet`."""


__all__ = ("Part", "Sets", "Way")
