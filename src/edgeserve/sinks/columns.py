"""Which columns the rows of a `ParquetSink` have: found in the first rows, asked of all that follow."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np

from edgeserve.core.errors import MissingExtra, PayloadMismatch, UnsupportedType
from edgeserve.sinks.loss import loss

_ROWS_AT_ONCE = 1024
_MOST_SHAPES = 1024
_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))


def pyarrow() -> Any:
    """The pyarrow module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise MissingExtra("ParquetSink needs pyarrow: pip install 'edgeserve-streams[arrow]'") from exc
    return pyarrow


def as_row(value: Any) -> Any:
    """`value` as what is kept of it: a dict by column, or Arrow data as it is.

    Raises:
        UnsupportedType: it is no row.
    """
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise UnsupportedType("a row has a key that is not a str: its keys are the columns' names")
        # Arrow takes arrays of one dimension only.
        return {name: item.tolist() if isinstance(item, np.ndarray) and item.ndim != 1 else item for name, item in value.items()}
    if not isinstance(value, type) and (hasattr(value, "__arrow_c_stream__") or hasattr(value, "__arrow_c_array__")):
        return value
    raise _no_row(value)


def _no_row(value: Any) -> UnsupportedType:
    return UnsupportedType(
        f"a {type(value).__qualname__} is no row: ParquetSink takes dicts, dataclasses, Structs and Arrow record batches or tables; "
        "make one of it with gate="
    )


class Columns:
    """The schema of the rows so far.

    Args:
        schema: a `pyarrow.Schema`; None: what the rows say.
        fixed: whether no row may add to it.

    Attributes:
        schema: of all rows that were taken; None before the first.
        fixed: may be set when a file of these rows is there.

    Raises:
        PayloadMismatch: no Parquet file can have this schema.
    """

    def __init__(self, schema: Any = None, *, fixed: bool = False) -> None:
        self._pa = pyarrow()
        self._refusals = (self._pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError, RecursionError)
        self.fixed = fixed
        self.schema: Any = None
        # Names and types of rows that add nothing to the schema: to ask Arrow each time would take longer than all else together.
        self._shapes: set[tuple[Any, ...]] = set()
        if schema is not None:
            self._refuse_unwritable(schema)
            self._use(schema)

    def take(self, value: Any) -> int:
        """Sees that a row, or all rows of a table, fit, and learns new columns from them; how many rows that is.

        What has once been taken can be made a table of the schema, now and after others were taken.

        Raises:
            PayloadMismatch: a value does not fit; the message names the column.
            UnsupportedType: it is neither.
        """
        if isinstance(value, dict):
            shape = (*value, *map(type, value.values()))
            schema = self.schema if self.fixed or shape in self._shapes else self._merged(self._found_in(value))
            self._refuse_surplus(value)
            self._refuse_loss(value, schema)
            self._refuse_unstorable(self._batch([value], schema), schema)
            self._use(schema)
            if not self.fixed and len(self._shapes) < _MOST_SHAPES and _PLAIN.issuperset(map(type, value.values())):
                self._shapes.add(shape)
            return 1
        if not hasattr(value, "num_rows"):
            raise _no_row(value)  # an array
        names = value.schema.names
        if len(set(names)) < len(names):
            raise PayloadMismatch(f"a table has two columns of one name: {', '.join(names)}")
        schema = self.schema if self.fixed else self._merged(value.schema)
        if surplus := [name for name in names if name not in schema.names]:
            raise _no_column(surplus[0], schema)
        for field in value.schema:
            self._refuse_loss_of(value.column(field.name), schema.field(field.name), schema)
        self._refuse_unstorable(self._table(value, schema), schema)
        self._use(schema)
        return int(value.num_rows)

    def tables(self, values: Iterable[Any]) -> Iterator[Any]:
        """Rows and tables that were taken, in order, as tables of the schema."""
        rows: list[Any] = []
        for value in values:
            if isinstance(value, dict):
                rows.append(value)
                if len(rows) < _ROWS_AT_ONCE:
                    continue
            if rows:
                yield self._pa.Table.from_batches([self._batch(rows, self.schema)])
                rows = []
            if not isinstance(value, dict):
                yield self._table(value, self.schema)
        if rows:
            yield self._pa.Table.from_batches([self._batch(rows, self.schema)])

    # --- what a value says ----------------------------------------------------------------------------------------

    def _found_in(self, row: dict[str, Any]) -> Any:
        """The schema of one row."""
        try:
            found = self._pa.array([row]).type
        except self._refusals as exc:
            for name, item in row.items():
                try:
                    self._pa.array([item])
                except self._refusals as why:
                    raise PayloadMismatch(f"column {name!r}: Arrow has no type for {_shown(item)}: {why}") from exc
            raise PayloadMismatch(f"Arrow cannot take a row: {exc}") from exc
        return self._pa.schema(list(found))

    def _merged(self, other: Any) -> Any:
        if self.schema is None:
            schema = other
        else:
            known = {field.name: field.type for field in self.schema}
            schema = self.schema
            for field in other:
                if field.name not in known:
                    schema = schema.append(field)
                elif (merged := self._merge(known[field.name], field.type, field.name)) != known[field.name]:
                    schema = schema.set(schema.get_field_index(field.name), self._pa.field(field.name, merged))
        if not len(schema):
            raise PayloadMismatch("a row without a column: a file needs one at least")
        if schema is not self.schema:
            self._refuse_unwritable(schema)
        return schema

    def _merge(self, known: Any, found: Any, name: str) -> Any:
        """The type of what was of type `known` and may be of type `found`. Every value of both keeps its own value in it."""
        pa, is_ = self._pa, self._pa.types
        if known == found or is_.is_null(found):
            return known
        if is_.is_null(known):
            return found
        if is_.is_floating(known) and is_.is_integer(found):
            return known  # those that it cannot hold are refused with their row
        if is_.is_list(known) and is_.is_list(found):
            return pa.list_(self._merge(known.value_type, found.value_type, f"{name}[]"))
        if is_.is_struct(known) and is_.is_struct(found):
            fields = {field.name: field.type for field in known}
            for field in found:
                before = fields.get(field.name)
                fields[field.name] = field.type if before is None else self._merge(before, field.type, f"{name}.{field.name}")
            return pa.struct(list(fields.items()))
        if is_.is_decimal(known) and is_.is_decimal(found):
            both = [pa.schema([("x", kind)]) for kind in (known, found)]
            try:
                return pa.unify_schemas(both, promote_options="permissive").field(0).type
            except self._refusals as exc:
                raise PayloadMismatch(f"column {name!r} is {known}, and this row has {found}: {exc}") from exc
        if is_.is_timestamp(known) and is_.is_timestamp(found) and known.tz and found.tz and known.unit == found.unit:
            return known  # the same moment, wherever it was noted
        raise PayloadMismatch(f"column {name!r} is {known} since the first rows, and this one has {found}: give ParquetSink a schema=")

    def _refuse_unwritable(self, schema: Any) -> None:
        """Arrow has types that its Parquet files have not."""
        if (why := self._why_unwritable(schema)) is None:
            return
        for field in schema:
            if self._why_unwritable(self._pa.schema([field])) is not None:
                raise PayloadMismatch(f"column {field.name!r} is {field.type}, which a Parquet file cannot hold: {why}")
        raise PayloadMismatch(f"a Parquet file cannot hold these columns: {why}")

    def _why_unwritable(self, schema: Any, table: Any = None) -> str | None:
        try:
            with self._pa.parquet.ParquetWriter(self._pa.BufferOutputStream(), schema) as writer:
                if table is not None:
                    writer.write_table(table)
        except self._refusals as exc:
            return str(exc)
        return None

    def _refuse_loss(self, row: dict[str, Any], schema: Any) -> None:
        """Arrow makes other values of some, without a word, where a column is of another type than they are."""
        if schema is not self.schema:
            return  # it is of the types of the rows
        for name, loses in self._lossy.items():
            if loses(row.get(name)):
                raise PayloadMismatch(
                    f"column {name!r} is {schema.field(name).type}, and this row has {_shown(row[name])}, which it would change"
                )

    def _refuse_loss_of(self, column: Any, field: Any, schema: Any) -> None:
        if column.type != field.type and not self._are_times(column.type, field.type):
            for item in self._items(column, field):
                self._refuse_loss({field.name: item}, schema)

    def _refuse_unstorable(self, rows: Any, schema: Any) -> None:
        """Parquet files have not all values that Arrow has, where they keep them as another type."""
        changed = self._changed if schema is self.schema else _changed(self._pa, schema)
        if not changed:
            return
        table = rows if isinstance(rows, self._pa.Table) else self._pa.Table.from_batches([rows])
        for field in schema:
            if field.name not in changed:
                continue
            why = self._why_unwritable(self._pa.schema([field]), table.select([field.name]))
            if why is not None:
                raise PayloadMismatch(
                    f"column {field.name!r} is {field.type}, and a Parquet file cannot hold what this row has in it: {why}"
                )

    # --- whether it fits ------------------------------------------------------------------------------------------

    def _use(self, schema: Any) -> None:
        if schema is self.schema:
            return
        self.schema = schema
        self._shapes.clear()
        self._names = frozenset(schema.names)
        self._nested = {field.name: field.type for field in schema if self._pa.types.is_nested(field.type)}
        self._lossy = {field.name: loses for field in schema if (loses := loss(self._pa, field.type)) is not None}
        self._changed = _changed(self._pa, schema)

    def _refuse_surplus(self, row: dict[str, Any]) -> None:
        """What a schema does not name would be left out without a word."""
        if not self.fixed:
            return
        if not row.keys() <= self._names:
            raise _no_column(next(name for name in row if name not in self._names), self.schema)
        for name, kind in self._nested.items():
            if (surplus := self._surplus(row.get(name), kind, name)) is not None:
                raise _no_column(surplus, self.schema)

    def _surplus(self, item: Any, kind: Any, path: str) -> str | None:
        is_ = self._pa.types
        if is_.is_struct(kind) and isinstance(item, dict):
            fields = {field.name: field.type for field in kind}
            for name, part in item.items():
                if name not in fields:
                    return f"{path}.{name}"
                if is_.is_nested(fields[name]) and (found := self._surplus(part, fields[name], f"{path}.{name}")) is not None:
                    return found
        elif (is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind)) and is_.is_nested(kind.value_type):
            for part in item if isinstance(item, (list, tuple)) else ():
                if (found := self._surplus(part, kind.value_type, f"{path}[]")) is not None:
                    return found
        return None

    def _batch(self, rows: list[Any], schema: Any) -> Any:
        try:
            batch = self._pa.RecordBatch.from_pylist(rows, schema=schema)
        except self._refusals as exc:
            for field in schema:
                for row in rows:
                    self._column([row.get(field.name)], field)
            raise PayloadMismatch(f"Arrow cannot take a row: {exc}") from exc
        for field in schema:
            if not field.nullable and any(row.get(field.name) is None for row in rows):
                raise _needed(field)
        return batch

    def _table(self, table: Any, schema: Any) -> Any:
        columns = []
        for field in schema:
            index = table.schema.get_field_index(field.name)
            if index < 0:
                column = self._pa.nulls(table.num_rows, field.type)
            else:
                column = table.column(index)
                if self._are_times(column.type, field.type):
                    column = self._cast(column, field)
                elif column.type != field.type:
                    column = self._column(self._items(column, field), field)
            if not field.nullable and column.null_count:
                raise _needed(field)
            columns.append(column)
        return self._pa.Table.from_arrays(columns, schema=schema)

    def _are_times(self, *kinds: Any) -> bool:
        """Of these Python's own have fewer digits; Arrow makes one of the other, and refuses what would be changed."""
        return all(map(self._pa.types.is_temporal, kinds))

    def _cast(self, column: Any, field: Any) -> Any:
        try:
            return column.cast(field.type)
        except self._refusals as exc:
            raise PayloadMismatch(f"column {field.name!r} is {field.type}, and this table has {column.type}: {exc}") from exc

    def _items(self, column: Any, field: Any) -> list[Any]:
        try:
            return list(column.to_pylist())
        except self._refusals as exc:
            raise PayloadMismatch(f"column {field.name!r} is {field.type}, and this table has {column.type}: {exc}") from exc

    def _column(self, items: list[Any], field: Any) -> Any:
        try:
            return self._pa.array(items, type=field.type)
        except self._refusals as exc:
            what = _shown(items[0]) if len(items) == 1 else "a table with other values"
            raise PayloadMismatch(f"column {field.name!r} is {field.type}, and this row has {what}: {exc}") from exc


def _changed(pa: Any, schema: Any) -> frozenset[str]:
    """The columns of which a Parquet file may refuse a value although it has their type."""
    return frozenset(field.name for field in schema if _is_changed(pa, field.type))


def _is_changed(pa: Any, kind: Any) -> bool:
    if pa.types.is_timestamp(kind):
        return bool(kind.unit == "s")  # milliseconds there
    if not pa.types.is_nested(kind):
        return False
    return any(not field.nullable or _is_changed(pa, field.type) for field in (kind.field(i) for i in range(kind.num_fields)))


def _no_column(name: str, schema: Any) -> PayloadMismatch:
    return PayloadMismatch(f"there is no column {name!r}: the columns are {', '.join(schema.names)}")


def _needed(field: Any) -> PayloadMismatch:
    return PayloadMismatch(f"column {field.name!r} is not nullable, and a row has no value for it")


def _shown(item: Any) -> str:
    return f"{reprlib.repr(item)} ({type(item).__qualname__})"


__all__ = ("Columns", "as_row", "pyarrow")
