"""A topic that is deleted and made again while the group of a join stays: what was known of the old one is not said of the new one."""

from __future__ import annotations

import subprocess
from typing import cast

import pytest
from tests.cli.conftest import COMMAND
from tests.nodes.conftest import fresh, running
from tests.nodes.test_partitions import pair, replica, send, shared_out
from tests.waiting import until

from edgeserve.core.codec import decode_frame
from edgeserve.core.message import Kind
from edgeserve.transport import Transport
from edgeserve.transport.broker.engine import BrokerEngine

node = pytest.fixture(params=["local", "nats"], name="node")(fresh)
only_nats = pytest.mark.parametrize("node", ["nats"], indirect=True)
FIRST = list(range(40))


def rounds(transport: Transport) -> list[list[int]]:
    """The results of each round, up to its end."""
    found: list[list[int]] = [[]]
    for frame, _, _ in transport.read("out"):
        header, _ = decode_frame(frame)
        if header.kind == Kind.END:
            found.append([])
        else:
            found[-1].append(header.event_ns)
    return [sorted(each) for each in found]


def run(node: str, partitions: int) -> None:
    """Two replicas, until the end."""
    with running(*(replica(node, pair, n, partitions=partitions) for n in range(2))):
        pass


def delete_stream(transport: Transport) -> None:
    """As `nats stream rm` does it: nobody is asked, and the logs of groups stay, which are streams of their own."""
    cast(BrokerEngine, transport).driver.delete_topic("in")


@only_nats
@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("count", [40, 8])
def test_the_next_round_is_of_a_new_stream(node: str, transport: Transport, partitions: int, count: int) -> None:
    """With as many messages as the one before, so that an end may stand where the other stood, or with fewer."""
    send(node, 40)
    run(node, partitions)
    assert rounds(transport) == [FIRST, []]
    delete_stream(transport)
    send(node, count, first=100)
    run(node, partitions)
    assert rounds(transport) == [FIRST, list(range(100, 100 + count)), []]


@only_nats
@pytest.mark.parametrize("count", [40, 8])
def test_members_that_stay_go_on_with_the_new_stream(node: str, transport: Transport, count: int) -> None:
    """What they held of the old one, without partners, joins nothing and is in nobody's way."""
    replicas = [replica(node, pair, n) for n in range(2)]
    with running(*replicas):
        shared_out(*replicas)
        send(node, 40, "a")
        until(lambda: sum(each.explain()["held"] for each in replicas) == 40)
        delete_stream(transport)
        send(node, count, first=100)
    assert rounds(transport) == [list(range(100, 100 + count)), []]


@pytest.mark.parametrize("partitions", [1, 4])
def test_the_command_deletes_what_a_join_knew(node: str, transport: Transport, partitions: int) -> None:
    """An embedded engine numbers from 0 again."""
    send(node, 40)
    run(node, partitions)
    subprocess.run([COMMAND, "topic", "delete", "in", "--yes", "--node", node], check=True, capture_output=True, timeout=60)
    send(node, 40)  # the same ids, which nobody knows any more
    run(node, partitions)
    assert rounds(transport) == [FIRST, FIRST, []]
