"""Apache Pulsar, a real one, held to the transport contract."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edgeserve import Compute, DataSource, Materialize
from edgeserve.testing.transport import TransportContract, drain, frames_of, publish
from edgeserve.testing.transport.cases import numbered
from edgeserve.transport import GroupKind, connect, disconnect
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.names import topic_name, user_name
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse


class TestPulsar(TransportContract):
    @pytest.fixture
    def url(self, pulsar_url: str) -> str:
        return _own_namespace(pulsar_url)

    @pytest.fixture
    def wrong_parameters(self) -> Sequence[str]:
        return ("bogus=1", "deadline_s=0", "deadline_s=-1", "deadline_s=many", "retention_mb=inf", "retention_s=nan", "size_mb=1")


def _own_namespace(pulsar_url: str) -> str:
    """The URL of a namespace in which there is nothing."""
    space = f"public/{uuid.uuid4().hex}"
    Admin(settings_from(parse(pulsar_url))).call(f"namespaces/{space}", "PUT", {})
    server, mark, parameters = pulsar_url.partition("?")
    return f"{server}/{space}{mark}{parameters}"


_VICTIM = """
import sys, time
from edgeserve.transport import GroupKind, connect
member = connect(sys.argv[1]).subscribe(["a"], "g", kind=GroupKind(sys.argv[2]))
found = []
while len(found) < 5:
    found += member.receive(5 - len(found), 20_000)
member.settle({"a": [d[1] for d in found[:2]]}, ids=[b"i" * 16])
member.flush()
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("kind", list(GroupKind)[:3])
def test_what_a_killed_member_had_begun_comes_again_as_a_redelivery(pulsar_url: str, kind: GroupKind, batch: int) -> None:
    transport = connect(_own_namespace(pulsar_url))
    victim = subprocess.Popen([sys.executable, "-c", _VICTIM, transport.url, kind.value], stdout=subprocess.PIPE)
    try:
        publish(transport, "a", numbered(10), batch=batch)
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        waiting = [] if kind is GroupKind.EXCLUSIVE else [transport.subscribe(["a"], "g", kind=kind)]
        victim.kill()
        before = time.monotonic()
        member = waiting[0] if waiting else transport.subscribe(["a"], "g", kind=kind)
        found = drain(member, 1)
        while bytes(found[-1][0]) != b"m9":
            found += drain(member, 1)
        assert time.monotonic() - before < 10
        # An acknowledgement may be on its way when a process dies: the message comes again, flagged, and its id is known.
        assert frames_of(found)[-8:] == numbered(8, start=2)
        assert set(frames_of(found)[:-8]) <= {b"m0", b"m1"}
        assert {d[3] for d in found[: len(found) - 8 + 3]} == {1}
        assert member.settled_ids() == [b"i" * 16]
        member.flush()
        assert member.receive(1, 100) == []
    finally:
        victim.kill()
        victim.communicate()
        disconnect(transport)


@pytest.mark.parametrize("task", [lambda a: a, lambda a, b: (a, b)], ids=["one", "join"])
def test_topics_named_in_full_need_no_group_of_the_user(pulsar_url: str, task: Callable[..., Any]) -> None:
    node = _own_namespace(pulsar_url)
    space = settings_from(parse(node)).space
    topic_in, topic_out = (f"persistent://{space}/{name}" for name in ("in", "out~1"))
    for source_id in "ab":
        with DataSource([source_id], node, source_id=source_id, topic="in") as source:
            source.run()
    with Compute(task, node, topic_in=topic_in, topic_out=topic_out) as compute:
        compute.run(until="end")
        assert compute.counters["sent"] == 1
    with Materialize(lambda x: x, node, topic="out~1") as sink:
        assert next(sink) in ("a", ["a", "b"], ("a", "b"))
    transport = connect(node)
    assert {"in", "out~1"} <= set(transport.topics())
    assert list(transport.topic_info(topic_in).groups) == [f"{topic_in}->{topic_out}"]
    disconnect(transport)


@pytest.mark.parametrize(
    "name", ["a", "a/b", "a~b", "a%2Fb", "persistent://other/space/a", "persistent://other/space/a~persistent://x/y/z~group"]
)
def test_a_name_comes_back_from_its_full_one_and_is_legal(name: str) -> None:
    full = topic_name("public/default", name)
    assert full.count("/") == 4
    assert user_name("public/default", full) == name
