"""`ftp=True`: messages that name files on FTP servers. What the task gets are the files, or what is in them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from xxhash import xxh3_64_hexdigest

from edgeserve.core.errors import ConfigurationError, EdgeServeError, FetchError
from edgeserve.core.process import process_name
from edgeserve.payload import FtpFiles, Place, allowed_hosts, is_refusal, own_url, place_of
from edgeserve.stage.context import context
from edgeserve.stage.linger import NO_ROOM
from edgeserve.stage.task import DEFERRED, Several, Task

_log = logging.getLogger("edgeserve")

_OUTPUT = "ftp_output"
_PARTS, _KEPT = ".edgeserve-parts", ".kept"
_MOST_IN_MEMORY = 1 << 30
_MOST_IN_A_FILE = 1 << 40
_HALF_FETCHED_S = 3_600.0

_EVERY_S, _ROUND_S, _AT_CLOSE_S = 1.0, 1.0, 10.0
"""Files are deleted so often, and for no longer than that at a time: messages wait meanwhile."""

_DELETE_S = 3.0
_AGAIN_S = (10.0, 300.0)
_TELL_EVERY_S = 10.0
_MOST_TO_DELETE = 10_000

_Taken: TypeAlias = tuple[Place, "Path | None"]


class Files:
    """The files that one node fetches and makes.

    Args:
        who: the node, for people.
        root: the directory that this machine's FTP server serves; what is fetched goes to the same place below it.
        memory: the task gets what is in a file, as bytes, and not the path of a copy.
        delete: a file is deleted on its server when its message is settled.
        sink: the node sends nothing; its result is the URL of the copy.
        group: of the node: what two groups make of one file is not the same.
        once: a message is part of one set at most, also where replicas share the sets.

    Attributes:
        shared: what the task runs on are sets that replicas share.
    """

    def __init__(
        self,
        who: str,
        root: str | os.PathLike[str],
        group: str,
        *,
        memory: bool = False,
        delete: bool = False,
        sink: bool = False,
        once: bool = True,
    ) -> None:
        self._who, self._root = who, Path(root).absolute()
        self._memory, self._deletes, self._sink, self._once = memory and not sink, delete, sink, once
        self._mark = xxh3_64_hexdigest(group.encode())[:8]
        self._hosts, self._url = allowed_hosts(os.environ), own_url(os.environ)
        self._ftp, self._deleter = FtpFiles(), FtpFiles(idle_s=_DELETE_S)
        self._owner = 0
        # The rest is for threads that settle, too.
        self._lock = threading.Lock()
        # By the id of the message, or of the set that replicas share.
        self._taken: dict[bytes, list[_Taken]] = {}
        # Ids of what was put aside, and may be part of other sets.
        self._aside: OrderedDict[bytes, None] = OrderedDict()
        self._done: deque[_Taken] = deque()
        self._round_at = self._again_at = 0.0
        self._again_s = _AGAIN_S[0]
        self._told: dict[str, float] = {}
        self.shared = False

    def wrap(self, task: Task) -> None:
        """Has the task get files in place of their URLs, and its text or bytes become files, where it takes files."""
        call, finish, names = task.call, task.finish, task.parameters
        task.annotations.clear()  # they say what the task gets, and not what travels

        def with_files(*values: Any) -> Any:
            self._owner = threading.get_ident()
            taken = [self._take(value) for value in values]
            result = call(*(given for given, _ in taken))
            if type(result) in DEFERRED:
                result = finish(result)
            found = [source for _, source in taken if source is not None]
            copies = [copy for _, copy in found if copy is not None]
            if self._sink:
                result = self._url_of(copies[0]) if copies else result
            elif copies and not self._memory and result is not None:
                result = self._give(result, copies[-1].parent)
            if self._deletes:
                self._remember(names, [source for _, source in taken])
            return result

        task.call = with_files

    # --- what comes ---------------------------------------------------------------------------------------------

    def _take(self, value: Any) -> tuple[Any, _Taken | None]:
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
        if place.path[0] == _PARTS:
            raise FetchError(f"{place.shown} would be written to where files are that are not whole yet")
        # Two servers may have files of one name.
        folder = () if place.is_served_by(self._url) else (f"{place.host}_{place.port}",)
        copy = self._root.joinpath(*folder, *place.path)
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
        return folder / f"{process_name(os.getpid()) or os.getpid()}.{threading.get_ident()}.part"

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
        target, part = folder / f"{context().join_id.hex()}-{self._mark}{mark}.ftp", self._part()
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

    def _remember(self, names: Sequence[str], sources: Sequence[_Taken | None]) -> None:
        """Whose files were taken, until it is known what became of that."""
        if self.shared and not self._once:
            self._tell("of sets that replicas share, a message may be part of others still: its file is not deleted")
            return
        found = context()
        if self.shared or len(sources) == 1:
            ids: Sequence[bytes] = [found.join_id] * len(sources)
        else:
            ids = [found.ids.get(name, b"") for name in names]
        taken: dict[bytes, list[_Taken]] = {}
        for id_, source in zip(ids, sources, strict=True):
            if source is not None:
                taken.setdefault(id_, []).append(source)
        with self._lock:
            self._taken.update((id_, files) for id_, files in taken.items() if id_ not in self._aside)

    def settled(self, ids: Iterable[bytes | None]) -> None:
        """Messages, or sets that replicas share, are settled, or will be with the next flush. From any thread."""
        if not self._deletes:
            return
        with self._lock:
            for id_ in ids:
                if id_ is not None:
                    self._done += self._taken.pop(id_, ())
                    self._aside.pop(id_, None)
            left = len(self._done) - _MOST_TO_DELETE
            for _ in range(left):
                self._done.popleft()
        if left > 0:
            self._tell(f"more than {_MOST_TO_DELETE:,} files wait to be deleted: the oldest are left")

    def put_aside(self, ids: Iterable[bytes]) -> None:
        """Whoever looks at these dead letters will want their files. From any thread."""
        if not self._deletes:
            return
        with self._lock:
            for id_ in ids:
                self._taken.pop(id_, None)
                self._aside[id_] = None
            while len(self._aside) > _MOST_TO_DELETE:
                self._aside.popitem(last=False)

    def forget(self, ids: Iterable[bytes | None]) -> None:
        """Others have these by now, and their files. From any thread."""
        with self._lock:
            for id_ in ids:
                if id_ is not None:
                    self._taken.pop(id_, None)

    def forget_all(self) -> None:
        """Others have by now what was not durably settled. From any thread."""
        with self._lock:
            self._taken.clear()
            self._done.clear()

    def open(self) -> None:
        """Looks whether copies can be written. What a killed process has left half fetched goes.

        Raises:
            ConfigurationError: they cannot.
        """
        if self._memory:
            return
        try:
            self._part().touch()
            self._part().unlink()
        except OSError as exc:
            raise ConfigurationError(
                f"{self._who}: local_ftp_path={str(self._root)!r} cannot be written to ({exc}): name the directory that this machine's FTP "
                "server serves, or leave copies out with ftp_memory=True"
            ) from exc
        for part in (self._root / _PARTS).glob("*"):
            pid, is_ours, _ = part.name.partition("-")
            with suppress(OSError, OverflowError):
                # Another container's processes are not seen from here.
                found = part.stat()
                if not (is_ours and pid.isdecimal()) or time.time() - found.st_mtime <= _HALF_FETCHED_S:
                    continue
                # The last of a copy that a server had deleted when its process was killed stays.
                if process_name(int(pid)) != part.name.partition(".")[0] and (part.suffix != _KEPT or found.st_nlink > 1):
                    part.unlink()

    def tidy(self, flush: Callable[[], None]) -> None:
        """To be called now and then: deletes what is done with. `flush`: returns when all that the node has done is settled."""
        now = time.monotonic()
        if self._done and now >= max(self._round_at, self._again_at) and self._owner == threading.get_ident():
            self._round_at = now + _EVERY_S
            try:
                self._delete(flush, _ROUND_S)
            except NO_ROOM:
                pass  # who waits for that waits elsewhere

    def _delete(self, flush: Callable[[], None], seconds: float) -> None:
        """Deletes what is done with by now. What a server that is away has is left for later."""
        count = len(self._done)
        flush()
        until, away = time.monotonic() + seconds, set[tuple[str, int]]()
        for _ in range(count):
            with self._lock:
                if not self._done or time.monotonic() > until:
                    break
                place, copy = self._done.popleft()
            try:
                if place.server not in away:
                    self._delete_one(place, copy)
                    continue
            except (OSError, EdgeServeError) as exc:
                if not isinstance(exc, FetchError) or is_refusal(exc):
                    self._tell(
                        f"a file could not be deleted, and is left: {exc if isinstance(exc, FetchError) else f'{place.shown}: {exc}'}"
                    )
                    continue
                away.add(place.server)
                self._tell(f"a file could not be deleted, and will be tried again: {exc}")
            with self._lock:
                self._done.append((place, copy))
        if away:
            self._again_at = time.monotonic() + self._again_s
            self._again_s = min(2 * self._again_s, _AGAIN_S[1])
        else:
            self._again_s = _AGAIN_S[0]

    def _tell(self, what: str) -> None:
        """In the log, but not for each file."""
        kind, now = what.partition(":")[0], time.monotonic()
        if now - self._told.get(kind, -_TELL_EVERY_S) >= _TELL_EVERY_S:
            self._told[kind] = now
            _log.warning("%s: %s", self._who, what)

    def _delete_one(self, place: Place, copy: Path | None) -> None:
        if copy is None or not place.is_here:
            self._deleter.delete(place)
            return
        # The server may serve the directory that the copy is in: then that is what it deletes.
        kept = self._part().with_suffix(_KEPT)
        with suppress(FileNotFoundError):
            os.link(copy, kept)
        try:
            self._deleter.delete(place)
        finally:
            if kept.exists() and not copy.exists():
                os.replace(kept, copy)
            kept.unlink(missing_ok=True)

    def close(self, flush: Callable[[], None]) -> None:
        """To be called before the node closes. Idempotent."""
        try:
            # What is pending is settled with the flush, and done with only then.
            if self._taken or self._done:
                with suppress(EdgeServeError):  # which the stage meets again when it closes
                    flush()
                    self._delete(flush, _AT_CLOSE_S)
            if self._done:
                _log.warning("%s closes and leaves %d files that it could not delete", self._who, len(self._done))
                self._done.clear()
        finally:
            self._ftp.close()
            self._deleter.close()


__all__ = ("Files",)
