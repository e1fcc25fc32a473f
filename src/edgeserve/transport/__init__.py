"""Engines by URL scheme: topics of frames, groups that consume them."""

from edgeserve.transport.base import (
    GROWS,
    SEND_WINDOW,
    Apart,
    Buffer,
    Capabilities,
    ClaimLost,
    Delivery,
    Fence,
    Frame,
    GroupInfo,
    GroupKind,
    Publisher,
    Start,
    Subscription,
    TopicInfo,
    Transport,
)
from edgeserve.transport.url import connect, disconnect

__all__ = (
    "GROWS",
    "SEND_WINDOW",
    "Apart",
    "Buffer",
    "Capabilities",
    "ClaimLost",
    "Delivery",
    "Fence",
    "Frame",
    "GroupInfo",
    "GroupKind",
    "Publisher",
    "Start",
    "Subscription",
    "TopicInfo",
    "Transport",
    "connect",
    "disconnect",
)
