"""Payloads apart from their headers: slots in shared memory, written once, read in place, reused when every group has settled them."""

from edgeserve.payload.place import is_gone, make_payload_directory, payload_base, store_name
from edgeserve.payload.reader import PayloadReader, reader_of
from edgeserve.payload.reference import LAZY, Reference, inner_schema, is_lazy, lazy_schema
from edgeserve.payload.sweep import Sweep, remove_orphans
from edgeserve.payload.writer import PayloadWriter, Slot

__all__ = (
    "LAZY",
    "PayloadReader",
    "PayloadWriter",
    "Reference",
    "Slot",
    "Sweep",
    "inner_schema",
    "is_gone",
    "is_lazy",
    "lazy_schema",
    "make_payload_directory",
    "payload_base",
    "reader_of",
    "remove_orphans",
    "store_name",
)
