"""Fetches what messages name by a URL: from web servers, S3, FTP servers and this machine's directories, as far as a node allows it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from edgeserve.core.errors import FetchError, MissingExtra, NotAllowed, PayloadGone
from edgeserve.core.external import External
from edgeserve.payload.arriving import Arriving
from edgeserve.payload.ftp import FtpFiles, is_refusal, place_of
from edgeserve.payload.location import Allowed, Location, location_of
from edgeserve.payload.web import WebFiles

_BLOCK = 1 << 20
_FTP_IDLE_S = 15.0
_SIGN_S = 5
_GONE = (FileNotFoundError, NotADirectoryError)


class ExternalFiles:
    """What one node may fetch. One thread at a time; bound to the process that made it.

    Args:
        urls: schemes, hosts and paths that are allowed.
        most_bytes: a larger file is not fetched.
        timeout_s: how long one may take in all.

    Raises:
        ConfigurationError: a URL is none.
        MissingExtra: one is of S3, and what signs its requests is not installed.
    """

    def __init__(self, urls: Sequence[str], *, most_bytes: int, timeout_s: float) -> None:
        self._allowed = Allowed(urls)
        self._most_bytes, self._timeout_s = most_bytes, timeout_s
        self._web = WebFiles(self._allowed.check)
        self._ftp = FtpFiles(idle_s=min(_FTP_IDLE_S, timeout_s), whole_s=timeout_s)
        self._s3 = _Buckets() if "s3" in self._allowed.schemes else None

    def fetch(self, external: External, file: IO[bytes]) -> None:
        """Writes a file's bytes to another one.

        Raises:
            NotAllowed: it may not be fetched, or is too large.
            PayloadGone: it is not there.
            CorruptMessage: it is not what its message says.
            FetchError: it did not come in time or whole, or is not given.
        """
        location = self._allowed_location(external)
        ends = time.monotonic() + self._timeout_s
        into = Arriving(external, location.shown, file, self._most_bytes)
        if self._s3 is not None and location.scheme == "s3":
            self._web.fetch(self._s3.signed(location, self._timeout_s), into, ends, redirects=False)
        elif location.scheme == "ftp":
            self._fetch_by_ftp(external.url, location, into)
        elif location.scheme == "file":
            self._read(location, into)
        else:
            self._web.fetch(location, into, ends)
        into.finish()

    def local(self, external: External) -> Path | None:
        """Where a file of this machine lies, with links followed, if that is what it is: nothing has to be fetched. Raises as `fetch`."""
        location = self._allowed_location(external)
        if location.scheme != "file":
            return None
        with open(os.devnull, "wb") as nothing:
            into = Arriving(external, location.shown, nothing, self._most_bytes)
            path = self._read(location, into, content=external.checksum != "")
            if external.checksum:
                into.finish()
        return Path(os.fsdecode(path))

    def close(self) -> None:
        """Ends the connections."""
        self._web.close()
        self._ftp.close()

    def _allowed_location(self, external: External) -> Location:
        location = location_of(external.url)
        self._allowed.check(location)
        return location

    # --- files of this machine ----------------------------------------------------------------------------------

    def _open(self, location: Location) -> tuple[bytes, int]:
        """The path of a file, with links followed, and a descriptor of it."""
        path = os.path.realpath(b"/" + b"/".join(location.path))
        if not self._allowed.is_below(path):
            raise NotAllowed(f"{location.shown} is a link to where this node does not read: it leads out of what fetch= lists")
        try:
            # Not one that waits for somebody to write to it, and no link that has come in between.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except _GONE:
            raise PayloadGone(f"{location.shown} is not there") from None
        except OSError as exc:
            raise FetchError(f"{location.shown} cannot be read: {exc.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise NotAllowed(f"{location.shown} is no file")
            with suppress(FileNotFoundError):  # systems without it
                if os.readlink(f"/proc/self/fd/{fd}".encode()) != path:
                    raise FetchError(f"{location.shown} was moved while it was opened")
        except BaseException:
            os.close(fd)
            raise
        return path, fd

    def _read(self, location: Location, into: Arriving, *, content: bool = True) -> bytes:
        """Takes a file, or only looks at it; returns its path, with links followed."""
        path, fd = self._open(location)
        with open(fd, "rb", buffering=0) as file:
            into.expect(os.fstat(fd).st_size)
            while content and (block := _read_block(file, location)):
                into.write(block)
        return path

    # --- FTP ----------------------------------------------------------------------------------------------------

    def _fetch_by_ftp(self, url: str, location: Location, into: Arriving) -> None:
        try:
            self._ftp.fetch(place_of(url, (location.host,)), into.write, self._most_bytes, into.expect)
        except FetchError as exc:
            if is_refusal(exc) and ": 550" in str(exc):
                raise PayloadGone(str(exc)) from None
            raise


def _read_block(file: IO[bytes], location: Location) -> bytes:
    try:
        return file.read(_BLOCK)
    except OSError as exc:
        raise FetchError(f"{location.shown} cannot be read: {exc.strerror}") from None


class _Buckets:
    """S3, where and as whom the environment says: AWS_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and so on."""

    def __init__(self) -> None:
        try:
            import obstore
            import obstore.store
        except ImportError as exc:
            raise MissingExtra("fetch= with s3:// needs obstore, which signs its requests: pip install 'edgeserve-streams[s3]'") from exc
        self._obstore: Any = obstore
        self._stores: dict[str, Any] = {}

    def signed(self, location: Location, seconds: float) -> Location:
        """Where an object can be had for so long, without further credentials."""
        try:
            key = b"/".join(location.path).decode()
        except UnicodeError:
            raise NotAllowed(f"{location.shown} has a key that is not UTF-8") from None
        if location.path[-1] == b"":
            raise NotAllowed(f"{location.shown} names no object")
        try:
            if location.host not in self._stores:
                brief = {"max_retries": 1, "retry_timeout": timedelta(seconds=_SIGN_S)}
                limits = {"timeout": f"{_SIGN_S}s", "connect_timeout": f"{_SIGN_S}s"}
                self._stores[location.host] = self._obstore.store.S3Store(location.host, client_options=limits, retry_config=brief)
            url = self._obstore.sign(self._stores[location.host], "GET", key, timedelta(seconds=max(60.0, 2 * seconds)))
        except self._obstore.exceptions.BaseError as exc:
            said = str(exc).partition("\n")[0][:300]
            raise FetchError(f"{location.shown}: its request cannot be signed: {said}") from None
        return location_of(url)


__all__ = ("ExternalFiles",)
