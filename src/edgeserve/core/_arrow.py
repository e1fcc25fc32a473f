"""Arrow data as an IPC stream: whatever has the Arrow PyCapsule interface goes in, pyarrow objects come out.

pyarrow is an extra and is imported when the first such value is met.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

from edgeserve.core.errors import MissingExtra

TABLE, BATCH, CHUNKED, ARRAY = "t", "b", "c", "y"
_HEADER_RECORD_BATCH = 3
_HEADER_DICTIONARY_BATCH = 2


def is_arrow(value: object) -> bool:
    """Whether `value` offers its data by the Arrow PyCapsule interface."""
    return hasattr(value, "__arrow_c_stream__") or hasattr(value, "__arrow_c_array__")


def pyarrow() -> Any:
    """The pyarrow module, or `MissingExtra`."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as exc:
        raise MissingExtra("Arrow data needs pyarrow: pip install 'edgeserve-streams[arrow]'") from exc
    return pyarrow


def write(value: Any) -> tuple[str, memoryview]:
    """The kind of Arrow data and its IPC stream."""
    pa = pyarrow()
    _refuse_polars_objects(value)
    kind, batches, schema = _batches(pa, value)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return kind, memoryview(sink.getvalue()).cast("B")


def read(kind: str, payload: memoryview) -> Any:
    """What `write` wrote: a Table, RecordBatch, ChunkedArray or Array whose memory is a view into `payload`.

    Raises whatever Arrow raises for a stream that is not one: the caller names it.
    """
    pa = pyarrow()
    buffer = pa.py_buffer(payload)
    _refuse_compression(pa, buffer)
    table = pa.ipc.open_stream(buffer).read_all()
    # Offsets into strings and lists come from the wire: unchecked, a wrong one would be read outside the buffer.
    table.validate(full=True)
    if kind == TABLE:
        return table
    if kind == BATCH:
        batches = table.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    if table.num_columns != 1:
        raise ValueError(f"an Arrow array came as {table.num_columns} columns")
    column = table.column(0)
    if kind == CHUNKED:
        return column
    if kind != ARRAY:
        raise ValueError(f"unknown kind of Arrow data {kind[:8]!r}")
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def convert(value: Any, to: type) -> Any:
    """`value`, as pyarrow has it, as the library of the consumer's annotation has it, or `value` itself where none is known."""
    library = to.__module__.partition(".")[0]
    if library == "pandas" and hasattr(value, "to_pandas"):
        return value.to_pandas()
    if library == "polars":
        return sys.modules["polars"].from_arrow(value)
    if library == "pyarrow":
        return _within_pyarrow(pyarrow(), value, to)
    from_arrow = getattr(to, "from_arrow", None)
    return value if from_arrow is None else from_arrow(value)


def is_ours(value: object) -> bool:
    """Whether `value` is what `read` returns."""
    return type(value).__module__.partition(".")[0] == "pyarrow"


def _batches(pa: Any, value: Any) -> tuple[str, Any, Any]:
    """The kind, the record batches and their schema."""
    if isinstance(value, pa.Table):
        return TABLE, value.to_batches(), value.schema
    if isinstance(value, pa.RecordBatch):
        return BATCH, [value], value.schema
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        kind = ARRAY if isinstance(value, pa.Array) else CHUNKED
        table = pa.table([value], names=[""])
        return kind, table.to_batches(), table.schema
    if hasattr(value, "__arrow_c_stream__"):
        try:
            reader = value if isinstance(value, pa.RecordBatchReader) else pa.RecordBatchReader.from_stream(value)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # a stream of columns, not of records: a Series
            return _batches(pa, pa.chunked_array(value))
        return TABLE, reader, reader.schema
    array = pa.array(value)
    return _batches(pa, pa.RecordBatch.from_struct_array(array) if pa.types.is_struct(array.type) else array)


def _refuse_polars_objects(value: Any) -> None:
    """Polars exports a column of Python objects as their addresses, which mean nothing in another process."""
    if type(value).__module__.partition(".")[0] == "polars":
        dtypes = getattr(value, "dtypes", None) or [getattr(value, "dtype", None)]
        if any(str(dtype) == "Object" for dtype in dtypes):
            raise TypeError("a column holds Python objects")


def _within_pyarrow(pa: Any, value: Any, to: Any) -> Any:
    if to is pa.Table and isinstance(value, pa.RecordBatch):
        return pa.Table.from_batches([value])
    if to is pa.RecordBatch and isinstance(value, pa.Table):
        batches = value.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=value.schema)
    if to is pa.ChunkedArray and isinstance(value, pa.Array):
        return pa.chunked_array([value])
    if to is pa.RecordBatchReader and isinstance(value, pa.Table):
        return value.to_reader()
    return value


def _refuse_compression(pa: Any, buffer: Any) -> None:
    """Refuses compressed record batches. `write` makes none, and a small one may state any size to be allocated."""
    for message in pa.ipc.MessageReader.open_stream(buffer):
        metadata = memoryview(message.metadata).cast("B")
        header = _table_field(metadata, struct.unpack_from("<I", metadata)[0], 2)
        kind_at = _field(metadata, struct.unpack_from("<I", metadata)[0], 1)
        kind = metadata[kind_at] if kind_at else 0
        if kind == _HEADER_DICTIONARY_BATCH and header:
            header = _table_field(metadata, header, 1)
        elif kind != _HEADER_RECORD_BATCH:
            continue
        if header and _field(metadata, header, 3):
            raise ValueError("Arrow data is compressed; only uncompressed streams are read")


def _field(metadata: memoryview, table: int, index: int) -> int:
    """Where field number `index` of a flatbuffers table lies, or 0 when it is absent."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    size = struct.unpack_from("<H", metadata, vtable)[0]
    slot = 4 + 2 * index
    offset: int = struct.unpack_from("<H", metadata, vtable + slot)[0] if slot + 2 <= size else 0
    return table + offset if offset else 0


def _table_field(metadata: memoryview, table: int, index: int) -> int:
    at = _field(metadata, table, index)
    return at + int(struct.unpack_from("<I", metadata, at)[0]) if at else 0


__all__ = ("ARRAY", "BATCH", "CHUNKED", "TABLE", "convert", "is_arrow", "is_ours", "pyarrow", "read", "write")
