"""The contract of a transport: topics of opaque frames, groups that consume them, settled in one step.

An engine implements `Transport`, `Publisher`, `Subscription`, `Fence`. The behaviour suite in `edgeserve.testing.transport` states
the contract as tests; what an engine may lack is data in `Capabilities`. Frames are opaque here: see `edgeserve.core.codec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeAlias

from edgeserve.core.errors import TransportError

Buffer: TypeAlias = bytes | bytearray | memoryview
Frame: TypeAlias = bytes | Sequence[Buffer]
"""One message as bytes, or as a list of buffers that the engine gathers."""


class Apart(list[Frame]):
    """Frames that different members of a group are to have: an engine that stores, and hands out, several as one does not do so."""


Delivery: TypeAlias = tuple[Buffer, int, int, int, str]
"""(frame, position, publish time in ns, earlier deliveries, topic). A plain tuple: a stage sees 100,000 of them a second."""

Start: TypeAlias = Literal["earliest", "latest"] | int
"""Where a new group begins: the oldest message kept, only what comes from now on, or a publish time in ns."""


SEND_WINDOW = 4_000
"""How many of its own messages live groups may leave unsettled before a sender waits."""


GROWS = "^"
"""Begins the name of an attribute of a group that only grows."""


def merge_attributes(into: dict[str, bytes], news: Mapping[str, bytes]) -> None:
    """Takes over attributes that a member has said."""
    for name, value in news.items():
        if not name.startswith(GROWS) or value > into.get(name, b""):
            into[name] = value


class GroupKind(StrEnum):
    """How the members of a group divide a topic's messages."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"
    FAILOVER = "failover"
    BROADCAST = "broadcast"


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; the contract suite skips a case only for one of these.

    Attributes:
        durable: whether it outlives its processes.
        disk_durability: whether `durability=disk` can be asked for.
        retention_by_size: whether it keeps what `retention_mb=`, `retention_s=`, `size_mb=` say, to the batch. Brokers keep whole segments.
        redelivery_delay_precision_ms: how much too soon or late a redelivery with a delay may come.
        max_frame_bytes: of one message; None: as memory allows.
        holds_senders: whether the send window counts what groups have not settled. A broker's window counts what it has not confirmed: its
            backlog is the buffer there.
        tells_positions: whether `stored` is told, and `Transport.settled` says what of it is done with. A broker tells it when it has
            confirmed, in a thread of its own; what is sent again after a broken connection may be stored twice, and the first is not told;
            and of what is settled only that below which all is.
    """

    durable: bool = True
    disk_durability: bool = False
    retention_by_size: bool = True
    redelivery_delay_precision_ms: int = 1
    max_frame_bytes: int | None = None
    holds_senders: bool = True
    tells_positions: bool = False


@dataclass(frozen=True)
class GroupInfo:
    """One group's state on one topic. `backlog` counts messages that are not settled, claimed ones included; `more`: there are more than
    that, which the engine has not counted; `versions`: of the members that say one; `attributes`: what the members share."""

    kind: GroupKind
    members: tuple[str, ...]
    active: str | None
    backlog: int
    claimed: int
    epoch: int
    more: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class TopicInfo:
    """A topic: `messages`, at positions in `[first, next)`, are kept in `stored_bytes`. `more`: there are more messages than that, which
    the engine has not counted."""

    name: str
    first: int
    next: int
    stored_bytes: int
    messages: int
    more: bool = False
    groups: Mapping[str, GroupInfo] = field(default_factory=dict)


class ClaimLost(TransportError):
    """Messages that were to be settled belong to another member by now (this one's claim expired). Nothing was written:
    leave out `positions` of `topic` with their outputs and settle the rest again."""

    def __init__(self, topic: str, positions: Sequence[int]) -> None:
        super().__init__(f"{len(positions)} messages of topic {topic!r} were redelivered to another member: the claim expired")
        self.topic, self.positions = topic, frozenset(positions)


class Publisher(ABC):
    """Sends to one topic.

    Attributes:
        stopping: asked while `publish` waits for groups to settle: True ends the wait, since what was handed over is stored.
        giving_up: asked while a broker confirms nothing: True ends the wait some seconds later, with a `SendError`.
        stored: told what was stored, and the position of the first, which the others follow one by one, as soon as it is: before any
            wait. Only where the engine `tells_positions`.
    """

    stopping: Callable[[], bool] | None = None
    giving_up: Callable[[], bool] | None = None
    stored: Callable[[Sequence[Frame], int], None] | None = None

    @abstractmethod
    def publish(self, frames: Sequence[Frame]) -> None:
        """Hands frames over in order; blocks while the send window is full. Durable after `flush()`."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when everything published before is durable; raises the error of an earlier send."""

    @abstractmethod
    def close(self) -> None:
        """Flushes and lets go. Idempotent."""


class Fence(ABC):
    """The right to append to one log. Acquiring it takes it from whoever had it: their appends raise `Fenced`."""

    topic: str
    epoch: int

    @abstractmethod
    def append(self, frames: Sequence[Frame]) -> None:
        """Appends durably, or raises `Fenced` with nothing written."""

    def close(self) -> None:  # noqa: B027  # most engines hold nothing for it
        """Lets go of what the engine holds for it, when nothing is appended any more. Idempotent."""


class Subscription(ABC):
    """One member of a group on one or several topics. One thread may receive while another one does whatever else there is.

    Attributes:
        stopping: asked while `settle` waits for groups to settle its outputs: True ends the wait, since they are stored.
        giving_up: asked while a broker confirms nothing: True ends the wait some seconds later, with a `SendError`.
        stored: told outputs that were stored, as a `Publisher`'s.
    """

    stopping: Callable[[], bool] | None = None
    giving_up: Callable[[], bool] | None = None
    stored: Callable[[Sequence[Frame], int], None] | None = None

    @property
    @abstractmethod
    def active(self) -> bool:
        """Whether this member receives at all: False for the stand-bys of a failover group."""

    @property
    @abstractmethod
    def alone(self) -> bool:
        """Whether this is the group's only live member, as far as is known without asking."""

    @abstractmethod
    def members(self) -> list[str]:
        """The names of the group's live members, in the order in which they came. Takes out those that died, so it is a write at times."""

    @property
    @abstractmethod
    def name(self) -> str:
        """This member's name among `members`."""

    @property
    @abstractmethod
    def knows_all_ids(self) -> bool:
        """Whether `settled_ids` has nothing to tell, as far as is known without asking."""

    def in_order(self, topic: str, position: int, before: int) -> bool:
        """Whether all below the position of the first message of a batch is settled, of a member that is alone. `before`: the position of
        which that was true last, and which has been settled since; -1: none. As `floor`, and cheaper where one batch follows the other."""
        return position == before + 1 or self.floor(topic) >= position

    @abstractmethod
    def receive(self, max_messages: int, timeout_ms: float | None = None) -> list[Delivery]:
        """Claims up to `max_messages`; waits for the first of them (None: for ever; 0: not at all).

        Returns [] on timeout and after `wake()`. Messages come in stored order; redelivered ones (earlier deliveries > 0) first.

        Raises:
            Fenced: once, when this member of a failover group was not the active one for a while: what it held is decided by others.
        """

    @abstractmethod
    def wake(self) -> None:
        """Makes a `receive` that waits in another thread return. Thread-safe."""

    @abstractmethod
    def settle(
        self,
        acks: Mapping[str, Sequence[int]],
        outputs: Mapping[str, Sequence[Frame]] | None = None,
        *,
        ids: Sequence[bytes] = (),
        decisions: Sequence[Frame] = (),
        fence: Fence | None = None,
        attributes: Mapping[str, bytes] | None = None,
    ) -> None:
        """Publishes outputs, appends decisions to `fence`'s log, remembers ids, acknowledges. On an engine with transactions all of
        it or nothing; elsewhere in this order, acknowledgement last. Blocks while an output's send window is full.

        Args:
            acks: topic to positions that are done.
            outputs: topic to frames; see `Apart`.
            ids: 16-byte ids to keep with the group (`settled_ids`), at least the newest 100,000 of them.
            decisions: frames for the decision log.
            fence: the log's fence; refused with `Fenced` when somebody else holds it.
            attributes: small values every member of the group sees (`attributes()`): the newest, or of a name that begins with `GROWS`
                the greatest, as bytes, so that a member that stood still and says late what it knew takes nothing back.

        Raises:
            ClaimLost: some positions are not this member's any more; nothing was written.
            Fenced: the fence is lost; nothing was written.
            StoreFull, DiskFull: no room; nothing was written, and the same call may be repeated. What acknowledges messages finds room
                for its outputs in a store that is full for publishers.
        """

    @abstractmethod
    def nack(self, topic: str, positions: Sequence[int], delay_ms: float = 0) -> None:
        """Gives messages back; they are delivered again, to any member, not before `delay_ms` from now."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when everything settled before is durable."""

    @abstractmethod
    def settled_ids(self) -> list[bytes]:
        """First call: all ids that the group keeps, oldest first. Later calls: those that other members added since."""

    @abstractmethod
    def attributes(self) -> dict[str, bytes]:
        """The group's shared values."""

    @abstractmethod
    def newest_decision(self, topic: str) -> Buffer | None:
        """The newest frame of the log `topic` that was appended by a settlement which is complete; None when there was
        none, and an empty one when it is lost."""

    @abstractmethod
    def floor(self, topic: str) -> int:
        """Every position below this one is settled by the group."""

    @abstractmethod
    def pause(self, topic: str) -> None:
        """Stops receiving from one topic; the others go on."""

    @abstractmethod
    def resume(self, topic: str) -> None:
        """Receives from the topic again."""

    @abstractmethod
    def close(self, *, worked_on: bool = False) -> None:
        """Leaves the group; claimed but unsettled messages go back at once, as if never delivered. Idempotent.

        `worked_on`: some of them were, so they come again as redeliveries.
        """


class Transport(ABC):
    """A connection to one engine, shared by the nodes of a process that name the same URL.

    Attributes:
        url: as it was given.
        capabilities: what the engine may lack.
        identity: of the store: made with it, random, and gone with it, so that a store which took the place of a deleted one is not
            taken for it. "" for an engine that has none.
        root: where the store is, of an engine that keeps it on this machine.
    """

    url: str
    capabilities: Capabilities
    identity: str = ""
    root: Path | None = None

    @abstractmethod
    def publisher(self, topic: str, *, send_window: int = SEND_WINDOW) -> Publisher:
        """A publisher. `send_window`: how many of its own messages live groups may leave unsettled before `publish` waits for them; a
        group that makes no progress for a second does not hold the publisher (the store's size is the bound then)."""

    @abstractmethod
    def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        kind: GroupKind = GroupKind.SHARED,
        start: Start = "earliest",
        ack_timeout_ms: int | None = None,
        signature: str = "",
        member: str = "",
        version: str = "",
        holds_senders: bool | None = None,
    ) -> Subscription:
        """Joins a group, which is made where it does not exist; `start` counts only then. `version`: of what the member does, for
        `GroupInfo`; members of several versions may be in a group. `holds_senders`: whether publishers wait while this member has too
        much unsettled; None: where the engine `holds_senders`, and for a failover group.

        Raises:
            GroupBusy: exclusive, and taken.
            GroupConflict: live members have another kind or signature.
        """

    @abstractmethod
    def fence(self, topic: str, holder: str) -> Fence:
        """Takes the log `topic`: a new epoch; whoever held it is refused from now on."""

    @abstractmethod
    def read(self, topic: str, start: Start | None = "earliest", *, position: int | None = None) -> Iterator[tuple[bytes, int, int]]:
        """(frame, position, publish time in ns) of what is stored now, without a group. Ends at the topic's end."""

    @abstractmethod
    def topics(self) -> list[str]:
        """Names of all topics, sorted."""

    @abstractmethod
    def topic_info(self, topic: str, *, groups: bool = True) -> TopicInfo:
        """Raises `UnknownTopic` where there is none. Without `groups` nothing is said of them, which on a broker is much quicker."""

    @abstractmethod
    def end(self, topic: str) -> int:
        """The position behind the newest message that is kept; 0 where there is none. Does not count messages. Raises `UnknownTopic`."""

    def settled(self, topic: str) -> Sequence[tuple[int, int]]:
        """Positions [lo, hi), ascending and disjoint, of messages that every group has settled, or that are gone; none while there is no
        group. Only where the engine `tells_positions`."""
        raise NotImplementedError

    @abstractmethod
    def delete_group(self, topic: str, group: str) -> None:
        """Forgets a group, so that its backlog no longer holds space. Raises `GroupConflict` while it has live members."""

    @abstractmethod
    def delete_topic(self, topic: str) -> None:
        """Deletes a topic with its messages and its groups. Whoever still sends to it makes it anew, with nothing in it.

        Raises:
            TransportError: there is no such topic.
            GroupConflict: a group of it has live members.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of the connection. Reference-counted by `connect`; idempotent."""


__all__ = (
    "GROWS",
    "SEND_WINDOW",
    "Apart",
    "Buffer",
    "Capabilities",
    "ClaimLost",
    "Delivery",
    "Fence",
    "Frame",
    "GroupInfo",
    "GroupKind",
    "Publisher",
    "Start",
    "Subscription",
    "TopicInfo",
    "Transport",
    "merge_attributes",
)
