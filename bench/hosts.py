"""Two cameras on two hosts, a join on a third, 100 Mbit/s between them: what goes over the consumer's link for each result.

    python bench/hosts.py                     every mode once; exit 1 when a line does not hold
    python bench/hosts.py --seconds 60 --runs 5 --only lazy
    python bench/hosts.py --engine pulsar     with Apache Pulsar instead of NATS

lazy, eager: a task takes the newest two frames every 500 ms (`min_interval_ms`). one, two: a third source names every 15th frame, and one
task, or two of different groups, take these (`join='exact'`), lazily: the second one's frames are on the host already.
Hosts are network namespaces on a bridge, each with a link of 100 Mbit/s (token bucket) and a payload directory of its own, so that
nothing is found in another's memory. The broker runs on the first. Each camera has 30 frames/s of 1 MB to send, different in every 4 KiB
page; the tasks check every page. `behind` is how old the frames of the last result were when it was made, seconds since they were due to
be sent: what waits in front of a link that is too slow. Judged from the kernel's counters of the interface and from lines that plain
functions wrote. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from notes import Follower, lines, note

SIZE, PAGE, RATE, INTERVAL_S = 1_000_000, 4096, 30.0, 0.5
LINK = "100mbit"
MOST_BYTES, NEAR, MOST_MORE = 1.08, 0.05, 0.01
EVERY = int(RATE * INTERVAL_S)
MODES = ("lazy", "eager", "one", "two")
WARM_S, START_S = 5.0, 4.0
HOSTS = ("a", "b", "c")
PORTS = {"nats": 4222, "pulsar": 6650}


def frame(n: int) -> np.ndarray[Any, Any]:
    """Frame number `n`: uint8, its number in every page."""
    made = np.zeros(SIZE, np.uint8)
    for at in range(0, SIZE, PAGE):
        made[at : at + 8] = np.frombuffer((n * 1_000 + at // PAGE).to_bytes(8, "little"), np.uint8)[: SIZE - at]
    return made


def number(seen: np.ndarray[Any, Any]) -> int:
    """Its number if every page has it; else -1."""
    heads = np.lib.stride_tricks.sliding_window_view(seen, 8)[::PAGE]
    numbers = heads.copy().view("<u8")[:, 0]
    first = int(numbers[0]) // 1_000
    return first if np.array_equal(numbers, first * 1_000 + np.arange(len(numbers))) and seen.size == SIZE else -1


def camera(node: str, name: str, routing: Any, seconds: float, start: float) -> None:
    """Sends frames at their rate."""

    def stream() -> Iterator[np.ndarray[Any, Any]]:
        for n in range(int(seconds * RATE)):
            made = frame(n)
            time.sleep(max(0.0, start + n / RATE - time.monotonic()))
            yield made

    # They come in order: what has found no partner by then is not waited for.
    options: dict[str, Any] = {"event_time": lambda made: stamp(number(made)), "max_lateness_ms": 0}
    with DataSource(stream(), node, source_id=name, topic="frames", routing=routing, **options) as source:
        source.run()


def stamp(n: int) -> int:
    """The event time of frame number `n`, ns."""
    return round(n / RATE * 1e9)


def ticker(node: str, seconds: float, start: float) -> None:
    """Names every 15th frame."""

    def stream() -> Iterator[int]:
        for n in range(0, int(seconds * RATE), EVERY):
            time.sleep(max(0.0, start + n / RATE - time.monotonic()))
            yield n

    with DataSource(stream(), node, source_id="tick", topic="frames", event_time=stamp, max_lateness_ms=0) as source:
        source.run()


def chosen(node: str, root: Path, group: str) -> None:
    """Takes the frames that are named, and notes them."""

    def three(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], tick: int) -> list[int]:
        right = number(a) == number(b) == tick
        note(root / f"pairs{group}", [number(a) if right else -1, number(b), time.monotonic()])
        return [1]

    with Compute(three, node, topic_in="frames", topic_out="pairs", join="exact", group=f"g{group}") as compute:
        compute.run(until="end")


def consumer(node: str, root: Path) -> None:
    """Takes the newest pair every 500 ms, and notes it."""

    def pair(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> list[int]:
        note(root / "pairs", [number(a), number(b), time.monotonic()])
        return [1]

    with Compute(pair, node, topic_in="frames", topic_out="pairs", min_interval_ms=INTERVAL_S * 1000) as compute:
        compute.run(until="end")


def sh(*command: str) -> str:
    """Runs a command; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Network:
    """Hosts on a bridge, each with a link of its own."""

    def __init__(self, hosts: Sequence[str] = HOSTS, link: str = LINK, burst: str = "64kb") -> None:
        self._burst = burst
        self.mark, self._link = f"es{os.getpid() % 10_000}", link
        self.switch = f"{self.mark}-sw"
        self.hosts = {name: f"{self.mark}-{name}" for name in hosts}
        self.addresses = {name: f"10.77.0.{n}" for n, name in enumerate(hosts, 1)}

    def __enter__(self) -> Network:
        sh("ip", "netns", "add", self.switch)
        sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self.switch, "link", "set", "br0", "up")
        for name, host in self.hosts.items():
            sh("ip", "netns", "add", host)
            sh("ip", "-n", self.switch, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", host)
            sh("ip", "-n", self.switch, "link", "set", f"to-{name}", "master", "br0", "up")
            sh("ip", "-n", host, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
            for each, device in ((host, "eth0"), (self.switch, f"to-{name}")):
                sh("ip", "-n", each, "link", "set", device, "up")
                sh(
                    "tc",
                    "-n",
                    each,
                    "qdisc",
                    "add",
                    "dev",
                    device,
                    "root",
                    "tbf",
                    "rate",
                    self._link,
                    "burst",
                    self._burst,
                    "latency",
                    "100ms",
                )
            sh("ip", "-n", host, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for each in (*self.hosts.values(), self.switch):
            subprocess.run(["ip", "netns", "delete", each], check=False, capture_output=True)

    def counters(self, name: str) -> tuple[int, int]:
        """Bytes that came in and went out at a host's interface."""
        base = "/sys/class/net/eth0/statistics/"
        found = sh("ip", "netns", "exec", self.hosts[name], "cat", f"{base}rx_bytes", f"{base}tx_bytes").split()
        return int(found[0]), int(found[1])

    def start(self, name: str, *command: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """A process on a host."""
        return subprocess.Popen(["ip", "netns", "exec", self.hosts[name], *command], env=os.environ | env)


class Cluster:
    """A network with a broker on one of its hosts; when it ends, so do all processes, and what they have written is gone.

    Attributes:
        network: the network.
        node: URL of the broker.
        root: a directory for what is written.
    """

    def __init__(
        self,
        name: str,
        engine: str = "nats",
        hosts: Sequence[str] = HOSTS,
        link: str = LINK,
        broker: str = HOSTS[0],
        burst: str = "64kb",
    ) -> None:
        self._name, self._engine, self._broker = f"edgeserve-{name}-", engine, broker
        self._hosts, self._link, self._burst = hosts, link, burst
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        with self._stack as stack:
            self.root = Path(tempfile.mkdtemp(prefix=self._name))
            stack.callback(shutil.rmtree, self.root, ignore_errors=True)
            self._memory = Path(tempfile.mkdtemp(prefix=self._name, dir="/dev/shm"))
            stack.callback(shutil.rmtree, self._memory, ignore_errors=True)
            self.network = stack.enter_context(Network(self._hosts, self._link, self._burst))
            stack.callback(broker_on(self.network, self._broker, self._engine, self.root))
            self.node = f"{self._engine}://{self.network.addresses[self._broker]}:{PORTS[self._engine]}"
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on(self, host: str, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A process on a host, which finds nothing in the memory of the others."""
        env = dict(env or {}) | {
            "EDGESERVE_PAYLOAD_DIR": str(self._memory / host),
            "EDGESERVE_ADVERTISE": self.network.addresses[host],
            "EDGESERVE_STATE_DIR": str(self.root / f"state-{host}"),
        }
        process = self.network.start(host, *command, env=env)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)  # who ends after its broker waits for it
        return process


def broker_on(network: Network, host: str, engine: str, root: Path) -> Callable[[], None]:
    """Starts the broker on a host; what stops it."""
    address, port = network.addresses[host], str(PORTS[engine])
    if engine == "nats":
        server = shutil.which("nats-server") or str(Path(sys.executable).with_name("nats-server"))
        process = network.start(
            host, server, "-a", address, "-p", port, "-js", "-sd", str(root / "nats"), "-l", str(root / "nats.log"), env={}
        )

        def stop() -> None:
            process.terminate()
            process.wait(60)

        return stop
    state = {"EDGESERVE_STATE_DIR": str(root / "broker")}
    command = [str(Path(sys.executable).with_name("edgeserve")), "broker"]
    settings = ["--set", "bindAddress=0.0.0.0", "--set", f"advertisedAddress={address}"]
    start = network.start(host, *command, "start", engine, "--data", str(root / "pulsar"), "--port", port, *settings, env=state)
    if start.wait(240):
        raise RuntimeError("Pulsar did not start")

    def end() -> None:
        network.start(host, *command, "stop", engine, env=state).wait(60)

    return end


def _next(made: Follower, running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for the next result, while all are there that make it."""
    made.new()
    while not made.new() and all(each.poll() is None for each in running):
        time.sleep(0.002)


def measure(mode: str, seconds: float, engine: str) -> dict[str, float]:
    """One run."""
    tasks = {"one": ["chosen"], "two": ["chosen", "chosen2"]}.get(mode, ["consumer"])
    routing = "eager" if mode == "eager" else "lazy"
    with Cluster("hosts", engine) as cluster:
        network, node, root, on = cluster.network, cluster.node, cluster.root, cluster.on
        role = [sys.executable, __file__, "--node", node, "--root", str(root), "--routing", routing, "--seconds", str(seconds)]
        takes = [on("c", *role, "--role", task) for task in tasks]
        time.sleep(3.0)
        at = time.monotonic() + START_S
        role += ["--at", str(at)]
        cameras = [on(host, *role, "--role", host) for host in "ab"]
        if mode in ("one", "two"):
            cameras.append(on("a", *role, "--role", "ticker"))
        made = Follower(root / "pairs")
        running = (*takes, *cameras)
        _next(made, running)
        time.sleep(WARM_S)
        # From one result to another: nothing is fetched right behind one, so what is counted is theirs.
        _next(made, running)
        began, before, first = time.monotonic(), network.counters("c"), len(lines(root / "pairs"))
        time.sleep(max(1.0, seconds - 2 * WARM_S - 1))
        _next(made, running)
        took, after, last = time.monotonic() - began, network.counters("c"), len(lines(root / "pairs"))
        pairs = lines(root / "pairs")
        others = [lines(root / f"pairs{task.removeprefix('chosen')}") for task in tasks[1:]]
        for some in (cameras, takes):
            for each in some:
                each.terminate()
            for each in some:
                each.wait(60)
        used = max(1, last - first)
        return {
            "results": last - first,
            "hz": used / took,
            "in_per_result": (after[0] - before[0]) / used / (2 * SIZE),
            "out_per_result": (after[1] - before[1]) / used / (2 * SIZE),
            "wrong": sum(a < 0 or b < 0 for a, b, _ in pairs) + sum(abs(len(other) - len(pairs)) > 2 for other in others),
            "behind": pairs[-1][2] - at - pairs[-1][0] / RATE if pairs else seconds,
        }


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--only", choices=MODES, action="append")
    parser.add_argument("--engine", choices=tuple(PORTS), default="nats")
    parser.add_argument("--at", type=float, help=argparse.SUPPRESS)
    for name in ("--role", "--node", "--root", "--routing"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.role == "consumer":
        consumer(a.node, Path(a.root))
    elif a.role == "ticker":
        ticker(a.node, a.seconds, a.at)
    elif a.role and a.role.startswith("chosen"):
        chosen(a.node, Path(a.root), a.role.removeprefix("chosen"))
    elif a.role:
        camera(a.node, a.role, a.routing, a.seconds, a.at)
    else:
        wrong, carried = list[str](), dict[str, float]()
        sys.stdout.write("mode     results      Hz   in / payload   out / payload   behind   wrong\n")
        for mode in a.only or MODES:
            runs = [measure(mode, a.seconds, a.engine) for _ in range(a.runs)]
            for run in runs:
                sys.stdout.write(
                    f"{mode:8} {run['results']:7} {run['hz']:7.2f} {run['in_per_result']:14.3f} {run['out_per_result']:15.3f} "
                )
                sys.stdout.write(f"{run['behind']:6.2f} s {run['wrong']:7}\n")
                sys.stdout.flush()
                if run["wrong"]:
                    wrong.append(f"{mode}: {run['wrong']} results with a wrong page, or a task that missed some")
            carried[mode], hz = (statistics.median(run[figure] for run in runs) for figure in ("in_per_result", "hz"))
            if mode == "lazy" and carried[mode] > MOST_BYTES:
                wrong.append(f"lazy: {carried[mode]:.3f} bytes for each of the payloads used, not {MOST_BYTES:g}")
            if mode != "eager" and abs(hz * INTERVAL_S - 1) > NEAR:
                wrong.append(f"{mode}: {hz:.2f} results/s, not {1 / INTERVAL_S:g}")
        if {"one", "two"} <= carried.keys() and carried["two"] > carried["one"] * (1 + MOST_MORE):
            wrong.append(f"a second task: {carried['two']:.3f} bytes for each, with one {carried['one']:.3f}")
        if wrong:
            sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
