"""What both ends of a fetch know of HTTP/1.1: a head of bounded length, read by a deadline."""

from __future__ import annotations

import re
import socket
import time

import msgspec

MOST_HEAD_BYTES = 8192
"""A longer head is refused."""

TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{8,1024}")
"""What a token may look like: it stands in a header as it is."""

GONE = (404, 410)
"""The statuses of what is not there."""

_END = b"\r\n\r\n"
_STATUS = re.compile(r"HTTP/1\.[01] ([0-9]{3})(?: .*)?")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_ODD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class Malformed(Exception):
    """What came is no head of HTTP."""


class TooLong(Malformed):
    """The head has more than `MOST_HEAD_BYTES`."""


class Head(msgspec.Struct):
    """Its first line, and its fields by their names in small letters; of several with one name the values, with commas."""

    first: str
    fields: dict[str, str]

    @property
    def status(self) -> int:
        """Of an answer. Raises `Malformed` where there is none."""
        found = _STATUS.fullmatch(self.first)
        if found is None:
            raise Malformed("no status")
        return int(found[1])

    @property
    def stays_open(self) -> bool:
        """Whether the connection can be used again when all of the body was read."""
        return self.fields.get("connection", "").lower() != "close" and self.first.startswith("HTTP/1.1")


def left_of(ends: float) -> float:
    """Seconds until then, by the monotonic clock. Raises `TimeoutError` when there are none."""
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left


def read_head(sock: socket.socket, buffer: bytearray, ends: float, stall_s: float = 60.0) -> Head | None:
    """Reads a head; what came behind it is left in `buffer`. None: the peer had ended before its first byte.

    Args:
        buffer: what came before.
        ends: when it has to be there, by the monotonic clock, however its bytes trickle in.
        stall_s: how long nothing may come.

    Raises:
        Malformed: it is none, or too long.
        TimeoutError: it is not there in time.
        OSError: the connection broke, also when the peer ended in its midst.
    """
    looked = 0
    while (at := buffer.find(_END, looked)) < 0:
        if len(buffer) > MOST_HEAD_BYTES:
            raise TooLong(f"a head of more than {MOST_HEAD_BYTES} bytes")
        looked = max(0, len(buffer) - len(_END) + 1)
        sock.settimeout(min(stall_s, left_of(ends)))
        came = sock.recv(MOST_HEAD_BYTES)
        if not came:
            if buffer:
                raise ConnectionError("ended in the midst of a head")
            return None
        buffer += came
    if at > MOST_HEAD_BYTES:
        raise TooLong(f"a head of more than {MOST_HEAD_BYTES} bytes")
    raw = bytes(buffer[:at])
    del buffer[: at + len(_END)]
    return _parsed(raw)


def _parsed(raw: bytes) -> Head:
    first, *lines = raw.decode("latin-1").split("\r\n")
    fields: dict[str, str] = {}
    for line in lines:
        found = _FIELD.fullmatch(line)
        if found is None or _ODD.search(line):
            raise Malformed("a field that cannot be read")
        name = found[1].lower()
        fields[name] = f"{fields[name]}, {found[2]}" if name in fields else found[2]
    return Head(first, fields)


def shut(sock: socket.socket) -> None:
    """Ends a connection for both, whoever else has it open, and closes it."""
    end(sock)
    sock.close()


def end(sock: socket.socket) -> None:
    """Ends a connection, so that whoever waits for it in another thread goes on; it stays open."""
    try:
        # Not that of `SSLSocket`, which would let another thread go on in the clear.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # it was at an end


__all__ = ("GONE", "MOST_HEAD_BYTES", "TOKEN", "Head", "Malformed", "TooLong", "end", "left_of", "read_head", "shut")
