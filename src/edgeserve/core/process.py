"""Whether a process that was seen before still lives: its number alone does not say so, for numbers are used again."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache(1)
def boot() -> str:
    """Which run of this machine it is; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@lru_cache(1)
def this_host() -> str:
    """Names this machine as far as its processes can see each other, by the boot and the space of process ids; "" where it has no name."""
    try:
        return boot() and boot() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def born(pid: int) -> str | None:
    """When a process of this machine started, in words that only that process has; None when it has ended."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None if os.path.isdir("/proc/self") else _born_by_ps(pid)
    # One that ended and that nobody has waited for keeps its entry; it holds its ports and files until its last thread has gone.
    ended = rest[0] in (b"Z", b"X") and int(rest[17]) <= 1
    return None if ended else f"{boot()}:{rest[19].decode()}"


def _born_by_ps(pid: int) -> str | None:
    told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    return told or None


def process_name(pid: int) -> str:
    """Names a process among all that this host has ever had; "" when it has ended, or where hosts have no name."""
    since = born(pid) if this_host() else None
    return "" if since is None else f"{pid}-{since.rpartition(':')[2]}"


def hidden(pid: int) -> bool:
    """Whether a process lives that the system does not show: another user's, where processes are kept apart (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}/stat").exists()
    except (OSError, OverflowError):
        pass
    return False


def lives(host: str, process: str) -> bool | None:
    """Whether the process of this name lives on that host; None where that cannot be seen from here."""
    if not (host and process) or host != this_host():
        return None
    pid = int(process.partition("-")[0])
    seen = process_name(pid)
    return None if not seen and hidden(pid) else seen == process


__all__ = ("boot", "born", "hidden", "lives", "process_name", "this_host")
