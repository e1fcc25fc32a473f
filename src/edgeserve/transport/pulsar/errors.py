"""The client's errors in our words: what was refused, on which topic, and what to do."""

from __future__ import annotations

from typing import Any

import pulsar

from edgeserve.core.errors import ClosedError, EdgeServeError, Fenced, GroupBusy, SendError, StoreFull, TransportError
from edgeserve.transport.pulsar.settings import Settings

PASSES = (
    pulsar.ConnectError,
    pulsar.Timeout,
    pulsar.NotConnected,
    pulsar.ServiceUnitNotReady,
    pulsar.TooManyLookupRequestException,
    pulsar.LookupError,
    pulsar.BrokerPersistenceError,
    pulsar.BrokerMetadataError,
    pulsar.ProducerBlockedQuotaExceededError,
    pulsar.ProducerBlockedQuotaExceededException,
)
"""What is the broker's trouble, or the way to it, and may be over the next time."""


def named(settings: Settings, exc: Exception, what: str, topic: str) -> EdgeServeError:
    """The error in our words."""
    shown, name = settings.shown, type(exc).__name__
    if isinstance(exc, pulsar.TopicNotFound):
        return TransportError(
            f"{shown}: cannot {what} {topic!r}: there is no such tenant or namespace, or topics are not made by themselves there; "
            f"`pulsar-admin namespaces create {settings.space}` makes a namespace"
        )
    if isinstance(exc, (pulsar.AuthenticationError, pulsar.ErrorGettingAuthenticationData)):
        return TransportError(f"{shown}: the broker does not know this token or certificate: see token=, token_file=, tls_cert=, oauth2=")
    if isinstance(exc, pulsar.AuthorizationError):
        return TransportError(f"{shown}: no right to {what} {topic!r}: ask for produce and consume on it")
    if isinstance(exc, pulsar.ConsumerBusy):
        return GroupBusy(f"{shown}: the group's subscription on {topic!r} is taken, by another program or by one not gone yet")
    if isinstance(exc, pulsar.ProducerFenced):
        return Fenced(f"the log {topic!r} is held by somebody else")
    if isinstance(exc, pulsar.AlreadyClosed):
        return ClosedError(f"{shown} is closed")
    return TransportError(f"{shown}: cannot {what} {topic!r}: {name}: {exc}")


def failed(settings: Settings, result: Any, topic: str) -> Exception:
    """The error of a send."""
    if result == pulsar.Result.ProducerFenced:
        return Fenced(f"the log {topic!r} is held by somebody else")
    if result in (pulsar.Result.AlreadyClosed, pulsar.Result.ProducerNotInitialized):
        return ClosedError(f"the producer of topic {topic!r} was closed before the broker had confirmed all that it sent")
    if result in (pulsar.Result.ProducerBlockedQuotaExceededError, pulsar.Result.ProducerBlockedQuotaExceededException):
        return StoreFull(f"topic {topic!r}: its groups' backlog has reached the quota of the namespace")
    if result == pulsar.Result.Timeout:
        return SendError(f"topic {topic!r}: {settings.shown} did not confirm within deadline_s={settings.deadline_s}")
    return SendError(f"topic {topic!r}: Pulsar refused a message: {getattr(result, 'name', result)}")


__all__ = ("PASSES", "failed", "named")
