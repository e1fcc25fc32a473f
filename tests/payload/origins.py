"""A store with payloads, and processes that serve or fetch them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from edgeserve.payload import PayloadWriter, Reference
from edgeserve.payload.writer import slot_bytes_for

TOKEN = "a-token-for-tests"
MB = 1_000_000
BIG = 16 * MB
"""More than what the sockets in between can hold."""


class Store:
    """A store below `base`, with one writer; all that `settled` says is done with."""

    def __init__(self, base: Path, slots_of: int = 0, slots: int = 1) -> None:
        self.base, self.directory = base, base / "store"
        self.directory.mkdir(parents=True)
        self.done: list[tuple[int, int]] = []
        limit = slots * slot_bytes_for(slots_of) if slots_of else 256 << 20
        self.writer = PayloadWriter(self.directory, "t", lambda topic: self.done, lambda topic: 100, limit)
        self._position = 0

    def put(self, payload: bytes) -> Reference:
        """Keeps a payload, whose message is stored at the next position."""
        reference = self.put_or_none(payload)
        assert reference is not None
        return reference

    def put_or_none(self, payload: bytes) -> Reference | None:
        """The same; None at once where there is no room."""
        self.writer._stalled = True
        kept = self.writer.put([payload], len(payload))
        if kept is None:
            return None
        frame = object()
        self.writer.expect(frame, kept[1])
        self.writer.placed([frame], self._position)
        self._position += 1
        return kept[0]


def payload(n: int, size: int) -> bytes:
    """Payload n, no part of which is like another."""
    return np.random.default_rng(n).integers(0, 256, size, np.uint8).tobytes()


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A process, to be talked with by lines."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def said(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Lets it go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


SERVE = """
import sys
from pathlib import Path
from edgeserve.payload.server import PayloadServer
server = PayloadServer(Path(sys.argv[1]), port=int(sys.argv[2]), token=sys.argv[3])
server.start()
print(server.port, flush=True)
sys.stdin.readline()
"""

FETCH = """
import sys
from pathlib import Path
from edgeserve.payload.fetch import Fetcher
from edgeserve.payload.reference import Reference
fetcher = Fetcher(Path(sys.argv[1]), deadline_s=60)
remote = Reference.decode(bytes.fromhex(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
import xxhash
view = fetcher.fetch(remote)
print(xxhash.xxh3_64_intdigest(view), fetcher.fetched, view.readonly, flush=True)
sys.stdin.readline()
print(xxhash.xxh3_64_intdigest(view), flush=True)
sys.stdin.readline()
"""


def remote_at(url: str, reference: Reference, token: str = TOKEN) -> Reference:
    return Reference.decode(msgspec.structs.replace(reference, origin=url, token=token).encode())
