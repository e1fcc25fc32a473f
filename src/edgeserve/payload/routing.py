"""How a producer's large payloads travel under routing='auto': what was measured in, a way and its reason out. No I/O, no clock.

The price of a message is counted in payloads that cross a network. Sent with the message, a payload goes into the broker once and out of it
to every group; left in place, it is fetched once by each host that uses it. To or from a broker on the same host it costs `NEAR`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec

Mode: TypeAlias = Literal["eager", "lazy"]

MARGIN = 0.2
"""What the other way has to save, as a share of the price, to be worth a change."""

HOLD_S, LEAST = 10.0, 20
"""A way is kept for so long, and for so many messages."""

WINDOW = 128
"""About how many of the newest messages of a group its figures are of."""

FETCH_BYTES = 32 << 10
"""What a fetch costs beside the payload: the link carries nothing of it for a round trip, some 2 ms at 100 Mbit/s."""

NEAR = 0.1
AVOID_S = 300.0
"""For how long payloads go with their messages when a host could not fetch one; each time twice as long."""

FORGET_S = 60.0
"""A group that says nothing for so long, while there is something to be said, counts no more."""

_SMOOTH_S = 10.0
_MOST_GROUPS, _MOST_HOSTS = 256, 256

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
_Figure: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=2**62)]


class Use(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="use"):
    """What a member of a group says of the large payloads that it was handed since it said so last.

    Attributes:
        group: the member's.
        host: names the memory that it reads payloads in, see `place.memory_name`.
        near: whether the broker is on its host.
        sources: source id to (how many messages, the payloads of how many of them were used).
        unreachable: the addresses that it could not fetch a payload from.
    """

    group: str
    host: str
    near: bool
    sources: dict[str, tuple[_Count, _Count]]
    unreachable: tuple[str, ...] = ()


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """A group that takes a producer's messages, as the producer knows it.

    Attributes:
        group: its name.
        share: of the payloads, that it uses.
        eager_bytes_s, lazy_bytes_s: what crosses a network for it when payloads go with their messages, and when they stay.
        saved_bytes: how many fewer the way that was taken has cost than the other; below 0: more.
    """

    group: str
    share: _Figure
    eager_bytes_s: _Figure
    lazy_bytes_s: _Figure
    saved_bytes: Annotated[float, msgspec.Meta(gt=-(2**62), lt=2**62)]


class Route(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="route"):
    """What a producer says of its large payloads.

    Attributes:
        source: the source id of its messages.
        producer: names it among all.
        mode: how they travel now; `since_ns`: and since when.
        mean_bytes, rate_hz: of the newest.
        reason: why they travel so.
        edges: the groups that have said what they use.
        ended: it sends no more.
    """

    source: str
    producer: str
    mode: Mode
    since_ns: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    mean_bytes: _Figure
    rate_hz: _Figure
    reason: str
    edges: tuple[Edge, ...]
    ended: bool = False


class _Tally(msgspec.Struct):
    """Of one host in a group: messages, used payloads, whether the broker is on it."""

    seen: float = 0.0
    used: float = 0.0
    near: bool = False


class _Group:
    """Attributes:
    hosts: by their names.
    at_s, sent: when it was last heard of, and how many messages had been sent by then.
    saved_bytes: see `Edge`.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, _Tally] = {}
        self.at_s, self.sent, self.saved_bytes = 0.0, 0, 0.0

    @property
    def seen(self) -> float:
        return sum(tally.seen for tally in self.hosts.values())

    def hear(self, host: str, seen: int, used: int, *, near: bool) -> None:
        tally = self.hosts.get(host)
        if tally is None:
            if len(self.hosts) >= _MOST_HOSTS:
                return
            tally = self.hosts[host] = _Tally()
        tally.seen, tally.used, tally.near = tally.seen + seen, tally.used + used, near
        if (total := self.seen) > WINDOW:
            for each in self.hosts.values():
                each.seen, each.used = each.seen * WINDOW / total, each.used * WINDOW / total
            self.hosts = {name: each for name, each in self.hosts.items() if each.seen > 0.01}


class _Price(msgspec.Struct):
    """Of one message, for one group, in payloads: by what it costs, and by what crosses a network."""

    share: float = 0.0
    eager: float = 0.0
    lazy: float = 0.0
    eager_far: float = 0.0
    lazy_far: float = 0.0


class Router:
    """Decides for one producer. Not thread-safe.

    Args:
        source: the source id of its messages.
        origin: where from others fetch its payloads; "": nobody needs to.
        host: see `Use`; near: whether the broker is on its host.
        why_not: why its payloads have to go with their messages, whatever it costs; "": they have not.
        now_s: the time, in seconds on any clock that only goes on; so in all that follows.

    Attributes:
        source: as given.
        mode, since_s, reason: the decision, when it was made, and why, as of the last `decide`.
        mean_bytes, rate_hz: see `Route`.
    """

    def __init__(self, source: str, now_s: float, *, origin: str = "", host: str = "", near: bool = False, why_not: str = "") -> None:
        self.source, self._origin, self._why_not = source, origin, why_not
        self.host, self.near = host, near
        self.mode: Mode = "eager" if why_not else "lazy"
        self.since_s, self.reason = now_s, why_not
        self.mean_bytes = self.rate_hz = 0.0
        self._groups: dict[str, _Group] = {}
        self._sent, self._weight = 0, 0.0
        self._began_s = self._sent_s = now_s
        # Since the last change: of messages that were sent, and that groups have told of.
        self._sent_since = self._heard_since = 0
        self._avoid_until_s, self._avoid_s = now_s, AVOID_S

    def sent(self, count: int, size: int, now_s: float, *, apart: int | None = None) -> None:
        """So many large payloads were sent since this was called last, with `size` bytes, of which `apart` stayed in place."""
        took_s, self._sent_s = now_s - self._sent_s, now_s
        if took_s > 0:
            self.rate_hz += (count / took_s - self.rate_hz) * max(
                -math.expm1(-took_s / _SMOOTH_S), took_s / max(1.0, now_s - self._began_s)
            )
        if not count:
            return
        self._sent += count
        self._sent_since += count
        self._weight = min(self._weight + count, max(WINDOW, count))
        self.mean_bytes += (size / count - self.mean_bytes) * count / self._weight
        moved = size if self.mode == "eager" or apart is None else apart
        for group, price in self._priced():
            saved = moved * (price.eager_far - price.lazy_far)
            self._groups[group].saved_bytes += saved if self.mode == "lazy" else -saved

    def heard(self, use: Use, now_s: float) -> None:
        """A member of a group has said what it uses."""
        if self._origin and self._origin in use.unreachable and now_s >= self._avoid_until_s and self.mode == "lazy":
            self._avoid_until_s, self._avoid_s = now_s + self._avoid_s, 2 * self._avoid_s
        seen, used = use.sources.get(self.source, (0, 0))
        group = self._groups.get(use.group)
        if group is None:
            if not seen or len(self._groups) >= _MOST_GROUPS:
                return
            group = self._groups[use.group] = _Group()
        if seen or used:
            group.hear(use.host, seen, used, near=use.near)
            group.at_s, group.sent = now_s, self._sent
            self._heard_since += seen

    def decide(self, now_s: float) -> Mode:
        """How payloads travel from now on."""
        if self._why_not:
            return self.mode
        self._forget(now_s)
        prices = [price for _, price in self._priced()]
        eager = sum(price.eager for price in prices) if prices else self._in
        lazy = sum(price.lazy for price in prices)
        if now_s < self._avoid_until_s:
            self._change("eager", now_s)
            self.reason = f"a host could not fetch from {self._origin}; tried again in {math.ceil((self._avoid_until_s - now_s) / 60)} min"
            return self.mode
        price, other = (lazy, eager) if self.mode == "lazy" else (eager, lazy)
        worth = other < price * (1 - MARGIN)
        held = now_s - self.since_s >= HOLD_S and (self._heard_since if prices else self._sent_since) >= LEAST
        if worth and held:
            self._change("eager" if self.mode == "lazy" else "lazy", now_s)
        self.reason = self._why(eager, lazy, heard=bool(prices))
        if worth and not held:
            self.reason += "; a change waits for more messages, or for some seconds"
        elif other < price and not worth:
            self.reason += f"; less than {MARGIN:.0%} apart is not worth a change"
        return self.mode

    def edges(self) -> Iterator[Edge]:
        """The groups, by name."""
        bytes_s = self.rate_hz * self.mean_bytes
        for group, price in sorted(self._priced()):
            saved = self._groups[group].saved_bytes
            yield Edge(
                group=group,
                share=min(1.0, price.share),
                eager_bytes_s=bytes_s * price.eager_far,
                lazy_bytes_s=bytes_s * price.lazy_far,
                saved_bytes=saved,
            )

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _in(self) -> float:
        """The price of a payload's way to the broker."""
        return NEAR if self.near else 1.0

    def _why(self, eager: float, lazy: float, *, heard: bool) -> str:
        if not heard:
            return "no group has said yet what it uses"
        if not lazy:
            return "what is used is read in place, on this host"
        return f"for each message, fetching what is used costs {lazy:.2f} payloads, sending all {eager:.2f}"

    def _change(self, mode: Mode, now_s: float) -> None:
        if mode != self.mode:
            self.mode, self.since_s = mode, now_s
            self._sent_since = self._heard_since = 0

    def _forget(self, now_s: float) -> None:
        def counts(group: _Group) -> bool:
            return now_s - group.at_s < FORGET_S or self._sent - group.sent < LEAST

        self._groups = {name: group for name, group in self._groups.items() if counts(group)}

    def _priced(self) -> list[tuple[str, _Price]]:
        """What each group costs. The way into the broker is shared by all; a fetch by those on one host that use the same payload."""
        groups = {name: group for name, group in self._groups.items() if group.seen > 0}
        fetched: dict[str, float] = {}
        for group in groups.values():
            for host, share in _used(group).items():
                fetched[host] = fetched.get(host, 0.0) + share
        once = {host: min(1.0, share) / share for host, share in fetched.items() if share}
        fetch = 1 + FETCH_BYTES / self.mean_bytes if self.mean_bytes else 1.0
        return [(name, self._price(group, once, fetch, len(groups))) for name, group in groups.items()]

    def _price(self, group: _Group, once: Mapping[str, float], fetch: float, groups: int) -> _Price:
        seen, price = group.seen, _Price(eager=self._in / groups, eager_far=(not self.near) / groups)
        for tally in group.hosts.values():
            part = tally.seen / seen
            price.eager += part * (NEAR if tally.near else 1.0)
            price.eager_far += part * (not tally.near)
        for host, share in _used(group).items():
            price.share += share
            if host and host == self.host:
                continue
            price.lazy_far += share * once.get(host, 1.0)
        price.lazy = price.lazy_far * fetch
        return price


def _used(group: _Group) -> dict[str, float]:
    """By host the share of the group's messages whose payloads are used there."""
    seen = group.seen
    return {host: min(tally.used, tally.seen) / seen for host, tally in group.hosts.items()}


__all__ = ("AVOID_S", "FORGET_S", "HOLD_S", "LEAST", "MARGIN", "WINDOW", "Edge", "Mode", "Route", "Router", "Use")
