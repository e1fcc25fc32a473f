"""Peers of a fetch that misbehave: a relay that stops or cuts what it passes on, and a server that answers as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

ANSWERS_AFTER = b"\r\n\r\n"


class _Listening:
    """Takes connections, each in a thread of its own, until it is closed."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.closed = threading.Event()
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock = self._listener.accept()[0]
            except OSError:
                return
            self._socks.append(sock)
            self._start(self.serve, sock)

    def serve(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._socks:
            end(sock)
        for thread in self._threads:
            thread.join()
        for sock in self._socks:
            sock.close()


def end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Relay(_Listening):
    """Passes on to a port, and notes the heads of the requests.

    Attributes:
        cuts: of the next connections, after how many bytes of what comes back each is cut.
        hold_after: of the next connection what comes back stops after so many bytes, `held` is set, and it goes on with `go`.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.heads: list[bytes] = []
        self.cuts: list[int] = []
        self.hold_after: int | None = None
        self.held, self.go = threading.Event(), threading.Event()
        super().__init__()

    def hold(self, after: int) -> None:
        self.held.clear()
        self.go.clear()
        self.hold_after = after

    def serve(self, sock: socket.socket) -> None:
        upstream = socket.socket()
        # What is stopped here must stop there.
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        try:
            upstream.connect(("127.0.0.1", self.to))
        except OSError:
            upstream.close()
            end(sock)
            return
        self._socks.append(upstream)
        self._start(self._up, sock, upstream)
        self._down(sock, upstream)

    def _up(self, sock: socket.socket, upstream: socket.socket) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while came := sock.recv(65536):
                *heads, buffer = (buffer + came).split(ANSWERS_AFTER)
                self.heads += heads
                upstream.sendall(came)
        end(upstream)

    def _down(self, sock: socket.socket, upstream: socket.socket) -> None:
        cut = self.cuts.pop(0) if self.cuts else None
        hold, self.hold_after = self.hold_after, None
        passed = 0
        with contextlib.suppress(OSError):
            while True:
                at = min(limit for limit in (cut, hold, passed + 65536) if limit is not None)
                if passed == hold:
                    self.held.set()
                    self.go.wait()
                    hold = None
                elif passed == cut:
                    break
                elif came := upstream.recv(at - passed):
                    sock.sendall(came)
                    passed += len(came)
                else:
                    break
        end(sock)
        end(upstream)

    def close(self) -> None:
        self.go.set()
        super().close()


class Scripted(_Listening):
    """Answers each request, in turn, by a function of the socket and the head; the last one answers all that follow."""

    def __init__(self, *answers: Callable[[socket.socket, bytes], None], port: int = 0) -> None:
        self._answers = list(answers)
        self.heads: list[bytes] = []
        super().__init__(port)

    def serve(self, sock: socket.socket) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while came := sock.recv(65536):
                buffer += came
                while ANSWERS_AFTER in buffer:
                    head, _, buffer = buffer.partition(ANSWERS_AFTER)
                    self.heads.append(head)
                    answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                    answer(sock, head)
        end(sock)


def answering(status: str, body: bytes = b"", length: int | None = None, *fields: str) -> Callable[[socket.socket, bytes], None]:
    """An answer of this status; with another length than it has, and no more than that, where one is given."""
    stated = len(body) if length is None else length

    def answer(sock: socket.socket, head: bytes) -> None:
        sock.sendall("\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {stated}", *fields, "", "")).encode() + body)
        if stated != len(body):
            end(sock)

    return answer
