"""What `edgeserve run` does for payloads of routing='lazy': other hosts can have this one's while its nodes run, and then while they want
them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Self

from edgeserve.cli.options import BROKERS, with_deadline
from edgeserve.cli.wiring import Listed
from edgeserve.core.errors import EdgeServeError, UnknownTopic
from edgeserve.payload import Serving, advertised
from edgeserve.stage.payloads import LeftBehind
from edgeserve.transport import Transport, connect, disconnect
from edgeserve.transport.url import parse

LINGER_S = 60.0
"""How long is waited for groups that settle nothing."""

_LOOK_EVERY_S, _TELL_AFTER_S, _END_S = 0.5, 1.0, 2.0

Tell = Callable[[str, int | None, list[str]], object]
"""Takes a line, how many payloads are not settled (None: the broker does not say), and the groups that have not settled all."""


def lazy_topics(nodes: Iterable[Listed]) -> dict[str, set[str]]:
    """By the URL of each broker the topics that these nodes send to while payloads stay on their host."""
    found: dict[str, set[str]] = {}
    for node in nodes:
        if node.wiring.lazy and node.wiring.topic_out is not None and parse(node.url).scheme in BROKERS:
            found.setdefault(node.url, set()).add(node.wiring.topic_out)
    return found


class HostPayloads:
    """Serves this host's payloads while it is open, if these topics are sent to and others know the host's address.

    Args:
        topics: see `lazy_topics`.
        read: of these, or others, those that somebody is to read: their payloads are wanted even if nobody reads them yet.
        linger_s: how long `wanted` stays true while nothing is settled.
        tell: is told what is waited for, and when that is given up; from another thread.

    Raises:
        ConfigurationError, TransportError: when it is opened: it cannot serve as the settings say.
    """

    def __init__(self, topics: Mapping[str, Set[str]], read: Set[str], linger_s: float, tell: Tell) -> None:
        self._topics, self._read, self._linger_s, self._tell = topics, read, linger_s, tell
        self._serving: Serving | None = None
        self._closed = threading.Event()
        self._looks: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._topics and advertised() is not None:
            self._serving = Serving()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._looks is not None:
            self._looks.join(_END_S)  # a broker that is away would keep it for longer
        if self._serving is not None:
            self._serving.close()

    def wanted(self) -> bool:
        """Whether groups have yet to settle what senders that have ended have left here. To be asked again and again: returns at once."""
        if self._serving is None or not self._linger_s:
            return False
        if self._looks is None:
            self._looks = threading.Thread(target=self._wait, name="edgeserve-payloads", daemon=True)
            self._looks.start()
        return self._looks.is_alive()

    def _wait(self) -> None:
        """Returns when all is settled, when nothing was for long enough, or when it is closed."""
        began = since = time.monotonic()
        least: int | None = None
        told = False
        with contextlib.ExitStack() as stack:
            brokers = [_Broker(url, topics, self._read, stack) for url, topics in self._topics.items()]
            while not self._closed.is_set():
                settled_soon = time.monotonic() - began < _TELL_AFTER_S
                with contextlib.suppress(EdgeServeError, OSError):  # a broker that is away, no descriptors: it is asked again
                    left = sum(each.left() if settled_soon else each.wanted() for each in brokers)
                    if not left:
                        return
                    if least is None or left < least:
                        least, since = left, time.monotonic()
                now, groups = time.monotonic(), sorted(set().union(*(each.groups for each in brokers)))
                what = "payloads of this host" if least is None else f"{least} payload{'s' if least > 1 else ''} of this host"
                if now - since >= self._linger_s:
                    self._tell(f"{what} not settled for {self._linger_s:g} s: ends without waiting for them any longer", least, groups)
                    return
                if not told and not settled_soon:
                    told = True
                    by = f"by {', '.join(groups)}" if groups else "by tasks that have not begun"
                    self._tell(
                        f"waiting until {what} are settled {by}, at most {self._linger_s:g} s for the next; Ctrl-C ends it", least, groups
                    )
                self._closed.wait(_LOOK_EVERY_S)


class _Broker:
    """What senders that have ended have left here on some topics of a broker.

    Attributes:
        groups: those that had not settled all when something was first found on their topic.
    """

    def __init__(self, url: str, topics: Set[str], read: Set[str], stack: contextlib.ExitStack) -> None:
        self._url, self._topics, self._read, self._stack = with_deadline(url), topics, read, stack
        self._opened: tuple[Transport, LeftBehind] | None = None
        self._wanted: dict[str, bool] = {}
        self.groups = set[str]()

    def left(self) -> int:
        """How many payloads are not settled. Raises `EdgeServeError` while the broker is away, and `OSError`."""
        return self._count().total()

    def wanted(self) -> int:
        """How many of them somebody is to read. Raises as `left` does."""
        left = self._count()
        for topic in left.keys() - self._wanted.keys():
            self._wanted[topic] = self._is_wanted(topic, self._open()[0])
        return sum(count for topic, count in left.items() if self._wanted[topic])

    def _count(self) -> Counter[str]:
        return self._open()[1].count(self._topics)

    def _open(self) -> tuple[Transport, LeftBehind]:
        if self._opened is None:
            transport = connect(self._url)
            self._stack.callback(disconnect, transport)
            self._opened = transport, LeftBehind(transport)
        return self._opened

    def _is_wanted(self, topic: str, transport: Transport) -> bool:
        try:
            groups = transport.topic_info(topic).groups
        except UnknownTopic:
            return False
        self.groups |= {name for name, group in groups.items() if group.backlog}
        return bool(groups) or topic in self._read


__all__ = ("LINGER_S", "HostPayloads", "lazy_topics")
