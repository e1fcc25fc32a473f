"""A topic's channel is a help, nothing depends on it: a broker may have no topics that it does not store, and none keeps a trace of one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from tests.servers import Server, with_namespace

from edgeserve.testing.transport import drain
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import GroupKind
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.pulsar.driver import PulsarDriver
from edgeserve.transport.pulsar.names import channel_name


@pytest.fixture(scope="module")
def strict_pulsar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Pulsar that stores all of its topics."""
    server = Server("pulsar", tmp_path_factory.mktemp("strict"), settings={"enableNonPersistentTopics": "false"})
    yield server.url
    server.stop()


def test_where_channels_are_refused_joins_and_sources_go_on_without(strict_pulsar: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "edgeserve")
    transport = connect(with_namespace(strict_pulsar))
    frames = [b"%d" % n for n in range(200)]
    holder = transport.subscribe(["in"], "g", kind=GroupKind.FAILOVER)
    publisher = transport.publisher("in", send_window=50)
    for n in range(0, 200, 10):
        publisher.publish(frames[n : n + 10])
    assert [bytes(frame) for frame, *_ in drain(holder, 200)] == frames
    missing = {"group 'g' cannot hold back who sends to topic 'in'", "a join of topic 'in' cannot hold back who sends to it"}
    until = time.monotonic() + 20
    while missing:
        assert time.monotonic() < until
        missing -= {each for each in missing if any(each in record.getMessage() for record in caplog.records)}
    publisher.close()
    disconnect(transport)


def test_a_channel_that_was_closed_leaves_no_subscription(pulsar_url: str) -> None:
    transport = connect(with_namespace(pulsar_url))
    assert isinstance(transport, BrokerEngine) and isinstance(transport.driver, PulsarDriver)
    driver = transport.driver
    path = f"{driver.admin.topic_path(channel_name(driver.full('in')))}/subscriptions"
    stays = driver.channel("in", lambda _: None)  # without anybody the topic itself would be gone
    channels = [driver.channel("in", lambda _: None) for _ in range(3)]
    assert len(driver.admin.call(path)) == 4
    for channel in channels:
        channel.close()
    until = time.monotonic() + 10
    while len(driver.admin.call(path)) > 1:
        assert time.monotonic() < until
    stays.close()
    disconnect(transport)
