"""Rows on their way into a Parquet file, in a file of records that kill -9 leaves whole but for the last one.

A record is a length (8 bytes, little endian) and a frame as messages are, with its checksum. The first holds the schema, or nothing where
the rows say it; each of the others a row or a table.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Any

from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import MessageError, StoreDamagedWarning
from edgeserve.core.message import Header
from edgeserve.core.payload import decode_value
from edgeserve.sinks.columns import Columns, pyarrow

_NO_ID = bytes(16)
_KNOWN = "known"
_LENGTH = Struct("<Q")


def record(id_: bytes | None, schema: str, payload: bytes) -> bytes:
    """A record of a payload as `encode_value` makes it."""
    header = Header(
        id=id_ or _NO_ID,
        source_id="row",
        producer="" if id_ is None else _KNOWN,
        sequence=0,
        event_ns=0,
        sent_ns=0,
        schema=schema,
        size=len(payload),
    )
    frame = encode_frame(header, payload)
    frame = frame if isinstance(frame, bytes) else b"".join(frame)
    return _LENGTH.pack(len(frame)) + frame


def first_record(columns: Columns) -> bytes:
    """The record that says what is known of the columns when a file begins."""
    return record(None, "", columns.schema.serialize().to_pybytes() if columns.fixed else b"")


def values(path: Path) -> Iterator[Any]:
    """The rows and tables of a whole file, in order."""
    found = _records(path)
    next(found)
    for _, header, payload in found:
        yield decode_value(header.schema, payload)


def ids(path: Path) -> list[bytes]:
    """The ids of the rows and tables of a file, in order, as far as it can be read."""
    found: list[bytes] = []
    with contextlib.suppress(MessageError):
        found += (header.id for _, header, _ in _records(path) if header.producer == _KNOWN)
    return found


def look_through(path: Path) -> tuple[Columns, int]:
    """Reads a file that a killed process may have left, and cuts off what is not whole. What is damaged is kept beside it, with a warning.

    Returns:
        The columns of its rows, and how many rows there are.
    """
    columns, count, end = None, 0, 0
    try:
        for after, header, payload in _records(path):
            if columns is None:
                schema = pyarrow().ipc.read_schema(pyarrow().py_buffer(payload)) if len(payload) else None
                columns = Columns(schema, fixed=schema is not None)
            else:
                count += columns.take(decode_value(header.schema, payload))
            end = after
    except MessageError as exc:
        kept = path.with_suffix(".damaged")
        shutil.copyfile(path, kept)
        warnings.warn(
            f"{path} is damaged after {count} rows: {exc}. These become a Parquet file; all there was is kept as {kept.name}",
            StoreDamagedWarning,
            stacklevel=2,
        )
    if end < os.path.getsize(path):
        os.truncate(path, end)
    return columns or Columns(), count


def _records(path: Path) -> Iterator[tuple[int, Header, bytes | memoryview]]:
    """Where each record ends, and what it holds; up to the first that is not there to its end."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            if length > size - file.tell():
                return
            header, payload = decode_frame(file.read(length))
            yield file.tell(), header, payload


__all__ = ("first_record", "ids", "look_through", "record", "values")
