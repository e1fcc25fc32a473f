"""What the cases share: fixtures, and the few steps that most of them take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest

from edgeserve.transport import Delivery, Frame, Subscription, Transport, connect, disconnect

LONG_MS = 20_000
"""A wait that only a broken engine sees the end of."""

MOMENT_MS = 20
"""How long one of several members is listened to before the next one is."""

Open = Callable[..., Transport]


@contextmanager
def opening(to_url: Callable[..., str]) -> Iterator[Open]:
    """Connections, and the subscriptions made with them, that live until the block's end even if nobody holds them."""
    opened: list[Transport] = []
    kept: list[Subscription] = []

    def open_it(**parameters: object) -> Transport:
        transport = connect(to_url(**parameters))
        opened.append(transport)
        subscribe = transport.subscribe

        def subscribe_and_keep(*arguments: Any, **options: Any) -> Subscription:
            kept.append(subscribe(*arguments, **options))
            return kept[-1]

        vars(transport)["subscribe"] = subscribe_and_keep
        return transport

    try:
        yield open_it
    finally:
        for subscription in kept:
            subscription.close()
        for transport in reversed(opened):
            disconnect(transport)


class TransportCases:
    """Fixtures: `url` comes from the engine's author, `open`, `transport` and `threads` from here."""

    @pytest.fixture
    def url(self) -> str:
        """The node URL of an engine with nothing in it yet."""
        raise NotImplementedError("override the fixture `url`")

    def with_parameters(self, url: str, **parameters: object) -> str:
        """The URL with parameters; for an engine that spells them otherwise to override."""
        return f"{url}{'&' if '?' in url else '?'}{urlencode(parameters)}" if parameters else url

    @pytest.fixture
    def wrong_parameters(self) -> Sequence[str]:
        """What the URL cannot have after its '?', each with the parameter that is wrong first; for an engine that knows others to
        override."""
        return ("bogus=1", "size_mb=0", "size_mb=-1", "size_mb=many", "size_mb=inf", "retention_s=nan")

    @pytest.fixture
    def open(self, url: str) -> Iterator[Open]:
        """Opens connections: `open()`, or `open(retention_mb=1)`. They and their subscriptions end with the test, and not before."""
        with opening(lambda **parameters: self.with_parameters(url, **parameters)) as open_it:
            yield open_it

    @pytest.fixture
    def transport(self, open: Open) -> Transport:
        """A connection without parameters."""
        return open()

    @pytest.fixture
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """Threads for what waits."""
        with ThreadPoolExecutor(8, "case") as pool:
            yield pool


def publish(transport: Transport, topic: str, frames: Sequence[Frame], *, batch: int = 256, send_window: int = 1_000_000) -> None:
    """Publishes and lets go."""
    publisher = transport.publisher(topic, send_window=send_window)
    for at in range(0, len(frames), batch):
        publisher.publish(frames[at : at + batch])
    publisher.close()


def drain(subscription: Subscription, count: int, *, batch: int = 256, settle: bool = True) -> list[Delivery]:
    """Receives exactly `count` messages; settles them batch by batch."""
    found: list[Delivery] = []
    while len(found) < count:
        some = subscription.receive(min(batch, count - len(found)), LONG_MS)
        assert some, f"{len(found)} of {count} messages came within {LONG_MS / 1000} s"
        if settle:
            settle_all(subscription, some)
        found.extend(some)
    return found


def collect(members: Sequence[Subscription], count: int, *, batch: int = 256, settle: bool = True) -> list[list[Delivery]]:
    """Receives exactly `count` messages by several members in turn, who may get any share of them; returns what each one got."""
    found: list[list[Delivery]] = [[] for _ in members]
    left, until = count, time.monotonic() + LONG_MS / 1000
    while left:
        assert time.monotonic() < until, f"{count - left} of {count} messages came within {LONG_MS / 1000} s"
        for member, mine in zip(members, found, strict=True):
            some = member.receive(min(batch, left), MOMENT_MS) if left else []
            if some and settle:
                settle_all(member, some)
            mine += some
            left -= len(some)
    return found


def soon(what: Callable[[], object]) -> None:
    """Waits for what a broker comes to know a moment after it was told."""
    ends = time.monotonic() + LONG_MS / 1000
    while not what():
        assert time.monotonic() < ends, f"not after {LONG_MS / 1000} s"
        time.sleep(MOMENT_MS / 1000)


def settle_all(subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
    """Settles deliveries of any topics."""
    subscription.settle(acks_of(deliveries))


def acks_of(deliveries: Sequence[Delivery]) -> dict[str, list[int]]:
    """Topic to positions, as `settle` takes them."""
    acks: dict[str, list[int]] = {}
    for _, position, _, _, topic in deliveries:
        acks.setdefault(topic, []).append(position)
    return acks


def flush_all(*members: Subscription) -> None:
    """What these have settled is durable, and then known to each of them."""
    for member in [*members, *members]:
        member.flush()


def frames_of(deliveries: Sequence[Delivery]) -> list[bytes]:
    """The frames as bytes."""
    return [bytes(d[0]) for d in deliveries]


def positions_of(deliveries: Sequence[Delivery]) -> list[int]:
    """The positions."""
    return [d[1] for d in deliveries]


def again_of(deliveries: Sequence[Delivery]) -> list[int]:
    """How often each was delivered before."""
    return [d[3] for d in deliveries]


def together(shares: Iterable[Sequence[Delivery]]) -> list[Delivery]:
    """What several members got, in stored order."""
    return sorted((d for share in shares for d in share), key=lambda d: d[1])


def numbered(count: int, prefix: str = "m", start: int = 0) -> list[bytes]:
    """Frames that differ."""
    return [f"{prefix}{n}".encode() for n in range(start, start + count)]


__all__ = (
    "LONG_MS",
    "MOMENT_MS",
    "Open",
    "TransportCases",
    "acks_of",
    "again_of",
    "collect",
    "drain",
    "flush_all",
    "frames_of",
    "numbered",
    "opening",
    "positions_of",
    "publish",
    "settle_all",
    "soon",
    "together",
)
