"""What a connection to Pulsar hands out: where entries go in, where a group's come out, and what follows a topic."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

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
            self._producer.send_async(data, confirm)
        except pulsar.PulsarException as exc:
            raise named(driver.settings, exc, "write to", topic) from exc
        if refused:
            raise driver.too_large(topic, len(data))

    def close(self) -> None:
        self._driver.forget(self._producer)
        quietly(self._producer.close)


class PulsarInlet(Inlet):
    """See `Inlet`: a consumer."""

    def __init__(self, driver: PulsarDriver, consumer: pulsar.Consumer) -> None:
        self._driver, self._consumer = driver, consumer
        self._closed = False

    def poll(self, seconds: float) -> Entry | None:
        return None if self._over() else _next(self._consumer.receive, seconds, self._over)

    def _over(self) -> bool:
        return self._closed or self._driver.closed

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


class PulsarTail(Tail):
    """See `Tail`: a reader, and a thread that reads."""

    def __init__(self, driver: PulsarDriver, reader: pulsar.Reader, deliver: Deliver, topic: str) -> None:
        self._driver, self._reader, self._deliver = driver, reader, deliver
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"edgeserve-tail-{topic[:40]}", daemon=True)
        driver.threads.add(self._thread)
        self._thread.start()

    def _run(self) -> None:
        while not self._over():
            entry = _next(self._reader.read_next, _RECEIVE_S, self._over)
            if entry is not None:
                self._deliver(entry)

    def _over(self) -> bool:
        return self._closed or self._driver.closed

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._driver.forget(self._reader)
        quietly(self._reader.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class PulsarChannel(Channel):
    """On a topic that the broker stores nothing of."""

    def __init__(self, driver: PulsarDriver, client: pulsar.Client, name: str, hear: Callable[[bytes], None]) -> None:
        self._driver, self._hear, self._closed = driver, hear, False
        # Not among the driver's ends: whether it is connected is no trouble.
        # First, since it is what a broker without such topics refuses: of a producer it would say that it is only not ready.
        self._reader = client.create_reader(name, pulsar.MessageId.latest)
        try:
            self._producer = client.create_producer(name, batching_enabled=False)
        except BaseException:
            quietly(self._reader.close)
            raise
        self._thread = threading.Thread(target=self._run, name="edgeserve-channel", daemon=True)
        driver.threads.add(self._thread)
        self._thread.start()

    def _run(self) -> None:
        while not self._over():
            entry = _next(self._reader.read_next, _RECEIVE_S, self._over)
            if entry is not None:
                self._hear(entry.data)

    def _over(self) -> bool:
        return self._closed or self._driver.closed

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
