"""`edgeserve topic` on real brokers: what it counts, what it deletes, and how long it waits for one that is away."""

from __future__ import annotations

import json
import uuid

import pytest
from tests import servers

from edgeserve.cli.brokers.manage import free_port
from edgeserve.cli.options import with_deadline
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker import engine


@pytest.fixture(params=["nats", "pulsar"])
def broker(request: pytest.FixtureRequest) -> str:
    """The URL of a space with nothing in it."""
    url = request.getfixturevalue(f"{request.param}_url")
    return f"{url}/{uuid.uuid4().hex}" if request.param == "nats" else servers.with_namespace(url)


def told(result) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_messages_are_counted_not_positions(edgeserve, broker: str):
    edgeserve("topic", "pub", "letters", *"abcdefgh", "--source-id", "me", "--node", broker)
    for letter in "ijkl":
        edgeserve("topic", "pub", "letters", letter, "--source-id", "me", "--node", broker)
    (listed,) = told(edgeserve("topic", "list", "--json", "--node", broker))
    assert (listed["topic"], listed["messages"], listed["more"]) == ("letters", 12, False)
    assert "groups" not in listed
    assert edgeserve("topic", "list", "--node", broker).stdout.splitlines()[1].split()[:2] == ["letters", "12"]
    assert "messages  12 (positions " in edgeserve("topic", "info", "letters", "--node", broker).stdout


def test_a_count_that_was_cut_short_says_so(broker: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "_COUNTED_ENTRIES", 5)
    transport = connect(broker)
    try:
        publisher = transport.publisher("a")
        for number in range(12):
            publisher.publish([b"%d" % number] * 2)
            publisher.flush()
        transport.subscribe(["a"], "g").close()
        info = transport.topic_info("a")
        assert (info.messages, info.more, info.groups["g"].backlog, info.groups["g"].more) == (10, True, 10, True)
    finally:
        disconnect(transport)


def test_a_topic_goes_with_its_groups_and_their_logs(edgeserve, broker: str):
    with DataSource([1, 2], broker, source_id="a", topic="in") as source:
        source.run()
    with DataSource([1, 2], broker, source_id="b", topic="in") as source:
        source.run()
    with Compute(lambda a, b: a + b, broker, topic_in="in", topic_out="out") as join:
        refused = edgeserve("topic", "delete", "in", "--yes", "--node", broker)
        join.run(until="end")
        in_use = edgeserve("topic", "delete", "in.in->out.sets", "--yes", "--node", broker)
    for result in (refused, in_use):
        assert result.returncode == 1 and "live members" in result.stderr, result.stdout + result.stderr
    assert edgeserve("topic", "delete", "in", "--node", broker).stderr.startswith("error: nobody is there who could be asked")
    assert {t["topic"] for t in told(edgeserve("topic", "list", "--json", "--node", broker))} == {"in", "in.in->out.sets", "out"}
    assert told(edgeserve("topic", "delete", "in", "--yes", "--json", "--node", broker)) == {
        "deleted": ["in", "in.in->out.sets"],
        "kept": [],
    }
    transport = connect(broker)
    try:
        assert transport.driver.topics() == ["out"]
    finally:
        disconnect(transport)


@pytest.mark.parametrize("command", [("list",), ("pub", "t", "1", "--source-id", "me")])
def test_a_broker_that_is_away_is_an_error_and_no_wait_for_ever(edgeserve, command: tuple[str, ...]):
    for node in (f"nats://127.0.0.1:{free_port()}", f"pulsar://127.0.0.1:{free_port()}?admin=http://127.0.0.1:{free_port()}"):
        result = edgeserve("topic", *command, "--node", f"{node}{'&' if '?' in node else '?'}deadline_s=1")
        assert result.returncode == 1
        assert [line.partition(":")[0] for line in result.stderr.splitlines()[-3:]] == ["error", "where", "to do"]


def test_the_deadline_is_of_those_who_look_and_only_where_the_url_has_none():
    assert with_deadline("nats://h:1/space") == "nats://h:1/space?deadline_s=8"
    assert with_deadline("pulsar://h?admin=http://h:1") == "pulsar://h?admin=http://h:1&deadline_s=8"
    for url in ("local://", "memory://x", "nats://h?deadline_s=60", "mine://h"):
        assert with_deadline(url) == url


def test_a_list_reads_no_log_of_a_group_unless_it_is_asked_for_groups(broker: str, monkeypatch: pytest.MonkeyPatch):
    from edgeserve.cli.topic import topic_infos

    transport = connect(broker)
    try:
        for number in range(3):
            with DataSource([1], broker, source_id="a", topic=f"t{number}") as source:
                next(source)
            transport.subscribe([f"t{number}"], "g").close()
        monkeypatch.setattr(engine.BrokerEngine, "replay", lambda *_: pytest.fail("a group's log was read, and nobody had asked for it"))
        assert [(info.name, info.messages) for info in topic_infos(transport, groups=False)] == [("t0", 1), ("t1", 1), ("t2", 1)]
    finally:
        disconnect(transport)
