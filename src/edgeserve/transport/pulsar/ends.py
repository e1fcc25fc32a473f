"""What a connection to Pulsar hands out: where entries go in, where a group's come out, and what follows a topic."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import _pulsar
import pulsar

from edgeserve.core.errors import EdgeServeError, Fenced
from edgeserve.transport.broker.driver import Channel, Deliver, Done, Entry, Inlet, Outlet, Tail
from edgeserve.transport.pulsar.errors import failed, named
from edgeserve.transport.pulsar.names import entry_number, ledger_and_entry

if TYPE_CHECKING:
    from edgeserve.transport.pulsar.driver import PulsarDriver

_log = logging.getLogger("edgeserve")

_RECEIVE_S = 1.0
_PAUSE_S = 0.25


def number_of(message_id: Any) -> int:
    """The number of the entry that a message id names."""
    return entry_number(message_id.ledger_id(), message_id.entry_id())


def id_of(at: int) -> pulsar.MessageId:
    """The message id of an entry."""
    ledger, entry = ledger_and_entry(at)
    return pulsar.MessageId(-1, ledger, entry, -1)


class Dialled(ABC):
    """What a client has opened, and can open once more: should it not come back by itself, see `Redial`.

    Attributes:
        matters: whether somebody waits for it.
    """

    matters = True
    # Whether what it had is of no use once it has been opened again.
    _alone = False

    def __init__(self, driver: PulsarDriver) -> None:
        self._driver, self._closed = driver, False
        # Not held while the client opens something, which may take seconds.
        self._exchanging = threading.Lock()

    @abstractmethod
    def is_connected(self) -> bool:
        """Whether the client says so."""

    @abstractmethod
    def _dial(self) -> Sequence[Any]:
        """Opens it once more, with one try; () where that turns out not to be wanted."""

    @abstractmethod
    def _use(self, dialled: Sequence[Any]) -> None:
        """From now on this is what is open; what was before is closed, or is closed by this."""

    @abstractmethod
    def _opened(self) -> Sequence[Any]:
        """What the client has opened for it."""

    def dial_again(self, *, though_connected: bool = False) -> None:
        """In place of what is open now, unless that came back by itself meanwhile. Nothing is lost or put out of order; as after any
        connection that was lost, what was not confirmed may be stored twice, and what was not acknowledged comes again.

        Raises:
            pulsar.PulsarException, EdgeServeError: nothing has changed.
        """
        dialled = left = self._dial()
        with self._exchanging:
            if dialled and not self._closed and (though_connected or self._alone or not self.is_connected()):
                left = self._opened()
                self._use(dialled)
        for each in left:
            quietly(each.close)

    def close(self) -> None:
        """Idempotent."""
        with self._exchanging:
            if self._closed:
                return
            self._closed = True
        self._driver.forget(self)
        for each in self._opened():
            quietly(each.close)

    def _over(self) -> bool:
        return self._closed or self._driver.closed


class _Sent:
    """An entry that the broker has not confirmed."""

    __slots__ = ("data", "done")

    def __init__(self, data: bytes, done: Done) -> None:
        self.data, self.done = data, done


class PulsarOutlet(Dialled, Outlet):
    """See `Outlet`: a producer. `make`: opens one; `newest`: asked for the last entry, once, where only one may append."""

    def __init__(
        self,
        driver: PulsarDriver,
        topic: str,
        producer: pulsar.Producer,
        make: Callable[[], pulsar.Producer],
        newest: Callable[[], Entry | None] | None = None,
    ) -> None:
        super().__init__(driver)
        self._topic, self._make, self._newest, self._alone = topic, make, newest, newest is not None
        # `_order`: one hands over at a time. `_guard`: what is open, and by which producer it was sent.
        self._order, self._guard = threading.Lock(), threading.Lock()
        self._open: deque[_Sent] = deque()
        self._last: int | None = None
        self._lost = False
        self._take(producer)

    def _take(self, producer: pulsar.Producer) -> None:
        self._producer = producer
        # Without the client's Python wrapper, which checks ten arguments that are never given: of one message at a time that takes as
        # long as all that is done with it here.
        self._hand_over = producer._producer.send_async

    def is_connected(self) -> bool:
        return self._lost or bool(self._producer.is_connected())

    def _opened(self) -> Sequence[Any]:
        return (self._producer,)

    def _dial(self) -> Sequence[Any]:
        if self._lost or not self._is_ours():  # looked at before as well, so that nothing is taken from who has it now
            self._give_up()
            return ()
        producer = self._make()
        try:
            if self._is_ours():
                return (producer,)
        except BaseException:
            quietly(producer.close)
            raise
        quietly(producer.close)
        self._give_up()
        return ()

    def _use(self, dialled: Sequence[Any]) -> None:
        failed = []
        with self._order:
            with self._guard:
                left = self._producer
                self._take(dialled[0])
                again = list(self._open)
            # Before: had it come back meanwhile, what it sends again would stand behind what comes next.
            quietly(left.close)
            for sent in again:
                try:
                    self._send(sent)
                except (EdgeServeError, pulsar.PulsarException) as exc:
                    failed.append((sent, exc))
        for sent, error in failed:
            with self._guard:
                still_open = self._forget(sent)
            if still_open:
                sent.done(None, error)

    def _is_ours(self) -> bool:
        """Whether nobody else has appended."""
        if self._newest is None:
            return True
        newest = self._newest()
        return newest is not None and (newest.at == self._last or any(newest.data == sent.data for sent in list(self._open)))

    def _give_up(self) -> None:
        with self._guard:
            self._lost = True
            refused = list(self._open)
            self._open.clear()
        for sent in refused:
            self._refuse(sent.done)

    def _refuse(self, done: Done) -> None:
        done(None, Fenced(f"the log {self._topic!r} was taken by somebody else while there was no connection"))

    def send(self, data: bytes, done: Done) -> None:
        sent = _Sent(data, done)
        with self._order:
            if not self._lost:
                self._open.append(sent)
                try:
                    self._send(sent)
                except BaseException:
                    with self._guard:
                        self._forget(sent)
                    raise
                return
        self._refuse(done)

    def _send(self, sent: _Sent) -> None:
        driver, topic, producer = self._driver, self._topic, self._producer
        me, refused = threading.get_ident(), []

        def confirm(result: Any, message_id: Any) -> None:
            if result == pulsar.Result.MessageTooBig and threading.get_ident() == me:
                refused.append(result)  # on the spot, by the client itself
                return
            at = number_of(message_id) if result == pulsar.Result.Ok else None
            with self._guard:
                if producer is not self._producer or not self._forget(sent):
                    return  # it was sent again by another one, which is to say what became of it
                if at is not None:
                    self._last = at
                elif result == pulsar.Result.ProducerFenced:
                    self._lost = True
            sent.done(at, None if at is not None else failed(driver.settings, result, topic))

        try:
            message = _pulsar.MessageBuilder()
            message.content(sent.data)
            self._hand_over(message.build(), confirm)
        except pulsar.PulsarException as exc:
            raise named(driver.settings, exc, "write to", topic) from exc
        if refused:
            raise driver.too_large(topic, len(sent.data))

    def _forget(self, sent: _Sent) -> bool:
        """Whether it was open."""
        if self._open and self._open[0] is sent:
            self._open.popleft()
            return True
        try:
            self._open.remove(sent)
        except ValueError:
            return False
        return True


class _Receiving(Dialled):
    """What comes from the client, until this end or its connection is closed."""

    def _failed(self, error: Exception) -> None:
        """Nothing is read any more."""
        _log.warning("a connection to %s is not read any more: %s: %s", self._driver.settings.shown, type(error).__name__, error)

    def _read(self, take: Callable[[Entry], object], name: str) -> threading.Thread:
        """Begins to read, in a thread."""

        def run() -> None:
            try:
                while not self._over():
                    entry = _next(self._next, _RECEIVE_S, self._over)
                    if entry is not None:
                        take(entry)
            except Exception as exc:
                self._failed(exc)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._driver.threads.add(thread)
        thread.start()
        return thread

    def _next(self, milliseconds: int) -> Any:
        """The next message."""
        raise NotImplementedError


class PulsarInlet(_Receiving, Inlet):
    """See `Inlet`: a consumer. `make`: opens one."""

    def __init__(self, driver: PulsarDriver, consumer: pulsar.Consumer, make: Callable[[], pulsar.Consumer]) -> None:
        super().__init__(driver)
        self._make = make
        self._take(consumer)

    def _take(self, consumer: pulsar.Consumer) -> None:
        self._consumer = consumer
        # Likewise: a message as it comes has the same methods, and can be acknowledged.
        self._receive = consumer._consumer.receive

    def is_connected(self) -> bool:
        return bool(self._consumer.is_connected())

    def _opened(self) -> Sequence[Any]:
        return (self._consumer,)

    def _dial(self) -> Sequence[Any]:
        return (self._make(),)

    def _use(self, dialled: Sequence[Any]) -> None:
        self._take(dialled[0])

    def poll(self, seconds: float) -> Entry | None:
        return None if self._over() else _next(self._receive, seconds, self._over)

    def acknowledge(self, entry: Entry) -> None:
        # When it fails the entry comes back, and the desk says again that it is done.
        quietly(partial(self._consumer.acknowledge, entry.token))

    def give_back(self, entry: Entry) -> None:
        quietly(partial(self._consumer.negative_acknowledge, entry.token))


class PulsarTail(_Receiving, Tail):
    """See `Tail`: a reader, and a thread that reads. `make`: opens one that begins behind an entry; None: with the first."""

    def __init__(
        self, driver: PulsarDriver, make: Callable[[int | None], pulsar.Reader], after: int | None, deliver: Deliver, topic: str
    ) -> None:
        super().__init__(driver)
        self._make, self._last, self._deliver = make, after, deliver
        self._reader = driver.open("read", topic, partial(make, after))
        self._thread = self._read(self._take, f"edgeserve-tail-{topic[:40]}")

    def _take(self, entry: Entry) -> None:
        if self._last is None or entry.at > self._last:
            self._deliver(entry)
            self._last = entry.at

    def _next(self, milliseconds: int) -> Any:
        return self._reader.read_next(milliseconds)

    def is_connected(self) -> bool:
        return bool(self._reader.is_connected())

    def _opened(self) -> Sequence[Any]:
        return (self._reader,)

    def _dial(self) -> Sequence[Any]:
        # What the one before still hands out is not delivered twice.
        return (self._make(self._last),)

    def _use(self, dialled: Sequence[Any]) -> None:
        self._reader = dialled[0]

    def _failed(self, error: Exception) -> None:
        self.error = error

    def close(self) -> None:
        super().close()
        if threading.current_thread() is not self._thread:
            self._thread.join()


class PulsarChannel(_Receiving, Channel):
    """On a topic that the broker stores nothing of."""

    matters = False

    def __init__(self, driver: PulsarDriver, client: pulsar.Client, name: str, hear: Callable[[bytes], None]) -> None:
        super().__init__(driver)
        self._client, self._name = client, name
        self._reader, self._producer = self._dial()
        self._read(lambda entry: hear(entry.data), "edgeserve-channel")

    def _dial(self) -> Sequence[Any]:
        # First, since it is what a broker without such topics refuses: of a producer it would say that it is only not ready.
        reader = self._client.create_reader(self._name, pulsar.MessageId.latest)
        try:
            return reader, self._client.create_producer(self._name, batching_enabled=False)
        except BaseException:
            quietly(reader.close)
            raise

    def _next(self, milliseconds: int) -> Any:
        return self._reader.read_next(milliseconds)

    def is_connected(self) -> bool:
        return bool(self._reader.is_connected() and self._producer.is_connected())

    def _opened(self) -> Sequence[Any]:
        return self._reader, self._producer

    def _use(self, dialled: Sequence[Any]) -> None:
        self._reader, self._producer = dialled

    def say(self, data: bytes) -> None:
        quietly(partial(self._producer.send_async, data, lambda *_: None))


def _next(receive: Callable[[int], Any], seconds: float, over: Callable[[], bool]) -> Entry | None:
    """What the client has received next; None when nothing came in time. `over`: whether this end was closed meanwhile."""
    began = time.monotonic()
    try:
        message = receive(int(seconds * 1000))
    except pulsar.Timeout:
        return None
    except pulsar.PulsarException as exc:
        _log.debug("a receive failed: %s", exc)
        if not over():
            time.sleep(max(0.0, min(_PAUSE_S, began + seconds - time.monotonic())))
        return None
    id_ = message.message_id()
    return Entry(entry_number(id_.ledger_id(), id_.entry_id()), message.data(), message.redelivery_count(), message)


def quietly(do: Callable[[], object]) -> None:
    """Does something whose failing changes nothing."""
    try:
        do()
    except (pulsar.PulsarException, ValueError) as exc:  # the latter of a consumer that was closed before
        _log.debug("%s", exc)


__all__ = ("Dialled", "PulsarChannel", "PulsarInlet", "PulsarOutlet", "PulsarTail", "id_of", "number_of", "quietly")
