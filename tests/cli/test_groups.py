"""`edgeserve groups` shows who shares a topic, who holds its join, and what was dropped."""

from __future__ import annotations

import json
import threading

from tests.waiting import until

from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.transport import connect, disconnect


def pair(a: int, b: int) -> list[int]:
    return [a, b]


def send(node: str, source_id: str, *values: int) -> None:
    with DataSource(list(values), node, source_id=source_id, topic="in", event_time=int) as source:
        source.run(until="end")


def test_a_join_its_replicas_and_its_drops(edgeserve, node):
    send(node, "a", 1, 2, 3)
    send(node, "b", 2)
    options = {"topic_in": "in", "topic_out": "out", "join": "exact", "output_id": "pair"}
    with (
        Compute(pair, node, worker_id="old", task_version="1", **options),
        Compute(pair, node, worker_id="new", task_version="2", **options) as new,
    ):
        found = json.loads(edgeserve("groups", "in", "--json", "--node", node).stdout)[0]
        assert [m["version"] for m in found["members"]] == ["1", "2"]
        assert [m["name"].partition("@")[0] for m in found["members"]] == ["old", "new"]
        assert found["holder"] == found["members"][0]["name"] and found["kind"] == "failover"
        text = edgeserve("groups", "in", "--node", node).stdout
        assert "holds the join" in text and "runs sets" in text
        assert new.explain()["holds_the_join"] is False
    with Compute(pair, node, worker_id="old", **options) as alone:
        alone.run(until="end")
    (found,) = [g for g in json.loads(edgeserve("groups", "--json", "--node", node).stdout) if g["topic"] == "in"]
    assert (found["backlog"], found["sets"], found["dropped"], found["members"]) == (0, 0, {"unmatched": 2}, [])


def test_what_a_join_holds(edgeserve, node):
    send(node, "a", 1, 2, 3)
    with Compute(pair, node, worker_id="one", topic_in="in", topic_out="out", join="exact", output_id="pair", group="g") as compute:
        threading.Thread(target=compute.run).start()

        def held():
            return json.loads(edgeserve("groups", "in", "--json", "--node", node).stdout)[0]["held"]

        until(lambda: held() == 3)
        send(node, "b", 2)
        until(lambda: held() == 0)
        assert "HELD" in edgeserve("groups", "in", "--node", node).stdout
    assert held() is None  # closing it ends its run


def test_who_takes_a_join_over_corrects_what_was_said_of_it(edgeserve, node):
    def held():
        return json.loads(edgeserve("groups", "in", "--json", "--node", node).stdout)[0]["held"]

    options = {"topic_in": "in", "topic_out": "out", "join": "exact", "output_id": "pair", "group": "g"}
    send(node, "a", 1, 2, 3)
    with Compute(pair, node, worker_id="one", **options) as compute:
        threading.Thread(target=compute.run).start()
        until(lambda: held() == 3)
        send(node, "b", 1, 2, 3)
        until(lambda: compute.counters["sent"] == 3)
    with Compute(pair, node, worker_id="two", **options) as compute:
        threading.Thread(target=compute.run).start()
        until(lambda: held() == 0)


def test_partitions_are_groups_and_go_with_their_topic(edgeserve, node):
    options = {"topic_in": "in", "topic_out": "out", "join": "exact", "output_id": "pair", "by": True, "partitions": 3}
    for source_id in ("a", "b"):
        with DataSource([1], node, source_id=source_id, topic="in", event_time=int, key=str) as source:
            source.run()
    with Compute(pair, node, worker_id="one", group="g", **options) as compute:
        compute.run(until="end")
        found = json.loads(edgeserve("groups", "--json", "--node", node).stdout)
        assert [(g["topic"], g["group"], len(g["members"]), g["backlog"]) for g in found] == [("in", f"g#{n}of3", 1, 0) for n in (1, 2, 3)]
        assert {g["holder"].partition("@")[0] for g in found} == {"one"}
        assert "has live members" in edgeserve("topic", "delete", "in", "--yes", "--node", node).stderr
    assert edgeserve("topic", "forget", "in", "g#2of3", "--node", node).stdout == "forgot group g of in\n"
    assert json.loads(edgeserve("groups", "--json", "--node", node).stdout) == []
    with Compute(pair, node, worker_id="one", group="g", **options) as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 1
        assert "has live members" in edgeserve("topic", "forget", "in", "g", "--node", node).stderr
    assert edgeserve("topic", "delete", "in", "out", "--yes", "--node", node).returncode == 0
    assert json.loads(edgeserve("topic", "list", "--json", "--node", node).stdout) == []


def test_to_forget_can_be_taken_up_again(edgeserve, node):
    options = {"topic_in": "in", "topic_out": "out", "join": "exact", "output_id": "pair", "by": True, "partitions": 2}
    for source_id in ("a", "b"):
        with DataSource([1], node, source_id=source_id, topic="in", event_time=int, key=str) as source:
            source.run()
    with Compute(pair, node, worker_id="one", group="g", **options) as compute:
        compute.run(until="end")
    transport = connect(node)
    for number in (1, 2):  # as if it had been interrupted before the roster went
        transport.delete_group("in", f"g#{number}of2")
    disconnect(transport)
    assert edgeserve("topic", "forget", "in", "g", "--node", node).stdout == "forgot group g of in\n"
    assert "there is no group 'g'" in edgeserve("topic", "forget", "in", "g", "--node", node).stderr
    assert [topic["topic"] for topic in json.loads(edgeserve("topic", "list", "--json", "--node", node).stdout)] == ["in", "out"]


def test_nothing_and_a_topic_that_is_not_there(edgeserve, node):
    edgeserve("topic", "pub", "letters", "a", "--source-id", "me", "--node", node)
    assert edgeserve("groups", "--node", node).stdout == f"no groups on {node}\n"
    assert edgeserve("groups", "letters", "--node", node).stdout == "no groups on topic letters\n"
    assert "there is no topic 'numbers'" in edgeserve("groups", "numbers", "--node", node).stderr
