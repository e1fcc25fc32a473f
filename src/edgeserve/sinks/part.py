"""A part: rows from when they are written ahead, one by one, until they are a Parquet file.

The part `part-N` is, one after the other:

- `.part-N.wal`: the rows as they come; kill -9 does not undo them;
- beside it `.part-N.tmp`: the Parquet file, being written;
- `.part-N.done` and `.part-N.tmp`: the Parquet file is whole and on the disk; from here on it counts, and not the rows as they came;
- `.part-N.done` and `part-N.parquet`: readers have it, and may take it away; the ids of its rows are being entered;
- `part-N.parquet`.

Each step is one rename, so what a killed process has left says how to go on. Names that begin with a dot are no data to whoever reads a
directory of Parquet files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from edgeserve.sinks.append import sync_directory
from edgeserve.sinks.columns import Columns, pyarrow
from edgeserve.sinks.writeahead import values

_NUMBER = "[0-9]" * 19
_ROW_GROUP_BYTES = 64 << 20


class Part:
    """The names of a part, and the way to its end.

    Args:
        directory: where it is.
        number: nanoseconds of its beginning, so that the names of later ones are greater.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number
        name = f"part-{number:019d}"
        self.final = directory / f"{name}.parquet"
        self.wal, self.tmp, self.done = (directory / f".{name}.{kind}" for kind in ("wal", "tmp", "done"))

    @classmethod
    def unfinished(cls, directory: Path) -> list[Part]:
        """Those that are not yet at their end, oldest first."""
        found = {path.name[6:25] for kind in ("wal", "tmp", "done") for path in directory.glob(f".part-{_NUMBER}.{kind}")}
        return [cls(directory, int(number)) for number in sorted(found)]

    @classmethod
    def newest(cls, directory: Path) -> Part | None:
        """The newest that is a Parquet file, if it is still there."""
        name = max((path.name for path in directory.glob(f"part-{_NUMBER}.parquet")), default=None)
        return None if name is None else cls(directory, int(name[5:24]))

    def finish(self, columns: Columns | None, enter: Callable[[], None]) -> None:
        """Goes on from wherever it is to the end. To be called again after an error.

        Args:
            columns: of its rows; not needed where the Parquet file is whole.
            enter: enters the ids of its rows, those that are not there yet.

        Raises:
            OSError: there is no room for it, for example.
        """
        if columns is not None and self.wal.exists():
            self._write(columns)
            os.replace(self.wal, self.done)
            sync_directory(self.directory)
        if self.done.exists():
            if self.tmp.exists():
                os.replace(self.tmp, self.final)
                sync_directory(self.directory)
            enter()
            os.unlink(self.done)

    def discard(self) -> None:
        """Takes away one that has no rows."""
        for path in (self.tmp, self.wal):
            path.unlink(missing_ok=True)

    def _write(self, columns: Columns) -> None:
        pa = pyarrow()
        try:
            with open(self.tmp, "wb") as file:
                with pa.parquet.ParquetWriter(file, columns.schema) as writer:
                    for group in _groups(columns.tables(values(self.wal))):
                        writer.write_table(pa.concat_tables(group))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self.tmp.unlink(missing_ok=True)
            raise


def _groups(tables: Iterable[Any]) -> Iterator[list[Any]]:
    """Tables together, so that each group is large enough to be worth a row group."""
    group: list[Any] = []
    size = 0
    for table in tables:
        group.append(table)
        size += table.nbytes
        if size >= _ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


__all__ = ("Part",)
