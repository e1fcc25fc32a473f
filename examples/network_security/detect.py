"""Decides from flow records which host scans which: pure code, fed with both taps' windows or, for comparison, with one of them.

Tap A sees what clients ask, tap B what servers answer. A conversation is judged once, one window after it first showed, because its
answer may come in the next window. Evidence is counted per pair of hosts as distinct server ports within a sliding horizon, so that a
slow scan adds up. An alert is raised while any of the counters passes its threshold (`thresholds.json`, chosen on the train recording).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec
from flows import Flow
from pcap import UDP

HORIZONS = (3, 10, 30)
"""In windows."""
FORGET_WINDOWS = 300

Pair = tuple[str, str]
Key = tuple[str, str, int, int, int]
"""A conversation: client, server, protocol, the client's port, the server's port."""
Counter = tuple[str, int]
"""A kind of evidence and the horizon over which it is counted."""


class Alert(msgspec.Struct, frozen=True):
    """`src` scans `dst`; `start_ns` is the window that was judged, `why` the counter that passed its threshold."""

    start_ns: int
    src: str
    dst: str
    why: str
    ports: int
    horizon: int


class _Talk:
    """A conversation, as far as the taps have shown it."""

    __slots__ = ("acks", "data", "last", "negative", "positive", "syns", "udp")

    def __init__(self) -> None:
        self.last = 0
        self.syns = self.acks = self.data = self.udp = self.positive = self.negative = 0

    def ask(self, flow: Flow) -> None:
        if flow.proto == UDP:
            self.udp += flow.packets
        else:
            self.syns += flow.syn
            # A bare reset is the client's kernel at the end of a connection: no question.
            self.acks += flow.packets - flow.syn - flow.rst
            self.data += flow.payload_bytes + flow.rst

    def answer(self, flow: Flow) -> None:
        bad = flow.rst + flow.unreachable
        self.negative += bad
        self.positive += flow.packets - bad

    def kinds(self) -> Iterable[str]:
        """The kinds of evidence in what was asked and answered."""
        asked = self.syns or self.acks or self.udp
        lone_syn = self.syns and not self.acks and not self.data
        lone_ack = self.acks and not self.syns and not self.data
        probe = lone_syn or lone_ack or self.udp
        refused = self.negative and not self.positive
        found = {
            "asked": asked,
            "probe": probe,
            "lone_syn": lone_syn,
            "lone_ack": lone_ack,
            "udp": self.udp,
            "refused": refused,
            "answered": self.positive,
            "probe_failed": probe and not self.positive,
            "probe_refused": probe and refused,
        }
        return [kind for kind, holds in found.items() if holds]


class Evidence:
    """The state of the detector: conversations, and per pair of hosts when each server port last gave evidence of each kind."""

    def __init__(self) -> None:
        self.now = 0
        self.talks: dict[Key, _Talk] = {}
        self.fresh: list[Key] = []
        self.ports: dict[Pair, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))

    def observe(self, asked: Iterable[Flow], answered: Iterable[Flow]) -> dict[Pair, dict[Counter, int]]:
        """Takes the next window of both taps; returns the counters of all pairs that gave evidence in the window before."""
        self.now += 1
        judged, self.fresh = self.fresh, []
        for flow in asked:
            self._talk((flow.src, flow.dst, flow.proto, flow.sport, flow.dport)).ask(flow)
        for flow in answered:
            self._talk((flow.dst, flow.src, flow.proto, flow.dport, flow.sport)).answer(flow)
        active: dict[Pair, dict[Counter, int]] = {}
        for key in judged:
            client, server, _, _, port = key
            for kind in self.talks[key].kinds():
                self.ports[client, server][kind][port] = self.now
                active[client, server] = {}
        for pair in active:
            active[pair] = self._count(pair)
        if self.now % FORGET_WINDOWS == 0:
            self._forget()
        return active

    def _talk(self, key: Key) -> _Talk:
        talk = self.talks.get(key)
        if talk is None:
            talk = self.talks[key] = _Talk()
            self.fresh.append(key)
        talk.last = self.now
        return talk

    def _count(self, pair: Pair) -> dict[Counter, int]:
        counts = {}
        for kind, seen in self.ports[pair].items():
            for port in [port for port, last in seen.items() if last <= self.now - max(HORIZONS)]:
                del seen[port]
            for horizon in HORIZONS:
                counts[kind, horizon] = sum(last > self.now - horizon for last in seen.values())
        return counts

    def _forget(self) -> None:
        self.talks = {key: talk for key, talk in self.talks.items() if talk.last > self.now - FORGET_WINDOWS}
        for pair in list(self.ports):
            self._count(pair)
            if not any(self.ports[pair].values()):
                del self.ports[pair]


def judge(start_ns: int, counts: Mapping[Pair, Mapping[Counter, int]], thresholds: Mapping[Counter, float]) -> list[Alert]:
    """The alerts for one window: one for each pair with a counter at or above its threshold."""
    alerts = []
    for (src, dst), counted in counts.items():
        over = [(counted[c] / at, c) for c, at in thresholds.items() if counted.get(c, 0) >= at]
        if over:
            _, (kind, horizon) = max(over)
            alerts.append(Alert(start_ns, src, dst, kind, counted[kind, horizon], horizon))
    return alerts
