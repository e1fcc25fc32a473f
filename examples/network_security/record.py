"""Records the two captures of this example anew: real clients, servers and scans in private network namespaces.

    sudo python examples/network_security/record.py train --seed 1
    sudo python examples/network_security/record.py judge --seed 2

Needs root on Linux, the Python package `zstandard`, and (Debian): tcpdump nmap hping3 nginx-light dnsmasq-base bind9-dnsutils curl
vsftpd openssh-server openssh-client nftables iproute2 ethtool. All of it runs under `unshare` in PID, mount and network namespaces of its
own: no packet leaves them, and when the script ends, however it ends, the kernel takes every process and interface down with it.

    clients 10.1.0.0/24 --- tap A (routes requests) --- servers 10.2.0.0/24
            `-------------- tap B (routes replies) ----------'
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from pcap import packets
from traffic import GAME_PORTS

HERE = Path(__file__).resolve().parent
TRAFFIC = [sys.executable, str(HERE / "traffic.py")]
SECOND = 1_000_000_000
CLIENTS = (
    "office1",
    "office2",
    "office3",
    "mirror",
    "lobby1",
    "lobby2",
    "lobby3",
    "pool1",
    "pool2",
    "checker",
    "guest1",
    "guest2",
    "guest3",
)
SERVERS = ("web", "dns", "shell", "game1", "game2")
OPEN_ONLY = {"dns": "udp dport 53", "shell": "tcp dport 22", "game2": "udp dport 27000-27099 accept; tcp dport 7000-7039"}
"""These servers drop what they don't serve; the others refuse it (TCP reset, ICMP port unreachable)."""
LEAST_PROBES = 20
SCANS = {"syn-slow": 3, "syn-fast": 4, "udp-slow": 6, "udp-fast": 8, "ack-slow": 3, "ack-fast": 3}


@dataclass
class Attack:
    """One scan. `start_ns` and `end_ns` are read from tap A's capture afterwards: its first and last probe."""

    kind: str
    attacker: str
    victim: str
    at_s: float
    client_ports: tuple[int, int]
    start_ns: int = 0
    end_ns: int = 0


def sh(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


class Network:
    """Namespaces, addresses and routes. Requests go through tap A, replies through tap B, so each tap sees one direction."""

    def __init__(self, rng: random.Random, work: Path) -> None:
        self.work = work
        clients = rng.sample(range(20, 200), len(CLIENTS))
        servers = rng.sample(range(20, 200), len(SERVERS))
        self.address = {name: f"10.1.0.{n}" for name, n in zip(CLIENTS, clients, strict=True)}
        self.address |= {name: f"10.2.0.{n}" for name, n in zip(SERVERS, servers, strict=True)}
        for lan in ("lan1", "lan2"):
            sh("ip", "netns", "add", lan)
            sh("ip", "-n", lan, "link", "add", "br0", "type", "bridge")
            sh("ip", "-n", lan, "link", "set", "br0", "up")
        for tap in ("tapa", "tapb"):
            sh("ip", "netns", "add", tap)
            for lan, number in (("lan1", 1 if tap == "tapa" else 2), ("lan2", 2 if tap == "tapa" else 1)):
                self._plug(tap, lan, f"10.{lan[-1]}.0.{number}")
            settings = ("ip_forward=1", "conf.all.rp_filter=0", "conf.all.send_redirects=0")
            sh("ip", "netns", "exec", tap, "sysctl", "-qw", *(f"net.ipv4.{setting}" for setting in settings))
        for name, address in self.address.items():
            lan = "lan1" if name in CLIENTS else "lan2"
            sh("ip", "netns", "add", name)
            self._plug(name, lan, address)
            sh("ip", "-n", name, "route", "add", "default", "via", f"10.{lan[-1]}.0.1")
            # Ports below 50000 stay free for scans, so that their probes are known from everything else in the capture.
            sh("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.ip_local_port_range=50000 60999")
        for name, rule in OPEN_ONLY.items():
            rules = f"table inet f {{ chain i {{ type filter hook input priority 0; policy drop; {rule} accept; }}\n}}\n"
            sh("ip", "netns", "exec", name, "nft", rules)

    def _plug(self, name: str, lan: str, address: str) -> None:
        port = f"{name}-{lan}"
        sh("ip", "link", "add", lan, "netns", name, "type", "veth", "peer", "name", port, "netns", lan)
        for namespace, device in ((name, lan), (lan, port)):
            # Offloads would show tcpdump packets of 64 KB that no wire carries.
            sh("ip", "netns", "exec", namespace, "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off", "tx", "off")
        sh("ip", "-n", lan, "link", "set", port, "master", "br0", "up")
        sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", lan)
        sh("ip", "-n", name, "link", "set", lan, "up")
        sh("ip", "-n", name, "link", "set", "lo", "up")

    def start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.work / f"{name}.log").open("ab") as log:
            return subprocess.Popen(("ip", "netns", "exec", name, *argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def start_servers(net: Network, rng: random.Random) -> None:
    root = net.work / "www"
    root.mkdir(mode=0o755)
    for number in range(40):
        (root / f"{number}.bin").write_bytes(rng.randbytes(rng.choice((300, 900, 2500, 7000, 20000))))
    (net.work / "nginx.conf").write_text(
        f"user root; daemon off; worker_processes 1; pid {net.work}/nginx.pid; error_log {net.work}/nginx.err;"
        f"events {{}} http {{ access_log off; server {{ listen 80; root {root}; }} }}"
    )
    (net.work / "vsftpd.conf").write_text(
        f"listen=YES\nanonymous_enable=YES\nanon_root={root}\npasv_enable=YES\nrun_as_launching_user=NO\n"
        "secure_chroot_dir=/var/run/vsftpd/empty\nseccomp_sandbox=NO\nisolate=NO\nisolate_network=NO\n"
    )
    Path("/var/run/vsftpd/empty").mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(net.work / key))
    (net.work / "sshd_config").write_text(
        f"HostKey {net.work}/host\nAuthorizedKeysFile {net.work}/user.pub\nStrictModes no\nPermitRootLogin prohibit-password\nUsePAM no\n"
    )
    net.start("web", "nginx", "-c", str(net.work / "nginx.conf"))
    net.start("web", "vsftpd", str(net.work / "vsftpd.conf"))
    net.start("dns", "dnsmasq", "-k", "-C", "/dev/null", "--no-resolv", f"--address=/#/{net.address['web']}", "--user=root", "--pid-file=")
    net.start("shell", "/usr/sbin/sshd", "-D", "-e", "-f", str(net.work / "sshd_config"))
    for host in ("game1", "game2"):
        net.start(host, *TRAFFIC, "game-servers", net.address[host])
        net.start(host, *TRAFFIC, "shard-servers", net.address[host])


class Day:
    """What everybody does during a recording. `rng` decides who, when and how fast; the programs do the rest."""

    def __init__(self, net: Network, rng: random.Random, seconds: float) -> None:
        self.net, self.rng, self.seconds = net, rng, seconds
        self.begin = time.monotonic()

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    async def run(self, name: str, *argv: str) -> None:
        """Runs a program on a host until it or the recording ends."""
        process = self.net.start(name, *argv)
        while process.poll() is None:
            if self.left_s() < 0:
                process.terminate()
            await asyncio.sleep(0.02)

    async def pause(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(low_s, high_s))

    async def office(self, me: str, page_every_s: float) -> None:
        """Reads web pages of many objects over several connections, asks the name server. Now and then something fails, as it does:
        a port is mistyped, or a program looks for its service at a few ports of a host that does not have it."""
        web, dns = self.net.address["web"], self.net.address["dns"]
        while self.left_s() > 3:
            for _ in range(self.rng.randint(1, 3)):
                await self.run(me, "dig", "+tries=1", "+time=1", f"@{dns}", f"host{self.rng.randrange(1000)}.example")
            first = self.rng.randrange(28)
            await self.run(me, "curl", "-sZ", "--parallel-max", "4", "-o", "/dev/null", f"http://{web}/[{first}-{first + 11}].bin")
            if self.rng.random() < 0.15:
                host, ports = self.net.address[self.rng.choice(SERVERS)], self.rng.sample(range(8080, 8100), self.rng.choice((1, 1, 2, 5)))
                await self.run(me, "curl", "-sZ", "-m", "3", *(f"http://{host}:{port}/" for port in ports))
            await self.pause(0.5 * page_every_s, 1.5 * page_every_s)

    async def typist(self, me: str) -> None:
        while self.left_s() > 10:
            seconds = min(self.rng.uniform(15, 50), self.left_s() - 5)
            key = ["-i", str(self.net.work / "user"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
            ssh = ["ssh", "-tt", *key, f"root@{self.net.address['shell']}", "cd / && exec sh"]
            seed = str(self.rng.randrange(1 << 30))
            await self.run(me, *TRAFFIC, "--seed", seed, "type", "-", str(seconds), "--command", *ssh)
            await self.pause(1, 6)

    async def ftp_mirror(self, me: str) -> None:
        """Passive FTP: a new server port for every file."""
        while self.left_s() > 4:
            url = f"ftp://{self.net.address['web']}/[0-{self.rng.randint(10, 25)}].bin"
            await self.run(me, "curl", "-s", "-m", "20", "-o", "/dev/null", url)
            await self.pause(5, 15)

    async def game_browser(self, me: str, host: str) -> None:
        """Asks a hundred game servers for their status: in a burst, or one by one as a player scrolls down the list."""
        await self.pause(0, 8)
        while self.left_s() > 6:
            gap_s = self.rng.choice((0.004, 0.01, 0.4, 1.0))
            seed = str(self.rng.randrange(1 << 30))
            await self.run(me, *TRAFFIC, "--seed", seed, "game-browser", self.net.address[host], str(gap_s))
            await self.pause(1, 10)

    async def health_checker(self, me: str) -> None:
        while self.left_s() > 4:
            for host in ("game1", "game2"):
                await self.run(me, *TRAFFIC, "health-check", self.net.address[host])
            await self.pause(9, 16)

    async def scan(self, attack: Attack) -> None:
        """nmap and hping3. UDP probes carry the query of a game browser, as a scan for game servers does."""
        await asyncio.sleep(max(0.0, attack.at_s - (time.monotonic() - self.begin)))
        method, speed = attack.kind.split("-")
        victim, port = self.net.address[attack.victim], attack.client_ports[0]
        first = self.rng.randrange(20, 9000) if method != "udp" else GAME_PORTS.stop - self.rng.randint(0, 8)
        slow_ms = self.rng.choice((400, 800, 1200, 1600))
        count = self.rng.randint(60, 110) if speed == "fast" else self.rng.randint(36_000, 54_000) // slow_ms
        if method == "ack":
            # hping3 takes microseconds below a second, else whole seconds.
            gap = "u10000" if speed == "fast" else f"u{slow_ms * 1000}" if slow_ms < 1000 else f"{slow_ms / 1000:.0f}"
            options = ["-A", "-q", "-s", str(port), "-p", f"++{first}", "-i", gap, "-c", str(count)]
            await self.run(attack.attacker, "hping3", *options, victim)
            return
        options = ["-n", "-Pn", "-g", str(port), "-p", f"{first}-{first + count - 1}"]
        options += ["-sS"] if method == "syn" else ["-sU", "--data-string", "....TSource Engine Query."]
        if speed == "slow":
            options += ["-T2", "--scan-delay", f"{slow_ms}ms", "--max-scan-delay", f"{slow_ms}ms", "--max-retries", "0"]
        else:
            options += ["-T4", "--min-rate", str(self.rng.choice((80, 150, 250))), "--max-retries", str(self.rng.randint(0, 1))]
        await self.run(attack.attacker, "nmap", *options, victim)

    def plan_attacks(self) -> list[Attack]:
        """Scans of each kind, from guests that also browse; one after the other between the same two hosts."""
        for _ in range(1000):
            if attacks := self._draw_attacks():
                return attacks
        raise SystemExit(f"{self.seconds} seconds have no room for {sum(SCANS.values())} scans: record longer")

    def _draw_attacks(self) -> list[Attack]:
        """A timetable, or an empty one when the draw left no room for a scan."""
        attacks: list[Attack] = []
        free_s = dict.fromkeys(((guest, server) for guest in ("guest1", "guest2", "guest3") for server in SERVERS), 2.0)
        for kind in self.rng.sample([kind for kind, count in SCANS.items() for _ in range(count)], sum(SCANS.values())):
            lasts_s = 60 if kind.endswith("slow") else 5
            free = [pair for pair, at_s in free_s.items() if at_s < self.seconds - lasts_s]
            if not free:
                return []
            pair = self.rng.choice(free)
            at_s = self.rng.uniform(free_s[pair], self.seconds - lasts_s)
            free_s[pair] = at_s + lasts_s + 10
            port = 32_000 + 200 * len(attacks)
            attacks.append(Attack(kind, *pair, at_s, (port, port + 199)))
        return attacks

    async def live(self, attacks: list[Attack]) -> None:
        everybody: list[Coroutine[Any, Any, None]] = [self.scan(attack) for attack in attacks]
        everybody += [self.office(name, 4) for name in ("office1", "office2", "office3")]
        everybody += [self.office(name, 15) for name in ("guest1", "guest2", "guest3")]
        everybody += [self.typist("office1"), self.typist("office2"), self.typist("guest1")]
        everybody += [self.game_browser(me, host) for me in ("lobby1", "lobby2", "lobby3") for host in ("game1", "game2")]
        everybody += [self.ftp_mirror("mirror"), self.health_checker("checker")]
        await asyncio.gather(*everybody)


def start_pools(net: Network, rng: random.Random, seconds: float) -> None:
    """Connections older than the recording: some live by keep-alives, some lie idle until the server resets them."""
    for pool in ("pool1", "pool2"):
        for host in ("game1", "game2"):
            net.start(pool, *TRAFFIC, "shard-pool", net.address[host], str(rng.randint(5, 9)), "0")
    for client in ("office1", "office2", "office3", "mirror"):
        for host in ("game1", "game2"):
            idle_s = str(rng.uniform(0.15, 0.9) * seconds)
            net.start(client, *TRAFFIC, "--seed", str(rng.randrange(1 << 30)), "shard-pool", net.address[host], "0", idle_s)


def start_tcpdump(net: Network, tap: str, device: str, path: Path) -> subprocess.Popen[bytes]:
    """Captures what enters the tap from one side: headers only (IPv4 in ICMP needs 70 bytes). Tap B stamps in nanoseconds."""
    precision = "nano" if tap == "tapb" else "micro"
    options = ("-i", device, "-Q", "in", "-s", "80", "-B", "16384", "-Z", "root", f"--time-stamp-precision={precision}", "-w", str(path))
    process = subprocess.Popen(("ip", "netns", "exec", tap, "tcpdump", *options, "ip"), stderr=subprocess.PIPE)
    assert process.stderr is not None
    while b"listening on" not in (line := process.stderr.readline()):
        if not line:
            raise SystemExit(f"tcpdump did not start in {tap}")
    return process


def trim(raw: Path, out: Path, start_ns: int, end_ns: int, offset_ns: int, drift_ppm: float) -> int:
    """Cuts a capture to [start, end) of its own clock and compresses it. Both taps run on this host's clock, so tap B's offset
    and drift, which two machines with NTP would have, are put in here. Returns the number of packets kept."""
    data, kept, count = raw.read_bytes(), bytearray(), 0
    unit = 1 if data[:4] == b"\x4d\x3c\xb2\xa1" else 1000
    kept += data[:24]
    position = 24
    while position + 16 <= len(data):
        seconds, fraction, length = (int.from_bytes(data[position + i : position + i + 4], "little") for i in (0, 4, 8))
        stamp = seconds * SECOND + fraction * unit
        stamp += offset_ns + int((stamp - start_ns) * drift_ppm / 1e6)
        if start_ns <= stamp < end_ns:
            kept += (stamp // SECOND).to_bytes(4, "little") + (stamp % SECOND // unit).to_bytes(4, "little")
            kept += data[position + 8 : position + 16 + length]
            count += 1
        position += 16 + length
    out.write_bytes(zstandard.ZstdCompressor(level=19).compress(bytes(kept)))
    return count


def find_probes(attacks: list[Attack], net: Network, tap_a: Path) -> None:
    """Sets each attack's interval to its probes' as captured: from the attacker's reserved client ports to the victim."""
    owner = {
        (net.address[a.attacker], net.address[a.victim], port): a
        for a in attacks
        for port in range(a.client_ports[0], a.client_ports[1] + 1)
    }
    probed: dict[int, set[int]] = {a.client_ports[0]: set() for a in attacks}
    for packet in packets(tap_a):
        if attack := owner.get((packet.src, packet.dst, packet.sport)):
            attack.start_ns = attack.start_ns or packet.time_ns
            attack.end_ns = packet.time_ns
            probed[attack.client_ports[0]].add(packet.dport)
    for attack in attacks:
        if len(probed[attack.client_ports[0]]) < LEAST_PROBES:
            raise SystemExit(f"{attack.kind} by {attack.attacker} reached {len(probed[attack.client_ports[0]])} ports only: it went wrong")


def record(name: str, seed: int, seconds: int) -> None:
    rng = random.Random(seed)
    work, out = Path("/run/record"), HERE / "data" / name
    work.mkdir()
    out.mkdir(parents=True, exist_ok=True)
    net = Network(rng, work)
    start_servers(net, rng)
    time.sleep(2)
    start_pools(net, rng, seconds)
    time.sleep(4)
    dumps = [start_tcpdump(net, "tapa", "lan1", work / "a.pcap"), start_tcpdump(net, "tapb", "lan2", work / "b.pcap")]
    start_ns = (time.time_ns() // SECOND + 2) * SECOND
    time.sleep(max(0.0, (start_ns - time.time_ns()) / SECOND))
    day = Day(net, rng, seconds)
    attacks = day.plan_attacks()
    try:
        asyncio.run(day.live(attacks))
    finally:
        for dump in dumps:
            dump.terminate()
            dump.wait()
    end_ns = start_ns + seconds * SECOND
    offset_ns, drift_ppm = rng.randint(-4_000_000, 4_000_000), rng.uniform(-30, 30)
    kept_a = trim(work / "a.pcap", out / "tap_a.pcap.zst", start_ns, end_ns, 0, 0)
    kept_b = trim(work / "b.pcap", out / "tap_b.pcap.zst", start_ns, end_ns, offset_ns, drift_ppm)
    find_probes(attacks, net, out / "tap_a.pcap.zst")
    truth = {
        "seed": seed,
        "start_ns": start_ns,
        "end_ns": end_ns,
        "packets": {"tap_a": kept_a, "tap_b": kept_b},
        "clock_of_tap_b": {"offset_ns": offset_ns, "drift_ppm": round(drift_ppm, 3)},
        "hosts": {address: host for host, address in net.address.items()},
        "attacks": [
            {"kind": a.kind, "src": net.address[a.attacker], "dst": net.address[a.victim], "start_ns": a.start_ns, "end_ns": a.end_ns}
            for a in sorted(attacks, key=lambda a: a.start_ns)
        ],
    }
    (out / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    owner = os.stat(HERE)
    for path in (out, *out.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)
    sys.stdout.write(f"{name}: {kept_a} + {kept_b} packets, {len(attacks)} attacks, ")
    sys.stdout.write(f"{sum(path.stat().st_size for path in out.iterdir()) / 1e6:.2f} MB in {out}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the recording's folder under data/: train or judge")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        if os.geteuid() != 0:
            raise SystemExit("record.py makes network namespaces, which needs root: run it again with sudo")
        unshare = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
        process = subprocess.Popen((*unshare, sys.executable, __file__, *sys.argv[1:], "--inside"))
        signal.signal(signal.SIGTERM, lambda *_: process.kill())
        try:
            raise SystemExit(process.wait())
        finally:
            process.kill()
    sh("mount", "-t", "tmpfs", "tmpfs", "/run")
    record(args.name, args.seed, args.seconds)


if __name__ == "__main__":
    main()
