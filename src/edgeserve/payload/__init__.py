"""Payloads apart from their headers: slots in shared memory, written once, read in place, reused when every group has settled them."""

from edgeserve.payload.external import ExternalFiles
from edgeserve.payload.ftp import FtpFiles, Place, allowed_hosts, is_refusal, own_url, place_of
from edgeserve.payload.hosts import Fetching, Serving, advertised
from edgeserve.payload.origins import Origins
from edgeserve.payload.place import broker_name, is_gone, make_payload_directory, memory_name, payload_base, store_name
from edgeserve.payload.reader import PayloadReader, is_here, reader_of
from edgeserve.payload.reference import LAZY, Reference, inner_schema, is_lazy, lazy_schema
from edgeserve.payload.routing import Route, Router, Use
from edgeserve.payload.sweep import Sweep, remove_orphans
from edgeserve.payload.writer import End, PayloadWriter, Ranges, Settled, Slot

__all__ = (
    "LAZY",
    "End",
    "ExternalFiles",
    "Fetching",
    "FtpFiles",
    "Origins",
    "PayloadReader",
    "PayloadWriter",
    "Place",
    "Ranges",
    "Reference",
    "Route",
    "Router",
    "Serving",
    "Settled",
    "Slot",
    "Sweep",
    "Use",
    "advertised",
    "allowed_hosts",
    "broker_name",
    "inner_schema",
    "is_gone",
    "is_here",
    "is_lazy",
    "is_refusal",
    "lazy_schema",
    "make_payload_directory",
    "memory_name",
    "own_url",
    "payload_base",
    "place_of",
    "reader_of",
    "remove_orphans",
    "store_name",
)
