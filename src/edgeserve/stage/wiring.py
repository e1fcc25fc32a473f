"""Which topics a node reads and writes, and which source ids it wants and sends there."""

from __future__ import annotations

import msgspec


class Wiring(msgspec.Struct, frozen=True):
    """What of a node can be compared with other nodes before any of them runs.

    Attributes:
        topic_in: where its messages come from; None: it reads none.
        takes: the source ids that it takes, its task's parameter names; None: any.
        topic_out: where it sends to; None: nowhere.
        sends: the source id of what it sends.
        lazy: whether large payloads of that stay on its host.
    """

    topic_in: str | None = None
    takes: tuple[str, ...] | None = None
    topic_out: str | None = None
    sends: str = ""
    lazy: bool = False


__all__ = ("Wiring",)
