"""`ParquetSink`: results as rows of Parquet files in a directory."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from edgeserve.core.errors import ConfigurationError, PayloadMismatch
from edgeserve.core.payload import decode_value, encode_value
from edgeserve.sinks.append import AppendFile
from edgeserve.sinks.base import FileSink
from edgeserve.sinks.columns import Columns, as_row, pyarrow
from edgeserve.sinks.ids import KnownIds
from edgeserve.sinks.part import Part
from edgeserve.sinks.writeahead import first_record, ids, look_through, record

log = logging.getLogger("edgeserve")


class ParquetSink(FileSink):
    """Writes messages as rows of Parquet files; hand it to `Materialize`. Needs the extra `arrow`.

    The files are called `part-<nanoseconds>.parquet`, in the order of their rows. Readers see whole files only: each is written under a
    hidden name, synced to the disk, and renamed.

    Each row is in one file, once, also when the process is killed (-9) at any moment and started again. `Materialize` takes a message for
    done when its function returns, long before a file is full. So a row is first written ahead, to a hidden file in the same directory;
    what is there becomes a Parquet file at the next start, if not before. The newest 131,072 ids of rows are kept in `.ids` (4 MiB), so
    that what comes again is known, also when the files have been taken elsewhere.

    A row is a dict, a dataclass or a Struct: its columns are the keys. Arrow data (a record batch, a table; pandas and polars frames) is
    many rows, and one message. Without `schema=` the rows of the first file say what the columns are: each adds those that are new, and the
    first value of a column says its type. From then on, and with `schema=` from the start, the columns are fixed: a missing one is null,
    one more is a `PayloadMismatch`, and so is a value that does not fit, or would become another one in its column (1.5 as an integer; a
    float may be rounded to one of fewer bits). It names the column, and makes the message a dead letter.

    One process at a time writes to a directory: each member of a group needs one of its own. A message that was in the hands of a killed
    member goes to another one, flagged `redelivered`, and may be in both directories.

    A full disk is a `DiskFull` that leaves the files as they were, and the message to `Materialize`: tried again (`retries=`), then a dead
    letter. Rows that are written ahead wait until there is room for their file.

    Args:
        path: the directory; made if it is not there, with those that lead to it.
        schema: a `pyarrow.Schema`. None: that of the newest file in the directory; where there is none, what the first rows say.
        rows_per_file: a file is made of so many rows, or of some more where they come as a table.
        bytes_per_file: or when those that were written ahead take so many bytes.
        max_age_s: or when so many seconds have gone by since its first row. None: they may wait until the sink is closed.
        fsync: False: a row outlives the process when the call returns, and a power cut when it is in a file. True: also before; each
            message then takes a sync of the disk.

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> import tempfile, pyarrow.parquet
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ParquetSink(folder.name) as sink:
        ...     sink({"place": "hall", "celsius": 21.5})
        ...     sink({"place": "attic", "celsius": 17.0})
        >>> pyarrow.parquet.read_table(folder.name).to_pylist()
        [{'place': 'hall', 'celsius': 21.5}, {'place': 'attic', 'celsius': 17.0}]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        schema: Any = None,
        rows_per_file: int = 100_000,
        bytes_per_file: int = 256 << 20,
        max_age_s: float | None = 60.0,
        fsync: bool = False,
    ) -> None:
        super().__init__(path)
        for name, value in (("rows_per_file", rows_per_file), ("bytes_per_file", bytes_per_file)):
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"ParquetSink({name}={value!r}): a whole number of at least 1")
        if max_age_s is not None and not 0 < max_age_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"ParquetSink(max_age_s={max_age_s!r}): seconds, more than 0; None for no limit")
        self._schema, self._fsync, self._max_age_s = schema, fsync, max_age_s
        self._most_rows, self._most_bytes = rows_per_file, bytes_per_file
        self._ids: KnownIds
        self._columns: Columns
        self._last = 0
        # The part that is being written ahead: its rows, and the ids of these.
        self._part: Part | None = None
        self._wal: AppendFile
        self._rows = 0
        self._waiting: dict[bytes, None] = {}
        self._ending = False
        self._timer: threading.Timer | None = None

    def close(self) -> None:
        """Ends one use of the sink; the last one makes a file of the rows that were written ahead, and closes it.

        Raises:
            DiskFull: there is no room for the file; its rows are kept, and become one at the next start.
        """
        timer = self._timer
        try:
            super().close()
        finally:
            if timer is not None and not self._users and timer is not threading.current_thread():
                timer.join()

    def _open(self) -> None:
        pa = pyarrow()
        if self._schema is not None and not isinstance(self._schema, pa.Schema):
            raise ConfigurationError(f"ParquetSink(schema=) is a pyarrow.Schema, not {type(self._schema).__name__}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._ids = KnownIds(self.path / ".ids", of=self.path)
        try:
            for part in Part.unfinished(self.path):
                self._last = part.number
                self._recover(part)
            self._columns = self._known_columns()
        except BaseException:
            self._ids.close()
            raise

    def _recover(self, part: Part) -> None:
        """Brings to its end what a killed process has left."""
        if part.done.exists():
            part.finish(None, partial(self._enter, ids(part.done)))
            return
        columns, count = look_through(part.wal) if part.wal.exists() else (None, 0)
        if count:
            part.finish(columns, partial(self._enter, ids(part.wal)))
        else:
            part.discard()

    def _known_columns(self) -> Columns:
        newest = Part.newest(self.path)
        if newest is not None:
            self._last = max(self._last, newest.number)
        if self._schema is not None:
            try:
                return Columns(self._schema, fixed=True)
            except PayloadMismatch as exc:
                raise ConfigurationError(f"ParquetSink(schema=): {exc}") from exc
        if newest is None:
            return Columns()
        try:
            return Columns(pyarrow().parquet.read_schema(newest.final), fixed=True)
        except pyarrow().ArrowException as exc:
            raise ConfigurationError(f"{newest.final} is no Parquet file ({exc}): move it away, or give schema=") from exc

    def _enter(self, found: Iterable[bytes]) -> None:
        """Enters the ids of rows that are in a Parquet file now."""
        for id_ in found:
            if id_ not in self._ids:
                self._ids.put(id_, self._ids.newest + 1)
        self._ids.sync()

    def _knows(self, id_: bytes) -> bool:
        return id_ in self._waiting or id_ in self._ids

    def _write(self, value: Any, id_: bytes | None) -> None:
        if self._is_due():
            self._finish()
        schema, buffers = encode_value(as_row(value))
        payload = b"".join(buffers)
        # As it will be read: what fits now fits then.
        count = self._columns.take(decode_value(schema, payload))
        piece = record(id_, schema, payload)
        if self._part is None:
            self._begin_part()
        wal = self._wal
        end = wal.end + len(piece)
        try:
            self._rows += count
            if id_ is not None:
                self._waiting[id_] = None
            wal.append(piece)
        except BaseException:
            if wal.end != end:
                self._rows -= count
                if id_ is not None:
                    self._waiting.pop(id_, None)
            raise
        if self._is_due():
            self._try_to_finish()

    def _begin_part(self) -> None:
        number = max(time.time_ns(), self._last + 1)
        part = Part(self.path, number)
        wal = AppendFile(part.wal, fsync=self._fsync)
        try:
            wal.append(first_record(self._columns))
        except BaseException:
            wal.close()
            part.discard()
            raise
        self._last, self._wal, self._part = number, wal, part
        self._watch()

    def _is_due(self) -> bool:
        return self._part is not None and (self._ending or self._rows >= self._most_rows or self._wal.end >= self._most_bytes)

    def _finish(self) -> None:
        """Makes a Parquet file of what was written ahead. After an error nothing more is written ahead before that."""
        part = self._part
        assert part is not None
        self._ending = True
        if self._rows:
            part.finish(self._columns, partial(self._enter, self._waiting))
            self._columns.fixed = True
        else:
            part.discard()
        self._let_go()

    def _try_to_finish(self) -> bool:
        """The rows are safe: where there is no room for their file it is made later, before the next row at the latest."""
        try:
            self._finish()
        except OSError as exc:
            log.warning("%s: rows stay written ahead for now: %s", self.path, exc)
            return False
        return True

    def _let_go(self) -> None:
        self._part, self._rows, self._ending = None, 0, False
        self._waiting.clear()
        self._wal.close()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Has the part finished when it is old enough, also when no row comes any more."""
        if self._max_age_s is not None:
            self._timer = threading.Timer(self._max_age_s, self._grown_old, (self._part,))
            self._timer.name, self._timer.daemon = f"edgeserve-parquet-{self.path.name}", True
            self._timer.start()

    def _grown_old(self, part: Part) -> None:
        with self._lock:
            if self._part is part and not self._try_to_finish():
                self._watch()

    def _flush(self) -> None:
        if self._part is not None:
            self._finish()

    def _close(self) -> None:
        try:
            self._flush()
        finally:
            if self._part is not None:
                self._let_go()
            self._ids.close()


__all__ = ("ParquetSink",)
