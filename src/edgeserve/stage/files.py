"""`ftp=True`: messages that name files on FTP servers. What the task gets are the files, or what is in them."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgeserve.core.errors import EdgeServeError, FetchError
from edgeserve.core.process import process_name
from edgeserve.payload import FtpFiles, Place, allowed_hosts, own_url, place_of
from edgeserve.stage.context import context
from edgeserve.stage.task import DEFERRED, Several, Task

_log = logging.getLogger("edgeserve")

_OUTPUT = "ftp_output"
_PARTS = ".edgeserve-parts"
_MOST_IN_MEMORY = 1 << 30
_MOST_IN_A_FILE = 1 << 40


class Files:
    """The files that one node fetches and makes.

    Args:
        who: the node, for people.
        root: the directory that this machine's FTP server serves; what is fetched goes to the same place below it.
        memory: the task gets what is in a file, as bytes, and not the path of a copy.
        delete: a file is deleted on its server when its message is settled.
        sink: the node sends nothing; its result is the URL of the copy.
    """

    def __init__(self, who: str, root: str, *, memory: bool = False, delete: bool = False, sink: bool = False) -> None:
        self._who, self._root = who, Path(root)
        self._memory, self._deletes, self._sink = memory and not sink, delete, sink
        self._hosts, self._url = allowed_hosts(os.environ), own_url(os.environ)
        self._ftp = FtpFiles()
        # Done with, and not known to be settled: where they are, and where their copy is.
        self._done: deque[tuple[Place, Path | None]] = deque()
        self._owner = 0

    def wrap(self, task: Task) -> None:
        """Has the task get files in place of their URLs, and its text or bytes become files, where it takes files."""
        call, finish = task.call, task.finish
        task.annotations.clear()  # they say what the task gets, and not what travels

        def with_files(*values: Any) -> Any:
            self._owner = threading.get_ident()
            taken = [self._take(value) for value in values]
            result = call(*(given for given, _ in taken))
            if type(result) in DEFERRED:
                result = finish(result)
            copies = [found[1] for _, found in taken if found is not None and found[1] is not None]
            if self._sink:
                result = self._url_of(copies[0]) if copies else result
            elif copies and not self._memory and result is not None:
                result = self._give(result, copies[-1].parent)
            if self._deletes:
                self._done += [found for _, found in taken if found is not None]
            return result

        task.call = with_files

    # --- what comes ---------------------------------------------------------------------------------------------

    def _take(self, value: Any) -> tuple[Any, tuple[Place, Path | None] | None]:
        """(what the task gets, where that came from) of a value; any other than a URL stays what it is."""
        url = value.decode("utf-8", "replace") if isinstance(value, bytes) and value.startswith(b"ftp://") else value
        if not isinstance(url, str) or not url.startswith("ftp://"):
            if value is None or self._memory:
                return value, None
            raise FetchError(f"a message names no file: with ftp=True it is to be a URL, ftp://host/path, and is {type(value).__name__}")
        place = place_of(url, self._hosts)
        if self._memory:
            blocks: list[bytes] = []
            self._ftp.fetch(place, blocks.append, _MOST_IN_MEMORY)
            return b"".join(blocks), (place, None)
        copy = self._root.joinpath(*place.path)
        if not copy.resolve().is_relative_to(self._root.resolve()):
            raise FetchError(f"{place.shown} would be written outside of {self._root}: a link leads there")
        self._download(place, copy)
        return str(copy), (place, copy)

    def _download(self, place: Place, copy: Path) -> None:
        """A copy is there whole or not at all, whoever is killed meanwhile."""
        part = self._part()
        try:
            with open(part, "wb") as file:
                self._ftp.fetch(place, file.write, _MOST_IN_A_FILE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, copy)
        finally:
            part.unlink(missing_ok=True)

    def _part(self) -> Path:
        folder = self._root / _PARTS
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{process_name(os.getpid())}.{threading.get_ident()}"

    # --- what goes ----------------------------------------------------------------------------------------------

    def _give(self, result: Any, beside: Path) -> Any:
        """The URL of a file with the result, named by the inputs: made again it is the same."""
        if type(result) is Several:
            return Several(self._write(one, beside, f"-{n}") for n, one in enumerate(result))
        return self._write(result, beside, "")

    def _write(self, result: Any, beside: Path, mark: str) -> str:
        if not isinstance(result, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"{self._who}: with ftp=True a task returns text or bytes, which become a file, not {type(result).__name__}")
        folder = beside if beside.name == _OUTPUT else beside / _OUTPUT
        target, part = folder / f"{context().join_id.hex()}{mark}.ftp", self._part()
        try:
            part.write_bytes(result.encode() if isinstance(result, str) else result)
            folder.mkdir(exist_ok=True)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return self._url_of(target)

    def _url_of(self, file: Path) -> str:
        return f"{self._url}/{quote(file.relative_to(self._root).as_posix())}"

    # --- what is done with --------------------------------------------------------------------------------------

    def open(self) -> None:
        """What a killed process has left half fetched goes."""
        for part in (self._root / _PARTS).glob("*"):
            name = part.name.partition(".")[0]
            if process_name(int(name.partition("-")[0])) != name:
                part.unlink(missing_ok=True)

    def tidy(self, flush: Callable[[], None]) -> None:
        """To be called while nothing comes: deletes what is done with. `flush`: returns when all that the node has done is settled."""
        if self._done and self._owner == threading.get_ident():
            flush()
            self._delete()

    def _delete(self) -> None:
        while self._done:
            place, copy = self._done[0]
            try:
                self._delete_one(place, copy)
            except (OSError, EdgeServeError) as exc:
                _log.warning("%s could not delete %s, and leaves it: %s", self._who, place.shown, exc)
            self._done.popleft()

    def _delete_one(self, place: Place, copy: Path | None) -> None:
        if copy is None or not place.is_here:
            self._ftp.delete(place)
            return
        # The server may serve the directory that the copy is in: then that is what it deletes.
        kept = self._part()
        with suppress(FileNotFoundError):
            os.link(copy, kept)
        try:
            self._ftp.delete(place)
        finally:
            if kept.exists() and not copy.exists():
                os.replace(kept, copy)
            kept.unlink(missing_ok=True)

    def close(self, flush: Callable[[], None]) -> None:
        """To be called before the node closes. Idempotent."""
        try:
            if self._done:
                flush()
                self._delete()
        finally:
            self._ftp.close()


__all__ = ("Files",)
