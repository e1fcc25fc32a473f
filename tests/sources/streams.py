"""Servers of live streams for tests: RTSP with real RTP and RTCP (interleaved in TCP, as FFmpeg's muxer writes them), bytes over HTTP."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from tests.sources.videos import encode

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track1\r\n"
)


class Server:
    """Serves each connection in a thread of its own, some of which may wait for `rest`. `asked`: how many connections there were."""

    def __init__(self, serve: Callable[[socket.socket], None], rest: threading.Event | None = None) -> None:
        self._serve, self._rest, self.asked = serve, rest, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.asked += 1
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._one, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _one(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            self._serve(connection)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rest is not None:
            self._rest.set()
        for each in (self._socket, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(20)


def http(chunks: Callable[[], Iterable[bytes]], rest: threading.Event | None = None) -> Server:
    """Answers each request with these bytes; a live stream has no length. `rest`: what they may wait for."""

    def serve(connection: socket.socket) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked and (more := connection.recv(4096)):
            asked += more
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for chunk in chunks():
            connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        connection.sendall(b"0\r\n\r\n")

    return Server(serve, rest)


def encoded(numbers: Iterable[int], **options: Any) -> bytes:
    """A video as bytes."""
    file = io.BytesIO()
    file.name = ""  # type: ignore[attr-defined]
    encode(file, numbers, **options)
    return file.getvalue()


class _Interleaved:
    """What FFmpeg's RTP muxer writes to, a packet at a time: RTP goes to channel 0, RTCP to channel 1."""

    name = ""

    def __init__(self, connection: socket.socket, reports: bool) -> None:
        self._connection, self._reports = connection, reports

    def write(self, packet: bytes) -> int:
        report = 192 <= packet[1] <= 223
        with suppress(OSError):  # who has left needs no more
            if not self._reports and report:
                return len(packet)
            self._connection.sendall(b"$" + bytes([report]) + len(packet).to_bytes(2, "big") + bytes(packet))
        return len(packet)


def rtsp(numbers: Iterable[int], *, reports: bool = True, rest: threading.Event | None = None) -> Server:
    """Plays these frames to whoever comes; then waits for `rest`, or closes the connection. Without `reports` it says no times."""
    numbers = list(numbers)

    def serve(connection: socket.socket) -> None:
        for method, number in _requests(connection):
            head = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\nSession: 1\r\n"
            body = ""
            if method == "DESCRIBE":
                body, head = SDP, head + f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n"
            elif method == "SETUP":
                head += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            elif method == "OPTIONS":
                head += "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            connection.sendall(f"{head}\r\n{body}".encode())
            if method == "PLAY":
                options = {"x264-params": "repeat-headers=1", "tune": "zerolatency"}
                to = _Interleaved(connection, reports)
                encode(to, numbers, format="rtp", options=options, container_options={"packetsize": "1400"})
                if rest is not None:
                    rest.wait(60)
                return

    return Server(serve, rest)


def _requests(connection: socket.socket) -> Iterator[tuple[str, str]]:
    asked = b""
    while more := connection.recv(4096):
        asked += more
        while b"\r\n\r\n" in asked:
            request, asked = asked.split(b"\r\n\r\n", 1)
            lines = request.decode().split("\r\n")
            yield lines[0].split()[0], next(line.split(":")[1].strip() for line in lines if line.lower().startswith("cseq"))
