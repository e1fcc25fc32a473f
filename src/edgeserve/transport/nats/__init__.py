"""`nats://HOST:PORT/NAMESPACE` and `nats+tls://`: topics as JetStream streams."""

from edgeserve.transport.nats.connect import connect

__all__ = ("connect",)
