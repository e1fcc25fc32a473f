"""`fetch=[...]`: messages whose value is a URL. What the task gets are the bytes that lie there, or the path of a file with them."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from types import UnionType
from typing import Any, Union, get_args, get_origin

from edgeserve.core.errors import ConfigurationError, FetchError, NotAllowed, PayloadMismatch
from edgeserve.core.external import External, OrExternal, is_url
from edgeserve.core.payload import PayloadDecoder, decoder_for
from edgeserve.core.process import process_name
from edgeserve.core.settings import state_directory
from edgeserve.payload import ExternalFiles
from edgeserve.stage.context import context
from edgeserve.stage.task import DEFERRED, Task

FETCH_MAX_BYTES, FETCH_TIMEOUT_MS = 256 << 20, 60_000

_FOLDER = "fetched"
_ABANDONED_S = 3_600.0
_SUFFIX = 12


class ExternalInputs:
    """Those of one node.

    Args:
        who: the node, for people.
        urls: what may be fetched: see `Allowed`.
        most_bytes: a larger file is not fetched.
        timeout_ms: how long one may take.

    Raises:
        ConfigurationError, MissingExtra: see `ExternalFiles`.
    """

    def __init__(self, who: str, urls: Sequence[str], most_bytes: int, timeout_ms: float) -> None:
        self._who = who
        self._files = ExternalFiles(urls, most_bytes=most_bytes, timeout_s=timeout_ms / 1000)
        self._paths: set[str] = set()
        self._decoders: dict[str, PayloadDecoder] = {}
        # By parameter what was fetched last, for which message: a set that is tried again, or made of it once more, need not wait.
        self._last: dict[str, tuple[bytes, External, bytes]] = {}
        self._folder: Path | None = None

    def wrap(self, task: Task) -> None:
        """Has the task get what lies at URLs, for parameters that take bytes or a Path. All others get what was sent."""
        names = task.parameters or ("",)
        for name in names:
            annotation = task.annotations.get(name, Any)
            if annotation is Path or (get_origin(annotation) in (Union, UnionType) and Path in get_args(annotation)):
                self._paths.add(name)
                task.annotations.pop(name)
            elif (decode := _taking_bytes(annotation, name)) is not None:
                self._decoders[name] = decode
                if name in task.annotations:
                    task.annotations[name] = OrExternal(annotation)
        if not self._paths and not self._decoders:
            raise ConfigurationError(
                f"{self._who}: fetch= is given, and no parameter of {task.name} takes what is fetched: annotate it as bytes or pathlib.Path"
            )
        call, finish = task.call, task.finish

        def with_fetched(*values: Any) -> Any:
            copies: list[Path] = []
            try:
                result = call(*[self._given(name, value, copies) for name, value in zip(names, values, strict=True)])
                return finish(result) if type(result) in DEFERRED else result
            finally:
                for copy in copies:
                    copy.unlink(missing_ok=True)

        task.call = with_fetched

    def _given(self, name: str, value: Any, copies: list[Path]) -> Any:
        """What the task gets for a value."""
        if name not in self._decoders and name not in self._paths:
            return value
        external = value if type(value) is External else _named(value) if type(value) is str and is_url(value) else None
        if name in self._paths:
            if external is None and value is not None:
                raise PayloadMismatch(
                    f"the payload of source {name!r} is a {type(value).__name__}, and its parameter takes a Path: send a URL"
                )
            return None if external is None else self._copy(external, copies)
        return value if external is None else self._decoders[name]("b", self._bytes(name, external))

    def _bytes(self, name: str, external: External) -> bytes:
        found = context()
        id_ = found.ids.get(name, found.join_id)
        last = self._last.get(name)
        if last is not None and last[:2] == (id_, external):
            return last[2]
        self._last.pop(name, None)
        memory = io.BytesIO()
        self._files.fetch(external, memory)
        content = memory.getvalue()
        self._last[name] = id_, external, content
        return content

    def _copy(self, external: External, copies: list[Path]) -> Path:
        own = self._files.local(external)
        if own is not None:
            return own
        try:
            fd, path = tempfile.mkstemp(suffix=_suffix(external.url), dir=self._made_folder())
        except OSError as exc:
            raise FetchError(f"{external!r} cannot be kept in {self._folder}: {exc.strerror}") from None
        copies.append(Path(path))
        with open(fd, "wb") as file:
            self._files.fetch(external, file)
        return Path(path)

    def _made_folder(self) -> Path:
        if self._folder is None:
            base = state_directory() / _FOLDER
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_abandoned(base)
            own = process_name(os.getpid()) or str(os.getpid())
            self._folder = Path(tempfile.mkdtemp(prefix=f"{own}.", dir=base))
        return self._folder

    def open(self) -> None:
        """Nothing: connections are made when they are wanted."""

    def close(self, _flush: object) -> None:
        """To be called when the node closes. Idempotent."""
        self._files.close()
        self._last.clear()
        if self._folder is not None:
            rmtree(self._folder, ignore_errors=True)
            self._folder = None


def external_inputs(who: str, urls: Sequence[str], most_bytes: int, timeout_ms: float, *, ftp: bool) -> ExternalInputs:
    """As a node's keywords say. Raises `ConfigurationError` with `ftp=True`, which is another way to do it."""
    if ftp:
        raise ConfigurationError(f"{who}: ftp=True and fetch= are two ways to fetch what messages name: leave one of them out")
    return ExternalInputs(who, urls, most_bytes, timeout_ms)


def _named(url: str) -> External:
    try:
        return External(url)
    except ConfigurationError as exc:
        raise NotAllowed(str(exc)) from None


def _taking_bytes(annotation: Any, name: str) -> PayloadDecoder | None:
    """The decoder of a parameter, if it takes bytes."""
    decode = decoder_for(annotation, source=name)
    try:
        decode("b", b"")
    except PayloadMismatch:
        return None
    return decode


def _suffix(url: str) -> str:
    """That of the file's name: many readers go by it."""
    suffix = Path(url.partition("?")[0].partition("#")[0]).suffix
    return suffix if len(suffix) <= _SUFFIX and suffix[1:].isalnum() else ""


def _remove_abandoned(base: Path) -> None:
    """What killed processes have left."""
    for folder in base.iterdir():
        pid = folder.name.partition("-")[0]
        with suppress(OSError, OverflowError):
            # Another container's processes are not seen from here.
            if pid.isdecimal() and time.time() - folder.stat().st_mtime > _ABANDONED_S:
                if process_name(int(pid)) != folder.name.partition(".")[0]:
                    rmtree(folder, ignore_errors=True)


__all__ = ("FETCH_MAX_BYTES", "FETCH_TIMEOUT_MS", "ExternalInputs", "external_inputs")
