"""Peers that mean harm, on both ends of a fetch: each is refused by name, in time and in bounded memory, and the others go on.

    python bench/hostile.py                  NATS is started and stopped here; exit 1 when a line does not hold
    python bench/hostile.py --only origins   or `clients`

origins: a source on one host keeps its frames there (`routing='lazy'`) and ends; what listens at its address from then on is hostile. A
sink on another host must put each message aside under a named error before the deadline of ten seconds, ask nobody else, and use no more
memory than one whose origin is honest. clients: a source serves its frames to a sink on another host while hostile clients keep asking it.
Hosts are payload directories: a process with another one finds nothing in this one's memory. Judged from lines that plain functions wrote,
from the dead letters as `edgeserve topic dead-letters` shows them, from what came back at each socket, and from the kernel's figures of
memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brokers import Broker
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from notes import lines, note

SIZE, FRAMES = 1_000_000, 2
DEADLINE_S, START_S = 10.0, 15.0
MOST_MORE_MB = 32.0
SERVED, SERVED_HZ = 200, 20.0
CLIENTS = 8
cx = mp.get_context("spawn")

Answer = Callable[[socket.socket], None]


def head(status: str, *fields: str) -> bytes:
    """The head of an answer."""
    return "\r\n".join((f"HTTP/1.1 {status}", *fields, "", "")).encode()


def says(*parts: bytes, for_ever: bytes = b"", every_s: float = 0.0) -> Answer:
    """Sends the parts; then `for_ever`, at once or slowly, until the peer has enough; without it the connection ends."""

    def answer(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)
        while for_ever:
            sock.sendall(for_ever)
            time.sleep(every_s)

    return answer


def silent(sock: socket.socket) -> None:
    """Takes all and says nothing."""
    while sock.recv(65536):
        pass


WHOLE = head("200 OK", f"Content-Length: {SIZE}")
OTHER = bytes([250]) * SIZE  # no frame's
ORIGINS: dict[str, tuple[Answer, str]] = {
    "other bytes": (says(WHOLE, OTHER), "checksum"),
    "huge length": (says(head("200 OK", f"Content-Length: {1 << 50}"), for_ever=OTHER), "length"),
    "no length": (says(head("200 OK"), for_ever=OTHER), "length"),
    "chunks without end": (says(head("200 OK", "Transfer-Encoding: chunked"), for_ever=b"fffff\r\n" + OTHER), "encoding"),
    "packed": (says(head("200 OK", "Content-Encoding: gzip", f"Content-Length: {SIZE}"), for_ever=OTHER), "encoding"),
    "head without end": (says(b"HTTP/1.1 200 OK\r\n", for_ever=b"X: y\r\n" * 1_000), "8192 bytes"),
    "no HTTP": (says(b"220 ftp.example ready\r\n\r\n"), "status"),
    "byte by byte": (says(WHOLE, for_ever=b"x", every_s=0.2), "in time"),
    "head byte by byte": (says(b"HTTP/1.1 200 OK\r\nX: ", for_ever=b"x", every_s=0.2), "in time"),
    "silent": (silent, "in time"),
    "cut off each time": (says(WHOLE, OTHER[: SIZE // 2]), "in time"),
    "redirect to a file": (says(head("302 Found", "Location: file:///etc/passwd", "Content-Length: 0")), "redirect"),
    "redirect to a host": (says(head("307 Temporary Redirect", "Location: http://127.0.0.1:TRAP/", "Content-Length: 0")), "redirect"),
    "not listed": (silent, "EDGESERVE_ORIGINS"),
}
"""What listens where the source was, and a word of the error."""


class Listening:
    """A server that reads a request and then does as it likes; at a port that was in use before."""

    def __init__(self, port: int, answer: Answer) -> None:
        self._answer, self.asked = answer, 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self.asked += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            buffer = b""
            while came := sock.recv(65536):
                buffer += came
                while b"\r\n\r\n" in buffer:
                    _, _, buffer = buffer.partition(b"\r\n\r\n")
                    self._answer(sock)
                    if self._answer is not silent:
                        sock.shutdown(socket.SHUT_WR)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def here(root: Path, host: str, port: int) -> None:
    """This process is on that host from now on."""
    os.environ |= {
        "EDGESERVE_PAYLOAD_DIR": str(root / host / "memory"),
        "EDGESERVE_STATE_DIR": str(root / host / "state"),
        "EDGESERVE_ADVERTISE": f"127.0.0.1:{port}",
    }


def frames(count: int, hz: float = 0.0) -> Iterator[np.ndarray[Any, Any]]:
    """Frames whose every byte is their number."""
    start = time.monotonic()
    for n in range(count):
        if hz:
            time.sleep(max(0.0, start + n / hz - time.monotonic()))
        yield np.full(SIZE, n % 251, np.uint8)


def source(node: str, root: Path, host: str, port: int, topic: str, count: int, hz: float = 0.0, done: Any = None) -> None:
    """Keeps its frames on its host."""
    here(root, host, port)
    with DataSource(frames(count, hz), node, source_id="camera", topic=topic, routing="lazy") as ds:
        ds.run()
        if done is not None:
            note(root / f"{topic}.peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            done.wait()


def sink(node: str, root: Path, host: str, topic: str, origins: str = "") -> None:
    """Notes each frame that came whole; then how long it took, and its memory. `origins`: those that it may ask."""
    here(root, host, free_port())
    os.environ["EDGESERVE_ORIGINS"] = origins

    def seen(frame: np.ndarray[Any, Any]) -> None:
        note(root / f"{topic}.seen", int(frame[0]) if frame.size == SIZE and (frame == frame[0]).all() else -1)

    began = time.monotonic()
    with Materialize(seen, node, topic=topic, group="far", retries=0) as materialize:
        materialize.run(until="end")
    note(root / f"{topic}.took", [time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024])


def letters(node: str, topic: str) -> list[dict[str, Any]]:
    """The dead letters of a topic."""
    command = [str(Path(sys.executable).with_name("edgeserve")), "topic", "dead-letters", topic, "--node", node, "--json"]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    return found


def other_token(root: Path, port: int) -> subprocess.Popen[str]:
    """A payload server of another user's: it asks for another token."""
    environment = os.environ | {"EDGESERVE_PAYLOAD_DIR": str(root / "stranger"), "EDGESERVE_ADVERTISE": f"127.0.0.1:{port}"}
    command = [str(Path(sys.executable).with_name("edgeserve")), "payloads", "serve", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def origins(node: str, root: Path) -> list[str]:
    """Every hostile origin, all at the same time, and an honest one."""
    trap = Listening(0, silent)
    kinds = ["honest", "other token", *ORIGINS]
    topics = {kind: kind.replace(" ", "-") for kind in kinds}
    ports = {kind: free_port() for kind in kinds}
    honest_done = cx.Event()
    sources = {
        kind: cx.Process(
            target=source,
            args=(node, root, topics[kind], ports[kind], topics[kind], FRAMES, 0.0, honest_done if kind == "honest" else None),
        )
        for kind in kinds
    }
    for process in sources.values():
        process.start()
    for kind, process in sources.items():
        if kind != "honest":
            process.join(120)
    listening: list[Listening] = []
    for kind, (answer, _) in ORIGINS.items():
        if kind == "redirect to a host":
            answer = says(head("307 Temporary Redirect", f"Location: http://127.0.0.1:{trap.port}/", "Content-Length: 0"))
        listening.append(Listening(ports[kind], answer))
    stranger = other_token(root, ports["other token"])
    listed = {"not listed": "10.0.0.0/8"}
    sinks = [cx.Process(target=sink, args=(node, root, f"far-{topics[kind]}", topics[kind], listed.get(kind, ""))) for kind in kinds]
    try:
        for process in sinks:
            process.start()
        for process in sinks:
            process.join(180)
    finally:
        honest_done.set()
        sources["honest"].join(60)
        stranger.terminate()
        stranger.wait(60)
        for process in sinks:
            process.kill()
    wrong = []
    took, base = lines(root / "honest.took")[0]
    if lines(root / "honest.seen") != list(range(FRAMES)):
        wrong.append(f"honest: {lines(root / 'honest.seen')} came")
    print(f"{'what listens there':22} {'took':>7} {'memory':>9}  error")
    print(f"{'the source itself':22} {took:5.1f} s {base:6.0f} MB  none, {FRAMES} of {FRAMES} came")
    for kind in kinds[1:]:
        expected = "token" if kind == "other token" else ORIGINS[kind][1]
        seen, found = lines(root / f"{topics[kind]}.seen"), letters(node, topics[kind])
        ended = lines(root / f"{topics[kind]}.took")
        took, memory = ended[0] if ended else (float("inf"), float("inf"))
        first = found[0]["error"] if found else "none"
        print(f"{kind:22} {took:5.1f} s {memory:6.0f} MB  {first[:110]}", flush=True)
        if seen or len(found) != FRAMES or any(expected not in letter["error"] for letter in found):
            wrong.append(f"{kind}: {len(seen)} seen, {len(found)} put aside: {first}")
        if took > FRAMES * DEADLINE_S + START_S:
            wrong.append(f"{kind}: {took:.1f} s for {FRAMES} messages, the deadline is {DEADLINE_S:g} s each")
        if memory > base + MOST_MORE_MB:
            wrong.append(f"{kind}: {memory:.0f} MB, with an honest origin {base:.0f}")
    if trap.asked:
        wrong.append(f"a redirect was followed, {trap.asked} times")
    if listening[list(ORIGINS).index("not listed")].asked:
        wrong.append("an origin that is not listed was asked")
    return wrong


def request(target: str, *fields: str) -> bytes:
    """A request as a client would send it."""
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: x", *fields, "", "")).encode()


def asks(port: int, *parts: bytes, for_ever: bytes = b"", every_s: float = 0.0) -> tuple[str, float]:
    """Sends the parts, then `for_ever` until it is told to stop: (the status that came, or how it ended, after how many seconds)."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
            sock.settimeout(every_s or 60)
            while True:
                with contextlib.suppress(TimeoutError):
                    came = sock.recv(4096)
                    return (came[9:12].decode() if came else "ended"), time.monotonic() - began
                sock.sendall(for_ever)
        return "ended", time.monotonic() - began


OUTSIDE = "/v1/../../../etc/passwd/0/1/100"
STRANGERS: dict[str, tuple[tuple[bytes, ...], bytes, float, tuple[str, ...], float]] = {
    "no token": ((request("/v1/a/b/0/1/100"),), b"", 0.0, ("401",), 5.0),
    "other token": ((request("/v1/a/b/0/1/100", "Authorization: Bearer " + "x" * 40),), b"", 0.0, ("401",), 5.0),
    "../": ((request(OUTSIDE),), b"", 0.0, ("401",), 5.0),
    "head without end": ((b"GET / HTTP/1.1\r\n",), b"X: y\r\n" * 500, 0.001, ("431", "ended"), 10.0),
    "huge body": ((request("/v1/a/b/0/1/100", f"Content-Length: {1 << 50}"), bytes(1 << 20)), b"", 0.0, ("401", "ended"), 5.0),
    "no HTTP": ((b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n",), b"", 0.0, ("400", "401"), 5.0),
    "head byte by byte": ((b"GET / HTTP/1.1\r\nX: ",), b"x", 0.2, ("400", "431", "503", "ended"), 10.0),
    "silent": ((), b"", 60.0, ("503", "ended"), 15.0),
}
"""What a client sends, then for ever, how often; how that ends, and after how many seconds at the latest."""
TRUSTED: dict[str, tuple[str, ...]] = {
    OUTSIDE: ("400",),
    "/v1/%2e%2e/%2e%2e/0/1/100": ("400", "404"),
    "/v1/./x/0/1/100": ("400", "404"),
    "/v1/..%2f..%2fetc/passwd/0/1/100": ("400", "404"),
    "/etc/passwd": ("400",),
    f"/v1/a/b/0/1/{'9' * 400}": ("400",),
}
"""What is asked for with the right token, and the answer."""


def clients(node: str, root: Path) -> list[str]:
    """Hostile clients at a source that serves a sink on another host."""
    port, topic, done, stop = free_port(), "served", cx.Event(), threading.Event()
    calm = [cx.Process(target=source, args=(node, root, "calm", free_port(), "calm", SERVED, SERVED_HZ, done))]
    calm.append(cx.Process(target=sink, args=(node, root, "far-calm", "calm")))
    roles = [
        cx.Process(target=sink, args=(node, root, "far", topic)),
        cx.Process(target=source, args=(node, root, "near", port, topic, SERVED, SERVED_HZ, done)),
    ]
    answers: dict[str, list[tuple[str, float]]] = {kind: [] for kind in (*STRANGERS, *TRUSTED)}

    def bother(kind: str) -> None:
        parts, for_ever, every_s, _, _ = STRANGERS[kind]
        while not stop.is_set():
            with contextlib.suppress(ConnectionError):
                answers[kind].append(asks(port, *parts, for_ever=for_ever, every_s=every_s))

    try:
        for role in (*calm, *roles):
            role.start()
        while not lines(root / f"{topic}.seen"):
            time.sleep(0.1)
        threads = [threading.Thread(target=bother, args=(kind,), daemon=True) for kind in STRANGERS for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        token = (root / "near" / "memory" / "token").read_text()
        for target in TRUSTED:
            answers[target].append(asks(port, request(target, f"Authorization: Bearer {token}")))
        roles[0].join(180)
        calm[1].join(60)
        stop.set()
        done.set()
        for role in (*calm, *roles):
            role.join(60)
    finally:
        stop.set()
        for role in (*calm, *roles):
            role.kill()
    wrong = []
    print(f"\n{'what asks':60} {'times':>6} {'longest':>9}  answers")
    for kind, came in answers.items():
        expected, most_s = (STRANGERS[kind][3], STRANGERS[kind][4]) if kind in STRANGERS else (TRUSTED[kind], 5.0)
        longest = max((took for _, took in came), default=0.0)
        print(f"{kind[:58]:60} {len(came):6} {longest:7.2f} s  {' '.join(sorted({status for status, _ in came}))}")
        # Of more than it serves the rest is told so, or cut.
        odd = {status for status, _ in came} - {*expected, "503", "ended"}
        if not came or odd or longest > most_s + 5.0:
            wrong.append(f"{kind}: {len(came)} answers, {odd or 'as expected'}, the longest after {longest:.1f} s")
    for name in ("calm", topic):
        seen, (took, memory), peak = lines(root / f"{name}.seen"), lines(root / f"{name}.took")[0], lines(root / f"{name}.peak")[0]
        print(f"{name:8} {len(seen)} of {SERVED} frames in {took:.1f} s; its sink's memory {memory:.0f} MB, its source's {peak:.0f} MB")
        if sorted(seen) != sorted(n % 251 for n in range(SERVED)):
            wrong.append(f"{name}: {len(seen)} frames of {SERVED} came")
    more = lines(root / f"{topic}.peak")[0] - lines(root / "calm.peak")[0]
    if more > MOST_MORE_MB:
        wrong.append(f"the source that was bothered took {more:.0f} MB more")
    return wrong


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("origins", "clients"))
    only = parser.parse_args().only
    wrong = []
    for name, part in (("origins", origins), ("clients", clients)):
        if only in (None, name):
            root = Path(tempfile.mkdtemp(prefix="edgeserve-hostile-"))
            broker = Broker("nats", root / "nats", root / "broker")
            try:
                wrong += part(broker.url, root)
            finally:
                broker.stop()
                shutil.rmtree(root, ignore_errors=True)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
