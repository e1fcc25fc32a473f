"""The sink's journal: which message is in its function's hands, and which are done, in a memory-mapped file that outlives kill -9.

A broker may bring acknowledged messages back, and a sink may die between its function's return and the acknowledgement. The journal is
on the host where the function had its effect, so on that host a done message is never handed over again, and only the one in hand is.

The file's layout is in `ring`. Whoever takes over a journal writes the id that was in hand to the file `doubts` beside it, before its slot
is used again: a broker may take its time to bring that message back. So does a sink whose function steps the sink itself.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import xxhash

from edgeserve.core.errors import ConfigurationError, DiskFull, StoreDamagedWarning
from edgeserve.core.settings import state_directory
from edgeserve.stage.duplicates import GENERATION
from edgeserve.stage.ring import COUNTER_AT, RING_AT, SLOT_BYTES, VERSION, Peer, Ring, head, id_in, size_of, slot_of, slots_in
from edgeserve.transport import Transport

_NO_ID = bytes(SLOT_BYTES)
_MOST_DOUBTS = 4_096
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def journal_directory(transport: Transport, url: str, topic: str, group: str) -> Path:
    """The directory of the journals of one group's members on this host.

    It belongs to the store, not to its URL: in another store that took the place of a deleted one, nothing is done yet. What a store in
    memory has done is forgotten with its process.
    """
    place = transport.identity or url
    base = state_directory() if transport.capabilities.durable else _passing_directory()
    return base / "sinks" / xxhash.xxh3_64_hexdigest("\0".join((place, topic, group)).encode())


@cache
def _passing_directory() -> Path:
    """A directory that goes with this process."""
    directory, owner = tempfile.mkdtemp(prefix="edgeserve-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)
    return Path(directory)


class Journal:
    """One member's journal, and what the journals of all members on this host say.

    Attributes:
        done: ids whose function has returned, as far as the refresh before did not tell, oldest first within each journal.
        in_hand: ids whose function had been called and was not known to have returned.
        fresh: whether this host had no journal of the group before.
    """

    def __init__(self, directory: Path, *, slots: int = GENERATION) -> None:
        self._directory = directory
        self._slots = slots
        self._peers: dict[str, Peer] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.fresh = not any(directory.glob("*.journal"))
            self._path, self._fd = self._claim()
        except OSError as exc:
            raise ConfigurationError(
                f"a sink cannot keep its journal in {directory} ({exc.strerror or exc}): make it writable, or set EDGESERVE_STATE_DIR to a "
                "directory that is; it is apart from the store"
            ) from exc
        try:
            self._map = self._open()
        except BaseException as exc:
            os.close(self._fd)
            if isinstance(exc, OSError) and exc.errno in _NO_SPACE:
                raise self._full(size_of(slots)) from exc
            raise
        self._view = memoryview(self._map)
        self._ring = Ring(self._view, self._slots)
        self._counters = self._view[COUNTER_AT : COUNTER_AT + 16].cast("Q")
        self._count = self._counters[0]  # ahead of the other after a kill between the two
        self.done: list[bytes] = []
        self.in_hand: set[bytes] = set()
        try:
            self.refresh()
            self._keep_doubt()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """This member's file."""
        return self._path

    def writer(self) -> tuple[Callable[[bytes], None], Callable[[], None]]:
        """(`begin(id)`, `end()`), to be called around the function. An error in between leaves the slot to the next `begin`."""
        view, counters, slots, check = self._view, self._counters, self._slots, xxhash.xxh3_64_digest

        def begin(id_: bytes) -> None:
            at = RING_AT + self._count % slots * 24
            view[at : at + 24] = id_ + check(id_)

        def end() -> None:
            self._count = count = self._count + 1
            counters[0] = count
            counters[1] = count

        return begin, end

    def abandon(self, id_: bytes) -> None:
        """Takes an id that is in hand out again: its function was not called after all, or has raised and the message was given up."""
        if self._ring.holds(id_):
            at = RING_AT + self._count % self._slots * SLOT_BYTES
            self._view[at : at + SLOT_BYTES] = _NO_ID

    # --- what others say ----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Reads all members' journals, as they are now, into `done` and `in_hand`."""
        self._find_peers()
        self.done.clear()
        self.in_hand.clear()
        for ring in (self._ring, *(peer.ring for peer in self._peers.values())):
            hand = ring.in_hand()  # before: what is done meanwhile is in doubt at worst
            self.done += ring.news()
            if hand is not None:
                self.in_hand.add(hand)
        self.in_hand.update(self._doubts())
        self.in_hand.difference_update(self.done)

    def complete(self) -> bool:
        """Whether all journals that there are now were there at the last refresh."""
        names = {name for name in os.listdir(self._directory) if name.endswith(".journal")}
        names.discard(self._path.name)
        return names == self._peers.keys()

    def look(self, id_: bytes) -> tuple[list[bytes], bool]:
        """(ids that others have done since the last look, whether another has `id_` in hand).

        To be called when `id_` is in this member's hand: of two that begin the same message at the same time, one sees the other.
        """
        done: list[bytes] = []
        held = False
        for peer in self._peers.values():
            ring = peer.ring
            if ring.holds(id_):
                held = True
            done += ring.news()
        return done, held

    def _find_peers(self) -> None:
        found: dict[str, Peer] = {}
        for path in sorted(self._directory.glob("*.journal")):
            if path == self._path:
                continue
            known = self._peers.pop(path.name, None)
            with contextlib.suppress(FileNotFoundError):
                if known is not None and os.stat(path).st_ino == known.inode:
                    found[path.name] = known
                    continue
            if known is not None:
                known.close()
            peer = Peer.open(path)
            if peer is not None:
                found[path.name] = peer
        for gone in self._peers.values():
            gone.close()
        self._peers = found

    # --- doubts -------------------------------------------------------------------------------------------------

    def _doubts(self) -> list[bytes]:
        """The ids that were in hand when a member died, newest last."""
        try:
            raw = (self._directory / "doubts").read_bytes()
        except FileNotFoundError:
            return []
        found = [raw[at : at + SLOT_BYTES] for at in range(0, len(raw) // SLOT_BYTES * SLOT_BYTES, SLOT_BYTES)]
        return [id_ for id_ in map(id_in, found[-_MOST_DOUBTS:]) if id_ is not None]

    def doubt(self, id_: bytes) -> None:
        """Writes down that a message is in hand whose slot is needed for another one."""
        slot = slot_of(id_)
        fd = os.open(self._directory / "doubts", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            end = os.fstat(fd).st_size // SLOT_BYTES * SLOT_BYTES  # behind the last whole one
            if end >= 2 * _MOST_DOUBTS * SLOT_BYTES:
                # In place, so that others who wait for the lock append to what is read, and needs no room.
                kept = b"".join(map(slot_of, self._doubts()[-_MOST_DOUBTS // 2 :]))
                os.pwrite(fd, kept, 0)
                os.ftruncate(fd, end := len(kept))
            while os.pwrite(fd, slot, end) < len(slot):
                pass  # until it says why
        except OSError as exc:
            if exc.errno in _NO_SPACE:
                raise self._full(len(slot)) from exc
            raise
        finally:
            os.close(fd)

    def _full(self, size: int) -> DiskFull:
        return DiskFull(f"no space left in {self._directory} for a sink's journal ({size:,} bytes): free some and start again")

    def _keep_doubt(self) -> None:
        """Writes down what the one before had in hand, unless it is known to be done."""
        hand = self._ring.in_hand()
        if hand is not None and hand in self.in_hand and hand not in self._doubts():
            self.doubt(hand)

    def close(self) -> None:
        """Lets go of the files and the slot. Idempotent."""
        if self._fd >= 0:
            for peer in self._peers.values():
                peer.close()
            self._peers = {}
            self._ring.close()
            self._counters.release()
            self._view.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _claim(self) -> tuple[Path, int]:
        """The first slot that no live member holds. The lock goes with the process."""
        number = 0
        while True:
            path = self._directory / f"{number}.journal"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                number += 1
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return path, fd
            os.close(fd)

    def _open(self) -> mmap.mmap:
        size = os.fstat(self._fd).st_size
        slots = slots_in(self._fd, self._path) if size else "new"
        if isinstance(slots, str):
            whole = size_of(self._slots)
            if size:
                kept = self._path.with_suffix(".damaged")
                kept.write_bytes(os.pread(self._fd, size, 0))
                warnings.warn(
                    f"{self._path}: {slots}; it was begun anew and the old one kept as {kept.name}: "
                    "messages done just before may be handed to the sink again",
                    StoreDamagedWarning,
                    stacklevel=2,
                )
                # Never shorter than others have it mapped: who reads beyond the end of a mapped file is killed.
                os.pwrite(self._fd, bytes(whole), 0)
            os.ftruncate(self._fd, whole)
            os.posix_fallocate(self._fd, 0, whole)
            os.pwrite(self._fd, head(self._slots), 0)
        else:
            self._slots = slots
        return mmap.mmap(self._fd, size_of(self._slots))


__all__ = ("VERSION", "Journal", "journal_directory")
