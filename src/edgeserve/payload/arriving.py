"""What has come of a file that is fetched: written as it comes, no more than is allowed, and compared with what is known of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import IO, Any

from edgeserve.core.errors import CorruptMessage, FetchError, NotAllowed
from edgeserve.core.external import External


class Arriving:
    """One file on its way.

    Args:
        external: what is fetched.
        shown: its URL, for people.
        file: where it goes.
        most_bytes: more is refused.

    Attributes:
        have: how many bytes have come.
        told: whether its size or checksum is known, so that a part of it is not taken for the whole.
    """

    def __init__(self, external: External, shown: str, file: IO[bytes], most_bytes: int) -> None:
        self.shown, self._external, self._file, self._most_bytes = shown, external, file, most_bytes
        self.told = external.size is not None or external.checksum != ""
        self._digest: Any = None
        self.have = 0
        self._begin()

    def _begin(self) -> None:
        algorithm = self._external.checksum.partition(":")[0]
        self._digest = hashlib.new(algorithm, usedforsecurity=False) if algorithm else None

    def expect(self, size: int) -> None:
        """Its origin says that it has so many bytes. Raises as `write` does."""
        if size > self._most_bytes:
            raise NotAllowed(f"{self.shown} has {size:,} bytes, more than fetch_max_bytes={self._most_bytes}")
        if self._external.size is not None and size != self._external.size:
            raise CorruptMessage(f"{self.shown} has {size:,} bytes there, and its message says {self._external.size:,}")

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Takes what came.

        Raises:
            NotAllowed: it is too much.
            CorruptMessage: it is more than its message says.
            FetchError: it cannot be kept.
        """
        have = self.have + len(block)
        if have > self._most_bytes:
            raise NotAllowed(f"{self.shown} has more than fetch_max_bytes={self._most_bytes}")
        if self._external.size is not None and have > self._external.size:
            raise CorruptMessage(f"{self.shown} has more than the {self._external.size:,} bytes that its message says")
        if self._digest is not None:
            self._digest.update(block)
        self._keep(self._file.write, block)
        self.have = have

    def _keep(self, do: Callable[..., object], *args: object) -> None:
        try:
            do(*args)
        except OSError as exc:
            raise FetchError(f"{self.shown} cannot be kept: {exc.strerror}") from None

    def start_over(self) -> None:
        """Forgets what has come."""
        if self.have:
            self._file.seek(0)
            self._file.truncate()
            self.have = 0
            self._begin()

    def finish(self) -> None:
        """Nothing more comes. Raises `CorruptMessage` where it is not what its message says, and `FetchError` as `write` does."""
        if self._external.size is not None and self.have != self._external.size:
            raise CorruptMessage(f"{self.shown} has {self.have:,} bytes, and its message says {self._external.size:,}")
        if self._digest is not None and self._digest.hexdigest() != self._external.checksum.partition(":")[2]:
            raise CorruptMessage(f"{self.shown} does not match the checksum that its message says")
        self._keep(self._file.flush)


__all__ = ("Arriving",)
