"""What a connection to Pulsar hands out: where entries go in, where a group's come out, and what follows a topic."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import _pulsar
import pulsar

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


class PulsarOutlet(Outlet):
    """See `Outlet`: a producer."""

    def __init__(self, driver: PulsarDriver, topic: str, producer: pulsar.Producer) -> None:
        self._driver, self._topic, self._producer = driver, topic, producer
        # Without the client's Python wrapper, which checks ten arguments that are never given: of one message at a time that takes as
        # long as all that is done with it here.
        self._hand_over = producer._producer.send_async

    def send(self, data: bytes, done: Done) -> None:
        driver, topic = self._driver, self._topic
        me, refused = threading.get_ident(), []

        def confirm(result: Any, message_id: Any) -> None:
            if result == pulsar.Result.Ok:
                done(number_of(message_id), None)
            elif result == pulsar.Result.MessageTooBig and threading.get_ident() == me:
                refused.append(result)  # on the spot, by the client itself
            else:
                done(None, failed(driver.settings, result, topic))

        try:
            message = _pulsar.MessageBuilder()
            message.content(data)
            self._hand_over(message.build(), confirm)
        except pulsar.PulsarException as exc:
            raise named(driver.settings, exc, "write to", topic) from exc
        if refused:
            raise driver.too_large(topic, len(data))

    def close(self) -> None:
        self._driver.forget(self._producer)
        quietly(self._producer.close)


class _Receiving:
    """What comes from the client, until this end or its connection is closed."""

    def __init__(self, driver: PulsarDriver) -> None:
        self._driver, self._closed = driver, False

    def _over(self) -> bool:
        return self._closed or self._driver.closed

    def _failed(self, error: Exception) -> None:
        """Nothing is read any more."""
        _log.warning("a connection to %s is not read any more: %s: %s", self._driver.settings.shown, type(error).__name__, error)

    def _read(self, reader: pulsar.Reader, take: Callable[[Entry], object], name: str) -> threading.Thread:
        """Begins to read, in a thread."""

        def run() -> None:
            try:
                while not self._over():
                    entry = _next(reader.read_next, _RECEIVE_S, self._over)
                    if entry is not None:
                        take(entry)
            except Exception as exc:
                self._failed(exc)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._driver.threads.add(thread)
        thread.start()
        return thread


class PulsarInlet(_Receiving, Inlet):
    """See `Inlet`: a consumer."""

    def __init__(self, driver: PulsarDriver, consumer: pulsar.Consumer) -> None:
        super().__init__(driver)
        self._consumer = consumer
        # Likewise: a message as it comes has the same methods, and can be acknowledged.
        self._receive = consumer._consumer.receive

    def poll(self, seconds: float) -> Entry | None:
        return None if self._over() else _next(self._receive, seconds, self._over)

    def acknowledge(self, entry: Entry) -> None:
        # When it fails the entry comes back, and the desk says again that it is done.
        quietly(partial(self._consumer.acknowledge, entry.token))

    def give_back(self, entry: Entry) -> None:
        quietly(partial(self._consumer.negative_acknowledge, entry.token))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._driver.forget(self._consumer)
        quietly(self._consumer.close)


class PulsarTail(_Receiving, Tail):
    """See `Tail`: a reader, and a thread that reads."""

    def __init__(self, driver: PulsarDriver, reader: pulsar.Reader, deliver: Deliver, topic: str) -> None:
        super().__init__(driver)
        self._reader = reader
        self._thread = self._read(reader, deliver, f"edgeserve-tail-{topic[:40]}")

    def _failed(self, error: Exception) -> None:
        self.error = error

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._driver.forget(self._reader)
        quietly(self._reader.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class PulsarChannel(_Receiving, Channel):
    """On a topic that the broker stores nothing of."""

    def __init__(self, driver: PulsarDriver, client: pulsar.Client, name: str, hear: Callable[[bytes], None]) -> None:
        super().__init__(driver)
        # Not among the driver's ends: whether it is connected is no trouble.
        # First, since it is what a broker without such topics refuses: of a producer it would say that it is only not ready.
        self._reader = client.create_reader(name, pulsar.MessageId.latest)
        try:
            self._producer = client.create_producer(name, batching_enabled=False)
        except BaseException:
            quietly(self._reader.close)
            raise
        self._read(self._reader, lambda entry: hear(entry.data), "edgeserve-channel")

    def say(self, data: bytes) -> None:
        quietly(partial(self._producer.send_async, data, lambda *_: None))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        quietly(self._producer.close)
        quietly(self._reader.close)


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
    except pulsar.PulsarException as exc:
        _log.debug("%s", exc)


__all__ = ("PulsarChannel", "PulsarInlet", "PulsarOutlet", "PulsarTail", "id_of", "number_of", "quietly")
