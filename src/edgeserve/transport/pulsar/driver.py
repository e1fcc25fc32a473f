"""Apache Pulsar as a `Driver`: a producer, consumer or reader for each end, entries as unbatched messages.

Batches are made above and travel as one Pulsar message each: the broker's own batching would cost its client some 20 us for every message,
and single messages of a batch that were acknowledged come back after a crash.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import pulsar

from edgeserve.core.errors import ClosedError, ConfigurationError, GroupBusy, TooLarge, TransportError
from edgeserve.transport.base import Start
from edgeserve.transport.broker.driver import Channel, Deliver, Driver, Entry, Extent, Inlet, Outlet, Tail
from edgeserve.transport.broker.envelope import PARTS
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.ends import Dialled, PulsarChannel, PulsarInlet, PulsarOutlet, PulsarTail, id_of, quietly
from edgeserve.transport.pulsar.errors import PASSES, named
from edgeserve.transport.pulsar.look import Look
from edgeserve.transport.pulsar.names import channel_name, group_name, subscription_name, topic_name, user_name
from edgeserve.transport.pulsar.parts import Parts
from edgeserve.transport.pulsar.probe import Greeting, greet, silence
from edgeserve.transport.pulsar.redial import Redial
from edgeserve.transport.pulsar.settings import BrokerAway, Settings

_log = logging.getLogger("edgeserve")
_T = TypeVar("_T")
_D = TypeVar("_D", bound=Dialled)

KEEP = "edgeserve-keep"
"""The subscription that keeps what a log, or a topic of parts, still needs."""

_MAX_BYTES = 5 * 1024 * 1024
# Of what a broker takes, so much is for what it adds itself.
_SPARE_BYTES = 64 * 1024
_QUEUE = 16
_OPERATION_S = 5
# More than a sender or a member has under way before it asks whether it is to give up; the client's own wait asks nobody.
_MOST_PENDING = 50_000
_SAY_EVERY_S = 5.0
_PAUSE_S = 0.25
_EXIT_S = 2.0
_drivers: weakref.WeakSet[PulsarDriver] = weakref.WeakSet()


class PulsarDriver(Driver):
    """A connection to a Pulsar cluster."""

    what = "Pulsar"
    max_bytes = _MAX_BYTES - _SPARE_BYTES
    precision_ms = 150

    def __init__(self, settings: Settings) -> None:
        self.settings, self.deadline_s = settings, settings.deadline_s
        self.admin = Admin(settings)
        self._parts = Parts(self)
        self.pid = os.getpid()
        self._closed = threading.Event()
        self._knows_size = False
        self._exist: set[str] = set()
        # Those that wait in the client for what comes.
        self.threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._redial = Redial(self._takes_us, self._closed, self.threads)
        _drivers.add(self)
        self._lock = threading.Lock()
        self._client = _client(settings)
        self._channels: pulsar.Client | None = None

    def full(self, topic: str) -> str:
        """The full name of a topic."""
        return topic_name(self.settings.space, topic)

    # --- patience -----------------------------------------------------------------------------------------------

    def patiently(self, what: str, topic: str, do: Callable[[], _T]) -> _T:
        """Does something with the broker; waits while the broker is away, and says so."""
        began = time.monotonic()
        said = began - _SAY_EVERY_S + 1.0
        while True:
            try:
                return do()
            except PASSES as exc:
                refused = greet(self.settings).refusal
                if refused is not None:
                    raise TransportError(f"{self.settings.shown}: {refused}") from exc
                now = time.monotonic()
                if self.settings.deadline_s is not None and now - began > self.settings.deadline_s:
                    raise BrokerAway(
                        f"{self.settings.shown} did not answer within deadline_s={self.settings.deadline_s:g} ({what} {topic!r}): {exc}"
                    ) from exc
                if now - said >= _SAY_EVERY_S:
                    said = now
                    _log.warning("%s does not answer for %.0f s, waiting (%s %r): %s", self.settings.shown, now - began, what, topic, exc)
                if self._closed.wait(_PAUSE_S):
                    raise ClosedError(f"{self.settings.shown} is closed") from exc
            except pulsar.PulsarException as exc:
                raise self._named(exc, what, topic) from exc

    def _named(self, exc: pulsar.PulsarException, what: str, topic: str) -> BaseException:
        # The client forgets what the signal's handler has raised.
        return KeyboardInterrupt() if isinstance(exc, pulsar.Interrupted) else named(self.settings, exc, what, topic)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _new_producer(self, topic: str, mode: pulsar.ProducerAccessMode) -> pulsar.Producer:
        deadline_s = self.settings.deadline_s
        return self._client.create_producer(
            self.full(topic),
            batching_enabled=False,
            block_if_queue_full=True,
            max_pending_messages=_MOST_PENDING,
            send_timeout_millis=0 if deadline_s is None else int(deadline_s * 1000),
            access_mode=mode,
        )

    def _new_consumer(
        self,
        topic: str,
        subscription: str,
        kind: pulsar.ConsumerType,
        begin: pulsar.InitialPosition = pulsar.InitialPosition.Earliest,
        queue: int = _QUEUE,
    ) -> pulsar.Consumer:
        return self._client.subscribe(
            self.full(topic),
            subscription,
            consumer_type=kind,
            initial_position=begin,
            receiver_queue_size=queue,
            consumer_name=f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            negative_ack_redelivery_delay_ms=100,
        )

    def _new_reader(self, topic: str, after: int | None) -> pulsar.Reader:
        start = pulsar.MessageId.earliest if after is None else id_of(after)
        return self._client.create_reader(self.full(topic), start, receiver_queue_size=_QUEUE)

    def _refuse_partitions(self, what: str, topic: str) -> None:
        full = self.full(topic)
        found = self.patiently(what, topic, lambda: self._client.get_topic_partitions(full))
        if found != [full]:
            raise ConfigurationError(
                f"topic {topic!r} on {self.settings.shown} is partitioned ({len(found)}), so that its messages have no one order: make it "
                "anew without partitions (allowAutoTopicCreationType=non-partitioned is the broker's default). Tasks share a topic "
                "as it is, and Compute(by=, partitions=) divides the keys of a join"
            )

    def open(self, what: str, topic: str, make: Callable[[], _T]) -> _T:
        """What a client opens on a topic; waits while the broker is away."""
        if topic not in self._exist:
            self._refuse_partitions(what, topic)
        end = self.patiently(what, topic, make)
        self._exist.add(topic)
        return end

    def _watched(self, end: _D) -> _D:
        self._redial.watch(end)
        return end

    def forget(self, end: Dialled) -> None:
        """An end that was closed is no trouble."""
        self._redial.forget(end)

    def outlet(self, topic: str) -> Outlet:
        make = partial(self._new_producer, topic, pulsar.ProducerAccessMode.Shared)
        outlet = self._watched(PulsarOutlet(self, topic, self.open("write to", topic, make), make))
        if not self._knows_size:
            self._learn_size()
        if topic.endswith(PARTS):
            self._keep(topic)
            self._parts.use(topic.removesuffix(PARTS))
        if self.settings.retention_mb is not None or self.settings.retention_s is not None:
            self.admin.keep(self.full(topic), self.settings.retention_mb, self.settings.retention_s)
        return outlet

    def _learn_size(self) -> None:
        self._knows_size = True
        most = greet(self.settings).most_bytes
        if most is not None:
            self.max_bytes = most - min(_SPARE_BYTES, most // 16)

    def too_large(self, topic: str, size: int) -> TooLarge:
        """The broker takes less than it was thought to: what comes next is cut accordingly."""
        self._learn_size()
        if self.max_bytes >= size:
            self.max_bytes = size // 2  # it does not say
        return TooLarge(
            f"topic {topic!r}: {self.settings.shown} takes no message of {size} bytes (maxMessageSize in its settings), and this one "
            f"was not sent; from now on what is larger than {self.max_bytes} bytes goes in parts"
        )

    def fenced_outlet(self, topic: str) -> Outlet:
        make = partial(self._new_producer, topic, pulsar.ProducerAccessMode.ExclusiveWithFencing)
        producer = self.open("write to", topic, make)
        self._keep(topic)
        return self._watched(PulsarOutlet(self, topic, producer, make, partial(self._newest_now, topic)))

    def inlet(self, topic: str, group: str, start: Start, *, exclusive: bool) -> Inlet:
        begin = pulsar.InitialPosition.Latest if start == "latest" else pulsar.InitialPosition.Earliest
        kind = pulsar.ConsumerType.Exclusive if exclusive else pulsar.ConsumerType.Shared
        make = partial(self._new_consumer, topic, subscription_name(group), kind, begin)
        return self._watched(PulsarInlet(self, self.open("read from", topic, make), make))

    def tail(self, topic: str, after: int | None, deliver: Deliver) -> Tail:
        self._keep(topic)
        return self._watched(PulsarTail(self, partial(self._new_reader, topic), after, deliver, topic))

    def _beside(self) -> pulsar.Client:
        """Another client: over a channel that the broker refuses one drops its connection, and sends again what is not confirmed."""
        with self._lock:
            if self._closed.is_set():
                raise ClosedError(f"{self.settings.shown} is closed")
            if self._channels is None:
                self._channels = _client(self.settings)
            return self._channels

    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel | None:
        name = channel_name(self.full(topic))
        try:
            return self._watched(PulsarChannel(self, self._beside(), name, hear))
        except PASSES:
            return None
        except pulsar.PulsarException as exc:
            raise self._named(exc, "listen to", name) from exc

    def newest(self, topic: str) -> Entry | None:
        return _last_of(self._entries(topic, pulsar.MessageId.latest))

    def _newest_now(self, topic: str) -> Entry | None:
        """With one try."""
        with closing(Look(partial(self._look_from, topic), pulsar.MessageId.latest)) as look:
            return _last_of(iter(look.next, None))

    def last(self, topic: str) -> int | None:
        """Does without the admin API."""
        entry = self._first(topic, pulsar.MessageId.latest)
        return None if entry is None else entry.at

    def scan(self, topic: str, first: int | None = None, *, since_ns: int | None = None) -> Iterator[Entry]:
        last = self._last_of_any(topic)
        if last is None or (first is not None and first > last):
            return
        for entry in self._entries(topic, pulsar.MessageId.earliest if first is None else id_of(first), since_ns):
            yield entry
            if entry.at >= last:
                return

    def _entries(self, topic: str, start: Any, since_ns: int | None = None) -> Generator[Entry]:
        """What is stored by the time that the end is reached, from `start` on."""
        with closing(Look(partial(self._look_from, topic), start, since_ns)) as look:
            self.open("read", topic, look.open)
            while (entry := self.patiently("read", topic, look.next)) is not None:
                yield entry

    def _first(self, topic: str, start: Any) -> Entry | None:
        with closing(self._entries(topic, start)) as entries:
            return next(entries, None)

    def _look_from(self, topic: str, start: Any) -> pulsar.Reader:
        return self._client.create_reader(self.full(topic), start, receiver_queue_size=_QUEUE, start_message_id_inclusive=True)

    def _last_of_any(self, topic: str) -> int | None:
        # The client would make a topic that does not exist; only the admin API tells whether it does.
        if topic in self._exist:
            return self.last(topic)
        extent = self.extent(topic)
        return None if extent is None else extent.last

    def get(self, topic: str, at: int) -> Entry | None:
        """Does without the admin API, and so makes a topic that does not exist."""
        if topic.endswith(PARTS):
            self._parts.use(topic.removesuffix(PARTS))
        entry = self._first(topic, id_of(at))
        return entry if entry is not None and entry.at == at else None

    # --- what there is ------------------------------------------------------------------------------------------

    def _keep(self, topic: str, from_: int | None = None) -> None:
        """Without a subscription the broker may let go of what nobody has asked to keep. `from_`: entries below are not needed."""
        try:
            keep = partial(self._new_consumer, topic, KEEP, pulsar.ConsumerType.Exclusive, queue=0)
            keeper = self.open("read from", topic, keep)
        except GroupBusy:
            return  # another member is at it
        if from_ is not None:
            # The id need not be one of an entry: what is acknowledged is all up to it.
            quietly(partial(keeper.acknowledge_cumulative, id_of(from_ - 1)))
        quietly(keeper.close)

    def discard(self, topic: str, before: int) -> None:
        self._keep(topic, before)

    def topics(self) -> list[str]:
        return [user_name(self.settings.space, name) for name in self.admin.topics(self.settings.space)]

    def extent(self, topic: str) -> Extent | None:
        return self.admin.extent(self.full(topic))

    def groups(self, topic: str) -> list[str]:
        return [group_name(name) for name in self.admin.subscriptions(self.full(topic)) if name != KEEP]

    def floor(self, topic: str, group: str) -> int:
        return self.admin.floor(self.full(topic), subscription_name(group))

    def floors(self, topic: str) -> dict[str, int]:
        return {group_name(name): floor for name, floor in self.admin.floors(self.full(topic)).items() if name != KEEP}

    def acknowledged(self, topic: str, group: str) -> list[tuple[int, int]]:
        return self.admin.acknowledged(self.full(topic), subscription_name(group))

    def delivered(self, topic: str, group: str) -> int:
        return self.admin.delivered(self.full(topic), subscription_name(group))

    def claimed(self, topic: str, group: str) -> int:
        return self.admin.subscriptions(self.full(topic)).get(subscription_name(group), 0)

    def delete_group(self, topic: str, group: str) -> None:
        self.admin.delete_subscription(self.full(topic), subscription_name(group))

    def delete_topic(self, topic: str) -> None:
        self._exist.discard(topic)
        self.admin.delete_topic(self.full(topic))

    def trouble(self) -> str | None:
        return f"no connection to {self.settings.shown}" if self._redial.missed else None

    def _takes_us(self) -> bool:
        # Without a name and password that can be said here it is only known that somebody listens.
        said = greet(self.settings)
        return said.taken or (self.settings.oauth2 is not None and not silence(self.settings))

    def answers(self) -> str:
        said = greet(self.settings)
        if said == Greeting():
            return ""
        return said.refusal or "it is there, but it stores nothing, and its own log says why (it is starting? its disk is full?)"

    @property
    def closed(self) -> bool:
        """Whether it was."""
        return self._closed.is_set()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        self._parts.close()
        for client in (self._client, self._channels):
            if client is not None:
                quietly(client.close)
        self._redial.join(_EXIT_S)


@atexit.register
def _close_all() -> None:
    """The interpreter ends the threads that want it at its end, and a thread that waits in the client takes the process with it then."""
    for driver in list(_drivers):
        if not driver.closed and driver.pid == os.getpid():
            driver.close()
            for thread in list(driver.threads):
                thread.join(_EXIT_S)


def _last_of(entries: Iterable[Entry]) -> Entry | None:
    return next(iter(deque(entries, maxlen=1)), None)


def _client(settings: Settings) -> pulsar.Client:
    return pulsar.Client(
        settings.service,
        authentication=_authentication(settings),
        operation_timeout_seconds=_OPERATION_S,
        tls_trust_certs_file_path=settings.ca_file if settings.tls else None,
        tls_validate_hostname=settings.tls,
        logger=pulsar.FileLogger(pulsar.LoggerLevel.Warn, os.environ.get("EDGESERVE_PULSAR_LOG", os.devnull)),
    )


def _authentication(settings: Settings) -> pulsar.Authentication | None:
    if settings.oauth2 is not None:
        return pulsar.AuthenticationOauth2(settings.oauth2)
    if settings.token is not None:
        return pulsar.AuthenticationToken(settings.token)
    if settings.tls_cert is not None:
        if settings.tls_key is None:
            raise ConfigurationError("tls_cert= needs tls_key=, its private key")
        return pulsar.AuthenticationTLS(settings.tls_cert, settings.tls_key)
    return None


__all__ = ("PulsarDriver",)
