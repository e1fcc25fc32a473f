"""What a broker must be able to do, so that the transport contract can be kept on it: the small part that differs between brokers.

A broker stores *entries*: opaque bytes in topics, each at a number `at` that grows in stored order. One entry holds a batch of frames, so
a broker sees some hundred times fewer of them than there are messages. Names of topics and groups come as users give them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from edgeserve.core.errors import TransportError
from edgeserve.transport.base import Start


class NoAnswer(TransportError):
    """The broker did not answer, or that it cannot say now: it may the next time."""


class Entry(msgspec.Struct, frozen=True):
    """One stored entry. `deliveries`: how often the broker says to have delivered it before; `token`: what acknowledging needs.

    `life`: where a topic that was deleted and made again may number from the start, names which it is of. `stored_ns`: since when
    the broker has it, set by `scan` only, to about a second. `first`: the broker says that nobody had it before, not even one that died.
    """

    at: int
    data: bytes
    deliveries: int = 0
    token: Any = None
    life: str = ""
    stored_ns: int = 0
    first: bool = False


Deliver: TypeAlias = Callable[[Entry], None]
"""Takes an entry. Called by a thread of the driver's, one entry at a time."""

Done: TypeAlias = Callable[["int | None", "Exception | None"], None]
"""(at, None) when an entry is durable, (None, error) when it is not going to be. Called by any thread; must not block."""


class Outlet(ABC):
    """Appends entries to one topic."""

    @abstractmethod
    def send(self, data: bytes, done: Done) -> None:
        """Hands an entry over, in order. While the broker is away it is kept and sent later. `StoreFull` as its error: there is no room
        now; see `PatientOutlet`. `TooLarge`: it never will; `done` is not called, and what comes after it is sent."""

    @abstractmethod
    def close(self) -> None:
        """Lets go; what was not confirmed may be lost. Idempotent."""


class Inlet(ABC):
    """One member's share of a group's entries on one topic."""

    @property
    def lost(self) -> bool:
        """Whether another member has taken it, so that nothing more comes."""
        return False

    @abstractmethod
    def poll(self, seconds: float) -> Entry | None:
        """The next entry; waits for it. None when none came in time, or when it is closed meanwhile. One thread at a time."""

    @abstractmethod
    def acknowledge(self, entry: Entry) -> None:
        """The group is done with it. Any thread; does not wait for the broker."""

    @abstractmethod
    def give_back(self, entry: Entry) -> None:
        """It is to be delivered again, to any member, soon. Any thread."""

    @abstractmethod
    def close(self) -> None:
        """Entries that are not acknowledged go back at once. Idempotent."""


class Tail(ABC):
    """Follows a topic without a group. `error`: what keeps it from that, for good."""

    error: Exception | None = None

    @abstractmethod
    def close(self) -> None:
        """Ends it. Idempotent."""


class Channel(ABC):
    """Messages beside a topic to whoever listens now; some may be lost, and nothing is stored."""

    @abstractmethod
    def say(self, data: bytes) -> None:
        """To all who listen, this end too. Any thread; does not wait."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


@dataclass(frozen=True)
class Extent:
    """What a topic holds: entries from `first` to `last`, both None when there are none."""

    first: int | None
    last: int | None
    stored_bytes: int


class Driver(ABC):
    """A connection to a broker.

    Attributes:
        what: the broker's name, for people.
        max_bytes: of one entry.
        precision_ms: how late a redelivery with a delay may come, or how much too soon.
        deadline_s: for how long the user wants to wait for the broker; None: for ever.
    """

    what: str
    max_bytes: int
    precision_ms: int
    deadline_s: float | None = None

    @abstractmethod
    def outlet(self, topic: str) -> Outlet: ...

    @abstractmethod
    def fenced_outlet(self, topic: str) -> Outlet:
        """Takes the topic from whoever appends to it by such an outlet: their entries end with `Fenced`."""

    @abstractmethod
    def inlet(self, topic: str, group: str, start: Start, *, exclusive: bool) -> Inlet:
        """Joins a group, which is made where it does not exist. `exclusive`: nobody else may be in it.

        Raises:
            GroupBusy: exclusive, and somebody is still in it.
        """

    @abstractmethod
    def tail(self, topic: str, after: int | None, deliver: Deliver) -> Tail:
        """Delivers what is stored after an entry (None: from the first) and what will be. The topic is made where it does not exist."""

    @abstractmethod
    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel | None:
        """Opens a topic's channel; None: the broker is away, which is not waited for. `hear` is called by a thread of the driver's and must
        not wait."""

    @abstractmethod
    def newest(self, topic: str) -> Entry | None:
        """The last entry of a topic, which is made where it does not exist."""

    def last(self, topic: str) -> int | None:
        """The number of the last entry of a topic that exists."""
        extent = self.extent(topic)
        return None if extent is None else extent.last

    def life(self, topic: str) -> str:
        """Which topic of this name there is now, made where there is none; see `Entry`."""
        return ""

    @abstractmethod
    def scan(self, topic: str, first: int | None = None, *, since_ns: int | None = None) -> Iterator[Entry]:
        """What is stored now, from the entry `first` on, or from about a publish time. Nothing of a topic that does not exist."""

    def get(self, topic: str, at: int) -> Entry | None:
        """One entry of a topic that exists; None when it is gone."""
        entry = next(self.scan(topic, at), None)
        return entry if entry is not None and entry.at == at else None

    @abstractmethod
    def discard(self, topic: str, before: int) -> None:
        """Entries below are not needed any more, as far as groups allow."""

    @abstractmethod
    def topics(self) -> list[str]:
        """The names of all topics, internal ones included."""

    @abstractmethod
    def extent(self, topic: str) -> Extent | None:
        """What a topic holds; None where there is none."""

    @abstractmethod
    def groups(self, topic: str) -> list[str]:
        """The names of a topic's groups."""

    @abstractmethod
    def floor(self, topic: str, group: str) -> int:
        """Every entry below is acknowledged by the group."""

    def floors(self, topic: str) -> dict[str, int]:
        """The floor of each of a topic's groups; none where there is no topic."""
        return {group: self.floor(topic, group) for group in self.groups(topic)}

    def acknowledged(self, topic: str, group: str) -> list[tuple[int, int]]:
        """Entries above the floor that the group has acknowledged, too: the first and the last of each range. [] where the broker does
        not say."""
        return []

    @abstractmethod
    def delivered(self, topic: str, group: str) -> int:
        """The newest entry that any member of the group was given; -1 none."""

    @abstractmethod
    def claimed(self, topic: str, group: str) -> int:
        """How many entries are in members' hands, as far as the broker knows."""

    @abstractmethod
    def delete_group(self, topic: str, group: str) -> None:
        """Forgets a group that nobody is in."""

    @abstractmethod
    def delete_topic(self, topic: str) -> None:
        """Deletes an internal topic; none is no error."""

    @abstractmethod
    def trouble(self) -> str | None:
        """What keeps the broker from answering, None when nothing does. Does not ask the broker."""

    def answers(self) -> str:
        """Asked while there is trouble: what is known of a broker that is there nevertheless; "" where it is not. May take its time."""
        return ""

    @abstractmethod
    def close(self) -> None: ...


__all__ = ("Channel", "Deliver", "Done", "Driver", "Entry", "Extent", "Inlet", "NoAnswer", "Outlet", "Tail")
