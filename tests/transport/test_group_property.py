"""Whatever members of a group do in whatever order: each message is settled once, held by one, and none is forgotten."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from edgeserve.testing.transport.cases import opening
from edgeserve.transport import Delivery, GroupKind, Subscription, Transport
from edgeserve.transport.groups import Claim, GroupState, Waiting, settled_by_all

TOPICS = ("a", "b")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["publish", "join", "receive", "receive", "receive", "settle", "settle", "nack", "close"]),
        st.integers(0, 2),
        st.integers(1, 9),
    ),
    max_size=60,
)


class Model:
    """Members of one group, and what each has in its hands."""

    def __init__(self, transport: Transport, kind: GroupKind) -> None:
        self.transport, self.kind = transport, kind
        self.sent = dict.fromkeys(TOPICS, 0)
        self.settled: set[tuple[str, int]] = set()
        self.given_back: dict[tuple[str, int], int] = {}
        self.members: list[tuple[Subscription, dict[tuple[str, int], int]]] = []

    def publish(self, which: int, count: int) -> None:
        topic = TOPICS[which % 2]
        publisher = self.transport.publisher(topic, send_window=10**6)
        publisher.publish([b"%d" % n for n in range(self.sent[topic], self.sent[topic] + count)])
        publisher.close()
        self.sent[topic] += count

    def join(self) -> None:
        if len(self.members) < 3:
            self.members.append((self.transport.subscribe(TOPICS, "g", kind=self.kind), {}))

    def receive(self, which: int, count: int) -> list[Delivery]:
        subscription, hands = self.members[which % len(self.members)]
        found = subscription.receive(count, 0)
        assert len(found) <= count
        for frame, position, _, earlier, topic in found:
            key = (topic, position)
            assert bytes(frame) == b"%d" % position
            assert key not in self.settled, "settled, and came again"
            assert all(key not in other for _, other in self.members), "in two hands"
            assert earlier == self.given_back.get(key, 0)
            hands[key] = earlier
        return found

    def settle(self, which: int, keys: Sequence[tuple[str, int]]) -> None:
        subscription, hands = self.members[which % len(self.members)]
        subscription.settle({t: [p for topic, p in keys if topic == t] for t in TOPICS})
        for key in keys:
            del hands[key]
        self.settled.update(keys)

    def step(self, what: str, which: int, count: int) -> None:
        if what == "publish":
            self.publish(which, count)
        elif what == "join" or not self.members:
            self.join()
        elif what == "receive":
            self.receive(which, count)
        else:
            subscription, hands = self.members[which % len(self.members)]
            some = list(hands)[-count:] if count % 2 else list(hands)[:count]
            if what == "settle":
                self.settle(which, some)
            elif what == "nack":
                for topic, position in some:
                    subscription.nack(topic, [position])
                    self.given_back[topic, position] = hands.pop((topic, position)) + 1
            else:
                subscription.close()
                self.members.pop(which % len(self.members))

    def finish(self) -> None:
        """Everybody settles what they hold and leaves; one that comes then gets all the rest."""
        for n in range(len(self.members)):
            self.settle(n, list(self.members[n][1]))
        for topic in TOPICS:
            for subscription, _ in self.members:
                unsettled = [p for p in range(self.sent[topic]) if (topic, p) not in self.settled]
                assert subscription.floor(topic) == min(unsettled, default=self.sent[topic])
        for subscription, _ in self.members:
            subscription.close()
        self.members = []
        self.join()
        while self.receive(0, 7):
            self.settle(0, list(self.members[0][1]))
        assert self.settled == {(topic, p) for topic in TOPICS for p in range(self.sent[topic])}


@settings(max_examples=300)
@given(STEPS, st.sampled_from([GroupKind.SHARED, GroupKind.FAILOVER]))
def test_each_message_is_settled_once(steps: list[tuple[str, int, int]], kind: GroupKind) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    with opening(lambda: url) as open_it:
        model = Model(open_it(), kind)
        for what, which, count in steps:
            model.step(what, which, count)
        model.finish()


PARTS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5)


@given(st.lists(st.tuples(st.integers(0, 40), PARTS, PARTS), max_size=3), st.integers(0, 20), st.integers(0, 40))
def test_what_all_groups_have_settled(groups: list[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]], lo: int, hi: int) -> None:
    states, open_ = [], set[int]()
    for cursor, claimed, waiting in groups:
        claims = [Claim(at, at + size, "m", 0, 0) for at, size in claimed]
        states.append(GroupState(GroupKind.SHARED, cursor, claims=claims, waiting=[Waiting(at, at + size, 0, 0) for at, size in waiting]))
        open_.update(range(cursor, 50), *(range(at, at + size) for at, size in [*claimed, *waiting]))
    found = settled_by_all(states, lo, hi)
    assert [p for a, b in found for p in range(a, b)] == [p for p in range(lo, hi) if p not in open_]
    assert all(a < b for a, b in found)
