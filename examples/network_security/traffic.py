"""Small clients and servers that `record.py` starts inside its network namespaces, beside the stock ones (curl, dig, ssh, nmap...)."""

import argparse
import asyncio
import contextlib
import os
import pty
import random
import socket
import struct
import time

GAME_QUERY = b"\xff\xff\xff\xffTSource Engine Query\x00"
GAME_PORTS = range(27000, 27100)
SHARD_PORTS = range(7000, 7040)
COMMANDS = ("date", "uptime", "ls /usr/bin | head -4", "cat /etc/hostname", "wc -l /etc/services", "echo all is well", "df -h /tmp")


class GameServer(asyncio.DatagramProtocol):
    """Answers a status query with a status of a few hundred bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: object) -> None:
        self.transport.sendto(b"\xff\xff\xff\xffI" + os.urandom(random.randint(60, 220)), address)  # type: ignore[attr-defined]


async def game_servers(address: str) -> None:
    """One UDP server on each of `GAME_PORTS`."""
    loop = asyncio.get_running_loop()
    for port in GAME_PORTS:
        await loop.create_datagram_endpoint(GameServer, local_addr=(address, port))
    await asyncio.Event().wait()


async def shard_servers(address: str) -> None:
    """A store with one TCP port per shard. A client that says `idle N` is cut off by a reset N seconds later, as idle-timeouts do."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"idle "):
                await asyncio.sleep(float(line[5:]))
                reset = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                break
            writer.write(os.urandom(120))
        writer.close()

    for port in SHARD_PORTS:
        await asyncio.start_server(serve, address, port)
    await asyncio.Event().wait()


def game_browser(address: str, gap_s: float) -> None:
    """A server browser: asks every game server for its status, one datagram per port, `gap_s` apart."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        for port in random.sample(GAME_PORTS, len(GAME_PORTS)):
            sock.sendto(GAME_QUERY, (address, port))
            time.sleep(gap_s)
            with contextlib.suppress(BlockingIOError):
                while sock.recv(2048):
                    pass


def shard_pool(address: str, keepalive_s: int, idle_s: float) -> None:
    """A connection pool to all shards: kept open by TCP keep-alives, or (`idle_s` > 0) left idle, reset by the server, opened again."""
    while True:
        pool = []
        for port in SHARD_PORTS:
            sock = socket.create_connection((address, port))
            if keepalive_s:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive_s)
            sock.sendall(b"idle %f\n" % idle_s if idle_s else b"get\n")
            pool.append(sock)
            time.sleep(0.03)
        for sock in pool:
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
            sock.close()
        time.sleep(random.uniform(1, 3))


def health_check(address: str) -> None:
    """Connects to every shard and hangs up: many ports in a moment, and all of them answer."""
    for port in SHARD_PORTS:
        socket.create_connection((address, port), timeout=2).close()
        time.sleep(0.01)


def type_over_ssh(seconds: float, command: list[str]) -> None:
    """Runs `command` (an ssh client) on a pseudo-terminal and types into it, key by key, at the speed of a person."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    os.set_blocking(terminal, False)
    end = time.monotonic() + seconds
    time.sleep(1.0)
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            for key in random.choice(COMMANDS) + "\r":
                os.write(terminal, key.encode())
                time.sleep(random.uniform(0.06, 0.3))
                with contextlib.suppress(BlockingIOError):
                    os.read(terminal, 65536)
            time.sleep(random.uniform(0.5, 3.0))
        os.write(terminal, b"exit\r")
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("game-servers", "shard-servers", "game-browser", "shard-pool", "health-check", "type"))
    parser.add_argument("address")
    parser.add_argument("numbers", type=float, nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    random.seed(args.seed)
    if args.role == "game-servers":
        asyncio.run(game_servers(args.address))
    elif args.role == "shard-servers":
        asyncio.run(shard_servers(args.address))
    elif args.role == "game-browser":
        game_browser(args.address, args.numbers[0])
    elif args.role == "shard-pool":
        shard_pool(args.address, int(args.numbers[0]), args.numbers[1])
    elif args.role == "health-check":
        health_check(args.address)
    else:
        type_over_ssh(args.numbers[0], args.command)


if __name__ == "__main__":
    main()
