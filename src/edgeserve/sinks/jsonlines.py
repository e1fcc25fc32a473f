"""`JsonLinesSink`: a line of JSON for every result, in one file."""

from __future__ import annotations

import logging
import os
from typing import Any

from edgeserve.core.errors import ConfigurationError
from edgeserve.sinks.append import AppendFile
from edgeserve.sinks.base import FileSink
from edgeserve.sinks.ids import KnownIds
from edgeserve.sinks.jsonvalues import encode_line

log = logging.getLogger("edgeserve")


class JsonLinesSink(FileSink):
    """Appends one line of JSON per message to a file; hand it to `Materialize`.

    Each message is one line, once, in the order of arrival, also when the process is killed (-9) at any moment and started again: messages
    that come again are known by their ids. The newest 131,072 of these are kept beside the file, in `<path>.ids` (4 MiB): each with the
    place where its line ends, written before the line. So a start reads these and the file's last line, however large the file is. Half a
    line that a killed process has left is cut off then. Whoever deletes or shortens the file gets what was in it again if it comes again. A
    file that is deleted while it is open is begun anew by the next line, with a warning.

    One process at a time writes to a file, and nothing else should: each member of a group needs a path of its own. A message that was in
    the hands of a killed member goes to another one, flagged `redelivered`, and may be in both files.

    A full disk is a `DiskFull` that leaves the file as it was, and the message to `Materialize`: tried again (`retries=`), then a dead
    letter.

    What JSON has no type for is written as msgspec does it: bytes as base64, times as ISO 8601, Decimal and UUID as text, sets as lists,
    NaN and the infinities as null, numbers that are keys as text; NumPy scalars and arrays as numbers and lists (bytes and times in them
    likewise), dataclasses and Structs as objects. Anything else, such as a complex number or Arrow data, is an `UnsupportedType` that says
    where it is.

    Args:
        path: the file; made if it is not there, with the directories that lead to it. What is in it stays.
        fsync: False: what is written outlives the process. True: also a power cut; each message then takes two syncs of the disk.

    Raises:
        ConfigurationError: `path` is no path.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with JsonLinesSink(f"{folder.name}/readings.jsonl") as sink:
        ...     sink({"place": "hall", "celsius": 21.5})
        >>> sink.path.read_text()
        '{"place":"hall","celsius":21.5}\\n'
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = False) -> None:
        super().__init__(path)
        self._fsync = fsync
        self._file: AppendFile
        self._ids: KnownIds

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = AppendFile(self.path, fsync=self._fsync)
        try:
            beside = self.path.with_name(self.path.name + ".ids")
            self._cut_torn_line(file, ours=beside.exists())
            self._ids = KnownIds(beside, of=self.path, upto=file.end, fsync=self._fsync)
        except BaseException:
            file.close()
            raise
        self._file = file

    def _cut_torn_line(self, file: AppendFile, *, ours: bool) -> None:
        if not ours:
            if file.end and not file.ends_with(b"\n"):
                raise ConfigurationError(
                    f"{self.path} does not end with a newline and was not written by a sink (there is no {self.path.name}.ids): "
                    "complete its last line, or give another path"
                )
            return
        cut = file.cut_line()
        if cut:
            log.warning("%s: cut off %d bytes of a line that was not written to its end", self.path, cut)

    def _knows(self, id_: bytes) -> bool:
        return id_ in self._ids

    def _write(self, value: Any, id_: bytes | None) -> None:
        line = encode_line(value)
        if self._file.is_deleted():
            self._reopen()
        if id_ is None:
            self._file.append(line)
            return
        end = self._file.end + len(line)
        try:
            self._ids.put(id_, end)
            self._file.append(line)
        except BaseException:
            if self._file.end != end:
                self._ids.take_back(id_)
            raise

    def _reopen(self) -> None:
        log.warning("%s was deleted while it was open: it is begun anew", self.path)
        deleted = self._file
        self._ids.close()
        self._open()
        deleted.close()

    def _flush(self) -> None:
        self._ids.sync()
        self._file.sync()

    def _close(self) -> None:
        self._file.close()
        self._ids.close()


__all__ = ("JsonLinesSink",)
