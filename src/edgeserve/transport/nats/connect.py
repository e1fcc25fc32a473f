"""Opens a NATS node URL."""

from __future__ import annotations

from importlib.util import find_spec

from edgeserve.core.errors import ConfigurationError
from edgeserve.transport.base import Capabilities, Transport
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.url import NodeURL


def connect(url: NodeURL) -> Transport:
    """Connects to a NATS server with JetStream; waits for one that is not there yet (`deadline_s=`: no longer than that)."""
    if find_spec("nats") is None or find_spec("nkeys") is None:
        raise ConfigurationError(f"{url.shown} needs the NATS client, which is not installed: pip install 'edgeserve-streams[nats]'")
    # Only here: the client is an extra.
    from edgeserve.transport.nats.driver import NatsDriver
    from edgeserve.transport.nats.settings import settings_from

    driver = NatsDriver(settings_from(url))
    capabilities = Capabilities(
        retention_by_size=False, redelivery_delay_precision_ms=driver.precision_ms, holds_senders=False, tells_positions=True
    )
    return BrokerEngine(url.shown, driver, capabilities)


__all__ = ("connect",)
