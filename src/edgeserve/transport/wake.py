"""Wake-ups between the members of a store: a waiting one costs nothing, a dead one is noticed.

Between processes a waker is a UNIX datagram socket in the store's directory: its queue remembers a wake-up that comes before the
wait, and a socket whose process died refuses the connection, which is how death is told from silence. One whose process stands still takes
it: that is told by its beat (`beats.py`).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import threading
import uuid
import weakref
from abc import ABC, abstractmethod
from pathlib import Path

from edgeserve.core.errors import ConfigurationError, DiskFull
from edgeserve.transport.beats import Beats

_log = logging.getLogger("edgeserve")
WAKE = b"w"
_MAX_SOCKET_PATH_BYTES = 100
_ADDRESS_BYTES = 40
_MAX_PACKET_BYTES = 8_192
_MOST_CONNECTED = 256


class Waker(ABC):
    """One waiting place with an address."""

    address: str

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Waits until notified or until the time is over. Notifications since the last `drain` count."""

    @abstractmethod
    def drain(self) -> list[bytes]:
        """Takes notifications, as what they carried: call it before looking for work, then `wait`, which ends at once while there are
        more. Carrying is best effort."""

    @abstractmethod
    def close(self) -> None:
        """Gives the address up. Idempotent."""


class Switchboard(ABC):
    """Makes wakers and reaches those of others."""

    @abstractmethod
    def waker(self) -> Waker: ...

    @abstractmethod
    def notify(self, address: str, packet: bytes = WAKE) -> None: ...

    @abstractmethod
    def alive(self, address: str) -> bool:
        """Whether its process lives."""

    @abstractmethod
    def stands_still(self, address: str) -> bool:
        """Whether its process lives and has done nothing for seconds, as far as this one could see since it was first asked."""

    @abstractmethod
    def close(self) -> None: ...


class _EventWaker(Waker):
    def __init__(self, board: ThreadSwitchboard) -> None:
        self.address = uuid.uuid4().hex
        self.event = threading.Event()
        self._board = board
        board.wakers[self.address] = self

    def wait(self, seconds: float) -> None:
        self.event.wait(seconds)

    def drain(self) -> list[bytes]:
        if not self.event.is_set():
            return []
        self.event.clear()
        return [WAKE]

    def close(self) -> None:
        self._board.wakers.pop(self.address, None)
        self.event.set()


class ThreadSwitchboard(Switchboard):
    """Between the threads of one process."""

    def __init__(self) -> None:
        self.wakers: dict[str, _EventWaker] = {}

    def waker(self) -> Waker:
        return _EventWaker(self)

    def notify(self, address: str, packet: bytes = WAKE) -> None:
        waker = self.wakers.get(address)
        if waker:
            waker.event.set()

    def alive(self, address: str) -> bool:
        return address in self.wakers

    def stands_still(self, address: str) -> bool:
        return False  # who asks is in the same process

    def close(self) -> None:
        """Nothing to give up."""


_wakers: weakref.WeakSet[_SocketWaker] = weakref.WeakSet()


def _after_fork() -> None:
    """A socket that a child holds open would make its parent look alive."""
    for waker in list(_wakers):
        waker.close()


os.register_at_fork(after_in_child=_after_fork)


class _SocketWaker(Waker):
    def __init__(self, directory: str, address: str) -> None:
        self.address = address
        self._path = os.path.join(directory, address)
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self._path)
        except OSError as exc:
            self._socket.close()
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left for a socket in {directory}: free some and start again") from exc
            raise
        _wakers.add(self)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def wait(self, seconds: float) -> None:
        # Not a receive with SO_RCVTIMEO, though that is one call less: its time begins anew with every signal, and signals may come often.
        self._poll.poll(seconds * 1000)

    def drain(self) -> list[bytes]:
        # One at a time: to find the queue empty costs as much as to take a packet from it.
        try:
            return [self._socket.recv(_MAX_PACKET_BYTES)]
        except BlockingIOError:
            return []

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._socket.close()
            if self._pid == os.getpid():
                Path(self._path).unlink(missing_ok=True)


class SocketSwitchboard(Switchboard):
    """Between the processes that have a store open."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd: int | None = None
        self._directory = str(directory)
        if len(os.fsencode(directory)) + _ADDRESS_BYTES > _MAX_SOCKET_PATH_BYTES:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            self._directory = f"/proc/self/fd/{self._fd}"
            if not os.path.isdir(self._directory):
                os.close(self._fd)
                raise ConfigurationError(f"the store's path {directory} is too long for a UNIX socket (100 bytes): use a shorter one")
        self._connected: dict[str, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = False
        # An address names its process, <pid>-<space of process ids>-<random>.<number>, and that the file that it touches.
        self._space = _space_of_pids()
        self._process, self._numbers = f"{os.getpid()}-{self._space}-{uuid.uuid4().hex[:8]}", itertools.count()
        self._beats: Beats | None = None

    def waker(self) -> Waker:
        waker = _SocketWaker(self._directory, f"{self._process}.{next(self._numbers)}")
        try:
            self._beat()
        except BaseException:
            waker.close()
            raise
        return waker

    def _beat(self) -> Beats:
        with self._lock:
            if self._beats is None:
                try:
                    self._beats = Beats(os.path.join(self._directory, self._process))
                except OSError as exc:
                    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise DiskFull(f"no space left for a file in {self._directory}: free some and start again") from exc
                    raise
            return self._beats

    def notify(self, address: str, packet: bytes = WAKE) -> None:
        try:
            (self._connected.get(address) or self._connect(address)).send(packet)
        except BlockingIOError:
            return  # its queue is full of wake-ups already
        except OSError as exc:
            gone = self._connected.pop(address, None)
            if gone is not None:
                gone.close()
            if exc.errno == errno.EBADF:
                # Another thread has just closed this side: the store, or all connections because there were too many.
                if not self._closed:
                    self.notify(address, packet)
            elif exc.errno not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOBUFS, errno.ENOTCONN):
                # What it tells of is committed: an error here must not look like one of the commit.
                _log.warning("a member could not be woken, it looks again within a second: %s", exc)

    def _connect(self, address: str) -> socket.socket:
        """Connected once: otherwise the kernel looks the path up anew for each datagram."""
        with self._lock:
            if address in self._connected:
                return self._connected[address]
            if len(self._connected) >= _MOST_CONNECTED:
                self._disconnect()
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                made.setblocking(False)
                made.connect(os.path.join(self._directory, address))
            except OSError:
                made.close()
                raise
            if self._closed:
                made.close()
            else:
                self._connected[address] = made
            return made

    def _disconnect(self) -> None:
        while self._connected:
            self._connected.popitem()[1].close()

    def alive(self, address: str) -> bool:
        path = os.path.join(self._directory, address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink(missing_ok=True)
                Path(os.path.join(self._directory, address.partition(".")[0])).unlink(missing_ok=True)
                return False
            except FileNotFoundError:
                return False
        return True

    def stands_still(self, address: str) -> bool:
        process, dot, _ = address.partition(".")
        if not dot or process == self._process:
            return False  # a member of an earlier version does not beat
        pid, space, _ = process.split("-")
        return self._beat().stands_still(os.path.join(self._directory, process), int(pid) if space == self._space else None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()
            beats, self._beats = self._beats, None
        if beats is not None:
            beats.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _space_of_pids() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "0"


__all__ = ("WAKE", "SocketSwitchboard", "Switchboard", "ThreadSwitchboard", "Waker")
