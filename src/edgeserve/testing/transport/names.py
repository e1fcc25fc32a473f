"""Cases: what is refused by name, and objects used after their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edgeserve.core.errors import ClosedError, ConfigurationError
from edgeserve.testing.transport.cases import LONG_MS, Open, TransportCases, drain, frames_of, numbered, positions_of, publish
from edgeserve.transport import GroupKind, Transport, connect, disconnect

_BAD_NAMES = ("", "a\0b", "x" * 1000, "ä" * 150, 7, None, b"bytes")


class NameCases(TransportCases):
    """Names, arguments, URLs, closed objects."""

    @pytest.mark.parametrize("name", _BAD_NAMES, ids=lambda n: repr(n)[:12])
    def test_bad_names_are_refused(self, transport: Transport, name: Any) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: transport.publisher(name),
            lambda: transport.subscribe([name], "g"),
            lambda: transport.subscribe(["a"], name),
            lambda: transport.fence(name, "holder"),
        ]
        for attempt in attempts:
            with pytest.raises(ConfigurationError):
                attempt()
        assert transport.topics() == []

    @pytest.mark.parametrize("name", ["a", "a.b-c_d", "with space", "ünï/çødé", "日本", "x" * 200, "h", "-", "a://b/c"])
    def test_any_other_text_is_a_name(self, transport: Transport, name: str) -> None:
        publish(transport, name, numbered(2))
        subscription = transport.subscribe([name], name, member=name[:60])
        broadcast = transport.subscribe([name], name[:100] + "-all", kind=GroupKind.BROADCAST, member=name[:60])
        assert frames_of(drain(subscription, 2)) == frames_of(drain(broadcast, 2)) == numbered(2)
        subscription.settle({}, ids=[b"i" * 16])
        assert transport.topics() == [name]
        assert transport.topic_info(name).groups[name].members == (name[:60],)

    def test_one_name_is_not_taken_for_the_beginning_of_another(self, transport: Transport) -> None:
        for topic in ("a", "ab", "a\x01"):
            publish(transport, topic, [topic.encode()])
            assert frames_of(drain(transport.subscribe([topic], "g"), 1)) == [topic.encode()]
        assert transport.topics() == sorted(["a", "ab", "a\x01"])

    @pytest.mark.parametrize(
        ("topics", "options"),
        [
            ([], {}),
            ("abc", {}),
            (["a", "a"], {}),
            (["a"], {"kind": "nonsense"}),
            (["a"], {"start": "newest"}),
            (["a"], {"start": 1.5}),
            (["a"], {"ack_timeout_ms": 0}),
            (["a"], {"ack_timeout_ms": -5}),
            (["a"], {"member": "a\0b"}),
            (["a"], {"member": "x" * 1000}),
        ],
        ids=repr,
    )
    def test_arguments_that_cannot_work_are_refused(self, transport: Transport, topics: Any, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            transport.subscribe(topics, "g", **options)
        assert transport.topics() == []

    @pytest.mark.parametrize("window", [0, -1])
    def test_a_send_window_must_let_something_through(self, transport: Transport, window: int) -> None:
        with pytest.raises(ConfigurationError):
            transport.publisher("a", send_window=window)

    def test_a_receive_must_ask_for_something(self, transport: Transport) -> None:
        with pytest.raises(ConfigurationError):
            transport.subscribe(["a"], "g").receive(0)

    def test_positions_of_a_topic_that_is_not_subscribed(self, transport: Transport) -> None:
        publish(transport, "b", numbered(1))
        ((_, at, _),) = transport.read("b")
        subscription = transport.subscribe(["a"], "g")
        with pytest.raises(ConfigurationError, match="'b'"):
            subscription.settle({"b": [at]}, {"out": [b"r"]})
        for method in (subscription.floor, subscription.pause, subscription.resume):
            with pytest.raises(ConfigurationError, match="'b'"):
                method("b")
        with pytest.raises(ConfigurationError, match="'b'"):
            subscription.nack("b", [at])
        assert list(transport.read("out")) == []

    def test_url_parameters_that_cannot_work_are_refused(self, url: str, wrong_parameters: Sequence[str]) -> None:
        for text in wrong_parameters:
            with pytest.raises(ConfigurationError, match=text.partition("=")[0]):
                disconnect(connect(f"{url}{'&' if '?' in url else '?'}{text}"))

    def test_connections_are_shared_and_end_with_the_last_user(self, url: str) -> None:
        one, two = connect(url), connect(url)
        assert one is two and one.url == url
        disconnect(one)
        publish(two, "a", numbered(1))
        disconnect(two)
        disconnect(two)
        with pytest.raises(ClosedError):
            two.topics()

    def test_a_closed_publisher(self, transport: Transport) -> None:
        publisher = transport.publisher("a")
        publisher.close()
        publisher.close()
        uses: list[Callable[[], object]] = [lambda: publisher.publish([b"x"]), lambda: publisher.publish([]), publisher.flush]
        for use in uses:
            with pytest.raises(ClosedError):
                use()

    def test_a_closed_subscription(self, transport: Transport) -> None:
        publish(transport, "a", numbered(1))
        subscription = transport.subscribe(["a"], "g")
        at = positions_of(subscription.receive(1, LONG_MS))
        subscription.close()
        subscription.close()
        attempts: list[Callable[[], object]] = [
            lambda: subscription.receive(1, 0),
            lambda: subscription.settle({"a": at}),
            lambda: subscription.nack("a", at),
            lambda: subscription.floor("a"),
            lambda: subscription.newest_decision("a"),
            subscription.settled_ids,
            subscription.attributes,
            subscription.flush,
        ]
        for attempt in attempts:
            with pytest.raises(ClosedError):
                attempt()
        subscription.wake()

    def test_a_closed_connection_takes_its_objects_along(self, open: Open, url: str) -> None:
        stays = open()
        publish(stays, "a", numbered(3))
        transport = connect(self.with_parameters(url, retention_s=1000))
        subscription, publisher = transport.subscribe(["a"], "g", member="one"), transport.publisher("a")
        fence = transport.fence("log", "one")
        at = positions_of(drain(subscription, 3, settle=False))
        disconnect(transport)
        attempts: list[Callable[[], object]] = [
            lambda: publisher.publish([b"x"]),
            lambda: subscription.receive(1, 0),
            lambda: subscription.settle({"a": at}),
            lambda: fence.append([b"x"]),
            lambda: transport.subscribe(["a"], "g"),
            lambda: transport.publisher("a"),
            lambda: transport.fence("log", "one"),
            lambda: list(transport.read("a")),
            lambda: transport.topic_info("a"),
            lambda: transport.delete_group("a", "g"),
            lambda: transport.delete_topic("a"),
            transport.topics,
        ]
        for attempt in attempts:
            with pytest.raises(ClosedError):
                attempt()
        subscription.close()
        publisher.close()
        transport.close()
        assert stays.topic_info("a").groups["g"].members == ()
        assert frames_of(drain(stays.subscribe(["a"], "g"), 3)) == numbered(3)


__all__ = ("NameCases",)
