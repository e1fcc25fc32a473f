"""Payloads from another host, over loopback: ours beside bare uvicorn and http.client's readinto, request by request in turn.

    python bench/fetch.py --uvicorn /path/to/python          of an environment with `pip install 'uvicorn[standard]'`
    python bench/fetch.py                                    uvicorn of this environment
    python bench/fetch.py --alone                            ours alone

Ours: from `Fetcher.fetch` to its view of a payload that was not here before, checksum compared, as a file that all processes of the host
can map, with as much kept as may be. Theirs: from the request to the last byte in memory that is used again and again, nothing compared.
Each server is a process of its own. Exits 1 when the median of our medians is more than 1.5 times theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from edgeserve.payload import PayloadWriter, Reference
from edgeserve.payload.fetch import Fetcher
from edgeserve.payload.server import PayloadServer

CASES = ((1_000_000, 200), (6_000_000, 60))
MOST, WARM_UP_BYTES = 1.5, 300_000_000
TOKEN = "token-of-the-benchmark"

APP = """
BODIES = {}

async def app(scope, receive, send):
    size = int(scope["path"][1:])
    body = BODIES.setdefault(size, bytes(range(250)) * (size // 250))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(size).encode())]})
    await send({"type": "http.response.body", "body": body})
"""


def serve(base: Path) -> None:
    """Our origin: for each line with a size it makes a payload and says where it is."""
    position = 0
    (base / "store").mkdir(parents=True)
    writer = PayloadWriter(base / "store", "t", lambda topic: [(0, position)], lambda topic: position)
    with PayloadServer(base, token=TOKEN) as server:
        print(server.port, flush=True)
        for line in sys.stdin:
            payload = np.full(int(line), position % 251, np.uint8)
            kept = writer.put([payload], payload.nbytes)
            assert kept is not None, "no room in shared memory"
            frame = object()
            writer.expect(frame, kept[1])
            writer.placed([frame], position)
            print(kept[0].encode().hex(), flush=True)
            position += 1


@contextlib.contextmanager
def ours(folder: Path, directory: Path) -> Iterator[Callable[[int], float]]:
    """Times one fetch of so many bytes, in seconds."""
    command = [sys.executable, __file__, "--serve", str(folder / "payloads")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as origin, Fetcher(directory) as fetcher:
        assert origin.stdin is not None and origin.stdout is not None
        url = f"http://127.0.0.1:{int(origin.stdout.readline())}"

        def fetch(size: int) -> float:
            assert origin.stdin is not None and origin.stdout is not None
            origin.stdin.write(f"{size}\n")
            origin.stdin.flush()
            remote = msgspec.structs.replace(Reference.decode(bytes.fromhex(origin.stdout.readline())), origin=url, token=TOKEN)
            began = time.perf_counter()
            view = fetcher.fetch(remote)
            took = time.perf_counter() - began
            assert view.nbytes == size
            return took

        try:
            yield fetch
        finally:
            origin.stdin.close()
            origin.wait(30)


@contextlib.contextmanager
def theirs(folder: Path, python: str) -> Iterator[Callable[[int], float]]:
    """The same with uvicorn and http.client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "bench_app.py").write_text(APP)
    command = [python, "-m", "uvicorn", "bench_app:app", "--app-dir", str(folder), "--port", str(port), "--log-level", "warning"]
    with subprocess.Popen([*command, "--no-access-log"]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        memory = memoryview(bytearray(max(size for size, _ in CASES)))

        def fetch(size: int) -> float:
            began = time.perf_counter()
            connection.request("GET", f"/{size}")
            response = connection.getresponse()
            got = 0
            while came := response.readinto(memory[got:size]):
                got += came
            took = time.perf_counter() - began
            assert got == size
            return took

        try:
            for _ in range(600):
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                if server.poll() is not None:
                    sys.exit(f"uvicorn did not start: {python} -m pip install 'uvicorn[standard]'")
                time.sleep(0.05)
            yield fetch
        finally:
            connection.close()
            server.terminate()


def one_run(python: str | None) -> dict[str, dict[int, float]]:
    """The medians, in ms, by who and size."""
    folder = Path(tempfile.mkdtemp(prefix="edgeserve-fetch-", dir="/dev/shm"))
    try:
        with contextlib.ExitStack() as stack:
            who = {"ours": stack.enter_context(ours(folder, folder / "fetched"))}
            if python is not None:
                who["theirs"] = stack.enter_context(theirs(folder, python))
            medians: dict[str, dict[int, float]] = {name: {} for name in who}
            for size, times in CASES:
                took: dict[str, list[float]] = {name: [] for name in who}
                warm_up = WARM_UP_BYTES // size
                for _ in range(warm_up + times):
                    for name, fetch in who.items():
                        took[name].append(fetch(size) * 1e3)
                for name, each in took.items():
                    medians[name][size] = statistics.median(each[warm_up:])
            return medians
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvicorn", metavar="PYTHON", default=sys.executable, help="the Python of an environment that has uvicorn")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    if not arguments.alone and subprocess.run([arguments.uvicorn, "-c", "import uvicorn"], capture_output=True, check=False).returncode:
        sys.exit(
            f"{arguments.uvicorn} has no uvicorn, the baseline. Install it anywhere and name that Python: "
            "python -m venv /tmp/uvicorn && /tmp/uvicorn/bin/pip install 'uvicorn[standard]' && "
            "python bench/fetch.py --uvicorn /tmp/uvicorn/bin/python; or, ours alone: --alone"
        )
    runs = [one_run(None if arguments.alone else arguments.uvicorn) for _ in range(arguments.runs)]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(runs, indent=1))
    short = []
    print(f"{'bytes':>9} {'p50 ms, ours (min-max)':>28} {'uvicorn (min-max)':>28} {'ratio':>6}")
    for size, _ in CASES:
        found = {name: [run[name][size] for run in runs] for name in runs[0]}
        middles = {name: statistics.median(each) for name, each in found.items()}
        texts = [f"{middles[name]:.3f} ({min(each):.3f}-{max(each):.3f})" for name, each in found.items()]
        ratio = middles["ours"] / middles["theirs"] if "theirs" in middles else float("nan")
        print(f"{size:9,} " + " ".join(f"{text:>28}" for text in texts) + f" {ratio:6.2f}", flush=True)
        if ratio > MOST:
            short.append(f"{size} bytes: p50 {ratio:.2f} times that of uvicorn with http.client, at most {MOST} is wanted")
    if short:
        sys.exit("\n".join(short))


if __name__ == "__main__":
    main()
