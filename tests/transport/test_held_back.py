"""A source on a broker is held back by a join that has too much of it, and never for what the join merely keeps."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.servers import with_namespace

from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import GroupKind


@pytest.fixture(params=["nats", "pulsar"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "pulsar":
        return with_namespace(request.getfixturevalue("pulsar_url"))
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


def test_nobody_waits_for_the_message_that_a_join_keeps_while_it_settles_those_of_another_source(url: str) -> None:
    transport, over, joins = connect(url), threading.Event(), threading.Event()

    def join() -> None:
        """Keeps the newest message of each source, as `latest` does."""
        holder = transport.subscribe(["in"], "g", kind=GroupKind.FAILOVER)
        kept: dict[bytes, int] = {}
        joins.set()
        while not over.is_set():
            settled = []
            for frame, position, *_ in holder.receive(1_024, 100):
                if (before := kept.pop(bytes(frame), None)) is not None:
                    settled.append(before)
                kept[bytes(frame)] = position
            if settled:
                holder.settle({"in": settled})
        holder.close()

    def send_steadily() -> None:
        publisher = transport.publisher("in")
        while not over.wait(0.02):
            publisher.publish([b"b"])

    def send_fast() -> None:
        publisher = transport.publisher("in", send_window=100)
        for _ in range(4):
            publisher.publish([b"a"] * 512)  # one entry
            publisher.flush()

    with ThreadPoolExecutor() as threads:
        try:
            joining = threads.submit(join)
            assert joins.wait(20)
            steady = threads.submit(send_steadily)
            threads.submit(send_fast).result(20)
        finally:
            over.set()
    joining.result()
    steady.result()
    disconnect(transport)
