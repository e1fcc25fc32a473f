"""Apache Pulsar, the default engine of a cluster: `pulsar://`, `pulsar+ssl://`."""

from __future__ import annotations

from edgeserve.transport.base import Capabilities, Transport
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.pulsar.driver import PulsarDriver
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import NodeURL


def connect(url: NodeURL) -> Transport:
    """Connects to a cluster. The first topic that is written to or read shows whether it is there."""
    settings = settings_from(url)
    driver = PulsarDriver(settings)
    return BrokerEngine(
        settings.shown,
        driver,
        Capabilities(retention_by_size=False, redelivery_delay_precision_ms=driver.precision_ms, holds_senders=False, tells_positions=True),
    )


__all__ = ("connect",)
